"""The suites of sweep.py: lists of experiments, and the questions that their differences answer.

An experiment is a name and some arguments of train.py. Arguments of the command line (--epochs, --dataset, …) take the place
of those that a suite's experiments have in common, but not of those that tell them apart.
"""

from typing import NamedTuple

from models import MODELS


class Suite(NamedTuple):
    """Experiments, {label: arguments of train.py}, and what is asked of them."""

    title: str
    experiments: dict
    questions: tuple = ()  # of (question, experiment, baseline)
    common: str = ""  # arguments of all experiments


def each(names, arguments="--model {}"):
    return {name: arguments.format(name) for name in names.split()}


def ask(question, experiments, baseline):
    return tuple((question, name, baseline) for name in experiments.split())


CIFAR100 = "--dataset cifar100"
ECA = "ecanet20_fixed_k3 ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9 ecanet20_adaptive"
ADAPTED = " ".join(name for name, model in MODELS.items() if "stem" in model.options)
FOR_CIFAR100 = " ".join(name for name, model in MODELS.items() if model.classes == 100)
TRANSFER = {"resnet18": "timm/resnet18"} | {name: name for name in ("tinyvit_5m",) if name in MODELS}

SUITES = {
    "degradation": Suite(
        "plain and residual networks of 18 and 34 layers",
        each("plain18 plain34 resnet18 resnet34"),
        ask("is the deeper plain network worse?", "plain34", "plain18")
        + ask("is the deeper residual network better?", "resnet34", "resnet18")
        + ask("do shortcuts help 18 layers?", "resnet18", "plain18")
        + ask("do shortcuts help 34 layers?", "resnet34", "plain34"),
    ),
    "depth": Suite(
        "residual networks of 18 to 152 layers",
        each("resnet18 resnet34 resnet50 resnet101 resnet152"),
        ask("is deeper better than 18 layers?", "resnet34 resnet50 resnet101 resnet152", "resnet18")
        + ask("are 101 layers better than 50?", "resnet101", "resnet50")
        + ask("are 152 layers better than 101?", "resnet152", "resnet101"),
    ),
    "multiscale": Suite(
        "ResNet-18 with a multi-scale module in each block",
        each("resnet18 resnet18_ms"),
        ask("does the module help?", "resnet18_ms", "resnet18"),
    ),
    "eca": Suite(
        "efficient channel attention: kernel sizes, the adaptive rule, and none",
        each(f"resnet20_no_eca {ECA}"),
        ask("does ECA help?", ECA, "resnet20_no_eca")
        + ask("does the kernel's size matter?", "ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9", "ecanet20_fixed_k3"),
        CIFAR100,
    ),
    "eca-position": Suite(
        "efficient channel attention at three places of the block, and none",
        each("none", "--model resnet20_no_eca") | each("bn1 bn2 add", "--model ecanet20_fixed_k3 --model-arg eca_position={}"),
        ask("does the place matter?", "bn1 add", "bn2") + ask("does ECA help there?", "bn1 bn2 add", "none"),
        CIFAR100,
    ),
    "ghost": Suite(
        "ghost modules in place of 3x3 convolutions: parameters saved against accuracy",
        each("resnet20 resnet32 ghost_resnet20 ghost_resnet32"),
        ask("what do ghost modules cost 20 layers?", "ghost_resnet20", "resnet20")
        + ask("what do ghost modules cost 32 layers?", "ghost_resnet32", "resnet32")
        + ask("are 32 layers with them better than 20 without?", "ghost_resnet32", "resnet20"),
        CIFAR100,
    ),
    "stems": Suite(
        "stems for 32x32 pictures against those that were made for ImageNet",
        each(ADAPTED) | {f"{name}-imagenet": f"--model {name} --model-arg stem=imagenet" for name in ADAPTED.split()},
        sum((ask("does the adapted stem help?", name, f"{name}-imagenet") for name in ADAPTED.split()), ()),
        CIFAR100,
    ),
    "zoo": Suite(
        "the models for CIFAR-100, each with its recipe",
        each(FOR_CIFAR100),
        common=CIFAR100,
    ),
    "augmentation": Suite(
        "augmentations of ResNet-18, one after another",
        {
            "none": "--augment none",
            "crop-flip": "--augment crop,flip --mixup 0 --cutmix 0",
            "crop-flip-jitter": "--augment crop,flip,color_jitter --mixup 0 --cutmix 0",
            "crop-flip-jitter-mix": "--augment crop,flip,color_jitter --mixup 0.2 --cutmix 1",
        },
        ask("do crop and flip help?", "crop-flip", "none")
        + ask("does colour jitter help after that?", "crop-flip-jitter", "crop-flip")
        + ask("do CutMix and MixUp help after that?", "crop-flip-jitter-mix", "crop-flip-jitter"),
        "--model resnet18",
    ),
    "optimizer-schedule": Suite(
        "SGD and AdamW, each with its own rate, under a cosine and a straight line; ResNet-18",
        {
            "sgd-cosine": "--optimizer sgd --schedule cosine",
            "sgd-linear": "--optimizer sgd --schedule linear",
            "adamw-cosine": "--optimizer adamw --schedule cosine",
            "adamw-linear": "--optimizer adamw --schedule linear",
        },
        ask("is SGD better than AdamW?", "sgd-cosine", "adamw-cosine")
        + ask("is SGD better than AdamW?", "sgd-linear", "adamw-linear")
        + ask("is the cosine better than the line?", "sgd-cosine", "sgd-linear")
        + ask("is the cosine better than the line?", "adamw-cosine", "adamw-linear"),
        "--model resnet18",
    ),
    "pretraining": Suite(
        "published weights against fresh ones, at 224 px",
        {name: f"--model {model}" for name, model in TRANSFER.items()}
        | {f"{name}-pretrained": f"--model {model} --pretrained" for name, model in TRANSFER.items()},
        sum((ask("do published weights help?", f"{name}-pretrained", name) for name in TRANSFER), ()),
        "--image-size 224",
    ),
}
