"""Batches depend on seed, epoch and number alone; splits have their shares; archives and folders are read or refused."""

import hashlib
import io
import itertools
import os
import pickle
import re
import socket
import struct
import tarfile
import threading
import time
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import augment
import checkpoint
import data
from augment import Pipeline
from data import Batches, Examples, Split
from errors import UserError

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
AUGMENTED = dict(num_classes=10, cutout_size=9, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.7)


def examples(count, classes=10, size=32, seed=0):
    """Random pictures and labels, every class as often as the others to within one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    return Examples(images, (torch.arange(count) % classes)[torch.randperm(count, generator=generator)])


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
    return len(ours) == len(others) and all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(ours, others))


def refused(*parts):
    """A UserError of one line that says all of these."""
    return pytest.raises(UserError, match=rf"\A{'.*'.join(re.escape(str(part)) for part in parts)}[^\n]*\Z")


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
        assert len(order) == 960 == len(order.unique()) and order.max() < 1000  # the incomplete batch is left out
        assert not torch.equal(order, order.sort().values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    left_out = [set(range(1000)) - set(order.tolist()) for order in orders]
    assert left_out[0] != left_out[1]


def test_labels_stay_with_their_images():
    for shuffle in (True, False):
        for inputs, labels in Batches(numbered(300), 32, PLAIN, shuffle=shuffle):
            assert torch.equal(read_numbers([(inputs, labels)]) % 10, labels)


@pytest.mark.parametrize("crop_mode", ["reflect", "zero"])
@pytest.mark.parametrize("transforms", [(), ("crop", "flip"), ("flip", "crop"), ("crop",), ("rand_augment",)])
def test_a_batch_is_what_the_pipeline_makes_of_its_images(transforms, crop_mode):
    pipeline, all_of_them = Pipeline(MEAN, STD, 32, transforms, crop_mode=crop_mode, **AUGMENTED), examples(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(data.derive_seed(6, 1, "permutation")))
    for number, batch in enumerate(Batches(all_of_them, 12, pipeline, seed=6).epoch(1)):
        index = order[number * 12 : number * 12 + 12]
        generator = torch.Generator().manual_seed(data.derive_seed(6, 1, "augment", number))
        assert same_batches([batch], [pipeline(all_of_them.images[index], all_of_them.labels[index], generator)])


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_goes_on_from_any_batch(start):
    batches = Batches(examples(70), 16, Pipeline(MEAN, STD, 32, augment.TRANSFORMS, **AUGMENTED), seed=1)
    assert same_batches(list(batches.epoch(2, start=start)), list(batches.epoch(2))[start:])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_size", [12, 13, 25])
def test_parts_of_the_ranks_make_the_batch_of_one(world, batch_size):
    pipeline = Pipeline(MEAN, STD, 40, augment.TRANSFORMS, **AUGMENTED)
    whole = Batches(examples(52), batch_size, pipeline, seed=4).epoch(1)
    parts = [Batches(examples(52), batch_size, pipeline, seed=4, rank=rank, world=world).epoch(1) for rank in range(world)]
    for (inputs, targets), *of_ranks in itertools.zip_longest(whole, *parts):
        assert torch.equal(torch.cat([x for x, _ in of_ranks]), inputs)
        assert torch.equal(torch.cat([y for _, y in of_ranks]), targets)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_counts_every_image_once(world):
    ranks = [Batches(numbered(10001), 500, PLAIN, shuffle=False, rank=rank, world=world) for rank in range(world)]
    assert len(ranks[0]) == 21
    seen = torch.cat([read_numbers(batches) for batches in ranks])  # the last batch has one image: a rank may have none
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
    assert len(Batches(examples(50), 6, PLAIN, world=3)) == 8 and len(Batches(examples(50), 1, PLAIN)) == 50


def test_inputs_lie_as_channels_last_whatever_is_switched_on():
    for options in ({}, AUGMENTED):
        for transforms in ((), augment.TRANSFORMS):
            inputs, _ = next(Batches(examples(16), 16, Pipeline(MEAN, STD, 32, transforms, **options)).epoch(0))
            assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_every_purpose_has_a_seed_of_its_own():
    keys = itertools.product(range(10), range(10), ("permutation", "augment"), range(5))
    seeds = {data.derive_seed(*key) for key in keys}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.gpu
def test_batches_on_cuda_are_those_on_the_cpu():
    """Exactly moved and blended pixels to 1e-5; others may be rounded to a neighbouring level, or sampled next door."""
    for transforms, size in ((["crop", "flip"], 32), ([], 32), (list(augment.TRANSFORMS), 32), (["flip"], 48)):
        pipeline = Pipeline(MEAN, STD, size, transforms, **AUGMENTED)
        on_cpu, on_cuda = (Batches(examples(256), 64, pipeline, device=device, seed=2) for device in ("cpu", "cuda"))
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
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 3333, 10000, 10001])
@pytest.mark.parametrize("labels", [torch.arange(10001) % 10, uneven_labels(10001)], ids=["even", "uneven"])
def test_stratified_gives_every_class_its_share(labels, count):
    chosen = data.stratified(labels, count)
    assert len(chosen) == count == len(chosen.unique()) and torch.equal(chosen, chosen.sort().values)
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
    monkeypatch.setattr(data, "_load_shapes", lambda: split)
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


@pytest.mark.parametrize("options, said", [
    (dict(limit_train=10002), "--limit-train 10002 asks for too much: shapes has 10001"),
    (dict(limit_test=2002), "--limit-test 2002 asks for too much: shapes has 2001"),
    (dict(val_size=9992), "--val-size 9992 asks for too much"),
    (dict(limit_train=50, val_size=41), "--val-size 41 asks for too much: shapes has 50"),
])  # fmt: skip
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


# ---- shapes ------------------------------------------------------------------------------------------------------------


def test_shapes_are_made_of_their_seed():
    torch.manual_seed(0)
    first, before = data.make_shapes(300, seed=1), torch.get_rng_state()
    again, other = data.make_shapes(300, seed=1), data.make_shapes(300, seed=2)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.images.dtype == torch.uint8 and first.images.shape == (300, 3, 32, 32)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.bincount(first.labels).tolist() == [30] * 10
    assert len(first.images.flatten(1).unique(dim=0)) == 300


def test_shapes_are_not_trivial_to_tell_apart():
    train, test = data.make_shapes(2000, seed=1), data.make_shapes(1000, seed=2)

    def features(part):
        return part.images.flatten(1).float()

    means = torch.stack([features(train)[train.labels == label].mean(0) for label in range(10)])
    by_mean = torch.cdist(features(test), means).argmin(1)
    by_neighbour = train.labels[torch.cdist(features(test), features(train)).argmin(1)]
    for guess in (by_mean, by_neighbour):
        assert (guess == test.labels).float().mean() < 0.45


def test_shapes_load_with_statistics(monkeypatch):
    small = data._load_shapes
    monkeypatch.setattr(data, "_load_shapes", lambda: small(train=500, test=200))
    split = data.load("shapes")
    assert (split.name, split.num_classes, len(split.train), len(split.test)) == ("shapes", 10, 500, 200)
    assert all(0.2 < mean < 0.8 for mean in split.mean) and all(0.05 < std < 0.4 for std in split.std)
    train, test = (part.images.flatten(1) for part in (split.train, split.test))
    assert len(torch.cat([train, test]).unique(dim=0)) == 700  # no test picture among the training pictures


# ---- CIFAR archives ----------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did for the published archives: protocol 2, and every string one of bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}


def batch_of(name, count, seed):
    """A member's contents: pictures (count, 3072) as planes of red, green, blue, and their labels."""
    rng = np.random.default_rng(seed)
    contents = {"batch_label": "a batch", "filenames": [f"picture_{i}.png" for i in range(count)],
                "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8)}  # fmt: skip
    classes = data.ARCHIVES[name].num_classes
    contents[LABELS[name]] = [int(label) for label in rng.integers(0, classes, count)]
    if name == "cifar100":
        contents["coarse_labels"] = [int(label) for label in rng.integers(0, 20, count)]
    return contents


def archive_contents(name):
    archive = data.ARCHIVES[name]
    members = {member: batch_of(name, 7 + i, i) for i, member in enumerate(archive.train + archive.test)}
    members[archive.meta] = {archive.names_key: [f"class_{i}" for i in range(archive.num_classes)], "num_vis": 3072}
    if name == "cifar100":
        members[archive.meta]["coarse_label_names"] = [f"coarse_{i}" for i in range(20)]
    return members


def write_archive(path, folder, members, extra=()):
    """A .tar.gz of a folder's members: values, or bytes as they are; extra: (TarInfo, bytes) to begin with."""
    with tarfile.open(path, "w:gz") as tar:
        for info, raw in extra:
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        for member, value in members.items():
            raw = value if isinstance(value, bytes) else pickled(value)
            info = tarfile.TarInfo(f"{folder}/{member}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar(name, edit=…, extra=…) writes a small archive, enters its digest, and returns (path, contents)."""

    def make(name="cifar10", edit=None, extra=(), directory=tmp_path / "data"):
        contents, archive = archive_contents(name), data.ARCHIVES[name]
        if edit:
            edit(contents)
        directory.mkdir(exist_ok=True)
        path = directory / archive.file
        write_archive(path, archive.folder, contents, extra)
        publish(monkeypatch, name, path.read_bytes())
        return path, contents

    return make


def publish(monkeypatch, name, raw):
    """Makes `raw` the published archive."""
    digest = hashlib.md5(raw).hexdigest()
    monkeypatch.setitem(data.ARCHIVES, name, data.ARCHIVES[name]._replace(size=len(raw), md5=digest))


def assert_holds(part, batches, label_key):
    """Pixel for pixel: byte c * 1024 + y * 32 + x of a row is channel c of the picture at (y, x)."""
    rows = np.concatenate([batch["data"] for batch in batches])
    assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
    assert part.images.is_contiguous(memory_format=torch.channels_last)
    for row, image in zip(rows, part.images, strict=True):
        for channel, y, x in ((0, 0, 0), (0, 0, 5), (1, 0, 0), (1, 31, 30), (2, 7, 0), (2, 31, 31)):
            assert image[channel, y, x] == row[channel * 1024 + y * 32 + x]
    assert np.array_equal(part.images.reshape(len(rows), -1).numpy(), rows)
    assert part.labels.tolist() == [label for batch in batches for label in batch[label_key]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_is_read_as_it_was_published(cifar, name):
    path, contents = cifar(name)
    split = data.load(name, path.parent)
    archive = data.ARCHIVES[name]
    assert_holds(split.train, [contents[member] for member in archive.train], LABELS[name])
    assert_holds(split.test, [contents[member] for member in archive.test], LABELS[name])
    assert split.classes == tuple(f"class_{i}" for i in range(archive.num_classes)) and split.name == name
    assert (split.mean, split.std) == (archive.mean, archive.std) and split.val is None
    assert os.listdir(path.parent) == [path.name]  # nothing is unpacked


def test_pickles_of_python_3_are_read_too(cifar):
    def edit(contents):
        for member, value in contents.items():
            contents[member] = pickle.dumps(value, protocol=4)

    path, _ = cifar(edit=edit)
    assert_holds(data.load("cifar10", path.parent).test, [archive_contents("cifar10")["test_batch"]], "labels")


def test_a_wrong_digest_is_refused_and_nothing_is_opened(cifar, monkeypatch):
    path, _ = cifar()
    right = data.ARCHIVES["cifar10"].md5
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    monkeypatch.setattr(tarfile, "open", None)
    with refused(f"{path} is not the published cifar10 archive: md5 ", f"not {right}", "delete it"):
        data.load("cifar10", path.parent)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9])
def test_a_truncated_archive_is_refused(cifar, monkeypatch, keep):
    path, _ = cifar()
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else keep])
    with refused(f"{path} is not the published cifar10 archive", "bytes, not"):
        data.load("cifar10", path.parent)
    publish(monkeypatch, "cifar10", path.read_bytes())  # even where the digest fits
    with refused(f"{path} can't be read as the cifar10 archive"):
        data.load("cifar10", path.parent)


def remove(member):
    return lambda contents: contents.pop(member)


def put(member, key, value):
    return lambda contents: contents[member].update({key: value})


def replace_member(member, value):
    return lambda contents: contents.update({member: value})


@pytest.mark.parametrize("edit, said", [
    (remove("test_batch"), "it lacks test_batch"),
    (remove("batches.meta"), "it lacks batches.meta"),
    (put("data_batch_2", "labels", [0, 1, 2, 3, 4, 5, 6, 10]), "labels must be 0…9"),
    (put("data_batch_2", "labels", [0, 1, 2, 3, 4, 5, 6, -1]), "labels must be 0…9"),
    (put("data_batch_2", "labels", [0, 1, 2, 3, 4, 5, 6, 2**70]), "OverflowError"),
    (put("data_batch_2", "labels", [0] * 7), "data_batch_2 has 8 pictures and 7 labels"),
    (put("data_batch_2", "labels", None), "TypeError"),
    (put("data_batch_2", "data", np.zeros((8, 3071), np.uint8)), "data_batch_2 holds uint8 (8, 3071)"),
    (put("data_batch_2", "data", np.zeros((8, 3072), np.float32)), "data_batch_2 holds float32"),
    (put("batches.meta", "label_names", ["a", "b"]), "2 class names"),
    (replace_member("test_batch", {"data": 1}), "labels"),
    (replace_member("test_batch", [1, 2]), "TypeError"),
    (replace_member("test_batch", b"no pickle"), "test_batch"),
    (replace_member("test_batch", b""), "EOFError"),
    (replace_member("test_batch", pickled({"labels": [0]})[:-9]), "truncated"),
    (replace_member("test_batch", b"\x80\x02c_codecs\nencode\nU\x01aU\x06nosuch\x86R."), "LookupError"),
])  # fmt: skip
def test_an_archive_with_other_contents_is_refused(cifar, edit, said):
    path, _ = cifar(edit=edit)
    with refused(f"{path} can't be read as the cifar10 archive (", *([said] if said != "test_batch" else [])):
        data.load("cifar10", path.parent)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("info", [
    special("../x", tarfile.REGTYPE),
    special("cifar-10-batches-py/../../x", tarfile.REGTYPE),
    special("/tmp/x", tarfile.REGTYPE),
    special("cifar-10-batches-py/x", tarfile.SYMTYPE, "/etc/passwd"),
    special("cifar-10-batches-py/test_batch", tarfile.SYMTYPE, "../../x"),
    special("cifar-10-batches-py/x", tarfile.LNKTYPE, "../x"),
    special("cifar-10-batches-py/x", tarfile.CHRTYPE),
    special("cifar-10-batches-py/x", tarfile.BLKTYPE),
    special("cifar-10-batches-py/x", tarfile.FIFOTYPE),
], ids=lambda info: f"{info.name} {info.type.decode()}")  # fmt: skip
def test_a_hostile_member_is_refused_and_nothing_is_written(cifar, tmp_path, info):
    path, _ = cifar(extra=[(info, b"")])
    before = sorted(tmp_path.rglob("*"))
    with refused(f"{path} can't be read", f"a member {info.name!r} that is no plain file below it"):
        data.load("cifar10", path.parent)
    assert sorted(tmp_path.rglob("*")) == before


class Writes:
    """Its pickle, when it is loaded as pickles are, writes a file."""

    def __init__(self, path, function=open):
        self.path, self.function = str(path), function

    def __reduce__(self):
        return self.function, ((self.path, "w") if self.function is open else (f"touch {self.path}",))


@pytest.mark.parametrize("function", [open, os.system, eval, np.fromfile, np.load])
@pytest.mark.parametrize("pickler", [pickled, pickle.dumps], ids=["Python 2", "Python 3"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(cifar, tmp_path, function, pickler):
    sentinel = tmp_path / "sentinel"
    raw = pickler({"data": Writes(sentinel, function), "labels": [0]})
    path, _ = cifar(edit=replace_member("data_batch_3", raw))
    with refused(f"{path} can't be read as the cifar10 archive (UnpicklingError: refused: it asks for ", "run code"):
        data.load("cifar10", path.parent)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_mean_and_std_are_those_of_the_real_data(name):
    directory, archive = Path(__file__).resolve().parent.parent / "data", data.ARCHIVES[name]
    if not (directory / archive.file).is_file():
        pytest.skip(f"data/{archive.file} isn't here")
    mean, std = data.channel_statistics(data.load(name, directory).train.images)
    assert mean == pytest.approx(archive.mean, abs=5e-5) and std == pytest.approx(archive.std, abs=5e-5)


# ---- downloads ---------------------------------------------------------------------------------------------------------


class Server:
    """Serves one file at every address, in the way that the first part of the path names, and notes what was asked."""

    def __init__(self, content):
        self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                way, begins = handler.path.split("/")[1], handler.headers.get("Range")
                self.asked.append((way, begins))
                start = int(begins.removeprefix("bytes=").removesuffix("-")) if begins and way != "whole" else 0
                body = b"<html>log in first</html>" if way == "portal" else content[start:]
                body = body[::-1] if way == "wrong" else body
                handler.send_response(404 if way == "missing" else 206 if start else 200)
                if way != "unmeasured":
                    handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body[: len(content) // 2 if way == "closes" else 20 if way == "unmeasured" else None])

            def log_message(handler, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, way):
        return f"http://127.0.0.1:{self.http.server_port}/{way}/"


@pytest.fixture
def served(cifar, tmp_path, monkeypatch):
    """A server of a small archive that isn't on the disk: (server, its bytes, where it belongs)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    source, _ = cifar(directory=tmp_path / "source")
    server = Server(source.read_bytes())
    yield server, source.read_bytes(), tmp_path / "new" / "data" / source.name
    server.http.shutdown()
    server.http.server_close()


def mirrors(monkeypatch, *urls):
    monkeypatch.setattr(data, "MIRRORS", urls)


def test_an_archive_is_downloaded_once_and_found_again_without_network(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("good"))
    first = data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and os.listdir(path.parent) == [path.name]
    mirrors(monkeypatch)
    again = data.load("cifar10", path.parent)
    assert torch.equal(first.train.images, again.train.images) and server.asked == [("good", None)]


def test_an_address_that_is_given_is_taken_as_it_is(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("missing"))
    data.load("cifar10", path.parent, data_url=server.url("good") + "renamed.tar.gz")
    assert path.read_bytes() == raw and server.asked == [("good", None)]


def test_a_download_goes_on_from_what_is_there(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("good"))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(raw[:1000])
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.asked == [("good", "bytes=1000-")]
    assert os.listdir(path.parent) == [path.name]


def test_a_download_that_only_lacks_its_name_is_taken(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("good"))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(raw)
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and not server.asked


def test_a_server_that_knows_no_ranges_begins_anew(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("whole"))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(raw[:1000])
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.asked == [("whole", "bytes=1000-")]


@pytest.mark.parametrize("rest", [b"something else" * 20, bytes(10**6)], ids=["shorter", "longer"])
def test_what_is_no_beginning_of_it_is_fetched_again(served, monkeypatch, rest):
    server, raw, path = served
    mirrors(monkeypatch, server.url("good"))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(rest)
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.asked[-1] == ("good", None)


def test_a_connection_that_ends_early_is_gone_on_with_elsewhere(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("closes"), server.url("good"))
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw
    assert server.asked == [("closes", None), ("good", f"bytes={len(raw) // 2}-")]


@pytest.mark.parametrize("way", ["missing", "portal", "wrong", "unmeasured"])
def test_a_place_that_has_something_else_is_passed_over(served, monkeypatch, way):
    server, raw, path = served
    mirrors(monkeypatch, server.url(way), server.url("good"))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(raw[:1000])
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.asked[-1][0] == "good"


def test_a_download_that_fails_says_why_and_what_to_do_and_keeps_what_it_has(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("closes"))
    with refused(f"there is no {path}", f"the connection ended after {len(raw) // 2} of {len(raw)} bytes; start again"):
        data.load("cifar10", path.parent)
    assert path.with_name(path.name + ".part").read_bytes() == raw[: len(raw) // 2]
    mirrors(monkeypatch, server.url("good"))
    data.load("cifar10", path.parent)
    assert server.asked[-1] == ("good", f"bytes={len(raw) // 2}-")


def test_a_wrong_digest_is_told_and_never_kept(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("wrong"), server.url("missing"))
    with refused(f"there is no {path}", "wrong/", f"md5 {hashlib.md5(raw[::-1]).hexdigest()}, not ", "missing/", "404"):
        data.load("cifar10", path.parent)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_data_and_network_the_file_its_place_and_shapes_are_named(tmp_path, monkeypatch, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mirrors(monkeypatch, f"http://127.0.0.1:{port}/", "https://mirror.invalid/")
    archive = data.ARCHIVES[name]
    with refused(f"there is no {tmp_path / archive.file}", f"put {archive.file} from ", f"{archive.md5}) into {tmp_path}/",
                 "--dataset shapes"):  # fmt: skip
        data.load(name, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["cifar.tar.gz", "file:///nowhere/cifar.tar.gz", "http://"])
def test_an_address_that_is_none_is_refused(tmp_path, url):
    with refused("there is no ", url, "--dataset shapes"):
        data.load("cifar10", tmp_path, data_url=url)


# ---- a folder of pictures ----------------------------------------------------------------------------------------------


def soft_picture(width, height, seed=0, mode="RGB"):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """cat and dog, three pictures each to train on, two to test on, of several sizes and two formats."""
    root = tmp_path / "pets"
    for seed, (part, label, i) in enumerate(
        (part, label, i) for part, n in (("train", 3), ("test", 2)) for label in ("cat", "dog") for i in range(n)
    ):
        directory = root / part / label
        directory.mkdir(parents=True, exist_ok=True)
        picture = soft_picture(*((40, 48), (64, 36), (50, 50))[i], seed)
        picture.save(directory / (f"{i}.jpg" if i == 1 else f"{i}.png"))
    return root


def load(root, image_size=32, **options):
    return data.load("folder", root, image_size=image_size, **options)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that are decoded, as they come."""
    names, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: names.append(Path(path).name) or decode(path, size))
    return names


def test_pictures_and_labels_are_in_their_places(folder):
    split = load(folder)
    assert (split.name, split.classes, split.notes) == ("pets", ("cat", "dog"), ())
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and split.test.labels.tolist() == [0, 0, 1, 1]
    assert split.train.images.is_contiguous(memory_format=torch.channels_last)
    for part, name in ((split.train, "train"), (split.test, "test")):
        paths = sorted(path for path in (folder / name).rglob("*.*"))
        for image, path in zip(part.images, paths, strict=True):
            with Image.open(path) as picture:
                side = min(picture.size)
                left, top = (picture.width - side) / 2, (picture.height - side) / 2
                expected = picture.resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_statistics_of_a_folder_are_those_of_its_training_pictures(folder):
    for path in (folder / "test").rglob("*.*"):
        Image.new("RGB", (40, 40), "white").save(path)
    split = load(folder)
    pixels = split.train.images.numpy() / 255
    np.testing.assert_allclose(split.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(split.std, pixels.std((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("image_size, stored", [(16, 16), (48, 48), (50, 50), (64, 50), (224, 50)])
def test_pictures_are_stored_no_larger_than_they_are(folder, image_size, stored):
    assert load(folder, image_size).train.images.shape == (6, 3, stored, stored)  # the largest shorter side is 50


def only(tmp_path, picture, name="a.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def test_a_picture_of_the_right_size_is_kept_to_the_bit(tmp_path):
    picture = soft_picture(24, 24)
    assert np.array_equal(data.decode(only(tmp_path, picture), 24), np.asarray(picture))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    picture = soft_picture(24, 24)
    if mode == "I;16":
        expected = picture.convert("L")
        values = np.asarray(expected).astype(np.uint16)
        picture = Image.fromarray(values * 256 + values)
    elif mode == "P":
        picture = picture.quantize(64)
        expected = picture
    else:
        picture = expected = picture.convert(mode)
    path = only(tmp_path, picture, "a.jpg" if mode == "CMYK" else "a.png", **({"quality": 100} if mode == "CMYK" else {}))
    out = data.decode(path, 24)
    assert out.shape == (24, 24, 3) and out.dtype == np.uint8
    difference = np.abs(out.astype(int) - np.asarray(expected.convert("RGB")))
    assert difference.max() <= (8 if mode == "CMYK" else 0)  # JPEG loses a little


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_set_upright(tmp_path, orientation):
    upright = soft_picture(48, 32)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    lying = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = data.decode(only(tmp_path, lying, "a.png", exif=exif), 32)
    assert np.array_equal(out, np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.BICUBIC)))


def test_the_cache_is_used(folder, decoded):
    first = load(folder)
    assert len(decoded) == 10 and (folder / ".cache-32px.pt").is_file()
    again = load(folder)
    assert len(decoded) == 10 and again.notes == ()
    for part in ("train", "test"):
        for field in ("images", "labels"):
            assert torch.equal(getattr(getattr(first, part), field), getattr(getattr(again, part), field))
    assert again.train.images.is_contiguous(memory_format=torch.channels_last)
    load(folder, 24)
    assert len(decoded) == 20  # another size has another cache
    load(folder)
    assert len(decoded) == 20


def test_the_cache_is_made_again_when_a_file_changes(folder, decoded):
    load(folder)
    soft_picture(44, 44, 99).save(folder / "train" / "dog" / "new.png")
    assert load(folder).train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and len(decoded) == 21
    path = folder / "test" / "cat" / "0.png"
    status = path.stat()
    soft_picture(40, 48, 98).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    before = len(decoded)
    changed = load(folder)
    assert len(decoded) == before + 11
    expected = ImageOps.fit(soft_picture(40, 48, 98), (32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(changed.test.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    path.unlink()
    assert len(load(folder).test) == 3
    (folder / "train" / "dog").rename(folder / "train" / "hound")
    (folder / "test" / "dog").rename(folder / "test" / "hound")
    assert load(folder).classes == ("cat", "hound")


@pytest.mark.parametrize("damage", ["truncated", "garbled", "foreign", "empty", "hostile"])
def test_a_damaged_cache_is_made_again(folder, tmp_path, decoded, damage):
    first, cache = load(folder), folder / ".cache-32px.pt"
    raw = cache.read_bytes()
    if damage == "truncated":
        cache.write_bytes(raw[: len(raw) // 2])
    elif damage == "garbled":
        middle = raw.index(first.train.images.permute(0, 2, 3, 1).numpy().tobytes()[:64])
        cache.write_bytes(raw[:middle] + bytes(64) + raw[middle + 64 :])
    elif damage == "foreign":
        checkpoint.save({"state_dict": {}}, cache)
    elif damage == "empty":
        cache.write_bytes(b"")
    else:
        torch.save({"format": 1, "digest": "", "contents": Writes(tmp_path / "sentinel")}, cache)
    again = load(folder)
    assert torch.equal(first.train.images, again.train.images) and len(decoded) == 20
    assert len(again.notes) == (damage != "foreign") and not (tmp_path / "sentinel").exists()
    assert all("the cache was made again" in note and "\n" not in note for note in again.notes)
    assert load(folder).notes == () and len(decoded) == 20


def test_a_folder_that_can_not_be_written_is_read(folder):
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user can write everywhere")
        split = load(folder)
    finally:
        folder.chmod(0o755)
    assert len(split.train) == 6 and "no cache" in split.notes[0] and sorted(os.listdir(folder)) == ["test", "train"]


def test_without_room_for_a_cache_the_pictures_are_read(folder, monkeypatch):
    def full(path, mode="wb"):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "replacing", full)
    split = load(folder)
    assert len(split.train) == 6 and len(split.notes) == 1
    assert "no cache" in split.notes[0] and "No space left" in split.notes[0] and "\n" not in split.notes[0]


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "text":
        path.write_text("this is no picture")
    elif how == "empty":
        path.write_bytes(b"")
    else:  # a PNG whose header claims more pixels than Pillow accepts ("vast") or than we do
        raw, side = bytearray(path.read_bytes()), 60000 if how == "vast" else 8000
        raw[16:24] = struct.pack(">II", side, side)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        path.write_bytes(raw)


SPOILED = {
    "truncated": "truncated", "text": "cannot identify image file)", "empty": "cannot identify image file)",
    "vast": "pixels", "large": "it claims 8000x8000 pixels)",
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_an_unreadable_picture_is_named_and_refused(folder, how):
    path = folder / "train" / "dog" / "a name with spaces.png"
    soft_picture(60, 60).save(path)
    spoil(path, how)
    with refused(f"{path} can't be read as a picture (", SPOILED[how], "--skip-bad-images leaves such files out"):
        load(folder)
    assert sorted(os.listdir(folder)) == ["test", "train"]


@pytest.mark.parametrize("how", ["vast", "large"])
def test_a_picture_that_claims_too_much_is_not_decoded(folder, monkeypatch, how):
    path = folder / "train" / "dog" / "0.png"
    spoil(path, how)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert isinstance(data._shorter_side(path), str) and isinstance(data.decode(path, 32), str)


def test_unreadable_pictures_are_counted_and_left_out_on_request(folder, decoded):
    for name, how in (("train/cat/0.png", "text"), ("train/dog/2.png", "truncated"), ("test/dog/0.png", "vast")):
        spoil(folder / name, how)
    for _ in range(2):  # the second time from the cache
        split = load(folder, skip_bad_images=True)
        assert split.train.labels.tolist() == [0, 0, 1, 1] and split.test.labels.tolist() == [0, 0, 1]
        (note,) = split.notes
        assert note.startswith("3 unreadable pictures were left out, the first is ") and str(folder) in note
    assert len(decoded) == 8  # not those whose headers were bad
    kept = [path for path in sorted((folder / "train").rglob("*.*")) if path.name != "0.png" or "dog" in str(path)]
    kept = [path for path in kept if path.name != "2.png" or "cat" in str(path)]
    for image, path in zip(split.train.images, kept, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), data.decode(path, 32))
    with refused(str(folder), "can't be read as a picture"):  # the cache is that of another request
        load(folder)


def test_a_part_without_a_readable_picture_is_refused(folder):
    for path in (folder / "test").rglob("*.*"):
        spoil(path, "text")
    with refused("no picture for test could be read"):
        load(folder, skip_bad_images=True)


def test_a_refusal_does_not_wait_for_the_rest(folder, monkeypatch):
    for i in range(200):
        os.link(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / f"z{i}.png")
    spoil(folder / "train" / "cat" / "0.png", "truncated")
    decode, calls = data.decode, []
    monkeypatch.setattr(data, "decode", lambda *args: calls.append(time.sleep(0.005)) or decode(*args))
    with refused(folder / "train" / "cat" / "0.png", "can't be read"):
        load(folder)
    assert len(calls) < 100


def test_reading_changes_no_warning_filter(folder):
    Image.new("P", (30, 30)).save(folder / "train" / "cat" / "clear.png", transparency=b"\x00\x7f" * 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        load(folder)
        assert warnings.filters == before


def test_other_files_are_ignored(folder):
    for name in ("notes.txt", "train/readme.md", "train/cat/list.csv", "train/cat/._0.png", "train/.hidden/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no picture")
    (folder / "train" / "cat" / "folder.png").mkdir()
    (folder / "train" / "dog" / "0.png").rename(folder / "train" / "dog" / "0.PNG")
    split = load(folder)
    assert len(split.train) == 6 and split.classes == ("cat", "dog")


def test_a_name_that_is_no_unicode_is_read(folder):
    path = os.fsencode(folder / "train" / "dog") + b"/\xff.png"
    try:
        os.link(folder / "train" / "dog" / "0.png", path)
    except OSError:
        pytest.skip("this file system takes unicode only")
    assert len(load(folder).train) == 7 and len(load(folder).train) == 7


def test_val_stands_in_for_test(folder):
    expected = load(folder).test
    (folder / "test").rename(folder / "val")
    split = load(folder)
    assert torch.equal(split.test.images, expected.images) and split.val is None


def test_a_class_that_test_lacks_may_be_trained(folder):
    for path in (folder / "test" / "dog").iterdir():
        path.unlink()
    (folder / "test" / "dog").rmdir()
    split = load(folder)
    assert split.classes == ("cat", "dog") and split.test.labels.tolist() == [0, 0]


def delete(path):
    if path.is_dir():
        for each in path.iterdir():
            delete(each)
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize("change, said", [
    (lambda root: delete(root), ("there is no folder ", "train/<class>/*.png|jpg and test/ (or val/)")),
    (lambda root: delete(root / "train"), ("there is no folder ", "train", "train/<class>/*.png|jpg")),
    (lambda root: delete(root / "test"), ("there is no folder ", "train/<class>/*.png|jpg and test/ (or val/)")),
    (lambda root: [delete(root / "train" / name) for name in ("cat", "dog")], ("train holds no pictures (.bmp, .jpeg",)),
    (lambda root: [delete(p) for p in (root / "train" / "cat").iterdir()], ("train/cat holds no pictures (.bmp, .jpeg",)),
    (lambda root: [delete(p) for p in (root / "test" / "dog").iterdir()], ("test/dog holds no pictures",)),
    (lambda root: delete(root / "train" / "dog"), ("test has classes that ", "train lacks: dog")),
    (lambda root: [delete(root / part / "dog") for part in ("train", "test")], ("train has one class, 'cat'",)),
])  # fmt: skip
def test_a_folder_of_another_form_is_refused(folder, change, said):
    change(folder)
    with refused("", *said):
        load(folder)
    assert not list(folder.glob(".cache*"))


def test_pictures_of_different_sizes_make_batches(folder):
    split = load(folder, 64)
    pipeline = Pipeline(split.mean, split.std, 64, ["crop", "flip"])
    inputs, labels = next(Batches(split.train, 6, pipeline).epoch(0))
    assert inputs.shape == (6, 3, 64, 64) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
