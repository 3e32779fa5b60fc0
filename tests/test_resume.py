"""Going on: after kill -9 at twenty moments, with arguments that are refused or allowed, and what a resumed run says of itself.

Signals, the features of a run one by one and losses that are not finite stand in test_faults.py; checkpoints that go from one
kind of training to another in test_faults_files.py.
"""

import random
import signal
import time

import pytest
from conftest import TINY
from processes import TIMEOUT, tell_of
from test_faults import equal, position
from test_train import untimed

# ---- killed ----------------------------------------------------------------------------------------------------------

KILLS, EPOCHS = 20, 10


def kill_at(forks, arguments, moment, delay, sign):
    """Starts a run and kills it `delay` seconds after a moment (see tell_of); its end, which may have come before that."""
    process = forks.start(*arguments, faults=[tell_of(moment, sign)])
    end = time.monotonic() + TIMEOUT
    while not sign.exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    return process.wait()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(forks, tmp_path):
    """The moments are the opening of the directory or one of the next steps, and up to a tenth of a second more.

    A run that ends before its kill is followed by another one; only kills that cut a run short count.
    """
    options = (*TINY, "--device", "cpu", "--epochs", EPOCHS, "--ema-decay", 0.8, "--mixup", 0.4, "--val-size", 10,
               "--batch-size", 28)  # fmt: skip
    whole = tmp_path / "whole"
    assert forks.run(*options, "--output-dir", whole).returncode == 0
    draw, kills, inside, runs = random.Random(20), 0, 0, []
    while kills < KILLS:
        runs.append(tmp_path / f"cut-{len(runs)}")
        assert len(runs) <= KILLS
        arguments, status = (*options, "--output-dir", runs[-1]), None
        while status != 0 and kills < KILLS:
            moment, delay = draw.randrange(6), draw.uniform(0, 0.1)
            if not (runs[-1] / "last.pt").exists():
                moment = max(1, moment)  # from its first step on there is something to go on from
            done = kill_at(forks, arguments, moment, delay, tmp_path / f"sign-{len(runs)}-{kills}")
            status = done.returncode
            assert status in (0, -signal.SIGKILL), done.err
            if status:
                kills += 1
                there = position(runs[-1])  # whole, and every epoch that it knows has its row
                inside += 0 < there["epoch"] < EPOCHS
                known = [row["epoch"] for row in untimed(runs[-1])] if there["epoch"] else []
                assert known[: there["epoch"]] == [str(k + 1) for k in range(there["epoch"])]
                arguments = ("--resume", runs[-1], "--device", "cpu")
    assert inside >= KILLS // 2
    if status:
        assert forks.run(*arguments).returncode == 0
    for directory in runs:
        assert equal(whole, directory) and not list(directory.glob(".*.tmp"))
        assert [row["epoch"] for row in untimed(directory)] == [str(k + 1) for k in range(EPOCHS)]
