"""The experiments of results/: what `sweep.py campaign` runs, sized for two CPU cores."""

from pathlib import Path
from typing import NamedTuple


class Experiment(NamedTuple):
    """Trainings {label: arguments of the script} with the seeds 0 to n-1.

    comparisons: (question, label, label of the baseline); source: <experiment>/<run> whose weights
    SOURCE_WEIGHTS are; timed: its times matter, so that nothing else runs meanwhile;
    selected_on_test: what was chosen when test results were known.
    """

    title: str
    trainings: dict
    comparisons: tuple
    shared: str = ""
    script: str = "train"
    n: int = 3
    source: str = ""
    timed: bool = False
    selected_on_test: str = ""

    @property
    def run_names(self):
        """Seed after seed, so that the first runs compare all trainings."""
        return [f"{label}-s{seed}" for seed in range(self.n) for label in self.trainings]


CIFAR100 = "--dataset cifar100"
RATES = {"adamw": "--lr 1e-3 --weight-decay 0.05", "sgd": "", "muon": ""}
RECORD = "--tta flip-shift"
CROP_FLIP = "--augment crop,flip --crop-padding zero"
JITTER = "--augment crop,flip,color_jitter --crop-padding zero --jitter 0.4"
# --progressive on all images was fixed beforehand. Those on a subset are for at most 0.75 of the
# time, by runs on held-out images (docs/results.md, "Smaller images early in training").
SMALLER_ALL = "--epochs 10 --progressive 20:0,24:0.35,32:0.65"
SMALLER_20 = "--epochs 12 --progressive 20:0,24:0.5,32:0.87"
SMALLER_20_LATER = "--epochs 11 --progressive 20:0,24:0.4,32:0.7"
SMALLER_18 = "--epochs 6 --progressive 16:0,24:0.5,32:0.85"
SUBSET = "--limit-train 10000"
COSINE = "is the cosine better than a linear decay?"

# Every setting is a recipe of the repository or stands here.
# fmt: off
EXPERIMENTS = {
    "transfer": Experiment(
        "1,000 images of CIFAR-10: weights trained on CIFAR-100 against random initialization",
        {"scratch": "",
         "fine-tuned": "--weights SOURCE_WEIGHTS",
         "linear-probe": "--weights SOURCE_WEIGHTS --freeze-backbone"},
        (("do the weights help?", "fine-tuned", "scratch"),
         ("are they good features?", "linear-probe", "scratch"),
         ("does it help to train all layers?", "fine-tuned", "linear-probe")),
        "--model resnet20 --limit-train 1000 --batch-size 64 --epochs 50 --eval-every 50",
        source="ghost/resnet20-s0"),
    "augmentation": Experiment(
        "augmentations of ResNet-20, added one after another",
        {"none": "--augment none",
         "crop-flip": CROP_FLIP,
         "crop-flip-jitter": JITTER,
         "crop-flip-jitter-mix": f"{JITTER} --mixup 1 --cutmix 1 --mix-prob 1 --mix-per batch"},
        (("do crop and flip help?", "crop-flip", "none"),
         ("does color jitter help after that?", "crop-flip-jitter", "crop-flip"),
         ("do CutMix and MixUp help after that?", "crop-flip-jitter-mix", "crop-flip-jitter")),
        "--model resnet20 --epochs 15"),
    "degradation": Experiment(
        "plain and residual networks of 20 and 56 layers",
        {name: f"--model {name}" for name in ("plain20", "plain56", "resnet20", "resnet56")},
        (("is the deeper plain network worse?", "plain56", "plain20"),
         ("is the deeper residual network better?", "resnet56", "resnet20"),
         ("do shortcuts help 56 layers?", "resnet56", "plain56")),
        "--epochs 10 --eval-train"),
    # --amp off: these runs take hours, so machines may share them, and all need one precision.
    "eca": Experiment(
        "efficient channel attention: kernels of 3 and 9, and none",
        {"none": "--model resnet20_no_eca",
         "k3": "--model ecanet20_fixed_k3",
         "k9": "--model ecanet20_fixed_k9"},
        (("does ECA help?", "k3", "none"),
         ("does ECA help?", "k9", "none"),
         ("does the kernel size matter?", "k9", "k3")),
        f"{CIFAR100} --epochs 20 --eval-every 5 --amp off", n=5),
    "ghost": Experiment(
        "ghost modules instead of 3x3 convolutions in ResNet-20",
        {"resnet20": "--model resnet20", "ghost_resnet20": "--model ghost_resnet20"},
        (("what do ghost modules cost?", "ghost_resnet20", "resnet20"),),
        f"{CIFAR100} --epochs 20"),
    "optimizer-schedule": Experiment(
        "ResNet-20 with three optimizers and two schedules",
        {f"{optimizer}-{schedule}": f"--optimizer {optimizer} {rates} --schedule {schedule}"
         for optimizer, rates in RATES.items() for schedule in ("cosine", "linear")},
        (("is AdamW better than SGD?", "adamw-cosine", "sgd-cosine"),
         ("is Muon better than SGD?", "muon-cosine", "sgd-cosine"),
         *((COSINE, f"{optimizer}-cosine", f"{optimizer}-linear") for optimizer in RATES)),
        "--model resnet20 --epochs 15"),
    "small-vit": Experiment(
        "a transformer with shifted patches and local attention, and one without",
        {"vit_custom": "--model vit_custom", "vit_small_data": "--model vit_small_data"},
        (("do shifted patches and local attention help?", "vit_small_data", "vit_custom"),),
        "--epochs 15", "train_vit", n=2),
    "resnet20-epochs": Experiment(
        "ResNet-20 with its recipe, for 5 and for 30 epochs",
        {"5-epochs": "--model resnet20 --epochs 5", "30-epochs": "--model resnet20 --epochs 30"},
        (("are six times the epochs worth it?", "30-epochs", "5-epochs"),),
        "--eval-every 5", timed=True),
    "progressive": Experiment(
        "smaller images early in training on 10,000 images",
        {"resnet20": f"{SUBSET} --model resnet20 --epochs 10",
         "resnet20-progressive": f"{SUBSET} --model resnet20 {SMALLER_20}",
         "resnet20-progressive-11": f"{SUBSET} --model resnet20 {SMALLER_20_LATER}",
         "resnet18": f"{SUBSET} --model resnet18 --epochs 5",
         "resnet18-progressive": f"{SUBSET} --model resnet18 {SMALLER_18}"},
        (("does it change the accuracy of ResNet-20?", "resnet20-progressive", "resnet20"),
         ("and with more epochs at full size?", "resnet20-progressive-11", "resnet20"),
         ("does it change the accuracy of ResNet-18?", "resnet18-progressive", "resnet18")),
        "--eval-every 3", timed=True, selected_on_test="the number of settings tried"),
    "progressive-all": Experiment(
        "smaller images early in training on all images",
        {"resnet20": "--model resnet20 --epochs 10",
         "resnet20-progressive": f"--model resnet20 {SMALLER_ALL}"},
        (("does it change the accuracy?", "resnet20-progressive", "resnet20"),),
        "--eval-every 5", timed=True),
    "airbench94": Experiment(
        "accuracy and training time of airbench94", {"airbench94": f"--model airbench94 {RECORD}"},
        (), n=5, timed=True, selected_on_test="the number of epochs"),
    "airbench94-fp32": Experiment(
        "accuracy and training time of airbench94 in fp32",
        {"airbench94": f"--model airbench94 --amp off {RECORD}"},
        (), timed=True, selected_on_test="the number of epochs"),
    "airbench95": Experiment(
        "accuracy and training time of airbench95", {"airbench95": f"--model airbench95 {RECORD}"},
        (), "--eval-every 4", timed=True),
    "airbench96": Experiment(
        "accuracy and training time of airbench96", {"airbench96": f"--model airbench96 {RECORD}"},
        (), "--eval-every 4", n=1, timed=True),
    "airbench_c100": Experiment(
        "accuracy and training time of airbench_c100",
        {"airbench_c100": f"--model airbench_c100 {RECORD}"}, (), CIFAR100, timed=True),
}
# fmt: on


def missing_command(name):
    """Runs what results/ lacks of an experiment."""
    return f"python sweep.py campaign --only {name}"


def repeat_command(name, folders):
    """Runs all of a published experiment once more.

    folders: {dataset: folder of its images} of those that it takes from folders.
    """
    elsewhere = "--output-dir runs/repeated --results runs/repeated-results"
    images = [f" --{key}-dir data/{Path(folder).name}" for key, folder in folders.items()]
    return f"{missing_command(name)}{''.join(images)} {elsewhere}"
