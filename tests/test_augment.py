"""Every augmentation of a batch is, image by image, what torchvision or a plain loop makes of it with the same draws."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from datasets import augment
from datasets.augment import OPERATIONS, Pipeline, RankGenerator

LAST = 1 - 2**-24  # the largest number that torch.rand gives


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def pictures(count=16, height=32, width=32):
    """Soft shapes of random colour with some noise; the first picture is one grey, the second has no colour."""
    generator = seeded(count)
    soft = F.interpolate(
        torch.rand(count, 3, 5, 5, generator=generator), (height, width), mode="bicubic"
    )
    images = soft * 300 - 20 + 20 * torch.randn(count, 3, height, width, generator=generator)
    images[0] = 90
    images[1] = images[1, :1]
    return images.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def one_by_one(reference, images, *parameters):
    """reference(image (3, H, W), parameters of this image) of each image, stacked."""
    return torch.stack(
        [reference(image, *(p[i] for p in parameters)) for i, image in enumerate(images)]
    )


def mixing(function, **options):
    """A mixing function as one of images alone: targets are made of the images, and come out in their rows."""

    def mixed(images, generator):
        images, targets = function(
            images.float(), images.float().mean((2, 3)), generator, **options
        )
        return torch.cat([images.flatten(1), targets], dim=1)

    return mixed


JITTER = functools.partial(
    augment.color_jitter, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)
ON_PIXELS = {
    "flip": augment.flip,
    "crop, reflect": augment.crop,
    "crop, zero": functools.partial(augment.crop, mode="zero"),
    "cutout": functools.partial(augment.cutout, size=9),
    "color_jitter": JITTER,
    "rand_augment": augment.rand_augment,
    "trivial_augment": augment.trivial_augment,
    "random_resized_crop": augment.random_resized_crop,
}
EVERY = ON_PIXELS | {
    "mixup": mixing(augment.mixup),
    "cutmix": mixing(augment.cutmix),
    "mix": mixing(augment.mix, mixup_alpha=0.4, cutmix_alpha=1.0, probability=0.5),
}
every = pytest.mark.parametrize("function", EVERY.values(), ids=EVERY)
on_pixels = pytest.mark.parametrize("function", ON_PIXELS.values(), ids=ON_PIXELS)


# ---- what all have in common -------------------------------------------------------------------------------------------


@every
def test_the_generator_is_the_only_source_of_chance(function):
    images, before = pictures(), torch.get_rng_state()
    first, again, other = (function(images.clone(), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@on_pixels
def test_every_image_has_its_own_draw(function):
    images = pictures(4)[3:].repeat(64, 1, 1, 1)
    results = function(images, seeded()).flatten(1).unique(dim=0)
    assert len(results) >= (2 if function is augment.flip else 16)


def test_every_pair_of_mixed_images_has_its_own_draw():
    images = torch.tensor([0.0, 1.0]).repeat(32).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    for function in (augment.mixup, augment.cutmix):
        shares = function(images, torch.eye(2).repeat(32, 1), seeded())[1][:, 0]
        assert len(shares.unique()) > 48


@on_pixels
def test_dtype_size_and_layout_are_kept_and_the_input_is_not_touched(function):
    images = pictures(8)
    before = images.clone()
    out = function(images, seeded())
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@every
@pytest.mark.parametrize("total", [8, 9])
def test_a_rank_sees_its_rows_of_the_common_batch(function, total):
    images = pictures(total)
    whole = function(images, seeded())
    for rows in (slice(0, 4), slice(4, total), slice(0, 0)):
        rank = RankGenerator(seeded(), rows, total)
        assert torch.equal(function(images[rows], rank), whole[rows])


@every
@pytest.mark.parametrize("value", [0.0, LAST])
def test_the_smallest_and_the_largest_draw_stay_inside(function, value, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.full(shape, value))
    images = pictures(6)
    out = function(images, seeded())
    assert len(out) == len(images) and out.float().isfinite().all()


@pytest.mark.parametrize("value", [0.0, LAST])
def test_boxes_of_the_smallest_and_the_largest_draw_stay_inside(value, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.full(shape, value))
    for height, width in ((32, 32), (24, 40)):
        top, left, h, w = augment.random_boxes(seeded(), 5, height, width)
        assert (
            (top >= 0).all()
            and (left >= 0).all()
            and (top + h <= height).all()
            and (left + w <= width).all()
        )


def test_a_rank_of_another_size_is_noticed():
    with pytest.raises(AssertionError, match="3 images"):
        augment.rand(RankGenerator(seeded(), slice(0, 2), 4), 3)


# ---- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 0.5, 0.8, 1])
def test_flip(p):
    images = pictures(32, 24, 40)
    chosen = augment.rand(seeded(), 32) < p
    expected = one_by_one(
        lambda image, yes: tvf.horizontal_flip(image) if yes else image, images, chosen
    )
    assert torch.equal(augment.flip(images, seeded(), p), expected)
    assert torch.equal(augment.flip(images.float(), seeded(), p), expected.float())


@pytest.mark.parametrize("padding", [None, 1, 7, 23])
@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_crop(height, width, mode, padding):
    images = pictures(24, height, width)
    border = height // 8 if padding is None else padding
    offsets = (augment.rand(seeded(), 24, 2) * (2 * border + 1)).long().tolist()

    def reference(image, offset):
        padded = tvf.pad(image, [border], padding_mode="constant" if mode == "zero" else mode)
        return tvf.crop(padded, *offset, height, width)

    expected = one_by_one(reference, images, offsets)
    assert torch.equal(augment.crop(images, seeded(), padding, mode), expected)
    assert torch.equal(augment.crop(images.float(), seeded(), padding, mode), expected.float())


def test_crop_reaches_every_place():
    ramp = (torch.arange(16 * 16, dtype=torch.uint8)).view(1, 1, 16, 16).expand(3000, 3, -1, -1)
    corners = augment.crop(ramp, seeded(), 2)[:, 0, 8, 8]  # tells which window it is
    counts = corners.long().bincount()
    counts = counts[counts > 0]
    assert (
        len(counts) == 25 and counts.min() > 70 and counts.max() < 180
    )  # 120 each, with a deviation of 11


@pytest.mark.parametrize("padding", [0, -1, 16])
def test_a_padding_that_does_not_suit_is_refused(padding):
    with pytest.raises(
        ValueError, match=rf"padding of {padding} does not suit images of \D*16\D+16\D* pixels"
    ):
        augment.crop(pictures(2, 16, 16), seeded(), padding)


@pytest.mark.parametrize("size", [16, 24, 48, 96])
def test_resize_is_bicubic_and_antialiased(size):
    images = pictures(6)
    exact = F.interpolate(images.double(), (size, size), mode="bicubic", antialias=True).clamp(
        0, 255
    )
    resized = augment.resize(images, size)
    assert resized.dtype == torch.uint8
    difference = (
        resized - exact
    ).abs()  # the uint8 kernel rounds, and cuts at 0 and 255, between the two directions
    assert (difference > 1).double().mean() < 0.01 and difference.mean() < 0.3
    options = dict(interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(
        resized, one_by_one(lambda image: tvf.resize(image, [size, size], **options), images)
    )


def test_resizing_to_the_same_size_does_nothing():
    images = pictures(2)
    assert augment.resize(images, 32) is images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 16, 32, 64])
def test_resized_crop(size, interpolation):
    images = pictures(24, 28, 36)
    top, left, height, width = augment.random_boxes(seeded(), 24, 28, 36)
    top[:4], left[:4] = (
        torch.tensor([0, 27, 3, 0]),
        torch.tensor([0, 35, 0, 9]),
    )  # all, a corner, a row, a column
    height[:4], width[:4] = torch.tensor([28, 1, 1, 28]), torch.tensor([36, 1, 36, 1])

    def reference(image, *box):
        box = [int(x) for x in box]
        return tvf.resized_crop(
            image, *box, [size, size], InterpolationMode(interpolation), antialias=True
        )

    boxes = top, left, height, width
    expected = one_by_one(reference, images / 255, *boxes)
    torch.testing.assert_close(
        augment.resized_crop(images / 255, *boxes, size, interpolation), expected, atol=1e-4, rtol=0
    )
    out = augment.resized_crop(images, *boxes, size, interpolation)
    assert out.dtype == torch.uint8
    torch.testing.assert_close(out / 255, expected.clamp(0, 1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [None, 20, 48])
def test_random_resized_crop_takes_the_drawn_boxes(size):
    images = pictures(12)
    boxes = augment.random_boxes(seeded(), 12, 32, 32, (0.3, 0.6), (0.5, 2))
    out = augment.random_resized_crop(images, seeded(), size, (0.3, 0.6), (0.5, 2), "bicubic")
    assert torch.equal(out, augment.resized_crop(images, *boxes, size or 32, "bicubic"))


@pytest.mark.parametrize("height, width", [(32, 32), (48, 24), (200, 300)])
@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.25, 0.5), (0.5, 2.0))])
def test_random_boxes_keep_to_their_ranges(height, width, scale, ratio):
    top, left, h, w = (
        box.double() for box in augment.random_boxes(seeded(), 4000, height, width, scale, ratio)
    )
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + h <= height).all()
        and (left + w <= width).all()
    )
    area, half = height * width, 0.5  # a side is rounded by half a pixel
    assert ((h + half) * (w + half) >= scale[0] * area).all() and (
        (h - half) * (w - half) <= scale[1] * area
    ).all()
    assert ((w + half) / (h - half) >= ratio[0]).all() and (
        (w - half) / (h + half) <= ratio[1]
    ).all()
    free = (h < height) & (w < width)
    for place in (top / (height - h), left / (width - w)):
        assert (
            place[free].min() == 0
            and place[free].max() == 1
            and abs(place[free].mean() - 0.5) < 0.02
        )


def torchvision_boxes(count, height, width, scale, ratio):
    transform, image = v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, height, width)
    make = getattr(transform, "make_params", None) or transform._get_params
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [make([image]) for _ in range(count)]
    return torch.tensor([[box["top"], box["left"], box["height"], box["width"]] for box in boxes]).T


def test_random_boxes_are_distributed_as_torchvision_s():
    ours = torch.stack(augment.random_boxes(seeded(), 20000, 64, 48)).double()
    theirs = torchvision_boxes(3000, 64, 48, (0.08, 1.0), (3 / 4, 4 / 3)).double()
    for statistic in (lambda b: b[2] * b[3], lambda b: b[3] / b[2], lambda b: b[0], lambda b: b[1]):
        mine, other = statistic(ours), statistic(theirs)
        assert abs(mine.mean() - other.mean()) < 4 * other.std() / len(other) ** 0.5
        assert mine.std() / other.std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("ratio", [(3, 4), (0.2, 0.3)])
def test_where_no_box_fits_the_middle_is_taken_as_in_torchvision(ratio):
    boxes = torch.stack(augment.random_boxes(seeded(), 5, 32, 40, (1, 1), ratio))
    assert torch.equal(boxes, torchvision_boxes(5, 32, 40, (1, 1), ratio))


# ---- colour ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strengths",
    [
        (0.4, 0, 0, 0),
        (0, 0.4, 0, 0),
        (0, 0, 0.4, 0),
        (0, 0, 0, 0.5),
        (0.4, 0.4, 0.4, 0.1),
        (1.5, 0, 0, 0),
        (0, 1.5, 1.5, 0.3),
    ],
)
def test_color_jitter(strengths):
    images = pictures(24)
    draws = augment.rand(seeded(), 24, 4, low=-1, high=1)

    def reference(image, draw):
        factors = [max(0.0, 1 + strength * float(d)) for strength, d in zip(strengths[:3], draw)]
        image = tvf.adjust_brightness(image / 255, factors[0])
        image = tvf.adjust_saturation(tvf.adjust_contrast(image, factors[1]), factors[2])
        return 255 * tvf.adjust_hue(image, strengths[3] * float(draw[3]))

    out = augment.color_jitter(images, seeded(), *strengths)
    difference = (out - one_by_one(reference, images, draws)).abs().max()
    assert (
        difference < 0.51
    )  # of 255: the rounding to uint8; nothing is rounded between the operations


def test_color_jitter_without_strength_changes_nothing():
    assert torch.equal(augment.color_jitter(pictures(), seeded(), 0, 0, 0, 0), pictures())


# ---- RandAugment and TrivialAugment ------------------------------------------------------------------------------------

TORCHVISION_NAMES = dict(
    identity="Identity",
    shear_x="ShearX",
    shear_y="ShearY",
    translate_x="TranslateX",
    translate_y="TranslateY",
    rotate="Rotate",
    brightness="Brightness",
    color="Color",
    contrast="Contrast",
    sharpness="Sharpness",
    posterize="Posterize",
    solarize="Solarize",
    auto_contrast="AutoContrast",
    equalize="Equalize",
)
TABLES = {
    v2.RandAugment: augment.rand_augment_strengths,
    v2.TrivialAugmentWide: augment.trivial_augment_strengths,
}


def torchvision_magnitudes(transform, name, height, width, bins=31):
    """(magnitudes (bins,), signed) of an operation, as torchvision's transform has them."""
    magnitudes, signed = transform._AUGMENTATION_SPACE[TORCHVISION_NAMES[name]]
    values = magnitudes(bins, height, width)
    return torch.zeros(bins) if values is None else values.float(), signed


def as_strength(name, magnitude):
    """torchvision's magnitude in our unit: it gives the bits that stay and the threshold, we what goes."""
    return {"posterize": 8 - magnitude, "solarize": 1 - magnitude}.get(name, magnitude)


def reference_operation(image, name, magnitude):
    """What torchvision's RandAugment does to an image (3, H, W)."""
    tangent = float(torch.rad2deg(torch.atan(torch.tensor(magnitude, dtype=torch.float64))))

    def affine(translate=(0, 0), shear=(0.0, 0.0), center=None):
        return tvf.affine(
            image, 0.0, list(translate), 1.0, list(shear), InterpolationMode.NEAREST, center=center
        )

    return {
        "identity": lambda: image,
        "shear_x": lambda: affine(shear=(tangent, 0.0), center=[0, 0]),
        "shear_y": lambda: affine(shear=(0.0, tangent), center=[0, 0]),
        "translate_x": lambda: affine((int(magnitude), 0)),
        "translate_y": lambda: affine((0, int(magnitude))),
        "rotate": lambda: tvf.rotate(image, magnitude, InterpolationMode.NEAREST),
        "brightness": lambda: tvf.adjust_brightness(image, 1 + magnitude),
        "color": lambda: tvf.adjust_saturation(image, 1 + magnitude),
        "contrast": lambda: tvf.adjust_contrast(image, 1 + magnitude),
        "sharpness": lambda: tvf.adjust_sharpness(image, 1 + magnitude),
        "posterize": lambda: tvf.posterize(image, int(magnitude)),
        "solarize": lambda: tvf.solarize(image, 255.0 * magnitude),
        "auto_contrast": lambda: tvf.autocontrast(image),
        "equalize": lambda: tvf.equalize(image),
    }[name]()


def test_the_operations_are_torchvision_s_in_its_order():
    for transform in TABLES:
        assert [TORCHVISION_NAMES[name] for name in OPERATIONS] == list(
            transform._AUGMENTATION_SPACE
        )


@pytest.mark.parametrize("transform", TABLES)
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (224, 224)])
@pytest.mark.parametrize("bins", [31, 11])
def test_strengths_are_torchvision_s(transform, height, width, bins):
    strengths = torch.tensor(TABLES[transform](height, width))
    for i, name in enumerate(OPERATIONS):
        magnitudes, signed = torchvision_magnitudes(transform, name, height, width, bins)
        ours = strengths[i] * torch.arange(bins) / (bins - 1)
        if name == "posterize":
            ours = ours.round()
        if strengths[i]:
            torch.testing.assert_close(ours, as_strength(name, magnitudes), atol=1e-5, rtol=1e-5)
        assert signed == (i in augment.SIGNED)


@pytest.mark.parametrize("transform", TABLES)
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name, height, width, transform):
    images = pictures(12, height, width)
    magnitudes, signed = torchvision_magnitudes(transform, name, height, width)
    for k in (0, 3, 9, 10, 15, 22, 30):
        for sign in (1, -1) if signed else (1,):
            magnitude = sign * float(magnitudes[k])
            expected = one_by_one(
                lambda image, m=magnitude: reference_operation(image, name, m), images
            ).int()
            op, strength = (
                torch.full((12,), OPERATIONS.index(name)),
                torch.full((12,), as_strength(name, magnitude)),
            )
            out = augment.operate(images, op, strength)
            assert out.dtype == torch.uint8
            difference = (out.int() - expected).abs()
            where = f"{name} {magnitude}: {difference.max()} levels, {(difference > 0).float().mean():.2%} of the pixels"
            if name in ("brightness", "color", "contrast", "sharpness"):
                assert difference.max() <= 2, (
                    where
                )  # torchvision truncates, and contrast also takes the mean of integers
            elif name in ("shear_x", "shear_y", "rotate"):
                assert (difference > 0).float().mean() <= 0.005, (
                    where
                )  # places half-way between two pixels
            elif name == "solarize":
                assert difference[(images - 255.0 * magnitude).abs() > 1e-3].sum() == 0, (
                    where
                )  # at the threshold by rounding
            else:
                assert difference.max() == 0, where


def test_a_batch_of_different_operations_is_each_image_s_own():
    images = pictures(56)
    op = torch.arange(56) % len(OPERATIONS)
    strength = torch.tensor(augment.trivial_augment_strengths(32, 32))[op] * augment.rand(
        seeded(), 56
    )
    each = [
        augment.operate(images[i : i + 1], op[i : i + 1], strength[i : i + 1]) for i in range(56)
    ]
    assert torch.equal(augment.operate(images, op, strength), torch.cat(each))


def operate_one(image, transform, op, negative, k, bins):
    """One of torchvision's operations at bin k, through `operate`."""
    name = OPERATIONS[op]
    magnitudes, signed = torchvision_magnitudes(transform, name, 32, 32, bins)
    magnitude = -magnitudes[k] if signed and negative else magnitudes[k]
    return augment.operate(image[None], torch.tensor([op]), as_strength(name, magnitude).view(1))[0]


def assert_nearly_equal(out, expected):
    """Equal but for a few pixels, which the last digit of a strength brings over a rounding."""
    assert (out != expected).float().mean() < 1e-3


@pytest.mark.parametrize(
    "num_ops, magnitude, bins", [(1, 9, 31), (2, 9, 31), (3, 30, 31), (2, 5, 11)]
)
def test_rand_augment(num_ops, magnitude, bins):
    images = pictures(48)
    draws = augment.rand(seeded(), 48, num_ops, 2)

    def reference(image, draw):
        for choice, sign in draw:
            image = operate_one(
                image, v2.RandAugment, int(choice * 14), sign < 0.5, magnitude, bins
            )
        return image

    assert_nearly_equal(
        augment.rand_augment(images, seeded(), num_ops, magnitude, bins),
        one_by_one(reference, images, draws),
    )


@pytest.mark.parametrize("bins", [31, 11])
def test_trivial_augment(bins):
    images = pictures(96)
    draws = augment.rand(seeded(), 96, 3)

    def reference(image, draw):
        return operate_one(
            image,
            v2.TrivialAugmentWide,
            int(draw[0] * 14),
            draw[1] < 0.5,
            int(draw[2] * bins),
            bins,
        )

    assert_nearly_equal(
        augment.trivial_augment(images, seeded(), bins), one_by_one(reference, images, draws)
    )


# ---- after normalisation -----------------------------------------------------------------------------------------------

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def test_normalize_is_the_formula():
    images = pictures(8, 24, 40)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    for given in (images, images.contiguous()):
        out = augment.normalize(given, MEAN, STD)
        assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(
            out.double(), (images.double() / 255 - mean) / std, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("size", [1, 8, 9, 50])
def test_cutout(size):
    images = augment.normalize(pictures(32, 24, 40), MEAN, STD)
    centres = (augment.rand(seeded(), 32, 2) * torch.tensor([24, 40])).long()

    def reference(image, centre):
        image = image.clone()
        (top, left), end = (centre - size // 2).tolist(), (centre - size // 2 + size).tolist()
        image[:, max(0, top) : max(0, end[0]), max(0, left) : max(0, end[1])] = 0.5
        return image

    expected = one_by_one(reference, images, centres)
    assert torch.equal(augment.cutout(images, seeded(), size, 0.5), expected)
    chosen = augment.cutout(pictures(32, 24, 40), seeded(), size, 3)
    assert torch.equal(chosen == 3, (expected == 0.5) | (pictures(32, 24, 40) == 3))


@pytest.mark.parametrize("size", [5, 6])
def test_cutout_is_as_often_at_every_place(size):
    ones = torch.ones(20000, 1, 16, 16)
    kept = augment.cutout(ones, seeded(), size)[:, 0, 8].mean(0)[
        5:-5
    ]  # along a row, far from its ends
    assert kept.max() - kept.min() < 0.02


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_random_erasing(height, width):
    ones = torch.ones(4000, 2, height, width)
    erased = augment.random_erasing(ones, seeded(), 0.25, area=(0.05, 0.3), aspect=0.5)
    assert torch.equal(erased[:, 0], erased[:, 1]) and set(erased.unique().tolist()) == {0.0, 1.0}
    gone = erased[:, 0] == 0
    chosen = gone.flatten(1).any(1)
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.03)
    gone = gone[chosen]
    rows, columns = gone.any(2), gone.any(1)
    h, w = rows.sum(1), columns.sum(1)
    assert torch.equal(h * w, gone.sum((1, 2)))  # one whole box, inside the picture
    part, aspect = h * w / (height * width), (h / height) / (w / width)
    size, half = height * width, 0.5  # a side is rounded by half a pixel
    assert ((h + half) * (w + half) >= 0.05 * size).all() and (
        (h - half) * (w - half) <= 0.3 * size
    ).all()
    assert (
        part.min() < 0.07
        and part.max() > 0.27
        and part.mean().item() == pytest.approx(0.175, abs=0.01)
    )
    assert 0.4 < aspect.min() < 0.6 and 1.7 < aspect.max() < 2.5
    assert (
        rows.float().mean(0)[0] > 0.02 and rows.float().mean(0)[-1] > 0.02
    )  # the border is reached
    assert torch.equal(augment.random_erasing(ones, seeded(), 0.0), ones)


def onehot(count, classes=7):
    return F.one_hot(torch.arange(count) % classes, classes).float()


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("count", [8, 9])
def test_mixup(count, alpha):
    images, targets = pictures(count) / 255, onehot(count)
    mixed, shares = augment.mixup(images, targets, seeded(), alpha)
    weights = shares[torch.arange(count), targets.argmax(1)]
    if alpha == 1:  # uniform: the draws themselves
        torch.testing.assert_close(
            weights[: count // 2 * 2], augment.rand(seeded(), count)[: count // 2 * 2]
        )
    for i in range(count):
        j = i ^ 1 if i ^ 1 < count else i
        torch.testing.assert_close(mixed[i], weights[i] * images[i] + (1 - weights[i]) * images[j])
        torch.testing.assert_close(
            shares[i], weights[i] * targets[i] + (1 - weights[i]) * targets[j]
        )
    torch.testing.assert_close(shares.sum(1), torch.ones(count))


@pytest.mark.parametrize("count", [8, 9])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_cutmix(count, height, width):
    images, targets = pictures(count, height, width) / 255, onehot(count)
    generator = seeded()
    kept, places = augment.rand(generator, count), augment.rand(generator, count, 2)
    mixed, shares = augment.cutmix(images, targets, seeded())
    for i in range(count):
        j = i ^ 1 if i ^ 1 < count else i
        expected, own = images[i].clone(), height * width
        h, w = int((1 - kept[i]).sqrt() * height), int((1 - kept[i]).sqrt() * width)
        top, left = int(places[i, 0] * height) - h // 2, int(places[i, 1] * width) - w // 2
        for y in range(max(0, top), min(height, top + h)):
            for x in range(max(0, left), min(width, left + w)):
                expected[:, y, x] = images[j, :, y, x]
                own -= 1
        assert torch.equal(mixed[i], expected)
        share = own / (height * width)
        torch.testing.assert_close(shares[i], share * targets[i] + (1 - share) * targets[j])
    torch.testing.assert_close(shares.sum(1), torch.ones(count))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha):
    images, targets = torch.zeros(20000, 1, 1, 1), torch.eye(2).repeat(10000, 1)
    shares = augment.mixup(images, targets, seeded(), alpha)[1][targets.bool()]
    assert abs(shares.mean() - 0.5) < 0.01
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert shares.min() >= 0 and shares.max() <= 1


def kind_of_mixing(images, mixed, i):
    """ "none", "cutmix" (each pixel from one of the two), or "mixup"."""
    if torch.equal(mixed[i], images[i]):
        return "none"
    one_of_two = (mixed[i] == images[i]) | (mixed[i] == images[i ^ 1])
    return "cutmix" if one_of_two.all() else "mixup"


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mix_draws_kind_and_chance_for_each_image(alphas):
    kinds = {name for name, alpha in zip(("mixup", "cutmix"), alphas) if alpha}
    images, targets = pictures(200) / 255, onehot(200)
    for probability in (0, 0.5, 1):
        mixed, shares = augment.mix(images, targets, seeded(), *alphas, probability)
        found = [kind_of_mixing(images, mixed, i) for i in range(200)]
        untouched = torch.tensor([kind == "none" for kind in found])
        assert torch.equal(shares[untouched], targets[untouched])
        torch.testing.assert_close(shares.sum(1), torch.ones(200))
        assert abs(found.count("none") / 200 - (1 - probability)) < (
            0.1 if probability == 0.5 else 0.05
        )
        assert set(found) - {"none"} == (kinds if probability else set())
        if len(kinds) == 2 and probability == 1:
            assert 70 < found.count("mixup") < 130


def test_mixing_without_an_alpha_changes_nothing():
    images, targets = pictures() / 255, onehot(16)
    mixed, shares = augment.mix(images, targets, seeded(), 0, 0, 1)
    assert torch.equal(mixed, images) and torch.equal(shares, targets)


# ---- the whole way -----------------------------------------------------------------------------------------------------


def test_the_pipeline_is_its_steps_in_order():
    images, labels, generator = pictures(), torch.arange(16) % 10, seeded()
    options = dict(
        num_classes=10,
        crop_mode="zero",
        cutout_size=12,
        mixup_alpha=0.4,
        cutmix_alpha=1.0,
        mix_probability=0.5,
    )
    inputs, targets = Pipeline(MEAN, STD, 48, ["crop", "color_jitter", "flip"], **options)(
        images, labels, seeded()
    )
    x = augment.crop(images, generator, mode="zero")
    x = augment.flip(augment.color_jitter(x, generator), generator)
    x = augment.cutout(augment.normalize(augment.resize(x, 48), MEAN, STD), generator, 12)
    x, y = augment.mix(x, F.one_hot(labels, 10).float(), generator, 0.4, 1.0, 0.5)
    assert torch.equal(inputs, x) and torch.equal(targets, y)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_a_pipeline_without_mixing_hands_the_labels_on():
    labels = torch.arange(8)
    inputs, targets = Pipeline(MEAN, STD, 32)(pictures(8), labels)
    assert targets is labels and torch.equal(inputs, augment.normalize(pictures(8), MEAN, STD))


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("name", augment.TRANSFORMS)
def test_every_transform_gives_the_size_that_is_asked_for(name, size):
    inputs, _ = Pipeline(MEAN, STD, size, [name])(
        pictures(4), torch.zeros(4, dtype=torch.int64), seeded()
    )
    assert (
        inputs.shape == (4, 3, size, size)
        and inputs.dtype == torch.float32
        and inputs.isfinite().all()
    )
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_stays_empty():
    pipeline = Pipeline(
        MEAN,
        STD,
        48,
        augment.TRANSFORMS,
        num_classes=10,
        cutout_size=8,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    inputs, targets = pipeline(pictures(4)[:0], torch.zeros(0, dtype=torch.int64), seeded())
    assert inputs.shape == (0, 3, 48, 48) and targets.shape == (0, 10)


def test_an_unknown_transform_is_named():
    with pytest.raises(ValueError, match="unknown augmentation 'blur': the names are crop, flip"):
        Pipeline(MEAN, STD, 32, ["flip", "blur"])
