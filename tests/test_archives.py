"""Archives are read exactly or refused; nothing hostile runs, and nothing is left behind."""

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from helpers.archives import archive_contents, pickled, publish
from helpers.batches import channels_last
from helpers.errors import refused
from helpers.hostile import Hostile

import data
from datasets import archives

NAMES = ("cifar10", "cifar100")


def assert_holds(part, members, label_key):
    """Each row holds the planes of red, green and blue, row by row."""
    rows = np.concatenate([member["data"] for member in members])
    assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
    assert channels_last(part.images)
    assert np.array_equal(part.images.reshape(len(rows), -1).numpy(), rows)
    for channel, y, x in ((0, 0, 0), (0, 0, 5), (1, 31, 30), (2, 7, 0), (2, 31, 31)):
        values = rows[:, channel * 1024 + y * 32 + x]
        assert np.array_equal(part.images[:, channel, y, x].numpy(), values)
    assert part.labels.tolist() == [label for member in members for label in member[label_key]]


@pytest.mark.parametrize("name", NAMES)
def test_an_archive_is_read_as_published(make_archive, name):
    path, contents = make_archive(name)
    split, archive = data.load(name, path.parent), archives.ARCHIVES[name]
    assert_holds(split.train, [contents[member] for member in archive.train], archive.label_key)
    assert_holds(split.test, [contents[member] for member in archive.test], archive.label_key)
    assert split.classes == tuple(f"class_{i}" for i in range(archive.num_classes))
    assert (split.name, split.val) == (name, None)
    assert (split.mean, split.std) == (archive.mean, archive.std)
    assert os.listdir(path.parent) == [path.name]  # nothing is unpacked


def test_pickles_of_python_3_are_read_too(make_archive):
    def edit(contents):
        contents.update({key: pickle.dumps(value, protocol=4) for key, value in contents.items()})

    path, _ = make_archive(edit=edit)
    members = [archive_contents("cifar10")["test_batch"]]
    assert_holds(data.load("cifar10", path.parent).test, members, "labels")


def test_a_wrong_digest_is_refused_before_opening(make_archive, monkeypatch):
    path, _ = make_archive()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    monkeypatch.setattr(tarfile, "open", None)
    right = archives.ARCHIVES["cifar10"].md5
    with refused(f"{path} is not the published cifar10 archive: md5 ", f"not {right}", "delete it"):
        data.load("cifar10", path.parent)


@pytest.mark.parametrize("kept", [0, 0.001, 0.5, 0.9])
def test_a_truncated_archive_is_refused(make_archive, monkeypatch, kept):
    path, _ = make_archive()
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw))])
    with refused(f"{path} is not the published cifar10 archive"):
        data.load("cifar10", path.parent)
    publish(monkeypatch, "cifar10", path.read_bytes())  # even if the digest is right
    with refused(f"{path} can't be read as the cifar10 archive"):
        data.load("cifar10", path.parent)


LABELS = [0, 1, 2, 3, 4, 5, 6]
UNKNOWN_CODEC = b"\x80\x02c_codecs\nencode\nU\x01aU\x06nosuch\x86R."


@pytest.mark.parametrize(
    "member, change, message",
    [
        ("test_batch", None, "it lacks test_batch"),
        ("batches.meta", None, "it lacks batches.meta"),
        ("data_batch_2", {"labels": [*LABELS, 10]}, "labels must be 0 to 9"),
        ("data_batch_2", {"labels": [*LABELS, -1]}, "labels must be 0 to 9"),
        ("data_batch_2", {"labels": [*LABELS, 2**70]}, "OverflowError"),
        ("data_batch_2", {"labels": LABELS}, "data_batch_2 has 8 images and 7 labels"),
        ("data_batch_2", {"labels": None}, "TypeError"),
        ("data_batch_2", {"data": np.zeros((8, 3071), np.uint8)}, "holds uint8 (8, 3071)"),
        ("data_batch_2", {"data": np.zeros((8, 3072), np.float32)}, "holds float32"),
        ("batches.meta", {"label_names": ["a", "b"]}, "2 class names"),
        ("test_batch", pickled({"data": 1}), "labels"),
        ("test_batch", pickled([1, 2]), "TypeError"),
        ("test_batch", b"not a pickle", ""),
        ("test_batch", b"", "EOFError"),
        ("test_batch", pickled({"labels": [0]})[:-9], "truncated"),
        ("test_batch", UNKNOWN_CODEC, "LookupError"),
    ],
)
def test_an_archive_with_other_contents_is_refused(make_archive, member, change, message):
    def edit(contents):
        if change is None:
            del contents[member]
        elif isinstance(change, dict):
            contents[member].update(change)
        else:
            contents[member] = change

    path, _ = make_archive(edit=edit)
    with refused(f"{path} can't be read as the cifar10 archive (", message):
        data.load("cifar10", path.parent)


@pytest.mark.parametrize(
    "name, kind, target",
    [
        ("../x", tarfile.REGTYPE, ""),
        ("cifar-10-batches-py/../../x", tarfile.REGTYPE, ""),
        ("/tmp/x", tarfile.REGTYPE, ""),
        ("cifar-10-batches-py/x", tarfile.SYMTYPE, "/etc/passwd"),
        ("cifar-10-batches-py/test_batch", tarfile.SYMTYPE, "../../x"),
        ("cifar-10-batches-py/x", tarfile.LNKTYPE, "../x"),
        ("cifar-10-batches-py/x", tarfile.CHRTYPE, ""),
        ("cifar-10-batches-py/x", tarfile.BLKTYPE, ""),
        ("cifar-10-batches-py/x", tarfile.FIFOTYPE, ""),
    ],
)
def test_a_hostile_member_is_refused_and_nothing_written(
    make_archive, tmp_path, name, kind, target
):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    path, _ = make_archive(extra=[info])
    before = sorted(tmp_path.rglob("*"))
    with refused(f"{path} can't be read", f"member {name!r} is not a plain file"):
        data.load("cifar10", path.parent)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("function", [open, os.system, eval, np.fromfile, np.load])
@pytest.mark.parametrize("pickler", [pickled, pickle.dumps], ids=["Python 2", "Python 3"])
def test_a_pickle_that_runs_code_is_refused(make_archive, tmp_path, function, pickler):
    sentinel = tmp_path / "sentinel"
    command = Hostile(f"touch {sentinel}", function)
    hostile = Hostile(sentinel, open, "w") if function is open else command
    raw = pickler({"data": hostile, "labels": [0]})
    path, _ = make_archive(edit=lambda contents: contents.update(data_batch_3=raw))
    with refused(f"{path} can't be read as", "(UnpicklingError: refused: ", "could run code"):
        data.load("cifar10", path.parent)
    assert not sentinel.exists()
