"""Many kills at random moments, of random options and one to three ranks: pytest -m soak -s

SOAK_KILLS is their number (200), SOAK_SEED selects the moments. Each run is killed and resumed until
it ends, and must then be bit-identical to the same run without kills.
"""

import os
import random
import signal
import time
from collections import Counter

import pytest
from helpers.faults import announce
from helpers.processes import wait_until
from helpers.runs import CNN, TINY, VIT, assert_same_run, words

pytestmark = [pytest.mark.soak, pytest.mark.slow]

KILLS_PER_RUN = 8  # then the next run, with other options
CHOICES = [
    ("--optimizer sgd", "--optimizer adamw", "--optimizer muon", "--optimizer adam"),
    ("--ema-decay 0.8", "--ema-decay 0"),
    ("--mixup 0.4 --cutmix 1", "--mixup 0 --cutmix 0"),
    ("--accumulate 1", "--accumulate 2", "--micro-batch 5"),
    ("--val-size 0", "--val-size 20"),
    ("--amp off", "--amp bf16"),
    ("--eval-every 1", "--eval-every 2"),
    ("--clip-grad 0", "--clip-grad 1"),
    ("--schedule cosine", "--schedule one_cycle"),
    (" ".join(CNN), "--model-arg shortcut=pad", f"{' '.join(VIT)} --drop-path 0.3 --lr 0.001"),
]


def kill(forks, world, start, draw, sign):
    """Kills one or all ranks shortly after a random step; returns whether they had ended."""
    step, delay = draw.randint(1, 8), draw.uniform(0, 0.15)
    faults = [(announce, step, sign)]
    ranks = forks.start_ranks(world, *start, script="train_sota", faults=faults)
    wait_until(lambda: sign.exists() or ranks[0].poll() is not None)
    time.sleep(delay)
    for rank in ranks if draw.random() < 0.5 else [draw.choice(ranks)]:
        rank.kill()
    ends = [rank.wait() for rank in ranks]
    expected = (0, 1, -signal.SIGKILL)  # 1: another rank is gone
    assert all(done.returncode in expected for done in ends), [done.err for done in ends]
    return all(done.returncode == 0 for done in ends)


def test_every_killed_run_ends_as_the_uninterrupted_one(forks, tmp_path):
    wanted = int(os.environ.get("SOAK_KILLS", 200))
    draw = random.Random(int(os.environ.get("SOAK_SEED", 0)))
    kills, runs = Counter(), 0
    while kills.total() < wanted:
        world = draw.choice((1, 1, 2, 3))
        options = [*TINY, *words(" ".join(draw.choice(choices) for choices in CHOICES))]
        options += words(f"--batch-size 24 --epochs 6 --device cpu --seed {runs}")
        expected, cut = tmp_path / f"expected-{runs}", tmp_path / f"cut-{runs}"
        forks.run_ranks(world, *options, "--output-dir", expected, script="train_sota")
        start, ended, before = (*options, "--output-dir", cut), False, kills.total()
        while not ended and kills.total() < before + KILLS_PER_RUN:
            ended = kill(forks, world, start, draw, tmp_path / f"sign-{runs}-{kills.total()}")
            kills[world] += not ended
            if (cut / "last.pt").exists():
                start = ("--resume", cut, "--device", "cpu")
            elif not ended:  # killed before its first save: there is nothing to resume
                cut = tmp_path / f"cut-{runs}-{kills.total()}"
                start = (*options, "--output-dir", cut)
        if not ended:
            forks.run_ranks(world, *start, script="train_sota")
        assert_same_run(cut, expected)
        runs += 1
        counts = dict(sorted(kills.items()))
        print(f"{kills.total()} kills, {runs} runs; kills by ranks: {counts}", flush=True)
