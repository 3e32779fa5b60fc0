"""A small folder of images, which the fixture `folder` makes, and what tests do with it."""

import os

import numpy as np
from PIL import Image, ImageOps

import data

CACHE = ".cache-32px.images"
FILES = 10  # of the fixture `folder`


def soft_image(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def fit(image, size=32):
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def to_numpy(image):
    return image.permute(1, 2, 0).numpy()


def load(root, image_size=32, **options):
    return data.load("folder", root, image_size=image_size, **options)


def add_links(folder, count, part="train"):
    """More dogs that are links to one of them."""
    for i in range(count):
        os.link(folder / part / "dog" / "0.png", folder / part / "dog" / f"z{i}.png")


def make_pets(root):
    """Cats and dogs: three training and two test images each, of several sizes and two formats."""
    seed = 0
    for part, names in (("train", ["0.png", "1.jpg", "2.png"]), ("test", ["0.png", "1.jpg"])):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for name, size in zip(names, ((40, 48), (64, 36), (50, 50))):
                soft_image(*size, seed).save(root / part / label / name)
                seed += 1
    return root
