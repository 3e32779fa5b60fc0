"""Copies finished runs into results/, without weights and without what names places of a machine.

    publish(["runs/campaign/eca/k3-s0", …], "results/eca", about(title, comparisons, command))

All of the runs are published, or none: the copy is complete before it gets its name. Of config.json
the keys in PUBLIC stay. --data-dir and absolute paths lose their directories, --data-url its value,
and the command is made anew from the arguments.
"""

import json
import shlex
import shutil
from pathlib import Path

from analysis import metrics, published, replicates
from common import files, scopes
from common.errors import UserError
from common.scopes import words
from sweeps import reference

PUBLIC = (
    *("arguments", "from", "family", "precision"),
    *("python", "torch", "torchvision", "timm", "numpy"),
    *("cuda", "cudnn", "device", "cores", "threads", "git", "command", "started", "resumed"),
)
COMPARISON = "comparison*"  # figures of compare_runs.py
OF_A_PART = ("git", "device", "threads", "torch")  # of a run before it was resumed
ON_BY_DEFAULT = ("nesterov", "curves")  # the switches for which "off" is worth saying


def about(title, comparisons, command, **more):
    """The contents of experiment.json, but for the names of the runs.

    command: what repeats the runs; None for a command that repeats one.
    """
    comparisons = [list(comparison) for comparison in comparisons]
    return {"title": title, "comparisons": comparisons, "command": command, **more}


def run_directories(paths):
    """Run directories; a directory of runs (of a sweep) stands for those in it."""
    directories = []
    for path in map(Path, paths):
        below = sorted(file.parent for file in path.glob("*/config.json"))
        is_run = (path / "config.json").exists() or not below
        directories += [path] if is_run else below
    return directories


def publish(directories, target, about, with_reference=False):
    """Makes the directory `target` of these runs. Raises UserError, and then nothing is changed.

    with_reference: allow different commits where short runs of each agree. Publishing the same
    again changes nothing; more runs of an experiment are added.
    """
    target = Path(target)
    old, new = _neighbor(target, "old"), _neighbor(target, "new")
    runs, commits, short_runs = {}, {}, set()
    for directory in directories:
        name, texts, config = public_run(Path(directory))
        if name in runs:
            raise UserError(f"{directory}: another run is {name}, too", status=2)
        runs[name] = texts
        commits |= dict.fromkeys(part["git"]["commit"] for part in parts(config))
        if with_reference:
            short_runs.add(reference.short_run(script_of(config), config))
    if not about["command"]:
        script = config["command"].split(" ")[0]
        place = Path(target.parent.name) / target.name
        repeat = f"python {Path(script).name} --config {place.as_posix()}"
        about = about | {"command": f"{repeat}/<run>/config.json"}
    restore(target)
    refuse_other_contents(target, runs)
    if len(commits) > 1:
        about = about | {"reference": reference.agree(list(commits), short_runs)}
    files.make_directory(target.parent)
    shutil.rmtree(new, ignore_errors=True)
    try:
        _write(new, runs, about, target)
        _replace(target, new, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _neighbor(target, word):
    if not target.name:
        raise UserError(f"name a directory to publish in, such as results/eca, not {target}", 2)
    return target.with_name(f".{target.name}.{word}")


def restore(target):
    """Gives the target its contents back, after an end between the two renames of _replace."""
    old = _neighbor(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)


def _write(directory, runs, about, target):
    """Writes {run: {file: text}}, experiment.json, and the notes and figures that the target has.

    Raises UserError if they don't belong together.
    """
    files.make_directory(directory)
    _write_file(directory / published.ABOUT, _json(about | {"runs": list(runs)}).encode())
    for name, texts in runs.items():
        files.make_directory(directory / name)
        for file, text in texts.items():
            _write_file(directory / name / file, text.encode())
    kept = [target / published.NOTES, target / published.FIGURE, *target.glob(COMPARISON)]
    for path in filter(Path.is_file, kept):
        _write_file(directory / path.name, path.read_bytes())
    for path in (directory, *(directory / name for name in runs)):
        files.sync_directory(path)
    try:
        published.load(directory)
    except UserError as error:
        raise UserError(str(error).replace(str(directory), str(target)), status=2) from error


def _write_file(path, contents):
    with files.open_file(path, "wb") as file:
        file.write(contents)
        files.sync(file)


def _replace(target, new, old):
    """Gives the directory `new` the name of the target, which is kept as `old` until then."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    files.sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def refuse_other_contents(target, runs):
    """Raises UserError if the target holds anything else than these runs."""
    if not target.exists():
        return
    others = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    others -= {path.name for path in target.glob(COMPARISON)}
    if published.ABOUT in others:
        others -= {published.ABOUT, published.FIGURE, *runs}
    others -= {published.NOTES}
    if others:
        raise UserError(f"{target} holds something else ({min(others)}): name another place", 2)
    for name, texts in runs.items():
        for file, text in texts.items():
            path = target / name / file
            if path.is_file() and path.read_text(encoding="utf-8") != text:
                raise UserError(f"{target} holds another run {name}: remove it first", status=2)


def public_run(path):
    """(name, {file: text}, config) of a run that may be published. Raises UserError."""
    config, summary = (files.read_json(path / f"{name}.json") for name in ("config", "summary"))
    arguments = config.get("arguments")
    if not isinstance(arguments, dict) or type(arguments.get("seed")) is not int:
        raise UserError(f"{path} holds no run (no readable config.json)", status=2)
    status = summary.get("status", "unfinished")
    if status != "finished":
        raise UserError(f"{path} is {status}: only finished runs are published", status=2)
    run = metrics.Run(path / "metrics.csv")
    epochs = summary.get("epochs")
    if run.problem or type(epochs) is not int or run.epochs != list(range(1, epochs + 1)):
        reason = run.problem or "doesn't hold each epoch of summary.json once"
        raise UserError(f"{path}: metrics.csv {reason}", status=2)
    refuse_unknown_code(path, config)
    precisions = {part.get("precision") for part in parts(config)} - {None}
    if len(precisions) > 1:
        raise UserError(f"{path} was computed in {' and in '.join(sorted(precisions))}", status=2)
    name = f"{replicates.label_of(path.resolve().name)}-s{arguments['seed']}"
    texts = {
        "config.json": _json(public_config(config)),
        "metrics.csv": run.path.read_text(encoding="utf-8"),
        "summary.json": _json(summary),
    }
    return name, texts, config


def _json(value):
    return json.dumps(value, indent=1) + "\n"


def refuse_unknown_code(path, config):
    """Raises UserError unless all of a run was made by committed code."""
    for part in parts(config):
        git = part.get("git")
        if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
            raise UserError(f"{path} doesn't say its commit: it was made outside git", status=2)
        if git.get("dirty") is not False:
            raise UserError(f"{path} was made with a modified working tree", status=2)


def parts(config):
    """config.json as it was at a run's start and each time that it resumed: the last one first."""
    return [config, *(part.get("before", part) for part in config.get("resumed", []))]


def commits_of(directories):
    """The commits that runs were made with, as far as their config.json names them."""
    configs = [files.read_json(Path(directory) / "config.json") for directory in directories]
    states = [part.get("git") for config in configs for part in parts(config)]
    return {git["commit"] for git in states if git}


def given_arguments(config):
    """(script, {argument: value}) that a run was started with, without what names directories."""
    arguments, origin = public_arguments(config["arguments"]), config.get("from", {})
    call, given = scopes.with_scope("call"), {}
    for name, value in arguments.items():
        is_off = value in (None, []) or (value is False and name not in ON_BY_DEFAULT)
        if name not in call and origin.get(name) in ("command line", "config") and not is_off:
            given[name] = value
    return script_of(config), given


def script_of(config):
    return Path(str(config.get("command", "train.py")).split(" ")[0]).name


def public_config(config):
    """config.json without what names directories, hosts or users."""
    script, given = given_arguments(config)
    command = shlex.join([script, *words(given)])
    public = config | {"arguments": public_arguments(config["arguments"]), "command": command}
    if "resumed" in config:
        epochs = [part["at_epoch"] for part in config["resumed"]]
        public["resumed"] = [
            {"at_epoch": epoch} | {key: part[key] for key in OF_A_PART if key in part}
            for epoch, part in zip(epochs, parts(config)[1:])
        ]
    return {key: value for key, value in public.items() if key in PUBLIC}


def public_arguments(arguments):
    """Arguments by name, without directories: see the top of this file."""
    return {name: _public(name, value) for name, value in arguments.items()}


def _public(name, value):
    if name == "data_url":
        return None
    if not isinstance(value, str):
        return value
    path = Path(value)
    is_private = name == "data_dir" or path.is_absolute() or value.startswith(("~", ".."))
    return path.name if is_private else value
