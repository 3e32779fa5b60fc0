"""Where pictures come from: the CIFAR archives, shapes that are made here (and, in imagefolder.py, a folder).

Each gives a Split without a held-out part, on the CPU: uint8 pictures that lie as channels_last, and labels. Archives are
checked against their published digests before anything is opened, nothing is unpacked to the disk, and no pickle or
picture can run code or fill the memory.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from errors import UserError
from imagecache import CachedImages


@dataclass(frozen=True)
class Examples:
    """uint8 images (N, 3, H, W) and their int64 labels (N,).

    stored: a tensor, channels_last, or an imagecache.CachedImages; rows: which of the stored images these are (None: all), so
    that a selection copies nothing.
    """

    stored: torch.Tensor | CachedImages
    labels: torch.Tensor
    rows: torch.Tensor | None = None

    def __len__(self):
        return len(self.labels)

    @property
    def shape(self):
        return torch.Size((len(self.labels), *self.stored.shape[1:]))

    @property
    def nbytes(self):
        size = 1 if self.cached else self.stored.element_size()
        return self.shape.numel() * size

    @property
    def cached(self):
        """Whether the images lie in a file."""
        return isinstance(self.stored, CachedImages)

    @property
    def images(self):
        """All images as a tensor (N, 3, H, W): a view, or for a selection a copy."""
        if self.rows is not None:
            return self.gather(torch.arange(len(self))).permute(0, 3, 1, 2)
        return self.stored.all().permute(0, 3, 1, 2) if self.cached else self.stored

    def gather(self, index, out=None):
        """The images with these indices, uint8 (B, H, W, 3) on the CPU."""
        index = index if self.rows is None else self.rows[index]
        if self.cached:
            return self.stored.gather(index, out)
        return torch.index_select(self.stored.permute(0, 2, 3, 1), 0, index, out=out)

    def split(self, size):
        """The images in parts of `size`, each (B, 3, H, W)."""
        for part in torch.arange(len(self)).split(size):
            yield self.gather(part).permute(0, 3, 1, 2)

    def take(self, index):
        return Examples(self.stored, self.labels[index], index if self.rows is None else self.rows[index])


@dataclass(frozen=True)
class Split:
    """A dataset, divided: examples to train on, to choose on (or None) and to test on; and what is known of them."""

    name: str
    train: Examples
    val: Examples | None
    test: Examples
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of the channels of the training pictures, in [0, 1]
    std: tuple[float, ...]
    notes: tuple[str, ...] = field(default=())  # what the user should know about how it was loaded

    @property
    def num_classes(self):
        return len(self.classes)


def _channels_last(array):
    """uint8 numpy (N, H, W, 3) -> tensor (N, 3, H, W) that lies as channels_last, without a copy."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


# ---- CIFAR ---------------------------------------------------------------------------------------------------------


class Archive(NamedTuple):
    """A published archive: file name, size and md5 as published, its folder, members, and the keys of its pickles."""

    file: str
    size: int
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    names_key: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "batches.meta", "labels", "label_names", 10,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz", 169001437, "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python",
        ("train",), ("test",), "meta", "fine_labels", "fine_label_names", 100,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
}  # fmt: skip
SILENCE = 30  # seconds without a byte after which a place is given up
MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://dataset.bj.bcebos.com/cifar/")


def load_archive(name, data_dir, data_url):
    archive = ARCHIVES[name]
    path = data_dir / archive.file
    if data_dir.is_file():
        raise UserError(f"--data-dir {data_dir} is a file", status=2)
    if path.is_file():
        found = _md5(path)
        if found != archive.md5:
            size = path.stat().st_size
            raise UserError(
                f"{path} is not the published {name} archive: md5 {found} and {size} bytes, not {archive.md5} and "
                f"{archive.size}; delete it to have it downloaded again"
            )
    else:
        with one_at_a_time(path):
            if not path.is_file():  # else another process brought it meanwhile
                _download([data_url] if data_url else [mirror + archive.file for mirror in MIRRORS], path, archive, name)
    try:
        batches = _read_batches(path, archive)
        names = tuple(str(label) for label in batches[archive.meta][archive.names_key])
        train, test = (_examples(batches, members, archive) for members in (archive.train, archive.test))
        if len(names) != archive.num_classes:
            raise ValueError(f"{len(names)} class names")
    except (tarfile.TarError, zlib.error, pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, LookupError,
            AttributeError, ArithmeticError, MemoryError, RecursionError) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"  # pickle's reasons have line breaks
        raise UserError(f"{path} can't be read as the {name} archive ({reason})") from error
    return Split(name, train, None, test, names, archive.mean, archive.std)


@contextlib.contextmanager
def one_at_a_time(path):
    """A block for one process at a time that makes the file `path`; the others wait, to find it made.

    Where nothing can be written or locked it is for all: what is written takes its place whole.
    """
    made = not path.parent.is_dir()
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()
        if made:
            with contextlib.suppress(OSError):  # a try without network leaves nothing
                path.parent.rmdir()


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _download(urls, path, archive, name):
    """Fetches an archive from the first place that answers, going on from what an earlier try left behind."""
    part = path.with_name(path.name + ".part")
    reasons = []
    for url in urls:
        try:
            while True:
                resumed = _fetch(url, part, archive.size)
                found = _md5(part)
                if found == archive.md5:
                    os.replace(part, path)
                    return
                part.unlink()
                if not resumed:  # else what lay there was no beginning of it: once more, from the start
                    raise ValueError(f"md5 {found}, not {archive.md5}")
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
            reasons.append(f"{url}: {error}")
    raise UserError(
        f"there is no {path}, and it could not be downloaded ({'; '.join(reasons)}): put {archive.file} from "
        f"{MIRRORS[0]} (md5 {archive.md5}) into {path.parent}/, or try --dataset shapes, which needs no download"
    )


def _fetch(url, part, size):
    """Brings `part` to `size` bytes; returns whether it went on from what was there."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return True
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=SILENCE) as response:
        resumed = bool(have) and getattr(response, "status", None) == 206
        offered = response.headers.get("Content-Length")
        if not resumed and offered and int(offered) != size:
            raise ValueError(f"it offers {offered} bytes, not the published {size}")
        have = have if resumed else 0
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None, leave=False)
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if resumed else "wb") as file, bar:
            while block := response.read1(1 << 18):  # what has come, so that it is kept when no more comes
                file.write(block)
                bar.update(len(block))
                if file.tell() > size:
                    raise ValueError(f"more than the published {size} bytes")
    if part.stat().st_size < size:
        raise ValueError(f"the connection ended after {part.stat().st_size} of {size} bytes; start again to go on")
    return resumed


def _read_batches(path, archive):
    """The unpickled members that are wanted. Nothing is unpacked to the disk, and no member may point outside."""
    wanted = {*archive.train, *archive.test, archive.meta}
    found = {}
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not (member.isfile() or member.isdir()) or Path(member.name).is_absolute() or ".." in parts:
                raise ValueError(f"it has a member {member.name!r} that is no plain file below it")
            if len(parts) == 2 and parts[0] == archive.folder and parts[1] in wanted:
                found[parts[1]] = _PlainUnpickler(tar.extractfile(member)).load()
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads what numpy arrays, lists, dicts, strings and numbers need, and nothing that could run code."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("numpy.core.multiarray", "_reconstruct"),
               ("numpy._core.multiarray", "_reconstruct")}  # fmt: skip

    def __init__(self, file):
        super().__init__(io.BytesIO(file.read()), encoding="latin1")  # the archives were written by Python 2

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which could run code")
        return super().find_class("numpy._core.multiarray" if name == "_reconstruct" else module, name)


def _examples(batches, members, archive):
    count = sum(len(batches[member][archive.label_key]) for member in members)
    images = np.empty((count, 32, 32, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    at = 0
    for member in members:
        batch = batches.pop(member)
        data = np.asarray(batch["data"])
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise ValueError(f"{member} holds {data.dtype} {data.shape}, not uint8 (N, 3072)")
        if len(data) != len(batch[archive.label_key]):
            raise ValueError(f"{member} has {len(data)} pictures and {len(batch[archive.label_key])} labels")
        images[at : at + len(data)] = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[at : at + len(data)] = batch[archive.label_key]
        at += len(data)
    if count == 0 or labels.min() < 0 or labels.max() >= archive.num_classes:
        raise ValueError(f"labels must be 0…{archive.num_classes - 1}")
    return Examples(_channels_last(images), torch.from_numpy(labels))


# ---- shapes, made here -----------------------------------------------------------------------------------------------

SHAPES = ("disc", "ellipse", "square", "triangle", "star", "cross", "ring", "frame", "crescent", "bars")


@functools.cache  # a process may train twice
def load_shapes(train=10_000, test=2_000):
    return Split("shapes", make_shapes(train, seed=1), None, make_shapes(test, seed=2), SHAPES, (), ())


def make_shapes(count, seed, size=32):
    """Examples of SHAPES: one shape a picture, of random place, size, turn and colour, on a noisy background with clutter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(SHAPES)
    images = torch.empty(count, size, size, 3, dtype=torch.uint8)
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(n, *shape, low=0.0, high=1.0):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def paint(picture, distance, colour):
        cover = (0.5 - distance).clamp(0, 1)[..., None]  # half a pixel of soft edge
        return picture.lerp(colour[:, None, None], cover)

    for part in torch.arange(count).split(1000):
        n = len(part)
        back, other = uniform(n, 3, high=0.9), uniform(n, 3, high=0.9)
        slope = uniform(n, 1, 1) * x / size + uniform(n, 1, 1) * y / size
        picture = back[:, None, None].lerp(other[:, None, None], 0.5 * slope[..., None])
        for _ in range(3):  # clutter: small discs in any colour
            cx, cy, r = uniform(n, 1, 1, high=size), uniform(n, 1, 1, high=size), uniform(n, 1, 1, low=0.8, high=2.2)
            picture = paint(picture, ((x - cx) ** 2 + (y - cy) ** 2).sqrt() - r, uniform(n, 3))
        radius = uniform(n, 1, 1, low=7, high=13)
        cx, cy = (uniform(n, 1, 1, low=-1.0) * (size / 2 - radius * 0.8) + size / 2 for _ in range(2))
        turn = uniform(n, 1, 1, low=-0.4, high=0.4)
        u = ((x - cx) * turn.cos() + (y - cy) * turn.sin()) / radius
        v = ((y - cy) * turn.cos() - (x - cx) * turn.sin()) / radius
        distance = torch.stack([_shape_distance(name, u, v) for name in SHAPES])[labels[part], torch.arange(n)] * radius
        # The colour keeps a distance from the background's, in a random direction of colour space.
        direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)
        colour = back.lerp(other, 0.5) + direction * uniform(n, 1, low=0.4, high=0.8)
        picture = paint(picture, distance, colour.clamp(0, 1))
        picture += torch.randn(picture.shape, generator=generator) * uniform(n, 1, 1, 1, low=0.01, high=0.06)
        images[part] = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return Examples(images.permute(0, 3, 1, 2), labels)


def _shape_distance(name, u, v):
    """Signed distance (about; negative inside) to a shape that fits the unit disc."""
    r = (u * u + v * v).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    if name == "disc":
        return r - 0.9
    if name == "ellipse":
        return ((u / 1.0) ** 2 + (v / 0.5) ** 2).sqrt() * 0.6 - 0.6
    if name == "square":
        return box - 0.75
    if name == "triangle":
        return torch.maximum(0.866 * u.abs() + 0.5 * v, -v) - 0.5
    if name == "star":
        return r - 0.65 - 0.33 * torch.cos(5 * torch.atan2(v, u))
    if name == "cross":
        return torch.minimum(torch.maximum(u.abs() - 0.95, v.abs() - 0.28), torch.maximum(u.abs() - 0.28, v.abs() - 0.95))
    if name == "ring":
        return (r - 0.7).abs() - 0.22
    if name == "frame":
        return (box - 0.6).abs() - 0.18
    if name == "crescent":
        return torch.maximum(r - 0.95, 0.75 - ((u - 0.5) ** 2 + v * v).sqrt())
    return torch.maximum((v.abs() - 0.45).abs() - 0.22, u.abs() - 0.9)  # bars
