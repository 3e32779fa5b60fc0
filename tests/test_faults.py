"""Runs that are killed, interrupted, out of disk space or diverging lose nothing.

Each run is a process. After its fault it resumes and must end as the uninterrupted run did.
"""

import signal
import subprocess
import sys
import zipfile

import pytest
from helpers.errors import refused
from helpers.faults import (
    PHASES,
    STAGES,
    announce,
    file_size_limit,
    full_disk,
    kill_in_save,
    send,
    spoil_loss,
)
from helpers.paths import ROOT
from helpers.processes import assert_one_error, wait_until
from helpers.runs import (
    OPTIONS,
    arguments,
    assert_same_run,
    files,
    last,
    progress,
    rows,
    same,
    summary,
)
from helpers.training import fix_accuracies

from common import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def run_with(forks, tmp_path):
    """run_with(*faults) -> (the ended process, the run's directory)"""

    def run(*faults, options=()):
        directory = tmp_path / "cut"
        return forks.run(*OPTIONS, *options, "--output-dir", directory, faults=faults), directory

    return run


# ---- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_resumes(run_with, forks, uninterrupted, phase):
    done, cut = run_with((send, phase, signal.SIGKILL))
    assert done.returncode == -signal.SIGKILL
    forks.resume(cut)
    assert_same_run(cut, uninterrupted)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_a_save_has_the_old_or_the_new_file(run_with, forks, uninterrupted, stage):
    done, cut = run_with((kill_in_save, 3, stage))
    assert done.returncode == -signal.SIGKILL
    assert progress(cut)["epoch"] == (2 if stage == "renamed" else 1)
    assert bool(list(cut.glob(".*.tmp"))) == (stage != "renamed")
    forks.resume(cut)
    assert_same_run(cut, uninterrupted)


def test_a_run_killed_before_its_first_save_starts_again(run_with, forks, uninterrupted, tmp_path):
    _, cut = run_with((kill_in_save, 1, "written"))
    assert not (cut / "last.pt").exists()
    command = f"--config {cut}/config.json starts it again"
    assert_one_error(forks.run("--resume", cut), command, status=2)
    again = tmp_path / "again"
    assert forks.run("--config", cut / "config.json", "--output-dir", again).returncode == 0
    assert rows(again) == rows(uninterrupted)
    for part in ("state_dict", "ema"):
        assert same(last(again)[part], last(uninterrupted)[part])


def test_a_directory_has_one_writer_until_that_is_killed(forks, uninterrupted, tmp_path):
    run, sign = tmp_path / "run", tmp_path / "sign"
    waiting = (announce, 2, sign, tmp_path / "never")
    first = forks.start(*OPTIONS, "--output-dir", run, faults=[waiting])
    wait_until(sign.exists)
    before = files(run)
    second = forks.run("--resume", run, "--device", "cpu")
    assert_one_error(second, "is being written by another process")
    second = forks.run(*OPTIONS, "--output-dir", run)
    assert_one_error(second, "holds a run already", status=2)
    assert files(run) == before
    first.kill()
    assert first.wait().returncode == -signal.SIGKILL
    forks.resume(run)
    assert_same_run(run, uninterrupted)


# ---- interrupted ---------------------------------------------------------------------------------


STEPS = {"first step": [1], "training": [5], "evaluation": [3], "saving": range(4, 10), "test": [9]}


@pytest.mark.parametrize(
    ("phase", "number"), list(zip(PHASES, 3 * [signal.SIGTERM, signal.SIGINT])), ids=PHASES
)
def test_a_signal_in_any_phase_saves_the_state(run_with, forks, uninterrupted, phase, number):
    done, cut = run_with((send, phase, number))
    assert (done.returncode, done.err) == (128 + number, "")
    *lines, final = done.out.splitlines()
    assert final.startswith("interrupted in epoch") and final.endswith(f"--resume {cut}")
    assert len(lines) == 1 + progress(cut)["epoch"]
    assert progress(cut)["step"] in STEPS[phase]
    assert summary(cut)["status"] == "interrupted" and summary(cut)["signal"] == number
    forks.resume(cut)
    assert_same_run(cut, uninterrupted)


@pytest.mark.parametrize("phase", ["training", "saving"])
def test_a_second_signal_ends_a_run_at_once(run_with, forks, uninterrupted, phase):
    done, cut = run_with((send, phase, signal.SIGINT, signal.SIGTERM))
    assert (done.returncode, done.err) == (-signal.SIGTERM, "") and "interrupted" not in done.out
    assert progress(cut)["batch"] == 0 and not (cut / "summary.json").exists()
    forks.resume(cut)
    assert_same_run(cut, uninterrupted)


@pytest.mark.parametrize(
    ("launched", "numbers", "status"),
    [
        (False, (signal.SIGINT, signal.SIGTERM), -signal.SIGTERM),
        (True, (signal.SIGTERM, signal.SIGINT, *4 * [signal.SIGTERM]), 0),
        (True, (signal.SIGTERM, *2 * [signal.SIGINT]), -signal.SIGINT),
    ],
)
def test_only_a_second_ctrl_c_ends_a_rank_at_once(launched, numbers, status):
    """torchrun repeats SIGTERM, which ends a process without torchrun at the second one."""
    code = (
        "import os; from training.terminal import StopSignal\n"
        f"with StopSignal(launched={launched}) as stop:\n"
        f"    for number in {[int(number) for number in numbers]}: os.kill(os.getpid(), number)\n"
        f"os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
        f"assert stop() and stop.number == {int(numbers[0])}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr


# ---- files that can't be written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"), [(full_disk, "o space left"), (file_size_limit, "File too large")]
)
def test_a_failed_save_leaves_the_old_file(run_with, forks, uninterrupted, fault, reason):
    """The first save has no momentum yet and fits."""
    limit = (uninterrupted / "last.pt").stat().st_size * 9 // 10
    done, cut = run_with((fault, limit))
    message = f"{cut}/last.pt could not be written"
    assert_one_error(done, message, reason, "the previous file is unchanged")
    assert progress(cut)["step"] == 0 and not list(cut.glob(".*.tmp"))
    assert summary(cut)["status"] == "failed"
    forks.resume(cut)
    assert_same_run(cut, uninterrupted)


def test_a_failed_save_of_an_interrupted_run_is_recorded(run_with, uninterrupted):
    limit = (uninterrupted / "last.pt").stat().st_size * 9 // 10
    done, cut = run_with((send, "first step", signal.SIGTERM), (full_disk, limit))
    assert_one_error(done, f"{cut}/last.pt could not be written", "o space left")
    assert progress(cut)["step"] == 0 and summary(cut)["status"] == "failed"


def test_a_directory_without_permissions_is_left_alone(train, copy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with refused(tmp_path / "file" / "run", "can't be created", "Not a directory"):
        train("--output-dir", tmp_path / "file" / "run")
    (copy / "summary.json").unlink()
    before = files(copy)

    def denied(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("common.files.open_file", denied)
    with pytest.raises(PermissionError):
        train("--resume", copy)
    assert files(copy) == before


# ---- damaged checkpoints -------------------------------------------------------------------------


def damage(path, how):
    """Cuts a checkpoint, flips one of its bits, or removes it."""
    contents = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensors = [record for record in archive.infolist() if "/data/" in record.filename]
    path.unlink()  # other names of the file keep its contents
    # Within the largest tensor: nothing reads the padding between the tensors.
    largest = max(tensors, key=lambda record: record.file_size)
    middle = largest.header_offset + largest.file_size * 3 // 4
    contents[middle] ^= 1
    if how != "removed":
        path.write_bytes(contents[:middle] if how == "cut" else contents)


@pytest.mark.parametrize("how", ["cut", "bit", "removed"])
def test_a_damaged_checkpoint_is_replaced_on_request_only(train, uninterrupted, copy, how, capsys):
    damage(copy / "last.pt", how)
    before = files(copy)
    with refused(copy, "last.pt", "--resume-previous"):
        train("--resume", copy)
    assert files(copy) == before
    train("--resume", copy, "--resume-previous")
    printed = capsys.readouterr()
    assert "last.pt is damaged: resuming from previous.pt" in printed.err
    assert "from epoch 3, step 7" in printed.out
    assert_same_run(copy, uninterrupted)
    assert arguments(copy)["resume_previous"] is True
    before = files(copy)
    train("--resume", copy)
    assert f"{copy} is already finished: test accuracy" in capsys.readouterr().out
    assert files(copy) == before


def test_an_intact_checkpoint_is_used_before_the_previous_one(train, uninterrupted, capsys):
    cut = train(*OPTIONS, stop_after=9)
    train("--resume", cut, "--resume-previous")
    printed = capsys.readouterr()
    assert printed.err == "" and "from epoch 3, step 10" in printed.out
    assert_same_run(cut, uninterrupted)


@pytest.mark.parametrize(("number", "stage"), [(1, "half written"), (1, "kept"), (2, "kept")])
def test_a_kill_after_going_back_leaves_a_good_file(forks, uninterrupted, copy, number, stage):
    """The damaged last.pt must not become previous.pt."""
    damage(copy / "last.pt", "bit")
    words = ("--resume", copy, "--device", "cpu", "--resume-previous")
    done = forks.run(*words, faults=[(kill_in_save, number, stage)])
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.load(copy / "previous.pt")["training"]["progress"]["epoch"] == 2
    forks.resume(copy, "--resume-previous")
    assert_same_run(copy, uninterrupted)


@pytest.mark.slow
def test_the_best_weights_are_tested_after_going_back(train, monkeypatch):
    """Also where the last epoch, trained again, is not as good as it was: on another device."""
    accuracies = [20.0, 10.0, 30.0]
    fix_accuracies(monkeypatch, accuracies)
    directory = train(*OPTIONS)
    best = checkpoint.load(directory / "best.pt")
    damage(directory / "last.pt", "cut")
    accuracies[2] = 15.0
    train("--resume", directory, "--resume-previous")
    ended = summary(directory)
    assert (ended["status"], ended["best_epoch"]) == ("finished", 3)
    assert same(checkpoint.load(directory / "best.pt"), best) and len(rows(directory)) == 3


def test_two_damaged_checkpoints_are_both_refused(train, copy):
    for name in ("last.pt", "previous.pt"):
        damage(copy / name, "bit")
    with refused("", "last.pt is damaged"):
        train("--resume", copy)
    with refused("", "previous.pt is damaged"):
        train("--resume", copy, "--resume-previous")


# ---- losses that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault", "message", "epochs"),
    [
        ("", (spoil_loss, "nan", 5), "at step 5 (epoch 2) with learning rate", 1),
        ("", (spoil_loss, "inf", 5), "at step 5 (epoch 2) with learning rate", 1),
        ("--lr 1e9 --warmup-epochs 0", None, "(epoch 1) with learning rate", 0),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    run_with, forks, uninterrupted, options, fault, message, epochs
):
    done, cut = run_with(*[fault] if fault else [], options=options.split())
    assert_one_error(done, message, "stopped", "last.pt is the last good state")
    assert summary(cut)["status"] == "failed" and "learning rate" in summary(cut)["reason"]
    state, position = last(cut), progress(cut)
    tensors = [*state["state_dict"].values(), *state["ema"]["average"].values()]
    for values in state["training"]["optimizer"]["state"].values():
        tensors += [value for value in values.values() if hasattr(value, "isfinite")]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert (position["batch"], position["epoch"]) == (0, epochs)
    if not options:
        forks.resume(cut)
        assert_same_run(cut, uninterrupted)
