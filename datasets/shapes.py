"""Ten classes of shapes that are drawn here: images without files and network."""

import functools

import torch

from datasets.examples import Examples, Split

SHAPES = (
    "disc",
    "ellipse",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "frame",
    "crescent",
    "bars",
)


@functools.cache  # a process may train twice
def load_shapes(train=10_000, test=2_000):
    return Split(
        "shapes", make_shapes(train, seed=1), None, make_shapes(test, seed=2), SHAPES, (), ()
    )


def make_shapes(count, seed, size=32):
    """Examples of SHAPES: one shape a picture, of random place, size, turn and colour, on a noisy background with clutter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(SHAPES)
    images = torch.empty(count, size, size, 3, dtype=torch.uint8)
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(n, *shape, low=0.0, high=1.0):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def paint(picture, distance, colour):
        cover = (0.5 - distance).clamp(0, 1)[..., None]  # half a pixel of soft edge
        return picture.lerp(colour[:, None, None], cover)

    for part in torch.arange(count).split(1000):
        n = len(part)
        back, other = uniform(n, 3, high=0.9), uniform(n, 3, high=0.9)
        slope = uniform(n, 1, 1) * x / size + uniform(n, 1, 1) * y / size
        picture = back[:, None, None].lerp(other[:, None, None], 0.5 * slope[..., None])
        for _ in range(3):  # clutter: small discs in any colour
            cx, cy, r = (
                uniform(n, 1, 1, high=size),
                uniform(n, 1, 1, high=size),
                uniform(n, 1, 1, low=0.8, high=2.2),
            )
            picture = paint(picture, ((x - cx) ** 2 + (y - cy) ** 2).sqrt() - r, uniform(n, 3))
        radius = uniform(n, 1, 1, low=7, high=13)
        cx, cy = (
            uniform(n, 1, 1, low=-1.0) * (size / 2 - radius * 0.8) + size / 2 for _ in range(2)
        )
        turn = uniform(n, 1, 1, low=-0.4, high=0.4)
        u = ((x - cx) * turn.cos() + (y - cy) * turn.sin()) / radius
        v = ((y - cy) * turn.cos() - (x - cx) * turn.sin()) / radius
        distance = (
            torch.stack([_shape_distance(name, u, v) for name in SHAPES])[
                labels[part], torch.arange(n)
            ]
            * radius
        )
        # The colour keeps a distance from the background's, in a random direction of colour space.
        direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)
        colour = back.lerp(other, 0.5) + direction * uniform(n, 1, low=0.4, high=0.8)
        picture = paint(picture, distance, colour.clamp(0, 1))
        picture += torch.randn(picture.shape, generator=generator) * uniform(
            n, 1, 1, 1, low=0.01, high=0.06
        )
        images[part] = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return Examples(images.permute(0, 3, 1, 2), labels)


def _shape_distance(name, u, v):
    """Signed distance (about; negative inside) to a shape that fits the unit disc."""
    r = (u * u + v * v).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    if name == "disc":
        return r - 0.9
    if name == "ellipse":
        return ((u / 1.0) ** 2 + (v / 0.5) ** 2).sqrt() * 0.6 - 0.6
    if name == "square":
        return box - 0.75
    if name == "triangle":
        return torch.maximum(0.866 * u.abs() + 0.5 * v, -v) - 0.5
    if name == "star":
        return r - 0.65 - 0.33 * torch.cos(5 * torch.atan2(v, u))
    if name == "cross":
        return torch.minimum(
            torch.maximum(u.abs() - 0.95, v.abs() - 0.28),
            torch.maximum(u.abs() - 0.28, v.abs() - 0.95),
        )
    if name == "ring":
        return (r - 0.7).abs() - 0.22
    if name == "frame":
        return (box - 0.6).abs() - 0.18
    if name == "crescent":
        return torch.maximum(r - 0.95, 0.75 - ((u - 0.5) ** 2 + v * v).sqrt())
    return torch.maximum((v.abs() - 0.45).abs() - 0.22, u.abs() - 0.9)  # bars
