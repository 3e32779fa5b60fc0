"""The arguments of the training scripts, and where the value of each comes from.

    parser = training_parser(__doc__, RECIPE)
    args, saved = resolve(parser, argv)         # saved: the contents of last.pt with --resume

A value comes from the first of these layers that has it: the command line, --config FILE, what
--augment none turns off, the recipe (the model's own, else the script's RECIPE), the optimizer's
defaults, the defaults below. args.origin says which layer it was. What each argument is about
stands in common/scopes.py.
"""

import argparse
from typing import Any, NamedTuple

import models
from common.command_line import Parser, explicit, number, number_or_auto
from common.errors import UserError
from data import DATASETS
from datasets.mixing import MIX_PER
from datasets.pipeline import AUGMENTATIONS
from training import resume
from training.config_file import read_config
from training.optimizers import OPTIMIZERS, optimizer_defaults, problem_with
from training.progressive import parse_stages
from training.schedules import SCHEDULES
from training.tta import VIEWS


class Option(NamedTuple):
    """One option. kind: a tuple of choices, bool for a switch, list to repeat it, or a type.

    alone: the value of the option where it stands without one (None: it needs a value).
    """

    flag: str
    kind: Any
    help: str
    default: Any = None
    alone: Any = None


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


EXPLICIT = ("command line", "config")  # sources of values that somebody asked for
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
    Option("--freeze-backbone", bool, "train only the classifier, on features computed once"),
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
        "folder: DATA_DIR/train/<class>/*.png; shapes: generated images",
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
    Option("--skip-bad-images", bool, "leave out unreadable images of a folder"),
)
TRAINING = (
    Option("--epochs", POSITIVE, "in total, also with --resume"),
    Option(
        "--batch-size", number_or_auto(kind=int, low=1), "images per step, across all processes"
    ),
    Option(
        "--optimizer",
        optimizer,
        f"{', '.join(OPTIMIZERS)}, or timm/<name>; each has its own default rates",
    ),
    Option("--lr", RATE, "highest learning rate"),
    Option("--momentum", number(low=0, high=0.9999), "momentum, or Adam's first beta", 0.9),
    Option("--nesterov", argparse.BooleanOptionalAction, "Nesterov momentum in SGD and Muon", True),
    Option("--weight-decay", RATE, "norms and biases have none, except in airbench*"),
    Option("--schedule", SCHEDULES, "of the learning rate, after the warmup"),
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
        "decay of the moving average of weights (0: none); default: over a twentieth of the run",
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
        "draw mixing method and share for each image, or once for a batch",
        "image",
    ),
    Option("--cutout", COUNT, "side of the square to cut out, in pixels", 0),
    Option("--random-erasing", SHARE, "share of the images that lose a rectangle", 0.0),
    Option("--repeated-augment", POSITIVE, "times that a batch holds each of its images", 1),
    Option(
        "--tta", ("none", *VIEWS), "also test with logits averaged over views of each image", "none"
    ),
)
MACHINE = (
    Option("--device", str, "auto, cpu, cuda, cuda:1, mps", "auto"),
    Option("--amp", ("auto", "off", "bf16", "fp16"), "auto: bf16 where it is fast", "auto"),
    Option("--compile", bool, "compile the model with torch.compile"),
    Option("--grad-checkpointing", bool, "less memory for a third more computation"),
    Option("--sync-bn", bool, "batch norm over the batches of all processes (torchrun)"),
    Option("--doctor", bool, "print versions, devices, speed and what can be reached, and exit"),
    Option("--deterministic", bool, "bitwise reproducible on the same machine and versions"),
    Option("--seed", COUNT, "seed of all random draws", 0),
)
RUN = (
    Option("--eval-every", POSITIVE, "epochs between evaluations", 1),
    Option(
        "--eval-train",
        bool,
        "at the end, also evaluate on the training images, without augmentation",
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
        alone=True,
    ),
    Option("--resume-previous", bool, "with --resume: use previous.pt where last.pt is damaged"),
    Option("--config", str, "take arguments from a run's config.json, or from a YAML file"),
)
FITTING = (  # of train_sota.py
    Option("--lora-rank", COUNT, "train adapters of this rank instead of the weights", 0),
    Option(
        "--micro-batch",
        number_or_auto(kind=int, low=0),
        "most images per device at once; 0: split by --accumulate; default: auto, as many as fit",
    ),
    Option("--ema-device", ("same", "cpu"), "where the moving average is kept", "same"),
    Option("--fsdp", argparse.BooleanOptionalAction, "shard the model across the processes", False),
)


def training_parser(docstring, recipe, pretrained_model=None):
    """The arguments that all training scripts share.

    recipe: the script's RECIPE; pretrained_model: the default model with --pretrained.
    """
    parser = Parser(" ".join(docstring.split("\n\n")[0].split()))
    parser.recipe, parser.pretrained_model = recipe, pretrained_model
    add_options(parser, "model", MODEL)
    add_options(parser, "transfer", TRANSFER, "Starting from weights selects a recipe of its own.")
    add_options(parser, "data", DATA)
    add_options(
        parser,
        "training",
        TRAINING,
        "A model's own recipe replaces these defaults, and those of other groups.",
    )
    add_options(parser, "augmentation", AUGMENTATION, "--augment none also disables mixing.")
    add_options(parser, "machine", MACHINE)
    add_options(parser, "run", RUN)
    return parser


def add_options(parser, title, options, description=None):
    """Adds a group of options. What has no default of its own has that of the parser's recipe."""
    group = parser.add_argument_group(title, description)
    for option in options:
        name = option.flag.removeprefix("--").replace("-", "_")
        in_recipe = parser.recipe.get(name, option.default)
        default = in_recipe if option.default is None else option.default
        how = {"help": option.help, "default": default}
        if option.kind is bool:
            how |= {"action": "store_true", "default": False}
        elif option.kind is list:
            how |= {"action": "append", "default": [], "metavar": "KEY=VALUE"}
        elif option.kind is argparse.BooleanOptionalAction:
            how["action"] = option.kind
        elif isinstance(option.kind, tuple):
            how["choices"] = option.kind
        else:
            how |= {"type": option.kind, "metavar": name.upper()}
        if option.alone is not None:
            how |= {"nargs": "?", "const": option.alone}
        action = group.add_argument(option.flag, **how)
        action.shown_default = in_recipe  # a model's own recipe without the argument has `default`


def parse(parser, argv=None):
    """{name: value} of what is on the command line, without defaults. Raises UserError."""
    given = explicit(parser, argv)
    if given.get("batch_size", 0) is None:
        if all(action.dest != "micro_batch" for action in parser._actions):
            raise UserError("--batch-size auto is an option of train_sota.py: give a number", 2)
        del given["batch_size"]
        given.setdefault("micro_batch", None)
    return given


def defaults(parser):
    """{name: default} of all arguments of a parser."""
    return {action.dest: action.default for action in parser._actions if action.dest != "help"}


def resolve(parser, argv=None, given=None):
    """(args, saved): the value of every argument, and the contents of last.pt with --resume.

    given: the result of `parse`, instead of argv.
    args.origin: {name: the layer that the value came from}. Raises UserError.
    """
    given = parse(parser, argv) if given is None else given
    if "resume_previous" in given and "resume" not in given:
        raise UserError("--resume-previous needs --resume", 2)
    if "model" in given:
        given["model"] = models.canonical(given["model"])
    if "resume" in given:
        return resume.resolve(defaults(parser), given)
    config, config_origin = read_config(given["config"], parser) if "config" in given else ({}, {})
    args = merge(layers(parser, given, config, config_origin), defaults(parser))
    for name in [name for name, source in args.origin.items() if source == "config"]:
        # What a recipe or a default gave to the config's run was not asked for by anybody.
        if config_origin.get(name, "config") not in EXPLICIT:
            args.origin[name] = config_origin[name]
    if args.lr is None:
        raise UserError(f"--optimizer {args.optimizer} has no default learning rate: add --lr", 2)
    return args, None


def merge(ordered, keys):
    """A Namespace with, for each key, the value of the first layer that has it, and `origin`."""
    values, origin = {}, {}
    for key in keys:
        origin[key], values[key] = next(
            (name, layer[key]) for name, layer in ordered if key in layer
        )
    return argparse.Namespace(**values, origin=origin)


def layers(parser, given, config, config_origin):
    """[(name, {argument: value})], the first one that has an argument decides.

    A recipe is made for its optimizer: with another one, its rates don't apply.
    """
    default = defaults(parser)
    if parser.pretrained_model and (config | given).get("pretrained"):
        default["model"] = parser.pretrained_model
    recipe = recipe_for(default | config | given, parser.recipe)
    if config and recipe != recipe_for(default | config, parser.recipe):
        # Another model, or another way to start: only what was asked for in the config applies.
        same_model = {"model"} if given.get("pretrained") is False else set()
        config = {
            name: value
            for name, value in config.items()
            if name in same_model or config_origin.get(name, "config") in EXPLICIT
        }
    native = recipe["optimizer"]
    chosen = (config | given).get("optimizer", native)
    if chosen != native:
        recipe = _without(recipe, _tied(native, chosen))
    before = config.get("optimizer", chosen)
    if given.get("optimizer", before) != before:
        config = _without(config, _tied(native, chosen, before))
    no_mixing = {"mixup": 0.0, "cutmix": 0.0, "cutout": 0, "random_erasing": 0.0}
    if given.get("augment") == "none":
        config = _without(config, no_mixing)
    if (recipe | config | given)["augment"] != "none":
        no_mixing = {}
    return [
        ("command line", given),
        ("config", config),
        ("--augment none", no_mixing),
        ("recipe", recipe),
        ("optimizer", optimizer_defaults(chosen)),
        ("default", default),
    ]


def _tied(*optimizers):
    """The arguments whose values belong to an optimizer."""
    return {"optimizer"}.union(*(optimizer_defaults(name) for name in optimizers))


def recipe_for(chosen, script_recipe):
    """The recipe of the chosen model, or of starting from its weights; else the script's."""
    transfer = bool(chosen.get("pretrained") or chosen.get("weights"))
    own = models.recipe(chosen["model"], transfer, bool(chosen.get("freeze_backbone")))
    return own or _without(script_recipe, {"model"})


def _without(values, keys):
    return {key: value for key, value in values.items() if key not in keys}


def as_dict(args):
    """{name: value} of the arguments that are recorded."""
    return _without(vars(args), {"origin", "doctor", "dry_run", "gpu_memory", "smoke"})


def data_options(args):
    """The keyword arguments of data.load."""
    options = ("data_url", "image_size", "val_size", "limit_train", "limit_test", "skip_bad_images")
    return {name: getattr(args, name) for name in options}


# ---- what is written down ------------------------------------------------------------------------


def record(args, automatic, derived=None):
    """(arguments, origin) for config.json and last.pt.

    automatic: {argument: value} of what "auto" stood for; derived: what --micro-batch changed.
    """
    origin = dict(args.origin)
    origin |= dict.fromkeys(automatic, "auto") | dict.fromkeys(derived or {}, "--micro-batch")
    return as_dict(args) | automatic | (derived or {}), origin
