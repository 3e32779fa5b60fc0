"""Whether two commits compute the same: their files, else short runs of each.

    short_runs = {short_run("train.py", config)}    # config: of a run's config.json
    agree(["2b6c3bb…", "f866e08…"], short_runs)     # {"commits": […], "compared": "…"}

A short run has the arguments of a run, also those of its recipe, and computes in bf16 if the run
did, else in fp32. It takes eight steps, with warmup and moving average, from fresh weights on
generated images on the CPU, in a temporary git worktree of each commit. Compared are the weights,
their moving average, metrics.csv without its clocks, and the accuracies and losses of the final
test. How images and weights are read from files, frozen backbones and held-out images are not
compared.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import checkpoint, files
from common.errors import UserError, first_line
from common.scopes import with_scope
from datasets import shapes

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = {
    **dict(dataset="shapes", limit_train=128, limit_test=64, batch_size=32, seed=0),
    **dict(epochs=2, warmup_epochs=1.0, ema_decay=0.9),
    **dict(lr=1e-3),  # small, for it was chosen for another batch
    **dict(device="cpu", deterministic=True),
}
# What a short run on other images can't have, or doesn't need.
WITHOUT = {
    *("val_size", "patience", "eval_every", "skip_bad_images"),
    *("weights", "pretrained", "freeze_backbone", "fsdp", "micro_batch", "compile"),
    *with_scope("location", "call"),
}
CODE = ("train*.py", "data.py", "common", "datasets", "models", "training", "requirements.txt")
CLOCKS = ("epoch_seconds", "eval_seconds", "total_seconds", "images_per_second", "peak_memory_mb")


def short_run(script, config):
    """The short run for a run with this config.json: the script and its arguments as JSON."""
    origin = config.get("from", {})
    derived = ("default", "auto", "--micro-batch")  # the defaults are those of each commit
    arguments = config["arguments"]
    kept = {name: value for name, value in arguments.items() if origin.get(name) not in derived}
    whatever_origin = ("model", "image_size", "accumulate")
    kept |= {name: arguments[name] for name in whatever_origin if arguments.get(name) is not None}
    kept = {name: value for name, value in kept.items() if name not in WITHOUT}
    images = SHORT["batch_size"]
    if (kept.get("accumulate") or 1) > images // 2:  # batch norm needs two images
        del kept["accumulate"]
    if images % kept.get("repeated_augment", 1):
        kept["repeated_augment"] = 2
    if kept.get("crop_pixels", 0) >= shapes.SIZE:
        kept["crop_pixels"] = 1
    if kept.get("lookahead", 0) > 4:  # it has to come twice in eight steps
        kept["lookahead"] = 4
    if script == "train_sota.py":  # else it follows from the memory that is free
        kept["micro_batch"] = 0
    kept["amp"] = "bf16" if config.get("precision") == "bfloat16" else "off"
    return f"{script} {json.dumps(kept | SHORT)}"


def agree(commits, short_runs=()):
    """What experiment.json says about commits that compute the same. Raises UserError.

    short_runs: are compared where the code differs.
    """
    if same_code(commits):
        return {"commits": commits, "compared": "the same code"}
    names = ", ".join(commit[:12] for commit in commits)
    if not short_runs:
        hint = "--reference compares short runs of each"
        raise UserError(f"the runs are of different commits, {names}: {hint}", status=2)
    sha = hashlib.sha256()
    for short in sorted(short_runs):
        digests = {digest(commit, short) for commit in commits}
        if len(digests) > 1:
            raise UserError(f"{names} have different results with {short}", status=2)
        sha.update(digests.pop().encode())
    equal = "short runs of each on generated images give equal results"
    return {"commits": commits, "compared": f"{equal}, digest {sha.hexdigest()[:12]}"}


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


def digest(commit, short_run):
    """SHA-256 of the result of a short run at a commit. Raises UserError."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            return _run(tree, commit, short_run)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _run(tree, commit, short_run):
    script, arguments = short_run.split(" ", 1)
    (tree / "reference.json").write_text(arguments, encoding="utf-8")
    options = ["--config", "reference.json", "--output-dir", "reference-run"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, *options],
        cwd=tree,
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1]
        raise UserError(f"the short run of commit {commit[:12]} failed: {reason}", status=2)
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
