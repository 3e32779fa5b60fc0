"""The batches of a run follow its arguments."""

from dataclasses import replace

import pytest
import torch
from helpers.training import CPU, resolve

import models
import train
from datasets.examples import Split
from datasets.shapes import SHAPES, make_shapes
from training.distributed import Ranks
from training.inputs import LARGEST_EVALUATION_BATCH, Inputs, images_at_once
from training.linear_probe import Probe

EXAMPLES = make_shapes(60, seed=0)
SPLIT = Split("shapes", EXAMPLES.take(torch.arange(40)), None, EXAMPLES, SHAPES, (), ())
NORMALIZATION = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def inputs(*argv, split=SPLIT, at_once=10, ranks=None):
    args = resolve(train, "--batch-size", 20, *argv)
    return Inputs(args, split, NORMALIZATION, ranks or Ranks(CPU), None, at_once)


PLAIN = ("--augment", "none", "--mixup", 0, "--cutmix", 0)


def test_training_batches_are_augmented_and_mixed_as_the_arguments_say():
    images, labels = next(inputs(*PLAIN).train(None).epoch(0))
    assert images.shape == (20, 3, 32, 32) and labels.dtype == torch.int64
    cropped, _ = next(inputs("--augment", "crop", *PLAIN[2:]).train(None).epoch(0))
    assert not torch.equal(images, cropped)
    _, targets = next(inputs("--augment", "flip", "--mixup", 0.5).train(None).epoch(0))
    assert targets.shape == (20, 10)
    again, _ = next(inputs(*PLAIN, "--seed", 1).train(None).epoch(0))
    assert not torch.equal(images, again)
    resized, _ = next(inputs(*PLAIN, "--image-size", 64).train(None).epoch(0))
    assert resized.shape == (20, 3, 64, 64)


def test_a_batch_repeats_images_with_repeated_augmentation():
    _, labels = next(inputs(*PLAIN, "--repeated-augment", 2).train(None).epoch(0))
    assert torch.equal(labels[:10], labels[10:])


def test_evaluation_has_every_image_once_in_order_and_normalized():
    batches = inputs("--augment", "crop", "--cutmix", 1).test()
    assert len(batches) == 6
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION)
    torch.testing.assert_close(images, (EXAMPLES.images / 255 - mean) / std)
    assert torch.equal(labels, EXAMPLES.labels)


def test_the_curve_follows_held_out_images_where_there_are_some():
    held_out = EXAMPLES.take(torch.arange(40, 60))
    for val, count in ((None, 60), (held_out, 20)):
        split = replace(SPLIT, val=val)
        assert len(inputs(split=split).evaluation(None).labels) == count
        assert len(inputs(split=split).test().labels) == 60


def test_ranks_share_a_training_batch_and_an_evaluation():
    alone, _ = next(inputs(*PLAIN).train(None).epoch(0))
    shares, sizes = [], []
    for rank in range(2):
        part = inputs(*PLAIN, ranks=Ranks(CPU, rank, world=2))
        shares.append(next(part.train(None).epoch(0))[0])
        sizes.append([len(labels) for _, labels in part.test()])
    assert torch.equal(torch.cat(shares), alone)
    assert sizes == [[10, 10, 10], [10, 10, 10]]  # as many at once as in one process


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--batch-size", 32), 128),
        (("--batch-size", 32, "--accumulate", 4), 32),
        (("--batch-size", 1024), LARGEST_EVALUATION_BATCH),
    ],
)
def test_an_evaluation_takes_four_times_the_images_of_a_step(argv, expected):
    assert images_at_once(resolve(train, *argv)) == expected


def test_a_frozen_backbone_trains_on_features_that_are_computed_once():
    probe = Probe(models.create_model("vit_custom", 10, width=24, depth=1, heads=2))
    part = inputs("--model", "vit_custom", "--weights", "x.pt", "--freeze-backbone")
    part.args.batch_size = 20
    features, labels = next(part.train(probe).epoch(0))
    assert features.shape == (20, 24) and labels.shape == (20,)
    evaluated, _ = next(iter(part.evaluation(probe)))
    images, _ = next(iter(part.test()))
    with torch.no_grad():
        torch.testing.assert_close(evaluated, probe.features(images))
