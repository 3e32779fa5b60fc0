"""Corruptions: the same each time, of the same shape, and as strong as they say."""

import pytest
import torch

from show import corruptions


@pytest.fixture(scope="module")
def images(few_shapes):
    return few_shapes.test.images[:24]


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_each_is_deterministic_and_grows(images, name):
    before = images.clone()
    worse = [corruptions.corrupt(images, name, strength) for strength in corruptions.STRENGTHS]
    again = corruptions.corrupt(images, name, 3)
    assert torch.equal(images, before) and torch.equal(worse[2], again)
    assert all(each.dtype == torch.uint8 and each.shape == images.shape for each in worse)
    distance = [(each.float() - images.float()).abs().mean().item() for each in worse]
    assert min(distance) > 0
    if name != "saturate":  # its first two take colour away, the others add
        assert distance[4] > distance[0] and all(
            b > 0.9 * a for a, b in zip(distance, distance[1:])
        ), distance


def test_other_sizes_work(few_shapes):
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    for name in corruptions.CORRUPTIONS:
        assert corruptions.corrupt(images, name, 5).shape == images.shape


def test_strengths_by_hand():
    gray = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    assert corruptions.corrupt(gray, "gaussian_noise", 1).float().std().item() == pytest.approx(
        0.04 * 255, rel=0.03
    )
    assert corruptions.corrupt(gray, "shot_noise", 5).float().var().item() == pytest.approx(
        255**2 * 128 / 255 / 50, rel=0.05
    )
    changed = (corruptions.corrupt(gray, "impulse_noise", 5) != 128).float().mean().item()
    assert changed == pytest.approx(0.07, rel=0.1)
    for name in (
        "defocus_blur",
        "motion_blur",
        "zoom_blur",
        "contrast",
        "elastic",
        "pixelate",
        "saturate",
    ):
        assert (corruptions.corrupt(gray, name, 5).int() - 128).abs().max() <= 1, (
            name
        )  # nothing to blur or move
    assert (corruptions.corrupt(gray, "brightness", 1) == round(128 + 0.05 * 255)).all()
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    blurred = corruptions.corrupt(point, "defocus_blur", 4).float()
    assert blurred[0, 0, 16, 16] == blurred[0, 0, 15, 16] and blurred.sum() == pytest.approx(
        3 * 255, rel=0.02
    )
