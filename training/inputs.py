"""The batches that a run trains, evaluates and tests on."""

import argparse
import math
from dataclasses import dataclass, field, replace

import torch

import data
from common.errors import UserError
from datasets.examples import Split
from datasets.pipeline import Pipeline
from training import linear_probe
from training.distributed import Ranks

LARGEST_EVALUATION_BATCH = 500  # images per rank
# Pixels of a part of a batch with --accumulate auto on a CPU, 500 images of 32x32. Forward and
# backward pass of airbench94 at 24 px in bf16 on two cores: 1,400 images/s in parts of 250, 1,570
# in parts of 500, 1,520 in one of 2,000 (medians of 5), which takes more than twice the memory.
CACHED_PIXELS = 500 * 32 * 32


@dataclass(frozen=True)
class Inputs:
    """Batches of a run's images, or of their features where the backbone is frozen.

    normalization: (mean, std) of each channel; images_at_once: of an evaluation, per rank.
    """

    args: argparse.Namespace
    split: Split
    normalization: tuple
    ranks: Ranks
    dtype: torch.dtype | None  # autocast's
    images_at_once: int

    def training_batches(self, model):
        """model: computes the features where its backbone is frozen, else unused."""
        args = self.args
        options = {"seed": args.seed, "repeats": args.repeated_augment}
        if args.freeze_backbone:
            return self._features(model, self.split.train, args.batch_size, **options)
        transforms = () if args.augment == "none" else args.augment.split(",")
        size = min(self.split.train.shape[2:])
        if "random_resized_crop" in transforms:
            size = min(size, args.image_size)
        if "crop" in transforms and size == 1:
            raise UserError("--augment crop: the images have 1 px", 2)
        if args.crop_pixels >= size:
            problem = f"must be smaller than the images of {size} px that are cropped"
            raise UserError(f"--crop-pixels {args.crop_pixels} {problem}", 2)
        pipeline = Pipeline(
            *self.normalization,
            args.image_size,
            transforms,
            num_classes=self.split.num_classes,
            crop_mode=args.crop_padding,
            crop_pixels=args.crop_pixels,
            jitter=args.jitter,
            cutout_size=args.cutout,
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            mix_probability=args.mix_prob,
            mix_per=args.mix_per,
            erasing=args.random_erasing,
        )
        return self._batches(self.split.train, args.batch_size, pipeline, args.resident, **options)

    def evaluation_batches(self, model):
        """Of the images that the accuracy curve follows."""
        examples, batch_size = self.split.val or self.split.test, self._evaluation_batch
        if self.args.freeze_backbone:
            return self._features(model, examples, batch_size, shuffle=False)
        return self._images(examples)

    def test_batches(self):
        return self._images(self.split.test)

    def without_augmentation(self, train_batches):
        """The training images, each once. They stay on the host: the device may be full."""
        changes = {"batch_size": self._evaluation_batch, "shuffle": False, "repeats": 1}
        if not self.args.freeze_backbone:  # features are on the device, and not augmented
            pipeline = Pipeline(*self.normalization, self.args.image_size)
            changes |= {"pipeline": pipeline, "resident": "host"}
        return replace(train_batches, **changes)

    @property
    def _evaluation_batch(self):
        return self.images_at_once * self.ranks.world_size

    def _images(self, examples):
        pipeline, resident = Pipeline(*self.normalization, self.args.image_size), self.args.resident
        return self._batches(examples, self._evaluation_batch, pipeline, resident, shuffle=False)

    def _batches(self, examples, batch_size, pipeline, resident, **options):
        placement = {
            "device": self.ranks.device,
            "rank": self.ranks.rank,
            "world_size": self.ranks.world_size,
        }
        return data.Batches(
            examples, batch_size, pipeline, resident=resident, **placement, **options
        )

    def _features(self, model, examples, batch_size, **options):
        """Batches of features, each rank computing those of all images."""
        images = data.Batches(
            examples,
            self.images_at_once,
            Pipeline(*self.normalization, self.args.image_size),
            device=self.ranks.device,
            shuffle=False,
            resident=self.args.resident,
        )
        features = linear_probe.features(model, images, self.dtype)
        pipeline = linear_probe.IdentityPipeline()
        return self._batches(features, batch_size, pipeline, "device", **options)


# ---- parts of a batch ----------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchParts:
    """How a batch is split. images_at_once: of an evaluation, per rank.

    automatic: {argument: value} of what "auto" stood for; derived: what --micro-batch determines.
    """

    accumulate: int
    images_at_once: int
    automatic: dict
    derived: dict = field(default_factory=dict)


def batch_parts(args, ranks):
    """The BatchParts of --accumulate, the same on all ranks."""
    automatic, accumulate = {}, args.accumulate
    shares = data.rank_shares(args.batch_size, ranks.world_size)
    if accumulate is None:
        accumulate = min(cached_parts(args, ranks.device, share) for share in shares)
        automatic = {"accumulate": accumulate}
    # Four times those that a rank trains on at once: nothing is kept for a backward pass.
    at_once = 4 * max(1, max(shares) // accumulate)
    return BatchParts(accumulate, min(LARGEST_EVALUATION_BATCH, at_once), automatic)


def cached_parts(args, device, images):
    """--accumulate auto: the parts of a rank's images whose activations a CPU's caches hold.

    Elsewhere, and for the features of a frozen backbone: one. Parts have at least two images, which
    batch norm needs.
    """
    if device.type != "cpu" or args.freeze_backbone:
        return 1
    largest = max(1, CACHED_PIXELS // args.image_size**2)
    return max(1, min(math.ceil(images / largest), images // 2))
