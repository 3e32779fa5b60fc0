"""A folder of images as a dataset: DIR/train/<class>/*.png|jpg and DIR/test (or val), decoded once into a cache beside them.

    loaded = load_folder(Path("pets"), 64, skip_bad_images=False)      # sources.Split without a held-out part
    image = decode("cat.jpg", 32)                                       # one file, cut to a square, or why it can't be read

The cache (imagecache.py) is mapped into memory, so a folder may be larger than memory. Where it can't be written the images
are kept in memory, if they fit. An image that claims more pixels than a decompression bomb needs is refused before it is
decoded.
"""

import contextlib
import hashlib
import os
import re
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.free_memory import available
from datasets import folder_cache
from datasets.examples import Examples, Split, one_at_a_time
from datasets.folder_cache import GB

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MAX_PIXELS = (
    50_000_000  # an image that claims more is taken for a decompression bomb, before it is decoded
)
AHEAD = 32  # decoded images that may wait for being written
USABLE = 0.9  # part of the free memory that may be taken where there is no cache


@dataclass(frozen=True)
class Listing:
    """The files of a folder: those of train, then those of test, class by class, sorted by name."""

    paths: list[str]
    labels: list[int]
    train: int  # how many of the paths are train's
    classes: tuple[str, ...]
    digest: str  # of names, sizes and times, and of how the images are to be decoded


def load_folder(root, image_size, skip_bad_images):
    listing = _list_folder(root, f"{image_size} {skip_bad_images}")
    cache = root / f".cache-{image_size}px.images"
    notes = []
    cached = _read_cache(cache, listing, notes)
    if not cached:
        with one_at_a_time(cache):
            cached = _read_cache(cache, listing, [])  # another process made it meanwhile
            if not cached:
                _remove_leftovers(root, cache, notes)
                with warnings.catch_warnings(
                    action="ignore"
                ):  # here: its threads would meddle with each other's filters
                    cached = _decode_folder(listing, cache, image_size, skip_bad_images, notes)
    images, unreadable = cached.images, set(cached.unreadable)
    if unreadable:
        first = listing.paths[min(unreadable)]
        notes.append(f"{len(unreadable)} unreadable images were left out, the first is {first}")
    labels = torch.tensor(
        [label for number, label in enumerate(listing.labels) if number not in unreadable]
    )
    train = listing.train - sum(number < listing.train for number in unreadable)
    return Split(
        name=root.resolve().name,
        train=Examples(_part(images, 0, train), labels[:train]),
        val=None,
        test=Examples(_part(images, train, len(labels)), labels[train:]),
        classes=listing.classes,
        mean=(),
        std=(),
        notes=tuple(notes),
    )


def _part(images, start, stop):
    """Some of the images of a cache, or of a tensor (N, S, S, 3), as Examples stores them."""
    if isinstance(images, folder_cache.CachedImages):
        return images.part(start, stop)
    return images[start:stop].permute(0, 3, 1, 2)


def _read_cache(cache, listing, notes):
    try:
        return folder_cache.read(cache, listing.digest)
    except UserError as error:
        notes.append(f"the cache was made again: {error}")
        return None


def _remove_leftovers(root, cache, notes):
    """Removes what an interrupted process left behind, and the caches of older versions, which nothing reads any more."""
    for leftover in [*root.glob(f".{cache.name}.*.tmp"), *root.glob("..cache-*px.pt.*.tmp")]:
        with contextlib.suppress(OSError):
            leftover.unlink()
    for old in root.glob(".cache-*px.pt"):
        with contextlib.suppress(OSError):
            size = old.stat().st_size
            old.unlink()
            notes.append(f"removed {old} ({size / GB:.2f} GB), the cache of an older version")


# ---- listing ---------------------------------------------------------------------------------------------------------


def _list_folder(root, decoding):
    """The Listing of a folder; decoding: how its images are to be decoded. Raises UserError for a folder of another form."""
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}: --data-dir must hold train/<class>/*.png|jpg and test/ (or val/)"
        )
    test_name = "test" if (root / "test").is_dir() else "val"
    train, test = (_list_classes(root / part, root) for part in ("train", test_name))
    classes = {name: label for label, name in enumerate(train)}
    extra = [name for name in test if name not in classes]
    if extra:
        raise UserError(
            f"{root}/{test_name} has classes that {root}/train lacks: {', '.join(extra[:5])}"
        )
    if len(classes) < 2:
        raise UserError(
            f"{root}/train has one class, {next(iter(classes))!r}; a classifier needs at least two"
        )
    digest = hashlib.sha256(decoding.encode())
    paths, labels = [], []
    for part, found in (("train", train), (test_name, test)):
        for name, files in found.items():
            for file, path, status in files:
                paths.append(path)
                labels.append(classes[name])
                digest.update(
                    os.fsencode(f"{part}/{name}/{file} {status.st_size} {status.st_mtime_ns}\n")
                )
    return Listing(paths, labels, sum(map(len, train.values())), tuple(classes), digest.hexdigest())


def _list_classes(directory, root):
    """{class: [(name, path, status) of each image file, sorted]} of a directory of class directories."""
    if not directory.is_dir():
        raise UserError(
            f"there is no folder {directory}: {root} must hold train/<class>/*.png|jpg and test/ (or val/)"
        )
    with os.scandir(directory) as entries:
        names = sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )
    found = {name: _list_images(directory / name) for name in names}
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        where = directory / empty[0] if empty else directory
        raise UserError(f"{where} holds no images ({', '.join(SUFFIXES)})")
    return found


def _list_images(directory):
    with os.scandir(directory) as entries:
        return sorted(
            (e.name, e.path, e.stat()) for e in entries if _is_image(e)
        )  # one stat of each file: no more is needed


def _is_image(entry):
    return (
        entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
    )


# ---- decoding --------------------------------------------------------------------------------------------------------


def _decode_folder(listing, cache, image_size, skip_bad_images, notes):
    """The imagecache.Cached of a listing; where no cache can be written, its images are a tensor (N, S, S, 3).

    Images are stored at image_size, or smaller where all of them are smaller: enlarging is the device's work. A few threads
    decode (the decoders release the interpreter's lock), no more than a few images ahead of what is written.
    """
    pool = ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1))
    try:
        sides = []
        for path, side in zip(listing.paths, _in_order(pool, _shorter_side, listing.paths)):
            if isinstance(side, str):
                _refuse_bad(path, side, skip_bad_images)
            sides.append(side)
        good = [side for side in sides if isinstance(side, int)]
        count, size = len(good), min(image_size, max(good, default=image_size))
        try:
            decoded = _decode_all(pool, listing, sides, size, skip_bad_images)
            return folder_cache.write(cache, listing.digest, size, decoded, count)
        except OSError as error:
            reason = f"{cache} could not be written ({error.strerror or error})"
        need, free = count * 3 * size * size, available(torch.device("cpu"))
        if need > USABLE * free:
            raise UserError(
                f"{reason}, and in memory the images need {need / GB:.2f} GB, of which {free / GB:.2f} GB are free"
            )
        notes.append(f"no cache: {reason}; the images are kept in memory")
        return _keep_in_memory(
            _decode_all(pool, listing, sides, size, skip_bad_images), count, size
        )
    finally:
        pool.shutdown(cancel_futures=True)  # after a refusal the rest need not be decoded


def _keep_in_memory(results, count, size):
    images, kept, unreadable = np.empty((count, size, size, 3), dtype=np.uint8), 0, []
    for number, result in enumerate(results):
        if result is None:
            unreadable.append(number)
        else:
            images[kept], _ = result
            kept += 1
    return folder_cache.Cached(torch.from_numpy(images[:kept]), unreadable)


def _decode_all(pool, listing, sides, size, skip_bad_images):
    """Yields (image, its imagecache.summary) for each file of a listing, in order, or None for an unreadable one.

    sides: what `_shorter_side` found for each file.
    """

    def decode_one(number):
        image = (
            sides[number] if isinstance(sides[number], str) else decode(listing.paths[number], size)
        )
        return image if isinstance(image, str) else (image, folder_cache.summary(image))

    readable = {"train": 0, "test": 0}
    bar = tqdm(total=len(sides), desc="decoding", unit=" images", disable=None, leave=False)
    with bar:
        for number, result in enumerate(_in_order(pool, decode_one, range(len(sides)))):
            bar.update()
            if isinstance(result, str):
                _refuse_bad(listing.paths[number], result, skip_bad_images)
                yield None
            else:
                readable["train" if number < listing.train else "test"] += 1
                yield result
    for part, count in readable.items():
        if not count:
            raise UserError(f"no image for {part} could be read")


def _in_order(pool, function, items):
    """Like pool.map, but no more than AHEAD results wait to be taken: all of them might not fit into memory."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _refuse_bad(path, reason, skip_bad_images):
    if not skip_bad_images:
        raise UserError(
            f"{path} can't be read as an image ({reason}); --skip-bad-images leaves such files out"
        )


def _open_picture(path):
    from PIL import Image

    picture = Image.open(path)
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"it claims {picture.width}x{picture.height} pixels")
    return picture


def _guarded(read):
    """Turns whatever a decoder raises on a bad file into a string that says so (threads must not lose the path)."""

    def guarded(path, *args):
        try:
            return read(path, *args)
        except (
            Exception
        ) as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, …
            return (
                re.sub(rf":? {re.escape(repr(str(path)))}", "", str(error)) or type(error).__name__
            )

    return guarded


@_guarded
def _shorter_side(path):
    with _open_picture(path) as picture:
        return min(picture.size)


@_guarded
def decode(path, size):
    """A picture as uint8 (size, size, 3): upright, RGB, the shorter side resized to `size`, the middle cut out."""
    with _open_picture(path) as picture:
        return square(picture, size)


def square(picture, size):
    """A PIL image as uint8 (size, size, 3): upright, RGB, the shorter side resized to `size`, the middle cut out."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    picture = picture.convert("RGB")
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)
