"""Options of tiny runs, what runs leave behind, and how two runs are compared."""

import contextlib
import csv
import json
import os
import signal

import pytest
import torch

from common import checkpoint
from training.terminal import ProgressDisplay


def words(text):
    return text.split()


TINY = words("--no-curves")  # matplotlib would take longer than the run
TINY += words("--dataset shapes --limit-train 96 --limit-test 50 --batch-size 32 --model resnet20")
CNN = words("--model timm/test_resnet --model-arg channels=(4,8,8,16) --model-arg stem_width=8")
VIT = words("--model vit_custom --model-arg width=24 --model-arg depth=2 --model-arg heads=2")
# Three steps per epoch, a moving average, and a test at the end.
RUN = TINY + words("--device cpu --epochs 3 --ema-decay 0.8 --val-size 10 --batch-size 28")
OPTIONS = RUN + CNN
# A run that can be extended.
CONSTANT = words("--schedule constant --warmup-epochs 0 --ema-decay 0.8")

TIMINGS = (
    *("epoch_seconds", "eval_seconds", "total_seconds"),
    *("images_per_second", "peak_memory_mb"),
)


@contextlib.contextmanager
def stopped_after(steps):
    """A block in which this process gets a SIGTERM after that training step."""
    show = ProgressDisplay.step

    def step(self, progress, loss):
        show(self, progress, loss)
        if progress.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressDisplay, "step", step)
        yield


def read_json(path):
    return json.loads(path.read_text())


def summary(directory):
    return read_json(directory / "summary.json")


def arguments(directory):
    return read_json(directory / "config.json")["arguments"]


def last(directory):
    """The contents of last.pt."""
    return checkpoint.load(directory / "last.pt")


def progress(directory):
    return last(directory)["training"]["progress"]


def rows(directory):
    """The rows of metrics.csv, without what depends on the machine."""
    with open(directory / "metrics.csv", newline="") as file:
        return [{k: row[k] for k in row if k not in TIMINGS} for row in csv.DictReader(file)]


def files(directory):
    """{name: contents} of a run's directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def same(a, b):
    """Whether two trees of dicts, lists, tensors and builtins are bit-identical."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_weights(directory, expected):
    """The weights, their average and the optimizer's state are bit-identical."""
    ours, theirs = last(directory), last(expected)
    for part in ("state_dict", "ema"):
        assert same(ours[part], theirs[part]), part
    assert same(ours["training"]["optimizer"], theirs["training"]["optimizer"])


def assert_same_training(directory, expected):
    """Each row, the weights, their average and all other state are bit-identical."""
    assert rows(directory) == rows(expected)
    ours, theirs = _without_clocks(last(directory)), _without_clocks(last(expected))
    for part in ("card", "state_dict", "ema"):
        assert same(ours[part], theirs[part]), part
    for part in theirs["training"]:
        assert same(ours["training"][part], theirs["training"][part]), part


def assert_same_run(directory, expected):
    """assert_same_training, also of best.pt and of the result of the test."""
    assert_same_training(directory, expected)
    assert same(*(checkpoint.load(path / "best.pt") for path in (directory, expected)))
    for name in ("status", "test_acc", "test_top5", "epochs", "steps", "best_epoch"):
        assert summary(directory)[name] == summary(expected)[name]
    assert not list(directory.glob(".*.tmp"))


def _without_clocks(contents):
    """The contents of last.pt without times and without what says how the run was called."""
    training = contents["training"]
    for name in ("seconds", "total_seconds", "eval_seconds", "wall_seconds"):
        del training["progress"][name]
    training["history"] = [accuracies for _, *accuracies in training["history"]]
    for name in ("output_dir", "resume", "resume_previous", "epochs", "device", "tag"):
        training["arguments"].pop(name, None)
        training["origin"].pop(name, None)
    return contents
