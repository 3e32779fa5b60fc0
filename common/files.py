"""File operations whose results survive a crash of the process or of the machine.

    with replacing("last.pt", previous="previous.pt") as file:   # the new file or the old one
        file.write(data)
    append("metrics.csv", "1,0.5\\n")
    make_directory("runs/x")

All of them use the small functions at the end of this file, so that a test can record the
operations and reconstruct every state that a crash could leave on the disk.
"""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEXT = {"encoding": "utf-8", "newline": "\n"}  # the same on every platform


@contextmanager
def replacing(path, mode="wb", previous=None):
    """Opens a temporary file. It replaces `path` if the block succeeds and is removed if it fails.

    previous: a path in the same directory where the old file is kept, if hard links are possible.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open_file(temporary, mode) as file:
            yield file
            sync(file)
        if previous is not None:
            _keep(path, Path(previous))
        rename(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    sync_directory(path.parent)


def _temporary(path):
    """A name in the same directory; the process id keeps two processes apart."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _keep(path, previous):
    """Gives the file at `path` the name `previous` as well. Nothing is copied."""
    temporary = _temporary(previous)
    # Without an old file or without hard links there is no previous file, and that is no error.
    with suppress(OSError):
        remove(temporary)
        link(path, temporary)
        rename(temporary, previous)
    # Renaming does nothing if both names already belong to the same file.
    with suppress(OSError):
        remove(temporary)


def append(path, text):
    """Appends text to a file. It is on the disk when this returns."""
    with open_file(path, "a") as file:
        file.write(text)
        sync(file)


def write_json(path, value):
    """Replaces a file by a JSON value."""
    with replacing(path, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The object in a JSON file; {} if the file is missing, damaged or holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return {}
    return value if isinstance(value, dict) else {}


def make_directory(path):
    """Makes a directory and its parents. They are on the disk when this returns."""
    path = Path(path)
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):
        mkdir(path)
    sync_directory(path.parent)


def remove(path):
    """Removes a file if it exists."""
    with suppress(FileNotFoundError):
        unlink(path)


# The operations.


def open_file(path, mode):
    return open(path, mode) if "b" in mode else open(path, mode, **TEXT)


def sync(file):
    """Writes the contents of an open file to the disk, but not its name: see sync_directory."""
    file.flush()
    _fsync(file.fileno())


def _fsync(descriptor):
    if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, os.fsync leaves data in the cache of the disk
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def rename(path, target):
    os.replace(path, target)


def link(path, target):
    os.link(path, target)


def unlink(path):
    os.unlink(path)


def mkdir(path):
    os.mkdir(path)


def sync_directory(path):
    """Writes the names in a directory to the disk. Only POSIX systems can open a directory."""
    if os.name == "posix":
        directory = os.open(path, os.O_RDONLY)
        try:
            _fsync(directory)
        finally:
            os.close(directory)
