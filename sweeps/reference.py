"""Whether two commits compute the same: their files, else short runs of each.

    trainings = {"train.py --model resnet20 …"}
    agree(["2b6c3bb…", "f866e08…"], trainings)      # {"commits": […], "compared": "…"}

A short training has a run's own arguments, but a few steps with warmup and moving average, from
fresh weights (and so with the recipe from scratch), on generated images on the CPU. It runs in a
temporary git worktree of each commit. Compared are the weights, their moving average, metrics.csv
without its clocks, and the accuracies and losses of the final test.
"""

import csv
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common import checkpoint, files
from common.errors import UserError, first_line
from common.scopes import words

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = {
    **dict(dataset="shapes", limit_train=128, limit_test=64, batch_size=32, seed=0),
    **dict(epochs=2, warmup_epochs=1.0, ema_decay=0.9),
    **dict(lr=1e-3),  # small, for it was chosen for another batch
    **dict(device="cpu", deterministic=True, amp="off", output_dir="reference-run"),
}
# What a short training on other images can't have, or doesn't need.
WITHOUT = (
    *("data_dir", "data_url", "skip_bad_images", "val_size", "patience", "eval_every", "tag"),
    *("weights", "pretrained", "freeze_backbone", "fsdp", "micro_batch"),
)
CODE = ("train*.py", "data.py", "common", "datasets", "models", "training", "requirements.txt")
CLOCKS = ("epoch_seconds", "eval_seconds", "total_seconds", "images_per_second", "peak_memory_mb")


def short_training(script, given):
    """The command of the short training for a run with these arguments."""
    kept = {name: value for name, value in given.items() if name not in WITHOUT}
    if (kept.get("accumulate") or 1) > SHORT["batch_size"] // 2:  # batch norm needs two images
        del kept["accumulate"]
    return shlex.join([script, *words(kept | SHORT)])


def agree(commits, trainings=()):
    """What experiment.json says about commits that compute the same. Raises UserError.

    trainings: commands that are compared where the code differs.
    """
    if same_code(commits):
        return {"commits": commits, "compared": "the same code"}
    names = ", ".join(commit[:12] for commit in commits)
    if not trainings:
        hint = "--reference compares short runs of each"
        raise UserError(f"the runs are of different commits, {names}: {hint}", status=2)
    sha = hashlib.sha256()
    for training in sorted(trainings):
        digests = {digest(commit, training) for commit in commits}
        if len(digests) > 1:
            raise UserError(f"{names} have different results with {training}", status=2)
        sha.update(digests.pop().encode())
    compared = f"short runs of both give equal results, digest {sha.hexdigest()[:12]}"
    return {"commits": commits, "compared": compared}


def _git(*arguments):
    """Output of git in this repository. Raises UserError."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise UserError(f"git: {error.strerror}", status=2) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"git: {first_line(error.stderr)}", status=2) from error


def same_code(commits):
    """Whether all files that training uses are the same in these commits. Raises UserError."""
    commits = list(commits)
    return not any(_git("diff", "--name-only", commits[0], b, "--", *CODE) for b in commits[1:])


def digest(commit, training):
    """SHA-256 of the result of a short training at a commit. Raises UserError."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            return _train(tree, commit, training)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _train(tree, commit, training):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *shlex.split(training)],
        cwd=tree,
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1]
        raise UserError(f"the short training of commit {commit[:12]} failed: {reason}", status=2)
    run, sha = tree / "reference-run", hashlib.sha256()
    last = checkpoint.load(run / "last.pt")
    for weights in (last["state_dict"], last["ema"]["average"]):
        for name, value in weights.items():
            sha.update(name.encode() + value.numpy().tobytes())
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kept = [value for column, value in row.items() if column not in CLOCKS]
            sha.update(",".join(kept).encode())
    for name, value in sorted(files.read_json(run / "summary.json").items()):
        if name.startswith(("test_", "train_clean_")) and not name.endswith("_seconds"):
            sha.update(f"{name} {value}".encode())
    return sha.hexdigest()
