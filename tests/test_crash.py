"""After a power cut at any moment, a run resumes from a saved state and its rows of metrics.csv."""

import hashlib
import shutil
from unittest import mock

import pytest
import torch
from helpers import crashes

from common import checkpoint, files
from common.errors import UserError
from training import run_directory


def contents(epoch, best=0):
    """The smallest possible contents of last.pt."""
    training = {"progress": {"epoch": epoch, "batch": 0}, "best": {"epoch": best}}
    weights = torch.full((4,), float(epoch))
    return {"training": training, "weights": weights, "card": {}, "ema": None}


def row(epoch):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch}


def best_of(last):
    return {"metric": {"epoch": last["training"]["progress"]["epoch"]}}


def test_the_names_of_a_run_directory_and_of_its_parents_are_synced(tmp_path, monkeypatch):
    synced, sync = [], files.sync_directory
    monkeypatch.setattr(files, "sync_directory", lambda path: (synced.append(path), sync(path)))
    run_directory.RunDir.create(tmp_path / "a" / "b", {"arguments": {}}).close()
    assert synced.index(tmp_path) < synced.index(tmp_path / "a")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The operations of a run of four epochs, resumed after two, and what was saved when.

    Returns (operations, [(number of operations when a save had ended, epoch of the save)]).
    """
    monkeypatch.setattr(run_directory.RunDir, "events", mock.Mock())  # TensorBoard's writer
    with monkeypatch.context() as patch:
        return record(crashes.Recorder(patch).operations, tmp_path / "run")


def record(operations, directory):
    run = run_directory.RunDir.create(directory, {"arguments": {}})
    run.save_last(contents(0))
    saved = [(len(operations), 0)]
    for epoch, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        run.end_epoch(row(epoch), contents(epoch, best), best_of if best == epoch else None)
        run.wait()
        saved.append((len(operations), epoch))
        if epoch == 2:  # interrupted and resumed
            run.write_summary("interrupted")
            run.close()
            run = run_directory.RunDir.open(directory)
            run.keep_rows(2)
            run.note_resumed({"arguments": {}}, epoch=3)
    run.write_summary("finished", test_acc=50.0)
    run.close()
    return operations, saved


def check(directory, saved):
    """Resumes what a crash left, and trains an epoch. saved: the epoch of the last ended save."""
    try:
        state, _ = run_directory.load_last(directory)
    except UserError:
        assert saved is None and not (directory / "last.pt").exists()
        return
    epoch, best = state["training"]["progress"]["epoch"], state["training"]["best"]["epoch"]
    assert checkpoint.digest(state) == checkpoint.digest(contents(epoch, best))
    assert saved is None or epoch >= saved
    if (directory / "previous.pt").exists():
        assert checkpoint.load(directory / "previous.pt")["training"]["progress"]["epoch"] <= epoch
    if 0 < best < epoch:  # a resume writes the best.pt of this epoch again
        assert checkpoint.load(directory / "best.pt")["metric"]["epoch"] in range(best, epoch + 2)
    run = run_directory.RunDir.open(directory)
    try:
        run.keep_rows(epoch)
        run.end_epoch(row(epoch + 1), contents(epoch + 1))
        run.wait()
        rows = [(str(k), f"{1 / k:.6g}") for k in range(1, epoch + 2)]
        assert [(r["epoch"], r["train_loss"]) for r in run.rows()] == rows
        assert not list(directory.glob(".*.tmp"))
    finally:
        run.close()


@pytest.mark.slow
def test_every_state_that_a_power_cut_can_leave_is_resumed(recorded, tmp_path):
    operations, saves = recorded
    seen, number = set(), 0
    for prefix in range(len(operations) + 1):
        saved = max((epoch for count, epoch in saves if count <= prefix), default=None)
        for state in crashes.states(operations[:prefix]):
            number += 1
            digests = {path: hashlib.sha256(data).digest() for path, data in state.items()}
            key = (saved, *sorted(digests.items()))
            if key not in seen:
                seen.add(key)
                directory = tmp_path / "left"
                directory.mkdir()
                crashes.write_files(state, tmp_path / "run", directory)
                check(directory, saved)
                shutil.rmtree(directory)
    assert number > 300 and len(seen) > 100


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_a_run_that_forgot_to_sync_would_be_found_out(recorded, tmp_path, forgotten):
    """The check itself can fail: without one kind of sync, a crash can lose what was saved."""
    operations, saves = recorded
    prefix, saved = saves[2]
    kept = [operation for operation in operations[:prefix] if operation.kind != forgotten]
    with pytest.raises((AssertionError, UserError)):
        for number, state in enumerate(crashes.states(kept)):
            directory = tmp_path / f"left-{number}"
            crashes.write_files(state, tmp_path / "run", directory)
            check(directory, saved)


@pytest.mark.slow
def test_the_record_holds_everything_that_a_run_writes(train, monkeypatch):
    """Except its events, its log and its lock, which no resume reads."""
    recorder = crashes.Recorder(monkeypatch)
    directory = train("--epochs", 2, "--ema-decay", 0.5)
    written = {
        path: path.read_bytes()
        for path in directory.iterdir()
        if path.name not in (".lock", "log.txt") and "tfevents" not in path.name
    }
    assert crashes.replay(recorder.operations) == written
    assert {path.name for path in written} == set(run_directory.FILES)
