"""Whether two commits compute the same: their files, else a short training of each.

    agree(["2b6c3bb…", "f866e08…"], with_training=True)      # {"commits": […], "compared": "…"}

The training has a few steps on generated images on the CPU. It runs in a temporary git worktree of
each commit. Compared are the weights and metrics.csv without its clocks.
"""

import csv
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import checkpoint
from common.errors import UserError, first_line

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = (
    "train.py --dataset shapes --limit-train 128 --limit-test 64 --model resnet20 --epochs 2 "
    "--batch-size 32 --device cpu --deterministic --amp off --seed 0 --output-dir reference-run"
)
CODE = ("train*.py", "data.py", "common", "datasets", "models", "training", "requirements.txt")
CLOCKS = ("epoch_seconds", "eval_seconds", "total_seconds", "images_per_second", "peak_memory_mb")


def agree(commits, with_training):
    """What experiment.json says about commits that compute the same. Raises UserError.

    with_training: compare short trainings where the code differs.
    """
    first, *others = commits
    if all(_same_code(first, other) for other in others):
        return {"commits": commits, "compared": "the same code"}
    names = ", ".join(commit[:12] for commit in commits)
    if not with_training:
        hint = "--reference compares a short training of each"
        raise UserError(f"the runs are of different commits, {names}: {hint}", status=2)
    digests = {digest(commit) for commit in commits}
    if len(digests) > 1:
        raise UserError(f"a short training of {names} has different results", status=2)
    return {"commits": commits, "compared": f"reference runs with digest {digests.pop()}"}


def _git(*arguments):
    """Output of git in this repository. Raises UserError."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise UserError(f"git: {error.strerror}", status=2) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"git: {first_line(error.stderr)}", status=2) from error


def _same_code(a, b):
    """Whether all files that training uses are the same in two commits."""
    return not _git("diff", "--name-only", a, b, "--", *CODE)


def digest(commit):
    """SHA-256 of the short training's result at a commit. Raises UserError."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            return _train(tree, commit)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _train(tree, commit):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *TRAINING.split()],
        cwd=tree,
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1]
        raise UserError(f"the short training of commit {commit[:12]} failed: {reason}", status=2)
    run, found = tree / "reference-run", hashlib.sha256()
    for name, value in checkpoint.load(run / "last.pt")["state_dict"].items():
        found.update(name.encode() + value.numpy().tobytes())
    with open(run / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            kept = [value for column, value in row.items() if column not in CLOCKS]
            found.update(",".join(kept).encode())
    return found.hexdigest()
