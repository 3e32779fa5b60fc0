"""What earlier versions of this program wrote is resumed and displayed: tests/fixtures/<name>, never written again.

first_format: a run of four epochs that was interrupted in its third one (run), and the same without the interruption
(uninterrupted), by the version whose commit their config.json names.
"""

import shutil
from pathlib import Path

import pytest
import torch
from test_train import same, untimed

from analysis.metrics import read_json
from common import checkpoint

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(FIXTURES / "first_format", tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.slow
def test_an_interrupted_run_of_an_old_version_is_finished(script, old):
    done = script("train.py", "--resume", "run", cwd=old)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "from epoch 3, step 9" in done.stdout
    ours, theirs = old / "run", old / "uninterrupted"
    states = [checkpoint.load(directory / "last.pt") for directory in (ours, theirs)]
    configs, figures = (
        [read_json(d / name) for d in (ours, theirs)] for name in ("config.json", "summary.json")
    )
    if all(configs[0][key] == configs[1][key] for key in ("torch", "timm", "device", "threads")):
        for key in ("state_dict", "ema"):
            assert same(states[0][key], states[1][key])
        assert same(states[0]["training"]["optimizer"], states[1]["training"]["optimizer"])
        assert untimed(ours) == untimed(theirs)
    for name, value in states[1]["ema"][
        "average"
    ].items():  # on other machines the last bits differ
        torch.testing.assert_close(states[0]["ema"]["average"][name], value, rtol=1e-3, atol=1e-4)
    for key in ("status", "epochs", "steps", "best_epoch", "test_acc", "test_top5", "parameters"):
        assert figures[0][key] == figures[1][key], key
    assert figures[0]["seconds_to_90"] > 0


@pytest.mark.slow
def test_a_finished_run_of_an_old_version_is_known_as_finished(script, old):
    done = script("train.py", "--resume", "uninterrupted", cwd=old)
    assert done.returncode == 0 and "finished already: test accuracy 18.00 %" in done.stdout


@pytest.mark.slow
def test_runs_of_an_old_version_are_displayed(script, old):
    table = script("compare_runs.py", "run", "uninterrupted", cwd=old)
    assert table.returncode == 0 and "18.00" in table.stdout and "interrupted" in table.stdout, (
        table.stdout + table.stderr
    )
    shown = script("show_example.py", "--checkpoint", "run/best.pt", "--device", "cpu", cwd=old)
    assert shown.returncode == 0 and shown.stdout.count(" %, ") == 2 * 16, (
        shown.stdout + shown.stderr
    )
    assert (old / "run" / "examples.png").stat().st_size > 10_000
