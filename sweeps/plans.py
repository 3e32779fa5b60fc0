"""The runs of a sweep: which ones a suite consists of, their commands, and the state of each.

runs = plan("eca", {"epochs": 30}, seeds=[0, 1, 2], root=None)      # a list of Run
check_data(runs[0].args)
with lock(runs[0].path.parent):
    ...                                                             # launch.execute
"""

import argparse
import contextlib
import importlib
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import models
from common import command_line, files, scopes
from common.errors import UserError
from common.scopes import flag, words
from common.text import printable
from sweeps.suites import DECIDED, SUITES
from training import arguments, run_directory
from training.checks import check_arguments
from training.distributed import Ranks

REPOSITORY = Path(__file__).resolve().parents[1]
# Arguments that say where a run is executed or stored, not what it is.
LOCATION = scopes.with_scope("call", "location")
IDENTITY = scopes.with_scope("identity")


@dataclass(eq=False)
class Run:
    """One training run of a sweep."""

    label: str  # its experiment
    path: Path
    script: str
    given: dict  # arguments of its command line
    args: argparse.Namespace  # all of its arguments, resolved
    state: str = "new"  # or "interrupted" or "finished", before the sweep starts

    @property
    def start_command(self):
        return [*python(self.script), *words(self.given), "--output-dir", str(self.path)]

    @property
    def resume_command(self):
        location = {key: value for key, value in self.given.items() if key in LOCATION}
        return [*python(self.script), "--resume", str(self.path), *words(location)]

    @property
    def command(self):
        return self.resume_command if self.state == "interrupted" else self.start_command

    @property
    def log(self):
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def summary(self):
        return files.read_json(self.path / "summary.json")

    @property
    def finished(self):
        return self.summary.get("status") == "finished"


def python(script):
    """The beginning of a command line that runs a script of this repository."""
    return [sys.executable, str(REPOSITORY / f"{script}.py")]


def make_run(label, path, script, given, parser):
    """A Run with its arguments resolved and its state. Raises UserError."""
    args, _ = arguments.resolve(parser, given=dict(given))
    _check_model(args)
    run = Run(label, path, script, given, args)
    run.state = stored_state(run, arguments.defaults(parser))
    return run


def plan(name, given, seeds, root, only=(), own_recipes=False):
    """The runs of a suite, seed after seed, so that the first ones compare all experiments.

    given: arguments of the command line; root: the sweep's directory or None; only: the experiments
    to run (default: all); own_recipes: without the settings of the suite. Raises UserError.
    """
    suite = SUITES[name]
    parser = importlib.import_module(suite.script).build_parser()

    def parse(text):
        return command_line.explicit(parser, shlex.split(text))

    shared = parse(suite.shared) | ({} if own_recipes else parse(suite.settings))
    own = {label: parse(text) for label, text in suite.experiments.items()}
    if "weights" in given:
        given = dict(given)
        _replace_pretrained(name, given.pop("weights"), shared, own)
    _refuse(name, given, parser, own)
    if own_recipes and not suite.settings:
        raise UserError(f"--own-recipes: the suite {name} uses them already", 2)
    for label in only:
        if label not in own:
            raise UserError(f"--only {label}: {name} has {', '.join(own)}", 2)
    variant = "-own-recipes" if own_recipes else ""
    runs = []
    for seed in seeds:
        for label in [label for label in own if label in only or not only]:
            of_run = shared | own[label] | given | {"seed": seed}
            dataset = of_run.get("dataset", parser.get_default("dataset"))
            directory = root or Path("runs") / f"sweep-{name}{variant}-{dataset}"
            path = directory / f"{label}-s{seed}"
            runs.append(make_run(label, path, suite.script, of_run, parser))
    return runs


def _refuse(name, given, parser, own):
    """Raises UserError for arguments that distinguish the experiments, or that have no meaning."""
    known = {action.dest for action in parser._actions}
    foreign = [flag(key) for key in given if key not in known]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: the suite {name} doesn't use train_sota.py", 2)
    first = next(iter(own.values()))
    compared = {key for values in own.values() for key in values | first}
    compared = {key for key in compared if any(v.get(key) != first.get(key) for v in own.values())}
    decided = sorted(given.keys() & (compared | DECIDED))
    if decided:
        hint = " (use --seeds)" if "seed" in decided else ""
        raise UserError(f"the suite decides {', '.join(map(flag, decided))}{hint}", 2)


def _check_model(args):
    """Raises UserError unless a model with these options exists."""
    options = models.parse_options(args.model_arg, args.model)
    if options:
        with torch.device("meta"):
            models.create_model(args.model, **options)


def _replace_pretrained(name, weights, shared, own):
    """Puts --weights FILE in the place of --pretrained. Raises UserError if two models need it."""
    complete = [shared | values for values in own.values()]
    if len({values["model"] for values in complete if values.get("pretrained")}) != 1:
        raise UserError(f"--weights: the suite {name} must have one model with --pretrained", 2)
    for values in (shared, *own.values()):
        if values.pop("pretrained", False):
            values["weights"] = weights


def afterwards(name, root):
    """The commands of a suite that follow its runs."""
    for text in SUITES[name].afterwards:
        script, *options = [word.format(root=root) for word in shlex.split(text)]
        yield [sys.executable, str(REPOSITORY / script), *options]


def describe(run):
    """What a run is, as options: all that is not a default, without the seed."""
    chosen = {}
    for key, value in vars(run.args).items():
        is_default = key not in IDENTITY or run.args.origin[key] == "default"
        if not (is_default or key == "seed" or value in (None, [])):
            chosen[key] = value
    return shlex.join(words(chosen))


def stored_state(run, defaults):
    """The state of a run. Raises UserError if its directory is in use or holds another run.

    defaults: {argument: value}; a run of an earlier version may lack an argument that is asked for.
    """
    present = [name for name in run_directory.FILES if (run.path / name).exists()]
    if not present:
        run_directory.refuse_if_taken(run.path)
        return "new"
    config = files.read_json(run.path / "config.json")
    if not isinstance(config.get("arguments"), dict):
        raise UserError(
            f"{run.path} holds {', '.join(present)} but no readable config.json: remove it", 2
        )
    found = differences(run.args, config, defaults)
    if found:
        raise UserError(
            f"{run.path} holds another run: {'; '.join(found)} "
            "(remove it, or use another --output-dir)",
            2,
        )
    if not run.finished:
        wait_until_free(run.path)
    if run.finished:
        return "finished"
    # A run that has only previous.pt says how it resumes.
    saves = (run.path / name for name in ("last.pt", "previous.pt"))
    return "interrupted" if any(path.is_file() for path in saves) else "new"


def differences(args, config, defaults):
    """Messages about the arguments of a run's config.json that differ from `args`."""
    saved, origin = config["arguments"], config.get("from")
    origin = origin if isinstance(origin, dict) else {}
    messages = []
    for key, value in arguments.as_dict(args).items():
        if key in saved:
            before = saved[key]
        else:  # an option that is newer than the run
            before = defaults[key] if args.origin.get(key) == "command line" else value
        # Values that the run itself chose when it started.
        automatic = value is None and origin.get(key) == "auto"
        cut_to_fit = origin.get(key) == "--micro-batch"
        is_location = key in LOCATION and not (key == "data_dir" and args.dataset == "folder")
        if before != value and not (automatic or cut_to_fit or is_location):
            wanted = "auto" if value is None else value
            messages.append(f"{flag(key)} is {before} there, not {wanted}")
    return messages


def wait_until_free(path, seconds=10):
    """Waits for a run whose sweep was killed, and that still saves. Raises UserError in the end."""
    end = time.monotonic() + seconds
    while True:
        try:
            return run_directory.RunDir(path).close()
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def prepare(runs):
    """Refuses what can't start, loads the data, removes what runs without a checkpoint have left.

    Raises UserError.
    """
    for label, run in {run.label: run for run in runs if run.state == "new"}.items():
        try:
            check_arguments(run.args, None, Ranks(torch.device("cpu")))
        except UserError as error:
            raise UserError(f"{label}: {error}", 2) from error
    check_data(runs[0].args)
    for run in runs:
        remove_leftovers(run)


def remove_leftovers(run):
    """Removes what a run left that ended before its first checkpoint, and that starts anew."""
    # The state may be older than the lock: whatever it says, nothing beside a save is removed.
    is_saved = any((run.path / name).exists() for name in ("last.pt", "previous.pt"))
    if run.state == "new" and not is_saved:
        for leftover in ("config.json", "summary.json"):
            (run.path / leftover).unlink(missing_ok=True)


def check_data(args):
    """Loads the dataset, so that it is downloaded, or missing, before the first run starts."""
    try:
        split = data.load(args.dataset, args.data_dir, **arguments.data_options(args))
    except UserError as error:
        raise UserError(str(error), status=2) from error
    for note in split.notes:
        print(printable(f"{split.name}: {note}"), file=sys.stderr)  # a note may hold a file name
    return split


def lock(root):
    """Makes the sweep's directory and locks it for one process. Raises UserError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return contextlib.closing(run_directory.RunDir(root))
    except OSError as error:
        raise UserError(f"--output-dir {root} can't be written: {error.strerror}", 2) from error
