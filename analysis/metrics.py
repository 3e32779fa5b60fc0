"""What runs wrote, read back: metrics.csv, summary.json and config.json, without torch.

    run = Run(find_metrics(["runs/*/metrics.csv"])[0])
    epochs, accuracy = run.curve("eval_acc")

Columns are told by their names, so that other programs' files with an epoch and one loss or accuracy can be read, too.
"""

import csv
import glob
import json
import re
import statistics
import sys
import time
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from common.text import printable

LARGEST = 1e100  # float32 ends at 3e38, and what is drawn or averaged must not overflow
PANELS = ("train_loss", "eval_loss", "train_acc", "eval_acc")
# The reported curve: of the averaged weights, where there are any; held-out images before test images.
CURVES = ("ema_val", "val", "ema_test", "test", "eval")
# What other programs call a part of the data and a figure; a name without a part is of the training (as Keras has it).
PARTS = {
    "train": "train training tr",
    "val": "val valid validation dev",
    "test": "test",
    "eval": "eval evaluation",
}
KINDS = {
    "loss": "loss",
    "acc": "acc accuracy top1 acc1 acc_1 top_1 prec1",
    "top5": "top5 acc5 acc_5 top_5 prec5",
}
PARTS, KINDS = (
    {word: name for name, words in table.items() for word in words.split()}
    for table in (PARTS, KINDS)
)


def read_table(path, torn=False):
    """(column names, rows as lists of texts) of a CSV file, without rows of another length.

    torn: keep a last line without a line break, which a run of ours leaves where it was killed while it wrote.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and not torn and not lines[-1].endswith("\n"):
        lines.pop()
    if not lines:
        return [], []
    delimiter = next((mark for mark in ",;\t" if mark in lines[0]), ",")
    try:
        header, *rows = csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise UserError(f"{path} can't be read as a table ({error})") from error
    return header, [row for row in rows if len(row) == len(header)]


def read_metrics(path):
    """The rows of a run's metrics.csv as dicts of strings, without a torn last line. Raises UserError for what is no table."""
    try:
        header, rows = read_table(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} can't be read as a table ({error})") from error
    rows = [dict(zip(header, row)) for row in rows]
    return [row for row in rows if is_epoch(row.get("epoch"))]


def is_epoch(text):
    return bool(text) and text.isdecimal() and len(text) < 10


def read_json(path):
    """The object in a JSON file; {} where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # ten thousand brackets
        return {}
    return found if isinstance(found, dict) else {}


def read_arguments(directory):
    """The arguments in a run's config.json; {} where there are none."""
    found = read_json(Path(directory) / "config.json").get("arguments")
    return found if isinstance(found, dict) else {}


def find_metrics(patterns):
    """The metrics.csv of each path or pattern, once, in order; a run that has none yet is named all the same.

    Raises UserError where a path doesn't exist and where nothing is found.
    """
    found = {}
    for pattern in patterns:
        magic = glob.has_magic(pattern) and not Path(pattern).exists()
        for path in map(Path, sorted(glob.glob(pattern)) if magic else [pattern]):
            file = path / "metrics.csv" if path.is_dir() else path
            begun = file.name == "metrics.csv" and (file.parent / "config.json").is_file()
            if (
                not magic
                and not path.exists()
                and not begun
                and not (path.name == "metrics.csv" and path.parent.is_dir())
            ):
                raise UserError(
                    f"there are no metrics at {path} (runs/*/metrics.csv names all runs)", status=2
                )
            if begun or (file.is_file() and file.suffix == ".csv"):
                found.setdefault(file.resolve(), file)
    if not found and any(Path(pattern).is_file() for pattern in patterns):
        raise UserError(
            f"{' '.join(patterns)[:200]}: metrics are .csv files (runs/*/metrics.csv names all runs)",
            status=2,
        )
    if not found:
        raise UserError(
            f"there are no metrics at {' '.join(patterns)[:200]} (runs/*/metrics.csv names all runs)",
            status=2,
        )
    return list(found.values())


class Run:
    """One run: its curves (lists of floats by column, None where nothing was measured), summary and arguments.

    What can't be read leaves a run without epochs, and `problem` says why: other runs are compared all the same.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        name = path.resolve().parent.name if path.name == "metrics.csv" else path.stem
        self.name = printable(name)
        self.own = (path.parent / "config.json").is_file()  # a directory of this program's
        self.summary, self.config = (
            read_json(path.parent / name) if path.name == "metrics.csv" else {}
            for name in ("summary.json", "config.json")
        )
        self.problem, self.epochs, self.columns = "", [], {}
        try:
            self._read(*read_table(path, torn=not self.own))
        except FileNotFoundError:
            self.problem = "no finished epoch yet"
        except (OSError, UnicodeDecodeError) as error:
            self.problem = f"can't be read: {error}"
        except UserError as error:
            self.problem = str(error).removeprefix(f"{path} ")
        self.measured = next(
            (p for p in CURVES if {f"{p}_acc", f"{p}_loss"} & set(self.columns)), ""
        )
        for kind in ("loss", "acc", "top5"):
            self.columns[f"eval_{kind}"] = self.columns.get(f"{self.measured}_{kind}", [])

    def _read(self, header, rows):
        names = [_canonical(name) for name in header]
        if "epoch" not in names:
            raise UserError("has no column named epoch" if rows else "has no finished epoch")
        at = names.index("epoch")
        epochs = [_float(row[at]) for row in rows]
        keep = [i for i, epoch in enumerate(epochs) if epoch is not None]
        if not keep:
            raise UserError("has no finished epoch")
        merged = {}  # some programs write training and evaluation of an epoch into rows of their own
        for i in keep:
            merged.setdefault(epochs[i], []).append(rows[i])
        self.epochs = [int(epoch) if epoch.is_integer() else epoch for epoch in merged]
        for column, name in enumerate(names):
            if name and column != at and name not in self.columns:
                self.columns[name] = [
                    _last(row[column] for row in group) for group in merged.values()
                ]
        if not any(re.search("(loss|acc)$", name) for name in self.columns):
            had = ", ".join(map(printable, header))[:200]
            self.epochs, self.columns = [], {}
            raise UserError(f"has no column of a loss or an accuracy: it has {had}")
        shares = [name for name in self.columns if name.endswith(("acc", "top5"))]
        largest = max(
            (value for name in shares for value in self.columns[name] if value is not None),
            default=2,
        )
        if not self.own and largest <= 1:  # another program's, which writes shares, not percent
            for name in shares:
                self.columns[name] = [
                    value if value is None else 100 * value for value in self.columns[name]
                ]

    @property
    def arguments(self):
        found = self.config.get("arguments")
        return found if isinstance(found, dict) else {}

    @property
    def seed(self):
        found = self.arguments.get("seed")
        return found if isinstance(found, (int, str)) else self.name

    @cached_property
    def status(self):
        """finished, interrupted, failed (why), running, unfinished, broken (why), or nothing for another program's file."""
        said = self.summary.get("status")
        if (
            self.problem
            and said not in ("failed", "interrupted")
            and self.problem != "no finished epoch yet"
        ):
            return f"broken: {self.problem}"
        if isinstance(said, str) and self.epochs or said in ("failed", "interrupted"):
            reason = str(self.summary.get("reason") or "")
            return printable(f"{said}: {reason}" if said == "failed" and reason else said)
        if not self.own:
            return ""
        return "running" if self._is_fresh() else self.problem or "unfinished"

    def _is_fresh(self):
        """Whether it was written to within three of its epochs, or two minutes."""
        times = [
            path.stat().st_mtime
            for path in (self.path, self.path.with_name("last.pt"))
            if path.is_file()
        ]
        patience = max(120, 3 * max(self.numbers("epoch_seconds"), default=0))
        return bool(times) and time.time() - max(times) < patience

    @property
    def measured_on(self):
        """ "test", "held-out" or "evaluation", with "(ema)" where it was the averaged weights."""
        part = {"val": "held-out", "test": "test", "eval": "evaluation", "": ""}[
            self.measured.removeprefix("ema_")
        ]
        return part + " (ema)" * self.measured.startswith("ema_")

    def numbers(self, name):
        return [value for value in self.columns.get(name, []) if value is not None]

    def curve(self, name):
        """(epochs, values) where the column has a number; name may be an error rate (eval_error) in percent."""
        values = self.columns.get(name.replace("_error", "_acc"), [])
        points = [
            (e, 100 - v if name.endswith("_error") else v)
            for e, v in zip(self.epochs, values)
            if v is not None
        ]
        return tuple(zip(*points)) if points else ((), ())

    def position(self, x):
        """{epoch: where it lies on an axis}: x is epoch, step or seconds (of training, summed). Empty where it isn't known."""
        if x == "epoch":
            return dict(zip(self.epochs, self.epochs))
        if x == "step":
            return {
                e: s for e, s in zip(self.epochs, self.columns.get("step", [])) if s is not None
            }
        elapsed, out = 0.0, {}
        for epoch, seconds in zip(self.epochs, self.columns.get("epoch_seconds", [])):
            if seconds is None:
                break
            elapsed += seconds
            out[epoch] = elapsed
        return out

    def figure(self, name):
        """A number of the run: last, best, test, top5 (%), epochs, parameters, gmacs, seconds, speed, to90, to95, or None."""
        return self.figures.get(name)

    @property
    def accuracy(self):
        """Test accuracy in percent, or where there is no summary the last evaluation's; None of a run of ours whose curve is of
        held-out images and that has not been tested yet."""
        instead = self.figure("last") if not self.own or self.measured.endswith("test") else None
        return instead if self.figure("test") is None else self.figure("test")

    @cached_property
    def figures(self):
        at, accuracy = self.curve("eval_acc")
        best = max(range(len(accuracy)), key=accuracy.__getitem__) if accuracy else None
        speed, seconds = self.numbers("images_per_second"), self.numbers("epoch_seconds")
        said = {key: value for key, value in self.summary.items() if _is_number(value)}
        reached = {f"to{part}": said.get(f"seconds_to_{part}") for part in (90, 95)}
        if not self.summary and accuracy and len(seconds) == len(self.epochs):
            reached = {
                f"to{part}": self._seconds_to(part / 100 * accuracy[-1]) for part in (90, 95)
            }
        return {
            "epochs": self.epochs[-1] if self.epochs else None,
            "last": accuracy[-1] if accuracy else None,
            "best": accuracy[best] if accuracy else None,
            "best_epoch": at[best] if accuracy else None,
            "test": said.get("test_acc"),
            "top5": said.get("test_top5"),
            "parameters": said.get("parameters"),
            "gmacs": said.get("gmacs"),
            "seconds": sum(seconds) if seconds else said.get("train_seconds"),
            "speed": statistics.median(speed) if speed else None,
            "memory": said.get("peak_memory_mb"),
        } | reached

    def _seconds_to(self, accuracy):
        position = self.position("seconds")
        return next(
            (
                position.get(epoch)
                for epoch, value in zip(*self.curve("eval_acc"))
                if value >= accuracy
            ),
            None,
        )


def load_runs(patterns):
    """The runs at paths and patterns, with names that differ. Raises UserError where none has a curve, or none shares one."""
    runs = [Run(path) for path in find_metrics(patterns)]
    good = [run for run in runs if run.epochs]
    if not good:
        raise UserError(
            f"{runs[0].path} {runs[0].problem}"
            + f" (and none of {len(runs)} files has more)" * (len(runs) > 1)
        )
    for run in runs:
        if run.problem:
            print(f"{run.path} {run.problem}", file=sys.stderr)
    drawn = {run: {name for name in PANELS if run.curve(name)[0]} for run in good}
    if len(good) > 1 and not any(drawn[a] & drawn[b] for i, a in enumerate(good) for b in good[:i]):
        has = "; ".join(
            f"{run.name} has {', '.join(sorted(names)) or 'no numbers'}"
            for run, names in list(drawn.items())[:3]
        )
        raise UserError(f"these files have no curve in common: {has}")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = printable(
                "/".join(
                    run.path.resolve().parts[-3:-1]
                    if run.path.name == "metrics.csv"
                    else run.path.resolve().parts[-2:]
                )
            )
    return runs


def _canonical(name):
    """Our name of a column: train_acc for Keras' accuracy, val_acc for valid/top1; "" for one that isn't read."""
    bare = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
    if bare in ("epoch", "step", "epoch_seconds", "images_per_second") or bare.startswith("ema_"):
        return bare
    bare = bare.removesuffix("_epoch")
    for word, kind in KINDS.items():
        if bare == word:
            return f"train_{kind}"
        for mark, part in PARTS.items():
            if bare in (f"{mark}_{word}", f"{word}_{mark}"):
                return f"{part}_{kind}"
    return ""


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _float(text):
    """The number in a cell, or None where there is none that can be drawn."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < LARGEST else None


def _last(texts):
    """The last number of several cells, or None."""
    values = [value for value in map(_float, texts) if value is not None]
    return values[-1] if values else None
