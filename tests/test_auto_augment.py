"""The operations of RandAugment and TrivialAugment are torchvision's, with the same draws."""

import pytest
import torch
from helpers.batches import make_images, one_by_one, seeded
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from datasets import auto_augment
from datasets.auto_augment import OPERATIONS
from datasets.draws import rand

TABLES = {
    v2.RandAugment: auto_augment.rand_augment_strengths,
    v2.TrivialAugmentWide: auto_augment.trivial_augment_strengths,
}


def torchvision_magnitudes(transform, name, height, width, bins=31):
    """(magnitudes (bins,), signed) of an operation in torchvision's transform."""
    key = name.title().replace("_", "")
    magnitudes, signed = transform._AUGMENTATION_SPACE[key]
    values = magnitudes(bins, height, width)
    return torch.zeros(bins) if values is None else values.float(), signed


def operate(images, op, strength):
    """Applies OPERATIONS[op[i]] with strength[i] to image i."""
    return auto_augment.operate(images, *auto_augment.arrange([(op, strength)], images.shape[-2:]))


def as_strength(name, magnitude):
    """torchvision's magnitude in our unit: it gives remaining bits and the threshold itself."""
    return {"posterize": 8 - magnitude, "solarize": 1 - magnitude}.get(name, magnitude)


def reference_operation(image, name, magnitude):
    """An operation of torchvision's RandAugment on an image (3, H, W)."""
    tangent = float(torch.rad2deg(torch.atan(torch.tensor(magnitude, dtype=torch.float64))))
    nearest, whole = InterpolationMode.NEAREST, int(magnitude)

    def affine(translate=(0, 0), shear=(0.0, 0.0), center=None):
        return tvf.affine(image, 0.0, list(translate), 1.0, list(shear), nearest, center=center)

    operations = {
        "identity": lambda: image,
        "shear_x": lambda: affine(shear=(tangent, 0.0), center=[0, 0]),
        "shear_y": lambda: affine(shear=(0.0, tangent), center=[0, 0]),
        "translate_x": lambda: affine((whole, 0)),
        "translate_y": lambda: affine((0, whole)),
        "rotate": lambda: tvf.rotate(image, magnitude, nearest),
        "brightness": lambda: tvf.adjust_brightness(image, 1 + magnitude),
        "color": lambda: tvf.adjust_saturation(image, 1 + magnitude),
        "contrast": lambda: tvf.adjust_contrast(image, 1 + magnitude),
        "sharpness": lambda: tvf.adjust_sharpness(image, 1 + magnitude),
        "posterize": lambda: tvf.posterize(image, whole),
        "solarize": lambda: tvf.solarize(image, 255.0 * magnitude),
        "auto_contrast": lambda: tvf.autocontrast(image),
        "equalize": lambda: tvf.equalize(image),
    }
    return operations[name]()


@pytest.mark.parametrize("transform", TABLES)
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (224, 224)])
@pytest.mark.parametrize("bins", [31, 11])
def test_operations_and_strengths_are_torchvisions(transform, height, width, bins):
    space = list(transform._AUGMENTATION_SPACE)
    assert [name.title().replace("_", "") for name in OPERATIONS] == space
    for name, largest in zip(OPERATIONS, TABLES[transform](height, width), strict=True):
        magnitudes, signed = torchvision_magnitudes(transform, name, height, width, bins)
        ours = torch.tensor(largest) * torch.arange(bins) / (bins - 1)
        if name == "posterize":
            ours = ours.round()
        if largest:
            torch.testing.assert_close(ours, as_strength(name, magnitudes), atol=1e-5, rtol=1e-5)
        assert signed == (name in auto_augment.SIGNED)


@pytest.mark.parametrize("transform", TABLES)
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name, height, width, transform):
    images = make_images(12, height, width)
    magnitudes, signed = torchvision_magnitudes(transform, name, height, width)
    magnitudes = magnitudes[[0, 3, 9, 10, 15, 22, 30]]
    for magnitude in [*magnitudes.tolist(), *(-magnitudes[1:]).tolist() * signed]:
        expected = one_by_one(lambda i, m=magnitude: reference_operation(i, name, m), images).int()
        op = torch.full((12,), OPERATIONS.index(name))
        out = operate(images, op, torch.full((12,), as_strength(name, magnitude)))
        assert out.dtype == torch.uint8
        difference = (out.int() - expected).abs()
        if name in auto_augment.ENHANCEMENTS:
            # torchvision truncates, and contrast also takes the mean of integers.
            assert difference.max() <= 2
        elif name in ("shear_x", "shear_y", "rotate"):
            # Places half-way between two pixels may be rounded either way.
            assert (difference > 0).float().mean() <= 0.005
        elif name == "solarize":
            at_threshold = (images - 255.0 * magnitude).abs() <= 1e-3
            assert difference[~at_threshold].sum() == 0
        else:
            assert difference.max() == 0


def test_a_batch_of_operations_equals_single_images():
    images = make_images(56)
    op = torch.arange(56) % len(OPERATIONS)
    largest = torch.tensor(auto_augment.trivial_augment_strengths(32, 32))
    strength = largest[op] * rand(seeded(), 56)
    singles = zip(images.split(1), op.split(1), strength.split(1))
    expected = torch.cat([operate(*single) for single in singles])
    assert torch.equal(operate(images, op, strength), expected)


def torchvision_step(image, transform, draws, k, bins):
    """The operation of torchvision that was drawn (choice, sign) at bin k, through `operate`."""
    op = int(draws[0] * len(OPERATIONS))
    name = OPERATIONS[op]
    magnitudes, signed = torchvision_magnitudes(transform, name, 32, 32, bins)
    magnitude = -magnitudes[k] if signed and draws[1] < 0.5 else magnitudes[k]
    strength = as_strength(name, magnitude).view(1)
    return operate(image[None], torch.tensor([op]), strength)[0]


def assert_nearly_equal(out, expected):
    """The last digit of a strength may change the rounding of a few pixels."""
    assert (out != expected).float().mean() < 1e-3


@pytest.mark.parametrize("num_ops, magnitude, bins", [(1, 9, 31), (3, 30, 31), (2, 5, 11)])
def test_rand_augment(num_ops, magnitude, bins):
    images = make_images(48)

    def reference(image, draws):
        for draw in draws:
            image = torchvision_step(image, v2.RandAugment, draw, magnitude, bins)
        return image

    out = auto_augment.rand_augment(images, seeded(), num_ops, magnitude, bins)
    assert_nearly_equal(out, one_by_one(reference, images, rand(seeded(), 48, num_ops, 2)))


@pytest.mark.parametrize("bins", [31, 11])
def test_trivial_augment(bins):
    images = make_images(96)

    def reference(image, draw):
        return torchvision_step(image, v2.TrivialAugmentWide, draw, int(draw[2] * bins), bins)

    out = auto_augment.trivial_augment(images, seeded(), bins)
    assert_nearly_equal(out, one_by_one(reference, images, rand(seeded(), 96, 3)))


def test_the_smallest_images_have_only_a_border_to_sharpen():
    images = torch.randint(0, 256, (3, 3, 2, 2), dtype=torch.uint8)
    op = torch.full((3,), OPERATIONS.index("sharpness"))
    assert torch.equal(operate(images.clone(), op, torch.full((3,), 0.9)), images)
    assert torch.equal(tvf.adjust_sharpness(images, 1.9), images)
