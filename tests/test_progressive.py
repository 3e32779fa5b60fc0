"""--progressive: input sizes are a function of the step; evaluations use the full size."""

import signal

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.batches import channels_last, make_images, seeded
from helpers.errors import refused
from helpers.faults import send
from helpers.runs import CNN, RUN, assert_same_run, words
from helpers.training import CPU, fit, ordered, random_images, resolve, same_weights, start

import train
import train_sota
import train_vit
from training import checks, evaluation, loop, progressive, resume
from training.distributed import Ranks
from training.progressive import parse_stages, size_schedule


def sizes(text, steps):
    size_at = size_schedule(text, steps)
    return [size_at(step) for step in range(steps)]


def test_each_size_has_an_equal_share_of_the_run_or_the_given_one():
    assert sizes("24,28,32", 9) == 3 * [24] + 3 * [28] + 3 * [32]
    assert sizes("20:0,24:0.15,32:0.5", 20) == 3 * [20] + 7 * [24] + 10 * [32]
    assert sizes("32", 4) == [32] * 4 and sizes("none", 4) == [0] * 4
    for steps in (1, 2, 7):  # runs of fewer steps than sizes end at full size, too
        assert sizes("24,28,32", steps) == sorted(sizes("24,28,32", steps))
        assert sizes("24,28,32", steps)[-1] == sizes("24:0,32:0.99", steps)[-1] == 32
        assert size_schedule("24:0,28:0.33,32:0.67", 10 * steps)(10 * steps - 1) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32,24", "sizes must increase"),
        ("24,24,32", "sizes must increase"),
        ("4,32", "at least 8"),
        ("24:0,32", "a share of the run for all sizes or for none, not 24:0,32"),
        ("24:0.1,32:0.5", "must begin at 0"),
        ("24:0,28:0.5,32:0.4", "increase to less than 1"),
        ("24:0,32:1", "less than 1"),
        ("24:0,32:nan", "less than 1"),
        ("24:0:1,32:0:1", "size:share pairs"),
        ("small,32", "size:share pairs"),
        ("", "size:share pairs"),
    ],
)
def test_wrong_sizes_and_points_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(text)


FROZEN = "--freeze-backbone --weights x.pt --progressive 24,32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--progressive 24,28", "--progressive 24,28 must end at the image size, 32 px"),
        ("--progressive 24,32 --image-size 64", "must end at the image size, 64 px"),
        ("--model vit_custom --progressive 24,32", "vit_custom can't take images of 24 px"),
        ("--model coatnet_0 --progressive 16,32", "coatnet_0 can't take images of 16 px"),
        (FROZEN, "--freeze-backbone computes features once"),
    ],
)
@pytest.mark.parametrize("script", [train, train_vit, train_sota])
def test_sizes_that_a_run_cannot_use_are_refused(monkeypatch, script, options, message):
    monkeypatch.setattr(checks, "weights_file", lambda path: None)
    common = "--model resnet20 --image-size 32 --augment none"
    with refused("", message):
        checks.check_arguments(resolve(script, *words(f"{common} {options}")), None, Ranks(CPU))
    accepted = resolve(script, *words(f"{common} --progressive 24:0,28:0.33,32:0.67"))
    checks.check_arguments(accepted, None, Ranks(CPU))


def test_inputs_are_resized_with_antialiasing_image_by_image():
    images = make_images(12).float()
    small = progressive.resize(images, 20)
    expected = F.interpolate(images.contiguous(), (20, 20), mode="bilinear", antialias=True)
    torch.testing.assert_close(small, expected)
    assert channels_last(small)
    parts = [progressive.resize(part, 20) for part in images.split(5)]
    assert torch.equal(torch.cat(parts), small)  # as on several ranks
    assert progressive.resize(images, 32) is images and progressive.resize(images, 0) is images
    features = torch.rand(4, 7, generator=seeded())
    assert progressive.resize(features, 0) is features


class AnySize(nn.Module):
    """(B, 3, H, W) -> (B, 10); remembers the sizes of its inputs in training and in evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
        self.sizes = {True: [], False: []}

    def forward(self, x):
        self.sizes[self.training].append(x.shape[-1])
        return self.fc(self.conv(x).amax((2, 3)))


def reaches(state, steps):
    return lambda: state.progress.step == steps


def test_training_follows_the_schedule_and_resumes_at_any_step(monkeypatch):
    """Each epoch has three steps of images of 8 px."""
    monkeypatch.setattr(progressive, "SMALLEST", 4)
    size_at = size_schedule("5:0,6:0.4,8:0.7", 9)
    expected = start(AnySize())
    fit(expected, 3, size_at=size_at)
    assert expected.model.sizes[True] == [size_at(step) for step in range(9)]
    evaluation.evaluate(expected.model, ordered(random_images(20)))
    assert expected.model.sizes[False] == [8]
    for steps in (1, 3, 5, 7):
        state = start(AnySize())
        with pytest.raises(loop.Interrupted):
            fit(state, 3, size_at=size_at, stop=reaches(state, steps))
        fit(state, 3, size_at=size_at)
        assert same_weights(state.model, expected.model)


def test_another_number_of_epochs_may_not_change_the_sizes_so_far(tmp_path):
    argv = "--epochs 4 --schedule constant --warmup-epochs 0 --ema-decay 0 --progressive 24,32"
    args = resolve(train, *words(argv))
    args.epochs = 8
    progress = {"epoch": 2, "step": 6, "batch": 0}
    saved = {"training": {"arguments": vars(args) | {"epochs": 4}, "progress": progress}}
    saved["training"]["optimizer"] = {"param_groups": []}
    resume.check_epochs(args, saved, steps_per_epoch=3)
    progress |= {"step": 7, "batch": 1}
    with refused("--epochs 8", "with --progressive 24,32, the input sizes so far"):
        resume.check_epochs(args, saved, steps_per_epoch=3)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 5])
def test_a_run_cut_before_and_after_a_switch_resumes_bit_identically(train, steps):
    """Each epoch has three steps; the size changes after the third and the sixth."""
    options = (*RUN, *CNN, *words("--progressive 24,28,32 --augment crop,alternating_flip"))
    expected = train(*options, output="expected")
    cut = train(*options, output="cut", stop_after=steps)
    train("--resume", cut)
    assert_same_run(cut, expected)


@pytest.mark.slow
def test_a_run_on_ranks_cut_after_a_switch_resumes_bit_identically(forks, tmp_path):
    expected, cut = tmp_path / "expected", tmp_path / "cut"
    options = (*RUN, *CNN, *words("--progressive 24:0,32:0.4 --augment crop,alternating_flip"))
    forks.run_ranks(2, *options, "--output-dir", expected)
    cutting = [(send, "training", signal.SIGTERM)]
    forks.run_ranks(2, *options, "--output-dir", cut, faults=cutting, status=143)
    forks.run_ranks(2, "--resume", cut, "--device", "cpu")
    assert_same_run(cut, expected)
