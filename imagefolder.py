"""A folder of pictures as a data set: DIR/train/<class>/*.png|jpg and DIR/test (or val), decoded once into a cache beside them.

    loaded = load_folder(Path("pets"), 64, skip_bad_images=False)      # sources.Split without a held-out part
    picture = decode("cat.jpg", 32)                                     # one file, cut to a square, or why it can't be read

A picture that claims more pixels than a decompression bomb needs is refused before it is decoded.
"""

import contextlib
import hashlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from errors import UserError
from sources import Examples, Split, one_at_a_time

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MAX_PIXELS = 50_000_000  # a picture that claims more is taken for a decompression bomb, before it is decoded


def load_folder(root, image_size, skip_bad_images):
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --data-dir must hold train/<class>/*.png|jpg and test/ (or val/)")
    test_name = "test" if (root / "test").is_dir() else "val"
    files = {"train": _list_pictures(root / "train", root), "test": _list_pictures(root / test_name, root)}
    classes = tuple(files["train"])
    extra = [name for name in files["test"] if name not in files["train"]]
    if extra:
        raise UserError(f"{root}/{test_name} has classes that {root}/train lacks: {', '.join(extra[:5])}")
    if len(classes) < 2:
        raise UserError(f"{root}/train has one class, {classes[0]!r}; a classifier needs at least two")

    listing = hashlib.sha256(f"{image_size} {skip_bad_images}".encode())
    for paths in files.values():
        for name in paths:
            for path in paths[name]:
                status = path.stat()
                listing.update(os.fsencode(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n"))
    cache = root / f".cache-{image_size}px.pt"
    notes = []
    stored = _read_cache(cache, listing.hexdigest(), notes)
    if not stored:
        with one_at_a_time(cache):
            stored = _read_cache(cache, listing.hexdigest(), [])  # another process made it meanwhile
            if not stored:
                for leftover in root.glob(f".{cache.name}.*.tmp"):  # of one that was killed
                    with contextlib.suppress(OSError):
                        leftover.unlink()
                with warnings.catch_warnings(action="ignore"):  # here: its threads would meddle with each other's filters
                    decoded = _decode_all(files, classes, image_size, skip_bad_images)
                stored = {"listing": listing.hexdigest(), **decoded}
                try:
                    checkpoint.save(stored, cache)
                except UserError as error:
                    notes.append(f"no cache: {error}")
    if stored["bad"]:
        notes.append(f"{len(stored['bad'])} unreadable pictures were left out, the first is {stored['bad'][0]}")
    train, test = (
        Examples(stored[f"{part}_images"].permute(0, 3, 1, 2), stored[f"{part}_labels"]) for part in ("train", "test")
    )
    return Split(root.resolve().name, train, None, test, classes, (), (), tuple(notes))


def _read_cache(cache, listing, notes):
    """What was decoded from pictures of this listing; {} where there is none."""
    try:
        stored = checkpoint.load(cache) if cache.is_file() else {}
    except UserError as error:
        notes.append(f"the cache was made again: {error}")
        return {}
    return stored if isinstance(stored, dict) and stored.get("listing") == listing else {}


def _list_pictures(directory, root):
    """{class: sorted paths} of a directory of class directories."""
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}: {root} must hold train/<class>/*.png|jpg and test/ (or val/)")
    found = {}
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found[entry.name] = sorted(p for p in entry.iterdir() if _is_picture(p))
    empty = [name for name, paths in found.items() if not paths]
    if empty or not found:
        where = directory / empty[0] if empty else directory
        raise UserError(f"{where} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return found


def _is_picture(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _decode_all(files, classes, image_size, skip_bad_images):
    """Decodes every picture with a few threads (the decoders release the interpreter's lock).

    Pictures are stored at image_size, or smaller where all of them are smaller: enlarging is the device's work.
    """
    paths = [path for part in files.values() for name in part for path in part[name]]
    sides, bad = {}, {}
    pool = ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1))
    try:
        for path, side in zip(paths, pool.map(_shorter_side, paths)):
            (bad if isinstance(side, str) else sides)[path] = side
            _refuse_bad(bad, skip_bad_images)
        size = min(image_size, max(sides.values(), default=image_size))
        good = [path for path in paths if path not in bad]
        decoded = pool.map(lambda path: decode(path, size), good)
        images = np.empty((len(good), size, size, 3), dtype=np.uint8)
        bar = tqdm(zip(good, decoded), total=len(good), desc="decoding", unit=" pictures", disable=None, leave=False)
        for i, (path, picture) in enumerate(bar):
            if isinstance(picture, str):
                bad[path] = picture
                _refuse_bad(bad, skip_bad_images)
            else:
                images[i] = picture
    finally:
        pool.shutdown(cancel_futures=True)  # after a refusal the rest need not be decoded
    out = {"bad": [str(path) for path in bad]}
    keep = {path: i for i, path in enumerate(good) if path not in bad}
    for part, by_class in files.items():
        rows = [(keep[path], classes.index(name)) for name in by_class for path in by_class[name] if path in keep]
        if not rows:
            raise UserError(f"no picture for {part} could be read")
        index, labels = zip(*rows)
        out[f"{part}_images"] = torch.from_numpy(images[list(index)])  # (N, S, S, 3)
        out[f"{part}_labels"] = torch.tensor(labels)
    return out


def _refuse_bad(bad, skip_bad_images):
    if bad and not skip_bad_images:
        path, reason = next(iter(bad.items()))
        raise UserError(f"{path} can't be read as a picture ({reason}); --skip-bad-images leaves such files out")


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
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, …
            return re.sub(rf":? {re.escape(repr(str(path)))}", "", str(error)) or type(error).__name__

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
