"""The batches of a run follow its arguments."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.errors import refused
from helpers.training import CPU, resolve

import models
import train
from datasets.examples import Split
from datasets.shapes import SHAPES, make_shapes
from training.distributed import Ranks
from training.inputs import LARGEST_EVALUATION_BATCH, Inputs, batch_parts, cached_parts
from training.linear_probe import Probe

TEST = make_shapes(60, seed=0)
SPLIT = Split("shapes", TEST.take(torch.arange(40)), None, TEST, SHAPES, (), ())
NORMALIZATION = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
PLAIN = ("--augment", "none")


def inputs(*argv, split=SPLIT, ranks=None, batch_size=20):
    args = resolve(train, "--batch-size", batch_size, *argv)
    return Inputs(args, split, NORMALIZATION, ranks or Ranks(CPU), None, images_at_once=10)


def first_batch(*argv):
    return next(inputs(*argv).training_batches(None).epoch(0))


def test_training_batches_follow_the_arguments():
    images, labels = first_batch(*PLAIN)
    assert images.shape == (20, 3, 32, 32) and labels.dtype == torch.int64
    assert first_batch("--mixup", 0.5)[1].shape == (20, 10)
    assert first_batch(*PLAIN, "--image-size", 64)[0].shape == (20, 3, 64, 64)
    crop = ("--augment", "crop", "--mixup", 0, "--cutmix", 0)
    for changes in (crop, (*PLAIN, "--seed", 1), (*PLAIN, "--cutout", 8)):
        assert not torch.equal(first_batch(*changes)[0], images)
    repeated = first_batch(*PLAIN, "--repeated-augment", 2)[1]
    assert torch.equal(repeated[:10], repeated[10:])


@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_crops_are_shifted_by_so_many_pixels(padding):
    """One pixel gives nine different crops of an image."""
    plain, black = first_batch(*PLAIN)[0], -torch.tensor(NORMALIZATION[0]).view(3, 1, 1) / 0.2
    options = ("--augment", "crop", "--crop-pixels", 1, "--crop-padding", padding)
    cropped = first_batch(*options, "--mixup", 0, "--cutmix", 0)[0]
    if padding == "zero":
        padded = black + F.pad(plain - black, (1, 1, 1, 1))
    else:
        padded = F.pad(plain, (1, 1, 1, 1), mode="reflect")
    shifts = [padded[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    hits = torch.stack([((cropped - x).abs() < 1e-5).flatten(1).all(1) for x in shifts])
    assert hits.any(0).all() and hits.any(1).sum() > 4


def test_crops_that_leave_nothing_of_an_image_are_refused():
    smaller = ("--augment", "random_resized_crop,crop", "--image-size", 16, "--crop-pixels", 20)
    with refused("--crop-pixels 20 must be smaller than the images of 16 px"):
        first_batch(*smaller)
    with refused("--crop-pixels 32 must be smaller than the images of 32 px that are cropped"):
        first_batch("--crop-pixels", 32)


def test_random_erasing_is_the_share_of_images_with_a_box():
    plain = first_batch(*PLAIN)[0]
    for probability, erased in ((0, 0), (1, 20)):
        images = first_batch(*PLAIN, "--random-erasing", probability)[0]
        changed = (images != plain).any(1)
        assert changed.flatten(1).any(1).sum() == erased
        assert (images[changed[:, None].expand_as(images)] == 0).all()


def test_jitter_is_the_strength_of_color_jitter():
    chosen = ("--augment", "color_jitter", "--mixup", 0, "--cutmix", 0)
    plain = first_batch(*PLAIN)[0]
    default, weak, strong = (
        first_batch(*chosen, *options)[0] for options in ((), ("--jitter", 0.2), ("--jitter", 0.4))
    )
    assert torch.equal(first_batch(*chosen, "--jitter", 0)[0], plain) and torch.equal(default, weak)
    assert (strong - plain).abs().mean() > 1.5 * (weak - plain).abs().mean() > 0


def test_mixing_per_batch_follows_its_argument():
    alike, own = (
        first_batch("--mixup", 0.5, "--cutmix", 0, "--mix-prob", 1, "--mix-per", per)[1]
        for per in ("batch", "image")
    )
    assert len(alike.amax(1).round(decimals=4).unique()) <= 2  # partners may have the same label
    assert len(own.amax(1).round(decimals=4).unique()) > 5


def test_an_evaluation_has_every_image_once_in_order_and_normalized():
    images, labels = (
        torch.cat(parts) for parts in zip(*inputs("--augment", "crop").test_batches())
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION)
    torch.testing.assert_close(images, (TEST.images / 255 - mean) / std)
    assert torch.equal(labels, TEST.labels)
    held_out = replace(SPLIT, val=TEST.take(torch.arange(40, 60)))
    for split, count in ((SPLIT, 60), (held_out, 20)):
        assert len(inputs(split=split).evaluation_batches(None).labels) == count


def test_ranks_share_a_training_batch_and_evaluate_as_many_images_at_once():
    parts = [inputs(*PLAIN, ranks=Ranks(CPU, rank, world_size=2)) for rank in range(2)]
    shares = [next(part.training_batches(None).epoch(0))[0] for part in parts]
    assert torch.equal(torch.cat(shares), first_batch(*PLAIN)[0])
    sizes = [[len(labels) for _, labels in part.test_batches()] for part in parts]
    assert sizes == [[10, 10, 10]] * 2
    for options, expected in (((32,), 128), ((32, 4), 32), ((1024,), LARGEST_EVALUATION_BATCH)):
        argv = [word for pair in zip(("--batch-size", "--accumulate"), options) for word in pair]
        assert batch_parts(resolve(train, *argv), Ranks(CPU)).images_at_once == expected


@pytest.mark.parametrize(
    ("images", "size", "parts"),
    [(2000, 32, 4), (500, 32, 1), (501, 32, 2), (2000, 64, 16), (128, 224, 13), (5, 512, 2)],
)
def test_automatic_parts_fit_the_caches_of_a_cpu(images, size, parts):
    args = resolve(train, "--batch-size", images, "--image-size", size, "--accumulate", "auto")
    split = batch_parts(args, Ranks(CPU))
    assert (split.accumulate, split.automatic) == (parts, {"accumulate": parts})
    assert images / parts * size**2 <= 500 * 32**2 or images // parts == 2
    for device in ("cuda", "mps"):
        assert cached_parts(args, torch.device(device), images) == 1
    args.freeze_backbone = True
    assert cached_parts(args, CPU, images) == 1


def test_ranks_split_their_share_alike():
    args = resolve(train, "--batch-size", 2050, "--accumulate", "auto")
    splits = [batch_parts(args, Ranks(CPU, rank, world_size=4)) for rank in range(4)]
    assert {split.accumulate for split in splits} == {2}


def test_a_frozen_backbone_trains_on_features_that_are_computed_once():
    probe = Probe(models.create_model("vit_custom", 10, width=24, depth=1, heads=2))
    part = inputs("--model", "vit_custom", "--weights", "x.pt", "--freeze-backbone")
    features, labels = next(part.training_batches(probe).epoch(0))
    assert features.shape == (20, 24) and labels.shape == (20,)
    evaluated, _ = next(iter(part.evaluation_batches(probe)))
    images, _ = next(iter(part.test_batches()))
    with torch.no_grad():
        torch.testing.assert_close(evaluated, probe.features(images))
