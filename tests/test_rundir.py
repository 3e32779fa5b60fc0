"""One writer, one row an epoch, nothing overwritten, nothing torn."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

from common import checkpoint
from common.errors import UserError
from training import environment, run_directory


@pytest.fixture
def run(tmp_path):
    directory = run_directory.RunDir.create(tmp_path / "run", {"arguments": {"lr": 0.1}})
    yield directory
    directory.close()


def row(epoch, loss=0.5):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": loss, "test_acc": None}


def test_names_tell_the_run_and_never_collide(tmp_path):
    first = run_directory.new_path(tmp_path, "cifar10", "timm/resnet18", "try", 3)
    assert (
        first.name.startswith("cifar10-timm_resnet18-try-s3-") and len(first.name.split("-")) == 6
    )
    first.mkdir()
    second = run_directory.new_path(tmp_path, "cifar10", "timm/resnet18", "try", 3)
    assert second != first and not second.exists()


def test_rows_come_back_by_name_with_empty_cells(run):
    run.log(row(1, 1 / 3))
    run.log(row(2))
    rows = run.rows()
    assert [r["epoch"] for r in rows] == ["1", "2"] and rows[0]["test_acc"] == ""
    assert float(rows[0]["train_loss"]) == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.parametrize(
    "torn", ["3,30,0.", "3,30,0.25,1"]
)  # the second lacks only the rest of a number
def test_a_torn_last_line_is_left_out_and_mended(run, torn):
    run.log(row(1))
    run.log(row(2))
    with open(run.metrics_path, "a") as file:
        file.write(torn)
    assert [r["epoch"] for r in run.rows()] == ["1", "2"]
    run.keep_rows(2)
    run.log(row(3))
    assert [r["epoch"] for r in run.rows()] == ["1", "2", "3"]


def test_rows_that_the_checkpoint_does_not_know_are_dropped(run):
    for epoch in (1, 2, 3):
        run.log(row(epoch))
    run.keep_rows(1)
    run.log(row(2, 0.7))
    assert [(r["epoch"], r["train_loss"]) for r in run.rows()] == [("1", "0.5"), ("2", "0.7")]


def test_keeping_no_row_starts_a_new_file(run):
    run.log(row(1))
    run.keep_rows(0)
    run.log({"epoch": 1, "step": 1, "other": 2})
    assert run.rows() == [{"epoch": "1", "step": "1", "other": "2"}]


@pytest.mark.parametrize("name", run_directory.FILES)
def test_a_directory_that_holds_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=f"{name}.*--resume"):
        run_directory.RunDir.create(tmp_path, {})
    assert (tmp_path / name).read_text() == "x"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run_directory.RunDir.create(tmp_path / "file", {})
    with pytest.raises(UserError, match="can't be made"):
        run_directory.RunDir.create(tmp_path / "file" / "below", {})


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(run):
    (run.path / "last.pt").write_text("x")
    with pytest.raises(UserError, match="another process"):
        run_directory.RunDir.open(run.path)
    run.close()
    code = f"import os, rundir; directory = rundir.RunDir.open({str(run.path)!r}); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    run_directory.RunDir.open(run.path).close()


def test_of_two_that_begin_at_once_the_second_finds_the_first_one_s_run(tmp_path, monkeypatch):
    """Even when the first one was done between the second one's look and its lock."""
    real, looks = run_directory.refuse_if_taken, []

    def look(path):
        looks.append(1)
        if len(looks) == 2:  # after the second process has looked for the first time
            (tmp_path / "run" / "config.json").write_text("the first one's")
        return real(path)

    monkeypatch.setattr(run_directory, "refuse_if_taken", look)
    with pytest.raises(UserError, match="holds a run already"):
        run_directory.RunDir.create(tmp_path / "run", {})
    assert (tmp_path / "run" / "config.json").read_text() == "the first one's"
    run_directory.RunDir(tmp_path / "run").close()  # the lock was given back


def test_leftovers_of_a_killed_save_are_cleared(run):
    (run.path / "last.pt").write_text("x")
    (run.path / ".last.pt.tmp").write_text("half")
    run.close()
    run_directory.RunDir.open(run.path).close()
    assert not (run.path / ".last.pt.tmp").exists()


def test_a_place_without_a_run_is_no_place_to_go_on(tmp_path):
    with pytest.raises(UserError, match="no run"):
        run_directory.RunDir.open(tmp_path)
    with pytest.raises(UserError, match="no such run"):
        run_directory.resolve_run(tmp_path / "nothing")


# ---- saving in the background ----------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Stops each save before its file is renamed, until the event is set; and a list of the paths that came so far."""
    opened, came, real = threading.Event(), [], checkpoint.verify

    def verify(path, expected):
        came.append(path)
        assert opened.wait(60)
        real(path, expected)

    monkeypatch.setattr(checkpoint, "verify", verify)
    yield opened, came
    opened.set()  # whatever a test found, its thread ends


def test_a_save_holds_the_state_of_its_call_while_training_continues(run, gate):
    opened, _ = gate
    weights, progress = torch.zeros(3), {"epoch": 1}
    run.end_epoch(row(1), {"w": weights, "progress": progress}, lambda last: {"w": last["w"]})
    weights.add_(1)
    progress["epoch"] = 2
    assert not (run.path / "last.pt").exists()  # so the call returned before the file was written
    opened.set()
    run.wait()
    for name in ("last.pt", "best.pt"):
        assert checkpoint.load(run.path / name)["w"].sum() == 0
    assert checkpoint.load(run.path / "last.pt")["progress"] == {"epoch": 1}
    assert [r["epoch"] for r in run.rows()] == ["1"]


def test_at_most_one_save_is_under_way(run, gate):
    opened, came = gate
    run.end_epoch(row(1), {"epoch": 1})
    second = threading.Thread(target=run.end_epoch, args=(row(2), {"epoch": 2}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and len(came) <= 1
    opened.set()
    second.join(60)
    run.wait()
    assert checkpoint.load(run.path / "last.pt") == {"epoch": 2} and len(came) == 2
    assert checkpoint.load(run.path / "previous.pt") == {"epoch": 1}


@pytest.mark.parametrize("then", ["end_epoch", "wait", "save_last"])
def test_a_save_that_failed_is_reported_by_the_next_call(run, monkeypatch, then):
    run.save_last({"epoch": 0})

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify", fail)
        run.end_epoch(row(1), {"epoch": 1})
        with pytest.raises(UserError, match=r"last\.pt could not be written .*No space left"):
            {
                "end_epoch": lambda: run.end_epoch(row(2), {"epoch": 2}),
                "wait": run.wait,
                "save_last": lambda: run.save_last({"epoch": 1}),
            }[then]()
    assert checkpoint.load(run.path / "last.pt") == {"epoch": 0}
    run.wait()  # it is reported once


def test_the_environment_says_what_a_run_was_made_on():
    found = environment.environment(torch.device("cpu"))
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "torchvision", "timm", "cuda", "device", "git", "command", "threads"} <= set(
        found
    )
    json.dumps(found)


def test_arguments_are_read_from_a_run_or_a_flat_file(run, tmp_path):
    assert (
        run_directory.load_config(run.path)
        == run_directory.load_config(run.path / "config.json")
        == ({"lr": 0.1}, {})
    )
    (tmp_path / "flat.json").write_text('{"lr": 0.2}')
    assert run_directory.load_config(tmp_path / "flat.json") == ({"lr": 0.2}, {})


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"arguments": 3}', "\xff"])
def test_a_file_that_holds_no_arguments_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin1")
    with pytest.raises(UserError, match="a.json"):
        run_directory.load_config(tmp_path / "a.json")
