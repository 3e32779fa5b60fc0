"""What the suites of sweep.py run, and what they would cost."""

import argparse
import math
import re

import pytest
import torch
from helpers.sweeps import TINY

from common.errors import UserError
from sweeps import campaign, estimate, plans, suites
from training.checks import check_arguments
from training.distributed import Ranks

# ---- suites --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suites.SUITES)
def test_a_suite_names_existing_models_and_its_own_experiments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = suites.SUITES[name]
    for _, experiment, baseline in suite.comparisons():
        assert experiment != baseline and {experiment, baseline} <= set(suite.experiments)
    runs = plans.plan(name, {}, [0, 1], None)
    assert len({run.path for run in runs}) == 2 * len(suite.experiments)
    path = rf"runs/sweep-{name}-cifar100?/[\w-]+-s[01]"
    assert all(re.fullmatch(path, str(run.path)) for run in runs)
    of_a_seed = runs[: len(suite.experiments)]
    assert len({str(vars(run.args)) for run in of_a_seed}) == len(suite.experiments)
    for run in of_a_seed:
        check_arguments(run.args, None, Ranks(torch.device("cpu")))


def test_a_file_replaces_published_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"weights": "vit.safetensors", "epochs": 2}
    runs = plans.plan("vit-pretraining", given, [0], None)
    with_file = "--weights vit.safetensors"
    labels = [run.label for run in runs if with_file in " ".join(run.start_command)]
    assert labels == ["vit_tiny-pretrained"]
    assert not any("--pretrained" in run.start_command for run in runs)
    assert all(run.start_command[1].endswith("train_vit.py") for run in runs)
    assert all(run.args.weights for run in plans.plan("resolution", given, [0], None))


@pytest.mark.parametrize("name", ["pretraining", "degradation"])  # two models, and none
def test_a_file_for_several_models_is_refused(name):
    with pytest.raises(UserError, match="--weights: the suite"):
        plans.plan(name, {"weights": "x"}, [0], None)


def test_options_override_all_but_what_a_suite_compares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": "ResNet20", "lr": 0.1, "epochs": 2}
    for run in plans.plan("augmentation", given, [0], None):
        assert (run.args.model, run.args.lr, run.args.epochs) == ("resnet20", 0.1, 2)
    given = {"lora_rank": 8, "micro_batch": None, "pretrained": False}
    only = ["eva_giant"]
    (run,) = plans.plan("sota", given, [0], None, only)
    assert (run.label, run.args.lora_rank, run.args.pretrained) == ("eva_giant", 8, False)
    assert run.start_command[1].endswith("train_sota.py") and "--no-pretrained" in run.command


# ---- whether a run is the planned one ------------------------------------------------------------


def test_a_micro_batch_that_the_run_chose_is_no_difference():
    saved = {"micro_batch": 16, "accumulate": 8}
    origin = {"micro_batch": "auto", "accumulate": "--micro-batch"}
    config = {"arguments": saved, "from": origin}
    args = argparse.Namespace(micro_batch=None, accumulate=1, dataset="shapes", origin={})
    assert plans.differences(args, config, {}) == []
    args.micro_batch = 0
    assert plans.differences(args, config, {}) == ["--micro-batch is 16 there, not 0"]


def test_a_run_of_an_earlier_version_had_the_defaults():
    config, origin = {"arguments": {"lr": 1}}, {"lookahead": "command line"}
    args = argparse.Namespace(lr=1, lookahead=0, origin=origin, dataset="shapes")
    assert plans.differences(args, config, {"lookahead": 0}) == []
    args.lookahead = 5
    expected = ["--lookahead is 0 there, not 5"]
    assert plans.differences(args, config, {"lookahead": 0}) == expected


# ---- what they cost ------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """tiny_run(epochs=2, ...) -> the first run of the suite TINY."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    given = {"device": "cpu", "amp": "off", "limit_train": 640, "batch_size": 64, "limit_test": 99}
    return lambda **options: plans.plan("tiny", given | options, [0], None)[0]


def test_the_cost_follows_from_steps_and_evaluations(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "time_steps", lambda args, classes, ranks, dtype, n: (n, n / 4))
    # 2 epochs of 10 batches of 64 images, and two evaluations of 99 images with and without EMA.
    assert estimate.cost(tiny_run(epochs=2).args) == (2 * 640 + 2 * 2 * 99 / 4, 1)
    # A batch of 64 of the 610 images that are left is dropped; 30 images are evaluated once.
    options = dict(epochs=2, val_size=30, ema_decay=0.0, eval_every=2, eval_train=True)
    assert estimate.cost(tiny_run(**options).args) == (2 * 576 + (30 + 610) / 4, 1)
    # The first half of the steps has a quarter of the pixels.
    options = dict(epochs=2, progressive="16:0,32:0.5", ema_decay=0.0)
    assert estimate.cost(tiny_run(**options).args) == (1280 * (1 + 0.25) / 2 + 2 * 99 / 4, 1)
    estimate.print_plan([tiny_run(epochs=2)], num_slots=1)
    assert capsys.readouterr().out.endswith("together about 0:22:59 with 1 at a time\n")


def test_the_steps_of_an_estimate_are_those_of_a_run(tiny_run, monkeypatch):
    """Of a part of a batch: 8 of 64 images. Two images are tried first."""
    timed, train_epoch = [], estimate.train_epoch

    def timed_epoch(state, batches, step):
        timed.append((state, batches, step))
        return train_epoch(state, batches, step)

    monkeypatch.setattr(estimate, "train_epoch", timed_epoch)
    monkeypatch.setattr(estimate, "SECONDS", 100)
    options = dict(optimizer="adam", mixup=0.3, cutmix=0.7, mix_prob=0.9, augment="crop,flip")
    options |= dict(clip_grad=0.6, label_smoothing=0.2, accumulate=8, amp="bf16", ema_decay=0.9)
    seconds, speed = estimate.cost(tiny_run(**options).args)
    assert seconds > 0 and speed > 0
    assert [batches.batch_size for _, batches, _ in timed] == [2, 2, 8, 8]
    for state, batches, step in timed:
        pipeline = batches.pipeline
        assert isinstance(state.optimizer, torch.optim.Adam) and state.average
        assert (step.clip_grad, step.accumulate, step.dtype) == (0.6, 1, torch.bfloat16)
        assert step.loss_fn.keywords == {"label_smoothing": 0.2}
        assert (pipeline.mixup_alpha, pipeline.cutmix_alpha) == (0.3, 0.7)
        assert (pipeline.mix_probability, pipeline.transforms) == (0.9, ("crop", "flip"))
        assert all(group["lr"] > 0 for group in state.optimizer.param_groups)


def test_a_model_that_starts_from_images_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    run = campaign.plan("airbench94", campaign.Options(tmp_path, tmp_path, {}, {"device": "cpu"}))[
        0
    ]
    threads = torch.get_num_threads()
    assert 0 < campaign.measured_speed(run, {"OMP_NUM_THREADS": "1"}) < math.inf
    assert torch.get_num_threads() == threads and capsys.readouterr().err == ""
    monkeypatch.setattr(estimate, "available", lambda device: 10**6)
    assert campaign.measured_speed(run, {}) == math.inf
    assert "no estimate (it needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("free", "options", "message"),
    [
        (10**6, {}, "it needs .* GB with 64 at once, and 0.001 GB are free"),
        (10**12, {"dataset": "folder", "data_dir": "nowhere"}, "no folder nowhere"),
        (10**12, {"image_size": 8, "cutout": 9}, "--cutout 9 must be less than the image"),
    ],
)
def test_an_estimate_says_what_can_not_run_here(
    tiny_run, monkeypatch, capsys, free, options, message
):
    monkeypatch.setattr(estimate, "available", lambda device: free)
    estimate.print_plan([tiny_run(**options)], num_slots=1)
    out = capsys.readouterr().out
    assert re.search(f"# +no estimate: .*{message}", out) and "without project" in out
