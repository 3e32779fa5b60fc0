"""Ten classes of shapes that are drawn here: a dataset without files and without network access."""

import functools

import torch
import torch.nn.functional as F

from datasets.examples import Examples, Split

SHAPES = (
    "disc", "ellipse", "square", "triangle", "star", "cross", "ring", "frame", "crescent", "bars",
)  # fmt: skip
SIZE = 32  # pixels on a side


@functools.cache  # for several runs in one process
def load_shapes(train=10_000, test=2_000):
    return Split("shapes", make_shapes(train, seed=1), None, make_shapes(test, seed=2), SHAPES)


def make_shapes(count, seed):
    """Examples of SHAPES: one shape per image, on a noisy background with clutter.

    Place, size, rotation and colors are random.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(SHAPES)
    images = torch.empty(count, SIZE, SIZE, 3, dtype=torch.uint8)
    for index in torch.arange(count).split(1000):
        drawn = _draw(labels[index], generator)
        images[index] = (drawn.clamp(0, 1) * 255).round().to(torch.uint8)
    return Examples(images.permute(0, 3, 1, 2), labels)


def _draw(labels, generator):
    """Images (n, SIZE, SIZE, 3) of shapes, about 0 to 1."""
    n = len(labels)
    axis = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def paint(images, distance, color):
        cover = (0.5 - distance).clamp(0, 1)[..., None]  # the edge is soft by half a pixel
        return images.lerp(color[:, None, None], cover)

    back, other = uniform(3, high=0.9), uniform(3, high=0.9)
    slope = uniform(1, 1) * x / SIZE + uniform(1, 1) * y / SIZE
    images = back[:, None, None].lerp(other[:, None, None], 0.5 * slope[..., None])
    for _ in range(3):  # clutter: small discs
        cx, cy = uniform(1, 1, high=SIZE), uniform(1, 1, high=SIZE)
        radius = uniform(1, 1, low=0.8, high=2.2)
        distance = ((x - cx) ** 2 + (y - cy) ** 2).sqrt() - radius
        images = paint(images, distance, uniform(3))
    radius = uniform(1, 1, low=7, high=13)
    cx = uniform(1, 1, low=-1.0) * (SIZE / 2 - radius * 0.8) + SIZE / 2
    cy = uniform(1, 1, low=-1.0) * (SIZE / 2 - radius * 0.8) + SIZE / 2
    angle = uniform(1, 1, low=-0.4, high=0.4)
    u = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / radius
    v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / radius
    distance = _distances(u, v)[labels, torch.arange(n)] * radius
    # The background's mean color, moved in a random direction; the clamping can shorten the way.
    direction = F.normalize(torch.randn(n, 3, generator=generator), dim=1)
    color = back.lerp(other, 0.5) + direction * uniform(1, low=0.4, high=0.8)
    images = paint(images, distance, color.clamp(0, 1))
    noise = torch.randn(images.shape, generator=generator)
    return images + noise * uniform(1, 1, 1, low=0.01, high=0.06)


def _distances(u, v):
    """Approximate signed distances (negative inside) to SHAPES about as large as the unit disc.

    u, v: coordinates (n, H, W) in radii of the disc. Returns (len(SHAPES), n, H, W).
    """
    r = (u * u + v * v).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    wide = torch.maximum(u.abs() - 0.95, v.abs() - 0.28)
    high = torch.maximum(u.abs() - 0.28, v.abs() - 0.95)
    distances = {
        "disc": r - 0.9,
        "ellipse": ((u / 1.0) ** 2 + (v / 0.5) ** 2).sqrt() * 0.6 - 0.6,
        "square": box - 0.75,
        "triangle": torch.maximum(0.866 * u.abs() + 0.5 * v, -v) - 0.5,
        "star": r - 0.65 - 0.33 * torch.cos(5 * torch.atan2(v, u)),
        "cross": torch.minimum(wide, high),
        "ring": (r - 0.7).abs() - 0.22,
        "frame": (box - 0.6).abs() - 0.18,
        "crescent": torch.maximum(r - 0.95, 0.75 - ((u - 0.5) ** 2 + v * v).sqrt()),
        "bars": torch.maximum((v.abs() - 0.45).abs() - 0.22, u.abs() - 0.9),
    }
    return torch.stack([distances[name] for name in SHAPES])
