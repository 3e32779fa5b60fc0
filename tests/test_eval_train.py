"""--eval-train: the reported weights are also evaluated on the images that trained."""

import argparse
import signal

import pytest
import torch
from helpers.batches import random_examples
from helpers.faults import send
from helpers.runs import CNN, RUN, TINY, VIT, rows, summary, words
from helpers.training import CPU, evaluate_checkpoint, fix_accuracies

import data
from datasets.examples import Split
from datasets.pipeline import Pipeline
from training.distributed import Ranks
from training.inputs import Inputs

CLEAN = ("train_clean_acc", "train_clean_top5", "train_clean_loss")


@pytest.mark.parametrize("resident", ["auto", "host"])
def test_the_training_images_come_once_and_as_they_are(resident):
    examples = random_examples(101)
    split = Split("random", examples, None, examples, tuple("abcdefghij"))
    args = argparse.Namespace(image_size=32, freeze_backbone=False)
    inputs = Inputs(args, split, ((0.5,) * 3, (0.25,) * 3), Ranks(CPU), None, images_at_once=40)
    pipeline = Pipeline((0.5,) * 3, (0.25,) * 3, 32, ("crop", "alternating_flip"), mixup_alpha=1.0)
    options = {"resident": resident, "repeats": 2}
    batches = list(inputs.without_augmentation(data.Batches(examples, 16, pipeline, **options)))
    images, labels = map(torch.cat, zip(*batches))
    torch.testing.assert_close(images, (examples.images / 255 - 0.5) / 0.25)
    assert torch.equal(labels, examples.labels) and len(batches) == 3


def on_training_images(path, **options):
    """{column: value} of weights in a checkpoint, on shapes without augmentation."""
    split = data.load("shapes", limit_train=96, limit_test=50, **options)
    metrics = evaluate_checkpoint(path, split.train)
    return {f"train_clean_{name}": value for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("val_size", [0, 10])
def test_the_result_is_that_of_the_reported_weights(train, monkeypatch, capsys, val_size):
    fix_accuracies(monkeypatch, [20.0, 30.0, 10.0])
    options = (*RUN, *CNN, "--val-size", val_size, "--amp", "off")
    plain = train(*options, output="plain")
    run = train(*options, "--eval-train", output="run")
    accuracy = summary(run)["train_clean_acc"]
    assert f", {accuracy:.2f} % of the training images  " in capsys.readouterr().out
    assert set(summary(run)) - set(summary(plain)) == set(CLEAN) and rows(run) == rows(plain)
    assert not val_size or summary(run)["best_epoch"] == 2
    weights = run / ("best.pt" if val_size else "last.pt")
    expected = on_training_images(weights, val_size=val_size)
    assert {name: summary(run)[name] for name in CLEAN} == pytest.approx(expected, rel=1e-5)
    train("--resume", run)
    assert f"{accuracy:.2f} % of the training images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_frozen_backbone_is_evaluated_on_its_features(train):
    first = train(*TINY, *CNN, *words("--device cpu --epochs 1 --amp off"), output="first")
    frozen = f"--device cpu --epochs 2 --amp off --weights {first} --freeze-backbone --eval-train"
    run = train(*TINY, *CNN, *words(frozen), "--augment", "none", output="run")
    expected = on_training_images(run / "last.pt")
    assert {name: summary(run)[name] for name in CLEAN} == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_it_is_exact_on_several_ranks_and_after_an_interruption(forks, tmp_path):
    one, three, cut = tmp_path / "one", tmp_path / "three", tmp_path / "cut"
    start = words("--device cpu --epochs 1 --amp off --lr 0 --ema-decay 0 --batch-size 36")
    start = (*TINY, *VIT, *start, "--eval-train", "--output-dir")
    forks.run(*start, one)
    forks.run_ranks(3, *start, three)
    done = forks.run(*start, cut, faults=[(send, "test", signal.SIGTERM)])
    assert done.returncode == 143 and "train_clean_acc" not in summary(cut)
    forks.resume(cut)
    for run in (three, cut):
        assert [summary(run)[name] for name in CLEAN] == pytest.approx(
            [summary(one)[name] for name in CLEAN]
        )
