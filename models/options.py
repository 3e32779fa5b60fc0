"""Which options a model may be built with. They may come from a stranger's checkpoint or config.json.

timm.create_model passes what it is given on to a hub, a file loader and the network's constructor. So only plain values that
describe an architecture are accepted, and none of the options that read, write or download.
"""

import ast
import re

from common.errors import UserError

# What timm's factory (timm/models/_factory.py, _builder.py) does other than describe the network: weights from a hub, an
# address or a file (these and whatever begins with "pretrained"), another kind of module around it, another device.
REFUSED = {
    "checkpoint_path",
    "cache_dir",
    "pruned",
    "features_only",
    "feature_cfg",
    "feature_cls",
    "out_indices",
    "scriptable",
    "exportable",
    "no_jit",
    "device",
    "dtype",
    "model_cfg",
    "model_cls",
    "variant",
    "kwargs_filter",
}
OURS = {"name", "model_name", "num_classes"}  # what create_model has arguments for
WORD = re.compile(
    r"[A-Za-z0-9_+-]{0,64}"
)  # no separator of a path, no suffix of a file, no scheme of an address
DEEPEST, LONGEST = 4, 256  # of nested lists


def read_pairs(pairs):
    """["key=value", …] as a dict, values read as Python literals, or as text where they are none. Raises UserError."""
    if not isinstance(pairs, list):
        raise UserError(f"--model-arg must be a list of key=value, not {_short(pairs)}", status=2)
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=") if isinstance(pair, str) else ("", "", "")
        if not equals:
            raise UserError(f"--model-arg takes key=value, not {_short(pair)}", status=2)
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = text
    return options


def check(name, options):
    """Raises UserError unless every option is one that describes an architecture, with a value that is plain."""
    if not isinstance(options, dict):
        raise UserError(f"{name}: options must be a dict, not {_short(options)}", status=2)
    for key, value in options.items():
        if not isinstance(key, str) or not WORD.fullmatch(key) or not key.isidentifier():
            raise UserError(f"{name}: {_short(key)} is not the name of an option", status=2)
        if key in REFUSED or key.startswith("pretrained"):
            raise UserError(
                f"{name}: the option {key} was refused: options describe an architecture, "
                "and none of them may load weights or change how a model is built",
                status=2,
            )
        if key in OURS:
            raise UserError(f"{name}: {key} is not an option: this program sets it", status=2)
        if not _is_plain(value):
            raise UserError(
                f"{name}: {key} takes a number, True, False, None, a word of at most 64 letters, digits, _, + "
                f"and -, or a list of these, not {_short(value)}",
                status=2,
            )


def _is_plain(value, depth=0):
    if isinstance(value, (list, tuple)):
        return (
            depth < DEEPEST
            and len(value) <= LONGEST
            and all(_is_plain(item, depth + 1) for item in value)
        )
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    if isinstance(value, (int, float)):
        return abs(value) < 2**63  # neither infinite nor nan
    return value is None


def _short(value):
    """repr, cut; of what holds more than this, only its type."""
    text = (
        repr(value)
        if isinstance(value, (str, int, float, bytes)) and _sized(value)
        else type(value).__name__
    )
    return text if len(text) <= 80 else text[:77] + "…"


def _sized(value):
    return not isinstance(value, int) or abs(value) < 2**63
