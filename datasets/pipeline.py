"""What is done to a batch between the dataset and the model.

    inputs, targets = Pipeline(mean, std, 32, ("crop", "flip"))(images, labels, generator)

To add an augmentation, write a function (images, generator) -> images in augment.py and enter it in
TRANSFORMS there. What is not drawn anew for each batch, as alternating_flip, is decided by Batches.
"""

from dataclasses import KW_ONLY, dataclass

import torch.nn.functional as F

from datasets import augment, auto_augment
from datasets.mixing import mix

TRANSFORMS = augment.TRANSFORMS | auto_augment.TRANSFORMS
AUGMENTATIONS = (*TRANSFORMS, "alternating_flip")  # of --augment


@dataclass(eq=False)
class Pipeline:
    """(uint8 images (B, 3, h, w), int64 labels (B,), generator) -> (float32 (B, 3, S, S), targets).

    mirrored: bool (B,), the images that alternating_flip mirrors, where it is among the transforms.
    Steps: the transforms in their order, resizing to S = image_size, normalisation, Cutout, random
    erasing, mixing. Targets are the labels, or float (B, num_classes) if images are mixed.
    """

    mean: tuple
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

    @property
    def alternating_flip(self):
        return "alternating_flip" in self.transforms

    def __call__(self, images, labels, generator=None, mirrored=None):
        return self._apply(images, labels, generator, mirrored, self.transforms)

    def prepare(self, images):
        """A dataset as `batch` needs it: (pixels (N, H, W, 3), padding).

        If cropping comes first, the images are padded here, once, and not in each batch.
        """
        pixels = augment.to_nhwc(images)
        if self.transforms[:1] != ("crop",):
            return pixels, 0
        padding = self.crop_pixels or augment.crop_padding(images)
        return augment.pad(pixels, padding, self.crop_mode), padding

    def batch(self, prepared, labels, index, generator, mirrored=None):
        """What the pipeline makes of the images at `index` of a prepared dataset."""
        pixels, padding = prepared
        if not padding:
            images = pixels.index_select(0, index).permute(0, 3, 1, 2)
            return self(images, labels[index], generator, mirrored)
        images = augment.random_windows(pixels, index, generator, padding)
        return self._apply(images, labels[index], generator, mirrored, self.transforms[1:])

    def _apply(self, images, labels, generator, mirrored, transforms):
        for name in transforms:
            if name == "alternating_flip":
                images = augment.mirror(images, mirrored)
            else:
                images = TRANSFORMS[name](images, generator, **self.options.get(name, {}))
        images = augment.normalize(augment.resize(images, self.image_size), self.mean, self.std)
        if self.cutout_size:
            images = augment.cutout(images, generator, self.cutout_size)
        if self.erasing:
            images = augment.random_erasing(images, generator, self.erasing)
        if not self.mixup_alpha and not self.cutmix_alpha:
            return images, labels
        targets = F.one_hot(labels, self.num_classes).float()
        alphas = self.mixup_alpha, self.cutmix_alpha
        return mix(images, targets, generator, *alphas, self.mix_probability, self.mix_per)
