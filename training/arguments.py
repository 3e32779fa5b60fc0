"""The arguments of the training scripts, and where their values come from."""

import argparse
import difflib

from common.command_line import Parser, number, number_or_auto
from common.errors import UserError

OF_THE_CALL = (
    "config",
    "resume",
    "resume_previous",
    "output_dir",
    "list_models",
)  # not taken over by --config


DATASETS = ("cifar10", "cifar100", "folder", "shapes")


AUGMENTATIONS = (
    "crop",
    "flip",
    "color_jitter",
    "rand_augment",
    "trivial_augment",
    "random_resized_crop",
)  # augment.TRANSFORMS


def augmentations(text):
    """Names of AUGMENTATIONS, separated by commas, or "none"; kept as text."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in AUGMENTATIONS:
            raise argparse.ArgumentTypeError(
                f"it takes none or names from {', '.join(AUGMENTATIONS)}, not {name!r}"
            )
    return text


def training_parser(description, *, model, epochs):
    """The arguments of a training script, with its default model and epochs."""
    parser = Parser(description)
    add_model(parser, model)
    add_transfer(parser)
    add_data(parser)
    add_training(parser, epochs=epochs)
    add_machine(parser)
    add_run(parser)
    for group in parser._action_groups:
        for action in group._group_actions:
            action.of_recipe = group.title in ("training", "augmentation")
    return parser


def change_defaults(parser, **values):
    """Other defaults for a script. argparse's set_defaults would let `explicit` take them for the command line's."""
    for action in parser._actions:
        action.default = values.get(action.dest, action.default)


def add_model(parser, default):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=default, metavar="NAME", help="a name of --list-models, or timm/<name>"
    )
    group.add_argument(
        "--model-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of it; repeatable",
    )
    group.add_argument("--list-models", action="store_true", help="print all models and stop")


def add_transfer(parser):
    group = parser.add_argument_group(
        "transfer", "Starting from weights brings a recipe of its own: few epochs, a small rate."
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="start from published weights (timm's models; needs network)",
    )
    group.add_argument(
        "--weights", metavar="FILE", help="start from a .pt or .safetensors file, or a run"
    )
    group.add_argument(
        "--freeze-backbone",
        action="store_true",
        help="train the classifier only, on features that are computed once (linear probing)",
    )
    group.add_argument(
        "--lora-rank",
        type=number(int, low=0),
        default=0,
        metavar="R",
        help="train adapters of this rank in place of the backbone's weights (0: none; needs peft)",
    )
    group.add_argument(
        "--layer-decay",
        type=number(above=0, high=1),
        default=1.0,
        metavar="X",
        help="each layer's rate over that of the next one; the classifier has the full rate",
    )


def add_data(parser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="cifar10",
        choices=DATASETS,
        help="folder: DATA_DIR/train/<class>/*.png|jpg and test/; shapes: made here, no files",
    )
    group.add_argument(
        "--data-dir",
        default="data",
        metavar="DIR",
        help="where archives are looked for and downloaded to",
    )
    group.add_argument(
        "--data-url",
        metavar="URL",
        help="where to download the archive instead of the published places",
    )
    group.add_argument(
        "--image-size",
        type=number(int, low=8, high=1024),
        default=32,
        metavar="PX",
        help="side of the inputs",
    )
    group.add_argument(
        "--val-size",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="training images to hold out (stratified, same for each seed), to choose best.pt on",
    )
    group.add_argument(
        "--limit-train",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="keep N training images (0: all)",
    )
    group.add_argument(
        "--limit-test",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="keep N test images (0: all)",
    )
    group.add_argument(
        "--resident",
        default="auto",
        choices=("auto", "device", "host"),
        help="where the pictures lie; auto: the device, if they take at most a third of its memory",
    )
    group.add_argument(
        "--skip-bad-images", action="store_true", help="leave unreadable pictures of a folder out"
    )


def add_training(parser, *, epochs):
    auto = number_or_auto
    group = parser.add_argument_group(
        "training",
        "What a model's recipe and the optimizer bring comes before these defaults; "
        "--list-models names the recipes.",
    )
    group.add_argument(
        "--epochs",
        type=number(int, low=1),
        default=epochs,
        metavar="N",
        help="in total, also with --resume",
    )
    group.add_argument(
        "--batch-size",
        type=auto(kind=int, low=1),
        action=BatchSize,
        default=128,
        metavar="N",
        help="of all devices together; auto: the recipe's, in parts that fit: --micro-batch auto",
    )
    group.add_argument(
        "--optimizer",
        default="sgd",
        choices=("sgd", "adam", "adamw", "muon"),
        help="brings its own rates",
    )
    group.add_argument(
        "--lr", type=number(low=0), default=0.1, metavar="X", help="highest learning rate"
    )
    group.add_argument(
        "--momentum",
        type=number(low=0, high=0.9999),
        default=0.9,
        metavar="X",
        help="Adam's first beta, too",
    )
    group.add_argument(
        "--weight-decay",
        type=number(low=0),
        default=5e-4,
        metavar="X",
        help="not on norms and biases",
    )
    group.add_argument(
        "--schedule",
        default="cosine",
        choices=("cosine", "linear", "one_cycle", "multi_step", "constant"),
        help="of the learning rate after the warmup, to zero at the end",
    )
    group.add_argument(
        "--warmup-epochs",
        type=auto(low=0),
        default=None,
        metavar="X",
        help="default: a tenth of the run, 5 at most; one_cycle: a quarter",
    )
    group.add_argument(
        "--label-smoothing",
        type=number(low=0, high=0.99),
        default=0.1,
        metavar="X",
        help="part of the target that is spread over all classes",
    )
    group.add_argument(
        "--ema-decay",
        type=auto(low=0, high=0.999999),
        default=None,
        metavar="X",
        help="of the weights' moving average (0: none); default: horizon a twentieth of the run",
    )
    group.add_argument(
        "--drop-path",
        type=number(low=0, high=0.99),
        default=None,
        metavar="X",
        help="highest rate of stochastic depth (default: the model's)",
    )
    group.add_argument(
        "--clip-grad",
        type=number(low=0),
        default=0.0,
        metavar="X",
        help="largest gradient norm (0: any)",
    )
    group.add_argument(
        "--accumulate",
        type=number(int, low=1),
        default=1,
        metavar="K",
        help="cut each batch in K parts",
    )
    group.add_argument(
        "--micro-batch",
        type=auto(kind=int, low=0),
        default=0,
        metavar="N",
        help="cut each batch in parts of "
        "at most N images on each device (0: as --accumulate says; auto: as many as fit)",
    )
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--augment",
        type=augmentations,
        default="crop,flip",
        metavar="LIST",
        help=f"none, or from {', '.join(AUGMENTATIONS)}; none turns mixing, cutout and erasing off, too, "
        "unless they are asked for",
    )
    group.add_argument(
        "--crop-padding",
        default="reflect",
        choices=("reflect", "zero"),
        help="the border that crop adds",
    )
    group.add_argument(
        "--mixup", type=number(low=0), default=0.2, metavar="ALPHA", help="MixUp's alpha (0: none)"
    )
    group.add_argument(
        "--cutmix",
        type=number(low=0),
        default=1.0,
        metavar="ALPHA",
        help="CutMix's alpha (0: none)",
    )
    group.add_argument(
        "--mix-prob",
        type=number(low=0, high=1),
        default=0.5,
        metavar="P",
        help="part of the images to mix",
    )
    group.add_argument(
        "--cutout",
        type=number(int, low=0),
        default=0,
        metavar="PX",
        help="side of the square that is cut out",
    )
    group.add_argument(
        "--random-erasing",
        type=number(low=0, high=1),
        default=0.0,
        metavar="P",
        help="part of the images that lose a box",
    )
    group.add_argument(
        "--repeated-augment",
        type=number(int, low=1),
        default=1,
        metavar="K",
        help="a batch has each of its images K times, augmented K ways",
    )


def add_machine(parser):
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument(
        "--amp",
        default="auto",
        choices=("auto", "off", "bf16", "fp16"),
        help="auto: bf16 where it is fast",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument(
        "--grad-checkpointing", action="store_true", help="less memory for a third more work"
    )
    group.add_argument(
        "--ema-device",
        default="same",
        choices=("same", "cpu"),
        help="where the moving average is kept",
    )
    group.add_argument(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="shard the model over the devices (torchrun), for large ones",
    )
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="batch norm over the batches of all devices (torchrun)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits for the same seed, machine and versions",
    )
    group.add_argument(
        "--seed",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="of everything that is drawn",
    )


def add_run(parser):
    group = parser.add_argument_group("run")
    group.add_argument(
        "--eval-every",
        type=number(int, low=1),
        default=1,
        metavar="N",
        help="epochs between evaluations",
    )
    group.add_argument(
        "--output-dir", metavar="DIR", help="instead of runs/<dataset>-<model>-s<seed>-<time>"
    )
    group.add_argument("--tag", metavar="WORD", help="a word for the run's name")
    group.add_argument("--resume", metavar="RUN", help="go on with a run that was cut off")
    group.add_argument(
        "--resume-previous",
        action="store_true",
        help="with --resume: where last.pt is damaged, go on from the save before it (previous.pt)",
    )
    group.add_argument("--config", metavar="FILE", help="take arguments from a run's config.json")


class BatchSize(argparse.Action):
    """A number, or None, "auto": the batch stays what it would be, and its parts become as large as memory allows."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value is None:
            namespace.micro_batch = None
        else:
            namespace.batch_size = value


def resolve(parser, given, config, recipe, optimizers, config_origin=None):
    """(arguments by name, where each came from).

    given: what the command line says; config: --config's arguments, or {}, and where they came from; recipe(arguments): a
    dict; optimizers: what goes with each optimizer. A recipe is made for its optimizer: with another one its rates don't
    apply. Another model, optimizer or augmentation on the command line than in the config brings what goes with it.
    """
    defaults = {a.dest: a.default for a in parser._actions if a.dest != "help"}
    config = _convert(
        parser, {key: value for key, value in config.items() if key not in OF_THE_CALL}
    )
    values, origin = dict(defaults), dict.fromkeys(defaults, "default")

    def put(source, items):
        values.update(items)
        origin.update(dict.fromkeys(items, source))

    chosen = config | given
    model_recipe = {key: value for key, value in recipe(defaults | chosen).items() if key in values}
    native = model_recipe.get("optimizer", defaults["optimizer"])
    optimizer = chosen.get("optimizer", native)
    put(
        "optimizer",
        {key: value for key, value in optimizers.get(optimizer, {}).items() if key in values},
    )
    foreign = {"optimizer", *optimizers.get(native, {}), *optimizers.get(optimizer, {})}
    if optimizer != native:
        model_recipe = {key: value for key, value in model_recipe.items() if key not in foreign}
    put("recipe", model_recipe)
    other_model = given.get("model", config.get("model")) != config.get("model")
    if config and (other_model or recipe(defaults | config) != recipe(defaults | chosen)):
        asked = (
            "command line",
            "config",
        )  # what came with the other recipe, or with none, gives way
        config = {
            key: value
            for key, value in config.items()
            if (config_origin or {}).get(key, "config") in asked
        }
    if given.get("optimizer", config.get("optimizer", optimizer)) != config.get(
        "optimizer", optimizer
    ):
        config = {
            key: value
            for key, value in config.items()
            if key not in foreign | set(optimizers[config["optimizer"]])
        }
    if chosen.get("augment", values["augment"]) == "none":
        nothing = {"mixup": 0.0, "cutmix": 0.0, "cutout": 0, "random_erasing": 0.0}
        put("--augment none", nothing)
        if "augment" in given:
            config = {key: value for key, value in config.items() if key not in nothing}
    put("config", config)
    put("command line", given)
    return argparse.Namespace(**values), origin


def _convert(parser, config):
    """The values as the command line would have read them; refuses what it would refuse."""
    actions = {action.dest: action for action in parser._actions}
    converted = {}
    for key, value in config.items():
        if key not in actions:
            near = difflib.get_close_matches(key, actions, n=1)
            raise UserError(
                f"--config: unknown argument {key!r}"
                + (f"; did you mean {near[0]}?" if near else ""),
                status=2,
            )
        action = actions[key]
        try:
            converted[key] = _convert_value(action, value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--config: {key}: {error}", status=2) from error
    return converted


def _convert_value(action, value):
    if isinstance(action, BatchSize) and value in (None, "auto"):
        raise ValueError("auto is for the command line; a run's config.json has the number")
    if value is None and action.default is None:
        return None
    if value is None and action.type:
        return action.type("auto")  # what takes it holds it as None; the rest refuses it
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    if isinstance(action.default, list):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{value!r} is no list of texts")
        return value
    wanted = str if action.type is None else (str, int, float)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not what it takes")
    if action.choices and value not in action.choices:
        raise ValueError(f"{value!r} is none of {', '.join(action.choices)}")
    return action.type(str(value)) if action.type else value
