"""Common corruptions of small images at five strengths, after CIFAR-10-C (arXiv 1903.12261).

    corrupted = corrupt(images, "gaussian_noise", 3)     # uint8 (B, 3, H, W) -> uint8 (B, 3, H, W)

The strengths are those of CIFAR-10-C where the operation is the same. Blur and motion are given in
pixels of a 32 px image and scale with it. Snow, frost and glass blur are left out (frost needs
photographs); saturation is from the paper's extra set. What an image's corruption draws depends on
the corruption, the strength and its place among the images, so accuracies can be compared between
models here, but not with published results on CIFAR-10-C.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import derive_seed

STRENGTHS = (1, 2, 3, 4, 5)


def generator(name, strength):
    """The random numbers of a corruption, for all images in their order."""
    return torch.Generator().manual_seed(derive_seed(0, strength, f"corruption {name}"))


def corrupt(images, name, strength, draws=None):
    """uint8 (B, 3, H, W) -> the same, corrupted; deterministic.

    name: a key of CORRUPTIONS; strength: 1 to 5; draws: the `generator` of these that earlier
    images have drawn from (None: there are none).
    """
    function, values = CORRUPTIONS[name]
    x = images.contiguous().float() / 255
    return _to_uint8(function(x, values[strength - 1], draws or generator(name, strength)))


def _to_uint8(x):
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)


# Each corruption takes float images (B, 3, H, W) in [0, 1], its value for the strength and a
# generator on the CPU.


def gaussian_noise(x, std, generator):
    return x + std * torch.randn(x.shape, generator=generator).to(x.device)


def shot_noise(x, photons, generator):
    return torch.poisson(x.cpu() * photons, generator=generator).to(x.device) / photons


def impulse_noise(x, amount, generator):
    """Salt and pepper, drawn for each channel of each pixel."""
    draw = torch.rand(x.shape, generator=generator).to(x.device)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, x))


def defocus_blur(x, values, generator):
    """A disk, softened by a small Gaussian. values: the radius and the Gaussian's std."""
    radius, std = (value * x.shape[-1] / 32 for value in values)
    distance = torch.hypot(*_offsets(min(math.ceil(radius + 3 * std), x.shape[-1] - 1)))
    disk = (distance <= radius).float()[None, None]
    gaussian = torch.exp(-0.5 * (distance / std) ** 2)[None, None]
    kernel = F.conv2d(disk, gaussian, padding=len(distance) // 2)[0]
    return _filter(x, kernel / kernel.sum())


def motion_blur(x, values, generator):
    """A line in a random direction that fades out. values: its length and the fading."""
    length, std = (value * x.shape[-1] / 32 for value in values)
    angle = 2 * math.pi * torch.rand(len(x), 1, 1, generator=generator)
    dy, dx = _offsets(min(math.ceil(length), x.shape[-1] - 1))
    along = dx * angle.cos() + dy * angle.sin()  # distance from the center, along the line
    across = dy * angle.cos() - dx * angle.sin()  # distance from the line
    thickness = (1 - across.abs()).clamp(min=0)
    on_line = torch.where(along > -0.5, thickness, 0.0)  # to one side of the center
    kernels = on_line * torch.exp(-0.5 * (along / std) ** 2)
    return _filter(x, kernels / kernels.sum((1, 2), keepdim=True))


def _offsets(radius):
    """(vertical, horizontal) distances from the center of a square kernel, in pixels."""
    index = torch.arange(-radius, radius + 1, dtype=torch.float32)
    return torch.meshgrid(index, index, indexing="ij")


def _filter(x, kernels):
    """Convolves each image with its own kernel, or all with the only one; reflects the border."""
    B, C, H, W = x.shape
    kernels = kernels.to(x.device).expand(B, -1, -1).repeat_interleave(C, 0)[:, None]
    pad = kernels.shape[-1] // 2
    padded = F.pad(x, (pad, pad, pad, pad), mode="reflect")
    padded = padded.view(1, B * C, H + 2 * pad, W + 2 * pad)
    return F.conv2d(padded, kernels, groups=B * C).view(B, C, H, W)


def zoom_blur(x, largest, generator):
    """The mean of the image and its enlargements in steps of 0.01."""
    zooms = [1 + k / 100 for k in range(round(100 * (largest - 1)) + 1)]
    return sum(_resample(x, zoom=zoom) for zoom in zooms) / len(zooms)


def _resample(x, zoom=1.0, shift=0.0):
    """x, enlarged about its center; shift (B, H, W, 2): of each pixel, where the side is 2."""
    theta = torch.tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]], device=x.device)
    grid = F.affine_grid(theta.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid + shift, padding_mode="reflection", align_corners=False)


def fog(x, values, generator):
    """Clouds of noise in octaves. values: their amount, and the ratio of successive octaves."""
    amount, decay = values
    sides = [2**octave for octave in range(1, x.shape[-1].bit_length())]
    noise = torch.rand(len(x), sum(side * side for side in sides), generator=generator)
    cloud, weight = 0, 1.0
    for side, octave in zip(sides, noise.split([side * side for side in sides], dim=1)):
        octave = octave.view(-1, 1, side, side).to(x.device)
        octave = F.interpolate(octave, x.shape[-2:], mode="bilinear", align_corners=True)
        cloud = cloud + weight * octave
        weight /= decay
    low, high = cloud.amin((1, 2, 3), keepdim=True), cloud.amax((1, 2, 3), keepdim=True)
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * (cloud - low) / (high - low)) * brightest / (brightest + amount)


def brightness(x, amount, generator):
    """Adds to HSV's value; the colors keep their proportions."""
    value = x.amax(1, keepdim=True)
    return torch.where(value > 0, x * (value + amount).clamp(max=1) / value.clamp(min=1e-6), amount)


def saturate(x, values, generator):
    """HSV's saturation times a factor, plus a term; gray stays gray."""
    factor, term = values
    value = x.amax(1, keepdim=True)
    saturation = 1 - x.amin(1, keepdim=True) / value.clamp(min=1e-6)
    wanted = torch.where(saturation > 0, saturation * factor + term, 0.0).clamp(0, 1)
    return value - (value - x) * wanted / saturation.clamp(min=1e-6)


def contrast(x, factor, generator):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def elastic(x, values, generator):
    """Moves pixels by a smooth random field. values: distance and smoothness, per side."""
    distance, smoothness = values
    coarse = max(2, round(1 / smoothness))
    field = 2 * torch.rand(len(x), 2, coarse, coarse, generator=generator) - 1
    field = F.interpolate(field, x.shape[-2:], mode="bicubic", align_corners=True).to(x.device)
    return _resample(x, shift=2 * distance * field.permute(0, 2, 3, 1))


def pixelate(x, factor, generator):
    small = F.interpolate(x, scale_factor=factor, mode="area", recompute_scale_factor=True)
    return F.interpolate(small, x.shape[-2:], mode="nearest")


def jpeg(x, quality, generator):
    """By PIL: torchvision's JPEG functions are deprecated."""
    decoded = []
    for image in _to_uint8(x).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(x.device).float() / 255


CORRUPTIONS = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
    "elastic": (elastic, ((0.02, 0.25), (0.03, 0.25), (0.04, 0.2), (0.05, 0.2), (0.06, 0.15))),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
}
