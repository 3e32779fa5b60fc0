"""RandAugment (arXiv 1909.13719) and TrivialAugment (arXiv 2103.10158) of a uint8 batch."""

import torch
import torch.nn.functional as F

from datasets import augment
from datasets.draws import per_image, rand, to_device

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCEMENTS = {
    "brightness": augment.adjust_brightness,
    "color": augment.adjust_saturation,
    "contrast": augment.adjust_contrast,
    "sharpness": augment.adjust_sharpness,
}
SIGNED = (*GEOMETRIC, *ENHANCEMENTS)  # the strength of these operations has a random sign
OPERATIONS = ("identity", *SIGNED, "posterize", "solarize", "auto_contrast", "equalize")

# The largest strength of each operation. Shear: tangent; translate: pixels; rotate: degrees;
# enhancements: distance of the factor from 1; posterize: removed bits; solarize: distance of the
# threshold from white, as a fraction of 255.


def rand_augment_strengths(height, width):
    """The ranges of torchvision's RandAugment."""
    return (0, 0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 0.9, 0.9, 0.9, 4, 1, 0, 0)


def trivial_augment_strengths(height, width):
    """The paper's wide ranges."""
    return (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 1, 0, 0)


def rand_augment(images, generator, num_ops=2, magnitude=9, bins=31):
    """Applies num_ops random operations to each image, with strength magnitude / (bins - 1)."""
    strengths = rand_augment_strengths(*images.shape[-2:])
    for draws in rand(generator, len(images), num_ops, 2).unbind(1):
        op = _choose(draws[:, 0])
        strength = _strength(op, strengths, magnitude / (bins - 1), draws[:, 1])
        images = operate(images, op, strength)
    return images


def trivial_augment(images, generator, bins=31):
    """Applies one random operation to each image, with a random strength."""
    draws = rand(generator, len(images), 3)
    op = _choose(draws[:, 0])
    fraction = (draws[:, 2] * bins).floor() / (bins - 1)
    strengths = trivial_augment_strengths(*images.shape[-2:])
    return operate(images, op, _strength(op, strengths, fraction, draws[:, 1]))


def _choose(draw):
    return (draw * len(OPERATIONS)).long()


def _is_one_of(op, names):
    return torch.tensor([name in names for name in OPERATIONS])[op]


def _strength(op, strengths, fraction, sign):
    """A fraction of the largest strength of each image's operation, with a drawn sign; (B,)."""
    signs = torch.where(_is_one_of(op, SIGNED) & (sign < 0.5), -1.0, 1.0)
    return torch.tensor(strengths, dtype=torch.float32)[op] * fraction * signs


def operate(images, op, strength):
    """Applies OPERATIONS[op[i]] with strength[i] to image i; both are (B,), on the CPU.

    Images with the same operation are processed together, and all geometric ones in one step.
    """
    out = images.clone(memory_format=torch.channels_last)
    geometric = _is_one_of(op, GEOMETRIC)
    groups = [(_transform, geometric)]
    for other in sorted(set(op[~geometric].tolist()) - {OPERATIONS.index("identity")}):
        groups.append((_recolor, op == other))
    for function, chosen in groups:
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            index = to_device(rows, images.device)
            changed = function(images.index_select(0, index), op[rows], strength[rows])
            out.index_copy_(0, index, augment.like(changed, images))
    return out


def _transform(images, op, strength):
    """The geometric operations, as one nearest-neighbour affine resampling."""
    height, width = images.shape[-2:]
    # Maps output to input coordinates, in units of half the image.
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)

    def put(name, row, column, values):
        chosen = op == OPERATIONS.index(name)
        theta[chosen, row, column] = values[chosen]

    # A shear keeps the upper left corner in place.
    for column in (1, 2):
        put("shear_x", 0, column, strength * height / width)
    for column in (0, 2):
        put("shear_y", 1, column, strength * width / height)
    whole_pixels = strength.trunc()  # as in torchvision
    put("translate_x", 0, 2, -2 * whole_pixels / width)
    put("translate_y", 1, 2, -2 * whole_pixels / height)
    angle = torch.deg2rad(strength)
    put("rotate", 0, 0, angle.cos())
    put("rotate", 0, 1, -angle.sin() * height / width)
    put("rotate", 1, 0, angle.sin() * width / height)
    put("rotate", 1, 1, angle.cos())
    theta = to_device(theta, images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)


def _recolor(images, op, strength):
    """One operation, the same for all images, that isn't geometric. Returns uint8 or float."""
    from torchvision.transforms.v2 import functional as tvf

    name = OPERATIONS[op[0]]
    if name == "auto_contrast":
        return tvf.autocontrast(images)
    if name == "equalize":
        return tvf.equalize(images)
    if name == "posterize":
        removed_bits = per_image(strength.round().long(), images)
        return images & (256 - torch.pow(2, removed_bits)).to(torch.uint8)
    if name == "solarize":
        threshold = per_image(255 * (1 - strength), images)
        return torch.where(images >= threshold, 255 - images, images)
    factor = per_image(1 + strength, images)
    return ENHANCEMENTS[name](augment.float_planes(images), factor)


TRANSFORMS = {"rand_augment": rand_augment, "trivial_augment": trivial_augment}
