"""--tta: in the final test, logits are averaged over several views of an image.

    logits = VIEWS["flip"](model, images)       # float32 (B, K)

The result is reported next to the accuracy on single images, and takes nothing from the other
images of the test set.
"""

import torch
import torch.nn.functional as F


def flip(model, images):
    """The mean over an image and its mirror image."""
    return (model(images).float() + model(images.flip(3)).float()) / 2


def flip_shift(model, images):
    """Half `flip` of the image, half the mean of `flip` of two diagonal shifts by one pixel.

    Source: arXiv 2404.00498 §3.5. The border is reflected.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = padded[..., :height, :width], padded[..., 2:, 2:]
    down, up = (flip(model, view.contiguous(memory_format=torch.channels_last)) for view in shifted)
    return flip(model, images) / 2 + (down + up) / 4


VIEWS = {"flip": flip, "flip-shift": flip_shift}
