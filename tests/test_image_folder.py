"""A folder of images is read as it is, or refused by name."""

import os
import shutil
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from helpers.batches import channels_last
from helpers.errors import refused
from helpers.pets import add_links, fit, load, soft_image, to_numpy
from helpers.training import resolve
from PIL import Image

import data
import train
from datasets import image_folder
from training.arguments import data_options

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


def test_the_images_of_a_run_have_the_size_that_it_asks_for(folder):
    args = resolve(train, "--model", "resnet20", "--dataset", "folder", "--image-size", 48)
    split = data.load(args.dataset, folder, **data_options(args))
    assert split.train.images.shape == (6, 3, 48, 48)


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
    "large": "it claims 8000x8000 pixels, more than the limit of 50,000,000)",
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


def test_a_file_of_another_format_is_not_opened(folder):
    """Pillow would start Ghostscript for PostScript, whatever the file's suffix is."""
    path = folder / "train" / "dog" / "0.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EOF\n")
    assert Image.open(path).format == "EPS"
    assert "cannot identify image file" in image_folder.decode(path, 32)


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
        assert note.startswith(f"unreadable images that were left out: 3, the first is {folder}")
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


def test_test_is_the_test_set_where_there_is_also_val(folder):
    expected = load(folder).test.images.clone()
    shutil.copytree(folder / "train", folder / "val")
    split = load(folder)
    assert torch.equal(split.test.images, expected) and split.val is None
    assert split.notes == (f"{folder}/val is not used: {folder}/test is the test set",)


def test_a_class_without_test_images_can_be_trained(folder):
    shutil.rmtree(folder / "test" / "dog")
    split = load(folder)
    assert split.classes == ("cat", "dog") and split.test.labels.tolist() == [0, 0]


LAYOUT = "train/<class>/*.png|jpg and test/ (or val/)"


@pytest.mark.parametrize(
    "removed, messages",
    [
        (["."], ("there is no folder ", LAYOUT)),
        (["train"], ("there is no folder ", "train", LAYOUT)),
        (["test"], ("there is no folder ", LAYOUT)),
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
