"""Archives, folders and shapes are read as they are, or refused by name; nothing hostile runs, and nothing is left behind."""

import hashlib
import io
import os
import pickle
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
from conftest import refused
from PIL import Image, ImageOps

import checkpoint
import data
import sources
from augment import Pipeline
from data import Batches

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
AUGMENTED = dict(num_classes=10, cutout_size=9, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.7)


# ---- shapes ------------------------------------------------------------------------------------------------------------


def test_shapes_are_made_of_their_seed():
    torch.manual_seed(0)
    first, before = sources.make_shapes(300, seed=1), torch.get_rng_state()
    again, other = sources.make_shapes(300, seed=1), sources.make_shapes(300, seed=2)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.images.dtype == torch.uint8 and first.images.shape == (300, 3, 32, 32)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.bincount(first.labels).tolist() == [30] * 10
    assert len(first.images.flatten(1).unique(dim=0)) == 300


def test_shapes_are_not_trivial_to_tell_apart():
    train, test = sources.make_shapes(2000, seed=1), sources.make_shapes(1000, seed=2)

    def features(part):
        return part.images.flatten(1).float()

    means = torch.stack([features(train)[train.labels == label].mean(0) for label in range(10)])
    by_mean = torch.cdist(features(test), means).argmin(1)
    by_neighbour = train.labels[torch.cdist(features(test), features(train)).argmin(1)]
    for guess in (by_mean, by_neighbour):
        assert (guess == test.labels).float().mean() < 0.45


def test_shapes_load_with_statistics(monkeypatch):
    small = sources.load_shapes
    monkeypatch.setattr(sources, "load_shapes", lambda: small(train=500, test=200))
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
    classes = sources.ARCHIVES[name].num_classes
    contents[LABELS[name]] = [int(label) for label in rng.integers(0, classes, count)]
    if name == "cifar100":
        contents["coarse_labels"] = [int(label) for label in rng.integers(0, 20, count)]
    return contents


def archive_contents(name):
    archive = sources.ARCHIVES[name]
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
        contents, archive = archive_contents(name), sources.ARCHIVES[name]
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
    monkeypatch.setitem(sources.ARCHIVES, name, sources.ARCHIVES[name]._replace(size=len(raw), md5=digest))


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
    archive = sources.ARCHIVES[name]
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
    right = sources.ARCHIVES["cifar10"].md5
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
    directory, archive = Path(__file__).resolve().parent.parent / "data", sources.ARCHIVES[name]
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
    monkeypatch.setattr(sources, "MIRRORS", urls)


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
    archive = sources.ARCHIVES[name]
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
    names, decode = [], sources.decode
    monkeypatch.setattr(sources, "decode", lambda path, size: names.append(Path(path).name) or decode(path, size))
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
    assert np.array_equal(sources.decode(only(tmp_path, picture), 24), np.asarray(picture))


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
    out = sources.decode(path, 24)
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
    out = sources.decode(only(tmp_path, lying, "a.png", exif=exif), 32)
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
    assert isinstance(sources._shorter_side(path), str) and isinstance(sources.decode(path, 32), str)


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
        assert np.array_equal(image.permute(1, 2, 0).numpy(), sources.decode(path, 32))
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
    decode, calls = sources.decode, []
    monkeypatch.setattr(sources, "decode", lambda *args: calls.append(time.sleep(0.005)) or decode(*args))
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
