"""Checkpoints: files that are complete or absent, and that can't run code.

A checkpoint is a dict of tensors and builtins with a digest of its contents. It is written to a temporary file in the
same directory, read back and compared, synced to the disk, and only then renamed over the old one: there is a valid file
at every moment. It is read with weights_only=True and never otherwise.
"""

import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from common import files
from common.errors import UserError, first_line

FORMAT = 1


def digest(value):
    """sha256 (hex) of a tree of dicts, lists, tuples, tensors and builtins: contents, shapes, types and order."""
    sha = hashlib.sha256()

    def add(node):
        if isinstance(node, torch.Tensor):
            sha.update(f"{node.dtype}{tuple(node.shape)}".encode())
            sha.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(node, dict):
            sha.update(f"dict{len(node)}".encode())
            for key, item in node.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(node, (list, tuple)):
            sha.update(f"{type(node).__name__}{len(node)}".encode())
            for item in node:
                add(item)
        else:
            sha.update(f"{type(node).__name__}{node!r}".encode())

    add(value)
    return sha.hexdigest()


def map_tensors(function, value, place=()):
    """A tree of dicts, lists and tuples with function(tensor, place) in the place of each tensor; place: keys and indices."""
    if isinstance(value, torch.Tensor):
        return function(value.detach(), place)
    if isinstance(value, dict):
        return {key: map_tensors(function, item, (*place, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item, (*place, i)) for i, item in enumerate(value))
    return value


def to_cpu(value):
    """A tree with its tensors on the CPU, each with a storage of its own size (a view would save its whole base).

    Tensors that are so already are not copied.
    """
    return map_tensors(
        lambda t, place: t.to("cpu", copy=t.untyped_storage().nbytes() != t.nbytes), value
    )


class Snapshot:
    """Copies of a state in host memory, so that it can be written while training changes the tensors.

    The same memory is used each time: fresh memory would take longer to get than the copy does.
    """

    def __init__(self):
        self._copies = {}

    def take(self, state):
        """A copy of the tree. It is valid until the next call."""
        return map_tensors(self._copy, state)

    def _copy(self, tensor, place):
        copy = self._copies.get(place)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = self._copies[place] = torch.empty_like(tensor, device="cpu")
        return copy.copy_(tensor)


class HashedFile:
    """A file for torch.save that hashes what is written, and keeps the reason of a failure, which torch's writer loses."""

    def __init__(self, file):
        self.file, self.flush, self.error, self.hash = file, file.flush, None, hashlib.sha256()

    def write(self, data):
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save(state, path, previous=None):
    """Writes a dict of tensors and builtins to `path`, or leaves the old file as it was and raises UserError.

    previous: where the old file is kept, see `files.replacing`. Tensors on a GPU are copied to host memory for it.
    """
    contents, hashed = to_cpu(state), None
    try:
        with files.replacing(path, previous=previous) as file:
            hashed = HashedFile(file)
            torch.save({"format": FORMAT, "digest": digest(contents), "contents": contents}, hashed)
            file.flush()
            verify(file.name, hashed.hash.digest())
    except (OSError, RuntimeError) as error:
        reason = first_line((hashed and hashed.error) or error)
        raise UserError(
            f"{path} could not be written ({reason}); the file before it is untouched"
        ) from error


def verify(path, expected):
    """Raises OSError unless a file has the sha256 `expected` and reads as a checkpoint; takes no memory for its tensors."""
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != expected:
            raise OSError("it reads back differently")
    try:
        _check_format(load_untrusted(path, mmap=True), path, "checkpoint")
    except UserError as error:
        raise OSError(str(error)) from error


def load(path, kind="checkpoint"):
    """The dict that `save` wrote, on the CPU. Raises UserError for a file that is damaged, foreign or hostile."""
    state = load_untrusted(path, kind)
    _check_format(state, path, kind)
    try:
        intact = digest(state["contents"]) == state["digest"]
    except (
        Exception
    ):  # a tree that is no run's: too deep, or with tensors that have no bytes of their own
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its contents don't match their digest")
    return state["contents"]


def _check_format(state, path, kind):
    if not isinstance(state, dict) or set(state) != {"format", "digest", "contents"}:
        raise UserError(f"{path} is not a {kind} of this program")
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise UserError(
            f"{path} has format {first_line(state['format'])}; this program reads format {FORMAT}"
        )


def load_untrusted(path, kind="file", mmap=False):
    """What torch.save wrote, tensors and builtins only; mmap: tensors are read when they are used.

    Raises UserError for everything else.
    """
    if _unpacks_to_more(path):
        raise UserError(f"{path} was refused: it claims to hold more than its size")
    if not Path(path).is_file():
        raise UserError(f"there is no {kind} {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about pickle protocols, on the way to refusing the file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            is_pickle = file.read(1) in (
                b"P",
                b"\x80",
            )  # a zip archive of torch.save, or a bare pickle
        if is_pickle and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
            raise UserError(
                f"{path} was refused: it holds more than tensors and plain values, so loading it could run code"
            ) from error
        raise UserError(
            f"{path} is not a {kind}, or it is damaged ({first_line(error)})"
        ) from error
    except Exception as error:  # on foreign bytes the reader stumbles in many ways
        raise UserError(
            f"{path} is truncated, damaged or not a {kind} ({first_line(error)})"
        ) from error


def _unpacks_to_more(path):
    """Whether a zip archive's records are larger than the archive: torch.save packs nothing, a decompression bomb does."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(record.file_size for record in archive.infolist()) > os.path.getsize(path)
    except Exception:  # no archive, or a damaged one: torch.load says so
        return False


def has_its_elements(tensor):
    """Whether a tensor's elements lie in memory, each for itself, so that copying it takes no more than its file did."""
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
