"""Datasets as resident tensors, and the batches that are made of them.

    split = load("cifar10", "data", val_size=5000)          # split.train, split.val, split.test: Examples
    batches = Batches(split.train, 128, pipeline, device="cuda", seed=0)
    for inputs, targets in batches.epoch(0): ...

A dataset is one uint8 tensor of pictures and one int64 tensor of labels on the device. A batch is gathered and augmented
there (augment.py): no worker processes, no copies from the host. Images that don't fit stay on the host, those of a folder in
its cache file (imagecache.py), and batches are gathered and sent ahead of the step that takes them; what is made of them is
bit-identical. All that an epoch draws is a function of (seed, epoch, batch), so a run can resume from any batch, and nothing
else that draws can change what it sees.
"""

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import UserError
from common.free_memory import available
from datasets import archives, augment, image_folder, shapes
from datasets.examples import Examples

BORDERED = (
    2**28
)  # bytes of images in the CPU's memory whose border for cropping is made once, not per batch (CIFAR: 154 MB)
DATASETS = ("cifar10", "cifar100", "folder", "shapes")


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
    """Loads a dataset and divides it. The tensors are on the CPU; `Batches` brings them to the device.

    name: one of DATASETS; data_url: where to download an archive instead of the published places; image_size: for
    "folder", the size that larger pictures are stored at (32 when None); val_size: training images to hold out,
    stratified, the same for every seed; limit_train, limit_test: keep so many, stratified (0: all).
    Raises UserError when the data is missing, damaged or too small.
    """
    if name == "shapes":
        loaded = shapes.load_shapes()
    elif name == "folder":
        loaded = image_folder.load_folder(Path(data_dir), image_size or 32, skip_bad_images)
    elif name in archives.ARCHIVES:
        loaded = archives.load_archive(name, Path(data_dir), data_url)
    else:
        raise UserError(f"unknown dataset {name!r}: the names are {', '.join(DATASETS)}", status=2)
    if limit_test:
        loaded = replace(
            loaded, test=loaded.test.take(_portion(loaded.test, limit_test, "--limit-test", name))
        )
    if limit_train:
        loaded = replace(
            loaded,
            train=loaded.train.take(_portion(loaded.train, limit_train, "--limit-train", name)),
        )
    if val_size:
        held_out = _portion(loaded.train, val_size, "--val-size", name, leave=loaded.num_classes)
        rest = (
            torch.ones(len(loaded.train), dtype=torch.bool)
            .index_fill_(0, held_out, False)
            .nonzero()
            .squeeze(1)
        )
        loaded = replace(loaded, train=loaded.train.take(rest), val=loaded.train.take(held_out))
    if not loaded.mean:
        mean, std = channel_statistics(loaded.train)
        loaded = replace(loaded, mean=mean, std=std)
    return loaded


def stratified(labels, count, seed=0):
    """Indices (sorted) of `count` examples in which each class has its share, to within one example."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shares = (
        torch.bincount(labels) * count
    )  # times len(labels): whole numbers, so nothing is rounded
    quota = shares // len(labels)
    largest_remainders = (shares % len(labels)).argsort(descending=True, stable=True)[
        : count - int(quota.sum())
    ]
    quota[largest_remainders] += 1
    chosen = [order[labels[order] == label][:number] for label, number in enumerate(quota.tolist())]
    return torch.cat(chosen).sort().values


def _portion(examples, count, flag, name, leave=0):
    if count > len(examples) - leave:
        left = f", and {leave} must be left to train on" * bool(leave)
        raise UserError(
            f"{flag} {count} asks for too much: {name} has {len(examples)} examples here{left}",
            status=2,
        )
    if leave and count < leave:
        raise UserError(
            f"{flag} {count} is less than an image of each of the {leave} classes", status=2
        )
    return stratified(examples.labels, count)


def channel_statistics(images, block=1 << 22):
    """Mean and standard deviation of each channel over all pixels, in [0, 1], to the last bit: from sums of whole numbers.

    images: Examples, or a tensor (N, 3, H, W). Of a cached folder the sums are known, and no image is read.
    """
    pixels = len(images) * images.shape[2] * images.shape[3]
    if isinstance(images, Examples) and images.cached:
        sums, squares = images.stored.channel_sums(images.rows)
    else:
        counts, values = torch.zeros(3, 256, dtype=torch.int64), torch.arange(256)
        for part in images.split(
            max(1, block // (images.shape[2] * images.shape[3]))
        ):  # a few million pixels at a time
            counts += torch.stack(
                [torch.bincount(part[:, channel].flatten(), minlength=256) for channel in range(3)]
            )
        sums, squares = counts @ values, counts @ values.square()
    sums, squares = (
        sums.tolist(),
        squares.tolist(),
    )  # Python's integers and their quotients are exact
    variances = [
        (pixels * square - total * total) / (255 * pixels) ** 2
        for total, square in zip(sums, squares)
    ]
    return tuple(total / (255 * pixels) for total in sums), tuple(
        math.sqrt(max(value, 1e-11)) for value in variances
    )


# ---- batches -----------------------------------------------------------------------------------------------------


def derive_seed(seed, epoch, purpose, index=0):
    """A 63-bit seed of its own for every (seed, epoch, purpose, index)."""
    text = f"{seed}/{epoch}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def rank_rows(total, rank, world):
    """The rows of a batch of `total` that a rank works on: as even a division as there is into runs of even length.

    Even, because mixing pairs row 2i with row 2i + 1.
    """
    pairs = (total + 1) // 2
    bounds = [min(total, 2 * (pairs * i // world)) for i in (rank, rank + 1)]
    return slice(*bounds)


class Batches:
    """Batches of a dataset that lies on the device: iterating an epoch gives what `pipeline` makes of each batch.

    examples: on any device, moved to `device` here; batch_size: images of all ranks together; pipeline: see
    augment.Pipeline. With shuffle, every epoch has its own permutation, common to all ranks, and the incomplete last
    batch is left out; without, every image comes once, in order. repeats: how often a batch has each of its images, with
    other draws of the augmentation (arXiv 1901.09335); an epoch has as many batches as without. resident: where the images
    lie, "device" or "host", from where batches are sent ahead; "auto" is the device while they take at most a third of its free
    memory. On a CPU, images of a cached folder are read from its file either way, on the host ahead of the step.
    """

    def __init__(
        self,
        examples,
        batch_size,
        pipeline,
        *,
        device="cpu",
        seed=0,
        shuffle=True,
        repeats=1,
        rank=0,
        world=1,
        resident="auto",
    ):
        if shuffle and batch_size > len(examples):
            raise UserError(
                f"--batch-size {batch_size} is larger than the training set ({len(examples)} images)",
                status=2,
            )
        if shuffle and world > 1 and batch_size < 2 * world:
            raise UserError(
                f"--batch-size {batch_size} is too small for {world} processes: each needs two images",
                status=2,
            )
        device = torch.device(device)
        self.examples, self.prepared = examples, None
        self.streamed = _streams(examples, device, resident)
        if self.streamed:
            # Only the batches that are sent are pinned: of all images it would be a second copy, in each process, of up to
            # twice their size (torch rounds pinned memory up to a power of two).
            # One for all epochs: memory that one stream has used is not given to another.
            self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        elif (
            device.type != "cpu"
            or len(examples.shape) == 2
            or (not examples.cached and examples.nbytes <= BORDERED)
        ):
            self.prepared = pipeline.prepare(_on_device(examples, device))
        self.labels = examples.labels.to(device)
        self.batch_size, self.pipeline, self.seed, self.shuffle = (
            batch_size,
            pipeline,
            seed,
            shuffle,
        )
        self.repeats, self.rank, self.world = repeats, rank, world

    def __len__(self):
        return (
            len(self.labels) // self.batch_size
            if self.shuffle
            else -(-len(self.labels) // self.batch_size)
        )

    def epoch(self, epoch, start=0):
        """Yields (inputs, targets) of this rank for the batches from number `start` on."""
        count, home = len(self.labels), "cpu" if self.streamed else self.labels.device
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "permutation"))
            order = torch.randperm(count, generator=generator).to(home)
        else:
            order = torch.arange(count, device=home)
        distinct = self.batch_size // self.repeats

        def rows(number):
            """The indices of a batch's images, and of this rank's part of them."""
            index = order[number * distinct : (number + 1) * distinct].repeat(
                self.repeats
            )  # neighbours differ: they are mixed
            return index, index[
                rank_rows(len(index), self.rank, self.world)
            ] if self.world > 1 else index

        numbers, generator = range(start, len(self)), torch.Generator()
        arriving = (
            self._send_ahead(rows(number)[1] for number in numbers) if self.streamed else None
        )
        for number in numbers:
            whole, index = rows(number)
            generator.manual_seed(derive_seed(self.seed, epoch, "augment", number))
            draws = generator
            if self.world > 1:
                draws = augment.RankGenerator(
                    generator, rank_rows(len(whole), self.rank, self.world), len(whole)
                )
            if self.streamed:
                images, index = next(arriving)
                yield self.pipeline(images, self.labels[index], draws)
            elif self.prepared is None:
                yield self.pipeline(
                    self.examples.gather(index).permute(0, 3, 1, 2), self.labels[index], draws
                )
            else:
                yield self.pipeline.batch(self.prepared, self.labels, index, draws)

    def _send_ahead(self, indices):
        """Yields (images, index) on the device; a thread gathers and sends the next while the last are worked on.

        The index goes with its images: sent by itself, from memory that isn't pinned, it would wait for all work before it.
        """
        device, stream = self.labels.device, self.stream

        def send(index):
            _, channels, height, width = self.examples.shape
            shape = (len(index), height, width, channels)
            gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=stream is not None)
            self.examples.gather(index, out=gathered)
            if stream is None:
                return gathered.to(device), index.to(device), None
            with torch.cuda.stream(stream):
                sent = [
                    tensor.to(device, non_blocking=True)
                    for tensor in (gathered, index.pin_memory())
                ]
                return *sent, stream.record_event()

        # A thread begins on the first GPU, and would leave a context there.
        begin = (
            dict(initializer=torch.cuda.set_device, initargs=(device,))
            if stream is not None
            else {}
        )
        with ThreadPoolExecutor(1, **begin) as thread:
            pending = [thread.submit(send, index) for index in itertools.islice(indices, 1)]
            while pending:
                images, index, sent = pending.pop().result()
                pending = [thread.submit(send, index) for index in itertools.islice(indices, 1)]
                if sent:
                    torch.cuda.current_stream(device).wait_event(sent)
                    for tensor in (images, index):
                        tensor.record_stream(torch.cuda.current_stream(device))
                yield images.permute(0, 3, 1, 2), index

    def __iter__(self):
        return self.epoch(0)


def _on_device(examples, device, block=2**26):
    """The images (N, 3, H, W), or features, on a device, with no further copy of all of them on the host; channels_last."""
    if device.type == "cpu" or (not examples.cached and examples.rows is None):
        return examples.images.to(device)
    count, channels, height, width = examples.shape
    images = torch.empty(count, height, width, channels, dtype=torch.uint8, device=device)
    for part in torch.arange(count).split(max(1, block // (channels * height * width))):
        images[part[0] : part[-1] + 1] = examples.gather(part).to(device)
    return images.permute(0, 3, 1, 2)


def _fits(examples, device):
    """A third: a border for cropping is half as much again, and while it is made the images lie there twice.

    Images that lie in the CPU's memory anyway fit there.
    """
    in_place = device.type == "cpu" and not examples.cached
    return in_place or examples.nbytes <= available(device) / 3


def resident_bytes(examples, device, resident="auto"):
    """Of a GPU's memory, what Batches will take for these images, with their border for cropping."""
    return (
        0
        if device.type != "cuda" or _streams(examples, device, resident)
        else int(1.6 * examples.nbytes)
    )


def _streams(examples, device, resident):
    return resident == "host" or (resident == "auto" and not _fits(examples, device))
