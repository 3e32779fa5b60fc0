"""What each training script passes to the step loop is what its command line asked for."""

import pytest
import torch
from helpers.runs import words
from helpers.training import CPU

import train as train_script
import train_sota
import train_vit

# 12 steps: four epochs of three batches.
OPTIONS = words("--epochs 4 --label-smoothing 0.3 --clip-grad 0.7 --accumulate 4 --lookahead 2")
OPTIONS += words("--progressive 24,32 --seed 5 --amp bf16 --optimizer sgd --momentum 0.5 --lr 0.02")
OPTIONS += words("--weight-decay 0.003 --schedule constant --warmup-epochs 0 --eval-every 2")
OPTIONS += words("--deterministic --compile --ema-decay 0.7")
WITHOUT = words("--epochs 4 --label-smoothing 0 --clip-grad 0 --accumulate 1 --lookahead 0")
WITHOUT += words("--progressive none --amp off --ema-decay 0")
SCRIPTS = (train_script, train_vit, train_sota)


class Opened(Exception):
    """A run was opened with (state, curve, step)."""


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def opened(request, train, monkeypatch):
    """opened(*options) -> the state, curve and step of a run of a script, before its first step."""

    def open_run(args, split, state, curve, step, train_batches, saved):
        raise Opened(state, curve, step)

    def run(*options):
        with pytest.raises(Opened) as run:
            train(*options, script=request.param)
        return run.value.args

    monkeypatch.setattr(request.param, "open_run", open_run)
    return run


def test_options_reach_the_step_and_the_state(opened):
    state, curve, step = opened(*OPTIONS)
    assert step.loss_fn.keywords == {"label_smoothing": 0.3}
    assert (step.dtype, step.clip_grad, step.accumulate) == (torch.bfloat16, 0.7, 4)
    assert (step.seed, step.ranks.device) == (5, CPU)
    assert [step.lr_at(number) for number in (0, 11)] == [0.02, 0.02]
    assert [step.size_at(number) for number in (0, 11)] == [24, 32]
    assert (state.lookahead.every, state.lookahead.steps) == (2, 12)
    assert (state.average.decay, state.compiled, curve.every) == (0.7, True, 2)
    groups = state.optimizer.param_groups
    assert isinstance(state.optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.003, 0.0}
    assert torch.are_deterministic_algorithms_enabled()
    assert not state.scaler.is_enabled()


def test_fp16_scales_the_loss_and_tells_which_steps_it_skipped(opened):
    state, _, step = opened(*words("--amp fp16 --optimizer sgd"))
    assert step.dtype == torch.float16 and state.scaler.is_enabled()
    assert not any(group["fused"] for group in state.optimizer.param_groups)


def test_what_was_not_asked_for_stays_off(opened):
    state, curve, step = opened(*WITHOUT)
    assert step.loss_fn.keywords == {"label_smoothing": 0}
    assert (step.dtype, step.clip_grad, step.accumulate) == (None, 0, 1)
    assert (step.seed, step.size_at(0), curve.every) == (0, 0, 1)
    assert (state.lookahead, state.average, state.compiled) == (None, None, False)
    assert not torch.are_deterministic_algorithms_enabled()
