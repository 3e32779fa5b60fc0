"""Which commits compute the same: by their files, else by short reference runs."""

import os
import re
import shutil
import subprocess
import tempfile

import pytest
import torch
from helpers.errors import refused
from helpers.paths import ROOT
from helpers.runs import words
from helpers.training import resolve

import train
import train_sota
import train_vit
from sweeps import reference
from training import environment
from training.arguments import record
from training.checks import check_arguments
from training.distributed import Ranks

ONE = Ranks(torch.device("cpu"))


def config_of(script, *argv, precision="float32", automatic=None):
    """What config.json says of a run of a script with these arguments. automatic: see record."""
    args = resolve(script, *argv)
    check_arguments(args, None, ONE)
    arguments, origin = record(args, automatic or {})
    return {"arguments": arguments, "from": origin, "precision": precision}


def short_args(script, config, tmp_path):
    """The arguments that the short run of a config.json computes with."""
    name, text = reference.short_run(f"{script.__name__}.py", config).split(" ", 1)
    assert name == f"{script.__name__}.py"
    (tmp_path / "reference.json").write_text(text)
    args = resolve(script, "--config", tmp_path / "reference.json")
    check_arguments(args, None, ONE)
    return args


def test_a_reference_run_is_a_short_one_of_the_runs_own_arguments(tmp_path):
    options = "--model airbench95 --epochs 20 --lookahead 3 --data-dir x --val-size 50"
    automatic = {"accumulate": 2}
    config = config_of(train, *words(options), precision="bfloat16", automatic=automatic)
    args = short_args(train, config, tmp_path)
    assert (args.model, args.epochs, args.dataset, args.amp) == ("airbench95", 2, "shapes", "bf16")
    assert args.warmup_epochs > 0 and args.ema_decay > 0  # what long runs have is compared, too
    assert (args.lookahead, args.optimizer, args.val_size) == (3, "sgd", 0)
    assert args.accumulate == 2  # as on the machine of the run
    assert (args.progressive, args.data_dir) == (config["arguments"]["progressive"], "data")


TIMM = "--model timm/resnet18 --pretrained --image-size 224"


@pytest.mark.parametrize(
    ("script", "options", "kept"),
    [
        (train, "--amp bf16", {"amp": "off"}),  # the precision is the one that was computed in
        (train, "--batch-size 96 --repeated-augment 3", {"repeated_augment": 2}),
        (train, "--repeated-augment 4", {"repeated_augment": 4}),
        (train, "--crop-pixels 31", {"crop_pixels": 31}),
        (train, "--crop-pixels 32", {"crop_pixels": 1}),
        (train, "--accumulate 32", {"accumulate": 1}),
        (train, "--accumulate 16", {"accumulate": 16}),
        (train, "--lookahead 200", {"lookahead": 4}),
        (train, "--schedule one_cycle --final-lr 0.1", {"final_lr": 0.1}),
        (train, "--augment none", {"augment": "none", "mixup": 0}),
        (train, "--no-nesterov --mixup 0", {"nesterov": False, "mixup": 0}),
        (train, f"{TIMM} --cutout 40 --mix-prob 0.3", {"cutout": 40, "image_size": 224}),
        (train, f"{TIMM} --progressive 128,224", {"progressive": "128,224"}),
        (train_vit, "--pretrained", {"model": "vit_tiny", "image_size": 224, "layer_decay": 0.75}),
        (train_sota, "--model vit_tiny --epochs 9", {"micro_batch": 0, "epochs": 2}),
    ],
    ids=str,
)
def test_a_reference_run_takes_the_options_of_any_run(tmp_path, script, options, kept):
    config = config_of(script, *words(options))
    args = short_args(script, config, tmp_path)
    assert {name: getattr(args, name) for name in kept} == kept
    assert not args.pretrained


def require_git():
    if not shutil.which("git"):
        pytest.skip("no git")


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git("add", …) in a new repository in tmp_path; returns its output."""
    require_git()
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@x"]
        return subprocess.run(
            [*command, *words], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    git("init", "-q")
    return git


@pytest.mark.parametrize("path", ["docs/x.md", "sweep.py", "tests/x.py", "sweeps/x.py"])
def test_commits_with_the_same_training_code_are_the_same(git, tmp_path, monkeypatch, path):
    assert same_code_after_change(git, tmp_path, monkeypatch, path)


@pytest.mark.parametrize(
    "path",
    [
        *("train.py", "train_vit.py", "data.py", "requirements.txt"),
        *("common/x.py", "datasets/x.py", "models/x.py", "training/x.py"),
    ],
)
def test_commits_with_other_training_code_are_not_the_same(git, tmp_path, monkeypatch, path):
    assert not same_code_after_change(git, tmp_path, monkeypatch, path)


def same_code_after_change(git, root, monkeypatch, path):
    monkeypatch.setattr(reference, "REPOSITORY", root)
    commits = []
    for text in ("1\n", "2\n"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", "a change")
        commits.append(git("rev-parse", "HEAD").strip())
    assert reference.same_code([commits[0], commits[0]])
    return reference.same_code(commits)


@pytest.mark.slow
def test_the_reference_run_of_a_commit_leaves_no_worktree(tmp_path, monkeypatch):
    require_git()
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git repository")
    commit = head.stdout.strip()  # HEAD may move meanwhile
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the worktrees are

    def short_run(*options):
        return reference.short_run("train.py", config_of(train, "--model", "airbench94", *options))

    digest = reference.digest(commit, short_run("--tta", "flip"))
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert reference.digest(commit, short_run("--tta", "flip")) == digest
    assert reference.digest(commit, short_run("--tta", "flip", "--label-smoothing", 0.1)) != digest
    with refused("git:"):
        reference.digest("no-such-commit", short_run())
    assert str(tmp_path) not in reference._git("worktree", "list")
    assert reference.agree([commit, commit])["compared"] == "the same code"


def test_published_results_may_change_between_runs_but_no_code(git, tmp_path, monkeypatch):
    for name in ("results", "docs", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1\n")
    (tmp_path / "README.md").write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "training/environment.py"))
    (tmp_path / "README.md").write_text("2\n")
    for name in ("results", "docs"):
        (tmp_path / name / "file").write_text("2\n")
    assert not environment.git_state()["dirty"]
    (tmp_path / "training/file").write_text("2\n")
    assert environment.git_state()["dirty"]
