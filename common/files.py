"""File operations whose results survive a crash of the process or of the machine.

    with replacing("last.pt", previous="previous.pt") as file:      # the whole file or the old one, never a part
        file.write(data)
    append("metrics.csv", "1,0.5\\n")
    make_directory("runs/x")

Everything that a run writes goes through the small functions at the end of this file, so that a test can record the
operations and try every state that a crash could leave on the disk.
"""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path, mode="wb", previous=None):
    """A file to write that takes the place of `path` when the block ends well, and leaves no trace when it doesn't.

    previous: a path in the same directory under which the old file is kept, where the file system has hard links.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # two processes never write one file
    try:
        with open_file(temporary, mode) as file:
            yield file
            sync(file)
        if previous is not None:
            _keep(path, Path(previous))
        rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            unlink(temporary)
        raise
    sync_directory(path.parent)


def _keep(path, previous):
    """Gives the file at `path` a second name, so that it outlives what replaces it: no byte is copied."""
    second = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        with suppress(FileNotFoundError):
            unlink(second)
        link(path, second)
        rename(second, previous)
        unlink(second)  # renaming onto a name of the same file does nothing
    except (
        OSError
    ):  # there is no file yet, or the file system has no hard links: the new file is what matters
        with suppress(OSError):
            unlink(second)


def append(path, text):
    """Adds text to a file; it is on the disk when this returns."""
    with open_file(path, "a") as file:
        file.write(text)
        sync(file)


def write_json(path, value):
    """Replaces a file by a JSON value."""
    with replacing(path, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The object in a JSON file; {} where there is none."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def make_directory(path):
    """Makes a directory and its parents; they are on the disk when this returns."""
    path = Path(path)
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):
        mkdir(path)
    sync_directory(path.parent)


def remove(path):
    """Removes a file, if it is there."""
    with suppress(FileNotFoundError):
        unlink(path)


# ---- the operations --------------------------------------------------------------------------------------------------


def open_file(path, mode):
    return open(path, mode)


def sync(file):
    """What was written to an open file is on the disk when this returns; its name need not be."""
    file.flush()
    os.fsync(file.fileno())


def rename(path, target):
    os.replace(path, target)


def link(path, target):
    os.link(path, target)


def unlink(path):
    os.unlink(path)


def mkdir(path):
    os.mkdir(path)


def sync_directory(path):
    """The names in a directory are on the disk when this returns; systems other than POSIX can't open a directory."""
    if os.name == "posix":
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
