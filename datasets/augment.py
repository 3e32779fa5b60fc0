"""Augmentation of whole batches, on whatever device the batch lies: functions of a uint8 batch and a generator.

Every image has its own draw. The numbers come from a CPU generator and are sent to the images' device, so that a seed
gives the same batch on every device and nothing waits for the device to draw. Batches are logically (B, 3, H, W) and lie
in memory as channels_last: there a row of pixels is one run of bytes, and cropping is copying runs.

    images = flip(crop(images, generator), generator)                  # uint8 (B, 3, H, W) -> uint8 (B, 3, H, W)
    inputs, targets = Pipeline(mean, std, 32, ["crop", "flip"])(images, labels, generator)

Single operations are torchvision.transforms.v2.functional's where they take a batch with one parameter an image; the
others are written here and tested image by image against torchvision.
"""

import functools
import math

import torch
import torch.nn.functional as F

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as in torchvision


class RankGenerator:
    """A generator for one rank's part of a global batch: it draws for all images and hands out the rank's own rows.

    `rows` are the positions of this rank's images in the global batch of `total`. So the number of ranks changes
    nothing about what is drawn for an image.
    """

    def __init__(self, generator, rows, total):
        self.generator, self.rows, self.total = generator, rows, total


def rand(generator, count, *shape, low=0.0, high=1.0):
    """Uniform numbers in [low, high), float32 (count, *shape) on the CPU: row i belongs to image i."""
    if isinstance(generator, RankGenerator):
        drawn = torch.rand(generator.total, *shape, generator=generator.generator)[generator.rows]
        assert len(drawn) == count, (
            f"{count} images, but the rank's part of the batch is {len(drawn)}"
        )
    else:
        drawn = torch.rand(count, *shape, generator=generator)
    return drawn.mul_(high - low).add_(low)


def _rand_beta(generator, count, alpha):
    """Beta(alpha, alpha) draws, float32 (count,). Two gammas make a beta; torch's Beta class takes no generator."""
    total, base = (
        (generator.total, generator.generator)
        if isinstance(generator, RankGenerator)
        else (count, generator)
    )
    if alpha == 1:  # uniform
        return rand(generator, count)
    gammas = torch._standard_gamma(torch.full((total, 2), float(alpha)), generator=base).clamp_(
        min=1e-30
    )
    drawn = gammas[:, 0] / gammas.sum(1)
    return drawn[generator.rows] if isinstance(generator, RankGenerator) else drawn


def _send(values, device):
    """Draws to the device. CUDA copies small pageable tensors at the call; other devices may read them after it."""
    return values.to(device, non_blocking=device.type == "cuda")


def _per_image(values, images):
    """A (B,) draw as (B, 1, 1, 1) on the images' device, without waiting for it."""
    return _send(values, images.device).view(-1, 1, 1, 1)


def _nhwc(images):
    return images.permute(0, 2, 3, 1).contiguous()  # no copy where the batch lies as channels_last


# ---- geometry ----------------------------------------------------------------------------------------------------


def flip(images, generator, p=0.5):
    """Mirrors each image left to right with probability p. Any dtype (B, C, H, W)."""
    count, pixels = len(images), _nhwc(images)
    mirrored = _send(rand(generator, count) < p, images.device)
    both = torch.cat(
        [pixels, pixels.flip(2)]
    )  # choosing whole images is cheaper than writing half of them anew
    return both.index_select(
        0, torch.arange(count, device=images.device) + count * mirrored
    ).permute(0, 3, 1, 2)


def _reflect(size, padding, device):
    """Source indices of a reflected border: padding 2 on 4 pixels gives 2 1 0 1 2 3 2 1."""
    index = torch.arange(-padding, size + padding, device=device).abs()
    return (size - 1) - ((size - 1) - index).abs()


def pad(pixels, padding, mode):
    """(B, H, W, C) -> (B, H + 2p, W + 2p, C), with zeros or with a reflected border."""
    if mode == "zero":
        return F.pad(pixels, (0, 0, padding, padding, padding, padding))
    batch, height, width, channels = pixels.shape
    rows = _reflect(height, padding, pixels.device)
    padded = pixels.new_empty(batch, height + 2 * padding, width + 2 * padding, channels)
    padded[:, :, padding:-padding] = pixels.index_select(1, rows)  # whole rows: cheap copies
    padded[:, :, :padding] = padded[:, :, padding + 1 : 2 * padding + 1].flip(2)
    padded[:, :, -padding:] = padded[:, :, -2 * padding - 1 : -padding - 1].flip(2)
    return padded


def crop(images, generator, padding=None, mode="reflect"):
    """Pads each image and takes a window of the old size at a random place (arXiv 1512.03385 §4.2 pads with zeros).

    padding: pixels on each side, an eighth of the side by default (4 at 32 px); mode: "reflect" or "zero".
    """
    padding = crop_padding(images) if padding is None else padding
    if not 0 < padding < min(images.shape[-2:]):
        raise ValueError(
            f"crop: a padding of {padding} does not suit images of {tuple(images.shape[-2:])} pixels"
        )
    index = torch.arange(len(images), device=images.device)
    return random_windows(pad(_nhwc(images), padding, mode), index, generator, padding)


def crop_padding(images):
    return max(1, images.shape[2] // 8)


def random_windows(padded, index, generator, padding):
    """What `crop` makes of the images with these indices, from a dataset (N, H + 2p, W + 2p, C) that has its border already."""
    count, padded_height, padded_width, channels = padded.shape
    height, width = padded_height - 2 * padding, padded_width - 2 * padding
    offsets = _send((rand(generator, len(index), 2) * (2 * padding + 1)).long(), padded.device)
    # Every run of `width` pixels in the dataset as a row of one overlapping view; a window is `height` of these rows.
    runs = max(0, count * padded_height * padded_width - width + 1)
    runs = padded.view(-1).as_strided((runs, width * channels), (channels, 1))
    first = (index * padded_height + offsets[:, 0]) * padded_width + offsets[:, 1]
    rows = first[:, None] + torch.arange(height, device=padded.device) * padded_width  # (B, H)
    return (
        runs.index_select(0, rows.view(-1))
        .view(len(index), height, width, channels)
        .permute(0, 3, 1, 2)
    )


def resize(images, size):
    """(B, 3, H, W) -> (B, 3, size, size), bicubic and antialiased."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    return tvf.resize(images, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)


def _filter(x, kind):
    """The resampling kernel at distance x in (scaled) pixels: triangle, or the cubic with a = -0.5 of antialiased resizing."""
    x = x.abs()
    if kind == "bilinear":
        return (1 - x).clamp_(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _resampling(start, length, full, size, kind):
    """Matrices (B, size, full) that resample `length` pixels from `start` to `size` pixels, each row summing to one."""
    scale = (length.float() / size).view(-1, 1, 1)
    stretch = scale.clamp(min=1)  # antialiasing: when shrinking, the kernel grows with the step
    centre = start.view(-1, 1, 1) + scale * (
        torch.arange(size, device=start.device).view(1, -1, 1) + 0.5
    )
    source = torch.arange(full, device=start.device).view(1, 1, -1)
    weights = _filter((source + 0.5 - centre) / stretch, kind)
    weights *= (source >= start.view(-1, 1, 1)) & (source < (start + length).view(-1, 1, 1))
    return weights / weights.sum(2, keepdim=True)


def resized_crop(images, top, left, height, width, size, interpolation="bilinear"):
    """Cuts a box out of each image and resizes it to (size, size), antialiased.

    top, left, height, width: int64 (B,) on the CPU. torchvision's resized_crop takes one box for all; with a box an
    image the resize is two matrix products with matrices made of that image's box.
    """
    top, left, height, width = _send(
        torch.stack([top, left, height, width]), images.device
    )  # small: the host needn't wait
    rows = _resampling(top, height, images.shape[2], size, interpolation)
    columns = _resampling(left, width, images.shape[3], size, interpolation)
    out = rows[:, None] @ images.float() @ columns[:, None].transpose(2, 3)  # (B, 3, size, size)
    return _like(out, images)


def random_boxes(generator, count, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Boxes of random area and aspect, as torchvision's RandomResizedCrop draws them: ten tries, else the middle.

    Returns top, left, height, width, each int64 (count,).
    """
    tries = 10
    area = rand(generator, count, tries, low=scale[0], high=scale[1]) * (height * width)
    aspect = rand(generator, count, tries, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    w = (area * aspect).sqrt().round().long()
    h = (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    whole_ratio = width / height
    fallback_w = round(height * ratio[1]) if whole_ratio > ratio[1] else width
    fallback_h = round(width / ratio[0]) if whole_ratio < ratio[0] else height
    w, h = torch.where(fits, w, fallback_w), torch.where(fits, h, fallback_h)
    place = rand(generator, count, 2)
    top = torch.where(fits, (place[:, 0] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(fits, (place[:, 1] * (width - w + 1)).long(), (width - w) // 2)
    return top, left, h, w


def random_resized_crop(
    images, generator, size=None, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bilinear"
):
    """A random box of each image, resized to (size, size); size None keeps the height (arXiv 1409.4842 §6)."""
    boxes = random_boxes(generator, len(images), *images.shape[-2:], scale, ratio)
    return resized_crop(images, *boxes, size or images.shape[2], interpolation)


# ---- colour ------------------------------------------------------------------------------------------------------


def _like(out, images):
    """Float pixel values (0…255) back to the dtype of `images` and to channels_last."""
    if images.dtype == torch.uint8:
        out = out.round_().clamp_(0, 255)
    return torch.stack(out.to(images.dtype).unbind(1), dim=3).permute(
        0, 3, 1, 2
    )  # cheaper than .contiguous()


def _planes(images):
    """Float pixel values, plane by plane: colour arithmetic is faster there than on interleaved pixels."""
    return images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _gray(x):
    return (
        (x[:, 0] * GRAY[0]).add_(x[:, 1], alpha=GRAY[1]).add_(x[:, 2], alpha=GRAY[2])[:, None]
    )  # (B, 1, H, W)


def _brightness(x, factor):
    return x.mul_(factor).clamp_(0, 255)


def _contrast(x, factor):
    mean = _gray(x).mean((1, 2, 3), keepdim=True)  # before x changes
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 255)


def _saturation(x, factor):
    gray = _gray(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 255)


def _hue(x, turn):
    """Turns the hue of float pixels by `turn` (1 is the whole circle), through HSV in its closed form."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = x.split(1, 1)
    safe = chroma.clamp(min=1e-6)
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turn
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + sixth) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def color_jitter(images, generator, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0):
    """Brightness, contrast, saturation (factors from [1 - b, 1 + b]) and hue (turns from [-h, h]) of each image.

    In this order; torchvision's ColorJitter draws the order too, one for each image.
    """
    ops = (
        (_brightness, brightness, 1.0),
        (_contrast, contrast, 1.0),
        (_saturation, saturation, 1.0),
        (_hue, hue, 0.0),
    )
    draws = rand(generator, len(images), 4, low=-1.0, high=1.0)  # all four, whatever is switched on
    x = _planes(images)
    for i, (op, strength, neutral) in enumerate(ops):
        if strength:
            x = op(
                x,
                _per_image(
                    (neutral + strength * draws[:, i]).clamp_(min=-0.5 if op is _hue else 0.0),
                    images,
                ),
            )
    return _like(x, images)


# ---- RandAugment and TrivialAugment ------------------------------------------------------------------------------
# The largest strength of each operation; a bin k of `bins` gives k / (bins - 1) of it. Shear: tangent; translate:
# pixels; rotate: degrees; the four enhancements: distance of the factor from 1; posterize: bits taken away;
# solarize: how far the threshold comes down from white, as a part of 255.

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)
GEOMETRIC = range(1, 6)
SIGNED = range(1, 10)


def rand_augment_strengths(height, width):
    """arXiv 1909.13719, with torchvision's ranges."""
    return (0, 0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 0.9, 0.9, 0.9, 4, 1, 0, 0)


def trivial_augment_strengths(height, width):
    """arXiv 2103.10158, the wide space."""
    return (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 1, 0, 0)


def _geometry(images, op, strength):
    """One nearest-neighbour affine resampling for all shears, translations and rotations of a batch."""
    height, width = images.shape[-2:]
    theta = torch.eye(2, 3).repeat(
        len(images), 1, 1
    )  # maps output to input, in units of half the picture

    def put(name, row, column, value):
        where = op == OPERATIONS.index(name)
        theta[where, row, column] = value[where] if isinstance(value, torch.Tensor) else value

    angle = torch.deg2rad(strength)
    shift = strength.trunc()  # whole pixels, as torchvision
    for column in (1, 2):  # a shear keeps the upper left corner in its place
        put("shear_x", 0, column, strength * height / width)
    for column in (0, 2):
        put("shear_y", 1, column, strength * width / height)
    put("translate_x", 0, 2, -2 * shift / width)
    put("translate_y", 1, 2, -2 * shift / height)
    put("rotate", 0, 0, angle.cos())
    put("rotate", 0, 1, -angle.sin() * height / width)
    put("rotate", 1, 0, angle.sin() * width / height)
    put("rotate", 1, 1, angle.cos())
    grid = F.affine_grid(_send(theta, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(
        images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False
    )


def _sharpness(x, factor):
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=x.device)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = x.clone()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=3).round_()
    return torch.lerp(blurred, x, factor).clamp_(0, 255)


def _operate(images, name, strength):
    """One operation with a strength an image. uint8 (b, 3, H, W), (b,) -> float or uint8 of the same shape."""
    from torchvision.transforms.v2 import functional as tvf

    if name == "auto_contrast":
        return tvf.autocontrast(images)
    if name == "equalize":
        return tvf.equalize(images)
    if name == "posterize":
        removed = _per_image(strength.round().long(), images)
        return images & (256 - torch.pow(2, removed)).to(torch.uint8)
    if name == "solarize":
        return torch.where(images >= _per_image(255 * (1 - strength), images), 255 - images, images)
    enhance = {
        "brightness": _brightness,
        "color": _saturation,
        "contrast": _contrast,
        "sharpness": _sharpness,
    }[name]
    return enhance(_planes(images), _per_image(1 + strength, images))


def operate(images, op, strength):
    """Applies to each image the operation OPERATIONS[op[i]] with strength[i]; op int64 and strength float (B,), on the CPU.

    Images of the same operation are done together, so a batch costs one pass, not one for each operation.
    """
    out = images.clone(memory_format=torch.channels_last)
    geometric = (op >= GEOMETRIC[0]) & (op <= GEOMETRIC[-1])
    for k in [1, *sorted(set(op.tolist()) - {0} - set(GEOMETRIC))]:
        chosen = (geometric if k == 1 else op == k).nonzero().squeeze(1)
        if len(chosen):
            index = _send(chosen, images.device)
            part = images.index_select(0, index)
            done = (
                _geometry(part, op[chosen], strength[chosen])
                if k == 1
                else _operate(part, OPERATIONS[k], strength[chosen])
            )
            out.index_copy_(0, index, _like(done, images))
    return out


def _strength(op, part, sign, strengths):
    """Strength (B,) of the drawn operations: `part` of the largest, with a drawn sign where the operation has one."""
    signed = (op >= SIGNED[0]) & (op <= SIGNED[-1])
    return (
        torch.tensor(strengths, dtype=torch.float32)[op]
        * part
        * torch.where(signed & (sign < 0.5), -1.0, 1.0)
    )


def rand_augment(images, generator, num_ops=2, magnitude=9, bins=31):
    """num_ops operations of OPERATIONS in turn on each image, all at one magnitude (arXiv 1909.13719)."""
    draws = rand(generator, len(images), num_ops, 2)
    strengths = rand_augment_strengths(*images.shape[-2:])
    for i in range(num_ops):
        op = (draws[:, i, 0] * len(OPERATIONS)).long()
        images = operate(
            images, op, _strength(op, magnitude / (bins - 1), draws[:, i, 1], strengths)
        )
    return images


def trivial_augment(images, generator, bins=31):
    """One operation of OPERATIONS on each image, at a random magnitude (arXiv 2103.10158)."""
    draws = rand(generator, len(images), 3)
    op = (draws[:, 0] * len(OPERATIONS)).long()
    part = (draws[:, 2] * bins).floor() / (bins - 1)
    return operate(
        images, op, _strength(op, part, draws[:, 1], trivial_augment_strengths(*images.shape[-2:]))
    )


# ---- after normalisation: floats in, floats out --------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 (B, 3, H, W) -> float32, channel c as (x / 255 - mean[c]) / std[c], channels_last."""
    batch, channels, height, width = images.shape
    scale, bias = _scale_and_bias(
        tuple(map(float, mean)), tuple(map(float, std)), height * width, images.device
    )
    out = _nhwc(images).flatten(1).float().mul_(scale).add_(bias)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _scale_and_bias(mean, std, pixels, device):
    """Tiled to a whole image: a broadcast over the last axis of three would cost more than the arithmetic."""
    mean, std = torch.tensor(mean), torch.tensor(std)
    return (1 / (255 * std)).repeat(pixels).to(device), (-mean / std).repeat(pixels).to(device)


def _boxes(centres, sides, images, dtype=torch.float32):
    """Masks like `images` (B, C, H, W): one inside boxes of `sides` (B, 2) pixels around `centres` (B, 2), else zero.

    Boxes are cut at the borders. They are painted on the images' device, and for every channel: on a CPU a mask that is
    broadcast over channels that lie side by side would cost ten times as much.
    """
    batch, channels, height, width = images.shape
    start = (
        centres - (sides / 2).floor()
    )  # rounded to even, an odd side would begin at every second place only
    edges = _send(torch.stack([start, start + sides], dim=1), images.device)  # (B, 2, 2)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device).repeat_interleave(channels)
    rows = (y >= edges[:, 0, :1]) & (y < edges[:, 1, :1])
    columns = (x >= edges[:, 0, 1:]) & (x < edges[:, 1, 1:])
    inside = rows.to(dtype)[:, :, None] * columns.to(dtype)[:, None]  # (B, H, W * C)
    return inside.view(batch, height, width, channels).permute(0, 3, 1, 2)


def cutout(images, generator, size, fill=0.0):
    """Fills a square of `size` pixels around a random pixel of each image (arXiv 1708.04552). Any dtype (B, C, H, W).

    On normalised images the fill of zero is the mean colour.
    """
    centres = (rand(generator, len(images), 2) * torch.tensor(images.shape[-2:])).floor()
    inside = _boxes(centres, torch.full((len(images), 2), float(size)), images, torch.uint8).view(
        torch.bool
    )
    return torch.where(
        inside, torch.full((), fill, dtype=images.dtype, device=images.device), images
    )


def random_erasing(images, generator, probability, area=(0.02, 1 / 3), aspect=0.3, fill=0.0):
    """Fills a box of each image with the given probability (arXiv 1708.04896). Any dtype (B, C, H, W).

    area: the box's least and largest part of the image; aspect: the least height over width, the largest is its inverse. The
    fill of zero is the mean colour of normalised images.
    """
    draws = rand(generator, len(images), 5)
    size = torch.tensor(images.shape[-2:])
    part = area[0] + (area[1] - area[0]) * draws[:, 0]
    root = torch.exp(0.5 * math.log(aspect) * (1 - 2 * draws[:, 1]))  # of height over width
    sides = torch.stack([root, 1 / root], dim=1) * (part.sqrt()[:, None] * size)
    sides = torch.minimum(sides.round().clamp(min=1), size)
    start = (draws[:, 2:4] * (size - sides + 1)).floor()
    sides = sides * (draws[:, 4:] < probability)
    inside = _boxes(start + (sides / 2).floor(), sides, images, torch.uint8).view(torch.bool)
    return torch.where(
        inside, torch.full((), fill, dtype=images.dtype, device=images.device), images
    )


def _partners(x):
    """Row 2i for row 2i + 1 and the other way round; an odd last row is its own partner.

    The batch is a random permutation, so neighbours are random pairs, and a rank that holds an even run of rows of the
    global batch finds every partner at home.
    """
    order = (torch.arange(len(x), device=x.device) ^ 1).clamp_(max=len(x) - 1)
    return (
        _nhwc(x).index_select(0, order).permute(0, 3, 1, 2)
        if x.ndim == 4
        else x.index_select(0, order)
    )


def _blend(images, targets, share):
    """share * own + (1 - share) * partner: share (B, C, H, W) or (B, 1, 1, 1) for pixels, its mean for the targets."""
    weight = share.mean((1, 2, 3))[:, None]
    return torch.lerp(_partners(images), images, share), torch.lerp(
        _partners(targets), targets, weight
    )


def _cutmix_boxes(images, generator, alpha):
    """Centres and sides (B, 2) of boxes with a share of 1 - Beta(alpha, alpha) of the pixels, before they are cut."""
    kept = _rand_beta(generator, len(images), alpha)
    size = torch.tensor(images.shape[-2:])
    return (rand(generator, len(images), 2) * size).floor(), (
        (1 - kept).sqrt()[:, None] * size
    ).floor()


def mixup(images, targets, generator, alpha=1.0):
    """Blends each image, and its target, with its neighbour's; the share is Beta(alpha, alpha) (arXiv 1710.09412).

    images: float (B, C, H, W); targets: float (B, K), rows summing to one. Returns both.
    """
    return _blend(images, targets, _per_image(_rand_beta(generator, len(images), alpha), images))


def cutmix(images, targets, generator, alpha=1.0):
    """Pastes a box of its neighbour into each image; targets are weighted by the area that is left (arXiv 1905.04899)."""
    return _blend(images, targets, 1 - _boxes(*_cutmix_boxes(images, generator, alpha), images))


def mix(images, targets, generator, mixup_alpha, cutmix_alpha, probability):
    """MixUp or CutMix (an even choice where both alphas are above zero) on each image with the given probability."""
    chance = rand(generator, len(images), 2)
    mixed, blended = chance[:, 0] < probability, chance[:, 1] < (0.5 if cutmix_alpha else 1.0)
    share = torch.ones(len(images))
    if mixup_alpha:
        share = torch.where(mixed & blended, _rand_beta(generator, len(images), mixup_alpha), share)
    share = _per_image(share, images)
    if cutmix_alpha:
        centres, sides = _cutmix_boxes(images, generator, cutmix_alpha)
        cut = mixed & ~blended if mixup_alpha else mixed
        share = share - _boxes(
            centres, sides * cut[:, None], images
        )  # of an image that isn't cut, the box has no pixel
    return _blend(images, targets, share)


# ---- the whole way of a batch --------------------------------------------------------------------------------------

TRANSFORMS = {
    "crop": crop,
    "flip": flip,
    "color_jitter": color_jitter,
    "rand_augment": rand_augment,
    "trivial_augment": trivial_augment,
    "random_resized_crop": random_resized_crop,
}


class Pipeline:
    """(uint8 images (B, 3, h, w), int64 labels (B,), generator) -> (float32 (B, 3, S, S), targets) as a step takes them.

    transforms: names from TRANSFORMS, applied in that order to the stored pictures; then resizing to image_size (S),
    normalisation, cutout, random erasing and mixing. Targets are the labels, or (B, num_classes) shares where images are mixed.
    """

    def __init__(
        self,
        mean,
        std,
        image_size,
        transforms=(),
        *,
        num_classes=None,
        crop_mode="reflect",
        cutout_size=0,
        erasing=0.0,
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
        mix_probability=1.0,
    ):
        unknown = [name for name in transforms if name not in TRANSFORMS]
        if unknown:
            raise ValueError(
                f"unknown augmentation {unknown[0]!r}: the names are {', '.join(TRANSFORMS)}"
            )
        self.mean, self.std, self.image_size, self.num_classes = mean, std, image_size, num_classes
        self.transforms = tuple(transforms)
        self.crop_mode = crop_mode
        self.options = {"crop": {"mode": crop_mode}, "random_resized_crop": {"size": image_size}}
        self.cutout_size, self.erasing = cutout_size, erasing
        self.mixing = (mixup_alpha, cutmix_alpha, mix_probability)

    def prepare(self, images):
        """A dataset as `batch` takes from it: (pixels, padding), with its border made once where cropping comes first."""
        padding = crop_padding(images) if self.transforms[:1] == ("crop",) else 0
        return (pad(_nhwc(images), padding, self.crop_mode) if padding else _nhwc(images)), padding

    def batch(self, prepared, labels, index, generator):
        """The batch of the images with these indices: the same as the pipeline called with them, without copying them first."""
        (pixels, padding), labels = prepared, labels[index]
        if padding:
            return self._finish(
                random_windows(pixels, index, generator, padding),
                labels,
                generator,
                self.transforms[1:],
            )
        return self(pixels.index_select(0, index).permute(0, 3, 1, 2), labels, generator)

    def __call__(self, images, labels, generator=None):
        return self._finish(images, labels, generator, self.transforms)

    def _finish(self, images, labels, generator, transforms):
        for name in transforms:
            images = TRANSFORMS[name](images, generator, **self.options.get(name, {}))
        images = normalize(resize(images, self.image_size), self.mean, self.std)
        if self.cutout_size:
            images = cutout(images, generator, self.cutout_size)
        if self.erasing:
            images = random_erasing(images, generator, self.erasing)
        if any(self.mixing[:2]):
            targets = F.one_hot(labels, self.num_classes).float()
            return mix(images, targets, generator, *self.mixing)
        return images, labels
