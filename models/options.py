"""Which options a model may be built with.

They may come from a stranger's checkpoint or config.json, and timm.create_model passes what it is
given on to a hub, a file loader and the network's constructor. So only plain values that describe
an architecture are accepted, and none of the options that read, write or download.
"""

import ast
import re

from common.errors import UserError

# What timm's factory (timm/models/_factory.py, _builder.py) does apart from describing the network:
# weights from a hub, an address or a file (these and all that begin with "pretrained"), another
# kind of module around the network, another device.
# fmt: off
REFUSED = {
    "checkpoint_path", "cache_dir", "pruned", "features_only", "feature_cfg", "feature_cls",
    "out_indices", "scriptable", "exportable", "no_jit", "device", "dtype", "model_cfg",
    "model_cls", "variant", "kwargs_filter",
}
# fmt: on
ARGUMENTS = {"name", "model_name", "num_classes"}  # of create_model
# A word can't contain a path's separator, a file's suffix or an address's scheme.
WORD = re.compile(r"[A-Za-z0-9_+-]{0,64}")
MAX_DEPTH, MAX_LENGTH = 4, 256  # of nested lists
LIMIT = 2**63  # of numbers


def read_pairs(pairs):
    """["key=value", ...] as a dict. Values are Python literals, or else text. Raises UserError."""
    if not isinstance(pairs, list):
        raise UserError(f"--model-arg must be a list of key=value, not {_short(pairs)}", status=2)
    options = {}
    for pair in pairs:
        if not isinstance(pair, str) or "=" not in pair:
            raise UserError(f"--model-arg takes key=value, not {_short(pair)}", status=2)
        key, _, text = pair.partition("=")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = text
    return options


def check(name, options):
    """Raises UserError unless all options of a model describe an architecture by plain values."""
    if not isinstance(options, dict):
        raise UserError(f"{name}: options must be a dict, not {_short(options)}", status=2)
    for key, value in options.items():
        if problem := _problem(key, value):
            raise UserError(f"{name}: {problem}", status=2)


def _problem(key, value):
    """What is wrong with an option, or None."""
    if not isinstance(key, str) or not WORD.fullmatch(key) or not key.isidentifier():
        return f"{_short(key)} is not a valid name of an option"
    if key in REFUSED or key.startswith("pretrained"):
        return (
            f"the option {key} was refused: options describe an architecture, "
            "and none of them may load weights or change how a model is built"
        )
    if key in ARGUMENTS:
        return f"{key} is not an option: this program sets it"
    if not _is_plain(value):
        return (
            f"{key} takes a number, True, False, None, a word of at most 64 letters, digits, "
            f"_, + and -, or a list of these, not {_short(value)}"
        )
    return None


def _is_plain(value, depth=0):
    if isinstance(value, (list, tuple)):
        fits = depth < MAX_DEPTH and len(value) <= MAX_LENGTH
        return fits and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    if isinstance(value, (int, float)):
        return abs(value) < LIMIT  # False for inf and nan
    return value is None


def _short(value):
    """repr of a plain value, cut to 80 characters; the type's name of any other."""
    too_long = isinstance(value, int) and abs(value) >= LIMIT
    if too_long or not isinstance(value, (str, int, float, bytes)):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
