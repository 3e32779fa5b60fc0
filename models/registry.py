"""Models by name: their options and recipes, and create_model."""

import difflib
import re

from common.errors import UserError
from models import options as plain_options
from models import published
from models.published import create_timm, has_fixed_size
from models.recipes import PROBE, TRANSFER, TRANSFER_SIZE
from models.table import FAMILIES, MODELS

# timm itself also takes addresses and paths for names: hf-hub:..., local-dir:...
TIMM_NAME = re.compile(r"timm/[A-Za-z0-9_.-]{1,128}")


def canonical(name):
    """The name in MODELS, ignoring case, "-" and "_"; timm/<name> as it is. Raises UserError."""
    if not isinstance(name, str):
        message = f"the name of a model must be a string, not {type(name).__name__}"
        raise UserError(message, status=2)
    if name.startswith("timm/"):
        if not TIMM_NAME.fullmatch(name):
            names = "timm/<name> with a name of timm.list_models()"
            raise UserError(f"{name[:80]!r} is not {names}", status=2)
        return name
    known = {_bare(key): key for key in MODELS}
    known |= {_bare(entry.alias): key for key, entry in MODELS.items() if entry.alias}
    if _bare(name) in known:
        return known[_bare(name)]
    similar = difflib.get_close_matches(_bare(name), known, n=3, cutoff=0.5)
    if similar:
        hint = f"did you mean {' or '.join(known[key] for key in similar)}?"
    else:
        hint = f"the names are {', '.join(MODELS)}"
    more = "--list-models shows all, timm/<name> takes any of timm's"
    raise UserError(f"unknown model {name[:80]!r}: {hint} ({more})", status=2)


def _bare(text):
    return text.lower().replace("-", "").replace("_", "")


def family(name):
    """The family of a model, by which charts group: timm's module for its networks; "" if unknown.

    Plain networks are apart from the residual ones that they are compared with.
    """
    if name.startswith("timm/"):
        return published.family(name.removeprefix("timm/"))
    entry = MODELS.get(name)
    if entry is None:
        return ""
    if name.startswith("plain"):
        return "plain"
    if entry.timm_name:
        return published.family(entry.timm_name)
    return FAMILIES.get(entry.constructor, entry.constructor.__module__.rsplit(".", 1)[-1])


def weights_name(name):
    """timm's complete name of a model's published weights, architecture.tag; None without any."""
    listed = MODELS.get(name)
    timm_name = listed.timm_name if listed else name.removeprefix("timm/")
    return published.weights_name(timm_name) if timm_name else None


def is_published(name):
    """Whether timm may have weights of a model; it is not asked about each timm/<name>."""
    return name.startswith("timm/") or MODELS[name].timm_name is not None


def defines_layers(name):
    """Whether a model tells the depth of its layers, as --layer-decay needs."""
    entry = MODELS.get(name)
    return entry is None or is_published(name) or hasattr(entry.constructor, "group_matcher")


def require_published(name):
    """Raises UserError for a model that has no published weights."""
    if not is_published(name):
        names = ", ".join(key for key in MODELS if is_published(key))
        hint = f"take {names} or timm/<name>, or a file with --weights"
        raise UserError(f"{name} has no published weights: {hint}", status=2)


def prefers_fp32(name, device):
    """Whether --amp auto should use fp32: depthwise convolutions are slow in bf16 on CPUs."""
    return device.type == "cpu" and name in MODELS and not MODELS[name].bf16_on_cpu


def recipe(name, transfer=False, frozen=False):
    """A copy of the model's training arguments: from scratch, or from weights.

    frozen: from weights, with only the classifier trained.
    """
    entry = MODELS.get(name)
    if not transfer:
        return dict(entry.recipe) if entry else {}
    large = entry is not None and entry.large
    if large and not frozen:
        return dict(entry.recipe)
    chosen = dict(PROBE if frozen else TRANSFER)
    if large:
        chosen["image_size"] = entry.image_size
    elif is_published(name):
        chosen["image_size"] = TRANSFER_SIZE
    elif not defines_layers(name):
        chosen["layer_decay"] = 1.0
    return chosen


def parse_options(pairs, name, image_size=None, drop_path=None):
    """["key=value", ...] as checked options of a model; values are Python literals, or else text.

    image_size goes to models that need it, drop_path to any where it is not None; a pair overrides
    both. Raises UserError.
    """
    name = canonical(name)
    options = plain_options.read_pairs(pairs)
    listed = name in MODELS
    if drop_path is not None:
        if listed and "drop_path" not in MODELS[name].options:
            raise UserError(f"{name} takes no --drop-path", status=2)
        options = {"drop_path" if listed else "drop_path_rate": drop_path} | options
    check_options(name, options)
    if listed and image_size and "image_size" in MODELS[name].options:
        options.setdefault("image_size", image_size)
    elif not listed and image_size and has_fixed_size(name.removeprefix("timm/")):
        options.setdefault("img_size", image_size)
    return options


def check_options(name, options):
    """Raises UserError unless a model may be built with these options, wherever they come from.

    They must describe an architecture (see models/options.py), and suit the model if it is listed.
    """
    plain_options.check(name, options)
    if name not in MODELS:
        return
    valid = MODELS[name].options
    for key, value in options.items():
        if key not in valid:
            names = ", ".join(f"{k}={v}" for k, v in valid.items()) or "none"
            valid_ones = f"its options (and defaults) are: {names}"
            raise UserError(f"{name} has no option {key!r}; {valid_ones}", status=2)
        wanted = type(valid[key])
        accepted = (int, float) if wanted is float else wanted
        if valid[key] is not None and not isinstance(value, accepted):
            raise UserError(f"{name}: {key} takes {wanted.__name__}, not {value!r}", status=2)


def create_model(name, num_classes=10, *, pretrained=False, **options):
    """A model of MODELS, or timm/<name>: float (B, 3, H, W) -> logits (B, num_classes).

    pretrained: with timm's published weights instead of fresh ones. Raises UserError for an unknown
    name or option, and if the weights can't be downloaded.
    """
    name = canonical(name)
    check_options(name, options)
    if pretrained:
        require_published(name)
        options = options | {"pretrained": True}
    if name.startswith("timm/"):
        return create_timm(name.removeprefix("timm/"), num_classes, **options)
    entry = MODELS[name]
    try:
        return entry.constructor(num_classes, **entry.fixed, **options)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name}: {error}", status=2) from error
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"{name}: its options make it too large", status=2) from error


def from_card(card):
    """The model that a checkpoint's card describes, with fresh weights.

    Raises UserError for a card that can't be trusted.
    """
    name, num_classes, options = card["model"], card["num_classes"], card["options"]
    if type(num_classes) is not int or not 0 < num_classes <= 1_000_000:
        wanted = "num_classes must be a whole number from 1 to 1,000,000"
        raise UserError(f"{wanted}, not {str(num_classes)[:80]!r}")
    # Checked here, before create_model takes "pretrained" for its own argument.
    check_options(canonical(name), options)
    return create_model(name, num_classes, **options)
