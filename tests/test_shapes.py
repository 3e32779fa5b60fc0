"""Shapes are made from their seed, and are not trivial to tell apart."""

import torch
from helpers.batches import channels_last

import data
from datasets import shapes


def test_shapes_are_a_function_of_their_seed():
    first, state = shapes.make_shapes(300, seed=1), torch.get_rng_state()
    again, other = shapes.make_shapes(300, seed=1), shapes.make_shapes(300, seed=2)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.images.dtype == torch.uint8 and first.images.shape == (300, 3, 32, 32)
    assert channels_last(first.images)
    assert torch.bincount(first.labels).tolist() == [30] * 10
    assert len(first.images.flatten(1).unique(dim=0)) == 300


def test_shapes_are_not_trivial_to_tell_apart():
    train, test = shapes.make_shapes(2000, seed=1), shapes.make_shapes(1000, seed=2)
    pixels, others = train.images.flatten(1).float(), test.images.flatten(1).float()
    means = torch.stack([pixels[train.labels == label].mean(0) for label in range(10)])
    nearest_mean = torch.cdist(others, means).argmin(1)
    nearest_neighbor = train.labels[torch.cdist(others, pixels).argmin(1)]
    for prediction in (nearest_mean, nearest_neighbor):
        assert (prediction == test.labels).float().mean() < 0.45


def test_shapes_load_with_statistics(monkeypatch):
    load_shapes = shapes.load_shapes
    monkeypatch.setattr(shapes, "load_shapes", lambda: load_shapes(train=500, test=200))
    split = data.load("shapes")
    assert (split.name, split.classes) == ("shapes", shapes.SHAPES)
    assert all(0.2 < mean < 0.8 for mean in split.mean)
    assert all(0.05 < std < 0.4 for std in split.std)
    everything = torch.cat([split.train.images, split.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 700  # no test image is a training image
