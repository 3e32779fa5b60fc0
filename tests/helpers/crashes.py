"""What a power cut could leave on a disk: records the file operations of a program, and enumerates the states.

    with record(monkeypatch) as operations: ...
    for files in states(operations, prefix=17): ...        # {path: bytes}

The model is that of "All File Systems Are Not Created Equal" (OSDI 2014), at its weakest: what was written to a file is certain
only after fsync of the file, and a name (create, rename, link, unlink) only after fsync of its directory. What is not certain
may be there or not, each for itself; of data, also a part, or a file of the right length that holds zeros.
"""

import itertools
import os
from pathlib import Path
from typing import NamedTuple

from common import files


class Operation(NamedTuple):
    kind: str  # write, sync, name, unname, sync_directory
    path: Path
    inode: int = 0
    data: bytes = b""
    source: Path | None = None  # of a rename: the name that goes


class Recorder:
    """Stands in for the operations of the module `files`, does them, and keeps a list of them."""

    def __init__(self, monkeypatch):
        self.operations, self.inodes, self.numbers = [], {}, itertools.count(1)
        for name in ("open_file", "sync", "rename", "link", "unlink", "mkdir", "sync_directory"):
            setattr(self, f"real_{name}", getattr(files, name))
            monkeypatch.setattr(files, name, getattr(self, name))

    def open_file(self, path, mode):
        path, file = Path(path), self.real_open_file(path, mode)
        if (
            mode != "a" or path not in self.inodes
        ):  # a new file; nothing here truncates one that has a name
            assert mode == "a" or path not in self.inodes
            self.inodes[path] = next(self.numbers)
            self.operations.append(Operation("name", path, self.inodes[path]))
        return RecordedFile(file, path, self)

    def write(self, path, data):
        data = data.encode() if isinstance(data, str) else bytes(data)
        last = self.operations[-1]
        if last.kind == "write" and last.path == path:
            self.operations[-1] = last._replace(data=last.data + data)
        else:
            self.operations.append(Operation("write", path, self.inodes[path], data))

    def sync(self, file):
        self.real_sync(file)
        self.operations.append(Operation("sync", Path(file.name), self.inodes[Path(file.name)]))

    def rename(self, path, target):
        path, target = Path(path), Path(target)
        self.real_rename(path, target)
        if self.inodes[path] != self.inodes.get(target):
            self.inodes[target] = self.inodes.pop(path)
            self.operations.append(Operation("name", target, self.inodes[target], source=path))

    def link(self, path, target):
        self.real_link(path, target)
        self.inodes[Path(target)] = self.inodes[Path(path)]
        self.operations.append(Operation("name", Path(target), self.inodes[Path(path)]))

    def unlink(self, path):
        self.real_unlink(path)
        del self.inodes[Path(path)]
        self.operations.append(Operation("unname", Path(path)))

    def mkdir(self, path):
        self.real_mkdir(path)

    def sync_directory(self, path):
        self.real_sync_directory(path)
        self.operations.append(Operation("sync_directory", Path(path)))


class RecordedFile:
    """A file whose writes are recorded."""

    def __init__(self, file, path, recorder):
        self.file, self.path, self.recorder = file, path, recorder

    def write(self, data):
        self.recorder.write(self.path, data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


def replay(operations):
    """{path: contents} after all operations."""
    return _contents(operations, {})


def states(operations):
    """Every {path: contents} that a crash right after these operations could leave."""
    uncertain = [
        i for i, operation in enumerate(operations) if not _is_certain(operation, operations[i:])
    ]
    names = [i for i in uncertain if operations[i].kind in ("name", "unname")]
    writes = [i for i in uncertain if operations[i].kind == "write"]
    for kept in itertools.product((True, False), repeat=len(names)):
        lost = {i for i, there in zip(names, kept) if not there}
        rest = [operation for i, operation in enumerate(operations) if i not in lost]
        for damage in itertools.product(DAMAGE, repeat=len(writes)):
            yield _contents(rest, {operations[i]: how for i, how in zip(writes, damage)})


DAMAGE = {
    "all": lambda data: data,
    "nothing": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "half, then zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
}


def _is_certain(operation, later):
    if operation.kind == "write":
        return any(other.kind == "sync" and other.inode == operation.inode for other in later)
    return any(
        other.kind == "sync_directory" and other.path == operation.path.parent for other in later
    )


def _contents(operations, damage):
    names, inodes = {}, {}
    for operation in operations:
        if operation.kind == "write":
            data = DAMAGE[damage.get(operation, "all")](operation.data)
            inodes[operation.inode] = inodes.get(operation.inode, b"") + data
        elif operation.kind == "name":
            names.pop(operation.source, None)
            names[operation.path] = operation.inode
        elif operation.kind == "unname":
            names.pop(operation.path, None)
    return {path: inodes.get(inode, b"") for path, inode in names.items()}


def lay_out(contents, root, directory):
    """Writes {path below root: contents} below another directory."""
    for path, data in contents.items():
        target = directory / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
