"""CIFAR-10 and CIFAR-100 from their published archives, which are downloaded if they are missing.

An archive is compared with its published digest before it is opened. Nothing is unpacked to the
disk, and no pickle in it can run code.
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError, first_line
from datasets import locking
from datasets.examples import Examples, Split


class Archive(NamedTuple):
    file: str
    size: int  # bytes
    md5: str
    folder: str  # holds the members, which are pickles
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    names_key: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# fmt: off
ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",),
        "batches.meta", "labels", "label_names", 10,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Archive(
        "cifar-100-python.tar.gz", 169001437, "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python", ("train",), ("test",),
        "meta", "fine_labels", "fine_label_names", 100,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# fmt: on
MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://dataset.bj.bcebos.com/cifar/")
TIMEOUT = 30  # seconds without a byte after which a mirror is given up


def load_archive(name, data_dir, data_url):
    """The Split of an archive in data_dir, or from data_url or a mirror. Raises UserError."""
    archive, path = ARCHIVES[name], data_dir / ARCHIVES[name].file
    if data_dir.is_file():
        raise UserError(f"--data-dir {data_dir} is a file, not a directory", status=2)
    if not path.is_file():
        with locking.writing(path):
            if not path.is_file():  # another process may have downloaded it meanwhile
                urls = [data_url] if data_url else [mirror + archive.file for mirror in MIRRORS]
                _download(archive, path, urls)
    md5, size = _md5(path), path.stat().st_size
    if md5 != archive.md5:
        raise UserError(
            f"{path} is not the published {name} archive: md5 {md5} and {size} bytes, "
            f"not {archive.md5} and {archive.size}; delete it to download it again"
        )
    try:
        members = _read_members(archive, path)
        train = _examples(archive, members, archive.train)
        test = _examples(archive, members, archive.test)
        classes = tuple(str(label) for label in members[archive.meta][archive.names_key])
        if len(classes) != archive.num_classes:
            raise ValueError(f"{len(classes)} class names")
    except Exception as error:  # a damaged tar or pickle raises almost anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} can't be read as the {name} archive ({reason})") from error
    return Split(name, train, None, test, classes, archive.mean, archive.std)


# ---- download ----


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _download(archive, path, urls):
    """Downloads an archive from the first URL that has it, resuming an earlier attempt."""
    part = path.with_name(path.name + ".part")
    errors = []
    for url in urls:
        try:
            resumed = _fetch(url, part, archive.size)
            if resumed and _md5(part) != archive.md5:
                part.unlink()
                _fetch(url, part, archive.size)
            md5 = _md5(part)
            if md5 == archive.md5:
                os.replace(part, path)
                return
            part.unlink()
            errors.append(f"{url}: md5 {md5}, not {archive.md5}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            errors.append(f"{url}: {error}")
    raise UserError(
        f"there is no {path}, and it could not be downloaded ({'; '.join(errors)}): "
        f"put {archive.file} from {MIRRORS[0]} (md5 {archive.md5}) into {path.parent}/, "
        "or try --dataset shapes, which needs no download"
    )


def _fetch(url, part, size):
    """Downloads the rest of the file `part`; returns whether there was a beginning of it."""
    present = part.stat().st_size if part.exists() else 0
    if present >= size:
        return True
    request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = present > 0 and getattr(response, "status", None) == 206
        offered = response.headers.get("Content-Length")
        if not resumed and offered and int(offered) != size:
            raise ValueError(f"it offers {offered} bytes, not the published {size}")
        start = present if resumed else 0
        part.parent.mkdir(parents=True, exist_ok=True)
        options = dict(unit="B", unit_scale=True, disable=None, leave=False)
        bar = tqdm(total=size, initial=start, desc=part.stem, **options)
        with open(part, "ab" if resumed else "wb") as file, bar:
            # read1 returns what has arrived, so that it is kept if the connection breaks.
            while block := response.read1(2**18):
                file.write(block)
                bar.update(len(block))
                if file.tell() > size:
                    raise ValueError(f"more than the published {size} bytes")
    received = part.stat().st_size
    if received < size:
        raise ValueError(
            f"the connection ended after {received} of {size} bytes; start again to resume"
        )
    return resumed


# ---- contents ----


def _read_members(archive, path):
    """{name: unpickled member}. Links, and members outside the folder, are refused."""
    wanted, members = {*archive.train, *archive.test, archive.meta}, {}
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            member_path = Path(member.name)
            if (
                not (member.isfile() or member.isdir())
                or member_path.is_absolute()
                or ".." in member_path.parts
            ):
                raise ValueError(f"member {member.name!r} is not a plain file below the folder")
            if member_path.parts[:-1] == (archive.folder,) and member_path.name in wanted:
                members[member_path.name] = _PlainUnpickler(tar.extractfile(member)).load()
    missing = sorted(wanted - set(members))
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return members


class _PlainUnpickler(pickle.Unpickler):
    """Reads numpy arrays, lists, dicts, strings and numbers; refuses what could run code."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def __init__(self, file):
        super().__init__(io.BytesIO(file.read()), encoding="latin1")  # written by Python 2

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused: {module}.{name} could run code")
        if name == "_reconstruct":
            module = "numpy._core.multiarray"
        return super().find_class(module, name)


def _examples(archive, members, names):
    blocks, labels = [], []
    for name in names:
        member = members.pop(name)
        member_labels, data = member[archive.label_key], np.asarray(member["data"])
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise ValueError(f"{name} holds {data.dtype} {data.shape}, not uint8 (N, 3072)")
        if len(data) != len(member_labels):
            raise ValueError(f"{name} has {len(data)} images and {len(member_labels)} labels")
        planes = torch.from_numpy(data).view(-1, 3, 32, 32)
        blocks.append(planes.contiguous(memory_format=torch.channels_last))
        labels.extend(member_labels)
    labels = np.array(labels, dtype=np.int64)
    if not len(labels) or labels.min() < 0 or labels.max() >= archive.num_classes:
        raise ValueError(f"labels must be 0 to {archive.num_classes - 1}")
    return Examples(torch.cat(blocks), torch.from_numpy(labels))
