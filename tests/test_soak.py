"""Many kills at random moments, over random options and one to three ranks: python -m pytest -m soak -s

SOAK_KILLS sets how many (200), SOAK_SEED which. Each run is killed and resumed until it ends, and must then be bit-identical
to the same run that nobody killed.
"""

import os
import random
import signal
import time
from collections import Counter

import pytest
from conftest import TINY
from processes import TIMEOUT, tell_of
from test_faults import equal

EPOCHS, KILLS_PER_RUN = 6, 8  # then the next run, with other options
CHOICES = [
    [
        ("--optimizer", "sgd"),
        ("--optimizer", "adamw"),
        ("--optimizer", "muon"),
        ("--optimizer", "adam"),
    ],
    [("--ema-decay", 0.8), ("--ema-decay", 0)],
    [("--mixup", 0.4, "--cutmix", 1), ("--mixup", 0, "--cutmix", 0)],
    [("--accumulate", 1), ("--accumulate", 2), ("--micro-batch", 5)],
    [("--val-size", 0), ("--val-size", 20)],
    [("--amp", "off"), ("--amp", "bf16")],  # fp16 convolutions take minutes on a CPU
    [("--eval-every", 1), ("--eval-every", 2)],
    [("--clip-grad", 0), ("--clip-grad", 1)],
    [("--schedule", "cosine"), ("--schedule", "one_cycle")],
    [
        ("--model", "resnet20"),
        ("--model", "resnet20", "--model-arg", "shortcut=pad"),
        (
            "--model",
            "vit_custom",
            "--model-arg",
            "width=24",
            "--model-arg",
            "depth=2",
            "--model-arg",
            "heads=2",
            "--drop-path",
            0.3,
            "--lr",
            0.001,
        ),
    ],
]


def train_and_kill(forks, world, arguments, draw, sign):
    """Starts the ranks, kills one or all of them a little after a random step, and returns whether the run had ended before."""
    moment, delay = draw.randint(1, 8), draw.uniform(0, 0.15)
    ranks = forks.start_ranks(world, *arguments, faults=[tell_of(moment, sign)])
    end = time.monotonic() + TIMEOUT
    while not sign.exists() and ranks[0].poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
    killed = ranks if draw.random() < 0.5 else [draw.choice(ranks)]
    for rank in killed:
        rank.kill()
    ends = [rank.wait() for rank in ranks]  # the others find that one is gone, or had ended before
    assert all(done.returncode in (0, 1, -signal.SIGKILL) for done in ends), [
        done.err for done in ends
    ]
    return all(done.returncode == 0 for done in ends)


@pytest.mark.soak
def test_every_killed_run_ends_as_the_uninterrupted_one(forks, tmp_path):
    wanted, draw = (
        int(os.environ.get("SOAK_KILLS", 200)),
        random.Random(int(os.environ.get("SOAK_SEED", 0))),
    )
    kills, runs = Counter(), 0
    while kills.total() < wanted:
        world = draw.choice((1, 1, 2, 3))
        options = [word for choices in CHOICES for word in draw.choice(choices)]
        options = (
            *TINY,
            *options,
            "--batch-size",
            24,
            "--epochs",
            EPOCHS,
            "--device",
            "cpu",
            "--seed",
            runs,
        )
        whole, cut = tmp_path / f"whole-{runs}", tmp_path / f"cut-{runs}"
        for done in [
            rank.wait() for rank in forks.start_ranks(world, *options, "--output-dir", whole)
        ]:
            assert done.returncode == 0, done.err
        arguments, ended, before = (*options, "--output-dir", cut), False, kills.total()
        while not ended and kills.total() < before + KILLS_PER_RUN:
            ended = train_and_kill(
                forks, world, arguments, draw, tmp_path / f"sign-{runs}-{kills.total()}"
            )
            kills[world] += not ended
            if (cut / "last.pt").exists():
                arguments = ("--resume", cut, "--device", "cpu")
            elif not ended:  # killed before its first save: there is nothing to resume
                cut = tmp_path / f"cut-{runs}-{kills.total()}"
                arguments = (*options, "--output-dir", cut)
        for done in [] if ended else [rank.wait() for rank in forks.start_ranks(world, *arguments)]:
            assert done.returncode == 0, done.err
        assert equal(whole, cut), f"run {runs}: {world} ranks, {options}"
        assert not list(cut.glob(".*.tmp"))
        runs += 1
        print(
            f"{kills.total()} kills, {runs} runs bit-identical; kills by the number of ranks: {dict(sorted(kills.items()))}",
            flush=True,
        )
