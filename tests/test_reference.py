"""Which commits compute the same: by their files, else by short reference runs."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile

import pytest
from helpers.errors import refused
from helpers.paths import ROOT

import train
from sweeps import reference
from training import environment
from training.arguments import resolve


def test_a_reference_run_is_a_short_one_of_the_runs_own_arguments():
    given = dict(model="airbench95", tta="flip", model_arg=["a=1", "b=2"], epochs=20, data_dir="x")
    command = reference.short_training("train.py", given | {"pretrained": True, "val_size": 5})
    script, *options = shlex.split(command)
    args, _ = resolve(train.build_parser(), options)
    assert script == "train.py" and (args.model, args.tta) == ("airbench95", "flip")
    assert (args.epochs, args.dataset, args.model_arg) == (2, "shapes", ["a=1", "b=2"])
    assert args.warmup_epochs > 0 and args.ema_decay > 0  # what long runs have is compared, too
    assert (args.lookahead, args.optimizer, args.val_size) == (5, "sgd", 0)  # of its recipe
    assert not args.pretrained and args.data_dir == "data"


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
    training = reference.short_training("train.py", {"model": "airbench94", "tta": "flip"})
    digest = reference.digest(commit, training)
    assert re.fullmatch("[0-9a-f]{64}", digest) and reference.digest(commit, training) == digest
    smoothed = reference.short_training("train.py", {"model": "airbench94", "label_smoothing": 0.1})
    assert reference.digest(commit, f"{smoothed} --tta flip") != digest
    with refused("git:"):
        reference.digest("no-such-commit", training)
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
