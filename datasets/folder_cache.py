"""The decoded images of a folder in one file that is mapped into memory: no process needs to hold them all.

    write(path, listing, side, results, count)      # decodes straight into the file; OSError where there is no room
    cached = read(path, listing)                    # None where there is no file of this listing
    cached.train.gather(index)                      # (B, S, S, 3), from the file or from the system's cache of files

The file holds the images as uint8 (N, S, S, 3); a table with a row for each image: its CRC-32, and for each channel the sum
of its values and of their squares; a header (JSON), and a trailer with the SHA-256 of table and header. Opening it reads table
and header, and compares the file's size with them. An image is compared with its CRC when a process first reads it; up to
CHECKED_AT_ONCE bytes of images are compared when the file is opened, so that a damaged file is simply made again.

The file is written with ordinary writes and mapped for reading only: where the disk is full, a write is an error, but a store
to a mapped page kills the process.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from common import files
from common.errors import UserError, first_line

FORMAT = 1
COLUMNS = 7  # of the table: the CRC, three sums, three sums of squares
TRAILER = struct.Struct("<32sQ8s")  # SHA-256 of table and header, the header's length, MAGIC
MAGIC = b"imgcache"
CHECKED_AT_ONCE = 2**28  # bytes of images; 0.3 s
RELEASED_EVERY = 2**26  # bytes after which mapped pages are given back
GB = 1e9


class CachedImages:
    """uint8 images (N, S, S, 3) in a mapped file, each compared with its CRC when it is first read."""

    def __init__(self, path, mapped, pixels, table):
        self.path, self.mapped, self.pixels, self.table = path, mapped, pixels, table
        self.read = 0  # bytes since pages were given back
        self.checked = np.zeros(len(table), dtype=bool)
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch has no read-only tensors; nothing writes to this one
            self.tensor = torch.from_numpy(pixels)

    def __len__(self):
        return len(self.table)

    @property
    def shape(self):
        """Of the images as a tensor (N, 3, S, S)."""
        count, height, width, channels = self.pixels.shape
        return torch.Size((count, channels, height, width))

    def part(self, start, stop):
        part = CachedImages(self.path, self.mapped, self.pixels[start:stop], self.table[start:stop])
        part.checked = self.checked[start:stop]
        return part

    def gather(self, index, out=None):
        """The images with these indices, (B, S, S, 3). Raises UserError for a damaged one."""
        images = torch.index_select(self.tensor, 0, index, out=out)
        numbers = index.numpy()
        self._release(images.nbytes)
        with self._removing_when_damaged():
            for place in np.flatnonzero(~self.checked[numbers]):
                self._check(numbers[place], images[place].numpy())
        return images

    def all(self):
        """A view of all images, (N, S, S, 3), each checked. Raises UserError for a damaged one."""
        with self._removing_when_damaged():
            self.check()
        return self.tensor

    def check(self):
        """Compares every image that this process hasn't read yet with its CRC. Raises UserError for a damaged one."""
        for number in np.flatnonzero(~self.checked):
            self._check(number, self.pixels[number])
            self._release(self.pixels[number].nbytes)

    def _release(self, read):
        """Gives mapped pages back after so many bytes more were read; the system keeps them cached while it has memory.

        Otherwise all that was ever read would count as this process's memory. To map a batch's pages again takes
        about 3 % of the time to augment it (64 images of 224 px, crop and flip, on a CPU).
        """
        self.read += read
        if self.read > RELEASED_EVERY and hasattr(mmap, "MADV_DONTNEED"):
            self.read = 0
            self.mapped.madvise(mmap.MADV_DONTNEED)

    def channel_sums(self, rows=None):
        """(sum, sum of squares) of the values of each channel, int64 (3,) each, of all images or of these rows."""
        chosen = self.table if rows is None else self.table[rows.numpy()]
        totals = torch.from_numpy(chosen[:, 1:].sum(0))
        return totals[:3], totals[3:]

    def _check(self, number, image):
        if zlib.crc32(image) != self.table[number, 0]:
            raise UserError(f"{self.path} is damaged (image {number} is not what was written)")
        self.checked[number] = True

    @contextlib.contextmanager
    def _removing_when_damaged(self):
        """In the middle of a run the images can't be decoded again; the next start finds no cache and does it."""
        try:
            yield
        except UserError as error:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise UserError(
                f"{error}; it is removed, and made again at the next start (--resume continues a run)"
            ) from error


@dataclass(frozen=True)
class Cached:
    """What `read` found: the images, and which files of the listing could not be read (their numbers, in its order)."""

    images: CachedImages
    unreadable: list


def summary(image):
    """The table's row for an image (S, S, 3)."""
    values, pixels = np.arange(256), image.reshape(-1, 3)
    # Counting takes a tenth of the time of summing squares.
    counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])
    return np.concatenate(
        ([zlib.crc32(np.ascontiguousarray(image))], counts @ values, counts @ values**2)
    )


def write(path, listing, side, results, count):
    """Writes a cache and opens it.

    results: for each of the `count` files of the listing, in order, (image, summary), or None for an unreadable one.
    Raises OSError where there is no room, before the first result is asked for, or where the file can't be written; then, as
    when `results` raises, what stood at `path` is still there.
    """
    need = count * (3 * side * side + 8 * COLUMNS) + 2**20
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise OSError(
            errno.ENOSPC, f"{need / GB:.2f} GB are needed on the disk, {free / GB:.2f} GB are free"
        )
    with files.replacing(path) as file:
        rows, unreadable = [], []
        for number, result in enumerate(results):
            if result is None:
                unreadable.append(number)
            else:
                image, row = result
                file.write(np.ascontiguousarray(image))
                rows.append(row)
        header = {
            "format": FORMAT,
            "listing": listing,
            "side": side,
            "count": len(rows),
            "unreadable": unreadable,
        }
        end = np.array(rows, dtype="<i8").tobytes() + json.dumps(header).encode()
        digest = hashlib.sha256(end).digest()
        file.write(end + TRAILER.pack(digest, len(end) - len(rows) * 8 * COLUMNS, MAGIC))
        file.flush()
        _open(file.name, listing).images.check()
    cached = read(path, listing)
    if cached is None:
        raise OSError(f"another process replaced {path.name}")
    return cached


def read(path, listing):
    """The Cached of a listing, or None where there is no such file. Raises UserError for a damaged one."""
    if not path.is_file():
        return None
    cached = _open(path, listing)
    if cached and cached.images.pixels.nbytes <= CHECKED_AT_ONCE:
        cached.images.check()
    return cached


def _open(path, listing):
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, table = _read_end(file, size, path)
        if header["listing"] != listing:
            return None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    side, count = header["side"], header["count"]
    pixels = np.frombuffer(mapped, np.uint8, count * side * side * 3).reshape(count, side, side, 3)
    return Cached(CachedImages(path, mapped, pixels, table), header["unreadable"])


def _read_end(file, size, path):
    """(header, table) from the end of a file, which may hold anything. Raises UserError."""
    try:
        if size < TRAILER.size:
            raise ValueError("it is truncated")
        file.seek(size - TRAILER.size)
        digest, length, magic = TRAILER.unpack(file.read(TRAILER.size))
        if magic != MAGIC:
            raise ValueError("it is no cache of images")
        file.seek(size - TRAILER.size - length)
        header = json.loads(file.read(length))
        if not all(
            isinstance(header[key], int) and header[key] >= 1 for key in ("format", "side", "count")
        ):
            raise ValueError("its header lacks something")
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, not {FORMAT}")
        images, table = header["count"] * header["side"] ** 2 * 3, header["count"] * 8 * COLUMNS
        if images + table + length + TRAILER.size != size:
            raise ValueError("its size is not what its header says")
        file.seek(images)
        end = file.read(table + length)
        if hashlib.sha256(end).digest() != digest:
            raise ValueError("its header doesn't match its digest")
        header["listing"], header["unreadable"] = (
            str(header["listing"]),
            [int(number) for number in header["unreadable"]],
        )
        return header, np.frombuffer(end[:table], "<i8").reshape(-1, COLUMNS)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        RecursionError,
        struct.error,
        MemoryError,
    ) as error:
        raise UserError(f"{path} is damaged ({first_line(error)})") from error
