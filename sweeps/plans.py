"""The runs of a sweep: which ones a suite means, the command that makes each, and how far each is.

runs = plan("eca", {"epochs": 30}, seeds=[0, 1, 2], root=None)      # a list of Run
check_data(runs[0].args)
with occupy(runs[0].path.parent):
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

import data
import models
from analysis import metrics
from common import command_line
from common.errors import UserError
from common.text import printable
from sweeps.suites import DECIDED, SUITES
from training import experiment, run_directory

HERE = Path(__file__).resolve().parents[1]
# Arguments that say where a run is made or lies, not what it is.
PLACE = {"device", "data_dir", "data_url", "output_dir", "resume", "resume_previous", "config"}


@dataclass(eq=False)
class Run:
    """One training: its experiment and place, its script, arguments given and resolved, and how far it was at the start."""

    label: str
    path: Path
    script: str
    given: dict
    args: argparse.Namespace
    state: str = "new"  # or "cut off", or "finished"

    @property
    def start(self):
        return [*python(self.script), *words(self.given), "--output-dir", str(self.path)]

    @property
    def go_on(self):
        place = {key: self.given[key] for key in PLACE if key in self.given}
        return [*python(self.script), "--resume", str(self.path), *words(place)]

    @property
    def command(self):
        return self.go_on if self.state == "cut off" else self.start

    @property
    def log(self):
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def summary(self):
        return metrics.read_json(self.path / "summary.json")

    @property
    def finished(self):
        return self.summary.get("status") == "finished"


def python(script):
    """The beginning of a command line that runs a script of this repository."""
    return [sys.executable, str(HERE / f"{script}.py")]


def flag(name):
    return f"--{name.replace('_', '-')}"


def words(values):
    """Arguments by name as words of a command line."""
    out = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            out += (
                [flag(name)]
                if item is True
                else [flag(name), "auto" if item is None else str(item)]
            )
    return out


def plan(name, given, seeds, root):
    """The suite's runs, seed after seed, so that the first of them compare all experiments already. Raises UserError."""
    chosen = SUITES[name]
    parser = importlib.import_module(chosen.script).build_parser()
    common = command_line.explicit(parser, shlex.split(chosen.common))
    own = {
        label: command_line.explicit(parser, shlex.split(text))
        for label, text in chosen.experiments.items()
    }
    given = _weights_for_published(name, given, common, own)
    needed = {(common | values)["model"] for values in own.values()}
    missing = sorted(
        model for model in needed - set(models.MODELS) if not model.startswith("timm/")
    )
    if missing or not own:
        lacks = (
            f"needs models that are not there: {', '.join(missing)}"
            if own
            else "has no experiments: no model is for it"
        )
        raise UserError(f"the suite {name} {lacks} (train.py --list-models shows what there is)", 2)
    decided = sorted(set(given) & DECIDED.union(*own.values()))
    if decided:
        raise UserError(
            f"{', '.join(map(flag, decided))}: the suite decides that{' (see --seeds)' * ('seed' in decided)}",
            2,
        )
    runs = []
    for seed in seeds:
        for label, values in own.items():
            asked = common | given | values | {"seed": seed}
            args, _, _ = experiment.resolve_arguments(parser, words(asked))
            models.parse_options(args.model_arg, args.model)
            place = root or Path("runs") / f"sweep-{name}-{args.dataset}"
            runs.append(Run(label, place / f"{label}-s{seed}", chosen.script, asked, args))
            runs[-1].state = standing(runs[-1])
    return runs


def _weights_for_published(name, given, common, own):
    """The arguments without --weights FILE, which takes the place of --pretrained in the experiments. Raises UserError."""
    if "weights" not in given:
        return given
    held = [each for each in (common, *own.values()) if each.get("pretrained")]
    if (
        len(
            {
                (common | values)["model"]
                for values in own.values()
                if (common | values).get("pretrained")
            }
        )
        != 1
    ):
        raise UserError(
            f"--weights: the suite {name} has not one model that starts from published weights", 2
        )
    for each in held:
        del each["pretrained"]
        each["weights"] = given["weights"]
    return {key: value for key, value in given.items() if key != "weights"}


def standing(run):
    """How far a run is. Raises UserError where its directory holds another run, or is being written."""
    held = [name for name in run_directory.FILES if (run.path / name).exists()]
    if not held:
        run_directory.refuse_if_taken(run.path)
        return "new"
    config = metrics.read_json(run.path / "config.json")
    if not isinstance(config.get("arguments"), dict):
        raise UserError(
            f"{run.path} holds {', '.join(held)}, but no config.json that can be read: remove it", 2
        )
    origin = config["from"] if isinstance(config.get("from"), dict) else {}
    wrong = []
    for key, value in vars(run.args).items():
        there = config["arguments"].get(key, value)
        automatic = (value is None and origin.get(key) == "auto") or origin.get(
            key
        ) == "--micro-batch"  # set as it began
        placed = key in PLACE and not (key == "data_dir" and run.args.dataset == "folder")
        if there != value and not automatic and not placed:
            wrong.append(f"{flag(key)} is {there} there, not {'auto' if value is None else value}")
    if wrong:
        raise UserError(
            f"{run.path} holds another run: {'; '.join(wrong)} (another --output-dir leaves it alone)",
            2,
        )
    if not run.finished:
        wait_until_free(run.path)
    return "finished" if run.finished else "cut off" if (run.path / "last.pt").is_file() else "new"


def wait_until_free(path, seconds=10):
    """Gives a run whose sweep was killed the time to save. Raises UserError where a process stays at it."""
    end = time.monotonic() + seconds
    while True:
        try:
            return run_directory.RunDir(path).close()
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def check_data(args):
    """Loads the data once: what is missing is missing for every run, and is said, or downloaded, before the first."""
    try:
        split = data.load(
            args.dataset,
            args.data_dir,
            data_url=args.data_url,
            image_size=args.image_size,
            val_size=args.val_size,
            limit_train=args.limit_train,
            limit_test=args.limit_test,
            skip_bad_images=args.skip_bad_images,
        )
    except UserError as error:
        raise UserError(str(error), status=2) from error
    for note in split.notes:
        print(printable(f"{split.name}: {note}"), file=sys.stderr)  # it may name a file


def occupy(root):
    """Makes the sweep's directory and takes its lock: one sweep at a time. Raises UserError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return contextlib.closing(run_directory.RunDir(root))
    except OSError as error:
        raise UserError(f"--output-dir {root} can't be written: {error.strerror}", 2) from error
