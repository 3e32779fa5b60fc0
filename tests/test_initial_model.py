"""The model that a run starts from."""

import pytest
import torch
from helpers.training import resolve, same_weights

import train
import train_sota
from datasets.examples import Examples, Split
from datasets.shapes import SHAPES, make_shapes
from training import initial_model

TEST = make_shapes(20, seed=0)
SPLIT = Split("shapes", TEST, None, TEST, SHAPES, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def build(script, model, seed, **options):
    args = resolve(script, "--model", model, "--seed", seed)
    return initial_model.build_model(args, SPLIT, None, **options)[0]


def test_the_seed_chooses_the_initial_weights():
    first, again, other = (build(train, "resnet20", seed) for seed in (0, 0, 1))
    assert same_weights(first, again)
    pairs = [(a, b) for a, b in zip(first.parameters(), other.parameters()) if a.dim() > 1]
    assert pairs and not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.extras("peft")
def test_the_seed_chooses_the_initial_adapters():
    pytest.importorskip("peft")
    models = [build(train_sota, "vit_custom", seed, lora_rank=2) for seed in (0, 0, 1)]
    first, again, other = ({k: v for k, v in m.named_parameters() if "lora_A" in k} for m in models)
    assert first and all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_initial_images_are_spread_over_the_training_images(monkeypatch):
    """The first images of a folder are all of one class."""
    monkeypatch.setattr(initial_model, "INITIAL_IMAGES", 4)
    values = torch.arange(40, dtype=torch.uint8)
    pixels = values.view(40, 1, 1, 1).expand(40, 3, 32, 32)
    examples = Examples(pixels, torch.arange(40) // 4)
    images = initial_model.initial_images(examples, ((0.0,) * 3, (1.0,) * 3), 32)
    assert (255 * images[:, 0, 0, 0]).round().tolist() == [0, 10, 20, 30]
