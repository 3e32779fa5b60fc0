"""A folder of pictures is read as it is, or refused by name."""

import hashlib
import json
import os
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
from conftest import refused
from PIL import Image, ImageOps
from processes import load_data, memory_limit, train_linear
from test_checkpoint import Hostile

import data
from common import checkpoint, files
from common.errors import UserError
from data import Batches
from datasets import folder_cache
from datasets.augment import Pipeline
from datasets.examples import Examples

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CACHE = ".cache-32px.images"
AUGMENTED = dict(
    num_classes=10, cutout_size=9, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.7
)


def soft_picture(width, height, seed=0, mode="RGB"):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """cat and dog, three pictures each to train on, two to test on, of several sizes and two formats."""
    root = tmp_path / "pets"
    for seed, (part, label, i) in enumerate(
        (part, label, i)
        for part, n in (("train", 3), ("test", 2))
        for label in ("cat", "dog")
        for i in range(n)
    ):
        directory = root / part / label
        directory.mkdir(parents=True, exist_ok=True)
        picture = soft_picture(*((40, 48), (64, 36), (50, 50))[i], seed)
        picture.save(directory / (f"{i}.jpg" if i == 1 else f"{i}.png"))
    return root


def load(root, image_size=32, **options):
    return data.load("folder", root, image_size=image_size, **options)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that are decoded, as they come."""
    names, decode = [], folder.decode
    monkeypatch.setattr(
        folder, "decode", lambda path, size: names.append(Path(path).name) or decode(path, size)
    )
    return names


def test_pictures_and_labels_are_in_their_places(folder):
    split = load(folder)
    assert (split.name, split.classes, split.notes) == ("pets", ("cat", "dog"), ())
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and split.test.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert split.train.images.is_contiguous(memory_format=torch.channels_last)
    for part, name in ((split.train, "train"), (split.test, "test")):
        paths = sorted(path for path in (folder / name).rglob("*.*"))
        for image, path in zip(part.images, paths, strict=True):
            with Image.open(path) as picture:
                side = min(picture.size)
                left, top = (picture.width - side) / 2, (picture.height - side) / 2
                expected = picture.resize(
                    (32, 32), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
                )
            assert (
                np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1
            )


def test_statistics_of_a_folder_are_those_of_its_training_pictures(folder):
    for path in (folder / "test").rglob("*.*"):
        Image.new("RGB", (40, 40), "white").save(path)
    split = load(folder)
    pixels = split.train.images.numpy() / 255
    np.testing.assert_allclose(split.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(split.std, pixels.std((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("image_size, stored", [(16, 16), (48, 48), (50, 50), (64, 50), (224, 50)])
def test_pictures_are_stored_no_larger_than_they_are(folder, image_size, stored):
    assert load(folder, image_size).train.images.shape == (
        6,
        3,
        stored,
        stored,
    )  # the largest shorter side is 50


def only(tmp_path, picture, name="a.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def test_a_picture_of_the_right_size_is_kept_to_the_bit(tmp_path):
    picture = soft_picture(24, 24)
    assert np.array_equal(folder.decode(only(tmp_path, picture), 24), np.asarray(picture))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    picture = soft_picture(24, 24)
    if mode == "I;16":
        expected = picture.convert("L")
        values = np.asarray(expected).astype(np.uint16)
        picture = Image.fromarray(values * 256 + values)
    elif mode == "P":
        picture = picture.quantize(64)
        expected = picture
    else:
        picture = expected = picture.convert(mode)
    path = only(
        tmp_path,
        picture,
        "a.jpg" if mode == "CMYK" else "a.png",
        **({"quality": 100} if mode == "CMYK" else {}),
    )
    out = folder.decode(path, 24)
    assert out.shape == (24, 24, 3) and out.dtype == np.uint8
    difference = np.abs(out.astype(int) - np.asarray(expected.convert("RGB")))
    assert difference.max() <= (8 if mode == "CMYK" else 0)  # JPEG loses a little


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_set_upright(tmp_path, orientation):
    upright = soft_picture(48, 32)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    lying = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = folder.decode(only(tmp_path, lying, "a.png", exif=exif), 32)
    assert np.array_equal(
        out, np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.BICUBIC))
    )


def test_the_cache_is_used(folder, decoded):
    first = load(folder)
    assert len(decoded) == 10 and (folder / CACHE).is_file()
    again = load(folder)
    assert len(decoded) == 10 and again.notes == ()
    for part in ("train", "test"):
        for field in ("images", "labels"):
            assert torch.equal(
                getattr(getattr(first, part), field), getattr(getattr(again, part), field)
            )
    assert again.train.images.is_contiguous(memory_format=torch.channels_last)
    load(folder, 24)
    assert len(decoded) == 20  # another size has another cache
    load(folder)
    assert len(decoded) == 20


def test_the_cache_is_made_again_when_a_file_changes(folder, decoded):
    load(folder)
    soft_picture(44, 44, 99).save(folder / "train" / "dog" / "new.png")
    assert load(folder).train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and len(decoded) == 21
    path = folder / "test" / "cat" / "0.png"
    status = path.stat()
    soft_picture(40, 48, 98).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    before = len(decoded)
    changed = load(folder)
    assert len(decoded) == before + 11
    expected = ImageOps.fit(soft_picture(40, 48, 98), (32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(changed.test.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    path.unlink()
    assert len(load(folder).test) == 3
    (folder / "train" / "dog").rename(folder / "train" / "hound")
    (folder / "test" / "dog").rename(folder / "test" / "hound")
    assert load(folder).classes == ("cat", "hound")


def garble(cache, images):
    """Zeroes 64 bytes of an image in the cache; its size stays."""
    raw = cache.read_bytes()
    middle = raw.index(images.permute(0, 2, 3, 1)[-1].numpy().tobytes()[:64])
    cache.write_bytes(raw[:middle] + bytes(64) + raw[middle + 64 :])


@pytest.mark.parametrize(
    "damage", ["truncated", "garbled", "header", "foreign", "empty", "hostile"]
)
def test_a_damaged_cache_is_made_again(folder, tmp_path, decoded, damage):
    first, cache = load(folder), folder / CACHE
    expected = first.train.images.clone()
    raw = cache.read_bytes()
    if damage == "truncated":
        cache.write_bytes(raw[: len(raw) // 2])
    elif damage == "garbled":
        garble(cache, expected)
    elif damage == "header":
        place = raw.index(b'"side": 32')
        cache.write_bytes(raw[:place] + b'"side": 64' + raw[place + 10 :])
    elif damage == "foreign":
        checkpoint.save({"state_dict": {}}, cache)
    elif damage == "empty":
        cache.write_bytes(b"")
    else:
        torch.save({"format": 1, "digest": "", "contents": Hostile(tmp_path / "sentinel")}, cache)
    again = load(folder)
    assert torch.equal(expected, again.train.images) and len(decoded) == 20
    (note,) = again.notes
    assert (
        note.startswith(f"the cache was made again: {cache} is damaged (")
        and not (tmp_path / "sentinel").exists()
    )
    assert load(folder).notes == () and len(decoded) == 20


@pytest.mark.parametrize("resident", ["device", "host"])
def test_damage_of_a_large_cache_is_found_when_the_image_is_read(
    folder, decoded, monkeypatch, resident
):
    monkeypatch.setattr(folder_cache, "CHECKED_AT_ONCE", 0)
    expected = load(folder).train.images.clone()
    garble(folder / CACHE, expected)
    split = load(folder)
    assert split.notes == () and len(decoded) == 10
    batches = Batches(
        split.train, 1, Pipeline(MEAN, STD, 32), shuffle=False, resident=resident
    ).epoch(0)
    assert len([next(batches) for _ in range(5)]) == 5  # the last one is damaged
    with refused(folder / CACHE, "is damaged (image 5", "--resume"):
        next(batches)
    assert torch.equal(load(folder).train.images, expected) and len(decoded) == 20


@pytest.mark.parametrize(
    "forged",
    [
        {"count": 10**18},
        {"count": 11},
        {"side": -1},
        {"side": 2**70},
        {"count": "10"},
        {"side": 32.0},
        {"format": 2},
        {"listing": None},
        {"unreadable": [[]]},
        {"unreadable": 1},
        [],
        None,
    ],
    ids=str,
)
def test_a_header_that_claims_something_else_is_refused(folder, forged):
    load(folder)
    path = folder / CACHE
    raw = path.read_bytes()
    _, length, magic = folder_cache.TRAILER.unpack(raw[-folder_cache.TRAILER.size :])
    end = len(raw) - folder_cache.TRAILER.size
    header = json.loads(raw[end - length : end])
    table = raw[end - length - 10 * 8 * folder_cache.COLUMNS : end - length]
    text = json.dumps(header | forged if isinstance(forged, dict) else forged).encode()
    trailer = folder_cache.TRAILER.pack(hashlib.sha256(table + text).digest(), len(text), magic)
    path.write_bytes(raw[: end - length] + text + trailer)
    if forged == {"listing": None}:  # of another folder
        assert folder_cache.read(path, header["listing"]) is None
    else:
        with refused(path, "is damaged ("):
            folder_cache.read(path, header["listing"])


def test_an_interrupted_build_leaves_nothing(folder, monkeypatch):
    def interrupt(path, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert sorted(os.listdir(folder)) == ["test", "train"]


def test_decoding_waits_for_what_is_written(folder, decoded, monkeypatch):
    """On a slow disk the decoded images don't pile up in memory."""
    for i in range(200):
        os.link(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / f"z{i}.png")

    def write(path, listing, side, results, count):
        assert next(results) and count == 210
        raise UserError("enough")

    monkeypatch.setattr(folder_cache, "write", write)
    with refused("enough"):
        load(folder)
    assert len(decoded) <= folder.AHEAD + 1


def test_the_cache_of_an_older_version_is_removed_and_said(folder):
    for name in (".cache-32px.pt", ".cache-64px.pt", "..cache-64px.pt.77.tmp"):
        (folder / name).write_bytes(bytes(5_000_000))
    notes = load(folder).notes
    assert len(notes) == 2 and all(
        ".pt (0.01 GB), the cache of an older version" in note for note in notes
    )
    assert sorted(os.listdir(folder)) == [CACHE, "test", "train"] and load(folder).notes == ()


@pytest.mark.parametrize("options", [dict(), dict(limit_train=4), dict(val_size=2)], ids=str)
@pytest.mark.parametrize("resident", ["device", "host", "auto"])
def test_a_cached_folder_gives_the_batches_of_images_in_memory(
    folder, monkeypatch, options, resident
):
    """Read from the file ahead of the step, or when it asks: the same bits."""
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"), num_classes=2, mixup_alpha=0.4)
    split = load(folder, **options)
    in_memory = Examples(split.train.images.clone(), split.train.labels)
    expected = list(Batches(in_memory, 2, pipeline, seed=3).epoch(1))
    for free in (0, 2**40):
        monkeypatch.setattr(data, "available", lambda device, free=free: free)
        batches = Batches(split.train, 2, pipeline, seed=3, resident=resident)
        assert batches.streamed == (resident == "host" or (resident == "auto" and not free))
        found = list(batches.epoch(1))
        assert len(found) == len(expected)
        assert all(
            torch.equal(a, b) for ours, theirs in zip(found, expected) for a, b in zip(ours, theirs)
        )


@pytest.mark.gpu
def test_a_cached_folder_gives_the_same_bits_on_a_gpu(folder):
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"))
    split = load(folder, val_size=2)
    in_memory = Examples(split.train.images.clone(), split.train.labels)
    expected = list(Batches(in_memory, 2, pipeline, device="cuda").epoch(1))
    for resident in ("device", "host"):
        found = list(Batches(split.train, 2, pipeline, device="cuda", resident=resident).epoch(1))
        assert all(
            torch.equal(a, b) for ours, theirs in zip(found, expected) for a, b in zip(ours, theirs)
        )


def test_a_cached_folder_is_opened_without_reading_its_images(folder, decoded, monkeypatch):
    """Neither images nor the files of the folder: a stat of each file, the table, and the images of the batches themselves."""
    for part in ("train", "test"):
        for i in range(50):
            os.link(folder / part / "dog" / "0.png", folder / part / "dog" / f"link {i}.png")
    monkeypatch.setattr(folder_cache, "CHECKED_AT_ONCE", 0)
    first = load(folder)
    counted = data.channel_statistics(first.train.images)
    del decoded[:]
    read, opened = [], []
    gather, crc32, real_open = folder_cache.CachedImages.gather, zlib.crc32, open
    monkeypatch.setattr(
        folder_cache.CachedImages,
        "gather",
        lambda self, i, out=None: read.extend(i) or gather(self, i, out),
    )
    monkeypatch.setattr(folder_cache.zlib, "crc32", lambda image: read.append(1) or crc32(image))
    monkeypatch.setattr(folder, "_shorter_side", lambda path: pytest.fail("opened an image"))
    monkeypatch.setattr(
        "builtins.open",
        lambda file, *rest: opened.append(Path(file).name) or real_open(file, *rest),
    )
    split = load(folder, val_size=6, limit_train=40)
    assert (len(split.train), len(split.val), len(split.test)) == (34, 6, 54)
    assert not read and not decoded and opened == [CACHE]
    assert load(folder).mean == counted[0] and load(folder).std == counted[1]
    batches = Batches(split.train, 4, Pipeline(MEAN, STD, 32)).epoch(0)
    next(batches)
    assert len(read) == 8  # each of the batch's four images, and its checksum


def test_four_processes_that_lack_the_cache_make_it_once(folder, tmp_path, forks):
    (folder / f".{CACHE}.1.tmp").write_bytes(b"half")  # of a process that was killed
    until, notes = tmp_path / "until", tmp_path / "notes"
    processes = [
        forks.start(faults=[load_data("folder", folder, None, None, until, notes)])
        for _ in range(4)
    ]
    until.touch()
    ended = [process.wait() for process in processes]
    assert [(done.returncode, done.err) for done in ended] == [(0, "")] * 4
    assert len({done.out for done in ended}) == 1 and notes.read_text() == "decoded\n"
    assert sorted(os.listdir(folder)) == [CACHE, "test", "train"]
    assert len(load(folder).train) == 6 and notes.read_text() == "decoded\n"


def test_a_folder_that_can_not_be_written_is_read(folder):
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user can write everywhere")
        split = load(folder)
    finally:
        folder.chmod(0o755)
    assert (
        len(split.train) == 6
        and "no cache" in split.notes[0]
        and sorted(os.listdir(folder)) == ["test", "train"]
    )


def test_without_room_for_a_cache_the_pictures_are_read(folder, monkeypatch):
    def full(path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replacing", full)
    split = load(folder)
    assert len(split.train) == 6 and len(split.notes) == 1
    assert (
        "no cache" in split.notes[0]
        and "No space left" in split.notes[0]
        and "\n" not in split.notes[0]
    )


def test_room_on_the_disk_is_looked_for_before_anything_is_decoded(folder, decoded, monkeypatch):
    expected = load(folder).train.images.clone()
    (folder / CACHE).unlink()
    del decoded[:]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: decoded.append("looked") or SimpleNamespace(free=1000)
    )
    split = load(folder)
    assert (
        decoded.pop(0) == "looked"
        and len(decoded) == 10
        and torch.equal(split.train.images, expected)
    )
    assert not split.train.cached and sorted(os.listdir(folder)) == ["test", "train"]
    (note,) = split.notes
    assert (
        "0.00 GB are needed on the disk, 0.00 GB are free); the images are kept in memory" in note
    )
    monkeypatch.setattr(
        folder, "available", lambda device: 30_000
    )  # ten images of 32 px are 30,720 bytes
    del decoded[:]
    with refused(
        folder / CACHE,
        "could not be written (",
        "GB are needed on the disk",
        "in memory the images need 0.00 GB",
    ):
        load(folder)
    assert decoded == ["looked"]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux limits private memory apart from mapped files"
)
def test_a_folder_larger_than_the_memory_is_trained_on(tmp_path, forks):
    """Decoded, trained on and evaluated with less memory beyond the interpreter's than the images take."""
    root = tmp_path / "pets"
    for part, count in (("train", 130), ("test", 2)):
        for seed, label in enumerate(("cat", "dog")):
            directory = root / part / label
            directory.mkdir(parents=True)
            soft_picture(384, 384, seed).save(directory / "0.png")
            for i in range(1, count):
                os.link(directory / "0.png", directory / f"{i}.png")
    first, cached = (
        forks.run(faults=[memory_limit(70), train_linear(root, 384)]) for _ in range(2)
    )
    assert [(done.returncode, done.err) for done in (first, cached)] == [(0, "")] * 2
    assert first.out == cached.out and int(first.out.split()[0]) > 95e6


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "text":
        path.write_text("this is no picture")
    elif how == "empty":
        path.write_bytes(b"")
    else:  # a PNG whose header claims more pixels than Pillow accepts ("vast") or than we do
        raw, side = bytearray(path.read_bytes()), 60000 if how == "vast" else 8000
        raw[16:24] = struct.pack(">II", side, side)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        path.write_bytes(raw)


SPOILED = {
    "truncated": "truncated",
    "text": "cannot identify image file)",
    "empty": "cannot identify image file)",
    "vast": "pixels",
    "large": "it claims 8000x8000 pixels)",
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_unreadable_picture_is_named_and_refused(folder, how):
    path = folder / "train" / "dog" / "a name with spaces.png"
    soft_picture(60, 60).save(path)
    spoil(path, how)
    with refused(
        f"{path} can't be read as an image (",
        SPOILED[how],
        "--skip-bad-images leaves such files out",
    ):
        load(folder)
    assert sorted(os.listdir(folder)) == ["test", "train"]


@pytest.mark.parametrize("how", ["vast", "large"])
def test_a_picture_that_claims_too_much_is_not_decoded(folder, monkeypatch, how):
    path = folder / "train" / "dog" / "0.png"
    spoil(path, how)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert isinstance(folder._shorter_side(path), str) and isinstance(folder.decode(path, 32), str)


def test_unreadable_pictures_are_counted_and_left_out_on_request(folder, decoded):
    for name, how in (
        ("train/cat/0.png", "text"),
        ("train/dog/2.png", "truncated"),
        ("test/dog/0.png", "vast"),
    ):
        spoil(folder / name, how)
    for _ in range(2):  # the second time from the cache
        split = load(folder, skip_bad_images=True)
        assert split.train.labels.tolist() == [0, 0, 1, 1] and split.test.labels.tolist() == [
            0,
            0,
            1,
        ]
        (note,) = split.notes
        assert (
            note.startswith("3 unreadable images were left out, the first is ")
            and str(folder) in note
        )
    assert len(decoded) == 8  # not those whose headers were bad
    kept = [
        path
        for path in sorted((folder / "train").rglob("*.*"))
        if path.name != "0.png" or "dog" in str(path)
    ]
    kept = [path for path in kept if path.name != "2.png" or "cat" in str(path)]
    for image, path in zip(split.train.images, kept, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), folder.decode(path, 32))
    with refused(str(folder), "can't be read as an image"):  # the cache is that of another request
        load(folder)


def test_a_part_without_a_readable_picture_is_refused(folder):
    for path in (folder / "test").rglob("*.*"):
        spoil(path, "text")
    with refused("no image for test could be read"):
        load(folder, skip_bad_images=True)


def test_a_refusal_does_not_wait_for_the_rest(folder, monkeypatch):
    for i in range(200):
        os.link(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / f"z{i}.png")
    spoil(folder / "train" / "cat" / "0.png", "truncated")
    decode, calls = folder.decode, []
    monkeypatch.setattr(
        folder, "decode", lambda *args: calls.append(time.sleep(0.005)) or decode(*args)
    )
    with refused(folder / "train" / "cat" / "0.png", "can't be read"):
        load(folder)
    assert len(calls) < 100


def test_reading_changes_no_warning_filter(folder):
    Image.new("P", (30, 30)).save(
        folder / "train" / "cat" / "clear.png", transparency=b"\x00\x7f" * 128
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        load(folder)
        assert warnings.filters == before


def test_other_files_are_ignored(folder):
    for name in (
        "notes.txt",
        "train/readme.md",
        "train/cat/list.csv",
        "train/cat/._0.png",
        "train/.hidden/0.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no picture")
    (folder / "train" / "cat" / "folder.png").mkdir()
    (folder / "train" / "dog" / "0.png").rename(folder / "train" / "dog" / "0.PNG")
    split = load(folder)
    assert len(split.train) == 6 and split.classes == ("cat", "dog")


def test_a_name_that_is_no_unicode_is_read(folder):
    path = os.fsencode(folder / "train" / "dog") + b"/\xff.png"
    try:
        os.link(folder / "train" / "dog" / "0.png", path)
    except OSError:
        pytest.skip("this file system takes unicode only")
    assert len(load(folder).train) == 7 and len(load(folder).train) == 7


def test_val_stands_in_for_test(folder):
    expected = load(folder).test
    (folder / "test").rename(folder / "val")
    split = load(folder)
    assert torch.equal(split.test.images, expected.images) and split.val is None


def test_a_class_that_test_lacks_may_be_trained(folder):
    for path in (folder / "test" / "dog").iterdir():
        path.unlink()
    (folder / "test" / "dog").rmdir()
    split = load(folder)
    assert split.classes == ("cat", "dog") and split.test.labels.tolist() == [0, 0]


def delete(path):
    if path.is_dir():
        for each in path.iterdir():
            delete(each)
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda root: delete(root),
            ("there is no folder ", "train/<class>/*.png|jpg and test/ (or val/)"),
        ),
        (
            lambda root: delete(root / "train"),
            ("there is no folder ", "train", "train/<class>/*.png|jpg"),
        ),
        (
            lambda root: delete(root / "test"),
            ("there is no folder ", "train/<class>/*.png|jpg and test/ (or val/)"),
        ),
        (
            lambda root: [delete(root / "train" / name) for name in ("cat", "dog")],
            ("train holds no images (.bmp, .jpeg",),
        ),
        (
            lambda root: [delete(p) for p in (root / "train" / "cat").iterdir()],
            ("train/cat holds no images (.bmp, .jpeg",),
        ),
        (
            lambda root: [delete(p) for p in (root / "test" / "dog").iterdir()],
            ("test/dog holds no images",),
        ),
        (
            lambda root: delete(root / "train" / "dog"),
            ("test has classes that ", "train lacks: dog"),
        ),
        (
            lambda root: [delete(root / part / "dog") for part in ("train", "test")],
            ("train has one class, 'cat'",),
        ),
    ],
)
def test_a_folder_of_another_form_is_refused(folder, change, said):
    change(folder)
    with refused("", *said):
        load(folder)
    assert not list(folder.glob(".cache*"))


def test_pictures_of_different_sizes_make_batches(folder):
    split = load(folder, 64)
    pipeline = Pipeline(split.mean, split.std, 64, ["crop", "flip"])
    inputs, labels = next(Batches(split.train, 6, pipeline).epoch(0))
    assert inputs.shape == (6, 3, 64, 64) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
