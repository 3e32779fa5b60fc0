"""The pipeline applies its steps in order; mixing is, pair by pair, what its papers say."""

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import MEAN, STD, channels_last, make_images, mix, seeded

from datasets import augment
from datasets.draws import rand
from datasets.pipeline import TRANSFORMS, Pipeline

# ---- mixing ----


def one_hot(count, classes=7):
    return F.one_hot(torch.arange(count) % classes, classes).float()


def neighbor(i, count):
    return i ^ 1 if i ^ 1 < count else i


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("count", [8, 9])
def test_mixup(count, alpha):
    images, targets = make_images(count) / 255, one_hot(count)
    mixed, shares = mix(images, targets, seeded(), alpha, 0.0, 1.0)
    kept = shares[torch.arange(count), targets.argmax(1)]
    if alpha == 1:  # the draws themselves
        generator = seeded()
        rand(generator, count, 2)  # whether an image is mixed, and how
        torch.testing.assert_close(kept[:8], rand(generator, count)[:8])
    for i in range(count):
        j = neighbor(i, count)
        torch.testing.assert_close(mixed[i], kept[i] * images[i] + (1 - kept[i]) * images[j])
        torch.testing.assert_close(shares[i], kept[i] * targets[i] + (1 - kept[i]) * targets[j])
    torch.testing.assert_close(shares.sum(1), torch.ones(count))


@pytest.mark.parametrize("count", [8, 9])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_cutmix(count, height, width):
    images, targets, generator = make_images(count, height, width) / 255, one_hot(count), seeded()
    rand(generator, count, 2)  # whether an image is mixed, and how
    kept, places = rand(generator, count), rand(generator, count, 2)
    mixed, shares = mix(images, targets, seeded(), 0.0, 1.0, 1.0)
    for i in range(count):
        j = neighbor(i, count)
        h, w = (int((1 - kept[i]).sqrt() * side) for side in (height, width))
        top, left = int(places[i, 0] * height) - h // 2, int(places[i, 1] * width) - w // 2
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[max(0, top) : max(0, top + h), max(0, left) : max(0, left + w)] = True
        assert torch.equal(mixed[i], torch.where(inside, images[j], images[i]))
        share = 1 - inside.float().mean()
        torch.testing.assert_close(shares[i], share * targets[i] + (1 - share) * targets[j])


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2, 1.0, 4.0])
def test_mixup_shares_are_beta_distributed(alpha):
    images, targets = torch.zeros(20000, 1, 1, 1), torch.eye(2).repeat(10000, 1)
    shares = mix(images, targets, seeded(), alpha, 0.0, 1.0)[1][targets.bool()]
    assert abs(shares.mean() - 0.5) < 0.01 and shares.min() >= 0 and shares.max() <= 1
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    # Of Beta(0.01, 0.01), 1.4 % lie there.
    assert alpha > 0.01 or 0.005 < ((shares > 0.2) & (shares < 0.8)).float().mean() < 0.025


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("probability", [0, 0.5, 1])
def test_mix_draws_kind_and_chance_for_each_image(alphas, probability):
    images, targets = make_images(200) / 255, one_hot(200)
    mixed, shares = mix(images, targets, seeded(), *alphas, probability)
    others = images[torch.arange(200) ^ 1]
    unmixed = (mixed == images).flatten(1).all(1)
    cut = ((mixed == images) | (mixed == others)).flatten(1).all(1) & ~unmixed
    counts = {"mixup": int((~unmixed & ~cut).sum()), "cutmix": int(cut.sum())}
    assert torch.equal(shares[unmixed], targets[unmixed])
    torch.testing.assert_close(shares.sum(1), torch.ones(200))
    assert abs(unmixed.float().mean() - (1 - probability)) < (0.1 if probability == 0.5 else 0.05)
    for kind, alpha in zip(("mixup", "cutmix"), alphas):
        assert (counts[kind] > 0) == (alpha > 0 and probability > 0)
    if all(alphas) and probability == 1:
        assert 70 < counts["mixup"] < 130


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mixing_per_batch_has_one_choice_share_and_box(alphas):
    images, targets = make_images(12) / 255, torch.eye(12)
    others, kinds = images[torch.arange(12) ^ 1], []
    for seed in range(60):
        mixed, shares = mix(images, targets, seeded(seed), *alphas, 0.5, "batch")
        kept = shares.diag()
        torch.testing.assert_close(kept, kept[:1].expand(12))
        torch.testing.assert_close(shares.sum(1), torch.ones(12))
        from_other = (mixed != images).any(1)
        if kept[0] == 1:
            assert torch.equal(mixed, images)
            kinds.append("unmixed")
        elif torch.equal(mixed, torch.where(from_other[:, None], others, images)):
            inside = from_other.any(0)
            assert inside.sum() == inside.any(0).sum() * inside.any(1).sum()  # one box
            assert inside.float().mean().item() == pytest.approx(1 - kept[0].item(), abs=1e-5)
            kinds.append("cutmix")
        else:
            torch.testing.assert_close(mixed, torch.lerp(others, images, kept.view(-1, 1, 1, 1)))
            kinds.append("mixup")
    assert 15 < kinds.count("unmixed") < 45
    assert [kinds.count(kind) > 5 for kind in ("mixup", "cutmix")] == [a > 0 for a in alphas]


def test_mix_without_alpha_changes_nothing():
    images, targets = make_images() / 255, one_hot(16)
    mixed, shares = mix(images, targets, seeded(), 0, 0, 1)
    assert torch.equal(mixed, images) and torch.equal(shares, targets)


# ---- the pipeline ----


def test_pipeline_applies_its_steps_in_order():
    images, labels, generator = make_images(), torch.arange(16) % 10, seeded()
    options = dict(num_classes=10, crop_mode="zero", cutout_size=12, erasing=0.5)
    mixes = dict(mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.5)
    pipeline = Pipeline(MEAN, STD, 48, ["crop", "color_jitter", "flip"], **options, **mixes)
    inputs, targets = pipeline(images, labels, seeded())
    x = augment.crop(images, generator, mode="zero")
    x = augment.flip(augment.color_jitter(x, generator), generator)
    x = augment.cutout(augment.normalize(augment.resize(x, 48), MEAN, STD), generator, 12)
    x = augment.random_erasing(x, generator, 0.5)
    x, y = mix(x, F.one_hot(labels, 10).float(), generator, 0.4, 1.0, 0.5)
    assert torch.equal(inputs, x) and torch.equal(targets, y) and channels_last(inputs)


def test_pipeline_without_mixing_returns_the_labels():
    labels = torch.arange(8)
    inputs, targets = Pipeline(MEAN, STD, 32)(make_images(8), labels)
    assert targets is labels and torch.equal(inputs, augment.normalize(make_images(8), MEAN, STD))


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform_gives_the_requested_size(name, size):
    labels = torch.zeros(4, dtype=torch.int64)
    inputs, _ = Pipeline(MEAN, STD, size, [name])(make_images(4), labels, seeded())
    assert inputs.shape == (4, 3, size, size) and inputs.dtype == torch.float32
    assert inputs.isfinite().all() and channels_last(inputs)


def test_pipeline_accepts_an_empty_batch():
    options = dict(num_classes=10, cutout_size=8, mixup_alpha=0.2, cutmix_alpha=1.0)
    pipeline = Pipeline(MEAN, STD, 48, TRANSFORMS, **options)
    inputs, targets = pipeline(make_images(4)[:0], torch.zeros(0, dtype=torch.int64), seeded())
    assert inputs.shape == (0, 3, 48, 48) and targets.shape == (0, 10)


def test_pipeline_refuses_an_unknown_transform():
    with pytest.raises(ValueError, match="unknown augmentation 'blur': the names are crop, flip"):
        Pipeline(MEAN, STD, 32, ["flip", "blur"])
