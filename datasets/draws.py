"""Random numbers for a batch, one row per image, drawn on the CPU: the same for all devices.

An augmentation draws first, and then changes the images on their device. So the draws of many
batches can be sent to a GPU together.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

MAX_BATCHES = 64  # most batches whose draws are sent to a GPU together


@dataclass(frozen=True)
class Augmentation:
    """(images (B, C, H, W), generator, options of draw) -> images.

    draw(generator, B, (H, W), options): what is random, a tuple of tensors with a row per image, of
    plain values and of such tuples; apply(images, *drawn): the rest, on the device of the images.
    """

    draw: Callable
    apply: Callable

    def __call__(self, images, generator, *args, **options):
        drawn = self.draw(generator, len(images), tuple(images.shape[-2:]), *args, **options)
        return self.apply(images, *to_device(drawn, images.device))


class RankGenerator:
    """A generator for one rank: it draws for the global batch and keeps the rank's rows.

    rows: a slice of the `total` images. The number of ranks doesn't change an image's draws.
    """

    def __init__(self, generator, rows, total):
        self.generator, self.rows, self.total = generator, rows, total


def of_the_batch(generator):
    """The generator of draws that concern the batch as a whole: the same on all ranks."""
    return generator.generator if isinstance(generator, RankGenerator) else generator


def rand(generator, count, *shape, low=0.0, high=1.0):
    """Uniform numbers in [low, high), float32 (count, *shape); row i belongs to image i."""

    def sample(rows, generator):
        return torch.rand(rows, *shape, generator=generator)

    return _draw(generator, count, sample).mul_(high - low).add_(low)


def rand_beta(generator, count, alpha):
    """Beta(alpha, alpha) draws, float32 (count,). torch's Beta distribution takes no generator."""

    def sample(rows, generator):
        shape = torch.full((rows, 2), float(alpha))
        if alpha < 0.1:  # float32 underflows: Gamma(a) as Gamma(a + 1) * U**(1 / a), in logarithms
            larger = torch._standard_gamma(shape + 1, generator=generator)
            uniform = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
            logs = larger.double().log() + uniform.log() / alpha
            return (logs[:, 0] - logs[:, 1]).sigmoid().float()
        gammas = torch._standard_gamma(shape, generator=generator).clamp_(min=1e-30)
        return gammas[:, 0] / gammas.sum(1)

    if alpha == 1:
        return rand(generator, count)
    return _draw(generator, count, sample)


def _draw(generator, count, sample):
    if not isinstance(generator, RankGenerator):
        return sample(count, generator)
    drawn = sample(generator.total, generator.generator)[generator.rows]
    assert len(drawn) == count, f"{count} images, but the rank has {len(drawn)} rows of the batch"
    return drawn


def per_image(values):
    """(B,) -> (B, 1, 1, 1)"""
    return values.view(-1, 1, 1, 1)


# ---- from the host to the device -----------------------------------------------------------------


def to_device(drawn, device):
    """The draws of one batch on a device."""
    if device.type == "cpu":
        return drawn
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, drawn)


@functools.lru_cache(maxsize=64)
def constant(make, *args, device):
    """make(*args) on a device, made and sent there once."""
    return to_device(make(*args), device)


def send_in_groups(batches, device):
    """Yields the draws of each batch on the device; `batches` is an iterator over those on the CPU.

    A GPU gets those of several batches in one transfer. The next group is drawn during the steps on
    the current one: two batches in each step, so groups grow from one batch to MAX_BATCHES.
    """
    if device.type != "cuda":
        for drawn in batches:
            yield to_device(drawn, device)
        return
    group = list(itertools.islice(batches, 1))
    while group:
        following = []
        for drawn in _send(group, device):
            yield drawn
            following += itertools.islice(batches, min(2, MAX_BATCHES - len(following)))
        group = following


def _send(group, device):
    """The draws of several batches on a GPU. They have the same structure and dtypes."""
    flat = [tree_flatten(drawn) for drawn in group]
    columns = [list(column) for column in zip(*(leaves for leaves, _ in flat))]
    tensors = [column for column in columns if isinstance(column[0], torch.Tensor)]
    tensors.sort(key=lambda column: -column[0].element_size())  # so that every part is aligned
    joined = [torch.cat(column) for column in tensors]
    parts = [values.flatten().view(torch.uint8) for values in joined]
    sizes = [len(part) for part in parts]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    torch.cat(parts, out=buffer)
    sent = buffer.to(device, non_blocking=True).split(sizes)
    for column, values, part in zip(tensors, joined, sent):
        rows = [len(tensor) for tensor in column]
        # In place, because `columns` holds the same list.
        column[:] = part.view(values.dtype).view(values.shape).split(rows)
    return [tree_unflatten(leaves, spec) for leaves, (_, spec) in zip(zip(*columns), flat)]
