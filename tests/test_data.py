"""Batches depend only on seed, epoch and number; subsets are stratified."""

import itertools
import threading

import numpy as np
import pytest
import torch
from helpers.batches import MEAN, MIXED, STD, channels_last, random_examples, same_batches, seeded
from helpers.errors import refused

import data
from data import Batches
from datasets import residency, shapes, splits, statistics
from datasets.examples import Examples, Split
from datasets.pipeline import TRANSFORMS, Pipeline

UNCHANGED = Pipeline((0.0,) * 3, (1.0,) * 3, 4)
EVERYTHING = Pipeline(MEAN, STD, 40, TRANSFORMS, **MIXED)
MIXED_PER_BATCH = Pipeline(MEAN, STD, 32, ("flip",), **MIXED, mix_per="batch")


def numbered(count):
    """Images whose first two channels spell their number; labels are the last digit."""
    numbers = torch.arange(count)
    values = torch.stack([numbers // 256, numbers % 256, numbers * 0], dim=1).to(torch.uint8)
    return Examples(values[:, None, None].expand(-1, 4, 4, -1).permute(0, 3, 1, 2), numbers % 10)


def read_numbers(batches):
    pixels = torch.cat([inputs[:, :2, 0, 0] for inputs, _ in batches])
    return (pixels[:, 0] * 255 * 256 + pixels[:, 1] * 255).round().long()


# ---- batches ----


def test_batches_are_a_function_of_seed_and_epoch():
    pipeline = Pipeline(MEAN, STD, 32, ["crop", "flip"], **MIXED)

    def epoch(seed, number):
        return list(Batches(random_examples(70), 16, pipeline, seed=seed).epoch(number))

    first = epoch(3, 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same_batches(first, epoch(3, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same_batches(first, epoch(3, 6)) and not same_batches(first, epoch(4, 5))


def test_each_epoch_is_another_permutation():
    batches = Batches(numbered(1000), 64, UNCHANGED)
    assert len(batches) == 15
    orders = [read_numbers(batches.epoch(number)) for number in range(3)]
    for order in orders:
        assert len(order) == 960 == len(order.unique()) and order.max() < 1000
        assert not torch.equal(order, order.sort().values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    dropped = [set(range(1000)) - set(order.tolist()) for order in orders]
    assert dropped[0] != dropped[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_labels_stay_with_their_images(shuffle):
    for inputs, labels in Batches(numbered(300), 32, UNCHANGED, shuffle=shuffle):
        assert torch.equal(read_numbers([(inputs, labels)]) % 10, labels)


@pytest.mark.parametrize("crop_mode", ["reflect", "zero"])
@pytest.mark.parametrize(
    "transforms", [(), ("crop", "flip"), ("flip", "crop"), ("crop",), ("rand_augment",)]
)
def test_a_batch_is_the_pipeline_of_its_images(transforms, crop_mode):
    pipeline = Pipeline(MEAN, STD, 32, transforms, crop_mode=crop_mode, **MIXED)
    examples = random_examples(40)
    order = torch.randperm(40, generator=seeded(data.derive_seed(6, 1, "permutation")))
    for number, batch in enumerate(Batches(examples, 12, pipeline, seed=6).epoch(1)):
        index = order[number * 12 : number * 12 + 12]
        generator = seeded(data.derive_seed(6, 1, "augment", number))
        expected = pipeline(examples.images[index], examples.labels[index], generator)
        assert same_batches([batch], [expected])


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_can_start_at_any_batch(start):
    batches = Batches(random_examples(70), 16, EVERYTHING, seed=1)
    assert same_batches(batches.epoch(2, start=start), list(batches.epoch(2))[start:])


@pytest.mark.parametrize("pipeline", [EVERYTHING, MIXED_PER_BATCH], ids=["image", "batch"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("batch_size", [12, 13, 25])
def test_ranks_share_the_batches_of_one_process(world_size, batch_size, pipeline):
    examples = random_examples(52)
    expected = Batches(examples, batch_size, pipeline, seed=4).epoch(1)
    ranks = [
        Batches(examples, batch_size, pipeline, seed=4, rank=rank, world_size=world_size).epoch(1)
        for rank in range(world_size)
    ]
    gathered = [tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks, strict=True)]
    assert same_batches(gathered, expected)


@pytest.mark.parametrize(
    "options", [dict(), dict(repeats=2), dict(shuffle=False), dict(rank=1, world_size=2)], ids=str
)
def test_streamed_batches_are_bit_identical(options):
    examples, pipeline = random_examples(52), Pipeline(MEAN, STD, 40, ("crop", "flip"), **MIXED)
    resident, streamed = (
        Batches(examples, 8, pipeline, seed=3, resident=where, **options)
        for where in ("device", "host")
    )
    assert streamed.streamed and streamed.prepared is None and not resident.streamed
    for start in (0, 4):
        batches = list(resident.epoch(2, start=start))
        assert len(batches) == len(resident) - start
        assert same_batches(batches, streamed.epoch(2, start=start))


@pytest.mark.gpu
def test_streamed_batches_are_bit_identical_on_a_gpu():
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"), **MIXED)
    device, host = (
        Batches(random_examples(520), 64, pipeline, seed=3, device="cuda", resident=where)
        for where in ("device", "host")
    )
    for _ in range(5):
        assert same_batches(device.epoch(2), host.epoch(2))


def test_an_unfinished_streamed_epoch_leaves_no_thread():
    batches = Batches(random_examples(50), 8, Pipeline(MEAN, STD, 32), resident="host")
    before = set(threading.enumerate())
    epoch = batches.epoch(0)
    next(epoch), next(epoch)
    assert len(set(threading.enumerate()) - before) == 1
    epoch.close()
    del epoch
    assert not set(threading.enumerate()) - before


def test_images_that_take_a_third_of_the_gpu_are_resident(monkeypatch):
    examples, gpu = random_examples(64), torch.device("cuda")
    padded, _ = Pipeline(MEAN, STD, 32, ("crop",)).prepare(examples.images)
    assert padded.nbytes <= residency.resident_bytes(examples, gpu, "device") < 2 * examples.nbytes
    monkeypatch.setattr(residency, "available", lambda device: 3 * examples.nbytes)
    assert residency.resident_bytes(examples, gpu) >= padded.nbytes
    assert residency.resident_bytes(examples, gpu, "host") == 0
    assert residency.resident_bytes(examples, torch.device("cpu")) == 0
    monkeypatch.setattr(residency, "available", lambda device: 3 * examples.nbytes - 1)
    assert residency.resident_bytes(examples, gpu) == 0


def test_images_are_sent_to_mps_in_batches():
    examples, mps = random_examples(4), torch.device("mps")
    assert residency.should_stream(examples, mps, "auto")
    assert not residency.should_stream(examples, mps, "device")


def test_images_that_do_not_fit_the_device_are_said_to(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(residency, "copy_to_device", fail)
    with refused("cpu is too small for the images: add --resident host"):
        Batches(random_examples(4), 2, UNCHANGED)


def test_repeats_augment_each_image_of_a_batch_anew():
    once, thrice = (Batches(numbered(60), 12, UNCHANGED, seed=1, repeats=n) for n in (1, 3))
    assert len(once) == len(thrice) == 5
    numbers = read_numbers(thrice.epoch(2)).view(5, 12).tolist()
    for batch in numbers:
        assert all(batch.count(n) == 3 for n in batch)
        assert all(a != b for a, b in zip(batch[::2], batch[1::2]))  # pairs that are mixed
    assert len(set(sum(numbers, []))) == 20
    cropped = Batches(random_examples(60), 12, Pipeline(MEAN, STD, 32, ("crop",)), repeats=3)
    inputs, _ = next(cropped.epoch(0))
    assert not torch.equal(inputs[:4], inputs[4:8])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_counts_every_image_once(world_size):
    # The last batch has one image: a rank may have none.
    options = dict(shuffle=False, world_size=world_size)
    ranks = [
        Batches(numbered(10001), 500, UNCHANGED, rank=rank, **options) for rank in range(world_size)
    ]
    assert len(ranks[0]) == 21
    seen = torch.cat([read_numbers(batches) for batches in ranks])
    assert torch.equal(seen.sort().values if world_size > 1 else seen, torch.arange(10001))


def test_ranks_share_an_evaluation_equally():
    options = dict(shuffle=False, world_size=3)
    for images in (1, 3):  # of a rank
        ranks = [Batches(numbered(45), 3 * images, UNCHANGED, rank=r, **options) for r in range(3)]
        assert {len(y) for batches in ranks for _, y in batches} == {images}


@pytest.mark.parametrize("total", [1, 2, 3, 7, 12, 13, 128, 500])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_rank_rows_start_even_and_cover_the_batch(total, world_size):
    runs = [range(total)[data.rank_rows(total, rank, world_size)] for rank in range(world_size)]
    assert [row for run in runs for row in run] == list(range(total))
    assert all(run.start % 2 == 0 for run in runs if run)
    sizes = [len(run) + len(run) % 2 for run in runs]
    assert max(sizes) - min(sizes) <= 2


def test_unsuitable_batch_sizes_are_refused():
    examples = random_examples(50)
    with refused("--batch-size 51 is larger than the training set (50 images)"):
        Batches(examples, 51, UNCHANGED)
    with refused("--batch-size 5 is too small for 3 processes"):
        Batches(examples, 5, UNCHANGED, world_size=3)
    lengths = {(50, 1): 1, (6, 3): 8, (1, 1): 50}
    for (size, world_size), length in lengths.items():
        assert len(Batches(examples, size, UNCHANGED, world_size=world_size)) == length
    assert len(Batches(examples, 51, UNCHANGED, shuffle=False)) == 1


def test_every_purpose_has_its_own_seed():
    keys = itertools.product(range(10), range(10), ("permutation", "augment"), range(5))
    seeds = {data.derive_seed(*key) for key in keys}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "transforms, size, exact",
    [
        (("crop", "flip"), 32, True),
        ((), 32, True),
        (tuple(TRANSFORMS), 32, False),
        (("flip",), 48, False),
    ],
    ids=str,
)
def test_batches_on_cuda_are_those_on_the_cpu(transforms, size, exact):
    pipeline = Pipeline(MEAN, STD, size, transforms, **MIXED)
    on_cpu, on_cuda = (
        Batches(random_examples(256), 64, pipeline, device=device, seed=2)
        for device in ("cpu", "cuda")
    )
    for (inputs, targets), (others, shares) in zip(on_cpu.epoch(0), on_cuda.epoch(0)):
        torch.testing.assert_close(shares.cpu(), targets, atol=1e-5, rtol=0)
        if exact:
            torch.testing.assert_close(others.cpu(), inputs, atol=1e-5, rtol=0)
        else:  # resampled pixels may be rounded otherwise; three levels are 0.05
            assert (others.cpu() - inputs).abs().mean() < 0.05


# ---- subsets and statistics ----

EVEN = torch.arange(10001) % 10
UNEVEN = torch.multinomial(
    torch.tensor([50.0, 20, 10, 0, 5, 2, 1]), 10001, True, generator=seeded(0)
)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 3333, 10000, 10001])
@pytest.mark.parametrize("labels", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_stratified_gives_every_class_its_share(labels, count):
    chosen = splits.stratified(labels, count)
    assert len(chosen) == count == len(chosen.unique())
    assert torch.equal(chosen, chosen.sort().values)
    shares = torch.bincount(labels).double() * count / len(labels)
    assert ((torch.bincount(labels[chosen], minlength=len(shares)) - shares).abs() < 1).all()
    torch.manual_seed(1)
    assert torch.equal(chosen, splits.stratified(labels, count))
    if 0 < count < 10001:
        assert not torch.equal(chosen, splits.stratified(labels, count, seed=1))


def test_a_smaller_stratified_choice_is_part_of_a_larger_one():
    few, many = (set(splits.stratified(EVEN[:10000], count).tolist()) for count in (500, 2000))
    assert few < many


@pytest.fixture
def numbered_shapes(monkeypatch):
    """The dataset "shapes" is 10,001 numbered training images and 2,001 test images."""
    split = Split("shapes", numbered(10001), None, numbered(2001), tuple("abcdefghij"))
    monkeypatch.setattr(shapes, "load_shapes", lambda: split)


def numbers_of(part):
    return read_numbers([(part.images / 255, None)]).tolist()


def test_held_out_images_are_the_same_each_time(numbered_shapes):
    split = data.load("shapes", val_size=1000)
    train, val = numbers_of(split.train), numbers_of(split.val)
    assert len(val) == 1000 and sorted(train + val) == list(range(10001))
    assert torch.bincount(split.val.labels).tolist() == [100] * 10
    torch.manual_seed(5)
    assert numbers_of(data.load("shapes", val_size=1000).val) == val
    assert numbers_of(split.test) == list(range(2001))


def test_without_val_size_everything_trains(numbered_shapes):
    split = data.load("shapes")
    assert split.val is None and numbers_of(split.train) == list(range(10001))


def test_limits_are_stratified_and_apply_before_val_size(numbered_shapes):
    split = data.load("shapes", limit_train=500, limit_test=333, val_size=100)
    assert (len(split.train), len(split.val), len(split.test)) == (400, 100, 333)
    for part in (split.train, split.val, split.test):
        counts = torch.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= 1
    assert not set(numbers_of(split.train)) & set(numbers_of(split.val))
    assert channels_last(split.train.images)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(limit_train=10002), "--limit-train 10002 is more than the 10001 images"),
        (dict(limit_test=2002), "--limit-test 2002 is more than the 2001 images"),
        (dict(val_size=9992), "--val-size 9992 must be 10 to 9991"),
        (dict(limit_train=50, val_size=41), "--val-size 41 must be 10 to 40: 50 training images"),
        (dict(val_size=9), "--val-size 9 must be 10 to 9991"),
        (dict(limit_train=12, val_size=10), "--val-size 10: 12 training images are fewer than two"),
    ],
    ids=str,
)
def test_too_large_and_too_small_subsets_are_refused(numbered_shapes, options, message):
    with refused(message) as caught:
        data.load("shapes", **options)
    assert caught.value.status == 2


def test_an_unknown_dataset_is_refused():
    with refused("unknown dataset 'mnist'", "cifar10, cifar100, folder, shapes"):
        data.load("mnist")


def test_statistics_are_those_of_the_training_images(numbered_shapes):
    split = data.load("shapes", val_size=3000)
    pixels = split.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(split.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(split.std[:2], pixels.std((0, 2, 3))[:2], rtol=1e-12)
    assert 0 < split.std[2] < 1e-4  # a channel of one value can be divided by its std


@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_statistics_do_not_depend_on_the_block(block, monkeypatch):
    monkeypatch.setattr(statistics, "PIXELS_PER_BLOCK", block)
    examples = random_examples(37, size=20)
    mean, std = data.channel_statistics(examples)
    pixels = examples.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)
