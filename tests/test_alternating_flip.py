"""--augment alternating_flip mirrors a random half of the images, then the other one, and so on."""

import argparse
import itertools

import pytest
import torch
from helpers.batches import MEAN, MIXED, STD, make_images, random_examples, same_batches
from helpers.training import resolve

import data
import train
from datasets import augment
from datasets.examples import Examples
from datasets.pipeline import Pipeline
from training.options import augmentations

CASES = [("alternating_flip",), ("crop", "alternating_flip"), ("alternating_flip", "color_jitter")]


def batches(transforms, count=70, **options):
    pipeline = Pipeline(MEAN, STD, 32, transforms, **MIXED)
    return data.Batches(random_examples(count), 16, pipeline, **options)


def mirrored_images(epoch, count=1000, seed=0):
    """Which images of a dataset are mirrored in an epoch: bool (count,)."""
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    images[..., 1] = 255
    numbers = torch.arange(count)
    pipeline = Pipeline((0.0,) * 3, (1.0,) * 3, 2, ("alternating_flip",))
    source = data.Batches(Examples(images, numbers), count, pipeline, seed=seed)
    ((inputs, order),) = source.epoch(epoch)
    return torch.empty(count, dtype=torch.bool).index_copy_(0, order, inputs[:, 0, 0, 0] == 1)


def test_mirror_flips_the_chosen_images_only():
    images, chosen = make_images(8), torch.arange(8) % 3 == 0
    expected = torch.where(chosen[:, None, None, None], images.flip(3), images)
    assert torch.equal(augment.mirror(images, augment.mirror_rows(chosen)), expected)


def test_a_random_half_is_mirrored_first_then_all_every_other_epoch():
    first = mirrored_images(0)
    assert 430 < first.sum() < 570
    for epoch in range(1, 5):
        assert torch.equal(mirrored_images(epoch), first if epoch % 2 == 0 else ~first)
    assert not torch.equal(mirrored_images(0, seed=1), first)


def test_the_other_draws_stay_the_same():
    plain, mirrored = (
        data.Batches(random_examples(70), 16, Pipeline(MEAN, STD, 32, transforms), seed=3)
        for transforms in (("crop",), ("crop", "alternating_flip"))
    )
    kept = []
    for (inputs, labels), (others, same_labels) in zip(plain.epoch(1), mirrored.epoch(1)):
        kept += [torch.equal(image, other) for image, other in zip(inputs, others)]
        turned = [torch.equal(image.flip(2), other) for image, other in zip(inputs, others)]
        assert torch.equal(labels, same_labels) and all(map(any, zip(kept[-16:], turned)))
    assert 16 < sum(kept) < 48
    for (_, targets), (_, others) in zip(batches(("crop",)), batches(CASES[1])):
        assert torch.equal(targets, others)  # mixed in the same shares


@pytest.mark.parametrize("transforms", CASES, ids=",".join)
@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_are_the_same_after_a_resume_on_ranks_and_from_the_host(transforms, epoch):
    expected = list(batches(transforms).epoch(epoch))
    assert same_batches(batches(transforms).epoch(epoch, start=2), expected[2:])
    assert same_batches(batches(transforms, resident="host").epoch(epoch), expected)
    ranks = [batches(transforms, rank=rank, world_size=3).epoch(epoch) for rank in range(3)]
    joined = [[torch.cat(parts) for parts in zip(*shares)] for shares in zip(*ranks)]
    assert same_batches(joined, expected)


def test_all_copies_of_an_image_in_a_batch_are_mirrored_alike():
    pipeline = Pipeline(MEAN, STD, 32, ("alternating_flip",))
    source = data.Batches(random_examples(64), 32, pipeline, repeats=2)
    for inputs, _ in itertools.islice(source.epoch(0), 2):
        assert torch.equal(inputs[:16], inputs[16:])


def test_it_is_an_augmentation_that_excludes_flip():
    assert resolve(train, "--augment", "crop,alternating_flip").augment == "crop,alternating_flip"
    with pytest.raises(argparse.ArgumentTypeError, match="can't have both flip and alternating"):
        augmentations("crop,flip,alternating_flip")
