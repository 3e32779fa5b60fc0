"""Batches depend on seed, epoch and number alone; splits have their shares."""

import itertools
import threading

import numpy as np
import pytest
import torch
from conftest import refused

import data
from data import Batches
from datasets import augment, shapes
from datasets.augment import Pipeline
from datasets.examples import Examples, Split

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
AUGMENTED = dict(
    num_classes=10, cutout_size=9, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.7
)


def examples(count, classes=10, size=32, seed=0):
    """Random pictures and labels, every class as often as the others to within one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator
    ).permute(0, 3, 1, 2)
    return Examples(
        images, (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
    )


def numbered(count):
    """Pictures that tell which one they are: all pixels of the first two channels spell the number."""
    numbers = torch.arange(count)
    values = torch.stack([numbers // 256, numbers % 256, numbers * 0], dim=1).to(torch.uint8)
    return Examples(values[:, None, None].expand(-1, 4, 4, -1).permute(0, 3, 1, 2), numbers % 10)


def read_numbers(batches):
    pixels = torch.cat([inputs[:, :2, 0, 0] for inputs, _ in batches])
    return (pixels[:, 0] * 255 * 256 + pixels[:, 1] * 255).round().long()


PLAIN = Pipeline((0.0,) * 3, (1.0,) * 3, 4)


def same_batches(ours, others):
    return len(ours) == len(others) and all(
        torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(ours, others)
    )


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_epoch():
    pipeline = Pipeline(MEAN, STD, 32, ["crop", "flip"], **AUGMENTED)

    def epoch(seed, number):
        return list(Batches(examples(70), 16, pipeline, seed=seed).epoch(number))

    torch.manual_seed(1)
    first = epoch(3, 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same_batches(first, epoch(3, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert not same_batches(first, epoch(3, 6)) and not same_batches(first, epoch(4, 5))


def test_another_epoch_is_another_permutation_and_an_image_comes_once():
    batches = Batches(numbered(1000), 64, PLAIN)
    assert len(batches) == 15
    orders = [read_numbers(batches.epoch(number)) for number in range(3)]
    for order in orders:
        assert (
            len(order) == 960 == len(order.unique()) and order.max() < 1000
        )  # the incomplete batch is left out
        assert not torch.equal(order, order.sort().values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    left_out = [set(range(1000)) - set(order.tolist()) for order in orders]
    assert left_out[0] != left_out[1]


def test_labels_stay_with_their_images():
    for shuffle in (True, False):
        for inputs, labels in Batches(numbered(300), 32, PLAIN, shuffle=shuffle):
            assert torch.equal(read_numbers([(inputs, labels)]) % 10, labels)


@pytest.mark.parametrize("crop_mode", ["reflect", "zero"])
@pytest.mark.parametrize(
    "transforms", [(), ("crop", "flip"), ("flip", "crop"), ("crop",), ("rand_augment",)]
)
def test_a_batch_is_what_the_pipeline_makes_of_its_images(transforms, crop_mode):
    pipeline, all_of_them = (
        Pipeline(MEAN, STD, 32, transforms, crop_mode=crop_mode, **AUGMENTED),
        examples(40),
    )
    order = torch.randperm(
        40, generator=torch.Generator().manual_seed(data.derive_seed(6, 1, "permutation"))
    )
    for number, batch in enumerate(Batches(all_of_them, 12, pipeline, seed=6).epoch(1)):
        index = order[number * 12 : number * 12 + 12]
        generator = torch.Generator().manual_seed(data.derive_seed(6, 1, "augment", number))
        assert same_batches(
            [batch], [pipeline(all_of_them.images[index], all_of_them.labels[index], generator)]
        )


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_goes_on_from_any_batch(start):
    batches = Batches(
        examples(70), 16, Pipeline(MEAN, STD, 32, augment.TRANSFORMS, **AUGMENTED), seed=1
    )
    assert same_batches(list(batches.epoch(2, start=start)), list(batches.epoch(2))[start:])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_size", [12, 13, 25])
def test_parts_of_the_ranks_make_the_batch_of_one(world, batch_size):
    pipeline = Pipeline(MEAN, STD, 40, augment.TRANSFORMS, **AUGMENTED)
    whole = Batches(examples(52), batch_size, pipeline, seed=4).epoch(1)
    parts = [
        Batches(examples(52), batch_size, pipeline, seed=4, rank=rank, world=world).epoch(1)
        for rank in range(world)
    ]
    for (inputs, targets), *of_ranks in itertools.zip_longest(whole, *parts):
        assert torch.equal(torch.cat([x for x, _ in of_ranks]), inputs)
        assert torch.equal(torch.cat([y for _, y in of_ranks]), targets)


@pytest.mark.parametrize(
    "options", [dict(), dict(repeats=2), dict(shuffle=False), dict(rank=1, world=2)], ids=str
)
def test_pictures_on_the_host_give_the_same_bits(options):
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"), **AUGMENTED)
    device, host = (
        Batches(examples(52), 8, pipeline, seed=3, resident=where, **options)
        for where in ("device", "host")
    )
    assert host.streamed and not device.streamed and host.prepared is None
    for start in (0, 4):
        batches = list(device.epoch(2, start=start))
        assert len(batches) == len(device) - start and same_batches(
            batches, list(host.epoch(2, start=start))
        )


def test_images_lie_on_a_gpu_with_their_border_and_the_copy_it_is_made_of(monkeypatch):
    on_host, gpu = examples(64), torch.device("cuda")
    made, padding = Pipeline(MEAN, STD, 32, ("crop",)).prepare(on_host.images)
    assert (
        padding
        and on_host.nbytes + made.nbytes < 3 * on_host.nbytes
        and made.nbytes < 1.6 * on_host.nbytes
    )
    monkeypatch.setattr(data, "available", lambda device: 3 * on_host.nbytes)
    assert data._fits(on_host, gpu) and data.resident_bytes(on_host, gpu) >= made.nbytes
    assert (
        data.resident_bytes(on_host, gpu, "host") == 0
        and data.resident_bytes(on_host, torch.device("cpu")) == 0
    )
    monkeypatch.setattr(data, "available", lambda device: 3 * on_host.nbytes - 1)
    assert not data._fits(on_host, gpu) and data.resident_bytes(on_host, gpu) == 0
    assert data.resident_bytes(on_host, gpu, "device") > 0


def test_an_epoch_from_the_host_may_be_left_in_the_middle():
    batches = Batches(examples(50), 8, Pipeline(MEAN, STD, 32), resident="host")
    before = threading.active_count()
    epoch = batches.epoch(0)
    next(epoch), next(epoch)
    assert threading.active_count() == before + 1
    epoch.close()
    del epoch
    assert threading.active_count() == before


@pytest.mark.gpu
def test_pictures_on_the_host_give_the_same_bits_on_a_gpu():
    pipeline = Pipeline(MEAN, STD, 40, ("crop", "flip"), **AUGMENTED)
    device, host = (
        Batches(examples(520), 64, pipeline, seed=3, device="cuda", resident=where)
        for where in ("device", "host")
    )
    for _ in range(5):
        assert same_batches(list(device.epoch(2)), list(host.epoch(2)))


def test_repeated_augmentation_shows_each_image_of_a_batch_several_times():
    once, thrice = (Batches(numbered(60), 12, PLAIN, seed=1, repeats=repeats) for repeats in (1, 3))
    assert len(once) == len(thrice) == 5
    seen = set()
    for inputs, _ in thrice.epoch(2):
        numbers = read_numbers([(inputs, None)]).tolist()
        assert len(numbers) == 12 and all(numbers.count(n) == 3 for n in numbers)
        assert all(a != b for a, b in zip(numbers[::2], numbers[1::2]))  # pairs that are mixed
        assert not seen & set(numbers)
        seen |= set(numbers)
    cropped = Batches(examples(60), 12, Pipeline(MEAN, STD, 32, ("crop",)), seed=1, repeats=3)
    inputs, _ = next(cropped.epoch(0))
    assert not torch.equal(inputs[:4], inputs[4:8])  # augmented anew


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_counts_every_image_once(world):
    ranks = [
        Batches(numbered(10001), 500, PLAIN, shuffle=False, rank=rank, world=world)
        for rank in range(world)
    ]
    assert len(ranks[0]) == 21
    seen = torch.cat(
        [read_numbers(batches) for batches in ranks]
    )  # the last batch has one image: a rank may have none
    assert torch.equal(seen.sort().values, torch.arange(10001))
    if world == 1:
        assert torch.equal(seen, torch.arange(10001))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 12, 13, 128, 500])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rank_rows_are_even_and_cover_the_batch(total, world):
    runs = [range(total)[data.rank_rows(total, rank, world)] for rank in range(world)]
    assert [row for run in runs for row in run] == list(range(total))
    assert all(run.start % 2 == 0 for run in runs if run)  # so that neighbours stay together
    sizes = [len(run) + len(run) % 2 for run in runs]
    assert max(sizes) - min(sizes) <= 2


def test_sizes_that_do_not_fit_are_refused():
    with refused("--batch-size 51 is larger than the training set (50 images)"):
        Batches(examples(50), 51, PLAIN)
    assert len(Batches(examples(50), 50, PLAIN)) == 1
    assert len(Batches(examples(50), 51, PLAIN, shuffle=False)) == 1
    with refused("--batch-size 5 is too small for 3 processes"):
        Batches(examples(50), 5, PLAIN, world=3)
    assert (
        len(Batches(examples(50), 6, PLAIN, world=3)) == 8
        and len(Batches(examples(50), 1, PLAIN)) == 50
    )


def test_inputs_lie_as_channels_last_whatever_is_switched_on():
    for options in ({}, AUGMENTED):
        for transforms in ((), augment.TRANSFORMS):
            inputs, _ = next(
                Batches(examples(16), 16, Pipeline(MEAN, STD, 32, transforms, **options)).epoch(0)
            )
            assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_every_purpose_has_a_seed_of_its_own():
    keys = itertools.product(range(10), range(10), ("permutation", "augment"), range(5))
    seeds = {data.derive_seed(*key) for key in keys}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.gpu
def test_batches_on_cuda_are_those_on_the_cpu():
    """Exactly moved and blended pixels to 1e-5; others may be rounded to a neighbouring level, or sampled next door."""
    for transforms, size in (
        (["crop", "flip"], 32),
        ([], 32),
        (list(augment.TRANSFORMS), 32),
        (["flip"], 48),
    ):
        pipeline = Pipeline(MEAN, STD, size, transforms, **AUGMENTED)
        on_cpu, on_cuda = (
            Batches(examples(256), 64, pipeline, device=device, seed=2)
            for device in ("cpu", "cuda")
        )
        for (inputs, targets), (others, shares) in zip(on_cpu.epoch(0), on_cuda.epoch(0)):
            torch.testing.assert_close(shares.cpu(), targets, atol=1e-5, rtol=0)
            if len(transforms) <= 2 and size == 32:
                torch.testing.assert_close(others.cpu(), inputs, atol=1e-5, rtol=0)
            else:
                assert (others.cpu() - inputs).abs().mean() < 0.05  # three levels are 0.05


# ---- splits ------------------------------------------------------------------------------------------------------------


def uneven_labels(count, seed=0):
    """Labels of seven classes, the first about fifty times as frequent as the last; class 3 has no example."""
    weights = torch.tensor([50.0, 20, 10, 0, 5, 2, 1])
    return torch.multinomial(
        weights, count, replacement=True, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 3333, 10000, 10001])
@pytest.mark.parametrize(
    "labels", [torch.arange(10001) % 10, uneven_labels(10001)], ids=["even", "uneven"]
)
def test_stratified_gives_every_class_its_share(labels, count):
    chosen = data.stratified(labels, count)
    assert len(chosen) == count == len(chosen.unique()) and torch.equal(
        chosen, chosen.sort().values
    )
    shares = torch.bincount(labels).double() * count / len(labels)
    assert ((torch.bincount(labels[chosen], minlength=len(shares)) - shares).abs() < 1).all()
    torch.manual_seed(1)
    assert torch.equal(chosen, data.stratified(labels, count))
    if 0 < count < 10001:
        assert not torch.equal(chosen, data.stratified(labels, count, seed=1))


def test_a_smaller_choice_is_part_of_a_larger_one_of_even_classes():
    labels = torch.arange(10000) % 10
    few, many = (set(data.stratified(labels, count).tolist()) for count in (500, 2000))
    assert few < many


@pytest.fixture
def odd_split(monkeypatch):
    """The dataset "shapes" stands for 10,001 numbered training pictures and 2,001 test pictures."""
    names = tuple("abcdefghij")
    split = Split("shapes", numbered(10001), None, numbered(2001), names, (), ())
    monkeypatch.setattr(shapes, "load_shapes", lambda: split)
    return split


def numbers_of(part):
    return read_numbers([((part.images / 255), None)]).tolist()


def test_held_out_images_are_no_training_images_and_the_same_each_time(odd_split):
    split = data.load("shapes", val_size=1000)
    train, val = numbers_of(split.train), numbers_of(split.val)
    assert len(val) == 1000 and len(train) == 9001
    assert sorted(train + val) == list(range(10001))
    assert torch.bincount(split.val.labels).tolist() == [100] * 10
    torch.manual_seed(5)
    assert numbers_of(data.load("shapes", val_size=1000).val) == val
    assert numbers_of(split.test) == list(range(2001))


def test_without_a_held_out_part_everything_trains(odd_split):
    split = data.load("shapes")
    assert split.val is None and numbers_of(split.train) == list(range(10001))


def test_limits_keep_shares_and_leave_the_other_part_alone(odd_split):
    split = data.load("shapes", limit_train=500, limit_test=333, val_size=100)
    assert (len(split.train), len(split.val), len(split.test)) == (400, 100, 333)
    for part in (split.train, split.val, split.test):
        counts = torch.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= 1
    assert not set(numbers_of(split.train)) & set(numbers_of(split.val))
    assert split.train.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(limit_train=10002), "--limit-train 10002 asks for too much: shapes has 10001"),
        (dict(limit_test=2002), "--limit-test 2002 asks for too much: shapes has 2001"),
        (dict(val_size=9992), "--val-size 9992 asks for too much"),
        (
            dict(limit_train=50, val_size=41),
            "--val-size 41 asks for too much: shapes has 50 examples here, and 10 must be left",
        ),
        (dict(val_size=9), "--val-size 9 is less than an image of each of the 10 classes"),
    ],
)
def test_asking_for_more_than_there_is_is_refused(odd_split, options, said):
    with refused(said) as caught:
        data.load("shapes", **options)
    assert caught.value.status == 2


def test_an_unknown_dataset_is_refused():
    with refused("unknown dataset 'mnist'", "cifar10, cifar100, folder, shapes"):
        data.load("mnist")


def test_statistics_are_those_of_the_training_pictures_alone(odd_split):
    split = data.load("shapes", val_size=3000)
    pixels = split.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(split.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(split.std[:2], pixels.std((0, 2, 3))[:2], rtol=1e-12)
    assert 0 < split.std[2] < 1e-4  # a channel without contrast can still be divided by


@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_statistics_do_not_depend_on_the_block(block):
    images = examples(37, size=20).images
    mean, std = data.channel_statistics(images, block)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)
