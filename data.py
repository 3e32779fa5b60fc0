"""What every script takes its images from: a dataset, and the batches that are made of it.

    split = load("cifar10", "data", val_size=5000)   # split.train, split.val, split.test: Examples
    pipeline = Pipeline(split.mean, split.std, 32, ("crop", "flip"))
    batches = Batches(split.train, 128, pipeline, device="cuda", seed=0)
    for inputs, targets in batches.epoch(0): ...

A dataset is one uint8 tensor of images and one int64 tensor of labels on the device. Batches are
gathered and augmented there, without worker processes. Images that don't fit are streamed from the
host, with bit-identical batches. All random draws are a function of (seed, epoch, batch), so a run
can resume at any batch.
"""

import hashlib
import math
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch

from common.errors import UserError
from datasets import archives, augment, image_folder, residency, shapes
from datasets.draws import RankGenerator, send_in_groups
from datasets.examples import Examples
from datasets.pipeline import Pipeline
from datasets.splits import hold_out, limit
from datasets.statistics import channel_statistics

DATASETS = (*archives.ARCHIVES, "folder", "shapes")


def load(
    name,
    data_dir="data",
    *,
    data_url=None,
    image_size=None,
    val_size=0,
    limit_train=0,
    limit_test=0,
    skip_bad_images=False,
):
    """Loads a dataset as a Split on the CPU; `Batches` sends it to the device.

    name: one of DATASETS; data_url: where to download an archive from instead of its mirrors;
    image_size: of a folder, the largest side in px at which images are stored (default 32);
    limit_train, limit_test: size of a stratified subset (0: all); val_size: training images to hold
    out, stratified, the same for every seed.
    Raises UserError if the data is missing, damaged or too small.
    """
    if name == "shapes":
        split = shapes.load_shapes()
    elif name == "folder":
        split = image_folder.load_folder(Path(data_dir), image_size or 32, skip_bad_images)
    elif name in archives.ARCHIVES:
        split = archives.load_archive(name, Path(data_dir), data_url)
    else:
        names = ", ".join(DATASETS)
        raise UserError(f"unknown dataset {name!r}: the names are {names}", status=2)
    train = limit(split.train, limit_train, "--limit-train")
    test = limit(split.test, limit_test, "--limit-test")
    split = hold_out(replace(split, train=train, test=test), val_size)
    if not split.mean:
        mean, std = channel_statistics(split.train)
        split = replace(split, mean=mean, std=std)
    return split


def derive_seed(seed, epoch, purpose, index=0):
    """A 63-bit seed for each (seed, epoch, purpose, index)."""
    text = f"{seed}/{epoch}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def rank_rows(total, rank, world_size, unit=2):
    """The slice of a global batch of `total` images that a rank works on.

    Slices are as equal as possible, but start at multiples of `unit`: mixing pairs row 2i with row
    2i + 1.
    """
    units = math.ceil(total / unit)
    start, stop = (min(total, unit * (units * i // world_size)) for i in (rank, rank + 1))
    return slice(start, stop)


def rank_shares(total, world_size):
    """The number of images of each rank in a global batch of `total` images."""
    rows = (rank_rows(total, rank, world_size) for rank in range(world_size))
    return [part.stop - part.start for part in rows]


@dataclass(eq=False)
class Batches:
    """Batches of a dataset on a device: an epoch yields the (inputs, targets) of the pipeline.

    With shuffle, every epoch has its own permutation, the same on all ranks, and an incomplete last
    batch is dropped. Without it, every image comes once, in order.

    The images of a batch are in one of three places:
    - prepared: all of them are on the device, already padded if crop comes first;
    - streamed: the host sends a batch during the step on the one before;
    - read in place, on a CPU only: from memory that holds the dataset, or from a folder's cache.
    """

    examples: Examples
    batch_size: int  # images of all ranks together
    pipeline: Pipeline
    _: KW_ONLY
    device: torch.device | str = "cpu"
    seed: int = 0
    shuffle: bool = True
    repeats: int = 1  # of an image in a batch; an epoch has 1/repeats of all (arXiv 1902.05509)
    rank: int = 0
    world_size: int = 1
    resident: str = "auto"  # "device", "host", or "auto": the device if the images fit there

    def __post_init__(self):
        if self.shuffle:
            self._check_batch_size()
        self.labels = self.examples.labels.to(self.device)
        self.device = self.labels.device  # with its index
        self.streamed = residency.should_stream(self.examples, self.device, self.resident)
        # One stream for all epochs: memory that was used by one stream isn't reused by another.
        is_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.streamed and is_cuda else None
        self.first_flips = self._draw_first_flips() if self.pipeline.alternating_flip else None
        self.prepared = None
        if not self.streamed and residency.should_prepare(self.examples, self.device):
            self.prepared = self._prepare()

    def _prepare(self):
        try:
            return self.pipeline.prepare(residency.copy_to_device(self.examples, self.device))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.device} is too small for the images: add --resident host"
            ) from error

    def _check_batch_size(self):
        count, flag = len(self.examples), f"--batch-size {self.batch_size}"
        if self.batch_size > count:
            raise UserError(f"{flag} is larger than the training set ({count} images)", status=2)
        if self.world_size > 1 and self.batch_size < 2 * self.world_size:
            message = f"{flag} is too small for {self.world_size} processes: each needs two images"
            raise UserError(message, status=2)

    def __len__(self):
        if self.shuffle:
            return len(self.labels) // self.batch_size
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, epoch, start=0):
        """Yields (inputs, targets) of this rank, from batch `start` on."""
        order, batches = self._order(epoch), range(start, len(self))
        drawn_batches = send_in_groups(self._draw(epoch, order, batches), self.device)
        if self.prepared is not None:
            for index, drawn in drawn_batches:
                yield self.pipeline.batch(self.prepared, self.labels, index, drawn)
        else:
            gathered = self._gather(self._index(order, batch) for batch in batches)
            for images, (index, drawn) in zip(gathered, drawn_batches):
                yield self.pipeline.apply(images, self.labels[index], drawn)

    def _draw(self, epoch, order, batches):
        """Yields (index, what the pipeline draws) of each batch, on the CPU."""
        shape = tuple(self.examples.shape[2:])
        for batch in batches:
            index = self._index(order, batch)
            drawn = self.pipeline.draw(
                self._generator(epoch, batch),
                len(index),
                shape,
                mirrored=self._mirrored(epoch, index),
                index=index if self.prepared is not None else None,
            )
            yield index, drawn

    def _order(self, epoch):
        """The order of the images in an epoch: indices, on the CPU."""
        if not self.shuffle:
            return torch.arange(len(self.labels))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "permutation"))
        return torch.randperm(len(self.labels), generator=generator)

    @property
    def _distinct(self):
        """The number of different images in a batch."""
        return self.batch_size // self.repeats

    def _index(self, order, batch):
        """Indices of the images of a batch on this rank."""
        index = order[batch * self._distinct : (batch + 1) * self._distinct]
        if self.repeats > 1:
            # The copies of an image don't follow each other, because neighbors are mixed.
            index = index.repeat(self.repeats)
        if self.world_size == 1:
            return index
        return index[self._rows(len(index))]

    def _generator(self, epoch, batch):
        """The generator for the augmentation of a batch on this rank."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "augment", batch))
        if self.world_size == 1:
            return generator
        distinct = min(self._distinct, len(self.labels) - batch * self._distinct)
        total = self.repeats * distinct
        return RankGenerator(generator, self._rows(total), total)

    def _rows(self, total):
        unit = 2 if self.shuffle else 1  # an evaluation mixes no images
        return rank_rows(total, self.rank, self.world_size, unit)

    def _draw_first_flips(self):
        seed = derive_seed(self.seed, 0, "alternating_flip")
        generator = torch.Generator().manual_seed(seed)
        return augment.first_flips(generator, len(self.labels))

    def _mirrored(self, epoch, index):
        """Which images of a batch alternating_flip mirrors, None without it."""
        if self.first_flips is None:
            return None
        return augment.alternating_flips(self.first_flips[index], epoch)

    def _gather(self, indices):
        """Yields the images (B, 3, H, W) at each index from images on the host."""
        if self.streamed:
            yield from residency.send_ahead(self.examples, indices, self.device, self.stream)
        else:
            for index in indices:
                yield self.examples.gather(index).permute(0, 3, 1, 2)
