"""The suites of sweep.py: lists of experiments, and questions that their differences answer.

An experiment is a name and some arguments of a training script. Arguments of the command line
(--epochs, --dataset, ...) override those that all experiments of a suite share, but not those that
distinguish the experiments.
"""

from typing import NamedTuple

from models import MODELS

# Arguments of a training script that a suite decides, not the command line.
# fmt: off
DECIDED = {"model", "model_arg", "pretrained", "list_models", "doctor", "seed", "tag",
           "resume", "resume_previous", "config"}
# fmt: on


class Suite(NamedTuple):
    """Experiments {name: arguments of the script} and questions about their differences.

    questions: (question, names of experiments, name of the baseline that each is compared with).
    shared: arguments of all experiments.
    """

    title: str
    experiments: dict
    questions: tuple = ()
    shared: str = ""
    script: str = "train"

    def comparisons(self):
        """(question, experiment, baseline) of each difference."""
        for question, experiments, baseline in self.questions:
            for experiment in experiments.split():
                yield question, experiment, baseline


def each(names, arguments="--model {}"):
    """Experiments with the same arguments, but for the name."""
    return {name: arguments.format(name) for name in names.split()}


CIFAR100 = "--dataset cifar100"
LARGER_KERNELS = "ecanet20_fixed_k5 ecanet20_fixed_k7 ecanet20_fixed_k9"
ECA = f"ecanet20_fixed_k3 {LARGER_KERNELS} ecanet20_adaptive"
ADAPTED = [name for name, model in MODELS.items() if "stem" in model.options]
FRESH = "--lr 1e-3 --layer-decay 1"
PUBLISHED = "--lr 3e-4 --layer-decay 0.75 --pretrained"
ADAMW = "--optimizer adamw --lr 3e-4 --weight-decay 0.05"
SGD = "--optimizer sgd --lr 0.01 --weight-decay 5e-5"
JITTER = "--augment crop,flip,color_jitter"

# fmt: off
SUITES = {
    "degradation": Suite(
        "plain and residual networks of 18 and 34 layers",
        each("plain18 plain34 resnet18 resnet34"),
        [("is the deeper plain network worse?", "plain34", "plain18"),
         ("is the deeper residual network better?", "resnet34", "resnet18"),
         ("do shortcuts help 18 layers?", "resnet18", "plain18"),
         ("do shortcuts help 34 layers?", "resnet34", "plain34")]),
    "depth": Suite(
        "residual networks of 18 to 152 layers",
        each("resnet18 resnet34 resnet50 resnet101 resnet152"),
        [("is deeper better than 18 layers?", "resnet34 resnet50 resnet101 resnet152", "resnet18"),
         ("are 101 layers better than 50?", "resnet101", "resnet50"),
         ("are 152 layers better than 101?", "resnet152", "resnet101")]),
    "multiscale": Suite(
        "ResNet-18 with a multi-scale module in each block",
        each("resnet18 resnet18_ms"),
        [("does the module help?", "resnet18_ms", "resnet18")]),
    "eca": Suite(
        "efficient channel attention: kernel sizes, the adaptive rule, and none",
        each(f"resnet20_no_eca {ECA}"),
        [("does ECA help?", ECA, "resnet20_no_eca"),
         ("does the kernel size matter?", LARGER_KERNELS, "ecanet20_fixed_k3")],
        CIFAR100),
    "eca-position": Suite(
        "efficient channel attention at three positions in the block, and none",
        each("none", "--model resnet20_no_eca")
        | each("bn1 bn2 add", "--model ecanet20_fixed_k3 --model-arg eca_position={}"),
        [("does the position matter?", "bn1 add", "bn2"),
         ("does ECA help there?", "bn1 bn2 add", "none")],
        CIFAR100),
    "ghost": Suite(
        "ghost modules instead of 3x3 convolutions: parameters saved against accuracy",
        each("resnet20 resnet32 ghost_resnet20 ghost_resnet32"),
        [("what do ghost modules cost 20 layers?", "ghost_resnet20", "resnet20"),
         ("what do ghost modules cost 32 layers?", "ghost_resnet32", "resnet32"),
         ("are 32 layers with them better than 20 without?", "ghost_resnet32", "resnet20")],
        CIFAR100),
    "stems": Suite(
        "stems for 32x32 images against those that were made for ImageNet",
        each(" ".join(ADAPTED))
        | {f"{name}-imagenet": f"--model {name} --model-arg stem=imagenet" for name in ADAPTED},
        [("does the adapted stem help?", name, f"{name}-imagenet") for name in ADAPTED],
        CIFAR100),
    "zoo": Suite(
        "the models for CIFAR-100, each with its recipe",
        each(" ".join(name for name, model in MODELS.items() if model.classes == 100)),
        shared=CIFAR100),
    "augmentation": Suite(
        "augmentations of ResNet-18, added one after another",
        {"none": "--augment none",
         "crop-flip": "--augment crop,flip --mixup 0 --cutmix 0",
         "crop-flip-jitter": f"{JITTER} --mixup 0 --cutmix 0",
         "crop-flip-jitter-mix": f"{JITTER} --mixup 0.2 --cutmix 1"},
        [("do crop and flip help?", "crop-flip", "none"),
         ("does colour jitter help after that?", "crop-flip-jitter", "crop-flip"),
         ("do CutMix and MixUp help after that?", "crop-flip-jitter-mix", "crop-flip-jitter")],
        "--model resnet18"),
    "optimizer-schedule": Suite(
        "fine-tuning NFNet-F0 with AdamW and SGD, with a cosine and a linear schedule",
        {"adamw-cosine": f"{ADAMW} --schedule cosine",
         "adamw-linear": f"{ADAMW} --schedule linear",
         "sgd-cosine": f"{SGD} --schedule cosine",
         "sgd-linear": f"{SGD} --schedule linear"},
        [("is AdamW better than SGD?", "adamw-cosine", "sgd-cosine"),
         ("is AdamW better than SGD?", "adamw-linear", "sgd-linear"),
         ("is the cosine better than the line?", "adamw-cosine", "adamw-linear"),
         ("is the cosine better than the line?", "sgd-cosine", "sgd-linear")],
        f"--model nfnet_f0 --pretrained --image-size 32 --epochs 25 {CIFAR100}", "train_vit"),
    "pretraining": Suite(
        "published weights against fresh ones, with the same recipe but for the learning rate",
        {"resnet18": f"--model timm/resnet18 {FRESH}",
         "resnet18-pretrained": f"--model timm/resnet18 {PUBLISHED}",
         "tinyvit_5m": f"--model tinyvit_5m {FRESH}",
         "tinyvit_5m-pretrained": f"--model tinyvit_5m {PUBLISHED}"},
        [("do published weights help?", "resnet18-pretrained", "resnet18"),
         ("do published weights help?", "tinyvit_5m-pretrained", "tinyvit_5m"),
         ("is the transformer better?", "tinyvit_5m", "resnet18"),
         ("is the transformer better?", "tinyvit_5m-pretrained", "resnet18-pretrained")],
        "--image-size 224 --epochs 30 --optimizer adamw --weight-decay 0.05 --augment crop,flip "
        "--mixup 0.2 --cutmix 1 --mix-prob 0.5 --random-erasing 0 --label-smoothing 0.1 "
        "--clip-grad 1", "train_vit"),
    "vit-pretraining": Suite(
        "ViT-Tiny with and without published weights at 224 px, small transformers at 32 px",
        {"vit_tiny-pretrained": "--model vit_tiny --image-size 224 --pretrained",
         "vit_tiny": "--model vit_tiny --image-size 224",
         "vit_custom": "--model vit_custom",
         "vit_small_data": "--model vit_small_data"},
        [("do published weights help?", "vit_tiny-pretrained", "vit_tiny"),
         ("do shifted patches and local attention help?", "vit_small_data", "vit_custom"),
         ("is the small one better from scratch?", "vit_small_data", "vit_tiny")],
        script="train_vit"),
    "resolution": Suite(
        "fine-tuning ViT-Tiny at 32 to 224 px, with resampled patches",
        {f"{size}px": f"--image-size {size}" for size in (32, 64, 128, 224)},
        [("does the size matter?", "32px 64px 128px", "224px")],
        "--model vit_tiny --pretrained", "train_vit"),
}
# fmt: on
