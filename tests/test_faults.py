"""Nothing is lost: runs that are killed, interrupted, cut short by a full disk or by a loss that is not finite.

Each run is a process of its own (see processes.py). What is expected of it is the whole run's: the same bits.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import OPTIONS, ROOT, TINY
from processes import (
    NOT_ALLOWED,
    PHASES,
    STAGES,
    as_nobody,
    file_size_limit,
    kill_in_save,
    signal_in,
    small_disk,
    spoil_batches,
    wait_for,
    wait_in_step,
)
from test_train import same, same_state, summary, untimed

from common import checkpoint


def equal(one, other):
    """Whether two finished runs came to the same: all state of training, best.pt, each epoch's row, the test's figures."""
    best = [checkpoint.load(directory / "best.pt") for directory in (one, other)]
    tests = [
        (summary(directory)["status"], summary(directory)["test_acc"]) for directory in (one, other)
    ]
    return (
        same_state(one, other)
        and same(*best)
        and untimed(one) == untimed(other)
        and tests[0] == tests[1]
    )


def position(directory):
    return checkpoint.load(directory / "last.pt")["training"]["progress"]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def go_on(forks, directory, *arguments, **options):
    done = forks.run("--resume", directory, "--device", "cpu", *arguments, **options)
    assert done.returncode == 0, done.err
    assert not list(directory.glob(".*.tmp"))
    return done


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_killed_inside_a_save_there_is_the_old_file_or_the_new_one(forks, whole, tmp_path, stage):
    cut = tmp_path / "cut"
    done = forks.run(*OPTIONS, "--output-dir", cut, faults=[kill_in_save(3, stage)])
    assert done.returncode == -signal.SIGKILL
    assert position(cut)["epoch"] == (2 if stage == "renamed" else 1)
    assert bool(list(cut.glob(".*.tmp"))) == (stage != "renamed")
    go_on(forks, cut)
    assert equal(whole, cut)


def test_killed_before_the_first_save_there_is_nothing_to_lose_and_the_way_on_is_said(
    forks, whole, tmp_path
):
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[kill_in_save(1, "written")])
    assert not (cut / "last.pt").exists()
    refused = forks.run("--resume", cut)
    assert refused.returncode == 2 and f"--config {cut}/config.json starts it anew" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert (
        forks.run("--config", cut / "config.json", "--output-dir", tmp_path / "anew").returncode
        == 0
    )
    assert untimed(whole) == untimed(tmp_path / "anew")
    ours, theirs = (
        checkpoint.load(directory / "last.pt") for directory in (whole, tmp_path / "anew")
    )
    assert same(ours["state_dict"], theirs["state_dict"]) and same(ours["ema"], theirs["ema"])


# ---- stopped and gone on with, in another process -------------------------------------------------------------------


FEATURES = {
    "MixUp, accumulation, SGD, warmup": (
        "--mixup",
        0.4,
        "--cutmix",
        0,
        "--mix-prob",
        1,
        "--accumulate",
        3,
        "--warmup-epochs",
        2,
    ),
    "AdamW, held-out split": (
        "--optimizer",
        "adamw",
        "--val-size",
        12,
        "--batch-size",
        28,
        "--schedule",
        "linear",
    ),
    "Muon, CutMix, clipping": (
        "--optimizer",
        "muon",
        "--cutmix",
        1,
        "--mixup",
        0,
        "--clip-grad",
        1,
    ),
    "drop-path, random erasing": (
        "--model",
        "vit_custom",
        "--model-arg",
        "width=24",
        "--model-arg",
        "depth=3",
        "--model-arg",
        "heads=2",
        "--drop-path",
        0.5,
        "--optimizer",
        "adamw",
        "--random-erasing",
        0.5,
    ),
    "fp16, other augmentation": (
        "--amp",
        "fp16",
        "--augment",
        "trivial_augment,flip",
        "--cutout",
        8,
        "--eval-every",
        2,
    ),
    "no average, one cycle": (
        "--ema-decay",
        0,
        "--schedule",
        "one_cycle",
        "--optimizer",
        "adam",
        "--label-smoothing",
        0.1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_a_run_that_goes_on_in_another_process_is_the_uninterrupted_one(forks, tmp_path, name):
    options = (*TINY, "--device", "cpu", "--epochs", 3, "--ema-decay", 0.8, *FEATURES[name])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forks.run(*options, "--output-dir", whole).returncode == 0
    stopped = forks.run(
        *options, "--output-dir", cut, faults=[signal_in("training", signal.SIGTERM)]
    )
    assert (
        stopped.returncode == 143 and 0 < position(cut)["step"] < 9 and position(cut)["batch"] > 0
    )
    go_on(forks, cut)
    assert equal(whole, cut)


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_and_says_one_line(forks, whole, tmp_path, phase, number):
    cut = tmp_path / "cut"
    done = forks.run(*OPTIONS, "--output-dir", cut, faults=[signal_in(phase, number)])
    assert (done.returncode, done.err) == (128 + number, "")
    *before, last = done.out.splitlines()
    assert last.startswith("interrupted in epoch") and last.endswith(f"--resume {cut}")
    assert (
        len(before) == 1 + position(cut)["epoch"]
    )  # what the run prints anyway: its first line, and one an epoch
    stopped = {
        "first batch": [1],
        "training": [5],
        "evaluation": [3],
        "saving": range(4, 10),
        "test": [9],
    }[phase]
    assert position(cut)["step"] in stopped  # training goes on while a save is under way
    assert (summary(cut)["status"], summary(cut)["signal"]) == ("interrupted", number)
    go_on(forks, cut)
    assert equal(whole, cut)


@pytest.mark.parametrize("phase", ["training", "saving"])
def test_a_second_signal_ends_the_run_at_once(forks, whole, tmp_path, phase):
    cut = tmp_path / "cut"
    done = forks.run(
        *OPTIONS, "--output-dir", cut, faults=[signal_in(phase, signal.SIGINT, signal.SIGTERM)]
    )
    assert done.returncode == -signal.SIGTERM and done.err == "" and "interrupted" not in done.out
    assert (
        position(cut)["epoch"] == (1 if phase == "training" else 0)
        and not (cut / "summary.json").exists()
    )
    go_on(forks, cut)
    assert equal(whole, cut)


@pytest.mark.parametrize(
    "words",
    [
        "train.py",
        "train_vit.py",
        "train_sota.py",
        "sweep.py eca",
        "benchmark.py data",
        "show_example.py --checkpoint x",
    ],
)
def test_ctrl_c_while_torch_is_being_imported_is_one_line(tmp_path, words):
    """A torch that takes long, and is interrupted."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(300)\n"
    )
    name, *words = words.split()
    done = subprocess.run(
        [sys.executable, ROOT / name, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith("interrupted\n")


# ---- a disk that takes no more ---------------------------------------------------------------------------------------


def one_error(done, *says, status=1):
    assert done.returncode == status and len(done.err.splitlines()) == 1, done.err
    assert all(part in done.err for part in says), done.err


def test_a_save_beyond_the_limit_of_file_sizes_is_told_and_leaves_the_old_file(
    forks, whole, tmp_path
):
    """The first save, before there is any momentum, fits; that of the first epoch doesn't."""
    cut, size = tmp_path / "cut", (whole / "last.pt").stat().st_size
    done = forks.run(*OPTIONS, "--output-dir", cut, faults=[file_size_limit(size * 9 // 10)])
    one_error(done, f"{cut}/last.pt could not be written", "the file before it is untouched")
    assert position(cut)["step"] == 0 and not list(cut.glob(".*.tmp"))
    assert summary(cut)["status"] == "failed" and "could not be written" in summary(cut)["reason"]
    go_on(forks, cut)
    assert equal(whole, cut)


@pytest.mark.parametrize("megabytes", [3, 5])
def test_a_full_disk_is_told_and_leaves_the_old_file(forks, whole, tmp_path, megabytes):
    (tmp_path / "disk").mkdir()
    done = forks.run(
        *OPTIONS,
        "--output-dir",
        tmp_path / "disk" / "cut",
        faults=[small_disk(tmp_path / "disk", megabytes, tmp_path / "copy")],
    )
    if done.returncode == NOT_ALLOWED:
        pytest.skip("no file system can be mounted here")
    one_error(done, "could not be written", "o space left")
    cut = tmp_path / "copy" / "cut"
    assert position(cut)["step"] == 0 and not list(cut.glob(".*.tmp"))
    go_on(forks, cut)
    assert equal(whole, cut)


@pytest.fixture
def locked_place(whole):
    """A directory with a copy of a run, in which a user without privileges can write nothing."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(whole, place / "run")
    (place / "run" / "summary.json").unlink()
    modes = {path: path.stat().st_mode for path in [place, *place.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield place
    for path, mode in modes.items():
        path.chmod(mode)
    shutil.rmtree(place)


def test_a_directory_that_can_not_be_written_is_told_and_left_alone(forks, locked_place):
    user = [as_nobody()] if os.geteuid() == 0 else []
    before = files(locked_place / "run")
    one_error(
        forks.run(*OPTIONS, "--output-dir", locked_place / "new", faults=user),
        "can't be made",
        "Permission denied",
    )
    one_error(
        forks.run("--resume", locked_place / "run", "--device", "cpu", faults=user),
        "Permission denied",
    )
    assert files(locked_place / "run") == before and not (locked_place / "new").exists()


# ---- a last.pt that is damaged ---------------------------------------------------------------------------------------


def damage(path, how):
    """Cuts a file to a length (a part of it, or bytes left out at the end), or turns one bit at a place."""
    kind, place = how
    raw = bytearray(path.read_bytes())
    at = int(place * len(raw)) if isinstance(place, float) else place
    if kind == "cut":
        raw = raw[:at]
    elif kind == "bit":
        raw[at] ^= 1
    path.unlink()  # its other names keep what they have
    if kind != "gone":
        path.write_bytes(raw)


DAMAGE = [
    ("cut", 0),
    ("cut", 1),
    ("cut", 1000),
    ("cut", 0.5),
    ("cut", 0.99),
    ("cut", -1),
    ("bit", 0.1),
    ("bit", 0.3),
    ("bit", 0.5),
    ("bit", 0.7),
    ("bit", 0.9),
    ("gone", 0),
]


@pytest.mark.parametrize("how", DAMAGE, ids=lambda how: f"{how[0]} {how[1]}")
def test_a_damaged_last_checkpoint_is_refused_and_the_way_out_is_named(forks, copy, how):
    damage(copy / "last.pt", how)
    before = files(copy)
    refused = forks.run("--resume", copy)
    one_error(refused, "last.pt", "--resume-previous", status=2 if how[0] == "gone" else 1)
    assert files(copy) == before


@pytest.mark.parametrize("how", [("cut", 0.5), ("bit", 0.5), ("gone", 0)], ids=lambda how: how[0])
def test_the_previous_checkpoint_leads_to_the_same_bits_where_the_user_says_so(
    forks, whole, copy, how
):
    damage(copy / "last.pt", how)
    done = go_on(forks, copy, "--resume-previous")
    assert (
        "last.pt is damaged: going on from previous.pt" in done.err
        and "from epoch 3, step 7" in done.out
    )
    assert equal(whole, copy)
    assert json.loads((copy / "config.json").read_text())["arguments"]["resume_previous"] is True
    assert "finished already" in go_on(forks, copy).out


def test_a_whole_last_checkpoint_comes_before_the_previous_one(forks, whole, tmp_path):
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[signal_in("test", signal.SIGTERM)])
    done = go_on(forks, cut, "--resume-previous")
    assert done.err == "" and "from epoch 4, step 10" in done.out and equal(whole, cut)


def test_a_kill_after_going_back_finds_a_whole_file_too(forks, whole, copy):
    """The damaged last.pt must not become the previous one."""
    damage(copy / "last.pt", ("bit", 0.5))
    done = forks.run(
        "--resume", copy, "--device", "cpu", "--resume-previous", faults=[kill_in_save(1, "kept")]
    )
    assert done.returncode == -signal.SIGKILL
    assert (
        position(copy)["epoch"]
        == checkpoint.load(copy / "previous.pt")["training"]["progress"]["epoch"]
        == 2
    )
    go_on(forks, copy)
    assert equal(whole, copy)


def test_where_both_are_damaged_both_are_refused(forks, copy):
    for name in ("last.pt", "previous.pt"):
        damage(copy / name, ("bit", 0.5))
    one_error(forks.run("--resume", copy), "last.pt is damaged")
    one_error(forks.run("--resume", copy, "--resume-previous"), "previous.pt is damaged")
    one_error(
        forks.run(*OPTIONS, "--resume-previous"), "--resume-previous goes with --resume", status=2
    )


# ---- figures that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "faults", "says", "epochs"),
    [
        ((), [spoil_batches("nan", 5)], "at step 5 (epoch 2) with learning rate", 1),
        ((), [spoil_batches("inf", 5)], "at step 5 (epoch 2) with learning rate", 1),
        (
            ("--lr", 1e9, "--warmup-epochs", 0, "--schedule", "constant"),
            [],
            "(epoch 1) with learning rate 1e+09",
            0,
        ),
        (
            ("--amp", "fp16", "--batch-size", 4),
            [spoil_batches("inf", 22)],
            "20 steps in a row overflowed fp16 at step 41",
            1,
        ),
    ],
    ids=["NaN in the input", "infinite logits", "a rate of 1e9", "fp16"],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    forks, tmp_path, arguments, faults, says, epochs
):
    cut = tmp_path / "cut"
    done = forks.run(*OPTIONS, *arguments, "--output-dir", cut, faults=faults)
    one_error(done, says, "stopped", "last.pt is the last good one")
    assert summary(cut)["status"] == "failed" and "learning rate" in summary(cut)["reason"]
    state = checkpoint.load(cut / "last.pt")
    tensors = [*state["state_dict"].values(), *state["ema"]["average"].values()]
    tensors += [
        value
        for each in state["training"]["optimizer"]["state"].values()
        for value in each.values()
    ]
    assert all(value.isfinite().all() for value in tensors if hasattr(value, "isfinite"))
    assert position(cut)["batch"] == 0 and position(cut)["epoch"] == epochs == (
        len(untimed(cut)) if epochs else 0
    )


def test_after_a_loss_that_was_not_finite_a_run_goes_on_to_the_same_bits(forks, whole, tmp_path):
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[spoil_batches("nan", 5)])
    go_on(forks, cut)
    assert equal(whole, cut)


# ---- two at one directory --------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_the_first_goes_on(forks, whole, tmp_path):
    run, sign, until = tmp_path / "run", tmp_path / "sign", tmp_path / "until"
    first = forks.start(*OPTIONS, "--output-dir", run, faults=[wait_in_step(5, sign, until)])
    wait_for(sign)
    before = files(run)
    one_error(forks.run("--resume", run, "--device", "cpu"), "is being written by another process")
    one_error(forks.run(*OPTIONS, "--output-dir", run), "holds a run already", status=2)
    assert files(run) == before
    until.touch()
    assert first.wait().returncode == 0 and equal(whole, run)


def test_a_process_that_was_killed_leaves_no_lock_in_the_way(forks, whole, tmp_path):
    run, sign = tmp_path / "run", tmp_path / "sign"
    first = forks.start(
        *OPTIONS, "--output-dir", run, faults=[wait_in_step(5, sign, tmp_path / "never")]
    )
    wait_for(sign)
    first.kill()
    assert first.wait().returncode == -signal.SIGKILL and (run / ".lock").exists()
    go_on(forks, run)
    assert equal(whole, run)
