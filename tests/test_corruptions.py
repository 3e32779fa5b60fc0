"""Corruptions: deterministic, of the same shape, and as strong as they say."""

import pytest
import torch

from show.corruptions import CORRUPTIONS, STRENGTHS, corrupt, generator


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_deterministic_and_grows(few_shapes, name):
    images = few_shapes.test.images[:24]
    before = images.clone()
    corrupted = [corrupt(images, name, strength) for strength in STRENGTHS]
    assert torch.equal(images, before) and torch.equal(corrupted[2], corrupt(images, name, 3))
    assert all(each.dtype == torch.uint8 and each.shape == images.shape for each in corrupted)
    distances = [(each.float() - images.float()).abs().mean().item() for each in corrupted]
    assert min(distances) > 0
    if name != "saturate":  # its first two strengths remove color, the others add it
        assert distances[4] > distances[0]
        assert all(b > 0.9 * a for a, b in zip(distances, distances[1:]))
    assert corrupt(images.new_zeros(2, 3, 48, 48), name, 5).shape == (2, 3, 48, 48)


# Mean absolute distance from 24 images at strength 3, of 255.
DISTANCES = {
    "gaussian_noise": 15.698,
    "shot_noise": 12.840,
    "impulse_noise": 3.863,
    "defocus_blur": 4.107,
    "motion_blur": 6.955,
    "zoom_blur": 6.507,
    "fog": 26.487,
    "brightness": 25.929,
    "contrast": 11.946,
    "saturate": 14.231,
    "elastic": 6.882,
    "pixelate": 6.849,
    "jpeg": 9.501,
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_always_the_same(few_shapes, name):
    """With another strength, accuracies could not be compared with those of earlier versions."""
    images = few_shapes.test.images[:24]
    distance = (corrupt(images, name, 3).float() - images.float()).abs().mean().item()
    assert distance == pytest.approx(DISTANCES[name], rel=0.02)


GRAY = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)


def test_noise_has_the_stated_strength():
    noisy = corrupt(GRAY, "gaussian_noise", 1).float()
    assert noisy.std().item() == pytest.approx(0.04 * 255, rel=0.03)
    photons = corrupt(GRAY, "shot_noise", 5).float()
    assert photons.var().item() == pytest.approx(255**2 * 128 / 255 / 50, rel=0.05)
    changed = (corrupt(GRAY, "impulse_noise", 5) != 128).float().mean().item()
    assert changed == pytest.approx(0.07, rel=0.1)
    assert (corrupt(GRAY, "brightness", 1) == round(128 + 0.05 * 255)).all()


UNCHANGED = "defocus_blur motion_blur zoom_blur contrast elastic pixelate saturate"


@pytest.mark.parametrize("name", UNCHANGED.split())
def test_uniform_gray_has_nothing_to_blur_or_move(name):
    assert (corrupt(GRAY, name, 5).int() - 128).abs().max() <= 1


def test_defocus_blur_spreads_a_point_evenly():
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    blurred = corrupt(point, "defocus_blur", 4).float()
    assert blurred[0, 0, 16, 16] == blurred[0, 0, 15, 16]
    assert blurred.sum() == pytest.approx(3 * 255, rel=0.02)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_blocks_are_corrupted_as_all_images_at_once(name):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    draws = generator(name, 3)
    blocks = [corrupt(block, name, 3, draws) for block in images.split(2)]
    assert not torch.equal(blocks[0], blocks[1])
    assert torch.equal(torch.cat(blocks), corrupt(images, name, 3))
