"""The cache of a folder of images is used, rebuilt when it must be, and never trusted."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.batches import MEAN, STD, channels_last, same_batches
from helpers.errors import refused
from helpers.hostile import Hostile
from helpers.loading import load_together, train_with_little_memory
from helpers.pets import CACHE, FILES, add_links, fit, load, soft_image, to_numpy

import data
from common import checkpoint, files
from common.errors import UserError
from data import Batches
from datasets import folder_cache, image_folder, locking, residency
from datasets.examples import Examples
from datasets.pipeline import Pipeline


def test_the_cache_is_used(folder, decoded):
    first = load(folder)
    assert len(decoded) == FILES and (folder / CACHE).is_file()
    again = load(folder)
    assert len(decoded) == FILES and again.notes == ()
    for old, new in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(old.images, new.images) and torch.equal(old.labels, new.labels)
    assert channels_last(again.train.images)
    load(folder, 24)
    assert len(decoded) == 2 * FILES  # another size has another cache
    load(folder)
    assert len(decoded) == 2 * FILES


def test_the_cache_is_rebuilt_when_files_change(folder, decoded):
    load(folder)
    soft_image(44, 44, 99).save(folder / "train" / "dog" / "new.png")
    assert load(folder).train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert len(decoded) == 2 * FILES + 1
    path = folder / "test" / "cat" / "0.png"
    status, replacement = path.stat(), soft_image(40, 48, 98)
    replacement.save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    assert np.array_equal(to_numpy(load(folder).test.images[0]), fit(replacement))
    path.unlink()
    assert len(load(folder).test) == 3
    for part in ("train", "test"):
        (folder / part / "dog").rename(folder / part / "hound")
    assert load(folder).classes == ("cat", "hound")


def garble(cache, image):
    """Zeroes 64 bytes of an image in the cache."""
    raw = cache.read_bytes()
    place = raw.index(to_numpy(image).tobytes()[:64])
    cache.write_bytes(raw[:place] + bytes(64) + raw[place + 64 :])


@pytest.mark.parametrize(
    "damage", ["truncated", "garbled", "header", "foreign", "empty", "hostile"]
)
def test_a_damaged_cache_is_rebuilt(folder, tmp_path, decoded, damage):
    cache, sentinel = folder / CACHE, tmp_path / "sentinel"
    expected = load(folder).train.images.clone()
    raw = cache.read_bytes()
    contents = {
        "truncated": raw[: len(raw) // 2],
        "header": raw.replace(b'"side": 32', b'"side": 64'),
        "empty": b"",
        "hostile": pickle.dumps(Hostile(sentinel)),
    }
    if damage == "garbled":
        garble(cache, expected[-1])
    elif damage == "foreign":
        checkpoint.save({"state_dict": {}}, cache)
    else:
        cache.write_bytes(contents[damage])
    again = load(folder)
    assert torch.equal(expected, again.train.images) and len(decoded) == 2 * FILES
    (note,) = again.notes
    assert note.startswith(f"the cache is rebuilt: {cache} is damaged (")
    assert not sentinel.exists()
    assert load(folder).notes == () and len(decoded) == 2 * FILES


@pytest.mark.parametrize("resident", ["device", "host"])
def test_damage_of_a_large_cache_is_noticed_on_reading(folder, decoded, monkeypatch, resident):
    monkeypatch.setattr(folder_cache, "CHECKED_AT_ONCE", 0)
    expected = load(folder).train.images.clone()
    garble(folder / CACHE, expected[-1])
    split = load(folder)
    assert split.notes == () and len(decoded) == FILES
    pipeline = Pipeline(MEAN, STD, 32)
    batches = Batches(split.train, 1, pipeline, shuffle=False, resident=resident).epoch(0)
    for _ in range(5):
        next(batches)
    with refused(folder / CACHE, "is damaged (", "image 5", "--resume"):
        next(batches)
    assert torch.equal(load(folder).train.images, expected) and len(decoded) == 2 * FILES


FORGED_HEADERS = [
    {"count": 10**18}, {"count": 11}, {"count": "10"}, {"side": -1}, {"side": 2**70},
    {"side": 32.0}, {"format": 2}, {"listing": None}, {"unreadable": [[]]}, {"unreadable": 1},
    [], None,
]  # fmt: skip


@pytest.mark.parametrize("forged", FORGED_HEADERS, ids=str)
def test_a_forged_header_is_refused(folder, forged):
    load(folder)
    path, trailer = folder / CACHE, folder_cache.TRAILER
    raw = path.read_bytes()
    _, length, magic = trailer.unpack(raw[-trailer.size :])
    header_start = len(raw) - trailer.size - length
    header = json.loads(raw[header_start : -trailer.size])
    changed = json.dumps(header | forged if isinstance(forged, dict) else forged).encode()
    table = raw[header_start - FILES * 8 * folder_cache.COLUMNS : header_start]
    digest = hashlib.sha256(table + changed).digest()
    path.write_bytes(raw[:header_start] + changed + trailer.pack(digest, len(changed), magic))
    if forged == {"listing": None}:  # of another folder
        assert folder_cache.read(path, header["listing"]) is None
    else:
        with refused(path, "is damaged ("):
            folder_cache.read(path, header["listing"])


def test_an_interrupted_build_leaves_nothing(folder, monkeypatch):
    def interrupt(path, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_folder, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert sorted(os.listdir(folder)) == ["test", "train"]


def test_decoding_waits_for_a_slow_disk(folder, decoded, monkeypatch):
    add_links(folder, 200)

    def write(path, listing, side, results, count):
        assert next(results) and count == 210
        raise UserError("enough")

    monkeypatch.setattr(folder_cache, "write", write)
    with refused("enough"):
        load(folder)
    assert len(decoded) <= image_folder.AHEAD + 1


def test_the_cache_of_an_older_version_is_removed(folder):
    for name in (".cache-32px.pt", ".cache-64px.pt", "..cache-64px.pt.77.tmp"):
        (folder / name).write_bytes(bytes(5_000_000))
    notes = load(folder).notes
    assert len(notes) == 2
    assert all(".pt (0.01 GB), the cache of an older version" in note for note in notes)
    assert sorted(os.listdir(folder)) == [CACHE, "test", "train"] and load(folder).notes == ()


def in_memory(examples):
    return Examples(examples.images.clone(), examples.labels)


@pytest.mark.parametrize("options", [dict(), dict(limit_train=4), dict(val_size=2)], ids=str)
@pytest.mark.parametrize("resident", ["device", "host", "auto"])
@pytest.mark.parametrize("free", [0, 2**40])
def test_cached_batches_are_those_from_memory(folder, monkeypatch, options, resident, free):
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"), num_classes=2, mixup_alpha=0.4)
    examples = load(folder, **options).train
    expected = Batches(in_memory(examples), 2, pipeline, seed=3)
    monkeypatch.setattr(residency, "available", lambda device: free)
    batches = Batches(examples, 2, pipeline, seed=3, resident=resident)
    assert batches.streamed == (resident == "host" or (resident == "auto" and not free))
    assert same_batches(batches.epoch(1), expected.epoch(1))


@pytest.mark.gpu
@pytest.mark.parametrize("resident", ["device", "host"])
def test_cached_batches_are_those_from_memory_on_a_gpu(folder, resident):
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"))
    examples = load(folder, val_size=2).train
    expected = Batches(in_memory(examples), 2, pipeline, device="cuda")
    batches = Batches(examples, 2, pipeline, device="cuda", resident=resident)
    assert same_batches(batches.epoch(1), expected.epoch(1))


def test_a_cached_folder_is_opened_without_reading_images(folder, decoded, monkeypatch):
    add_links(folder, 50)
    add_links(folder, 50, "test")
    monkeypatch.setattr(folder_cache, "CHECKED_AT_ONCE", 0)
    statistics = data.channel_statistics(in_memory(load(folder).train))
    decoded.clear()
    gathered, checked, opened = [], [], []
    gather, crc32, real_open = folder_cache.CachedImages.gather, zlib.crc32, open

    def recording_gather(self, index, out=None):
        gathered.extend(index)
        return gather(self, index, out)

    def recording_crc32(image):
        checked.append(1)
        return crc32(image)

    def recording_open(file, *arguments):
        opened.append(Path(file).name)
        return real_open(file, *arguments)

    monkeypatch.setattr(folder_cache.CachedImages, "gather", recording_gather)
    monkeypatch.setattr(folder_cache.zlib, "crc32", recording_crc32)
    monkeypatch.setattr(image_folder, "_shorter_side", lambda path: pytest.fail("opened an image"))
    monkeypatch.setattr("builtins.open", recording_open)
    split = load(folder, val_size=6, limit_train=40)
    assert (len(split.train), len(split.val), len(split.test)) == (34, 6, 54)
    assert not gathered and not checked and not decoded and opened == [CACHE]
    everything = load(folder)
    assert (everything.mean, everything.std) == statistics
    next(Batches(split.train, 4, Pipeline(MEAN, STD, 32)).epoch(0))
    assert len(gathered) == len(checked) == 4


def test_four_processes_decode_a_folder_once(folder):
    (folder / f".{CACHE}.1.tmp").write_bytes(b"half")  # left by a process that was killed
    loads = load_together(4, "folder", folder)
    assert len({digest for digest, _ in loads}) == 1 and sum(count for _, count in loads) == 1
    assert sorted(os.listdir(folder)) == [CACHE, "test", "train"]


def test_a_folder_without_write_access_is_read(folder, monkeypatch):
    """Neither a lock nor a cache can be created in it."""

    def deny(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locking.FileLock, "acquire", deny)
    monkeypatch.setattr(files, "open_file", deny)
    split = load(folder)
    (note,) = split.notes
    assert len(split.train) == 6 and note.startswith("no cache") and "Permission denied" in note
    assert sorted(os.listdir(folder)) == ["test", "train"]


def test_waiting_for_another_process_is_said(tmp_path, monkeypatch, capsys):
    def acquire(lock, timeout=None):
        timeouts.append(timeout)
        if timeout is not None:
            raise locking.Timeout(lock.lock_file)

    timeouts = []
    monkeypatch.setattr(locking.FileLock, "acquire", acquire)
    with locking.writing(tmp_path / "x"):
        assert timeouts == [locking.SILENT_SECONDS, None]
    assert capsys.readouterr().err.startswith("waiting for another process, which holds")


def test_without_space_while_writing_images_stay_in_memory(folder, monkeypatch):
    def full(path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replacing", full)
    split = load(folder)
    (note,) = split.notes
    assert len(split.train) == 6 and note.startswith("no cache") and "No space left" in note


def test_space_is_checked_before_decoding(folder, decoded, monkeypatch):
    cached = load(folder)
    expected = cached.train.images.clone()
    (folder / CACHE).unlink()
    decoded.clear()

    def disk_usage(path):
        decoded.append("disk usage")
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    split = load(folder)
    assert decoded[0] == "disk usage" and len(decoded) == 1 + FILES
    assert torch.equal(split.train.images, expected) and not split.train.cached
    assert split.digest == cached.digest
    assert sorted(os.listdir(folder)) == ["test", "train"]
    (note,) = split.notes
    assert "0.00 GB are free); the images are kept in memory" in note
    decoded.clear()
    # Ten images of 32 px need 30,720 bytes.
    monkeypatch.setattr(image_folder, "available", lambda device: 30_000)
    with refused(folder / CACHE, "could not be written (", "in memory the images need 0.00"):
        load(folder)
    assert decoded == ["disk usage"]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="mapped files are exempt from limits on Linux only"
)
def test_a_folder_larger_than_memory_is_trained_on(tmp_path):
    root = tmp_path / "pets"
    for part, count in (("train", 199), ("test", 1)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            soft_image(384, 384, len(label + part)).save(root / part / label / "0.png")
            for i in range(1, count + 1):
                os.link(root / part / label / "0.png", root / part / label / f"{i}.png")
    decoding, cached = (train_with_little_memory(root, 384, megabytes=110) for _ in range(2))
    assert decoding == cached and decoding[0] > 155e6
