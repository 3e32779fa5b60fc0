"""What a dataset is: Examples (images and labels) and a Split (train, val, test)."""

from dataclasses import dataclass

import torch

from datasets.folder_cache import CachedImages


@dataclass(frozen=True)
class Examples:
    """uint8 images (N, 3, H, W), or features (N, D) of linear_probe, and int64 labels (N,).

    stored: a tensor, stored as channels_last, or CachedImages in a file. rows: which of the stored
    images these are (None: all), so that a subset copies nothing.
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
        return self.shape.numel() * (1 if self.cached else self.stored.element_size())

    @property
    def cached(self):
        """Whether the images are in a file."""
        return isinstance(self.stored, CachedImages)

    @property
    def images(self):
        """All images as a tensor (N, 3, H, W): a view, or a copy if this is a subset."""
        if self.rows is not None:
            return self.gather(torch.arange(len(self))).permute(0, 3, 1, 2)
        return self.stored.all().permute(0, 3, 1, 2) if self.cached else self.stored

    def gather(self, index, out=None):
        """The images at `index`, uint8 (B, H, W, 3) on the CPU."""
        index = index if self.rows is None else self.rows[index]
        if self.cached:
            return self.stored.gather(index, out)
        return torch.index_select(self.stored.permute(0, 2, 3, 1), 0, index, out=out)

    def split(self, size):
        """Yields all images in blocks (`size`, 3, H, W)."""
        for index in torch.arange(len(self)).split(size):
            yield self.gather(index).permute(0, 3, 1, 2)

    def take(self, index):
        rows = index if self.rows is None else self.rows[index]
        return Examples(self.stored, self.labels[index], rows)


@dataclass(frozen=True)
class Split:
    """A dataset: examples to train, validate (or None) and test on, and facts about it."""

    name: str
    train: Examples
    val: Examples | None
    test: Examples
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()  # of the channels of the training images, in [0, 1]
    std: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()  # what the user should know about how it was loaded
    digest: str | None = None  # of a folder; an archive is compared with its published digest

    @property
    def num_classes(self):
        return len(self.classes)
