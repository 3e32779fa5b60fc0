"""RandAugment (arXiv 1909.13719) and TrivialAugment (arXiv 2103.10158) of a uint8 batch."""

import torch
import torch.nn.functional as F

from datasets import augment
from datasets.draws import Augmentation, constant, per_image, rand

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCEMENTS = ("contrast", "color", "brightness", "sharpness")
SIGNED = (*GEOMETRIC, *ENHANCEMENTS)  # the strength of these operations has a random sign
OPERATIONS = (
    *("identity", *GEOMETRIC, "brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "auto_contrast", "equalize"),
)
# The order in which a batch is processed. The operations of SIGNED are computed in float.
LAYOUT = (*SIGNED, "posterize", "solarize", "auto_contrast", "equalize", "identity")


def rand_augment_strengths(height, width):
    """The largest strengths of OPERATIONS, in their order: those of torchvision's RandAugment.

    Shear: tangent; translate: pixels; rotate: degrees; enhancements: distance of the factor from 1;
    posterize: removed bits; solarize: distance of the threshold from white, as a fraction of 255.
    """
    return (0, 0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 0.9, 0.9, 0.9, 4, 1, 0, 0)


def trivial_augment_strengths(height, width):
    """The same for TrivialAugment: the paper's wide ranges."""
    return (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 1, 0, 0)


def draw_rand_augment(generator, count, shape, num_ops=2, magnitude=9, bins=31):
    """num_ops operations for each image, at magnitude / (bins - 1) of their largest strength."""
    largest = rand_augment_strengths(*shape)
    chosen = []
    for draws in rand(generator, count, num_ops, 2).unbind(1):
        op = _choose(draws[:, 0])
        chosen.append((op, _strength(op, largest, magnitude / (bins - 1), draws[:, 1])))
    return arrange(chosen, shape)


def draw_trivial_augment(generator, count, shape, bins=31):
    """One random operation for each image, with a random strength."""
    draws = rand(generator, count, 3)
    op = _choose(draws[:, 0])
    fraction = (draws[:, 2] * bins).floor() / (bins - 1)
    strength = _strength(op, trivial_augment_strengths(*shape), fraction, draws[:, 1])
    return arrange([(op, strength)], shape)


def _choose(draw):
    return (draw * len(OPERATIONS)).long()


def _strength(op, largest, fraction, draw):
    """A fraction of the largest strength of each image's operation, with a drawn sign; (B,)."""
    signed = torch.tensor([name in SIGNED for name in OPERATIONS])[op]
    signs = torch.where(signed & (draw < 0.5), -1.0, 1.0)
    return torch.tensor(largest, dtype=torch.float32)[op] * fraction * signs


def arrange(chosen, shape):
    """What `operate` takes to apply OPERATIONS[op[i]] with strength[i] to image i, in each round.

    chosen: [(op, strength)] of the rounds, both (B,). A round begins with sorting the images by
    operation, so that those with the same one are a slice. Returns (rounds, the order (B,) that
    restores the batch).
    """
    layout = torch.tensor([LAYOUT.index(name) for name in OPERATIONS])
    rounds, position = [], torch.arange(len(chosen[0][0]))  # position: where each image is
    for op, strength in chosen:
        groups_of = layout[op]
        order = groups_of.argsort(stable=True)
        counts = torch.bincount(groups_of, minlength=len(LAYOUT)).tolist()
        strengths = dict(zip(LAYOUT, strength[order].split(counts)))
        rounds.append((position[order], counts, *_parameters(strengths, shape)))
        position = order.argsort()
    return tuple(rounds), position


def _parameters(strengths, shape):
    """The numbers that the operations take; strengths: {name of the operation: (n,)}."""
    factor = 1 + torch.cat([strengths[name] for name in ENHANCEMENTS])
    kept_bits = (256 - torch.pow(2, strengths["posterize"].round().long())).to(torch.uint8)
    threshold = 255 * (1 - strengths["solarize"])
    numbers = factor, 1 - factor, kept_bits, threshold
    return _matrices(strengths, *shape), *map(per_image, numbers)


def _matrices(strengths, height, width):
    """(n, 2, 3): they map output to input coordinates, in units of half the image."""
    counts = [len(strengths[name]) for name in GEOMETRIC]
    matrices = torch.eye(2, 3).repeat(sum(counts), 1, 1)
    shear_x, shear_y, translate_x, translate_y, rotate = matrices.split(counts)
    # A shear keeps the upper left corner in place.
    shear_x[:, 0, 1:] = (strengths["shear_x"] * height / width)[:, None]
    shear_y[:, 1, ::2] = (strengths["shear_y"] * width / height)[:, None]
    # Whole pixels, as in torchvision.
    translate_x[:, 0, 2] = -2 * strengths["translate_x"].trunc() / width
    translate_y[:, 1, 2] = -2 * strengths["translate_y"].trunc() / height
    angle = torch.deg2rad(strengths["rotate"])
    rotate[:, 0, 0] = rotate[:, 1, 1] = angle.cos()
    rotate[:, 0, 1] = -angle.sin() * height / width
    rotate[:, 1, 0] = angle.sin() * width / height
    return matrices


def operate(images, rounds, restore):
    """Applies what `arrange` returns to a batch."""
    for order, counts, *parameters in rounds:
        images = _operate_once(images.index_select(0, order), counts, *parameters)
    planes = images.index_select(0, restore).unbind(1)
    return torch.stack(planes, dim=3).permute(0, 3, 1, 2)  # channels_last


def _operate_once(images, counts, matrices, factor, rest, kept_bits, threshold):
    """One operation on each image. They are in the order of LAYOUT, with `counts` of each."""
    from torchvision.transforms.v2 import functional as tvf

    in_float, others = counts[: len(SIGNED)], counts[len(SIGNED) :]
    x = augment.float_planes(images[: sum(in_float)])
    geometric = len(matrices)
    if geometric:
        x[:geometric] = _transform(x[:geometric], matrices)
    if len(factor):
        _enhance_(x[geometric:], in_float[len(GEOMETRIC) :], factor, rest)
    x = x.round_().clamp_(0, 255).to(torch.uint8)
    posterized, solarized, stretched, equalized, unchanged = images[len(x) :].split(others)
    posterized = posterized & kept_bits
    solarized = torch.where(solarized >= threshold, 255 - solarized, solarized)
    stretched, equalized = tvf.autocontrast(stretched), tvf.equalize(equalized)
    return torch.cat([x, posterized, solarized, stretched, equalized, unchanged])


def _transform(x, matrices):
    """The geometric operations, as one nearest-neighbor affine resampling."""
    height, width = x.shape[-2:]
    # F.affine_grid would make the coordinates anew.
    pixels = constant(_coordinates, height, width, device=x.device).expand(len(x), -1, -1)
    grid = pixels.bmm(matrices.transpose(1, 2)).view(-1, height, width, 2)
    return F.grid_sample(x, grid, mode="nearest", align_corners=False)


def _coordinates(height, width):
    """Homogeneous coordinates (x, y, 1) of the pixels, (1, H * W, 3), as in F.affine_grid."""
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    return F.pad(grid.view(1, -1, 2), (0, 1), value=1.0)


def _enhance_(x, counts, factor, rest):
    """The enhancements, in place: factor * x + rest * base, where rest is 1 - factor.

    The base is the mean gray (contrast), gray (color), black (brightness), or the blurred image
    (sharpness).
    """
    contrast, color, brightness, sharpness = counts
    with_gray, blended = contrast + color, contrast + color + brightness
    gray = augment.gray_of(x[:with_gray])
    gray[:contrast] = gray[:contrast].mean((1, 2, 3), keepdim=True)
    x[:blended].mul_(factor[:blended])
    x[:with_gray].add_(gray.mul_(rest[:with_gray]))
    if sharpness:
        _sharpen_(x[blended:], factor[blended:])


def _sharpen_(x, factor):
    if min(x.shape[2:]) <= 2:  # only a border, which stays as it is
        return
    blurred = x.clone()
    kernel = constant(_blur_kernel, device=x.device)
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=3).round_()
    torch.lerp(blurred, x, factor, out=x)


def _blur_kernel():
    kernel = torch.full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    return kernel


rand_augment = Augmentation(draw_rand_augment, operate)
trivial_augment = Augmentation(draw_trivial_augment, operate)

TRANSFORMS = {"rand_augment": rand_augment, "trivial_augment": trivial_augment}
