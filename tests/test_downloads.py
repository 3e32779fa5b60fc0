"""Archives are downloaded once, resumed, checked, and never left half written."""

import base64
import hashlib
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.errors import refused
from helpers.loading import load_together

import data
from datasets import archives

NAMES = ("cifar10", "cifar100")


class Server:
    """Serves one file at every address. The first part of the path names the server's behavior."""

    STATUS = {"missing": 404, "elsewhere": 302, "liar": 206}

    def __init__(self, content):
        self.content, self.redirect = content, ""
        self.requests, self.closed = [], threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        options = {"poll_interval": 0.01}
        threading.Thread(target=self.http.serve_forever, kwargs=options, daemon=True).start()

    def url(self, behavior):
        return f"http://127.0.0.1:{self.http.server_port}/{behavior}/"

    def answer(self, handler):
        behavior, requested = handler.path.split("/")[1], handler.headers.get("Range")
        self.requests.append((behavior, requested))
        if len(self.requests) > 20:  # a client that never gives up
            behavior = "missing"
        start = 0
        if requested and behavior != "no-ranges":
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
        body = b"<html>log in first</html>" if behavior == "portal" else self.content[start:]
        if behavior in ("wrong", "liar"):
            body = body[::-1]
        handler.send_response(self.STATUS.get(behavior, 206 if start else 200))
        if behavior == "elsewhere":
            handler.send_header("Location", self.redirect)
        if behavior != "no-length":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        limits = {"closes": len(self.content) // 2, "no-length": 20, "stalls": 100}
        body = body[: limits.get(behavior)]
        step = len(body) // 20 if behavior == "slow" else max(1, len(body))
        for place in range(0, len(body), step):
            handler.wfile.write(body[place : place + step])
            if behavior == "slow":
                self.closed.wait(0.01)
        if behavior == "stalls":
            self.closed.wait(60)

    def close(self):
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def served(make_archive, tmp_path, monkeypatch):
    """A server of a small archive that isn't on the disk: (server, its bytes, where it belongs)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    source, _ = make_archive(directory=tmp_path / "source")
    server = Server(source.read_bytes())
    yield server, source.read_bytes(), tmp_path / "new" / "data" / source.name
    server.close()


@pytest.fixture
def mirrors(monkeypatch):
    return lambda *urls: monkeypatch.setattr(archives, "MIRRORS", urls)


def write_part(path, raw):
    """The file that an interrupted download leaves."""
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(raw)


def test_an_archive_is_downloaded_once(served, mirrors):
    server, raw, path = served
    mirrors(server.url("good"))
    first = data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and os.listdir(path.parent) == [path.name]
    mirrors()
    again = data.load("cifar10", path.parent)
    assert torch.equal(first.train.images, again.train.images)
    assert server.requests == [("good", None)]


def test_data_url_replaces_the_mirrors(served, mirrors):
    server, raw, path = served
    mirrors(server.url("missing"))
    data.load("cifar10", path.parent, data_url=server.url("good") + "renamed.tar.gz")
    assert path.read_bytes() == raw and server.requests == [("good", None)]


@pytest.mark.parametrize("behavior", ["good", "no-ranges"])
def test_a_download_is_resumed_or_started_again(served, mirrors, behavior):
    server, raw, path = served
    mirrors(server.url(behavior))
    write_part(path, raw[:1000])
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.requests == [(behavior, "bytes=1000-")]
    assert os.listdir(path.parent) == [path.name]


def test_a_complete_part_is_only_renamed(served, mirrors):
    server, raw, path = served
    mirrors(server.url("good"))
    write_part(path, raw)
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and not server.requests


@pytest.mark.parametrize("part", [b"something else" * 20, bytes(10**6)], ids=["short", "long"])
def test_a_part_of_another_file_is_replaced(served, mirrors, part):
    server, raw, path = served
    mirrors(server.url("good"))
    write_part(path, part)
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.requests[-1] == ("good", None)


def test_a_broken_download_is_resumed_from_the_next_mirror(served, mirrors):
    server, raw, path = served
    mirrors(server.url("closes"), server.url("good"))
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw
    assert server.requests == [("closes", None), ("good", f"bytes={len(raw) // 2}-")]


@pytest.mark.parametrize("behavior", ["missing", "portal", "wrong", "no-length", "liar"])
def test_a_mirror_with_something_else_is_skipped(served, mirrors, behavior):
    server, raw, path = served
    mirrors(server.url(behavior), server.url("good"))
    write_part(path, raw[:1000])
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw
    assert server.requests[-1][0] == "good" and len(server.requests) <= 3


def test_a_failed_download_keeps_what_it_has(served, mirrors):
    server, raw, path = served
    half = len(raw) // 2
    mirrors(server.url("closes"))
    reason = f"the connection ended after {half} of {len(raw)} bytes; start again"
    with refused(f"there is no {path}", reason):
        data.load("cifar10", path.parent)
    assert path.with_name(path.name + ".part").read_bytes() == raw[:half]
    mirrors(server.url("good"))
    data.load("cifar10", path.parent)
    assert server.requests[-1] == ("good", f"bytes={half}-")


def test_a_wrong_digest_is_reported_and_nothing_kept(served, mirrors):
    server, raw, path = served
    mirrors(server.url("wrong"), server.url("missing"))
    digest = f"md5 {hashlib.md5(raw[::-1]).hexdigest()}, not "
    with refused(f"there is no {path}", "wrong/", digest, "missing/", "404"):
        data.load("cifar10", path.parent)
    assert not path.parent.exists()


def test_a_slow_mirror_is_waited_for(served, mirrors):
    server, raw, path = served
    mirrors(server.url("slow"))
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw and server.requests == [("slow", None)]


def test_a_silent_mirror_is_given_up_and_its_bytes_kept(served, mirrors, monkeypatch):
    server, raw, path = served
    mirrors(server.url("stalls"))
    with monkeypatch.context() as patch, refused(f"there is no {path}", "timed out"):
        patch.setattr(archives, "TIMEOUT", 5)
        data.load("cifar10", path.parent)
    mirrors(server.url("good"))
    data.load("cifar10", path.parent)
    assert path.read_bytes() == raw
    assert server.requests == [("stalls", None), ("good", "bytes=100-")]


@pytest.mark.parametrize("scheme", ["file", "data"])
def test_a_redirect_away_from_the_net_is_not_followed(served, mirrors, tmp_path, scheme):
    server, raw, path = served
    (tmp_path / "local").write_bytes(raw)
    encoded = base64.b64encode(raw).decode()
    urls = {"file": f"file://{tmp_path}/local", "data": f"data:;base64,{encoded}"}
    server.redirect = urls[scheme]
    mirrors(server.url("elsewhere"))
    with refused(f"there is no {path}", "not allowed" if scheme == "file" else "elsewhere/"):
        data.load("cifar10", path.parent)
    assert not path.exists() and server.requests == [("elsewhere", None)]


def test_four_processes_download_an_archive_once(served):
    server, raw, path = served
    archive = archives.ARCHIVES["cifar10"]
    loads = load_together(4, "cifar10", path.parent, server.url("slow"), archive)
    assert len(set(loads)) == 1 and server.requests == [("slow", None)]
    assert path.read_bytes() == raw and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", NAMES)
def test_without_network_the_message_says_what_to_do(tmp_path, mirrors, name):
    archive = archives.ARCHIVES[name]
    advice = f"put {archive.file} from ", f"{archive.md5}) into {tmp_path}/", "--dataset shapes"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nothing listens there, and no other process can
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        mirrors(f"{address}/a/", f"{address}/b/")
        with refused(f"there is no {tmp_path / archive.file}", "/a/", "/b/", *advice):
            data.load(name, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["cifar.tar.gz", "file:///nowhere/cifar.tar.gz", "http://"])
def test_an_invalid_address_is_refused(tmp_path, url):
    with refused("there is no ", url, "--dataset shapes"):
        data.load("cifar10", tmp_path, data_url=url)
