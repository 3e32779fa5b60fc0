"""One run, read from its metrics.csv, summary.json and config.json.

    run = Run("runs/x/metrics.csv")
    epochs, accuracies = run.curve("eval_acc")

Columns are recognized by their names: a file of another program needs an epoch and a loss or an
accuracy.
"""

import csv
import glob
import itertools
import re
import statistics
import sys
import time
from collections import Counter
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePosixPath

from analysis.panels import PANELS
from common.errors import UserError
from common.files import read_json
from common.text import printable

LARGEST = 1e100  # larger values would overflow where they are averaged or drawn
NO_EPOCH_YET = "has no finished epoch yet"
HINT = "name run directories or .csv files, such as runs/*/metrics.csv"

# The evaluation that is shown: averaged weights first, and held-out images before test images.
EVALUATIONS = {
    "ema_val": "held-out (ema)",
    "val": "held-out",
    "ema_test": "test (ema)",
    "test": "test",
    "eval": "evaluation",
}
SPLITS, METRICS = ("train", "val", "test", "eval"), ("loss", "acc", "top5")
# fmt: off
SYNONYMS = {  # what other programs call them
    "training": "train", "tr": "train", "valid": "val", "validation": "val", "dev": "val",
    "evaluation": "eval", "accuracy": "acc", "acc1": "acc", "top1": "acc", "prec1": "acc",
    "acc5": "top5", "prec5": "top5",
}
# fmt: on
# Words in either order; a metric without a split is the training's, as in Keras.
COLUMN_NAMES = {frozenset((metric,)): f"train_{metric}" for metric in METRICS} | {
    frozenset((split, metric)): f"{split}_{metric}" for split in SPLITS for metric in METRICS
}
OTHER_COLUMNS = ("epoch", "step", "epoch_seconds", "images_per_second")


class NoEpochYet(UserError):
    """No run has finished an epoch; one may still do so."""


def read_table(path, keep_torn_line=False):
    """The rows of a CSV file as dicts of strings, without rows of another length. Raises UserError.

    keep_torn_line: keep a last line without a line break, which a killed run of ours leaves.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines(keepends=True)
        if lines and not keep_torn_line and not lines[-1].endswith("\n"):
            lines.pop()
        delimiter = next((mark for mark in ",;\t" if lines and mark in lines[0]), ",")
        rows = list(csv.DictReader(lines, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a table ({error})") from error
    return [row for row in rows if None not in row and None not in row.values()]


def read_arguments(directory):
    """The arguments in a run's config.json; {} if there are none."""
    return _dict_or_empty(read_json(Path(directory) / "config.json").get("arguments"))


def find_metrics(patterns):
    """The metrics.csv files that paths and patterns name, each once, in order.

    A directory without a run stands for the runs in it, its sweeps and its campaigns. Includes
    files that a run hasn't written yet. Raises UserError for a path that doesn't exist, and if
    there are no metrics at all.
    """
    files_by_path = {}
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) or [pattern]
        for path in map(Path, paths):
            files = _files_of_runs(path) if path.is_dir() else [path]
            for file in filter(_is_metrics, files):
                files_by_path.setdefault(file.resolve(), file)
            if not path.exists() and not any(map(_is_metrics, files)):
                raise UserError(f"no metrics at {path}: {HINT}", status=2)
    if not files_by_path:
        raise UserError(f"no metrics at {' '.join(patterns)[:200]}: {HINT}", status=2)
    return list(files_by_path.values())


def _files_of_runs(directory, depth=3):
    """The metrics.csv of a run's directory, or of the runs in it, its sweeps and its campaigns."""
    own = directory / "metrics.csv"
    if _is_metrics(own) or not depth:
        return [own]
    inside = filter(Path.is_dir, sorted(directory.glob("*")))
    return [file for path in inside for file in _files_of_runs(path, depth - 1)]


def _is_metrics(file):
    is_started = file.name == "metrics.csv" and (file.parent / "config.json").is_file()
    is_table_of_sweep = file.name == "results.csv" and file.with_suffix(".json").is_file()
    return is_started or (file.is_file() and file.suffix == ".csv" and not is_table_of_sweep)


class Run:
    """One run: its epochs, arguments, and columns (lists of floats, None where a value is missing).

    A file that can't be read gives a run without epochs, and `problem` says why.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        self.in_directory = path.name == "metrics.csv"
        self.name = printable(path.resolve().parent.name if self.in_directory else path.stem)
        self.summary = read_json(path.parent / "summary.json") if self.in_directory else {}
        config = read_json(path.parent / "config.json") if self.in_directory else {}
        self.arguments = _dict_or_empty(config.get("arguments"))
        # Other programs write a config.json, too; one that can't be read may be ours.
        has_config = self.in_directory and (path.parent / "config.json").is_file()
        unreadable = not config
        self.is_ours = has_config and (unreadable or "arguments" in config)
        if self.arguments.get("dataset") == "folder":
            self.arguments["data_dir"] = _folder(self.arguments.get("data_dir"))
        self.origins = _dict_or_empty(config.get("from"))  # where each argument's value came from
        self.started = _start_time(config)
        self.conditions = {name: config.get(name) for name in ("precision", "device")}
        on_cpu = str(config.get("device")).startswith("cpu")
        self.conditions["threads"] = config.get("threads") if on_cpu else None
        family = config.get("family")  # of its model
        self.family = printable(family) if isinstance(family, str) else ""
        self.problem, self.epochs, self.columns, self.evaluation = "", [], {}, ""
        try:
            self._read(read_table(path, keep_torn_line=not self.is_ours))
        except FileNotFoundError:
            self.problem = NO_EPOCH_YET
        except (OSError, UserError) as error:
            self.problem = str(error).removeprefix(f"{path} ")

    def _read(self, rows):
        headers = list(rows[0]) if rows else []
        # Of two headers with one meaning the first counts. Our runs may have columns of any name.
        header_of = {_canonical(h) or (h if self.is_ours else ""): h for h in reversed(headers)}
        if rows and "epoch" not in header_of:
            raise UserError("has no column named epoch")
        by_epoch = {}  # some programs write training and evaluation of an epoch into separate rows
        for row in rows:
            numbers = {name: _number(row[header]) for name, header in header_of.items()}
            epoch = numbers.pop("epoch")
            if epoch is not None:
                known = {name: value for name, value in numbers.items() if value is not None}
                by_epoch.setdefault(int(epoch) if epoch.is_integer() else epoch, {}).update(known)
        if not by_epoch:
            is_starting = self.is_ours and not rows
            raise UserError(NO_EPOCH_YET if is_starting else "has no finished epoch")
        rows, known = by_epoch.values(), [name for name in header_of if name not in ("", "epoch")]
        columns = {name: [row.get(name) for row in rows] for name in known}
        curves = [name for name in columns if name.endswith(("loss", "acc"))]
        if not curves:
            names = ", ".join(map(printable, headers))[:200]
            raise UserError(f"has no column of a loss or an accuracy: it has {names}")
        if all(value is None for name in curves for value in columns[name]):
            raise UserError("has no number in its columns of losses and accuracies")
        if not self.is_ours:
            _make_percent(columns)
        shown = (name for name in EVALUATIONS if {f"{name}_acc", f"{name}_loss"} & set(columns))
        self.evaluation = next(shown, "")
        for metric in METRICS:
            columns[f"eval_{metric}"] = columns.get(f"{self.evaluation}_{metric}", [])
        self.epochs, self.columns = list(by_epoch), columns

    @property
    def seed(self):
        """The seed; the run's name if it isn't known."""
        seed = self.arguments.get("seed")
        return seed if isinstance(seed, (int, str)) else self.name

    @cached_property
    def status(self):
        """finished, interrupted, failed: why, running, unfinished, broken: why; "" if not ours."""
        status = self.summary.get("status")
        stopped = status in ("failed", "interrupted")
        if self.problem not in ("", NO_EPOCH_YET) and not stopped:
            return f"broken: {self.problem}"
        if stopped or (isinstance(status, str) and self.epochs):
            reason = self.summary.get("reason")
            return printable(f"failed: {reason}" if status == "failed" and reason else status)
        if not self.is_ours:
            return ""
        return "running" if self._was_just_written() else "unfinished"

    def _was_just_written(self):
        """Whether the run has written anything within the time of three epochs, or two minutes."""
        files = [path for path in (self.path, self.path.with_name("last.pt")) if path.is_file()]
        patience = max(120, 3 * max(self.numbers("epoch_seconds"), default=0))
        return any(time.time() - file.stat().st_mtime < patience for file in files)

    @property
    def measured_on(self):
        """What the evaluation's columns were measured on: "test", "held-out (ema)", …"""
        return EVALUATIONS.get(self.evaluation, "")

    def numbers(self, name):
        """The values of a column, without missing ones."""
        return [value for value in self.columns.get(name, []) if value is not None]

    def curve(self, name):
        """(epochs, values) of a column, or of an error rate such as eval_error, in percent."""
        values = self.columns.get(name.replace("_error", "_acc"), [])
        points = [(epoch, value) for epoch, value in zip(self.epochs, values) if value is not None]
        if name.endswith("_error"):
            points = [(epoch, 100 - value) for epoch, value in points]
        return tuple(zip(*points)) if points else ((), ())

    def position(self, x):
        """{epoch: its place on the x axis}; x: epoch, step or seconds (of training, summed up)."""
        if x == "epoch":
            return dict(zip(self.epochs, self.epochs))
        if x == "step":
            values = self.columns.get("step", [])
        else:
            seconds = self.columns.get("epoch_seconds", [])
            values = itertools.accumulate(itertools.takewhile(lambda s: s is not None, seconds))
        return {epoch: value for epoch, value in zip(self.epochs, values) if value is not None}

    @property
    def accuracy(self):
        """Test accuracy in percent: the summary's, else of the last test; None if unknown.

        A run of ours with held-out images has none before its final test. Of another program's
        file without test images, it is the last accuracy of whatever was evaluated.
        """
        if self.scalars["test"] is not None:
            return self.scalars["test"]
        tests = self.curve("ema_test_acc")[1] or self.curve("test_acc")[1]
        if tests:
            return tests[-1]
        return None if self.is_ours else self.scalars["last"]

    @cached_property
    def scalars(self):
        """The run's final values by name, None if unknown. Accuracies are in percent."""
        epochs, accuracy = self.curve("eval_acc")
        best = max(accuracy, default=None)
        speed, seconds = self.numbers("images_per_second"), self.numbers("epoch_seconds")
        summary = {key: value for key, value in self.summary.items() if _is_number(value)}
        test, parameters = summary.get("test_acc"), summary.get("parameters")
        to90, to95 = summary.get("seconds_to_90"), summary.get("seconds_to_95")
        # Of our own runs, the summary knows: an unfinished one has no final accuracy yet.
        if not self.is_ours and accuracy and len(seconds) == len(self.epochs):
            to90, to95 = (self._seconds_to(share * accuracy[-1]) for share in (0.9, 0.95))
        return {
            "epochs": self._epochs_trained(),
            "last": _last(accuracy),
            "best": best,
            "best_epoch": epochs[accuracy.index(best)] if accuracy else None,
            "test": test,
            "error_rate": None if test is None else 100 - test,
            "top5": summary.get("test_top5"),
            "tta": summary.get("test_tta_acc"),
            "train": _last(self.curve("train_acc")[1]),
            "train_clean": summary.get("train_clean_acc"),
            "parameters": parameters,
            "per_million": 1e6 * test / parameters if test is not None and parameters else None,
            "gmacs": summary.get("gmacs"),
            "seconds": sum(seconds) if seconds else summary.get("train_seconds"),
            "epoch_seconds": statistics.median(seconds) if seconds else None,
            "speed": statistics.median(speed) if speed else None,
            "memory": summary.get("peak_memory_mb"),
            "to90": to90,
            "to95": to95,
        }

    def _epochs_trained(self):
        if not self.epochs:
            return None
        counts_from_zero = self.epochs[0] == 0  # as Keras does
        return self.epochs[-1] + 1 if counts_from_zero else self.epochs[-1]

    def _seconds_to(self, accuracy):
        """Seconds of training until the evaluation first reached an accuracy."""
        position = self.position("seconds")
        reached = (e for e, value in zip(*self.curve("eval_acc")) if value >= accuracy)
        return position.get(next(reached, None))


def load_runs(patterns):
    """The runs at paths and patterns, with names that differ; unreadable ones are named on stderr.

    Raises NoEpochYet or UserError if none has a curve, and UserError if no two share one.
    """
    runs = [Run(path) for path in find_metrics(patterns)]
    readable = [run for run in runs if run.epochs]
    if not readable:
        others = f" (and none of {len(runs)} files has more)" if len(runs) > 1 else ""
        kind = NoEpochYet if any(run.problem == NO_EPOCH_YET for run in runs) else UserError
        raise kind(f"{runs[0].path} {runs[0].problem}{others}")
    for run in runs:
        if run.problem:
            print(printable(f"{run.path} {run.problem}"), file=sys.stderr)
    _check_common_curve(readable)
    _make_names_differ(runs)
    return runs


def _make_names_differ(runs):
    """Puts as many directories before equal names as needed."""
    for count in range(2, 2 + max(len(run.path.resolve().parts) for run in runs)):
        names = Counter(run.name for run in runs)
        for run in runs:
            if names[run.name] > 1:
                path = run.path.resolve()
                parts = (path.parent if run.in_directory else path).parts
                run.name = printable("/".join(parts[-count:]))


def _check_common_curve(runs):
    curves = [[name for name in PANELS["curves"] if run.curve(name)[0]] for run in runs]
    counts = Counter(itertools.chain(*curves))
    if len(runs) > 1 and max(counts.values(), default=0) < 2:
        names = [", ".join(sorted(curve)) or "no numbers" for curve in curves]
        texts = [f"{run.name} has {text}" for run, text in zip(runs[:3], names)]
        raise UserError(f"these files have no curve in common: {'; '.join(texts)}")


def _canonical(name):
    """Our name of a column: train_acc for Keras' accuracy; "" for a column that isn't used."""
    name = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
    if name in OTHER_COLUMNS or name.startswith("ema_"):
        return name
    name = re.sub("(acc|top)_([15])", r"\1\2", name.removesuffix("_epoch"))
    words = frozenset(SYNONYMS.get(word, word) for word in name.split("_"))
    return COLUMN_NAMES.get(words, "")


def _make_percent(columns):
    """Turns the accuracies of a program that writes shares into percent."""
    names = [name for name in columns if name.endswith(("acc", "top5"))]
    values = [value for name in names for value in columns[name] if value is not None]
    if values and max(values) <= 1:
        for name in names:
            columns[name] = [None if value is None else 100 * value for value in columns[name]]


def _folder(data_dir):
    """A folder of images, without data/ in front, as in runs that were published."""
    parts = PurePosixPath(str(data_dir).replace("\\", "/")).parts
    return "/".join(parts[1:] if len(parts) > 1 and parts[0] == "data" else parts)


def _start_time(config):
    """When the first process of a run started, in seconds; 0 where config.json doesn't say it."""
    resumed = config.get("resumed")
    first = resumed[0] if isinstance(resumed, list) and resumed else {}
    config = _dict_or_empty(_dict_or_empty(first).get("before")) or config
    try:
        return datetime.fromisoformat(config["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _dict_or_empty(value):
    return value if isinstance(value, dict) else {}


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _number(text):
    """The number in a cell; None if there is none or it is not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < LARGEST else None


def _last(values):
    return values[-1] if values else None
