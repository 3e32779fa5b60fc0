"""--config: reads arguments from a file and checks them like those of a command line.

    values, origin = read_config("runs/x/config.json", parser)

The file is a run's config.json, or a JSON or YAML file (.yaml, .yml) with the same structure or
with argument names and values only. YAML is read with yaml.safe_load, which makes no objects.
"""

import argparse
import difflib
import json
from pathlib import Path

import yaml

import models
from common.errors import UserError, first_line
from common.scopes import SCOPES, flag, with_scope

MAX_YAML_LENGTH = 50_000  # characters; a config.json of all arguments has 4,000
MAX_YAML_DEPTH = 10  # PyYAML takes time quadratic in the depth
OTHER_SCRIPTS = {"lora_rank": 0, "micro_batch": 0, "ema_device": "same", "fsdp": False}


def read_config(path, parser):
    """(arguments, {argument: origin}) of a config.json, or of JSON or YAML like it or flat.

    Raises UserError.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}", 2) from error
    except ValueError as error:
        raise UserError(f"--config {path} is not text ({error})", 2) from error
    is_yaml = path.suffix in (".yaml", ".yml")
    config = _read_yaml(text, path) if is_yaml else _read_json(text, path)
    values = config.get("arguments", config) if isinstance(config, dict) else None
    origin = config.get("from", {}) if isinstance(config, dict) else {}
    names_only = isinstance(values, dict) and all(isinstance(key, str) for key in values)
    if not names_only or not isinstance(origin, dict):
        raise UserError(f"--config {path} holds no arguments", 2)
    # What was chosen automatically is chosen anew, and what followed from --micro-batch follows.
    values = {key: value for key, value in values.items() if origin.get(key) != "--micro-batch"}
    values = {key: None if origin.get(key) == "auto" else value for key, value in values.items()}
    if isinstance(values.get("model"), str):
        values["model"] = models.canonical(values["model"])
    values = {key: value for key, value in values.items() if key not in with_scope("call")}
    return _check_config(values, parser), origin


def _read_json(text, path):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid JSON ({error})", 2) from error


def _read_yaml(text, path):
    """The value of a YAML file of plain values. Raises UserError."""
    if len(text) > MAX_YAML_LENGTH:
        raise UserError(
            f"--config {path} has {len(text)} characters, more than {MAX_YAML_LENGTH}", 2
        )
    try:
        _check_structure(text, path)
        return yaml.safe_load(text)
    except UserError:
        raise
    except Exception as error:  # of a wrong value with a tag, PyYAML raises almost anything
        mark = getattr(error, "problem_mark", None)
        location = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"--config {path} is not valid YAML ({location}{reason})", 2) from error


def _check_structure(text, path):
    """Refuses aliases, which can make a small file a value of any size, and deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path} has an alias (*name): write its value instead", 2)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise UserError(f"--config {path} has more than {MAX_YAML_DEPTH} nested levels", 2)


def _check_config(values, parser):
    """The values as the command line would have read them; refuses what it would refuse."""
    actions = {action.dest: action for action in parser._actions}
    checked = {}
    for key, value in values.items():
        if key not in actions:
            if key in OTHER_SCRIPTS and value in (OTHER_SCRIPTS[key], None):
                continue
            if key in SCOPES:
                raise UserError(f"--config: {flag(key)} needs train_sota.py", 2)
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--config: unknown argument {key!r}{hint}", 2)
        try:
            checked[key] = _check_value(actions[key], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--config: {key}: {error}", 2) from error
    return checked


def _check_value(action, value):
    if value in (None, "auto") and action.dest == "batch_size":
        raise ValueError("must be a number; auto is for the command line")
    if value is None and action.default is None:
        return None
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r}")
        return value
    if action.default == []:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"must be a list of strings, not {value!r}")
        return value
    if value is False and "off" in (action.choices or ()):
        return "off"  # as YAML reads this word
    if value is None and action.type not in (None, str):
        return action.type("auto")  # only what accepts auto accepts this
    wanted = (str, int, float) if action.type not in (None, str) else (str,)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"has a value of the wrong type, {value!r}")
    if action.choices and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(action.choices)}, not {value!r}")
    return action.type(str(value)) if action.type else value
