"""The suites of sweep.py run the documents' experiments: with their settings, all of them."""

import importlib
import re
import shlex

import pytest
from helpers.paths import ROOT

from models import MODELS
from sweeps import plans, suites
from training import arguments

DEPTH = dict(
    dataset="cifar10", optimizer="adam", lr=5e-3, batch_size=128, epochs=200, augment="none",
    schedule="constant", mixup=0, cutmix=0, label_smoothing=0, ema_decay=0, warmup_epochs=0,
    eval_train=True,
)  # fmt: skip
SGD = dict(
    dataset="cifar10", model="resnet34", epochs=500, batch_size=128, lr=5e-3, optimizer="sgd",
    momentum=0.9, nesterov=False, schedule="cosine", warmup_epochs=0, label_smoothing=0,
    ema_decay=0,
)  # fmt: skip
BARE = dict(augment="none", mixup=0, cutmix=0, cutout=0, random_erasing=0)
CROP = SGD | dict(augment="crop,flip", crop_padding="zero", crop_pixels=0, mixup=0, cutmix=0)
JITTER = CROP | dict(augment="crop,flip,color_jitter", jitter=0.4)
RANKING = dict(dataset="cifar10", epochs=150, batch_size=256, lr=0.1)
LIKE_RESNETS = dict(
    dataset="cifar10", optimizer="sgd", lr=0.1, batch_size=128, epochs=200, augment="crop,flip",
    mixup=0, cutmix=0, eval_train=True,
)  # fmt: skip
TRANSFORMER = dict(dataset="cifar10", epochs=150, batch_size=512, lr=1e-4, layer_decay=1)
LARGEST = dict(
    dataset="cifar10", epochs=50, batch_size=256, lr=1e-4, layer_decay=1, pretrained=True
)
ZOO = dict(
    dataset="cifar100", epochs=300, batch_size=128, augment="crop,flip", mixup=0.2, mix_prob=1,
    cutmix=0, label_smoothing=0.1, image_size=32,
)  # fmt: skip
RESIDUAL = ZOO | dict(optimizer="sgd", lr=0.1)
AT_32 = dict(
    dataset="cifar100", image_size=32, pretrained=True, optimizer="adamw", lr=5e-4, epochs=25,
    weight_decay=1e-2, batch_size=256, warmup_epochs=5, schedule="cosine", seed=3407, layer_decay=1,
)  # fmt: skip
NFNET = AT_32 | dict(model="nfnet_f0")
TRANSFER = dict(
    dataset="cifar10", image_size=224, epochs=30, batch_size=128, optimizer="adamw", lr=3e-4,
    weight_decay=0.05, schedule="cosine", augment="random_resized_crop,rand_augment", mixup=0,
    cutmix=0, random_erasing=0, label_smoothing=0.1, clip_grad=1, layer_decay=1,
)  # fmt: skip
ECA_KERNELS = "ecanet20_fixed_k3 ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9"
ZOO_RESIDUAL = f"""
resnet20 resnet32 resnet44 resnet56 resnet110 eca_resnet20 eca_resnet32 {ECA_KERNELS}
ecanet20_adaptive resnet20_no_eca ghost_resnet20 ghost_resnet32 improved_resnet20_convnext
ghostnet_100 cspresnet50 resnest50d"""
ZOO_OTHERS = """
convnext_tiny segnext_mscan_tiny mlp_mixer_tiny mlp_mixer_b16 coatnet_0 coatnet_0_custom_enhanced
coatnet_cifar_opt coatnet_cifar_opt_large_stem hornet_tiny"""


def for_each(names, settings):
    return {name: settings | dict(model=name) for name in names.split()}


def ghost(ratio):
    return RESIDUAL | dict(model="ghost_resnet20", model_arg=[f"ratio={ratio}"])


# {suite: {experiment: resolved arguments that the documents give}}
DOCUMENTED = {
    # A1: networks of 18 to 152 layers, Adam, normalization only.
    "depth": for_each("resnet18 resnet34 resnet50 resnet101 resnet152", DEPTH),
    # A2: the ladder of ResNet-34.
    "augmentation": {
        "adam": DEPTH | dict(model="resnet34", epochs=500),
        "sgd-cosine": SGD | BARE,
        "crop-flip": CROP,
        "crop-flip-jitter": JITTER,
        "crop-flip-jitter-mix": JITTER | dict(mixup=1, cutmix=1, mix_prob=1, mix_per="batch"),
    },
    # B1: plain, residual and multi-scale networks, ranked by error.
    "ranking": for_each("resnet18_ms resnet34 resnet18 plain18 plain34", RANKING),
    "degradation": for_each("plain18 plain34 resnet18 resnet34", dict(dataset="cifar10"))
    | for_each("plain20 plain32 plain44 plain56 resnet20 resnet32 resnet44 resnet56", LIKE_RESNETS),
    # B2: ViT-Tiny pretrained and from scratch, a small one of one's own.
    "vit-pretraining": {
        "vit_tiny-pretrained": TRANSFORMER
        | dict(model="vit_tiny", image_size=224, pretrained=True),
        "vit_tiny": TRANSFORMER | dict(model="vit_tiny", image_size=224, pretrained=False),
        "vit_custom": TRANSFORMER | dict(model="vit_custom", image_size=32, pretrained=False),
    },
    # B3: the largest.
    "sota": {
        "eva02_large": LARGEST | dict(model="eva02_large", image_size=448),
        "eva_giant": LARGEST | dict(model="eva_giant", image_size=336),
        "convnext_xxlarge": LARGEST | dict(model="convnext_xxlarge", image_size=256),
    },
    # C1: the zoo.
    "zoo": for_each(ZOO_RESIDUAL, RESIDUAL) | for_each(ZOO_OTHERS, ZOO),
    # C2: channel attention.
    "eca": for_each(f"resnet20_no_eca ecanet20_adaptive {ECA_KERNELS}", RESIDUAL),
    "eca-position": {
        position: RESIDUAL | dict(model="ecanet20_fixed_k3", model_arg=[f"eca_position={position}"])
        for position in ("bn1", "bn2", "add")
    },
    # C3: ghost ratios.
    "ghost": for_each("resnet20 resnet32 ghost_resnet20 ghost_resnet32", RESIDUAL)
    | {"ghost_resnet20-ratio3": ghost(3), "ghost_resnet20-ratio4": ghost(4)},
    # D1 and D2: fine-tuning at 32 px.
    "cnn-vs-vit": for_each("nfnet_f0 vit_base_patch8", AT_32),
    "optimizer-schedule": {
        "adamw-cosine": NFNET,
        "sgd-cosine": NFNET | dict(optimizer="sgd", momentum=0.9, nesterov=False),
        "adamw-linear": NFNET | dict(schedule="linear", warmup_epochs=0),
    },
    # E1: pretrained and from scratch, with the same recipe.
    "pretraining": {
        "resnet18": TRANSFER | dict(model="timm/resnet18", pretrained=False),
        "resnet18-pretrained": TRANSFER | dict(model="timm/resnet18", pretrained=True),
        "tinyvit_5m": TRANSFER | dict(model="tinyvit_5m", pretrained=False),
        "tinyvit_5m-pretrained": TRANSFER | dict(model="tinyvit_5m", pretrained=True),
    },
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_suite_has_the_settings_of_the_documents(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = plans.plan(name, {}, suites.SUITES[name].seeds, None)
    assert {run.label for run in runs} >= DOCUMENTED[name].keys()
    for run in runs:
        for key, value in DOCUMENTED[name].get(run.label, {}).items():
            assert getattr(run.args, key) == value, f"{run.label}: --{key}"


def test_the_same_recipe_for_four_and_a_recipe_of_its_own_for_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = plans.plan("pretraining", {}, [0], None)
    identity = plans.IDENTITY & vars(runs[0].args).keys() - {"model", "pretrained", "mix_prob"}
    values = [{key: vars(run.args)[key] for key in identity} for run in runs]
    assert all(value == values[0] for value in values)
    own = plans.plan("pretraining", {}, [0], None, own_recipes=True)
    assert {run.args.lr for run in own} == {1e-3, 3e-4}
    assert all(run.path.parent.name == "sweep-pretraining-own-recipes-cifar10" for run in own)
    assert {(run.args.epochs, run.args.image_size) for run in own} == {(30, 224)}


def test_the_zoo_has_every_network_of_its_kind():
    """Not the plain ones, the fastest ones, and those that are made for transfer."""
    others = {"nfnet_f0", "vit_base_patch8", "airbench_c100"}
    names = {name for name, entry in MODELS.items() if entry.classes == 100} - others
    assert set(suites.SUITES["zoo"].experiments) == {
        name for name in names if not name.startswith("plain")
    }


BEST_KNOWN = [
    ("97.32", "vit-pretraining", "vit_tiny-pretrained"),
    ("96.47", "augmentation", "crop-flip-jitter-mix"),
    ("93.65", "augmentation", "crop-flip-jitter"),
    ("74.23", "cnn-vs-vit", "nfnet_f0"),
    ("72.33", "zoo", "improved_resnet20_convnext"),
]


@pytest.mark.parametrize(("accuracy", "suite", "experiment"), BEST_KNOWN)
def test_a_documented_command_is_the_run_of_its_suite(accuracy, suite, experiment):
    text = (ROOT / "docs/experiments.md").read_text()
    (command,) = re.findall(rf": {accuracy} on .* `python ((?:train|train_vit)\.py .*)`", text)
    script, *words = shlex.split(command)
    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    args, _ = arguments.resolve(parser, words)
    seeds = suites.SUITES[suite].seeds[:1]
    (run,) = plans.plan(suite, {}, seeds, ROOT / "nowhere", [experiment])
    for key in plans.IDENTITY & vars(args).keys():
        assert getattr(args, key) == getattr(run.args, key), key
    assert run.script + ".py" == script
