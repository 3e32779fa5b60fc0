"""The report of a checkpoint: its results, its files and its figure."""

import json

import pytest
import torch
from helpers.samples import write_checkpoint

import show_example
from datasets import shapes
from show import assess, corruptions


def test_classification_results_equal_those_by_hand():
    """Four images with confidence 0.9, 0.9, 0.6 and 0.6, of which the last is wrong."""
    p = torch.tensor([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.6, 0.4, 0], [0.6, 0.4, 0]])
    logits = p.clamp(min=1e-9).log()
    result = assess.classification(logits, torch.tensor([0, 1, 0, 1]), 3)
    assert result["accuracy"] == 75 and result["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert result["by_class"] == [100, 50, None] and result["top5"] == 100
    assert result["calibration_error"] == pytest.approx(10, abs=1e-3)
    assert [(each["images"], each["accuracy"]) for each in result["bins"]] == [(2, 50), (2, 100)]


def test_bins_hold_every_image_once_and_give_the_calibration_error():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 10), torch.randint(0, 10, (500,))
    result = assess.classification(logits, labels, 10)
    gaps = [b["images"] * abs(b["confidence"] - b["accuracy"]) for b in result["bins"]]
    assert sum(each["images"] for each in result["bins"]) == 500
    assert result["calibration_error"] == pytest.approx(sum(gaps) / 500, abs=1e-3)


def test_the_surest_answers_share_a_bin():
    """100 images with confidence 1, of which 96 are right, and 100 with 0.95, of which 99 are."""
    logits = torch.tensor([[200.0, 0.0]] * 100 + [[torch.tensor(19.0).log(), 0.0]] * 100)
    labels = torch.tensor([1] * 4 + [0] * 96 + [1] + [0] * 99)
    result = assess.classification(logits, labels, 2)
    assert [each["images"] for each in result["bins"]] == [200]
    assert result["calibration_error"] == pytest.approx(0, abs=1e-4)


def test_the_report_is_written_and_reproducible(tmp_path, monkeypatch, few_shapes, capsys):
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    few = {name: corruptions.CORRUPTIONS[name] for name in ("contrast", "jpeg")}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", few)
    path = write_checkpoint(tmp_path / "run")
    command = ["--checkpoint", str(path), "--report", "--corrupted", "20", "--device", "cpu"]
    assert show_example.main(command) == 0
    printed, written = capsys.readouterr().out, (path.parent / "report.json").read_bytes()
    result = json.loads(written)
    assert f"top-1 {result['accuracy']:.2f}" in printed and "corrupted (20 images)" in printed
    assert result["images"] == sum(map(sum, result["confusion"])) == 50
    robustness = result["robustness"]
    lengths = {name: len(values) for name, values in robustness["by_corruption"].items()}
    assert robustness["images"] == 20 and lengths == {"contrast": 5, "jpeg": 5}
    assert (path.parent / "report.png").read_bytes().startswith(b"\x89PNG")
    show_example.main(command)
    assert (path.parent / "report.json").read_bytes() == written


def test_many_classes_with_long_names_are_drawn(tmp_path):
    torch.manual_seed(0)
    result = assess.classification(torch.randn(300, 100), torch.arange(300) % 100, 100)
    result["classes"] = [f"a class whose name is long {i}" for i in range(100)]
    result |= {"dataset": "x", "checkpoint": "runs/x/best.pt", "weights": "epoch 3"}
    robustness = {"mean": 1.0, "clean": 1.0, "by_corruption": {"fog": [1.0, 2, 3, 4, 5]}}
    result |= {"images": 300, "robustness": robustness | {"images": 300}}
    assess.draw(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
