"""The decoded images of a folder in one file that is mapped into memory.

    folder_cache.write(path, listing, side, results, count)
    images, unreadable = folder_cache.read(path, listing)
    images.gather(index)                            # uint8 (B, S, S, 3)

The file holds: images, uint8 (N, S, S, 3); a table with a row per image (CRC-32, channel sums, sums
of squares); a header in JSON; a trailer with the SHA-256 of table and header. Opening reads only
table and header. An image is compared with its CRC when a process first reads it.

The file is written with ordinary writes, not through the mapping: on a full disk a write raises an
error, but a store to a mapped page kills the process.
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

import numpy as np
import torch

from common import files
from common.errors import UserError, first_line
from datasets.statistics import channel_sums

FORMAT = 1
COLUMNS = 7  # of the table: the CRC, three sums, three sums of squares
TRAILER = struct.Struct("<32sQ8s")  # SHA-256 of table and header, length of the header, MAGIC
MAGIC = b"imgcache"
# Bytes of images that are all checked on opening, so that damage is repaired.
CHECKED_AT_ONCE = 2**28
RELEASED_EVERY = 2**26  # bytes that are read before mapped pages are released
GB = 1e9


class CachedImages:
    """uint8 images (N, S, S, 3) in a mapped file, each checked when it is first read."""

    def __init__(self, path, mapped, pixels, table):
        self.path, self.mapped, self.pixels, self.table = path, mapped, pixels, table
        self.unreleased_bytes = 0
        self.checked = np.zeros(len(table), dtype=bool)
        # torch warns that the tensor isn't writable; nothing writes to it.
        with warnings.catch_warnings(action="ignore"):
            self.tensor = torch.from_numpy(pixels)

    @property
    def shape(self):
        """Shape of the images as a tensor (N, 3, S, S)."""
        count, height, width, channels = self.pixels.shape
        return torch.Size((count, channels, height, width))

    @property
    def checksums(self):
        """int64 (N,): see `checksum`."""
        return self.table[:, 0]

    def part(self, start, stop):
        part = CachedImages(self.path, self.mapped, self.pixels[start:stop], self.table[start:stop])
        part.checked = self.checked[start:stop]
        return part

    def gather(self, index, out=None):
        """The images at `index`, (B, S, S, 3). Raises UserError for a damaged one."""
        images = torch.index_select(self.tensor, 0, index, out=out)
        numbers = index.numpy()
        self._release(images.nbytes)
        with self._removing_if_damaged():
            for i in np.flatnonzero(~self.checked[numbers]):
                self._check(numbers[i], images[i].numpy())
        return images

    def all(self):
        """A view of all images, (N, S, S, 3), each checked. Raises UserError for a damaged one."""
        with self._removing_if_damaged():
            self.check()
        return self.tensor

    def check(self):
        """Checks all images that weren't checked yet. Raises UserError for a damaged one."""
        for number in np.flatnonzero(~self.checked):
            self._check(number, self.pixels[number])
            self._release(self.pixels[number].nbytes)

    def channel_sums(self, rows=None):
        """int64 (6,), see statistics.channel_sums: of all images, or of some rows."""
        table = self.table if rows is None else self.table[rows.numpy()]
        return table[:, 1:].sum(0)

    def _release(self, nbytes):
        """Counts bytes that were read, and releases mapped pages from time to time.

        Otherwise all that was read would count as this process's memory. Mapping pages again takes
        about 3 % of the augmentation's time (64 images of 224 px, crop and flip, on a CPU).
        """
        self.unreleased_bytes += nbytes
        if self.unreleased_bytes > RELEASED_EVERY and hasattr(mmap, "MADV_DONTNEED"):
            self.unreleased_bytes = 0
            self.mapped.madvise(mmap.MADV_DONTNEED)

    def _check(self, number, image):
        if checksum(image) != self.checksums[number]:
            raise UserError(f"{self.path} is damaged (checksum of image {number})")
        self.checked[number] = True

    @contextlib.contextmanager
    def _removing_if_damaged(self):
        try:
            yield
        except UserError as error:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            message = f"{error}; it is removed: start again (--resume) to rebuild it"
            raise UserError(message) from error


def checksum(image):
    """CRC-32 of an image, uint8 (S, S, 3)."""
    return zlib.crc32(np.ascontiguousarray(image))


def table_row(image):
    """The table's row for an image, uint8 (S, S, 3)."""
    return np.concatenate(([checksum(image)], channel_sums(image)))


def write(path, listing, side, results, count):
    """Writes a cache of `count` images, and reads it.

    results: (image, table_row) for each file of the listing, or None for an unreadable one. Raises
    OSError if there is no space, before the first result, or if the file can't be written. On any
    error an existing file is kept.
    """
    need = count * (3 * side * side + 8 * COLUMNS) + 2**20
    free = shutil.disk_usage(path.parent).free
    if free < need:
        message = f"{need / GB:.2f} GB are needed on the disk, {free / GB:.2f} GB are free"
        raise OSError(errno.ENOSPC, message)
    rows, unreadable = [], []
    with files.replacing(path) as file:
        for number, result in enumerate(results):
            if result is None:
                unreadable.append(number)
            else:
                image, row = result
                file.write(np.ascontiguousarray(image))
                rows.append(row)
        header = {"format": FORMAT, "listing": listing, "side": side, "count": len(rows)}
        header = json.dumps(header | {"unreadable": unreadable}).encode()
        end = np.array(rows, dtype="<i8").tobytes() + header
        file.write(end + TRAILER.pack(hashlib.sha256(end).digest(), len(header), MAGIC))
        file.flush()
        _open(file.name, listing)[0].check()
    cached = read(path, listing)
    if cached is None:
        raise OSError(f"another process replaced {path.name}")
    return cached


def read(path, listing):
    """(CachedImages, positions of unreadable files) of a listing, or None if it has no cache.

    Raises UserError for a damaged file.
    """
    if not path.is_file():
        return None
    cached = _open(path, listing)
    if cached and cached[0].pixels.nbytes <= CHECKED_AT_ONCE:
        cached[0].check()
    return cached


def _open(path, listing):
    with open(path, "rb") as file:
        try:
            header, table = _read_header(file)
        except Exception as error:  # the file may hold anything
            raise UserError(f"{path} is damaged ({first_line(error)})") from error
        if header["listing"] != listing:
            return None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    side, count = header["side"], header["count"]
    pixels = np.frombuffer(mapped, np.uint8, count * side * side * 3).reshape(count, side, side, 3)
    return CachedImages(path, mapped, pixels, table), header["unreadable"]


def _read_header(file):
    """(header, table) from the end of a file."""
    size = os.fstat(file.fileno()).st_size
    if size < TRAILER.size:
        raise ValueError("it is truncated")
    file.seek(size - TRAILER.size)
    digest, length, magic = TRAILER.unpack(file.read())
    if magic != MAGIC:
        raise ValueError("it is not an image cache")
    file.seek(size - TRAILER.size - length)
    header = json.loads(file.read(length))
    for key in ("format", "side", "count"):
        if not isinstance(header[key], int) or header[key] < 1:
            raise ValueError(f"its header has no valid {key}")
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, not {FORMAT}")
    pixels, table = header["count"] * header["side"] ** 2 * 3, header["count"] * 8 * COLUMNS
    if pixels + table + length + TRAILER.size != size:
        raise ValueError("its size doesn't match its header")
    file.seek(pixels)
    end = file.read(table + length)
    if hashlib.sha256(end).digest() != digest:
        raise ValueError("its header doesn't match its digest")
    header["listing"] = str(header["listing"])
    header["unreadable"] = [int(number) for number in header["unreadable"]]
    return header, np.frombuffer(end[:table], "<i8").reshape(-1, COLUMNS)
