"""Random numbers for a batch, one row per image, drawn on the CPU: the same for all devices."""

import torch


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


def to_device(values, device):
    """Sends draws to a device. CUDA copies small pageable tensors at the call: no need to wait."""
    return values.to(device, non_blocking=device.type == "cuda")


def per_image(values, images):
    """Draws (B,) as (B, 1, 1, 1) on the images' device."""
    return to_device(values, images.device).view(-1, 1, 1, 1)
