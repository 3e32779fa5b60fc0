"""A folder of images as a dataset: DIR/train/<class>/*.png|jpg and DIR/test (or val).

    split = load_folder(Path("pets"), 64, skip_bad_images=False)
    image = decode("cat.jpg", 32)                   # one file as a square, or why it can't be read

Images are decoded once, into a cache in the folder (folder_cache.py): a folder may be larger than
memory. If the cache can't be written, the images are kept in memory.
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
from datasets import folder_cache, locking
from datasets.examples import Examples, Split
from datasets.folder_cache import GB

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # Pillow's names, whatever the suffix
LAYOUT = "train/<class>/*.png|jpg and test/ (or val/)"
MAX_PIXELS = 50_000_000  # an image that claims more is taken for a decompression bomb
AHEAD = 32  # decoded images that may wait to be written
USABLE = 0.9  # share of the free memory that images without a cache may take


@dataclass(frozen=True)
class Listing:
    """The files of a folder: train's, then test's, class by class, sorted by name."""

    paths: list[str]
    labels: list[int]
    train: int  # number of train's files
    classes: tuple[str, ...]
    digest: str  # of names, sizes and times, and of the options of decoding


def load_folder(root, image_size, skip_bad_images):
    """The Split of a folder, with images of at most image_size pixels a side. Raises UserError."""
    listing = _list_folder(root, f"{image_size} {skip_bad_images}")
    path, notes = root / f".cache-{image_size}px.images", []
    if (root / "test").is_dir() and (root / "val").is_dir():
        notes.append(f"{root}/val is not used: {root}/test is the test set")
    cached = _read_cache(path, listing, notes)
    if not cached:
        with locking.writing(path):
            # Another process may have decoded the folder meanwhile.
            cached = _read_cache(path, listing, [])
            if not cached:
                notes.extend(_remove_leftovers(path))
                # Here, because the threads that decode would disturb each other's warning filters.
                with warnings.catch_warnings(action="ignore"):
                    cached = _decode_folder(listing, path, image_size, skip_bad_images, notes)
    images, unreadable = cached[0], set(cached[1])
    if unreadable:
        first = listing.paths[min(unreadable)]
        notes.append(
            f"unreadable images that were left out: {len(unreadable)}, the first is {first}"
        )
    readable = [number for number in range(len(listing.paths)) if number not in unreadable]
    labels = torch.tensor([listing.labels[number] for number in readable])
    train = sum(number < listing.train for number in readable)
    return Split(
        name=root.resolve().name,
        train=Examples(_part(images, 0, train), labels[:train]),
        val=None,
        test=Examples(_part(images, train, len(labels)), labels[train:]),
        classes=listing.classes,
        notes=tuple(notes),
        digest=_digest(images, labels, train),
    )


def _digest(images, labels, train):
    """16 hex digits that tell other images, labels or numbers of training images.

    They are the same for images in the cache and in memory.
    """
    if isinstance(images, folder_cache.CachedImages):
        checksums = images.checksums
    else:
        checksums = np.array([folder_cache.checksum(image) for image in images.numpy()], "<i8")
    contents = labels.numpy().tobytes() + checksums.tobytes() + str(train).encode()
    return hashlib.sha256(contents).hexdigest()[:16]


def _part(images, start, stop):
    if isinstance(images, folder_cache.CachedImages):
        return images.part(start, stop)
    return images[start:stop].permute(0, 3, 1, 2)


def _read_cache(path, listing, notes):
    try:
        return folder_cache.read(path, listing.digest)
    except (OSError, UserError) as error:
        notes.append(f"the cache is rebuilt: {error}")
        return None


def _remove_leftovers(path):
    """Removes what interrupted processes left, and caches of older versions. Returns notes."""
    root, notes = path.parent, []
    leftovers = [*root.glob(f".{path.name}.*.tmp"), *root.glob("..cache-*px.pt.*.tmp")]
    for file in [*leftovers, *root.glob(".cache-*px.pt")]:
        with contextlib.suppress(OSError):
            size = file.stat().st_size / GB
            file.unlink()
            if file not in leftovers:
                notes.append(f"removed {file} ({size:.2f} GB), the cache of an older version")
    return notes


# ---- listing ----


def _list_folder(root, decoding):
    """The Listing of a folder; decoding: the options of decoding. Raises UserError."""
    test_name = "test" if (root / "test").is_dir() else "val"
    train, test = _list_classes(root / "train", root), _list_classes(root / test_name, root)
    extra = [name for name in test if name not in train]
    if extra:
        names = ", ".join(extra[:5])
        raise UserError(f"{root}/{test_name} has classes that {root}/train lacks: {names}")
    if len(train) < 2:
        raise UserError(f"{root}/train has one class, {[*train][0]!r}; at least two are needed")
    digest, paths, labels = hashlib.sha256(decoding.encode()), [], []
    label_of = {name: label for label, name in enumerate(train)}
    for part, files_of in (("train", train), (test_name, test)):
        for name, files in files_of.items():
            for file, path, status in files:
                paths.append(path)
                labels.append(label_of[name])
                line = f"{part}/{name}/{file} {status.st_size} {status.st_mtime_ns}\n"
                digest.update(os.fsencode(line))
    return Listing(paths, labels, sum(map(len, train.values())), tuple(train), digest.hexdigest())


def class_names(directory):
    """Sorted names of the directories in a directory, without hidden ones."""
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_classes(directory, root):
    """{class: its image files, see _list_images} of a directory with a directory per class."""
    for needed in (root, directory):
        if not needed.is_dir():
            raise UserError(f"there is no folder {needed}: {root} must hold {LAYOUT}")
    files = {name: _list_images(directory / name) for name in class_names(directory)}
    empty = [directory / name for name in files if not files[name]]
    if empty or not files:
        where = empty[0] if empty else directory
        raise UserError(f"{where} holds no images ({', '.join(SUFFIXES)})")
    return files


def _list_images(directory):
    """Sorted (name, path, status) of the image files in a directory."""

    def is_image(entry):
        name = entry.name.lower()
        return name.endswith(SUFFIXES) and not name.startswith(".") and entry.is_file()

    with os.scandir(directory) as entries:
        return sorted((e.name, e.path, e.stat()) for e in entries if is_image(e))


# ---- decoding a folder ----


def _decode_folder(listing, path, image_size, skip_bad_images, notes):
    """What folder_cache.read returns; the images are a tensor if no cache can be written.

    All images are stored at one size: image_size, or the largest one's shorter side if that is
    less. Enlarging to more is the device's work.
    """
    pool = ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1))
    try:
        sides = []
        for file, side in zip(listing.paths, _in_order(pool, _shorter_side, listing.paths)):
            _check_readable(file, side, skip_bad_images)
            sides.append(side)
        good = [side for side in sides if isinstance(side, int)]
        count, size = len(good), min(image_size, max(good, default=image_size))

        def decoded():
            return _decode_all(pool, listing, sides, size, skip_bad_images)

        try:
            return folder_cache.write(path, listing.digest, size, decoded(), count)
        except OSError as error:
            reason = f"{path} could not be written ({error.strerror or error})"
        need, free = count * 3 * size * size, available(torch.device("cpu"))
        if need > USABLE * free:
            memory = f"in memory the images need {need / GB:.2f} of {free / GB:.2f} GB"
            raise UserError(f"{reason}, and {memory}")
        notes.append(f"no cache: {reason}; the images are kept in memory")
        return _keep_in_memory(decoded(), (count, size, size, 3))
    finally:
        pool.shutdown(cancel_futures=True)


def _keep_in_memory(results, shape):
    images, unreadable, count = np.empty(shape, dtype=np.uint8), [], 0
    for number, result in enumerate(results):
        if result is None:
            unreadable.append(number)
        else:
            images[count] = result[0]
            count += 1
    return torch.from_numpy(images[:count]), unreadable


def _decode_all(pool, listing, sides, size, skip_bad_images):
    """Yields (image, table_row) of each file in order, or None for an unreadable one."""

    def decode_one(path, side):
        image = side if isinstance(side, str) else decode(path, size)
        return image if isinstance(image, str) else (image, folder_cache.table_row(image))

    readable = {"train": 0, "test": 0}
    results = _in_order(pool, decode_one, listing.paths, sides)
    with tqdm(total=len(sides), desc="decoding", unit=" images", disable=None, leave=False) as bar:
        for number, result in enumerate(results):
            bar.update()
            _check_readable(listing.paths[number], result, skip_bad_images)
            if isinstance(result, str):
                yield None
            else:
                readable["train" if number < listing.train else "test"] += 1
                yield result
    for part, count in readable.items():
        if not count:
            raise UserError(f"no image for {part} could be read")


def _in_order(pool, function, *arguments):
    """Like pool.map, but at most AHEAD results wait: all of them might not fit into memory."""
    pending = deque()
    for item in zip(*arguments):
        pending.append(pool.submit(function, *item))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _check_readable(path, result, skip_bad_images):
    if isinstance(result, str) and not skip_bad_images:
        advice = "--skip-bad-images leaves such files out"
        raise UserError(f"{path} can't be read as an image ({result}); {advice}")


# ---- decoding a file ----


def _errors_as_text(read):
    """Makes a function return a string with the reason if a file can't be read."""

    def guarded(path, *args):
        try:
            return read(path, *args)
        except Exception as error:  # OSError, SyntaxError, struct.error, ValueError, …
            reason = re.sub(rf":? {re.escape(repr(str(path)))}", "", str(error))
            return reason or type(error).__name__

    return guarded


def _open_image(path):
    from PIL import Image

    image = Image.open(path, formats=FORMATS)  # others, such as EPS, can start programs
    if image.width * image.height > MAX_PIXELS:
        limit = f"more than the limit of {MAX_PIXELS:,}"
        raise ValueError(f"it claims {image.width}x{image.height} pixels, {limit}")
    return image


@_errors_as_text
def _shorter_side(path):
    with _open_image(path) as image:
        return min(image.size)


@_errors_as_text
def decode(path, size):
    """An image file as `square` returns it, or a string that says why it can't be read."""
    with _open_image(path) as image:
        return square(image, size)


def square(image, size):
    """A PIL image as uint8 (size, size, 3): upright, RGB, resized, the center cut out."""
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits of gray, which convert would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)
