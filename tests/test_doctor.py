"""--doctor tells what a machine has, and doesn't wait for a network that doesn't answer."""

import threading
import urllib.error
from unittest.mock import Mock

import pytest
import torch
from helpers.processes import wait_until

import train
import train_sota
import train_vit
from datasets.archives import ARCHIVES
from training import doctor

SCRIPTS = {"train": train, "train_vit": train_vit, "train_sota": train_sota}


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """answer(function): what urlopen does from now on; everything else is quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    monkeypatch.setattr(doctor, "SIDES", {"cpu": 64})
    return lambda function: monkeypatch.setattr(doctor.urllib.request, "urlopen", function)


def refuse(request, timeout):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_script_reports_and_writes_nothing(script, answer, tmp_path, capsys):
    answer(refuse)
    assert script.main(["--doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in text and "--amp auto computes in" in text
    assert "no archive of cifar10, no archive of cifar100, no folder of images" in text
    assert text.count(": not reachable\n") == 3 and not list(tmp_path.iterdir())


def test_data_that_is_there_is_named(answer, tmp_path, capsys):
    answer(refuse)
    for name in ("train/cat", "train/dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    (tmp_path / "pets" / ARCHIVES["cifar10"].file).write_text("half")
    train.main(["--doctor", "--device", "cpu", "--data-dir", "pets"])
    text = capsys.readouterr().out
    assert "cifar-10-python.tar.gz of 4 bytes, not 170498071" in text
    assert "a folder of 2 classes" in text and "free disk space, GB: runs/" in text


def test_a_device_without_free_memory_is_no_error(answer, monkeypatch, capsys):
    answer(refuse)
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()):
        monkeypatch.setattr(doctor, "matrix_speed", Mock(side_effect=error))
        assert train.main(["--doctor", "--device", "cpu"]) == 0
        assert "not measured (out of memory) in bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "matrix_speed", Mock(side_effect=RuntimeError("device-side")))
    with pytest.raises(RuntimeError, match="device-side"):
        train.main(["--doctor", "--device", "cpu"])


def test_addresses_that_answer_differently(answer):
    ended = threading.Event()

    def urlopen(request, timeout):
        if "silent" in request.full_url:  # the look-up of the name hangs
            ended.wait(60)
        if "gone" in request.full_url:
            raise urllib.error.HTTPError(request.full_url, 404, "", {}, None)
        return open("/dev/null")

    answer(urlopen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "TIMEOUT", 0.3)
        urls = {name: f"https://{name}.example" for name in ("silent", "gone", "here")}
        before = set(threading.enumerate())
        lines = doctor.start_requests(urls)
        requests = set(threading.enumerate()) - before
        wait_until(lambda: sum(thread.is_alive() for thread in requests) == 1)
        answers = lines()
        waiting = [thread for thread in requests if thread.is_alive()]
    ended.set()
    assert len(waiting) == 1  # lines() did not wait for it
    assert answers == ["silent: not reachable", "gone: answers with status 404", "here: reachable"]
