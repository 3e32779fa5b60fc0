"""Checkpoints: files that are complete or absent, and that can't run code.

A checkpoint is a dict of tensors and builtins with a digest of its contents. It is written to a
temporary file in the same directory, read back and compared, synced to the disk, and only then
renamed over the old file: there is a valid file at every moment. Files are always read with
weights_only=True.
"""

import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import files
from common.errors import UserError, first_line

FORMAT = 1
# Bytes of an element -> the type that it is viewed as for numpy, which has no bfloat16.
NUMPY_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def digest(value):
    """sha256 (hex) of nested dicts, lists, tuples, tensors and builtins, with types and order."""
    sha = hashlib.sha256()

    def add(node):
        if isinstance(node, torch.Tensor):
            sha.update(f"{node.dtype}{tuple(node.shape)}".encode())
            sha.update(_bytes(node))
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


def _bytes(tensor):
    """The elements of a tensor in their order, as an array of uint8.

    numpy copies them in the calling thread. torch would start OpenMP threads for the thread that
    saves, and then there are more OpenMP threads than cores. libgomp reacts by putting threads to
    sleep while they wait, also those that train: on two cores, epochs of ResNet-20 took 1.3 times
    as long after the first save of a run.
    """
    array = tensor.detach().cpu().view(NUMPY_TYPES[tensor.element_size()]).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def map_tensors(function, value, keys=()):
    """Replaces each tensor in nested dicts, lists and tuples by function(tensor, keys).

    keys: the keys and indices that lead to the tensor.
    """
    if isinstance(value, torch.Tensor):
        return function(value.detach(), keys)
    if isinstance(value, dict):
        return {key: map_tensors(function, item, (*keys, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item, (*keys, i)) for i, item in enumerate(value))
    return value


def to_cpu(value):
    """Nested values with all tensors on the CPU. Views are copied: saving one saves its storage."""

    def convert(tensor, keys):
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        return tensor.to("cpu", copy=is_view)

    return map_tensors(convert, value)


class Snapshot:
    """Copies a state to host memory, to write it while training continues; the memory is reused."""

    def __init__(self):
        self._copies = {}

    def take(self, state):
        """A copy of the nested state. It is valid until the next call."""
        return map_tensors(self._copy, state)

    def _copy(self, tensor, keys):
        copy = self._copies.get(keys)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = self._copies[keys] = torch.empty_like(tensor, device="cpu")
        return copy.copy_(tensor)


class HashedFile:
    """A file that hashes what is written and keeps the error of a write, which torch.save loses."""

    def __init__(self, file):
        self.file, self.flush = file, file.flush
        self.hash, self.error = hashlib.sha256(), None

    def write(self, data):
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save(state, path, previous=None):
    """Writes a dict of tensors and builtins. Raises UserError and keeps the old file if that fails.

    previous: where the old file is kept afterwards, see files.replacing.
    """
    contents, hashed = to_cpu(state), None
    try:
        with files.replacing(path, previous=previous) as file:
            hashed = HashedFile(file)
            torch.save({"format": FORMAT, "digest": digest(contents), "contents": contents}, hashed)
            file.flush()
            verify(file.name, hashed.hash.digest())
    except (OSError, RuntimeError) as error:
        cause = hashed.error if hashed and hashed.error else error
        raise UserError(
            f"{path} could not be written ({first_line(cause)}); the previous file is unchanged"
        ) from error


def verify(path, expected):
    """Raises OSError unless a file has the sha256 `expected` and can be read as a checkpoint."""
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != expected:
            raise OSError("it reads back differently")
    try:
        # mmap: the tensors take no memory.
        _check_format(load_untrusted(path, mmap=True), path, "checkpoint")
    except UserError as error:
        raise OSError(str(error)) from error


def load(path, kind="checkpoint"):
    """The dict that `save` wrote, on the CPU. Raises UserError for a damaged or foreign file."""
    state = load_untrusted(path, kind)
    _check_format(state, path, kind)
    try:
        # First, because the digest needs a copy of a tensor whose elements share memory.
        intact = _have_their_elements(state["contents"])
        intact = intact and digest(state["contents"]) == state["digest"]
    except Exception:  # not the contents of a run: nested too deeply, or sparse tensors
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its contents don't match their digest")
    return state["contents"]


def _check_format(state, path, kind):
    if not isinstance(state, dict) or set(state) != {"format", "digest", "contents"}:
        raise UserError(f"{path} is not a {kind} of this program")
    found = state["format"]
    if not isinstance(found, int) or found != FORMAT:
        raise UserError(f"{path} has format {first_line(found)}; this program reads {FORMAT}")


def load_untrusted(path, kind="file", mmap=False):
    """Loads a file of torch.save with tensors and builtins only. Raises UserError for any other.

    mmap: tensors are read from the file when they are used.
    """
    if _unpacks_to_more(path):
        raise UserError(f"{path} was refused: it claims to hold more than its size")
    if not Path(path).is_file():
        raise UserError(f"there is no {kind} {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises many kinds of exceptions for foreign bytes
        reason = f"is truncated, damaged or not a {kind} ({first_line(error)})"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = "was refused: it holds more than tensors and plain values, which can run code"
        raise UserError(f"{path} {reason}") from error


def _unpacks_to_more(path):
    """Whether a zip archive is a decompression bomb: torch.save doesn't compress its records."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(record.file_size for record in archive.infolist()) > os.path.getsize(path)
    except Exception:  # not an archive, or a damaged one: torch.load will raise
        return False


def _have_their_elements(value):
    """has_its_elements, for all tensors in nested dicts, lists and tuples."""
    complete = []
    map_tensors(lambda tensor, keys: complete.append(has_its_elements(tensor)), value)
    return all(complete)


def has_its_elements(tensor):
    """Whether all elements of a tensor lie in memory, so that a copy is no larger than its file."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
