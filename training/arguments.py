"""The arguments of the training scripts, and where the value of each comes from.

    parser = training_parser(__doc__, RECIPE)
    args, saved = resolve(parser, argv)         # saved: the contents of last.pt with --resume

A value comes from the first of these sources that has it: the command line, --config FILE, what
--augment none turns off, the recipe (the model's own, else the script's RECIPE), the optimizer's
defaults, the defaults of training/options.py. args.origin says which source it was.
"""

import argparse

import models
from common.command_line import Parser, explicit
from common.errors import UserError
from training import options, resume
from training.config_file import read_config
from training.optimizers import optimizer_defaults

EXPLICIT = ("command line", "config")  # sources of values that somebody asked for
NO_MIXING = {"mixup": 0.0, "cutmix": 0.0, "cutout": 0, "random_erasing": 0.0}  # --augment none


def training_parser(docstring, recipe, pretrained_model=None):
    """The arguments that all training scripts share.

    recipe: the script's RECIPE; pretrained_model: the default model with --pretrained.
    """
    parser = Parser(" ".join(docstring.split("\n\n")[0].split()))
    parser.recipe, parser.pretrained_model = recipe, pretrained_model
    add_options(parser, "model", options.MODEL)
    transfer = "Starting from weights selects a recipe of its own."
    add_options(parser, "transfer", options.TRANSFER, transfer)
    add_options(parser, "data", options.DATA)
    training = "A model's own recipe replaces these defaults, and those of other groups."
    add_options(parser, "training", options.TRAINING, training)
    augmentation = "--augment none also disables mixing, cutout and erasing."
    add_options(parser, "augmentation", options.AUGMENTATION, augmentation)
    add_options(parser, "machine", options.MACHINE)
    add_options(parser, "run", options.RUN)
    return parser


def add_options(parser, title, group_options, description=None):
    """Adds a group of options. What has no default of its own has that of the parser's recipe."""
    group = parser.add_argument_group(title, description)
    for option in group_options:
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
        if option.const is not None:
            how |= {"nargs": "?", "const": option.const}
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
    args.origin: {name: the source that the value came from}. Raises UserError.
    """
    given = parse(parser, argv) if given is None else given
    if "resume_previous" in given and "resume" not in given:
        raise UserError("--resume-previous needs --resume", 2)
    if "model" in given:
        given["model"] = models.canonical(given["model"])
    if "resume" in given:
        return resume.resolve(defaults(parser), given)
    config, config_origin = read_config(given["config"], parser) if "config" in given else ({}, {})
    args = merge(value_sources(parser, given, config, config_origin), defaults(parser))
    if config:
        # What the config's run had from a recipe or by default was not asked for. Where the value
        # would be the same without it, the config isn't its source.
        asked_for = _explicit_values(config, config_origin, given)
        without = merge(value_sources(parser, given, asked_for, config_origin), defaults(parser))
        for name, source in args.origin.items():
            if source == "config" and getattr(args, name) == getattr(without, name):
                args.origin[name] = without.origin[name]
    if args.lr is None:
        raise UserError(f"--optimizer {args.optimizer} has no default learning rate: add --lr", 2)
    return args, None


def merge(sources, keys):
    """A Namespace with, for each key, the value of the first source that has it, and `origin`."""
    values, origin = {}, {}
    for key in keys:
        origin[key], values[key] = next(
            (source, of_source[key]) for source, of_source in sources if key in of_source
        )
    return argparse.Namespace(**values, origin=origin)


def value_sources(parser, given, config, config_origin):
    """[(source, {argument: value})], the first one that has an argument decides.

    A recipe is made for its optimizer: with another one, its rates don't apply.
    """
    default = defaults(parser)
    if parser.pretrained_model and (config | given).get("pretrained"):
        default["model"] = parser.pretrained_model
    recipe = recipe_for(default | config | given, parser.recipe)
    if config and recipe != recipe_for(default | config, parser.recipe):
        config = _explicit_values(config, config_origin, given)
    recipe_optimizer = recipe["optimizer"]
    optimizer = (config | given).get("optimizer", recipe_optimizer)
    if optimizer != recipe_optimizer:
        recipe = _without(recipe, _arguments_of(recipe_optimizer, optimizer))
    config_optimizer = config.get("optimizer", optimizer)
    if given.get("optimizer", config_optimizer) != config_optimizer:
        others = (recipe_optimizer, optimizer, config_optimizer)
        config = _without(config, _arguments_of(*others))
    if given.get("augment") == "none":
        config = _without(config, NO_MIXING)
    elif "augment" in given:  # what --augment none turned off in the config's run was not asked for
        off = {name for name, source in config_origin.items() if source == "--augment none"}
        config = _without(config, off)
    sources = [("command line", given), ("config", config)]
    if (recipe | config | given)["augment"] == "none":
        sources.append(("--augment none", NO_MIXING))
    sources += [("recipe", recipe), ("optimizer", optimizer_defaults(optimizer))]
    return [*sources, ("default", default)]


def _explicit_values(config, config_origin, given):
    """What was asked for in the run of a config: with another model, its recipe doesn't apply."""
    same_model = {"model"} if given.get("pretrained") is False else set()
    return {
        name: value
        for name, value in config.items()
        if name in same_model or config_origin.get(name, "config") in EXPLICIT
    }


def _arguments_of(*optimizers):
    """The arguments whose values belong to an optimizer."""
    return {"optimizer"}.union(*(optimizer_defaults(name) for name in optimizers))


def recipe_for(chosen, script_recipe):
    """The recipe of the chosen model, or of starting from its weights; else the script's."""
    transfer = bool(chosen.get("pretrained") or chosen.get("weights"))
    own = models.recipe(chosen["model"], transfer, bool(chosen.get("freeze_backbone")))
    unusable = set() if models.defines_layers(chosen["model"]) else {"layer_decay"}
    return own or _without(script_recipe, {"model"} | unusable)


def _without(values, keys):
    return {key: value for key, value in values.items() if key not in keys}


def as_dict(args):
    """{name: value} of the arguments that are recorded."""
    return _without(vars(args), {"origin", "doctor", "dry_run", "gpu_memory", "smoke"})


def data_options(args):
    """The keyword arguments of data.load."""
    names = ("data_url", "image_size", "val_size", "limit_train", "limit_test", "skip_bad_images")
    return {name: getattr(args, name) for name in names}


# ---- what is written down ------------------------------------------------------------------------


def record(args, automatic, derived=None):
    """(arguments, origin) for config.json and last.pt.

    automatic: {argument: value} of what "auto" stood for; derived: what --micro-batch changed.
    """
    origin = dict(args.origin)
    origin |= dict.fromkeys(automatic, "auto") | dict.fromkeys(derived or {}, "--micro-batch")
    return as_dict(args) | automatic | (derived or {}), origin
