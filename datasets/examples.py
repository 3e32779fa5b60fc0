"""What a dataset is: Examples (images and labels) and a Split (train, val, test)."""

import contextlib
import os
from dataclasses import dataclass, field

import torch
from filelock import FileLock

from datasets.folder_cache import CachedImages


@dataclass(frozen=True)
class Examples:
    """uint8 images (N, 3, H, W) and their int64 labels (N,).

    stored: a tensor, channels_last, or an imagecache.CachedImages; rows: which of the stored images these are (None: all), so
    that a selection copies nothing.
    """

    stored: torch.Tensor | CachedImages
    labels: torch.Tensor
    rows: torch.Tensor | None = None

    def __len__(self):
        return len(self.labels)

    @property
    def shape(self):
        return torch.Size((len(self.labels), *self.stored.shape[1:]))

    @property
    def nbytes(self):
        size = 1 if self.cached else self.stored.element_size()
        return self.shape.numel() * size

    @property
    def cached(self):
        """Whether the images lie in a file."""
        return isinstance(self.stored, CachedImages)

    @property
    def images(self):
        """All images as a tensor (N, 3, H, W): a view, or for a selection a copy."""
        if self.rows is not None:
            return self.gather(torch.arange(len(self))).permute(0, 3, 1, 2)
        return self.stored.all().permute(0, 3, 1, 2) if self.cached else self.stored

    def gather(self, index, out=None):
        """The images with these indices, uint8 (B, H, W, 3) on the CPU."""
        index = index if self.rows is None else self.rows[index]
        if self.cached:
            return self.stored.gather(index, out)
        return torch.index_select(self.stored.permute(0, 2, 3, 1), 0, index, out=out)

    def split(self, size):
        """The images in parts of `size`, each (B, 3, H, W)."""
        for part in torch.arange(len(self)).split(size):
            yield self.gather(part).permute(0, 3, 1, 2)

    def take(self, index):
        return Examples(
            self.stored, self.labels[index], index if self.rows is None else self.rows[index]
        )


@dataclass(frozen=True)
class Split:
    """A dataset, divided: examples to train on, to choose on (or None) and to test on; and what is known of them."""

    name: str
    train: Examples
    val: Examples | None
    test: Examples
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of the channels of the training pictures, in [0, 1]
    std: tuple[float, ...]
    notes: tuple[str, ...] = field(default=())  # what the user should know about how it was loaded

    @property
    def num_classes(self):
        return len(self.classes)


def _channels_last(array):
    """uint8 numpy (N, H, W, 3) -> tensor (N, 3, H, W) that lies as channels_last, without a copy."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@contextlib.contextmanager
def one_at_a_time(path):
    """A block for one process at a time that makes the file `path`; the others wait, to find it made.

    Where nothing can be written or locked it is for all: what is written takes its place whole.
    """
    made = not path.parent.is_dir()
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()
        if made:
            with contextlib.suppress(OSError):  # a try without network leaves nothing
                path.parent.rmdir()
