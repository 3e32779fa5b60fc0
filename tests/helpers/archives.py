"""Small archives in the form of the published CIFAR archives."""

import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from datasets import archives


class Python2Pickler(pickle._Pickler):
    """Pickles like Python 2, which wrote the published archives: all strings are byte strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        short = len(raw) < 256
        self.write(b"U" + bytes([len(raw)]) if short else b"T" + struct.pack("<i", len(raw)))
        self.write(raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def archive_contents(name):
    """{member: value} of an archive with a few random images."""
    archive, members = archives.ARCHIVES[name], {}
    for seed, member in enumerate(archive.train + archive.test):
        rng, count = np.random.default_rng(seed), 7 + seed
        members[member] = {
            "batch_label": "a batch",
            "filenames": [f"image_{i}.png" for i in range(count)],
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "coarse_labels": rng.integers(0, 20, count).tolist(),
            archive.label_key: rng.integers(0, archive.num_classes, count).tolist(),
        }
    classes = [f"class_{i}" for i in range(archive.num_classes)]
    members[archive.meta] = {archive.names_key: classes, "num_vis": 3072}
    return members


def write_archive(path, folder, members, extra=()):
    """A .tar.gz of a folder with members: values, or raw bytes; extra: TarInfos before them."""
    with tarfile.open(path, "w:gz") as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO())
        for member, value in members.items():
            raw = value if isinstance(value, bytes) else pickled(value)
            info = tarfile.TarInfo(f"{folder}/{member}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def publish(monkeypatch, name, raw):
    """Makes `raw` the published archive."""
    archive = archives.ARCHIVES[name]._replace(size=len(raw), md5=hashlib.md5(raw).hexdigest())
    monkeypatch.setitem(archives.ARCHIVES, name, archive)


@pytest.fixture
def make_archive(tmp_path, monkeypatch):
    """make_archive(name, edit, extra) publishes a small archive and returns (path, contents)."""

    def make(name="cifar10", edit=None, extra=(), directory=tmp_path / "data"):
        contents, archive = archive_contents(name), archives.ARCHIVES[name]
        if edit:
            edit(contents)
        directory.mkdir(exist_ok=True)
        path = directory / archive.file
        write_archive(path, archive.folder, contents, extra)
        publish(monkeypatch, name, path.read_bytes())
        return path, contents

    return make
