"""The directory of a run: configuration, metrics, checkpoints, summary, log, TensorBoard events.

    directory = RunDir.create("runs/cifar10-resnet18-s0-20260101-120000", config)
    directory.save_last(contents); directory.end_epoch(row, contents)
    directory.write_summary("finished", …); directory.close()

One process writes to a directory at a time. A row of metrics.csv is on the disk before the
checkpoint of its epoch, and a run that resumes drops the rows that the checkpoint doesn't know:
each epoch has one row, whenever the run was killed. The save before the last is kept as
previous.pt. Training waits only for a copy of its state: a thread writes it.
"""

import contextlib
import csv
import io
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout
from torch.utils.tensorboard import SummaryWriter

from common import checkpoint, files
from common.errors import UserError
from common.files import read_json
from common.text import printable

FILES = ("config.json", "metrics.csv", "best.pt", "last.pt", "previous.pt", "summary.json")


def new_path(root, dataset, model, tag, seed):
    """root/<dataset>-<model>[-<tag>]-s<seed>-<time>, which doesn't exist yet."""
    parts = (dataset, model, tag, f"s{seed}", time.strftime("%Y%m%d-%H%M%S"))
    name = "-".join(re.sub(r"[^\w.-]", "_", part) for part in parts if part)
    path, number = Path(root) / name, 2
    while path.exists():
        path, number = Path(root) / f"{name}-{number}", number + 1
    return path


def is_locked(path):
    """Whether a process is writing to the directory, or this one can't."""
    try:
        # The ranks of a run ask at the same time, and each holds the lock for a moment.
        with FileLock(Path(path) / ".lock", timeout=1):
            return False
    except (Timeout, OSError):
        return True


def kept_file(epoch, save_every):
    """The file that --save-every keeps after this epoch, or None."""
    return f"epoch-{epoch}.pt" if save_every and epoch and epoch % save_every == 0 else None


def refuse_if_taken(path):
    """Raises UserError when `path` holds a run already or is a file."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-dir {path} is a file", 2)
    taken = [name for name in FILES if (path / name).exists()]
    taken = ", ".join(taken + sorted(file.name for file in path.glob("epoch-*.pt")))
    if taken:
        raise UserError(
            f"{path} holds a run already ({taken}): use another --output-dir, or --resume {path}", 2
        )


class RunDir:
    """Use `create` or `open`: both take the lock of the directory until `close`."""

    def __init__(self, path):
        self.path = Path(path)
        self._columns = None
        self._events = None
        self._thread = ThreadPoolExecutor(1, "save")
        self._snapshot = checkpoint.Snapshot()
        self._pending = None
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            hint = ""
            if isinstance(self._lock, SoftFileLock):  # its file stays when a process is killed
                hint = f" (if there is none on any machine, remove {self.path / '.lock'})"
            raise UserError(f"{self.path} is being written by another process{hint}") from error
        for leftover in self.path.glob(".*.tmp"):
            files.remove(leftover)

    @classmethod
    def create(cls, path, config):
        """The directory of a new run. config: JSON values for config.json. Raises UserError."""
        refuse_if_taken(path)
        try:
            files.make_directory(path)
            run = cls(path)
        except OSError as error:
            raise UserError(f"{path} can't be created: {error.strerror}") from error
        try:
            refuse_if_taken(path)  # again, now that no other process can start a run here
        except UserError:
            run.close()
            raise
        files.write_json(run.path / "config.json", config)
        return run

    @classmethod
    def open(cls, path):
        """The directory of a run that resumes. Raises UserError."""
        if not any((Path(path) / name).is_file() for name in ("last.pt", "previous.pt")):
            raise no_run(path)
        return cls(path)

    def restore_previous(self):
        """Replaces a damaged last.pt by previous.pt: the next save makes previous.pt of it."""
        with files.replacing(self.path / "last.pt") as file:
            file.write((self.path / "previous.pt").read_bytes())

    @property
    def config(self):
        return read_json(self.path / "config.json")

    def note_resumed(self, config, epoch):
        """Replaces config.json and keeps what was in it before in the list "resumed"."""
        path, before = self.path / "config.json", self.config
        resumed = before.pop("resumed", [])
        before.pop("from", None)
        resumed = resumed if isinstance(resumed, list) else []
        files.write_json(
            path, {**config, "resumed": [*resumed, {"at_epoch": epoch, "before": before}]}
        )

    # ---- metrics.csv ----

    @property
    def metrics_path(self):
        return self.path / "metrics.csv"

    def rows(self):
        """The complete rows of metrics.csv, as strings by column. Raises UserError."""
        if not self.metrics_path.exists():
            return []
        try:
            text = self.metrics_path.read_text(encoding="utf-8")
            lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
            if not lines:  # the first epoch is not finished, see keep_rows
                return []
            header, rows = lines[0], [line for line in lines[1:] if line]
            if "epoch" not in header or any(len(row) != len(header) for row in rows):
                raise ValueError("a row doesn't fit the header")
            rows = [dict(zip(header, row)) for row in rows]
            for row in rows:
                int(row["epoch"])
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{self.metrics_path} is not a metrics.csv of a run ({error})"
            ) from error
        return rows

    def keep_rows(self, epochs):
        """Drops the rows after epoch number `epochs` and a torn last line; returns the others.

        Raises UserError when one of them is missing.
        """
        if not self.metrics_path.exists():
            if epochs:
                raise UserError(f"{self.metrics_path} is missing, but the run has {epochs} epochs")
            return []
        rows = [row for row in self.rows() if int(row["epoch"]) <= epochs]
        if [int(row["epoch"]) for row in rows] != list(range(1, epochs + 1)):
            raise UserError(
                f"{self.metrics_path} doesn't hold each of the run's {epochs} epochs once"
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

    def append_row(self, row):
        """Appends a row to metrics.csv and to the TensorBoard events. Raises UserError on failure.

        The keys of the row are the columns. A metrics.csv that another version of this program
        began keeps its columns, and those that it lacks are added.
        """
        try:
            new = [key for key in row if key not in (self._columns or ())]
            if new:
                rows = self.rows()
                self._columns = [*(self._columns or ()), *new]
                self._write_rows(rows)
            line = io.StringIO()
            writer = csv.DictWriter(line, self._columns, lineterminator="\n")
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            files.append(self.metrics_path, line.getvalue())
            for key, value in row.items():
                if isinstance(value, (int, float)) and key not in ("epoch", "step"):
                    self.events.add_scalar(key, value, row["step"])
            self.events.flush()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.metrics_path} or events can't be written ({reason})") from error

    @property
    def events(self):
        """The TensorBoard writer, created when it is first needed."""
        if self._events is None:
            self._events = SummaryWriter(self.path)
        return self._events

    # ---- checkpoints ----

    def save_last(self, contents):
        """Writes last.pt after what is still being written. Raises UserError where either fails."""
        self.wait()
        self._write_last(contents)

    def save_best(self, contents):
        self.wait()
        checkpoint.save(contents, self.path / "best.pt")

    def end_epoch(self, row, contents, to_best=None, kept=None):
        """Copies the contents of last.pt and returns; then writes the row, last.pt and best.pt.

        to_best: a function from these contents to those of best.pt, or None; kept: (name of a file,
        a function of the same kind), see `keep`. At most one save is pending: an earlier one is
        waited for, and raises its UserError here.
        """
        self.wait()
        self._pending = self._thread.submit(
            self._write_epoch, row, self._snapshot.take(contents), to_best, kept
        )

    def keep(self, name, contents):
        """Writes a checkpoint that stays as it is, unless the directory has it already."""
        if not (self.path / name).exists():
            checkpoint.save(contents, self.path / name)

    def wait(self):
        """Returns when the last `end_epoch` is written. Raises its UserError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write_epoch(self, row, contents, to_best, kept):
        self.append_row(row)
        self._write_last(contents)
        if to_best is not None:
            # After last.pt, which contains all of it: see resume.open_directory.
            checkpoint.save(to_best(contents), self.path / "best.pt")
        if kept is not None:
            name, to_kept = kept
            self.keep(name, to_kept(contents))

    def _write_last(self, contents):
        checkpoint.save(contents, self.path / "last.pt", previous=self.path / "previous.pt")

    # ---- the end ----

    def append_log(self, line):
        """Appends a line to log.txt. A run does not wait for it, and does not fail without it."""
        path = self.path / "log.txt"
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(printable(line) + "\n")

    def write_summary(self, status, **figures):
        files.write_json(self.path / "summary.json", {"status": status, **figures})

    def close(self):
        """Finishes what is being written and releases the lock."""
        self._thread.shutdown()
        if self._events is not None:
            with contextlib.suppress(OSError):  # a full disk was reported where it mattered
                self._events.close()
        self._lock.release()


class NullRunDir:
    """The run directory of a rank that doesn't write one: every call does nothing."""

    path = None

    def save_last(self, contents): ...

    def end_epoch(self, row, contents, to_best=None, kept=None): ...

    def wait(self): ...

    def append_log(self, line): ...

    def write_summary(self, status, **figures): ...

    def close(self): ...


def no_run(path):
    """The UserError for a directory without a checkpoint."""
    config = Path(path) / "config.json"
    hint = ""
    if config.is_file() and not (Path(path) / "previous.pt").is_file():
        hint = f": it ended before its first save; --config {config} starts it again"
    return UserError(f"{path} holds no run to resume (no last.pt){hint}", 2)


def load_last(path, or_previous=False):
    """Returns (contents of last.pt, False); or of previous.pt and True, where last.pt is damaged
    and `or_previous` is set. Raises UserError, which names the way out where there is one.
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
            hint = "--resume-previous resumes from the save before it"
            raise UserError(f"{error}; {hint}", error.status) from error
    return checkpoint.load(previous), True


def resolve_path(path):
    """The directory of a run, from the directory or a file in it. Raises UserError."""
    path = Path(path)
    path = path.parent if path.is_file() else path
    if not path.is_dir():
        raise UserError(f"--resume {path}: there is no such run", 2)
    return path
