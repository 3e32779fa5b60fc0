"""--tta: the final test also averages over views of each image, in columns of its own."""

import signal

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import make_images
from helpers.errors import refused
from helpers.faults import send
from helpers.runs import CNN, RUN, TINY, VIT, assert_same_training, rows, summary, words
from helpers.training import (
    CPU,
    evaluate_checkpoint,
    fix_accuracies,
    network,
    ordered,
    random_images,
    resolve,
)

import data
import train as train_script
import train_sota
import train_vit
from training import checks, evaluation
from training.distributed import Ranks
from training.tta import VIEWS, flip, flip_shift


def model():
    return network(norm=True).eval()


def shifted(images, by):
    """Images moved down and to the right by `by` pixels; the border is reflected."""
    size = images.shape[-1]
    index = (torch.arange(size) - by).abs()
    index = (size - 1) - ((size - 1) - index).abs()
    return images[:, :, index][:, :, :, index]


@torch.no_grad()
def test_views_are_averaged_as_their_sources_say():
    images, net = make_images(6, 8, 8).float(), model()

    def mirrored_average(x):
        return torch.stack([net(x), net(x.flip(3))]).mean(0)

    torch.testing.assert_close(flip(net, images), mirrored_average(images))
    shifts = torch.stack([mirrored_average(shifted(images, by)) for by in (1, -1)]).mean(0)
    expected = 0.5 * mirrored_average(images) + 0.5 * shifts
    torch.testing.assert_close(flip_shift(net, images), expected)


@torch.no_grad()
@pytest.mark.parametrize("view", VIEWS)
def test_an_image_and_its_mirror_image_are_predicted_alike(view):
    images, net = make_images(6, 8, 8).float(), model()
    logits = VIEWS[view](net, images)
    alone = torch.cat([VIEWS[view](net, image) for image in images.split(1)])
    torch.testing.assert_close(logits, alone)  # no statistics of other images
    if view == "flip":
        assert torch.equal(flip(net, images.flip(3)), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert VIEWS[view](net, images).dtype == torch.float32


def test_an_evaluation_counts_every_image_once_with_the_averaged_logits():
    examples, net = random_images(101), model()
    metrics = evaluation.evaluate(net, ordered(examples, 30), predict=flip)
    ((x, y),) = ordered(examples, 101)
    logits = flip(net, x).detach()
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, y).item())
    assert metrics["acc"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("script", [train_script, train_vit, train_sota])
def test_it_is_refused_with_features_of_a_frozen_backbone(monkeypatch, script):
    monkeypatch.setattr(checks, "weights_file", lambda path: None)
    frozen = "--model resnet20 --freeze-backbone --weights x.pt --augment none --tta flip"
    with refused("--tta flip can't be used with --freeze-backbone"):
        checks.check_arguments(resolve(script, *words(frozen)), None, Ranks(CPU))


# ---- runs ----------------------------------------------------------------------------------------


def result_of(path, view):
    """{column: value} of weights in a checkpoint, on the test images of TINY."""
    test = data.load("shapes", limit_test=50).test
    metrics = evaluate_checkpoint(path, test, predict=VIEWS[view])
    return {"test_tta_acc": metrics["acc"], "test_tta_top5": metrics["top5"]}


@pytest.mark.slow
@pytest.mark.parametrize("val_size", [0, 10])
@pytest.mark.parametrize("view", VIEWS)
def test_the_result_has_columns_of_its_own_and_changes_nothing(
    train, monkeypatch, capsys, val_size, view
):
    """The weights are those of best.pt with held-out images, else those of the last epoch."""
    fix_accuracies(monkeypatch, [20.0, 30.0, 10.0])
    options = (*RUN, *CNN, "--val-size", val_size, "--amp", "off")
    plain = train(*options, output="plain")
    before = capsys.readouterr().out.splitlines()[-1]
    run = train(*options, "--tta", view, output="run")
    last_line = capsys.readouterr().out.splitlines()[-1]
    extra = {"test_tta_acc", "test_tta_top5", "test_tta_seconds"}
    assert set(summary(run)) - set(summary(plain)) == extra
    for name in ("test_acc", "test_top5", "reported", "best_epoch"):
        assert summary(run)[name] == summary(plain)[name]
    assert rows(run) == rows(plain)
    accuracy = summary(run)["test_tta_acc"]
    assert last_line == f"{before.split('  ')[0]}, {accuracy:.2f} % with --tta {view}  {run}"
    assert not val_size or summary(run)["best_epoch"] == 2
    weights = run / ("best.pt" if val_size else "last.pt")
    expected = result_of(weights, view)
    assert {name: summary(run)[name] for name in expected} == pytest.approx(expected)
    train("--resume", run)
    finished = capsys.readouterr().out
    assert "already finished" in finished and f", {accuracy:.2f} % with --tta {view}" in finished


@pytest.mark.slow
@pytest.mark.parametrize("val_size", [0, 10])
def test_a_run_interrupted_in_the_final_test_resumes(forks, tmp_path, val_size):
    expected, cut = tmp_path / "expected", tmp_path / "cut"
    options = (*RUN, *CNN, "--val-size", val_size, "--tta", "flip-shift", "--output-dir")
    assert forks.run(*options, expected).returncode == 0
    done = forks.run(*options, cut, faults=[(send, "test", signal.SIGTERM)])
    assert done.returncode == 143 and summary(cut)["status"] == "interrupted"
    forks.resume(cut)
    assert_same_training(cut, expected)
    for name in ("status", "test_acc", "test_top5", "test_tta_acc", "test_tta_top5"):
        assert summary(cut)[name] == summary(expected)[name]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--fsdp --limit-test 37 --micro-batch 0 --accumulate 12"])
def test_every_image_counts_once_on_several_ranks(forks, tmp_path, options):
    """With shards, a rank without images takes part in the forward passes of the others."""
    one, three = tmp_path / "one", tmp_path / "three"
    start = words("--device cpu --epochs 1 --amp off --lr 0 --ema-decay 0 --tta flip-shift")
    start = (*TINY, *VIT, *start, "--batch-size", 36, *words(options), "--output-dir")
    forks.run(*(word for word in start if word != "--fsdp"), one, script="train_sota")
    forks.run_ranks(3, *start, three, script="train_sota")
    for name in ("test_acc", "test_tta_acc", "test_tta_top5"):
        assert summary(three)[name] == pytest.approx(summary(one)[name])
