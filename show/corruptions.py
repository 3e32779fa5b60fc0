"""Common corruptions of small pictures at five strengths, in the manner of CIFAR-10-C (arXiv 1903.12261).

    worse = corrupt(images, "gaussian_noise", 3)            # uint8 (B, 3, H, W) -> uint8 (B, 3, H, W)

The strengths are CIFAR-10-C's where the operation is the same; blur and motion are in pixels of a 32 px side and grow with
it. Its snow, frost and glass blur are left out (frost needs photographs), saturation is from its extra set. A picture's
draws depend on the corruption, the strength and its place in the batch: accuracies can be compared between models here,
not with published figures of CIFAR-10-C.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import derive_seed

STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(images, name, strength):
    """uint8 (B, 3, H, W) -> the same, corrupted. name: of CORRUPTIONS; strength: 1 to 5. The same each time."""
    function, values = CORRUPTIONS[name]
    generator = torch.Generator().manual_seed(derive_seed(0, strength, f"corruption {name}"))
    x = images.contiguous().float() / 255
    out = function(x, values[strength - 1], generator)
    return out.mul(255).round().clamp(0, 255).to(torch.uint8)


def _normal(x, generator):
    return torch.randn(x.shape, generator=generator).to(x.device)


def gaussian_noise(x, std, generator):
    return x + std * _normal(x, generator)


def shot_noise(x, photons, generator):
    return torch.poisson(x.cpu() * photons, generator=generator).to(x.device) / photons


def impulse_noise(x, amount, generator):
    """Salt and pepper, each value for itself."""
    draw = torch.rand(x.shape, generator=generator).to(x.device)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, x))


def _filter(x, kernels):
    """Convolves each picture with its own (or the only) kernel; the border is reflected."""
    batch, channels, height, width = x.shape
    kernels = kernels.to(x.device).expand(batch, -1, -1).repeat_interleave(channels, 0)[:, None]
    pad = kernels.shape[-1] // 2
    padded = F.pad(x, (pad, pad, pad, pad), mode="reflect").view(
        1, batch * channels, height + 2 * pad, width + 2 * pad
    )
    return F.conv2d(padded, kernels, groups=batch * channels).view(batch, channels, height, width)


def _grid(radius):
    index = torch.arange(-radius, radius + 1, dtype=torch.float32)
    return torch.meshgrid(index, index, indexing="ij")


def defocus_blur(x, values, generator):
    """A disk, itself softened by a small Gaussian."""
    radius, soft = (value * x.shape[-1] / 32 for value in values)
    y, z = _grid(min(math.ceil(radius + 3 * soft), x.shape[-1] - 1))
    disk, gaussian = (
        (torch.hypot(y, z) <= radius).float(),
        torch.exp(-0.5 * (torch.hypot(y, z) / soft) ** 2),
    )
    kernel = F.conv2d(disk[None, None], gaussian[None, None], padding=len(y) // 2)[0, 0]
    return _filter(x, (kernel / kernel.sum())[None])


def motion_blur(x, values, generator):
    """A line from the pixel in a random direction, lighter towards its end."""
    length, spread = (value * x.shape[-1] / 32 for value in values)
    angle = 2 * math.pi * torch.rand(len(x), 1, 1, generator=generator)
    y, z = _grid(min(math.ceil(length), x.shape[-1] - 1))
    along, across = z * angle.cos() + y * angle.sin(), y * angle.cos() - z * angle.sin()
    kernels = (
        torch.exp(-0.5 * (along / spread) ** 2) * (1 - across.abs()).clamp(min=0) * (along > -0.5)
    )
    return _filter(x, kernels / kernels.sum((1, 2), keepdim=True))


def zoom_blur(x, largest, generator):
    """The mean of the picture and its enlargements in steps of a hundredth."""
    zooms = [1 + k / 100 for k in range(round(100 * (largest - 1)) + 1)]
    return sum(_zoom(x, zoom) for zoom in zooms) / len(zooms)


def _zoom(x, zoom):
    theta = torch.tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]], device=x.device).expand(
        len(x), -1, -1
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def fog(x, values, generator):
    """Clouds of noise over several octaves, of which the finer ones weigh less by a factor."""
    amount, decay = values
    size, cloud, weight, side = x.shape[-1], 0, 1.0, 2
    while side <= size:
        noise = torch.rand(len(x), 1, side, side, generator=generator).to(x.device)
        cloud = cloud + weight * F.interpolate(
            noise, x.shape[-2:], mode="bilinear", align_corners=True
        )
        weight, side = weight / decay, side * 2
    low, high = cloud.amin((1, 2, 3), keepdim=True), cloud.amax((1, 2, 3), keepdim=True)
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * (cloud - low) / (high - low)) * brightest / (brightest + amount)


def brightness(x, amount, generator):
    """More of HSV's value; the colours keep their proportions."""
    value = x.amax(1, keepdim=True)
    return torch.where(value > 0, x * (value + amount).clamp(max=1) / value.clamp(min=1e-6), amount)


def saturate(x, values, generator):
    """HSV's saturation times a factor, plus a term; grey stays grey."""
    factor, term = values
    value = x.amax(1, keepdim=True)
    saturation = 1 - x.amin(1, keepdim=True) / value.clamp(min=1e-6)
    wanted = torch.where(saturation > 0, saturation * factor + term, 0.0).clamp(0, 1)
    return value - (value - x) * wanted / saturation.clamp(min=1e-6)


def contrast(x, factor, generator):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def elastic(x, values, generator):
    """Pixels are moved by a smooth random field. values: how far, and how smooth, as parts of the side."""
    far, smooth = values
    coarse = max(2, round(1 / smooth))
    field = 2 * torch.rand(len(x), 2, coarse, coarse, generator=generator) - 1
    field = F.interpolate(field, x.shape[-2:], mode="bicubic", align_corners=True).to(x.device)
    grid = F.affine_grid(
        torch.eye(2, 3, device=x.device).expand(len(x), -1, -1), list(x.shape), align_corners=False
    )
    return F.grid_sample(
        x,
        grid + 2 * far * field.permute(0, 2, 3, 1),
        padding_mode="reflection",
        align_corners=False,
    )


def pixelate(x, factor, generator):
    small = F.interpolate(x, scale_factor=factor, mode="area", recompute_scale_factor=True)
    return F.interpolate(small, x.shape[-2:], mode="nearest")


def jpeg(x, quality, generator):
    pixels, out = x.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy(), []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        out.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(out).permute(0, 3, 1, 2).to(x.device).float() / 255


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
