"""Augmentations equal, image by image, those of torchvision or a plain loop with the same draws."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import MEAN, STD, channels_last, make_images, mix, one_by_one, seeded
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from datasets import augment
from datasets.draws import RankGenerator, rand
from datasets.pipeline import TRANSFORMS

LARGEST_DRAW = 1 - 2**-24  # the largest number that torch.rand gives


def on_images(function, **options):
    """A mixing function as one of images alone: it makes the targets, and returns them as well."""

    def mixed(images, generator):
        targets = images.float().mean((2, 3))
        images, targets = function(images.float(), targets, generator, **options)
        return torch.cat([images.flatten(1), targets], dim=1)

    return mixed


STRONG_JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
PIXEL_FUNCTIONS = TRANSFORMS | {
    "crop, zero": functools.partial(augment.crop, mode="zero"),
    "cutout": functools.partial(augment.cutout, size=9),
    "color_jitter": functools.partial(augment.color_jitter, **STRONG_JITTER),
}
ALL_FUNCTIONS = PIXEL_FUNCTIONS | {
    "erasing": functools.partial(augment.random_erasing, probability=0.5),
    "mixup": on_images(mix, mixup_alpha=1.0, cutmix_alpha=0.0, probability=1.0),
    "cutmix": on_images(mix, mixup_alpha=0.0, cutmix_alpha=1.0, probability=1.0),
    "both": on_images(mix, mixup_alpha=0.4, cutmix_alpha=1.0, probability=0.5),
}
every_function = pytest.mark.parametrize("function", ALL_FUNCTIONS.values(), ids=ALL_FUNCTIONS)
pixel_functions = pytest.mark.parametrize("function", PIXEL_FUNCTIONS.values(), ids=PIXEL_FUNCTIONS)


# ---- all augmentations ----


@every_function
def test_generator_is_the_only_source_of_randomness(function):
    images, state = make_images(), torch.get_rng_state()
    first, again, other = (function(images.clone(), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pixel_functions
def test_each_image_has_its_own_draw(function):
    images = make_images(4)[3:].repeat(64, 1, 1, 1)
    results = function(images, seeded()).flatten(1).unique(dim=0)
    assert len(results) >= (2 if function is augment.flip else 16)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_each_mixed_image_has_its_own_draw(alphas):
    images = torch.tensor([0.0, 1.0]).repeat(32).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    _, targets = mix(images, torch.eye(2).repeat(32, 1), seeded(), *alphas, 1.0)
    assert len(targets[:, 0].unique()) > 48


@pixel_functions
def test_dtype_shape_layout_and_input_are_kept(function):
    images = make_images(8)
    before = images.clone()
    out = function(images, seeded())
    assert out.dtype == torch.uint8 and out.shape == images.shape and channels_last(out)
    assert torch.equal(images, before)


@every_function
@pytest.mark.parametrize("total", [8, 9])
def test_rank_gets_its_rows_of_the_global_batch(function, total):
    images = make_images(total)
    expected = function(images, seeded())
    for rows in (slice(0, 4), slice(4, total), slice(0, 0)):
        generator = RankGenerator(seeded(), rows, total)
        assert torch.equal(function(images[rows], generator), expected[rows])


def test_rank_with_another_number_of_images_is_noticed():
    with pytest.raises(AssertionError, match="3 images"):
        rand(RankGenerator(seeded(), slice(0, 2), 4), 3)


@pytest.fixture(params=[0.0, LARGEST_DRAW])
def extreme_draw(request, monkeypatch):
    draw = lambda *shape, generator=None: torch.full(shape, request.param)  # noqa: E731
    monkeypatch.setattr(torch, "rand", draw)


@every_function
def test_extreme_draws_stay_in_range(function, extreme_draw):
    images = make_images(6)
    out = function(images, seeded())
    assert len(out) == len(images) and out.float().isfinite().all()


# ---- geometry ----


@pytest.mark.parametrize("p", [0, 0.5, 0.8, 1])
def test_flip(p):
    images = make_images(32, 24, 40)
    chosen = rand(seeded(), 32) < p

    def reference(image, mirrored):
        return tvf.horizontal_flip(image) if mirrored else image

    expected = one_by_one(reference, images, chosen)
    assert torch.equal(augment.flip(images, seeded(), p), expected)
    assert torch.equal(augment.flip(images.float(), seeded(), p), expected.float())


@pytest.mark.parametrize("padding", [None, 1, 7, 23])
@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_crop(height, width, mode, padding):
    images = make_images(24, height, width)
    border = height // 8 if padding is None else padding
    offsets = (rand(seeded(), 24, 2) * (2 * border + 1)).long().tolist()

    def reference(image, offset):
        padded = tvf.pad(image, [border], padding_mode={"zero": "constant"}.get(mode, mode))
        return tvf.crop(padded, *offset, height, width)

    expected = one_by_one(reference, images, offsets)
    assert torch.equal(augment.crop(images, seeded(), padding, mode), expected)
    assert torch.equal(augment.crop(images.float(), seeded(), padding, mode), expected.float())


def test_crop_reaches_each_place_equally_often():
    numbered = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3000, 3, -1, -1)
    centers = augment.crop(numbered, seeded(), 2)[:, 0, 8, 8].long()
    counts = centers.bincount()
    counts = counts[counts > 0]
    # 120 are expected, with a standard deviation of 11.
    assert len(counts) == 25 and counts.min() > 70 and counts.max() < 180


@pytest.mark.parametrize("padding", [0, -1, 16])
def test_crop_refuses_unsuitable_padding(padding):
    with pytest.raises(ValueError, match=f"padding must be 1 to 15 px for 16x16, not {padding}$"):
        augment.crop(make_images(2, 16, 16), seeded(), padding)


@pytest.mark.parametrize("size", [16, 24, 48, 96])
def test_resize_is_bicubic_and_antialiased(size):
    images = make_images(6)
    resized = augment.resize(images, size)
    options = dict(interpolation=InterpolationMode.BICUBIC, antialias=True)
    expected = one_by_one(lambda image: tvf.resize(image, [size, size], **options), images)
    assert resized.dtype == torch.uint8 and torch.equal(resized, expected)
    exact = F.interpolate(images.double(), (size, size), mode="bicubic", antialias=True)
    # The uint8 kernel rounds and clips between the two directions.
    difference = (resized - exact.clamp(0, 255)).abs()
    assert (difference > 1).double().mean() < 0.01 and difference.mean() < 0.3


def test_resize_to_the_same_size_does_nothing():
    images = make_images(2)
    assert augment.resize(images, 32) is images


@pytest.mark.parametrize("size", [7, 16, 32, 64])
def test_resized_crop(size):
    images = make_images(24, 28, 36)
    boxes = augment.random_boxes(seeded(), 24, (28, 36))
    # Top, left, height, width of: the full image, a corner, a row, a column.
    boxes[:4] = torch.tensor([[0, 0, 28, 36], [27, 35, 1, 1], [3, 0, 1, 36], [0, 9, 28, 1]])

    def reference(image, box):
        return tvf.resized_crop(image, *box.tolist(), [size, size], antialias=True)

    expected = one_by_one(reference, images / 255, boxes)
    out = augment.resized_crop(images / 255, boxes, size)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
    out = augment.resized_crop(images, boxes, size)
    assert out.dtype == torch.uint8
    torch.testing.assert_close(out / 255, expected.clamp(0, 1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [None, 20, 48])
def test_random_resized_crop_uses_the_drawn_boxes(size):
    images = make_images(12)
    scale, ratio = (0.3, 0.6), (0.5, 2)
    boxes = augment.random_boxes(seeded(), 12, (32, 32), scale, ratio)
    out = augment.random_resized_crop(images, seeded(), size, scale=scale, ratio=ratio)
    assert torch.equal(out, augment.resized_crop(images, boxes, size or 32))


def assert_inside(boxes, height, width):
    top, left, h, w = boxes.T
    assert top.min() >= 0 and left.min() >= 0
    assert (top + h).max() <= height and (left + w).max() <= width


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_boxes_of_extreme_draws_are_inside(shape, extreme_draw):
    assert_inside(augment.random_boxes(seeded(), 5, shape), *shape)


@pytest.mark.parametrize("height, width", [(32, 32), (48, 24), (200, 300)])
@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.25, 0.5), (0.5, 2.0))])
def test_boxes_have_the_given_areas_and_ratios(height, width, scale, ratio):
    boxes = augment.random_boxes(seeded(), 4000, (height, width), scale, ratio).double()
    assert_inside(boxes, height, width)
    top, left, h, w = boxes.T
    area, half = height * width, 0.5  # sides are rounded by half a pixel
    assert ((h + half) * (w + half)).min() >= scale[0] * area
    assert ((h - half) * (w - half)).max() <= scale[1] * area
    assert ((w + half) / (h - half)).min() >= ratio[0]
    assert ((w - half) / (h + half)).max() <= ratio[1]
    free = (h < height) & (w < width)
    for place in ((top / (height - h))[free], (left / (width - w))[free]):
        assert place.min() == 0 and place.max() == 1 and abs(place.mean() - 0.5) < 0.02


def torchvision_boxes(count, height, width, scale, ratio):
    transform, image = v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [transform.make_params([image]) for _ in range(count)]
    return torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in boxes])


def test_boxes_are_distributed_like_torchvisions():
    ours = augment.random_boxes(seeded(), 20000, (64, 48)).double().T
    theirs = torchvision_boxes(3000, 64, 48, (0.08, 1.0), (3 / 4, 4 / 3)).double().T
    for statistic in (lambda b: b[2] * b[3], lambda b: b[3] / b[2], lambda b: b[0], lambda b: b[1]):
        mine, other = statistic(ours), statistic(theirs)
        assert abs(mine.mean() - other.mean()) < 4 * other.std() / len(other) ** 0.5
        assert mine.std() / other.std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("ratio", [(3, 4), (0.2, 0.3)])
def test_central_box_if_none_fits_is_torchvisions(ratio):
    boxes = augment.random_boxes(seeded(), 5, (32, 40), (1, 1), ratio)
    assert torch.equal(boxes, torchvision_boxes(5, 32, 40, (1, 1), ratio))


# ---- color ----

JITTERS = [
    (0.4, 0, 0, 0), (0, 0.4, 0, 0), (0, 0, 0.4, 0), (0, 0, 0, 0.5),
    (0.4, 0.4, 0.4, 0.1), (1.5, 0, 0, 0), (0, 1.5, 1.5, 0.3),
]  # fmt: skip


@pytest.mark.parametrize("strengths", JITTERS)
def test_color_jitter(strengths):
    images = make_images(24)
    draws = rand(seeded(), 24, 4, low=-1, high=1)

    def reference(image, draw):
        # From [max(0, 1 - strength), 1 + strength], as torchvision's ColorJitter draws them.
        lows = [max(0.0, 1 - strength) for strength in strengths[:3]]
        ends = [(low, 1 + strength) for low, strength in zip(lows, strengths)]
        factors = [low + (high - low) * (float(d) + 1) / 2 for (low, high), d in zip(ends, draw)]
        image = tvf.adjust_brightness(image / 255, factors[0])
        image = tvf.adjust_saturation(tvf.adjust_contrast(image, factors[1]), factors[2])
        return 255 * tvf.adjust_hue(image, strengths[3] * float(draw[3]))

    out = augment.color_jitter(images, seeded(), *strengths)
    # Ours is rounded to uint8, once, at the end.
    assert (out - one_by_one(reference, images, draws)).abs().max() < 0.51


def test_color_jitter_without_strength_changes_nothing():
    assert torch.equal(augment.color_jitter(make_images(), seeded(), 0, 0, 0, 0), make_images())


# ---- normalization and erasing ----


def test_normalize_is_the_formula():
    images = make_images(8, 24, 40)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    for stored in (images, images.contiguous()):
        out = augment.normalize(stored, MEAN, STD)
        assert out.dtype == torch.float32 and channels_last(out)
        expected = (images.double() / 255 - mean) / std
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 8, 9, 50])
def test_cutout(size):
    images = augment.normalize(make_images(32, 24, 40), MEAN, STD)
    centers = (rand(seeded(), 32, 2) * torch.tensor([24, 40])).long()

    def reference(image, center):
        start = center - size // 2
        (top, left), (bottom, right) = start.clamp(min=0), (start + size).clamp(min=0)
        image = image.clone()
        image[:, top:bottom, left:right] = 0
        return image

    expected = one_by_one(reference, images, centers)
    assert torch.equal(augment.cutout(images, seeded(), size), expected)


@pytest.mark.parametrize("size", [5, 6])
def test_cutout_covers_each_place_equally_often(size):
    kept = augment.cutout(torch.ones(20000, 1, 16, 16), seeded(), size)[:, 0, 8].mean(0)
    far_from_the_ends = kept[5:-5]
    assert far_from_the_ends.max() - far_from_the_ends.min() < 0.02


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_random_erasing(height, width):
    ones, area = torch.ones(4000, 2, height, width), height * width
    assert torch.equal(augment.random_erasing(ones, seeded(), 0.0), ones)
    out = augment.random_erasing(ones, seeded(), 0.25, area=(0.05, 0.3), aspect=0.5)
    assert torch.equal(out[:, 0], out[:, 1]) and set(out.unique().tolist()) == {0.0, 1.0}
    erased = out[:, 0] == 0
    chosen = erased.flatten(1).any(1)
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.03)
    erased = erased[chosen]
    rows, columns = erased.any(2), erased.any(1)
    h, w = rows.sum(1), columns.sum(1)
    assert torch.equal(h * w, erased.sum((1, 2)))  # one complete box
    assert ((h + 0.5) * (w + 0.5)).min() >= 0.05 * area  # sides are rounded by half a pixel
    assert ((h - 0.5) * (w - 0.5)).max() <= 0.3 * area
    share, aspect = h * w / area, (h / height) / (w / width)
    assert share.min() < 0.07 and share.max() > 0.27 and abs(share.mean() - 0.175) < 0.01
    assert 0.4 < aspect.min() < 0.6 and 1.7 < aspect.max() < 2.5
    reached = rows.float().mean(0)
    assert reached[0] > 0.02 and reached[-1] > 0.02
