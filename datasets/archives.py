"""Where pictures come from: the CIFAR archives, shapes that are made here (and, in imagefolder.py, a folder).

Each gives a Split without a held-out part, on the CPU: uint8 pictures that lie as channels_last, and labels. Archives are
checked against their published digests before anything is opened, nothing is unpacked to the disk, and no pickle or
picture can run code or fill the memory.
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from datasets.examples import Examples, Split, _channels_last, one_at_a_time


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
        "cifar-10-python.tar.gz",
        170498071,
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        169001437,
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        ("train",),
        ("test",),
        "meta",
        "fine_labels",
        "fine_label_names",
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


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
                _download(
                    [data_url] if data_url else [mirror + archive.file for mirror in MIRRORS],
                    path,
                    archive,
                    name,
                )
    try:
        batches = _read_batches(path, archive)
        names = tuple(str(label) for label in batches[archive.meta][archive.names_key])
        train, test = (
            _examples(batches, members, archive) for members in (archive.train, archive.test)
        )
        if len(names) != archive.num_classes:
            raise ValueError(f"{len(names)} class names")
    except (
        tarfile.TarError,
        zlib.error,
        pickle.UnpicklingError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        MemoryError,
        RecursionError,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"  # pickle's reasons have line breaks
        raise UserError(f"{path} can't be read as the {name} archive ({reason})") from error
    return Split(name, train, None, test, names, archive.mean, archive.std)


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
                if (
                    not resumed
                ):  # else what lay there was no beginning of it: once more, from the start
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
        bar = tqdm(
            total=size,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=part.stem,
            disable=None,
            leave=False,
        )
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if resumed else "wb") as file, bar:
            while block := response.read1(
                1 << 18
            ):  # what has come, so that it is kept when no more comes
                file.write(block)
                bar.update(len(block))
                if file.tell() > size:
                    raise ValueError(f"more than the published {size} bytes")
    if part.stat().st_size < size:
        raise ValueError(
            f"the connection ended after {part.stat().st_size} of {size} bytes; start again to go on"
        )
    return resumed


def _read_batches(path, archive):
    """The unpickled members that are wanted. Nothing is unpacked to the disk, and no member may point outside."""
    wanted = {*archive.train, *archive.test, archive.meta}
    found = {}
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if (
                not (member.isfile() or member.isdir())
                or Path(member.name).is_absolute()
                or ".." in parts
            ):
                raise ValueError(f"it has a member {member.name!r} that is no plain file below it")
            if len(parts) == 2 and parts[0] == archive.folder and parts[1] in wanted:
                found[parts[1]] = _PlainUnpickler(tar.extractfile(member)).load()
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads what numpy arrays, lists, dicts, strings and numbers need, and nothing that could run code."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def __init__(self, file):
        super().__init__(
            io.BytesIO(file.read()), encoding="latin1"
        )  # the archives were written by Python 2

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"refused: it asks for {module}.{name}, which could run code"
            )
        return super().find_class(
            "numpy._core.multiarray" if name == "_reconstruct" else module, name
        )


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
            raise ValueError(
                f"{member} has {len(data)} pictures and {len(batch[archive.label_key])} labels"
            )
        images[at : at + len(data)] = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[at : at + len(data)] = batch[archive.label_key]
        at += len(data)
    if count == 0 or labels.min() < 0 or labels.max() >= archive.num_classes:
        raise ValueError(f"labels must be 0…{archive.num_classes - 1}")
    return Examples(_channels_last(images), torch.from_numpy(labels))
