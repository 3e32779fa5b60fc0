"""Runs of earlier versions of this program resume and are displayed.

tests/fixtures/first_format holds a run of four epochs that was interrupted in the third one (run),
and the same without the interruption, by the version whose commit their config.json names. These
files are never written again.
"""

import shutil

import pytest
import torch
from helpers.paths import ROOT
from helpers.runs import last, summary

pytestmark = pytest.mark.slow


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(ROOT / "tests/fixtures/first_format", tmp_path / "old")


def test_an_interrupted_run_of_an_old_version_is_finished(script, old):
    done = script("train.py", "--resume", "run", "--no-curves", cwd=old)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "from epoch 3, step 9" in done.stdout
    ours, expected = old / "run", old / "uninterrupted"
    states = [last(path) for path in (ours, expected)]
    for part in (
        lambda state: state["state_dict"],
        lambda state: state["ema"]["average"],
        lambda state: state["training"]["optimizer"]["state"],
    ):  # on other machines bits differ
        torch.testing.assert_close(*map(part, states), rtol=1e-3, atol=1e-4)
    for name in ("status", "epochs", "steps", "parameters"):
        assert summary(ours)[name] == summary(expected)[name], name
    assert summary(ours)["seconds_to_90"] > 0


def test_runs_of_an_old_version_are_displayed(script, old):
    done = script("train.py", "--resume", "uninterrupted", cwd=old)
    assert done.returncode == 0 and "already finished: test accuracy 18.00 %" in done.stdout
    table = script("compare_runs.py", "run", "uninterrupted", cwd=old)
    assert table.returncode == 0, table.stderr
    assert "18.00" in table.stdout and "interrupted" in table.stdout
    shown = script("show_example.py", "--checkpoint", "run/best.pt", "--device", "cpu", cwd=old)
    assert shown.returncode == 0 and shown.stdout.count(" %, ") == 2 * 16, shown.stderr
    assert (old / "run" / "examples.png").stat().st_size > 10_000
