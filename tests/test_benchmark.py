"""The benchmark compares like with like and prints ratios; what it measures is the machine's affair, not a test's."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import models
from augment import Pipeline


def test_both_sides_deliver_the_same_kind_of_batches():
    examples = benchmark.random_examples(300)
    theirs = benchmark.PilDataset(examples, jitter=True)
    image, label = theirs[3]
    inputs, _ = Pipeline(benchmark.MEAN, benchmark.STD, 32)(examples.images[3:4], examples.labels[3:4])
    assert image.shape == inputs.shape[1:] and image.dtype == inputs.dtype and label == examples.labels[3]


def test_things_are_measured_in_turn():
    order = []
    seconds = benchmark.in_turn(benchmark.torch.device("cpu"), 2, a=lambda: order.append("a"), b=lambda: order.append("b"))
    assert order == ["a", "b"] * 3 and [len(v) for v in seconds.values()] == [2, 2]


def test_data_and_epoch_print_ratios(capsys):
    small = ["--images", "256", "--rounds", "1", "--workers", "0", "--device", "cpu"]
    assert benchmark.main(["data", *small]) == 0
    assert len(re.findall(r"DataLoader .* takes [\d.]+ \(", capsys.readouterr().out)) == 2
    assert benchmark.main(["epoch", *small, "--model", "resnet20", "--image-size", "40"]) == 0
    text = capsys.readouterr().out
    assert "bare forward" in text and "plain loop" in text and "times as long as the bare steps" in text


def test_saves_are_timed_against_an_epoch(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "resnet20", "--images", "256", "--batch-size", "8", "--rounds", "1", "--device", "cpu"]
    assert benchmark.main(["checkpoint", *arguments]) == 0
    text = capsys.readouterr().out
    assert re.search(r"last.pt 3 MB, saved with best.pt in \d+ .* % of an epoch of 256 images .*32 times", text)
    assert "times the file" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", benchmark.TWINS)
def test_a_twin_is_the_same_architecture(name):
    def size_and_work(build):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = build(name, 100).eval()
            assert network(torch.empty(2, 3, 32, 32)).shape == (2, 100)
        return sum(p.numel() for p in network.parameters()), counter.get_total_flops()

    assert size_and_work(benchmark.timm_twin) == size_and_work(models.create_model)


def test_twins_are_timed_in_turn(capsys):
    assert benchmark.main(["twins", "--models", "resnet20", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]) == 0
    assert re.search(r"resnet20 .* \d\.\d\d \(", capsys.readouterr().out)
