"""The report of a checkpoint: its figures by hand, its files, and that a figure says how many pictures it is of."""

import json

import pytest
import torch
from helpers.samples import write_checkpoint

import show_example
from datasets import shapes
from show import assess, corruptions


def test_confusion_accuracy_and_calibration_by_hand():
    """Four pictures, answered with 0.9, 0.9, 0.6 and 0.6: right, right, right and wrong."""
    p = torch.tensor([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.6, 0.4, 0], [0.6, 0.4, 0]])
    found = assess.classification(p.clamp(min=1e-9).log(), torch.tensor([0, 1, 0, 1]), 3)
    assert found["accuracy"] == 75 and found["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert found["by_class"] == [100, 50, None] and found["top5"] == 100
    assert found["calibration_error"] == pytest.approx(100 * (0.5 * 0.1 + 0.5 * 0.1), abs=1e-3)
    assert [(each["pictures"], each["accuracy"]) for each in found["bins"]] == [(2, 50), (2, 100)]


def test_bins_hold_every_picture_once_and_agree_with_the_calibration_error():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 10), torch.randint(0, 10, (500,))
    found = assess.classification(logits, labels, 10)
    assert sum(each["pictures"] for each in found["bins"]) == 500
    error = (
        sum(each["pictures"] * abs(each["confidence"] - each["accuracy"]) for each in found["bins"])
        / 500
    )
    assert found["calibration_error"] == pytest.approx(error, abs=1e-3)


def test_the_script_writes_a_figure_and_the_same_figures_as_json(
    tmp_path, monkeypatch, few_shapes, capsys
):
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    few = {name: corruptions.CORRUPTIONS[name] for name in ("contrast", "jpeg")}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", few)
    path = write_checkpoint(tmp_path / "run")
    arguments = ["--checkpoint", str(path), "--report", "--corrupted", "20", "--device", "cpu"]
    assert show_example.main(arguments) == 0
    said, found = capsys.readouterr().out, json.loads((path.parent / "report.json").read_text())
    assert f"top-1 {found['accuracy']:.2f}" in said and "corrupted (20 pictures)" in said
    assert found["pictures"] == 50 and found["robustness"]["pictures"] == 20
    assert {
        name: len(values) for name, values in found["robustness"]["by_corruption"].items()
    } == dict.fromkeys(few, 5)
    assert sum(map(sum, found["confusion"])) == 50 and (
        path.parent / "report.png"
    ).read_bytes().startswith(b"\x89PNG")
    first = (path.parent / "report.json").read_bytes()
    show_example.main(arguments)
    assert (path.parent / "report.json").read_bytes() == first


def test_many_classes_with_long_names_are_drawn(tmp_path):
    names = [f"a class whose name is long {i}" for i in range(100)]
    torch.manual_seed(0)
    found = assess.classification(torch.randn(300, 100), torch.arange(300) % 100, 100)
    tough = {
        "pictures": 300,
        "clean": 1.0,
        "mean": 1.0,
        "by_corruption": {"fog": [1.0, 2, 3, 4, 5]},
    }
    said = {"dataset": "x", "checkpoint": "runs/x/best.pt", "weights": "epoch 3"}
    assess.draw(
        {"classes": names, "pictures": 300, **said, "robustness": tough, **found},
        tmp_path / "x.png",
    )
    assert (tmp_path / "x.png").stat().st_size > 10_000
