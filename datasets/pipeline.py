"""What is done to a batch between the dataset and the model.

    inputs, targets = Pipeline(mean, std, 32, ("crop", "flip"))(images, labels, generator)

To add an augmentation, write its two functions in augment.py and enter it in TRANSFORMS there.
Which images alternating_flip mirrors depends on the epoch, so Batches draws that (`mirrored`).
"""

from dataclasses import KW_ONLY, dataclass

import torch

from datasets import augment, auto_augment
from datasets.draws import constant, to_device
from datasets.mixing import blend, draw_mixing

TRANSFORMS = augment.TRANSFORMS | auto_augment.TRANSFORMS
AUGMENTATIONS = TRANSFORMS | {"alternating_flip": augment.alternating_flip}  # of --augment


@dataclass(eq=False)
class Pipeline:
    """(uint8 images (B, 3, h, w), int64 labels (B,), generator) -> (float32 (B, 3, S, S), targets).

    mirrored: bool (B,), the images that alternating_flip mirrors, where it is among the transforms.
    Steps: the transforms in their order, resizing to S = image_size, normalization, Cutout, random
    erasing, mixing. Targets are the labels, or float (B, num_classes) if images are mixed.
    """

    mean: tuple  # of each channel, of pixels in [0, 1]
    std: tuple
    image_size: int
    transforms: tuple = ()  # names from AUGMENTATIONS
    _: KW_ONLY
    num_classes: int | None = None  # needed for mixing
    crop_mode: str = "reflect"  # or "zero"
    crop_pixels: int = 0  # largest shift by "crop"; 0: an eighth of the height
    jitter: float = 0.2  # strength of "color_jitter"
    cutout_size: int = 0  # pixels; 0: no Cutout
    erasing: float = 0.0  # probability
    mixup_alpha: float = 0.0  # 0: no MixUp
    cutmix_alpha: float = 0.0  # 0: no CutMix
    mix_probability: float = 1.0
    mix_per: str = "image"  # or "batch"

    def __post_init__(self):
        self.transforms = tuple(self.transforms)
        for name in self.transforms:
            if name not in AUGMENTATIONS:
                names = ", ".join(AUGMENTATIONS)
                raise ValueError(f"unknown augmentation {name!r}: the names are {names}")
        self.options = {
            "crop": {"padding": self.crop_pixels or None, "mode": self.crop_mode},
            "color_jitter": dict.fromkeys(("brightness", "contrast", "saturation"), self.jitter),
            "random_resized_crop": {"size": self.image_size},
        }
        self.erasures = []  # after normalization
        if self.cutout_size:
            self.erasures.append((augment.cutout, {"size": self.cutout_size}))
        if self.erasing:
            self.erasures.append((augment.random_erasing, {"probability": self.erasing}))

    @property
    def alternating_flip(self):
        return "alternating_flip" in self.transforms

    @property
    def mixes(self):
        return bool(self.mixup_alpha or self.cutmix_alpha)

    def __call__(self, images, labels, generator=None, mirrored=None):
        shape = tuple(images.shape[-2:])
        drawn = self.draw(generator, len(images), shape, mirrored=mirrored)
        return self.apply(images, labels, to_device(drawn, images.device))

    def prepare(self, images):
        """(pixels (N, H + 2 * padding, W + 2 * padding, 3), padding): a dataset for `batch`.

        If cropping comes first, the images are padded here, once, and not in each batch.
        """
        pixels = augment.to_nhwc(images)
        if self.transforms[:1] != ("crop",):
            return pixels, 0
        padding = self.crop_pixels or augment.default_padding(images.shape[2])
        return augment.pad(pixels, padding, self.crop_mode), padding

    def draw(self, generator, count, shape, *, mirrored=None, index=None):
        """What is random in a batch, a tuple with the draws of each step, on the CPU.

        shape: (height, width) of the images; index: of the images of a prepared dataset.
        """
        drawn = []
        for position, name in enumerate(self.transforms):
            options = self.options.get(name, {})
            if name == "alternating_flip":
                options = {"chosen": mirrored}
            elif name == "crop" and position == 0:  # only then are prepared images padded
                options = options | {"index": index}
            drawn.append(AUGMENTATIONS[name].draw(generator, count, shape, **options))
            if name == "random_resized_crop":
                shape = (self.image_size, self.image_size)
        shape = (self.image_size, self.image_size)
        for erasure, options in self.erasures:
            drawn.append(erasure.draw(generator, count, shape, **options))
        if self.mixes:
            mixing = self.mixup_alpha, self.cutmix_alpha, self.mix_probability, self.mix_per
            drawn.append(draw_mixing(generator, count, shape, *mixing))
        return tuple(drawn)

    def batch(self, prepared, labels, index, drawn):
        """What the pipeline makes of the images at `index` of a prepared dataset."""
        pixels, padding = prepared
        if not padding:
            images = pixels.index_select(0, index).permute(0, 3, 1, 2)
            return self.apply(images, labels[index], drawn)
        start, *_ = drawn[0]
        images = augment.windows(pixels, start, padding)
        return self._apply(images, labels[index], self.transforms[1:], drawn[1:])

    def apply(self, images, labels, drawn):
        """What the pipeline makes of images (B, 3, h, w); drawn: from `draw`, on their device."""
        return self._apply(images, labels, self.transforms, drawn)

    def _apply(self, images, labels, transforms, drawn):
        drawn = iter(drawn)
        for name in transforms:
            images = AUGMENTATIONS[name].apply(images, *next(drawn))
        images = augment.normalize(augment.resize(images, self.image_size), self.mean, self.std)
        for erasure, _ in self.erasures:
            images = erasure.apply(images, *next(drawn))
        if not self.mixes:
            return images, labels
        one_hot = constant(torch.eye, self.num_classes, device=labels.device)
        return blend(images, one_hot.index_select(0, labels), *next(drawn))
