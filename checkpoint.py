"""Files that are whole or not there, and that can't run code.

A checkpoint is a dict of tensors and builtins with a digest of its contents. It is written to a temporary file in the
same directory, flushed to the disk, read back and compared, and only then renamed over the old one: at no moment is
there no valid file. It is read with weights_only=True and never otherwise.
"""

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from errors import UserError

FORMAT = 1


@contextmanager
def replacing(path, mode="wb", previous=None):
    """A file to write that takes the place of `path` when the block ends well, and leaves no trace when it doesn't.

    previous: a path in the same directory that what stood at `path` is kept at, where the file system has hard links.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes never write one file
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, Path(previous))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself; other systems can't open a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _keep(path, previous):
    """Gives the file at `path` a second name, so that it outlives what is renamed over it: no byte is copied."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
        link.unlink(missing_ok=True)  # a rename onto a name of the same file does nothing
    except OSError:  # there is no file yet, or the file system has no hard links: the new file is what matters
        link.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


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


def to_cpu(value):
    """A tree with its tensors on the CPU, each with a storage of its own size (a view would save its whole base).

    Tensors that are so already are not copied: a save takes no memory for them.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to("cpu", copy=value.untyped_storage().nbytes() != value.nbytes)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value


class _Told:
    """A file that remembers why it could not be written: torch's writer says only that it couldn't."""

    def __init__(self, file):
        self.file, self.flush, self.error = file, file.flush, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save(state, path, previous=None):
    """Writes a dict of tensors and builtins to `path`, or leaves the old file as it was and raises UserError.

    previous: where the old file is kept, see `replacing`. It takes once the memory of the state's tensors: to copy them from
    a GPU, then, when these copies are gone, to read the file back.
    """
    contents, told = to_cpu(state), None
    try:
        with replacing(path, previous=previous) as file:
            told = _Told(file)
            torch.save({"format": FORMAT, "digest": digest(contents), "contents": contents}, told)
            del contents
            file.flush()
            load(file.name)
    except (OSError, RuntimeError) as error:
        reason = first_line((told and told.error) or error)
        raise UserError(f"{path} could not be written ({reason}); the file before it is untouched") from error


def load(path, kind="checkpoint"):
    """The dict that `save` wrote, on the CPU. Raises UserError for a file that is damaged, foreign or hostile."""
    state = load_untrusted(path, kind)
    if not isinstance(state, dict) or set(state) != {"format", "digest", "contents"}:
        raise UserError(f"{path} is not a {kind} of this program")
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise UserError(f"{path} has format {first_line(state['format'])}; this program reads format {FORMAT}")
    try:
        intact = digest(state["contents"]) == state["digest"]
    except Exception:  # a tree that is no run's: too deep, or with tensors that have no bytes of their own
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its contents don't match their digest")
    return state["contents"]


def load_untrusted(path, kind="file"):
    """What torch.save wrote, tensors and builtins only. Raises UserError for everything else."""
    if _unpacks_to_more(path):
        raise UserError(f"{path} was refused: it claims to hold more than its size")
    if not Path(path).is_file():
        raise UserError(f"there is no {kind} {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, on the way to refusing the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            is_pickle = file.read(1) in (b"P", b"\x80")  # a zip archive of torch.save, or a bare pickle
        if is_pickle and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
            raise UserError(
                f"{path} was refused: it holds more than tensors and plain values, so loading it could run code"
            ) from error
        raise UserError(f"{path} is not a {kind}, or it is damaged ({first_line(error)})") from error
    except Exception as error:  # on foreign bytes the reader stumbles in many ways
        raise UserError(f"{path} is truncated, damaged or not a {kind} ({first_line(error)})") from error


def first_line(error):
    return str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__


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
