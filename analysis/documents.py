"""Accuracies that the documents behind this repository state, to compare runs with.

    find(group.argument)         # the Documented experiment with the same settings, or None

Each experiment has the settings that its document names and that matter for accuracy. A run matches
it only if all of them are equal.
"""

from typing import NamedTuple

from analysis.replicates import SEVERAL


class Documented(NamedTuple):
    """An experiment: test accuracy in percent after so many epochs.

    settings: arguments of the training scripts, and "augmented", "mixed": see `settings_of`.
    """

    name: str
    dataset: str
    model: str
    epochs: int
    accuracy: float
    settings: dict


def _experiments(name, dataset, epochs, settings, accuracies):
    return [
        Documented(name, dataset, model, epochs, accuracy, settings)
        for model, accuracy in accuracies.items()
    ]


SCRATCH = dict(pretrained=False, image_size=32)
PLAIN = SCRATCH | dict(augmented=False)
CROPPED = SCRATCH | dict(augmented=True, mixed=False, optimizer="sgd")
MIXED = SCRATCH | dict(augmented=True, mixed=True, optimizer="sgd")
PUBLISHED_32 = dict(pretrained=True, image_size=32)

# fmt: off
DEPTH = dict(resnet18=84.27, resnet34=85.16, resnet50=83.95, resnet101=85.23, resnet152=84.33)
ZOO = dict(
    resnet20=66.50, resnet32=69.50, resnet56=72.50, eca_resnet20=68.00, eca_resnet32=71.00,
    ecanet20_fixed_k3=66.84, ecanet20_fixed_k5=65.99, ecanet20_fixed_k7=66.80,
    ecanet20_fixed_k9=67.05, ecanet20_adaptive=68.08, ghost_resnet20=35.16, ghost_resnet32=43.69,
    improved_resnet20_convnext=72.33, ghostnet_100=56.94, convnext_tiny=59.09,
    segnext_mscan_tiny=60.91, mlp_mixer_tiny=42.47, mlp_mixer_b16=60.93, cspresnet50=50.22,
    resnest50d=57.20, coatnet_0=66.61, coatnet_cifar_opt=58.68,
    coatnet_cifar_opt_large_stem=55.96, hornet_tiny=60.00,
)
# fmt: on
ADAMW_COSINE = dict(optimizer="adamw", schedule="cosine")
DOCUMENTED = [
    *_experiments("depth", "cifar10", 200, PLAIN | dict(optimizer="adam"), DEPTH),
    # The document says "about 85".
    *_experiments("ladder", "cifar10", 500, PLAIN | dict(optimizer="sgd"), dict(resnet34=85.0)),
    *_experiments("ladder", "cifar10", 500, CROPPED, dict(resnet34=93.65)),
    *_experiments("ladder", "cifar10", 500, MIXED, dict(resnet34=96.47)),
    *_experiments(
        "ViT", "cifar10", 150, dict(pretrained=True, image_size=224), dict(vit_tiny=97.32)
    ),
    *_experiments(
        "ViT", "cifar10", 150, dict(pretrained=False, image_size=224), dict(vit_tiny=75.61)
    ),
    *_experiments("ViT", "cifar10", 150, SCRATCH, dict(vit_custom=68.97)),
    *_experiments("zoo", "cifar100", 300, SCRATCH | dict(augmented=True), ZOO),
    *_experiments(
        "pretrained",
        "cifar100",
        25,
        PUBLISHED_32 | ADAMW_COSINE,
        dict(nfnet_f0=74.23, vit_base_patch8=73.17),
    ),
    *_experiments(
        "pretrained",
        "cifar100",
        25,
        PUBLISHED_32 | dict(optimizer="sgd", schedule="cosine"),
        dict(nfnet_f0=58.47),
    ),
    *_experiments(
        "pretrained",
        "cifar100",
        25,
        PUBLISHED_32 | dict(optimizer="adamw", schedule="linear"),
        dict(nfnet_f0=73.36),
    ),
]
# Arguments that make another experiment of any of these, unless they have this value.
UNCHANGED = {
    "model_arg": [],
    "weights": None,
    "freeze_backbone": False,
    "lora_rank": 0,
    "limit_train": 0,
    "limit_test": 0,
    "val_size": 0,
    "progressive": "none",
    "repeated_augment": 1,
}


def find(argument):
    """The Documented experiment with the settings of a run, or None.

    argument: a function of an argument's name that returns its value, or None if it is not known.
    """
    if any(argument(name) not in (None, value) for name, value in UNCHANGED.items()):
        return None
    settings = settings_of(argument)
    for documented in DOCUMENTED:
        same = (documented.dataset, documented.model) == (argument("dataset"), argument("model"))
        if same and documented.settings.items() <= settings.items():
            return documented
    return None


def settings_of(argument):
    """The settings of a run that DOCUMENTED names; {} if they are not known or vary.

    augmented: whether training images are cropped and mirrored (True), not changed at all (False),
    or changed otherwise (None); mixed: by MixUp or CutMix.
    """
    names = ("augment", "mixup", "cutmix", "mix_prob", "cutout", "random_erasing")
    values = {name: argument(name) for name in names}
    if any(value in (None, SEVERAL) for value in values.values()):
        return {}
    if not isinstance(values["augment"], str):
        return {}
    has_alpha = values["mixup"] or values["cutmix"]
    mixed = bool(has_alpha and values["mix_prob"])
    removes_pixels = values["cutout"] or values["random_erasing"]
    changes = set(values["augment"].split(","))
    augmented = None
    if "crop" in changes and changes & {"flip", "alternating_flip"}:
        augmented = True
    elif changes == {"none"} and not mixed and not removes_pixels:
        augmented = False
    names = ("pretrained", "image_size", "optimizer", "schedule")
    return {name: argument(name) for name in names} | {"mixed": mixed, "augmented": augmented}
