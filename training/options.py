"""The options of the training scripts, in groups, with their types and help.

common/scopes.py says what each option concerns.
"""

import argparse
from typing import Any, NamedTuple

from common.command_line import number, number_or_auto
from data import DATASETS
from datasets.mixing import MIX_PER
from datasets.pipeline import AUGMENTATIONS
from training.optimizers import OPTIMIZERS, problem_with
from training.progressive import parse_stages
from training.schedules import SCHEDULES
from training.tta import VIEWS


class Option(NamedTuple):
    """One option. kind: a tuple of choices, bool for a switch, list to repeat it, or a type.

    const: the value of the option where it stands without one (None: it needs a value).
    """

    flag: str
    kind: Any
    help: str
    default: Any = None
    const: Any = None


def augmentations(text):
    """Names of augmentations separated by commas, or "none"; stays a string."""
    chosen = [] if text == "none" else text.split(",")
    unknown = [name for name in chosen if name not in AUGMENTATIONS]
    if unknown:
        known = ", ".join(AUGMENTATIONS)
        raise argparse.ArgumentTypeError(f"must be none or names from {known}, not {unknown[0]!r}")
    if {"flip", "alternating_flip"} <= set(chosen):
        raise argparse.ArgumentTypeError("can't have both flip and alternating_flip")
    return text


def optimizer(text):
    """A name of OPTIMIZERS, or timm/<name>."""
    if problem := problem_with(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def input_sizes(text):
    """Sizes for --progressive, or "none"; stays a string."""
    try:
        parse_stages(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


COUNT, POSITIVE = number(int, low=0), number(int, low=1)
RATE, SHARE = number(low=0), number(low=0, high=1)
BELOW_ONE = number(low=0, high=0.99)

MODEL = (
    Option("--model", str, "a name from --list-models, or timm/<name>"),
    Option(
        "--model-arg", list, "KEY=VALUE, an option of the model such as patch_size=8; repeatable"
    ),
    Option("--list-models", bool, "print all models and exit"),
)
TRANSFER = (
    Option(
        "--pretrained",
        argparse.BooleanOptionalAction,
        "start from published weights (timm's models; needs network)",
        False,
    ),
    Option("--weights", str, "start from a .pt or .safetensors file, or from a run"),
    Option(
        "--freeze-backbone",
        argparse.BooleanOptionalAction,
        "train only the classifier, on features computed once",
        False,
    ),
    Option(
        "--layer-decay",
        number(above=0, high=1),
        "learning rate of each layer relative to the next one",
        1.0,
    ),
)
DATA = (
    Option(
        "--dataset",
        DATASETS,
        "folder: DATA_DIR/train/<class>/ and DATA_DIR/test/<class>/; shapes: generated images",
        "cifar10",
    ),
    Option("--data-dir", str, "directory of the archives or of the folder", "data"),
    Option(
        "--data-url",
        str,
        "address of the archive (.../cifar-10-python.tar.gz), instead of the mirrors",
    ),
    Option("--image-size", number(int, low=8, high=1024), "side of the inputs in pixels", 32),
    Option("--val-size", COUNT, "training images to hold out, to select best.pt on", 0),
    Option("--limit-train", COUNT, "keep this many training images (0: all)", 0),
    Option("--limit-test", COUNT, "keep this many test images (0: all)", 0),
    Option(
        "--resident",
        ("auto", "device", "host"),
        "where the images are kept; auto: on the device if they fit",
        "auto",
    ),
    Option(
        "--skip-bad-images",
        argparse.BooleanOptionalAction,
        "leave out unreadable images of a folder",
        False,
    ),
)
TRAINING = (
    Option("--epochs", POSITIVE, "in total, also with --resume"),
    Option("--batch-size", number_or_auto(kind=int, low=1), "images per step, across all ranks"),
    Option(
        "--optimizer",
        optimizer,
        f"{', '.join(OPTIMIZERS)}, or timm/<name>; each has its own default rates",
    ),
    Option("--lr", RATE, "highest learning rate"),
    Option("--momentum", number(low=0, high=0.9999), "momentum, or Adam's first beta", 0.9),
    Option("--nesterov", argparse.BooleanOptionalAction, "Nesterov momentum in SGD and Muon", True),
    Option(
        "--weight-decay",
        RATE,
        "norms and biases have none, except in airbench* with sgd and muon_sgd",
    ),
    Option("--schedule", SCHEDULES, "learning-rate schedule after the warmup"),
    Option(
        "--warmup-epochs",
        number_or_auto(low=0),
        "epochs of linear warmup; default: a tenth of the run, at most 5; with one_cycle a quarter",
    ),
    Option("--final-lr", SHARE, "rate at the end of the schedule, as share of the highest", 0.0),
    Option("--label-smoothing", BELOW_ONE, "share of the target spread over all classes"),
    Option(
        "--ema-decay",
        number_or_auto(low=0, high=0.999999),
        "decay of the moving average of the weights (0: none); default: an average over about a "
        "twentieth of the run",
    ),
    Option(
        "--patience",
        COUNT,
        "end after so many evaluations without a better accuracy on held-out images (0: never)",
        0,
    ),
    Option("--drop-path", BELOW_ONE, "highest rate of stochastic depth; default: the model's"),
    Option(
        "--lookahead",
        COUNT,
        "set the weights to their moving average after every N steps (0: never)",
        0,
    ),
    Option("--clip-grad", RATE, "largest gradient norm (0: no limit)", 0.0),
    Option(
        "--accumulate",
        number_or_auto(kind=int, low=1),
        "split each batch into this many parts, with their own batch-norm statistics (auto: 1; on "
        "a CPU, as many as keep activations in its caches)",
        1,
    ),
    Option(
        "--progressive",
        input_sizes,
        "smaller inputs early in training: 24,28,32, or with shares of the run 24:0,28:0.3,32:0.7",
        "none",
    ),
)
AUGMENTATION = (
    Option(
        "--augment",
        augmentations,
        f"none, or names separated by commas: {', '.join(AUGMENTATIONS)}",
    ),
    Option("--crop-padding", ("reflect", "zero"), "border that crop adds", "reflect"),
    Option("--crop-pixels", COUNT, "largest shift by crop (0: an eighth of the image)", 0),
    Option("--jitter", RATE, "strength of color_jitter: factors of 1 - JITTER to 1 + JITTER", 0.2),
    Option("--mixup", RATE, "MixUp's alpha (0: none)"),
    Option("--cutmix", RATE, "CutMix's alpha (0: none)"),
    Option("--mix-prob", SHARE, "share of the images (or batches) that are mixed", 0.5),
    Option(
        "--mix-per",
        MIX_PER,
        "draw method and mixing ratio for each image, or once for a batch",
        "image",
    ),
    Option("--cutout", COUNT, "side of the square to cut out, in pixels", 0),
    Option("--random-erasing", SHARE, "share of the images that lose a rectangle", 0.0),
    Option(
        "--repeated-augment",
        POSITIVE,
        "times that a batch holds each of its images; an epoch has that many times fewer images",
        1,
    ),
    Option(
        "--tta", ("none", *VIEWS), "also test with logits averaged over views of each image", "none"
    ),
)
MACHINE = (
    Option("--device", str, "auto, cpu, cuda, cuda:1, mps", "auto"),
    Option(
        "--amp",
        ("auto", "off", "bf16", "fp16"),
        "precision; auto: bf16 where it is fast, else off (fp32)",
        "auto",
    ),
    Option(
        "--compile", argparse.BooleanOptionalAction, "compile the model with torch.compile", False
    ),
    Option(
        "--grad-checkpointing",
        argparse.BooleanOptionalAction,
        "less memory for a third more computation",
        False,
    ),
    Option(
        "--sync-bn",
        argparse.BooleanOptionalAction,
        "batch norm over the batches of all ranks (torchrun)",
        False,
    ),
    Option("--doctor", bool, "print versions, devices, speed and what can be reached, and exit"),
    Option(
        "--deterministic",
        argparse.BooleanOptionalAction,
        "bitwise reproducible on the same machine and versions",
        False,
    ),
    Option("--seed", COUNT, "seed of all random draws", 0),
)
RUN = (
    Option("--eval-every", POSITIVE, "epochs between evaluations", 1),
    Option(
        "--eval-train",
        argparse.BooleanOptionalAction,
        "at the end, also evaluate on the training images, without augmentation",
        False,
    ),
    Option(
        "--save-every",
        COUNT,
        "keep the weights of every N-th epoch, as epoch-<number>.pt (0: none)",
        0,
    ),
    Option(
        "--output-dir",
        str,
        "directory of the run; default: runs/<dataset>-<model>[-<tag>]-s<seed>-<time>",
    ),
    Option("--tag", str, "a word in the name of the run's directory"),
    Option("--curves", argparse.BooleanOptionalAction, "draw curves.png at the end", True),
    Option(
        "--resume",
        str,
        "a run to resume; without a value: the newest unfinished one of runs/",
        const=True,
    ),
    Option("--resume-previous", bool, "with --resume: use previous.pt where last.pt is damaged"),
    Option("--config", str, "take arguments from a run, its config.json, or a .json or .yaml file"),
)
FITTING = (  # of train_sota.py
    Option("--lora-rank", COUNT, "train adapters of this rank instead of the weights (0: none)", 0),
    Option(
        "--micro-batch",
        number_or_auto(kind=int, low=0),
        "most images per device at once; 0: split by --accumulate; default: auto, as many as fit",
    ),
    Option("--ema-device", ("same", "cpu"), "where the moving average is kept", "same"),
    Option("--fsdp", argparse.BooleanOptionalAction, "shard the model across the ranks", False),
)
PREFLIGHT = (  # of train_sota.py, too
    Option("--dry-run", bool, "print what a step needs and what would make it smaller, and exit"),
    Option("--gpu-memory", number(above=0, high=1e6), "with --dry-run: GB of the GPU to plan for"),
    Option("--smoke", bool, "try everything, also resuming, with a small copy of the model"),
)
