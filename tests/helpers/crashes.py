"""What a power cut could leave on a disk.

    recorder = Recorder(monkeypatch)                   # records the file operations of a program
    for contents in states(recorder.operations): ...   # {path: bytes}

The model is that of "All File Systems Are Not Created Equal" (OSDI 2014) with the fewest
guarantees: data is certain only after fsync of the file, and a name (create, rename, link, unlink)
only after fsync of its directory. Every uncertain operation may be on the disk or not, independent
of the others; data may also be there in part, or replaced by zeros of the same length.
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
    source: Path | None = None  # the old name in a rename


class Recorder:
    """Replaces the operations of common.files by ones that are also recorded."""

    def __init__(self, monkeypatch):
        self.operations, self.inodes, self.numbers = [], {}, itertools.count(1)
        for name in ("open_file", "sync", "rename", "link", "unlink", "sync_directory"):
            setattr(self, f"real_{name}", getattr(files, name))
            monkeypatch.setattr(files, name, getattr(self, name))

    def record(self, kind, path, **details):
        self.operations.append(Operation(kind, Path(path), **details))

    def open_file(self, path, mode):
        path, file = Path(path), self.real_open_file(path, mode)
        # No operation truncates a file that has a name already.
        assert mode == "a" or path not in self.inodes
        if path not in self.inodes:
            self.inodes[path] = next(self.numbers)
            self.record("name", path, inode=self.inodes[path])
        return RecordedFile(file, path, self)

    def write(self, path, data):
        data = data.encode() if isinstance(data, str) else bytes(data)
        last = self.operations[-1]
        if last.kind == "write" and last.path == path:
            self.operations[-1] = last._replace(data=last.data + data)
        else:
            self.record("write", path, inode=self.inodes[path], data=data)

    def sync(self, file):
        self.real_sync(file)
        self.record("sync", file.name, inode=self.inodes[Path(file.name)])

    def rename(self, path, target):
        path, target = Path(path), Path(target)
        self.real_rename(path, target)
        if self.inodes[path] != self.inodes.get(target):
            self.inodes[target] = self.inodes.pop(path)
            self.record("name", target, inode=self.inodes[target], source=path)

    def link(self, path, target):
        self.real_link(path, target)
        self.inodes[Path(target)] = self.inodes[Path(path)]
        self.record("name", target, inode=self.inodes[Path(path)])

    def unlink(self, path):
        self.real_unlink(path)
        del self.inodes[Path(path)]
        self.record("unname", path)

    def sync_directory(self, path):
        self.real_sync_directory(path)
        self.record("sync_directory", path)


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


def states(operations):
    """Yields each {path: bytes} that a crash right after these operations could leave."""
    uncertain = [
        i for i, operation in enumerate(operations) if not _is_certain(operation, operations[i:])
    ]
    names = [i for i in uncertain if operations[i].kind in ("name", "unname")]
    writes = [i for i in uncertain if operations[i].kind == "write"]
    for on_disk in itertools.product((True, False), repeat=len(names)):
        lost = {i for i, kept in zip(names, on_disk) if not kept}
        rest = [operation for i, operation in enumerate(operations) if i not in lost]
        for damage in itertools.product(DAMAGE, repeat=len(writes)):
            yield replay(rest, {operations[i]: kind for i, kind in zip(writes, damage)})


DAMAGE = {
    "complete": lambda data: data,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "half, then zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
}


def _is_certain(operation, later):
    if operation.kind == "write":
        return any(other.kind == "sync" and other.inode == operation.inode for other in later)
    directory = operation.path.parent
    return any(other.kind == "sync_directory" and other.path == directory for other in later)


def replay(operations, damage=None):
    """{path: bytes} after the operations. damage: {write: key of DAMAGE}."""
    names, inodes = {}, {}
    for operation in operations:
        if operation.kind == "write":
            kind = (damage or {}).get(operation, "complete")
            before = inodes.get(operation.inode, b"")
            inodes[operation.inode] = before + DAMAGE[kind](operation.data)
        elif operation.kind == "name":
            names.pop(operation.source, None)
            names[operation.path] = operation.inode
        elif operation.kind == "unname":
            names.pop(operation.path, None)
    return {path: inodes.get(inode, b"") for path, inode in names.items()}


def write_files(contents, root, directory):
    """Writes {path below root: bytes} below another directory."""
    for path, data in contents.items():
        target = directory / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
