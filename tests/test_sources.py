"""Archives and shapes are read as they are, or refused by name; nothing hostile runs, and nothing is left behind."""

import base64
import hashlib
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from processes import load_data

import data
from datasets import archives, shapes

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
AUGMENTED = dict(
    num_classes=10, cutout_size=9, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.7
)


# ---- shapes ------------------------------------------------------------------------------------------------------------


def test_shapes_are_made_of_their_seed():
    torch.manual_seed(0)
    first, before = shapes.make_shapes(300, seed=1), torch.get_rng_state()
    again, other = shapes.make_shapes(300, seed=1), shapes.make_shapes(300, seed=2)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.images.dtype == torch.uint8 and first.images.shape == (300, 3, 32, 32)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.bincount(first.labels).tolist() == [30] * 10
    assert len(first.images.flatten(1).unique(dim=0)) == 300


def test_shapes_are_not_trivial_to_tell_apart():
    train, test = shapes.make_shapes(2000, seed=1), shapes.make_shapes(1000, seed=2)

    def features(part):
        return part.images.flatten(1).float()

    means = torch.stack([features(train)[train.labels == label].mean(0) for label in range(10)])
    by_mean = torch.cdist(features(test), means).argmin(1)
    by_neighbour = train.labels[torch.cdist(features(test), features(train)).argmin(1)]
    for guess in (by_mean, by_neighbour):
        assert (guess == test.labels).float().mean() < 0.45


def test_shapes_load_with_statistics(monkeypatch):
    small = shapes.load_shapes
    monkeypatch.setattr(shapes, "load_shapes", lambda: small(train=500, test=200))
    split = data.load("shapes")
    assert (split.name, split.num_classes, len(split.train), len(split.test)) == (
        "shapes",
        10,
        500,
        200,
    )
    assert all(0.2 < mean < 0.8 for mean in split.mean) and all(
        0.05 < std < 0.4 for std in split.std
    )
    train, test = (part.images.flatten(1) for part in (split.train, split.test))
    assert (
        len(torch.cat([train, test]).unique(dim=0)) == 700
    )  # no test picture among the training pictures


# ---- CIFAR archives ----------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did for the published archives: protocol 2, and every string one of bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(
            b"U" + bytes([len(raw)]) + raw
            if len(raw) < 256
            else b"T" + struct.pack("<i", len(raw)) + raw
        )
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
    contents = {
        "batch_label": "a batch",
        "filenames": [f"picture_{i}.png" for i in range(count)],
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
    }
    classes = archives.ARCHIVES[name].num_classes
    contents[LABELS[name]] = [int(label) for label in rng.integers(0, classes, count)]
    if name == "cifar100":
        contents["coarse_labels"] = [int(label) for label in rng.integers(0, 20, count)]
    return contents


def archive_contents(name):
    archive = archives.ARCHIVES[name]
    members = {
        member: batch_of(name, 7 + i, i) for i, member in enumerate(archive.train + archive.test)
    }
    members[archive.meta] = {
        archive.names_key: [f"class_{i}" for i in range(archive.num_classes)],
        "num_vis": 3072,
    }
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
        contents, archive = archive_contents(name), archives.ARCHIVES[name]
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
    monkeypatch.setitem(
        archives.ARCHIVES, name, archives.ARCHIVES[name]._replace(size=len(raw), md5=digest)
    )


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
    archive = archives.ARCHIVES[name]
    assert_holds(split.train, [contents[member] for member in archive.train], LABELS[name])
    assert_holds(split.test, [contents[member] for member in archive.test], LABELS[name])
    assert (
        split.classes == tuple(f"class_{i}" for i in range(archive.num_classes))
        and split.name == name
    )
    assert (split.mean, split.std) == (archive.mean, archive.std) and split.val is None
    assert os.listdir(path.parent) == [path.name]  # nothing is unpacked


def test_pickles_of_python_3_are_read_too(cifar):
    def edit(contents):
        for member, value in contents.items():
            contents[member] = pickle.dumps(value, protocol=4)

    path, _ = cifar(edit=edit)
    assert_holds(
        data.load("cifar10", path.parent).test,
        [archive_contents("cifar10")["test_batch"]],
        "labels",
    )


def test_a_wrong_digest_is_refused_and_nothing_is_opened(cifar, monkeypatch):
    path, _ = cifar()
    right = archives.ARCHIVES["cifar10"].md5
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


@pytest.mark.parametrize(
    "edit, said",
    [
        (remove("test_batch"), "it lacks test_batch"),
        (remove("batches.meta"), "it lacks batches.meta"),
        (put("data_batch_2", "labels", [0, 1, 2, 3, 4, 5, 6, 10]), "labels must be 0…9"),
        (put("data_batch_2", "labels", [0, 1, 2, 3, 4, 5, 6, -1]), "labels must be 0…9"),
        (put("data_batch_2", "labels", [0, 1, 2, 3, 4, 5, 6, 2**70]), "OverflowError"),
        (put("data_batch_2", "labels", [0] * 7), "data_batch_2 has 8 pictures and 7 labels"),
        (put("data_batch_2", "labels", None), "TypeError"),
        (
            put("data_batch_2", "data", np.zeros((8, 3071), np.uint8)),
            "data_batch_2 holds uint8 (8, 3071)",
        ),
        (
            put("data_batch_2", "data", np.zeros((8, 3072), np.float32)),
            "data_batch_2 holds float32",
        ),
        (put("batches.meta", "label_names", ["a", "b"]), "2 class names"),
        (replace_member("test_batch", {"data": 1}), "labels"),
        (replace_member("test_batch", [1, 2]), "TypeError"),
        (replace_member("test_batch", b"no pickle"), "test_batch"),
        (replace_member("test_batch", b""), "EOFError"),
        (replace_member("test_batch", pickled({"labels": [0]})[:-9]), "truncated"),
        (
            replace_member("test_batch", b"\x80\x02c_codecs\nencode\nU\x01aU\x06nosuch\x86R."),
            "LookupError",
        ),
    ],
)
def test_an_archive_with_other_contents_is_refused(cifar, edit, said):
    path, _ = cifar(edit=edit)
    with refused(
        f"{path} can't be read as the cifar10 archive (", *([said] if said != "test_batch" else [])
    ):
        data.load("cifar10", path.parent)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "info",
    [
        special("../x", tarfile.REGTYPE),
        special("cifar-10-batches-py/../../x", tarfile.REGTYPE),
        special("/tmp/x", tarfile.REGTYPE),
        special("cifar-10-batches-py/x", tarfile.SYMTYPE, "/etc/passwd"),
        special("cifar-10-batches-py/test_batch", tarfile.SYMTYPE, "../../x"),
        special("cifar-10-batches-py/x", tarfile.LNKTYPE, "../x"),
        special("cifar-10-batches-py/x", tarfile.CHRTYPE),
        special("cifar-10-batches-py/x", tarfile.BLKTYPE),
        special("cifar-10-batches-py/x", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)
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
        return self.function, (
            (self.path, "w") if self.function is open else (f"touch {self.path}",)
        )


@pytest.mark.parametrize("function", [open, os.system, eval, np.fromfile, np.load])
@pytest.mark.parametrize("pickler", [pickled, pickle.dumps], ids=["Python 2", "Python 3"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(cifar, tmp_path, function, pickler):
    sentinel = tmp_path / "sentinel"
    raw = pickler({"data": Writes(sentinel, function), "labels": [0]})
    path, _ = cifar(edit=replace_member("data_batch_3", raw))
    with refused(
        f"{path} can't be read as the cifar10 archive (UnpicklingError: refused: it asks for ",
        "run code",
    ):
        data.load("cifar10", path.parent)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_mean_and_std_are_those_of_the_real_data(name):
    directory, archive = Path(__file__).resolve().parent.parent / "data", archives.ARCHIVES[name]
    if not (directory / archive.file).is_file():
        pytest.skip(f"data/{archive.file} isn't here")
    mean, std = data.channel_statistics(data.load(name, directory).train.images)
    assert mean == pytest.approx(archive.mean, abs=5e-5) and std == pytest.approx(
        archive.std, abs=5e-5
    )


# ---- downloads ---------------------------------------------------------------------------------------------------------


class Server:
    """Serves one file at every address, in the way that the first part of the path names, and notes what was asked."""

    def __init__(self, content):
        self.asked, self.closed, self.aim = [], threading.Event(), ""  # where "elsewhere" leads to

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                way, begins = handler.path.split("/")[1], handler.headers.get("Range")
                self.asked.append((way, begins))
                start = (
                    int(begins.removeprefix("bytes=").removesuffix("-"))
                    if begins and way != "whole"
                    else 0
                )
                body = b"<html>log in first</html>" if way == "portal" else content[start:]
                body = body[::-1] if way in ("wrong", "liar") else body
                way = "missing" if len(self.asked) > 20 else way  # who asks so often asks for ever
                handler.send_response(
                    {"missing": 404, "elsewhere": 302, "liar": 206}.get(way, 206 if start else 200)
                )
                if way == "elsewhere":
                    handler.send_header("Location", self.aim)
                if way != "unmeasured":
                    handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                if way == "stalls":
                    handler.wfile.write(body[:100])
                    self.closed.wait(60)  # a reader that waits for ever finds the end of it
                elif way == "slow":
                    for at in range(0, len(body), len(body) // 20):
                        handler.wfile.write(body[at : at + len(body) // 20])
                        self.closed.wait(0.01)
                else:
                    handler.wfile.write(
                        body[
                            : len(content) // 2
                            if way == "closes"
                            else 20
                            if way == "unmeasured"
                            else None
                        ]
                    )

            def log_message(handler, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

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
    server.closed.set()
    server.http.shutdown()
    server.http.server_close()


def mirrors(monkeypatch, *urls):
    monkeypatch.setattr(archives, "MIRRORS", urls)


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


@pytest.mark.parametrize("way", ["missing", "portal", "wrong", "unmeasured", "liar"])
def test_a_place_that_has_something_else_is_passed_over(served, monkeypatch, way):
    server, raw, path = served
    mirrors(monkeypatch, server.url(way), server.url("good"))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(raw[:1000])
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.asked[-1][0] == "good" and len(server.asked) <= 3


def test_a_download_that_fails_says_why_and_what_to_do_and_keeps_what_it_has(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("closes"))
    with refused(
        f"there is no {path}",
        f"the connection ended after {len(raw) // 2} of {len(raw)} bytes; start again",
    ):
        data.load("cifar10", path.parent)
    assert path.with_name(path.name + ".part").read_bytes() == raw[: len(raw) // 2]
    mirrors(monkeypatch, server.url("good"))
    data.load("cifar10", path.parent)
    assert server.asked[-1] == ("good", f"bytes={len(raw) // 2}-")


def test_a_wrong_digest_is_told_and_never_kept(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("wrong"), server.url("missing"))
    with refused(
        f"there is no {path}",
        "wrong/",
        f"md5 {hashlib.md5(raw[::-1]).hexdigest()}, not ",
        "missing/",
        "404",
    ):
        data.load("cifar10", path.parent)
    assert not path.parent.exists()


def test_a_slow_place_is_waited_for(served, monkeypatch):
    server, raw, path = served
    mirrors(monkeypatch, server.url("slow"))
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.asked == [("slow", None)]


def test_a_place_that_falls_silent_is_given_up_and_what_it_sent_is_kept(served, monkeypatch):
    server, raw, path = served
    monkeypatch.setattr(archives, "SILENCE", 0.3)
    mirrors(monkeypatch, server.url("stalls"))
    with refused(f"there is no {path}", "timed out"):
        data.load("cifar10", path.parent)
    mirrors(monkeypatch, server.url("good"))
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw
    assert server.asked == [("stalls", None), ("good", "bytes=100-")]


@pytest.mark.parametrize("scheme", ["file", "data"])
def test_a_place_that_leads_away_from_the_net_is_not_followed(
    served, tmp_path, monkeypatch, scheme
):
    server, raw, path = served
    (tmp_path / "local").write_bytes(raw)  # even where the bytes would be right
    server.aim = (
        f"file://{tmp_path}/local"
        if scheme == "file"
        else f"data:;base64,{base64.b64encode(raw).decode()}"
    )
    mirrors(monkeypatch, server.url("elsewhere"))
    with refused(f"there is no {path}", "not allowed" if scheme == "file" else "elsewhere/"):
        data.load("cifar10", path.parent)
    assert not path.exists() and server.asked == [("elsewhere", None)]


def test_four_processes_that_lack_the_archive_bring_it_once(served, tmp_path, monkeypatch, forks):
    server, raw, path = served
    published = {"size": len(raw), "md5": hashlib.md5(raw).hexdigest()}
    until, notes = tmp_path / "until", tmp_path / "notes"
    processes = [
        forks.start(
            faults=[load_data("cifar10", path.parent, server.url("slow"), published, until, notes)]
        )
        for _ in range(4)
    ]
    until.touch()
    ended = [process.wait() for process in processes]
    assert [(done.returncode, done.err) for done in ended] == [(0, "")] * 4
    assert len({done.out for done in ended}) == 1 and server.asked == [("slow", None)]
    assert path.read_bytes() == raw and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_data_and_network_the_file_its_place_and_shapes_are_named(
    tmp_path, monkeypatch, name
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mirrors(monkeypatch, f"http://127.0.0.1:{port}/", "https://mirror.invalid/")
    archive = archives.ARCHIVES[name]
    with refused(
        f"there is no {tmp_path / archive.file}",
        f"put {archive.file} from ",
        f"{archive.md5}) into {tmp_path}/",
        "--dataset shapes",
    ):
        data.load(name, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["cifar.tar.gz", "file:///nowhere/cifar.tar.gz", "http://"])
def test_an_address_that_is_none_is_refused(tmp_path, url):
    with refused("there is no ", url, "--dataset shapes"):
        data.load("cifar10", tmp_path, data_url=url)
