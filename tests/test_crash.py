"""After a power cut at any moment a run resumes from a state that it was in, with the rows of metrics.csv that belong to it."""

import hashlib
import shutil

import crashes
import pytest
import torch

from common import checkpoint
from common.errors import UserError
from training import run_directory


def contents(epoch, best=0):
    """Contents of a last.pt, as small as they can be."""
    training = {"progress": {"epoch": epoch, "batch": 0}, "best": {"epoch": best}}
    return {
        "training": training,
        "weights": torch.full((4,), float(epoch)),
        "card": {},
        "ema": None,
    }


def row(epoch):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch}


def best_of(last):
    return {"metric": {"epoch": last["training"]["progress"]["epoch"]}}


@pytest.fixture
def no_events(monkeypatch):
    monkeypatch.setattr(run_directory.RunDir, "events", Silent())


@pytest.fixture
def recorded(tmp_path, monkeypatch, no_events):
    """(operations, [(how many there were when a save had ended, its epoch)]) of a run of four epochs, resumed after two."""
    with monkeypatch.context() as patch:
        return record(crashes.Recorder(patch), tmp_path / "run")


def record(recorder, directory):
    saved = []

    def note(epoch):
        saved.append((len(recorder.operations), epoch))

    run = run_directory.RunDir.create(directory, {"arguments": {}})
    run.save_last(contents(0))
    note(0)
    for epoch, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        run.end_epoch(row(epoch), contents(epoch, best), best_of if best == epoch else None)
        run.wait()
        note(epoch)
        if epoch == 2:  # interrupted and resumed
            run.write_summary("interrupted")
            run.close()
            run = run_directory.RunDir.open(directory)
            run.keep_rows(2)
            run.note_resumed({"arguments": {}}, epoch=3)
    run.write_summary("finished", test_acc=50.0)
    run.close()
    return recorder.operations, saved


class Silent:
    """Stands in for TensorBoard's writer."""

    def add_scalar(self, *args): ...

    def flush(self): ...

    def close(self): ...


def check(directory, at_least):
    """Resumes what a crash left, where a save of the epoch `at_least` had ended, and trains one epoch more."""
    try:
        state, _ = run_directory.load_last(directory)
    except UserError:
        assert (
            at_least is None and not (directory / "last.pt").exists()
        )  # nothing had been promised
        return
    epoch, best = state["training"]["progress"]["epoch"], state["training"]["best"]["epoch"]
    assert checkpoint.digest(state) == checkpoint.digest(contents(epoch, best))
    assert at_least is None or epoch >= at_least
    if (directory / "previous.pt").exists():
        assert checkpoint.load(directory / "previous.pt")["training"]["progress"]["epoch"] <= epoch
    if 0 < best < epoch:  # that of this epoch is made anew, see resume.open_directory
        assert checkpoint.load(directory / "best.pt")["metric"]["epoch"] in range(best, epoch + 2)
    run = run_directory.RunDir.open(directory)
    try:
        run.keep_rows(epoch)
        run.end_epoch(row(epoch + 1), contents(epoch + 1))
        run.wait()
        assert [(r["epoch"], r["train_loss"]) for r in run.rows()] == [
            (str(k), f"{1 / k:.6g}") for k in range(1, epoch + 2)
        ]
        assert not list(directory.glob(".*.tmp"))
    finally:
        run.close()


@pytest.mark.slow
def test_every_state_that_a_power_cut_can_leave_is_resumed(recorded, tmp_path):
    operations, saved = recorded
    seen, number = set(), 0
    for prefix in range(len(operations) + 1):
        at_least = max((epoch for count, epoch in saved if count <= prefix), default=None)
        for state in crashes.states(operations[:prefix]):
            number += 1
            key = (
                at_least,
                *sorted((path, hashlib.sha256(data).digest()) for path, data in state.items()),
            )
            if key not in seen:
                seen.add(key)
                left = tmp_path / "left"
                left.mkdir()
                crashes.lay_out(state, tmp_path / "run", left)
                check(left, at_least)
                shutil.rmtree(left)
    assert number > 300 and len(seen) > 100
    print(f"{len(operations)} operations, {number} states, {len(seen)} different ones")


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_a_run_that_forgot_to_sync_would_be_found_out(recorded, tmp_path, forgotten):
    """The check itself can fail: without one kind of sync, some state loses what had been saved."""
    operations, saved = recorded
    prefix, epoch = saved[2]
    kept = [operation for operation in operations[:prefix] if operation.kind != forgotten]
    with pytest.raises((AssertionError, UserError)):
        for number, state in enumerate(crashes.states(kept)):
            left = tmp_path / f"left-{number}"
            crashes.lay_out(state, tmp_path / "run", left)
            check(left, epoch)


def test_the_record_holds_everything_that_a_run_writes(train, monkeypatch):
    """But its events and its lock, which nothing is read from."""
    recorder = crashes.Recorder(monkeypatch)
    directory = train("--epochs", 2, "--ema-decay", 0.5)
    found = {
        path: path.read_bytes()
        for path in directory.iterdir()
        if path.name != ".lock" and "tfevents" not in path.name
    }
    assert crashes.replay(recorder.operations) == found
    assert {path.name for path in found} == set(run_directory.FILES)
