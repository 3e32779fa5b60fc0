"""A run's directory: config.json, metrics.csv, best.pt, last.pt, summary.json and TensorBoard events.

    run = RunDir.create("runs/cifar10-resnet18-s0-20260101-120000", config)
    run.save_last(state); run.end_epoch(row, state); run.write_summary("finished", test_acc=95.0); run.close()

One process writes to a directory at a time. A row of metrics.csv is on the disk before the checkpoint of its epoch, and a
resumed run drops the rows that the checkpoint doesn't know: each epoch has one row, whenever the run was killed. The
last.pt before the last one is kept as previous.pt. Training waits for a copy of its state only: a thread writes it.
"""

import contextlib
import csv
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from analysis.metrics import read_json, read_metrics
from common import checkpoint, files
from common.errors import UserError

FILES = ("config.json", "metrics.csv", "best.pt", "last.pt", "previous.pt", "summary.json")


def new_path(root, dataset, model, tag, seed):
    """root/<dataset>-<model>[-<tag>]-s<seed>-<time>, not yet there."""
    parts = (dataset, model, tag, f"s{seed}", time.strftime("%Y%m%d-%H%M%S"))
    name = "-".join(re.sub(r"[^\w.-]", "_", part) for part in parts if part)
    path, number = Path(root) / name, 2
    while path.exists():
        path, number = Path(root) / f"{name}-{number}", number + 1
    return path


def refuse_if_taken(path):
    """Raises UserError when `path` holds a run already, or is no place for one."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-dir {path} is a file", status=2)
    taken = [name for name in FILES if (path / name).exists()]
    if taken:
        found = ", ".join(taken)
        raise UserError(
            f"{path} holds a run already ({found}): take another --output-dir, or --resume {path}",
            status=2,
        )


class RunDir:
    """Use `create` or `open`; both take the directory's lock, which the system frees when the process ends, however it ends."""

    def __init__(self, path):
        self.path = Path(path)
        self._columns = None
        self._writer = None
        self._thread = ThreadPoolExecutor(1, "save")
        self._snapshot = checkpoint.Snapshot()
        self._saving = None
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.path} is being written by another process") from error
        for leftover in self.path.glob(".*.tmp"):
            files.remove(leftover)

    @classmethod
    def create(cls, path, config):
        """A new run's directory. config: JSON values, written to config.json."""
        refuse_if_taken(path)
        try:
            files.make_directory(path)
            run = cls(path)
        except OSError as error:
            raise UserError(f"{path} can't be made: {error.strerror}") from error
        try:
            refuse_if_taken(path)  # once more, now that nobody else can begin a run here
        except UserError:
            run.close()
            raise
        files.write_json(run.path / "config.json", config)
        return run

    @classmethod
    def open(cls, path):
        """The directory of a run that goes on."""
        if not any((Path(path) / name).is_file() for name in ("last.pt", "previous.pt")):
            raise no_run(path)
        return cls(path)

    def restore_previous(self):
        """Puts a copy of previous.pt in the place of a damaged last.pt, which the next save would keep as previous.pt."""
        with files.replacing(self.path / "last.pt") as file:
            file.write((self.path / "previous.pt").read_bytes())

    def note_resumed(self, config, epoch):
        """Writes config.json anew, with the versions, device and arguments that the run had before in a list."""
        path = self.path / "config.json"
        before = read_json(path)
        history = before.pop("resumed", [])
        before.pop("from", None)
        history = history if isinstance(history, list) else []
        files.write_json(
            path, {**config, "resumed": [*history, {"at_epoch": epoch, "before": before}]}
        )

    # metrics.csv

    @property
    def metrics_path(self):
        return self.path / "metrics.csv"

    def keep_rows(self, epochs):
        """Drops the rows after epoch number `epochs` and a torn last line, and returns the others, as texts by column.

        Raises UserError when one of them is missing.
        """
        if not self.metrics_path.exists():
            if epochs:
                raise UserError(
                    f"{self.metrics_path} is missing, and the run has {epochs} epochs already"
                )
            return []
        rows = [row for row in self.rows() if int(row["epoch"]) <= epochs]
        if [int(row["epoch"]) for row in rows] != list(range(1, epochs + 1)):
            raise UserError(
                f"{self.metrics_path} doesn't hold the {epochs} epochs of the run, each once"
            )
        self._columns = list(rows[0]) if rows else None
        self._write_rows(rows)
        return rows

    def _write_rows(self, rows):
        with files.replacing(self.metrics_path, "w") as file:
            if self._columns:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    def log(self, row):
        """Appends a row and writes it to the event file. Raises UserError where the disk doesn't take it.

        Its keys are the columns, the same in each row. A metrics.csv that another version of this program began keeps its
        columns, and those that it lacks are added.
        """
        try:
            new = [key for key in row if key not in (self._columns or ())]
            if new:
                rows = self.rows()
                self._columns = [*(self._columns or ()), *new]
                self._write_rows(rows)
            text = io.StringIO()
            writer = csv.DictWriter(text, self._columns, lineterminator="\n")
            writer.writerow(
                {
                    key: f"{value:.6g}" if isinstance(value, float) else value
                    for key, value in row.items()
                }
            )
            files.append(self.metrics_path, text.getvalue())
            for key, value in row.items():
                if isinstance(value, (int, float)) and key not in ("epoch", "step"):
                    self.events.add_scalar(key, value, row["step"])
            self.events.flush()
        except OSError as error:
            raise UserError(
                f"{self.metrics_path} or events could not be written ({error.strerror or error})"
            ) from error

    def rows(self):
        return read_metrics(self.metrics_path) if self.metrics_path.exists() else []

    @property
    def events(self):
        """The TensorBoard writer, made when it is first needed."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.path)
        return self._writer

    # checkpoints

    def save_last(self, state):
        """Writes last.pt, after what is being written already. Raises UserError where that or this fails."""
        self.wait()
        self._write_last(state)

    def save_best(self, state):
        self.wait()
        checkpoint.save(state, self.path / "best.pt")

    def end_epoch(self, row, state, best=None):
        """Copies the state and returns; then writes the row, last.pt and, where `best` is given, best.pt, in this order.

        best: contents of last.pt -> contents of best.pt. At most one save is under way: an earlier one is waited for, and
        raises its UserError here.
        """
        self.wait()
        self._saving = self._thread.submit(self._write_epoch, row, self._snapshot.take(state), best)

    def wait(self):
        """Returns when the last `end_epoch` has been written. Raises the UserError of one that could not be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write_epoch(self, row, state, best):
        self.log(row)
        self._write_last(state)
        if best is not None:  # after last.pt, which contains all of it: see resume.open_directory
            checkpoint.save(best(state), self.path / "best.pt")

    def _write_last(self, state):
        checkpoint.save(state, self.path / "last.pt", previous=self.path / "previous.pt")

    # the end

    def write_summary(self, status, **figures):
        files.write_json(self.path / "summary.json", {"status": status, **figures})

    def close(self):
        """Ends what is being written, and gives the lock back."""
        self._thread.shutdown()
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk was told of where it mattered
                self._writer.close()
        self._lock.release()


def no_run(path):
    """The UserError for a directory without a checkpoint."""
    config = Path(path) / "config.json"
    begun = (
        f": it ended before its first save, and --config {config} starts it anew"
        if config.is_file()
        else ""
    )
    return UserError(f"{path} holds no run to go on with (no last.pt){begun}", status=2)


def load_last(path, or_previous=False):
    """(contents of a run's last.pt, False), or, where that is damaged and the user says so, (those of previous.pt, True).

    Raises UserError, which names the way out where there is one.
    """
    last, previous = Path(path) / "last.pt", Path(path) / "previous.pt"
    try:
        if not last.is_file():
            raise no_run(path)
        return checkpoint.load(last), False
    except UserError as error:
        if not previous.is_file():
            raise
        if not or_previous:
            raise UserError(
                f"{error}; --resume-previous goes on from the save before it", error.status
            ) from error
    return checkpoint.load(previous), True


def resolve_run(path):
    """A run's directory from the directory itself or a file in it. Raises UserError."""
    path = Path(path)
    path = path.parent if path.is_file() else path
    if not path.is_dir():
        raise UserError(f"--resume {path}: there is no such run", status=2)
    return path


def load_config(path):
    """(arguments, where each came from) of a run's config.json, or of a flat JSON object. Raises UserError."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}", status=2) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is no JSON ({error})", status=2) from error
    arguments = config.get("arguments", config) if isinstance(config, dict) else None
    origin = config.get("from", {}) if isinstance(config, dict) else {}
    if not isinstance(arguments, dict) or not isinstance(origin, dict):
        raise UserError(f"--config {path} holds no arguments", status=2)
    return {
        key: None if origin.get(key) == "auto" else value for key, value in arguments.items()
    }, origin  # auto stays auto


class NullRunDir:
    """The run directory of a process that doesn't write one: every call does nothing."""

    path = None

    def save_last(self, state): ...

    def end_epoch(self, row, state, best=None): ...

    def wait(self): ...

    def write_summary(self, status, **figures): ...

    def close(self): ...
