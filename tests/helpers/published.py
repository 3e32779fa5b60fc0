"""Published runs as tests make them: two seeds of be and alpha, and changes of their files."""

import json
from pathlib import Path

import pytest

from helpers.samples import write_seeds
from sweeps import publish

A, B = "a" * 40, "b" * 40
COMPARISON = [("is be better?", "be", "alpha")]
PRIVATE = {"dataset": "folder", "data_dir": "/my/place/cifar10-png", "data_url": "http://host/x"}
PRIVATE |= {"output_dir": "/my/place/runs/x", "weights": "/my/place/w/best.pt"}


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two seeds of be and alpha in runs/, of one commit."""
    monkeypatch.chdir(tmp_path)
    write_seeds(Path("runs"), "be", [95.0, 96.25], lr=0.1, **PRIVATE)
    write_seeds(Path("runs"), "alpha", [90.0, 92.0], lr=0.2, **PRIVATE)
    for path in Path("runs").iterdir():
        facts = dict(git={"commit": A, "dirty": False}, device="cpu", torch="2", threads=2)
        change(path / "config.json", command="/my/place/train.py --lr 0.1", host="me", **facts)
        change(path / "config.json", precision="float32")
        change(path / "summary.json", epochs=2)
    return sorted(Path("runs").iterdir())


def put(runs, target="results/x", **options):
    publish.publish(runs, target, publish.about("a title", COMPARISON, "a command"), **options)


def snapshot(root=Path()):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
