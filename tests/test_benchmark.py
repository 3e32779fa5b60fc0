"""The benchmark compares like with like and prints ratios; what it measures is the machine's affair, not a test's."""

import re

import benchmark
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
    assert benchmark.main(["epoch", *small, "--model", "resnet20"]) == 0
    text = capsys.readouterr().out
    assert "bare forward" in text and "plain loop" in text and "times as long as the bare steps" in text
