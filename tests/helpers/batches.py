"""Images for tests of batches, and comparisons."""

import torch
import torch.nn.functional as F

from datasets import mixing
from datasets.examples import Examples

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
MIXED = dict(num_classes=10, cutout_size=9, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.7)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def random_examples(count, classes=10, size=32):
    """Noise images with shuffled labels; class sizes differ by one at most."""
    generator = seeded(0)
    shape = (count, size, size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
    return Examples(images.permute(0, 3, 1, 2), labels)


def same_batches(ours, others):
    """Whether two iterables of (inputs, targets) are bit-identical."""
    ours, others = list(ours), list(others)
    pairs = [pair for batches in zip(ours, others) for pair in zip(*batches)]
    return len(ours) == len(others) and all(torch.equal(a, b) for a, b in pairs)


def mix(images, targets, generator, *args, **options):
    """Draws with these options of draw_mixing, then mixes."""
    shape = tuple(images.shape[-2:])
    drawn = mixing.draw_mixing(generator, len(images), shape, *args, **options)
    return mixing.blend(images, targets, *drawn)


def channels_last(images):
    return images.is_contiguous(memory_format=torch.channels_last)


def make_images(count=16, height=32, width=32):
    """Soft random colors with noise; the first image is one gray, the second has no color."""
    generator = seeded(count)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = F.interpolate(coarse, (height, width), mode="bicubic") * 300 - 20
    images += 20 * torch.randn(count, 3, height, width, generator=generator)
    images[0] = 90
    images[1] = images[1, :1]
    return images.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def one_by_one(reference, images, *parameters):
    """reference(image (3, H, W), parameters of this image) of each image, stacked."""
    return torch.stack([reference(*arguments) for arguments in zip(images, *parameters)])
