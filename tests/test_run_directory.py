"""A run's directory: one writer, one row per epoch, nothing overwritten, nothing torn."""

import re
import subprocess
import sys
import threading

import pytest
import torch
from helpers.errors import refused
from helpers.paths import ROOT

from common import checkpoint
from common.errors import UserError
from training import run_directory
from training.run_directory import RunDir


@pytest.fixture
def run(tmp_path):
    directory = RunDir.create(tmp_path / "run", {"arguments": {"lr": 0.1}})
    yield directory
    directory.close()


def row(epoch, loss=0.5):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": loss, "test_acc": None}


def epochs(run):
    return [row["epoch"] for row in run.rows()]


def test_the_name_of_a_directory_describes_the_run_and_is_new(tmp_path):
    first = run_directory.new_path(tmp_path, "cifar10", "timm/resnet18", "try", 3)
    assert re.fullmatch(r"cifar10-timm_resnet18-try-s3-\d{8}-\d{6}", first.name)
    first.mkdir()
    second = run_directory.new_path(tmp_path, "cifar10", "timm/resnet18", "try", 3)
    assert second != first and not second.exists()


@pytest.mark.parametrize("name", [*run_directory.FILES, "epoch-5.pt"])
def test_a_directory_that_holds_a_run_or_is_a_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with refused(tmp_path, name, "--resume"):
        RunDir.create(tmp_path, {})
    with pytest.raises(UserError, match="is a file"):
        RunDir.create(tmp_path / name, {})
    with pytest.raises(UserError, match="can't be created"):
        RunDir.create(tmp_path / name / "below", {})
    assert (tmp_path / name).read_text() == "x"


def test_a_second_writer_is_refused_until_the_first_one_ends(run):
    (run.path / "last.pt").write_text("x")
    with refused(run.path, "another process"):
        RunDir.open(run.path)
    run.close()
    code = "import os, sys; from training.run_directory import RunDir; "
    code += "directory = RunDir.open(sys.argv[1]); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], cwd=ROOT)
    assert done.returncode == -9
    RunDir.open(run.path).close()


def test_a_lock_that_may_stay_after_a_kill_is_named(tmp_path, monkeypatch):
    """On a file system without flock, its file is the lock."""
    monkeypatch.setattr(run_directory, "FileLock", run_directory.SoftFileLock)
    first, lock = RunDir(tmp_path), tmp_path / ".lock"
    with refused("", f"by another process (if there is none on any machine, remove {lock})"):
        RunDir(tmp_path)
    first.close()
    RunDir(tmp_path).close()


def test_of_two_runs_that_start_at_once_the_second_is_refused(tmp_path, monkeypatch):
    """Even if the first one has finished between the second one's check and its lock."""
    config, check, calls = tmp_path / "run" / "config.json", run_directory.refuse_if_taken, []

    def check_twice(path):
        calls.append(path)
        if len(calls) == 2:
            config.write_text("the first one's")
        return check(path)

    monkeypatch.setattr(run_directory, "refuse_if_taken", check_twice)
    with pytest.raises(UserError, match="holds a run already"):
        RunDir.create(tmp_path / "run", {})
    assert config.read_text() == "the first one's"
    RunDir(tmp_path / "run").close()  # the lock was released


def test_temporary_files_of_a_killed_save_are_removed(run):
    (run.path / "last.pt").write_text("x")
    (run.path / ".last.pt.tmp").write_text("half")
    run.close()
    RunDir.open(run.path).close()
    assert not (run.path / ".last.pt.tmp").exists()


def test_a_directory_without_a_checkpoint_can_not_be_resumed(tmp_path, run):
    with refused(tmp_path, "holds no run to resume"):
        RunDir.open(tmp_path)
    with refused(run.path, "holds no run", "--config", "starts it again"):
        run_directory.load_last(run.path)
    with refused("--resume", "there is no such run"):
        run_directory.resolve_path(tmp_path / "nothing")
    assert run_directory.resolve_path(run.path / "config.json") == run.path


def test_rows_are_read_by_column_with_empty_cells(run):
    run.append_row(row(1, 1 / 3))
    run.append_row(row(2))
    assert epochs(run) == ["1", "2"] and run.rows()[0]["test_acc"] == ""
    assert float(run.rows()[0]["train_loss"]) == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.parametrize("torn", ["3,30,0.", "3,30,0.25,1"])  # the second lacks only a newline
def test_a_torn_last_line_is_dropped(run, torn):
    run.append_row(row(1))
    run.append_row(row(2))
    with open(run.metrics_path, "a") as file:
        file.write(torn)
    assert epochs(run) == ["1", "2"]
    run.keep_rows(2)
    run.append_row(row(3))
    assert epochs(run) == ["1", "2", "3"]


def test_rows_after_the_checkpoint_are_dropped(run):
    for epoch in (1, 2, 3):
        run.append_row(row(epoch))
    run.keep_rows(1)
    run.append_row(row(2, 0.7))
    assert [(row["epoch"], row["train_loss"]) for row in run.rows()] == [("1", "0.5"), ("2", "0.7")]
    with refused(run.metrics_path, "doesn't hold each of the run's 3 epochs"):
        run.keep_rows(3)
    run.keep_rows(0)  # the next row may have other columns
    run.append_row({"epoch": 1, "step": 1, "other": 2})
    assert run.rows() == [{"epoch": "1", "step": "1", "other": "2"}]


@pytest.fixture
def gate(monkeypatch):
    """(opened, paths): each save appends to paths, and waits for opened before it is complete."""
    opened, paths, verify = threading.Event(), [], checkpoint.verify

    def wait_and_verify(path, expected):
        paths.append(path)
        assert opened.wait(60)
        verify(path, expected)

    monkeypatch.setattr(checkpoint, "verify", wait_and_verify)
    yield opened, paths
    opened.set()  # so that the thread ends, whatever the test has found


def test_a_save_holds_the_state_of_its_call_while_training_continues(run, gate):
    opened, _ = gate
    weights, progress = torch.zeros(3), {"epoch": 1}
    state = {"weights": weights, "progress": progress}
    run.end_epoch(row(1), state, lambda last: {"weights": last["weights"]})
    weights.add_(1)
    progress["epoch"] = 2
    assert not (run.path / "last.pt").exists()  # the call returned before the file was complete
    opened.set()
    run.wait()
    for name in ("last.pt", "best.pt"):
        assert checkpoint.load(run.path / name)["weights"].sum() == 0
    assert checkpoint.load(run.path / "last.pt")["progress"] == {"epoch": 1}
    assert epochs(run) == ["1"]


def test_a_second_save_waits_for_the_first(run, gate):
    opened, paths = gate
    run.end_epoch(row(1), {"epoch": 1})
    second = threading.Thread(target=run.end_epoch, args=(row(2), {"epoch": 2}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and len(paths) <= 1
    opened.set()
    second.join(60)
    run.wait()
    assert checkpoint.load(run.path / "last.pt") == {"epoch": 2} and len(paths) == 2
    assert checkpoint.load(run.path / "previous.pt") == {"epoch": 1}


@pytest.mark.parametrize("call", ["end_epoch", "wait", "save_last"])
def test_a_save_that_failed_is_reported_once_by_the_next_call(run, monkeypatch, call):
    calls = {
        "end_epoch": lambda: run.end_epoch(row(2), {"epoch": 2}),
        "wait": run.wait,
        "save_last": lambda: run.save_last({"epoch": 1}),
    }
    run.save_last({"epoch": 0})

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify", fail)
        run.end_epoch(row(1), {"epoch": 1})
        with pytest.raises(UserError, match=r"last\.pt could not be written .*No space left"):
            calls[call]()
    assert checkpoint.load(run.path / "last.pt") == {"epoch": 0}
    run.wait()
