"""Augmentations of a whole batch on its device, from a batch (B, 3, H, W) and a generator.

    images = flip(crop(images, generator), generator)                   # uint8 -> uint8, same shape

Every image has its own draw. What is random is drawn first, on the CPU (draws.py). Batches are
stored as channels_last: a row of pixels is one run of bytes, so cropping copies runs. Operations
are those of torchvision.transforms.v2.functional where these take a batch with one parameter per
image; the others are tested against torchvision image by image.
"""

import math

import torch
import torch.nn.functional as F

from datasets.draws import Augmentation, constant, per_image, rand

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision


def to_nhwc(images):
    """(B, C, H, W) -> contiguous (B, H, W, C); no copy if the batch is stored as channels_last."""
    return images.permute(0, 2, 3, 1).contiguous()


def like(values, images):
    """Float pixel values (0 to 255) as the dtype of `images`, stored as channels_last."""
    if images.dtype == torch.uint8:
        values = values.round_().clamp_(0, 255)
    # Stacking the planes is faster than .contiguous(memory_format=torch.channels_last).
    return torch.stack(values.to(images.dtype).unbind(1), dim=3).permute(0, 3, 1, 2)


# ---- geometry ----


def draw_flip(generator, count, shape, p=0.5):
    return (mirror_rows(rand(generator, count) < p),)


def draw_alternating_flip(generator, count, shape, chosen):
    """chosen: bool (B,), from `alternating_flips`."""
    return (mirror_rows(chosen),)


def alternating_flips(first, epoch):
    """Which images `alternating_flip` mirrors in an epoch: bool (B,), of `first_flips` (B,).

    A random half in epoch 0, the other half in epoch 1, and so on: any two epochs in a row show an
    image in both directions (arXiv 2404.00498 section 3.6).
    """
    return first if epoch % 2 == 0 else ~first


def first_flips(generator, count):
    """Which of `count` training images `alternating_flip` mirrors in epoch 0: bool (count,)."""
    return rand(generator, count) < 0.5


def mirror_rows(chosen):
    """Rows of `mirror`: i for image i as it is, B + i for its mirror image. chosen: bool (B,)."""
    rows = torch.arange(len(chosen))
    return torch.where(chosen, rows + len(chosen), rows)


def mirror(images, rows):
    """Selects rows (B,) of the batch (B, C, H, W) followed by its mirror images. Any dtype."""
    pixels = to_nhwc(images)
    # Selecting from both versions is faster than overwriting the mirrored images.
    both = torch.cat([pixels, pixels.flip(2)])
    return both.index_select(0, rows).permute(0, 3, 1, 2)


def draw_crop(generator, count, shape, padding=None, mode="reflect", index=None):
    """(start, padding, mode). start, int64 (B,): of each window's first pixel, for `windows`.

    Pixels are counted through all padded images, one after another. padding: pixels on each side,
    by default an eighth of the height; mode: "reflect" or "zero"; index: of the images in a dataset
    that was padded by `pad`, by default the batch is padded.
    """
    height, width = shape
    padding = default_padding(height) if padding is None else padding
    if not 0 < padding < min(height, width):
        largest = min(height, width) - 1
        raise ValueError(
            f"crop: padding must be 1 to {largest} px for {height}x{width}, not {padding}"
        )
    index = torch.arange(count) if index is None else index
    top, left = (rand(generator, count, 2) * (2 * padding + 1)).long().unbind(1)
    start = (index * (height + 2 * padding) + top) * (width + 2 * padding) + left
    return start, padding, mode


def pad_and_crop(images, start, padding, mode):
    return windows(pad(to_nhwc(images), padding, mode), start, padding)


def default_padding(height):
    return max(1, height // 8)


def pad(pixels, padding, mode):
    """(B, H, W, C) -> (B, H + 2 * padding, W + 2 * padding, C)."""
    if mode == "zero":
        return F.pad(pixels, (0, 0, padding, padding, padding, padding))
    batch, height, width, channels = pixels.shape
    padded = pixels.new_empty(batch, height + 2 * padding, width + 2 * padding, channels)
    rows = padded[:, :, padding:-padding]  # padding 2 on the rows 0 1 2 3 gives 2 1 0 1 2 3 2 1
    rows[:, padding:-padding] = pixels
    rows[:, :padding] = pixels[:, 1 : padding + 1].flip(1)
    rows[:, -padding:] = pixels[:, -padding - 1 : -1].flip(1)
    padded[:, :, :padding] = padded[:, :, padding + 1 : 2 * padding + 1].flip(2)
    padded[:, :, -padding:] = padded[:, :, -2 * padding - 1 : -padding - 1].flip(2)
    return padded


def windows(padded, start, padding):
    """Windows (B, C, H, W) of padded images; start: the number of their first pixel, (B,)."""
    count, padded_height, padded_width, channels = padded.shape
    height, width = padded_height - 2 * padding, padded_width - 2 * padding
    # Every run of `width` pixels is a row of one overlapping view; a window is `height` such rows.
    num_runs = max(0, count * padded_height * padded_width - width + 1)
    runs = padded.view(-1).as_strided((num_runs, width * channels), (channels, 1))
    lines = constant(torch.arange, 0, height * padded_width, padded_width, device=padded.device)
    rows = (start[:, None] + lines).view(-1)  # (B * H,)
    pixels = runs.index_select(0, rows).view(len(start), height, width, channels)
    return pixels.permute(0, 3, 1, 2)


def resize(images, size):
    """(B, 3, H, W) -> (B, 3, size, size), bicubic and antialiased."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    return tvf.resize(images, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)


def draw_resized_crop(generator, count, shape, size=None, **ranges):
    """size: of the result, by default the height; ranges: scale and ratio of random_boxes."""
    return random_boxes(generator, count, shape, **ranges), size or shape[0]


def random_boxes(generator, count, image_shape, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop: top, left, height, width, int64 (count, 4).

    scale and ratio: ranges of the box's area and aspect ratio. A box is the first of ten attempts
    that fits, or the largest central one of an allowed ratio.
    """
    height, width = image_shape
    attempts = 10
    area = rand(generator, count, attempts, low=scale[0], high=scale[1]) * (height * width)
    log_ratio = rand(generator, count, attempts, low=math.log(ratio[0]), high=math.log(ratio[1]))
    aspect = log_ratio.exp()
    w = (area * aspect).sqrt().round().long()
    h = (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    central_w = round(height * ratio[1]) if width / height > ratio[1] else width
    central_h = round(width / ratio[0]) if width / height < ratio[0] else height
    w, h = torch.where(fits, w, central_w), torch.where(fits, h, central_h)
    offset = rand(generator, count, 2)
    top = torch.where(fits, (offset[:, 0] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(fits, (offset[:, 1] * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack([top, left, h, w], dim=1)


def resized_crop(images, boxes, size):
    """Resizes a box of each image to (size, size), bilinear and antialiased; see random_boxes.

    torchvision's resized_crop takes one box for all images. With a box per image, the resize is two
    products with matrices that depend on the box.
    """
    top, left, height, width = boxes.unbind(1)
    rows = _resize_matrices(top, height, images.shape[2], size)
    columns = _resize_matrices(left, width, images.shape[3], size)
    out = rows[:, None] @ images.float() @ columns[:, None].transpose(2, 3)  # (B, 3, size, size)
    return like(out, images)


def _resize_matrices(start, length, full, size):
    """(B, size, full) that resample `length` pixels from `start` on to `size`; rows sum to one."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length.float() / size
    stretch = scale.clamp(min=1)  # antialiasing: when shrinking, the kernel grows with the step
    target = constant(torch.arange, size, device=start.device).view(1, -1, 1)
    center = start + scale * (target + 0.5)
    source = constant(torch.arange, full, device=start.device).view(1, 1, -1)
    weights = (1 - ((source + 0.5 - center) / stretch).abs()).clamp_(min=0)
    weights *= (source >= start) & (source < start + length)
    return weights / weights.sum(2, keepdim=True)


# ---- color: adjust_* take float pixel values (0 to 255), which they may overwrite ----


def float_planes(images):
    """A float copy, contiguous: color arithmetic is slower on channels_last."""
    return images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def gray_of(x):
    red, green, blue = x.unbind(1)
    gray = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return gray[:, None]  # (B, 1, H, W)


def adjust_brightness(x, factor):
    return x.mul_(factor).clamp_(0, 255)


def adjust_contrast(x, factor):
    mean = gray_of(x).mean((1, 2, 3), keepdim=True)
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 255)


def adjust_saturation(x, factor):
    gray = gray_of(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 255)


def adjust_hue(x, turn):
    """Rotates the hue by `turn` (1 is the full circle), with the closed form of HSV."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = x.split(1, 1)
    safe = chroma.clamp(min=1e-6)
    not_red = torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sextant = torch.where(high == red, (green - blue) / safe, not_red) + 6 * turn
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + sextant) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def draw_jitter(generator, count, shape, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0):
    """Brightness, contrast and saturation factors and a turn of the hue, for `adjust_color`.

    Each is (B, 1, 1, 1), or None where the strength is 0. Factors are in [max(0, 1 - strength),
    1 + strength], as in torchvision, the turn in [-hue, hue] (1: the full circle).
    """
    draws = rand(generator, count, 4, low=-1.0, high=1.0).unbind(1)
    factors = [
        per_image(_jitter_factor(strength, draw)) if strength else None
        for strength, draw in zip((brightness, contrast, saturation), draws)
    ]
    turn = per_image(hue * draws[3]) if hue else None
    return *factors, turn


def _jitter_factor(strength, draw):
    """A draw from [-1, 1] as a factor."""
    if strength > 1:
        return (draw + 1) * ((1 + strength) / 2)
    return 1 + strength * draw


def adjust_color(images, *amounts):
    """Adjusts brightness, contrast, saturation and hue.

    Always in this order; torchvision's ColorJitter draws the order as well.
    """
    x = float_planes(images)
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for adjust, amount in zip(adjustments, amounts):
        if amount is not None:
            x = adjust(x, amount)
    return like(x, images)


# ---- normalization and erasing ----


def normalize(images, mean, std):
    """uint8 -> float32: channel c becomes (x / 255 - mean[c]) / std[c]."""
    batch, channels, height, width = images.shape
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    scale, bias = constant(_scale_and_bias, mean, std, height * width, device=images.device)
    out = to_nhwc(images).flatten(1).float().mul_(scale).add_(bias)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _scale_and_bias(mean, std, pixels):
    """(scale, bias) of each value of an image: broadcasting over the channels would be slower."""
    mean, std = torch.tensor(mean), torch.tensor(std)
    return (1 / (255 * std)).repeat(pixels), (-mean / std).repeat(pixels)


def box_edges(centers, sides):
    """Edges (N, 2, 2) of boxes: (row, column) of the first pixel and of the first past the end.

    centers, sides: (N, 2) as (row, column), in pixels.
    """
    start = centers - (sides / 2).floor()
    return torch.stack([start, start + sides], dim=1)


def box_masks(edges, images, dtype=torch.float32):
    """Masks (N, C, H, W): one inside the boxes with these edges, zero outside.

    N is the batch size, or one for a mask that all images share. Boxes are clipped at the borders.
    Masks have all channels: on a CPU, broadcasting over channels takes ten times as long if the
    batch is stored as channels_last.
    """
    channels, height, width = images.shape[1:]
    positions = constant(torch.arange, max(height, width), device=images.device)
    start, end = edges[..., None].unbind(1)
    between = ((positions >= start) & (positions < end)).to(dtype)  # (N, 2, max(H, W))
    rows, columns = between[:, 0, :height], between[:, 1, :width].repeat_interleave(channels, 1)
    inside = rows[:, :, None] * columns[:, None]  # (N, H, W * C)
    return inside.view(len(edges), height, width, channels).permute(0, 3, 1, 2)


def erase(images, edges):
    """Sets boxes to zero, which is the mean color of normalized images."""
    inside = box_masks(edges, images, torch.uint8).view(torch.bool)
    return torch.where(inside, torch.zeros((), dtype=images.dtype, device=images.device), images)


def draw_cutout(generator, count, shape, size):
    """A square of `size` pixels around a random pixel of each image."""
    centers = (rand(generator, count, 2) * torch.tensor(shape)).floor()
    return (box_edges(centers, torch.full((count, 2), float(size))),)


def draw_erasing(generator, count, shape, probability, area=(0.02, 1 / 3), aspect=0.3):
    """A random box for each image with the given probability, else an empty one.

    area: range of the box's share of the image; aspect: smallest height / width, or width / height.
    As in timm, the box has at most a third of the image and becomes the mean color; arXiv
    1708.04896 has 0.4 and random values.
    """
    draws = rand(generator, count, 5)
    size = torch.tensor(shape)
    share = area[0] + (area[1] - area[0]) * draws[:, 0]
    root = torch.exp(0.5 * math.log(aspect) * (1 - 2 * draws[:, 1]))  # of height / width
    sides = torch.stack([root, 1 / root], dim=1) * (share.sqrt()[:, None] * size)
    sides = torch.minimum(sides.round().clamp(min=1), size)
    start = (draws[:, 2:4] * (size - sides + 1)).floor()
    sides = sides * (draws[:, 4:] < probability)
    return (torch.stack([start, start + sides], dim=1),)


# ---- draw and apply, paired ----

crop = Augmentation(draw_crop, pad_and_crop)  # arXiv 1512.03385, section 4.2
flip = Augmentation(draw_flip, mirror)
alternating_flip = Augmentation(draw_alternating_flip, mirror)
color_jitter = Augmentation(draw_jitter, adjust_color)
random_resized_crop = Augmentation(draw_resized_crop, resized_crop)  # arXiv 1409.4842, section 6
cutout = Augmentation(draw_cutout, erase)  # arXiv 1708.04552
random_erasing = Augmentation(draw_erasing, erase)  # arXiv 1708.04896

# What --augment offers, with auto_augment.TRANSFORMS and alternating_flip (pipeline.py).
TRANSFORMS = {
    "crop": crop,
    "flip": flip,
    "color_jitter": color_jitter,
    "random_resized_crop": random_resized_crop,
}
