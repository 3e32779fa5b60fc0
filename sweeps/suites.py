"""The suites of sweep.py: lists of experiments, and the questions that their differences answer.

An experiment is a name and some arguments of a training script. Arguments of the command line (--epochs, --dataset, …) take
the place of those that a suite's experiments have in common, but not of those that tell them apart.
"""

from typing import NamedTuple

from models import MODELS

# Arguments of a training script that a suite decides; not the command line.
DECIDED = {
    "model",
    "model_arg",
    "pretrained",
    "list_models",
    "seed",
    "tag",
    "resume",
    "resume_previous",
    "config",
}


class Suite(NamedTuple):
    """Experiments, {label: arguments of the script}, and what is asked of them."""

    title: str
    experiments: dict
    questions: tuple = ()  # of (question, experiment, baseline)
    common: str = ""  # arguments of all experiments
    script: str = "train"


def each(names, arguments="--model {}"):
    return {name: arguments.format(name) for name in names.split()}


def ask(question, experiments, baseline):
    return tuple((question, name, baseline) for name in experiments.split())


CIFAR100 = "--dataset cifar100"
ECA = "ecanet20_fixed_k3 ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9 ecanet20_adaptive"
ADAPTED = " ".join(name for name, model in MODELS.items() if "stem" in model.options)
FOR_CIFAR100 = " ".join(name for name, model in MODELS.items() if model.classes == 100)
FRESH, PUBLISHED = "--lr 1e-3 --layer-decay 1", "--lr 3e-4 --layer-decay 0.75 --pretrained"

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
        + ask(
            "does the kernel's size matter?",
            "ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9",
            "ecanet20_fixed_k3",
        ),
        CIFAR100,
    ),
    "eca-position": Suite(
        "efficient channel attention at three places of the block, and none",
        each("none", "--model resnet20_no_eca")
        | each("bn1 bn2 add", "--model ecanet20_fixed_k3 --model-arg eca_position={}"),
        ask("does the place matter?", "bn1 add", "bn2")
        + ask("does ECA help there?", "bn1 bn2 add", "none"),
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
        each(ADAPTED)
        | {
            f"{name}-imagenet": f"--model {name} --model-arg stem=imagenet"
            for name in ADAPTED.split()
        },
        sum(
            (
                ask("does the adapted stem help?", name, f"{name}-imagenet")
                for name in ADAPTED.split()
            ),
            (),
        ),
        CIFAR100,
    ),
    "zoo": Suite(
        "the models for CIFAR-100, each with its recipe", each(FOR_CIFAR100), common=CIFAR100
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
        "fine-tuning NFNet-F0 with AdamW and SGD, each with its own rate, under a cosine and a straight line after a warmup",
        {
            "adamw-cosine": "--optimizer adamw --lr 3e-4 --weight-decay 0.05 --schedule cosine",
            "adamw-linear": "--optimizer adamw --lr 3e-4 --weight-decay 0.05 --schedule linear",
            "sgd-cosine": "--optimizer sgd --lr 0.01 --weight-decay 5e-5 --schedule cosine",
            "sgd-linear": "--optimizer sgd --lr 0.01 --weight-decay 5e-5 --schedule linear",
        },
        ask("is AdamW better than SGD?", "adamw-cosine", "sgd-cosine")
        + ask("is AdamW better than SGD?", "adamw-linear", "sgd-linear")
        + ask("is the cosine better than the line?", "adamw-cosine", "adamw-linear")
        + ask("is the cosine better than the line?", "sgd-cosine", "sgd-linear"),
        f"--model nfnet_f0 --pretrained --image-size 32 --epochs 25 {CIFAR100}",
        "train_vit",
    ),
    "pretraining": Suite(
        "published weights against fresh ones: the same size, augmentation, optimizer and epochs, the rate of each recipe",
        {
            label + suffix: f"--model {model} {start}"
            for label, model in (("resnet18", "timm/resnet18"), ("tinyvit_5m", "tinyvit_5m"))
            for suffix, start in (("", FRESH), ("-pretrained", PUBLISHED))
        },
        ask("do published weights help?", "resnet18-pretrained", "resnet18")
        + ask("do published weights help?", "tinyvit_5m-pretrained", "tinyvit_5m")
        + ask("is the transformer better?", "tinyvit_5m", "resnet18")
        + ask("is the transformer better?", "tinyvit_5m-pretrained", "resnet18-pretrained"),
        "--image-size 224 --epochs 30 --optimizer adamw --weight-decay 0.05 --augment crop,flip --mixup 0.2 --cutmix 1 "
        "--mix-prob 0.5 --random-erasing 0 --label-smoothing 0.1 --clip-grad 1",
        "train_vit",
    ),
    "vit-pretraining": Suite(
        "ViT-Tiny with published and with fresh weights at 224 px, and small transformers for 32 px, each with its recipe",
        {
            "vit_tiny-pretrained": "--model vit_tiny --image-size 224 --pretrained",
            "vit_tiny": "--model vit_tiny --image-size 224",
            "vit_custom": "--model vit_custom",
            "vit_small_data": "--model vit_small_data",
        },
        ask("do published weights help?", "vit_tiny-pretrained", "vit_tiny")
        + ask("do shifted patches and local attention help?", "vit_small_data", "vit_custom")
        + ask("is the small one better from scratch?", "vit_small_data", "vit_tiny"),
        script="train_vit",
    ),
    "resolution": Suite(
        "fine-tuning ViT-Tiny at 32 to 224 px, patches resampled",
        {f"{size}px": f"--image-size {size}" for size in (32, 64, 128, 224)},
        ask("does the size matter?", "32px 64px 128px", "224px"),
        "--model vit_tiny --pretrained",
        "train_vit",
    ),
}
