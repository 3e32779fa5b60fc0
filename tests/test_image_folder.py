"""A folder of images is read as it is, or refused by name."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.batches import MEAN, STD, channels_last, same_batches
from helpers.errors import refused
from helpers.loading import load_together, train_with_little_memory
from PIL import Image, ImageOps

import data
from common import checkpoint, files
from common.errors import UserError
from data import Batches
from datasets import folder_cache, image_folder, residency
from datasets.examples import Examples
from datasets.pipeline import Pipeline

CACHE = ".cache-32px.images"
FILES = 10  # of the fixture `folder`


def soft_image(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def fit(image, size=32):
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def to_numpy(image):
    return image.permute(1, 2, 0).numpy()


@pytest.fixture
def folder(tmp_path):
    """Cats and dogs: three training and two test images each, of several sizes and two formats."""
    root, seed = tmp_path / "pets", 0
    for part, names in (("train", ["0.png", "1.jpg", "2.png"]), ("test", ["0.png", "1.jpg"])):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for name, size in zip(names, ((40, 48), (64, 36), (50, 50))):
                soft_image(*size, seed).save(root / part / label / name)
                seed += 1
    return root


def load(root, image_size=32, **options):
    return data.load("folder", root, image_size=image_size, **options)


def add_links(folder, count, part="train"):
    """More dogs that are links to one of them."""
    for i in range(count):
        os.link(folder / part / "dog" / "0.png", folder / part / "dog" / f"z{i}.png")


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded, in this order."""
    names, decode = [], image_folder.decode

    def recording(path, size):
        names.append(Path(path).name)
        return decode(path, size)

    monkeypatch.setattr(image_folder, "decode", recording)
    return names


# ---- decoding ----


def test_images_and_labels_are_in_their_places(folder):
    split = load(folder)
    assert (split.name, split.classes, split.notes) == ("pets", ("cat", "dog"), ())
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert split.test.labels.tolist() == [0, 0, 1, 1]
    assert channels_last(split.train.images)
    for part, name in ((split.train, "train"), (split.test, "test")):
        for image, path in zip(part.images, sorted((folder / name).rglob("*.*")), strict=True):
            with Image.open(path) as original:
                difference = to_numpy(image).astype(int) - fit(original)
            assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("image_size, stored", [(16, 16), (48, 48), (50, 50), (64, 50), (224, 50)])
def test_images_are_stored_no_larger_than_they_are(folder, image_size, stored):
    # The largest shorter side is 50.
    assert load(folder, image_size).train.images.shape == (6, 3, stored, stored)


def test_an_image_of_the_right_size_is_unchanged(tmp_path):
    image = soft_image(24, 24)
    image.save(tmp_path / "a.png")
    assert np.array_equal(image_folder.decode(tmp_path / "a.png", 24), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    expected = soft_image(24, 24).convert("L" if mode == "I;16" else mode)
    image, path, tolerance = expected, tmp_path / "a.png", 0
    if mode == "I;16":
        image = Image.fromarray(np.asarray(expected).astype(np.uint16) * 257)
    if mode == "CMYK":
        path, tolerance = tmp_path / "a.jpg", 8  # JPEG is lossy
    image.save(path, quality=100)
    out = image_folder.decode(path, 24)
    assert out.shape == (24, 24, 3) and out.dtype == np.uint8
    assert np.abs(out.astype(int) - np.asarray(expected.convert("RGB"))).max() <= tolerance


UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_are_turned_upright(tmp_path, orientation):
    upright, path = soft_image(48, 32), tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(UNDO_ORIENTATION[orientation]) if orientation > 1 else upright
    stored.save(path, exif=exif)
    assert np.array_equal(image_folder.decode(path, 32), fit(upright))


def test_loading_changes_no_warning_filter(folder):
    path = folder / "train" / "cat" / "clear.png"
    Image.new("P", (30, 30)).save(path, transparency=b"\x00\x7f" * 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        load(folder)
        assert warnings.filters == before


# ---- unreadable images ----


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "text":
        path.write_text("this is not an image")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        # A PNG whose header claims more pixels than Pillow ("vast") or we ("large") accept.
        raw, side = bytearray(path.read_bytes()), 60000 if how == "vast" else 8000
        raw[16:24] = struct.pack(">II", side, side)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        path.write_bytes(raw)


REASONS = {
    "truncated": "truncated",
    "text": "cannot identify image file)",
    "empty": "cannot identify image file)",
    "vast": "pixels",
    "large": "it claims 8000x8000 pixels)",
}


@pytest.mark.parametrize("how", REASONS)
def test_an_unreadable_image_is_named_and_refused(folder, how):
    path = folder / "train" / "dog" / "a name with spaces.png"
    soft_image(60, 60).save(path)
    spoil(path, how)
    with refused(f"{path} can't be read as an image (", REASONS[how], "--skip-bad-images"):
        load(folder)
    assert sorted(os.listdir(folder)) == ["test", "train"]


@pytest.mark.parametrize("how", ["vast", "large"])
def test_an_image_that_claims_too_much_is_not_decoded(folder, monkeypatch, how):
    path = folder / "train" / "dog" / "0.png"
    spoil(path, how)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert isinstance(image_folder.decode(path, 32), str)
    with refused(f"{path} can't be read"):
        load(folder)


def test_unreadable_images_are_skipped_on_request(folder, decoded):
    bad = {"train/cat/0.png": "text", "train/dog/2.png": "truncated", "test/dog/0.png": "vast"}
    for name, how in bad.items():
        spoil(folder / name, how)
    paths = sorted((folder / "train").rglob("*.*"))
    readable = [path for path in paths if str(path.relative_to(folder)) not in bad]
    for _ in range(2):  # the second time from the cache
        split = load(folder, skip_bad_images=True)
        assert split.train.labels.tolist() == [0, 0, 1, 1]
        assert split.test.labels.tolist() == [0, 0, 1]
        (note,) = split.notes
        assert note.startswith(f"3 unreadable images were left out, the first is {folder}")
    assert len(decoded) == 8  # not those with a bad header
    for image, path in zip(split.train.images, readable, strict=True):
        assert np.array_equal(to_numpy(image), image_folder.decode(path, 32))
    with refused(str(folder), "can't be read as an image"):  # the cache is that of other options
        load(folder)


def test_a_part_without_readable_images_is_refused(folder):
    for path in (folder / "test").rglob("*.*"):
        spoil(path, "text")
    with refused("no image for test could be read"):
        load(folder, skip_bad_images=True)


def test_a_refusal_does_not_wait_for_other_images(folder, monkeypatch):
    add_links(folder, 200)
    bad = folder / "train" / "cat" / "0.png"
    spoil(bad, "truncated")
    decode, calls = image_folder.decode, []

    def slow(*arguments):
        calls.append(time.sleep(0.005))
        return decode(*arguments)

    monkeypatch.setattr(image_folder, "decode", slow)
    with refused(bad, "can't be read"):
        load(folder)
    assert len(calls) < 100


# ---- the cache ----


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


class Hostile:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


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


def test_a_folder_without_write_access_is_read(folder):
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user can write everywhere")
        split = load(folder)
    finally:
        folder.chmod(0o755)
    assert len(split.train) == 6 and "no cache" in split.notes[0]
    assert sorted(os.listdir(folder)) == ["test", "train"]


def test_without_space_while_writing_images_stay_in_memory(folder, monkeypatch):
    def full(path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replacing", full)
    split = load(folder)
    (note,) = split.notes
    assert len(split.train) == 6 and note.startswith("no cache") and "No space left" in note


def test_space_is_checked_before_decoding(folder, decoded, monkeypatch):
    expected = load(folder).train.images.clone()
    (folder / CACHE).unlink()
    decoded.clear()

    def disk_usage(path):
        decoded.append("disk usage")
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    split = load(folder)
    assert decoded[0] == "disk usage" and len(decoded) == 1 + FILES
    assert torch.equal(split.train.images, expected) and not split.train.cached
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


# ---- listing ----


def test_other_files_are_ignored(folder):
    (folder / "train" / ".hidden").mkdir()
    names = "notes.txt", "train/readme.md", "train/cat/list.csv", "train/cat/._0.png"
    for name in (*names, "train/.hidden/0.png"):
        (folder / name).write_text("not an image")
    (folder / "train" / "cat" / "directory.png").mkdir()
    (folder / "train" / "dog" / "0.png").rename(folder / "train" / "dog" / "0.PNG")
    split = load(folder)
    assert len(split.train) == 6 and split.classes == ("cat", "dog")


def test_a_name_that_is_not_unicode_is_read(folder):
    path = os.fsencode(folder / "train" / "dog") + b"/\xff.png"
    try:
        os.link(folder / "train" / "dog" / "0.png", path)
    except OSError:
        pytest.skip("this file system takes only unicode names")
    assert len(load(folder).train) == 7 and len(load(folder).train) == 7


def test_val_stands_in_for_test(folder):
    expected = load(folder).test.images.clone()
    (folder / "test").rename(folder / "val")
    split = load(folder)
    assert torch.equal(split.test.images, expected) and split.val is None


def test_a_class_without_test_images_can_be_trained(folder):
    shutil.rmtree(folder / "test" / "dog")
    split = load(folder)
    assert split.classes == ("cat", "dog") and split.test.labels.tolist() == [0, 0]


FORM = "train/<class>/*.png|jpg and test/ (or val/)"


@pytest.mark.parametrize(
    "removed, messages",
    [
        (["."], ("there is no folder ", FORM)),
        (["train"], ("there is no folder ", "train", FORM)),
        (["test"], ("there is no folder ", FORM)),
        (["train/cat", "train/dog"], ("train holds no images (.bmp, .jpeg",)),
        (["train/cat/*"], ("train/cat holds no images (.bmp, .jpeg",)),
        (["test/dog/*"], ("test/dog holds no images",)),
        (["train/dog"], ("test has classes that ", "train lacks: dog")),
        (["train/dog", "test/dog"], ("train has one class, 'cat'",)),
    ],
    ids=str,
)
def test_a_folder_of_another_form_is_refused(folder, removed, messages):
    for pattern in removed:
        for path in [folder] if pattern == "." else list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with refused("", *messages):
        load(folder)
    assert not list(folder.glob(".cache*"))
