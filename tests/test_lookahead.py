"""--lookahead: the published formula, its place in a step, and what changes the averages."""

import copy

import pytest
import torch
import torch.nn as nn
from helpers.errors import refused
from helpers.runs import words
from helpers.training import CallCounter, fit, network, resolve, same_weights, start

import train
import train_sota
from models import create_model
from training import loop, memory, resume
from training.lookahead import Lookahead


def started(every, epochs=2, **options):
    """A State with lookahead; each epoch has three steps."""
    state = start(network(norm=True), **options)
    state.lookahead = Lookahead(state.model, every, 3 * epochs)
    return state


def floats(model):
    return {name: v for name, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize(("every", "steps"), [(2, 6), (5, 12), (9, 4)])
def test_weights_follow_the_published_formula(every, steps):
    """A run of fewer steps than that stays as it is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    lookahead = Lookahead(model, every, steps)
    average = {name: value.clone() for name, value in floats(model).items()}
    for step in range(1, steps + 1):
        model(torch.randn(8, 2))
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        weights = {name: value.clone() for name, value in floats(model).items()}
        lookahead.update(step)
        decay = 0.95**every * (step / steps) ** 3
        if step % every == 0:
            average = {k: decay * average[k] + (1 - decay) * v for k, v in weights.items()}
        is_average = step % every == 0 or (step == steps and steps > every)
        expected = average if is_average else weights
        for name, value in floats(model).items():
            torch.testing.assert_close(value, expected[name], msg=f"{name}, step {step}")
    assert int(model[1].num_batches_tracked) == steps


def test_training_looks_ahead_before_the_moving_average_is_updated():
    state = started(every=2, ema_decay=0.5)
    fit(state, 2)
    expected = start(network(norm=True), ema_decay=0.5)
    lookahead, update = Lookahead(expected.model, 2, 6), expected.average.update

    def look_ahead_first():
        lookahead.update(expected.progress.step + 1)
        update()

    expected.average.update = look_ahead_first
    fit(expected, 2)
    assert same_weights(state.model, expected.model)
    assert same_weights(state.average.model, expected.average.model)
    plain = start(network(norm=True))
    fit(plain, 2)
    assert not same_weights(state.model, plain.model)


def test_parts_of_a_batch_are_one_step():
    state = started(every=2, epochs=1)
    updates, update = [], state.lookahead.update
    state.lookahead.update = lambda step: updates.append(step) or update(step)
    fit(state, accumulate=4)
    assert updates == [1, 2, 3]


def test_a_step_that_fp16_skips_counts():
    """The third step is the last one: the weights are the average, although it was skipped."""
    state = started(every=2, epochs=1, fp16=True)
    convolution, calls = state.model[0].forward, []

    def overflow_at_the_end(x):
        calls.append(x)
        return convolution(x) * (float("inf") if len(calls) == 3 else 1)

    state.model[0].forward = overflow_at_the_end
    fit(state)
    assert state.contents()["training"]["progress"]["skipped_steps"] == 1
    averages = state.lookahead.averages
    assert averages.keys() == floats(state.model).keys()
    assert all(torch.equal(value, averages[name]) for name, value in floats(state.model).items())


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_restored_average_trains_on_bit_identically(cut):
    expected, state = started(every=2), started(every=2)
    fit(expected, 2)
    with pytest.raises(loop.Interrupted):
        fit(state, 2, stop=lambda: state.progress.step == cut)
    resumed = started(every=2)
    resumed.restore(copy.deepcopy(state.contents()))
    fit(resumed, 2)
    assert same_weights(resumed.model, expected.model)


def test_averages_of_other_weights_are_refused():
    contents = copy.deepcopy(started(every=2).contents())
    contents["training"]["lookahead"]["5.weight"] = torch.zeros(10, 1)
    with refused("can't resume: last.pt doesn't fit this run (the average of 5.weight has shape"):
        started(every=2).restore(contents)


def test_a_run_of_an_old_version_has_no_average():
    contents = copy.deepcopy(start(network()).contents())
    del contents["training"]["lookahead"]
    state = start(network(seed=1))
    state.restore(contents)
    assert same_weights(state.model, network())


def test_another_number_of_epochs_is_refused_from_the_first_average_on():
    argv = "--epochs 4 --schedule constant --warmup-epochs 0 --ema-decay 0 --lookahead 5"
    args = resolve(train, *words(argv))
    args.epochs = 8
    progress = {"epoch": 1, "step": 4, "batch": 1}
    saved = {"training": {"arguments": vars(args) | {"epochs": 4}, "progress": progress}}
    saved["training"]["optimizer"] = {"param_groups": []}
    resume.check_epochs(args, saved, steps_per_epoch=3)
    progress |= {"step": 5, "batch": 2}
    with refused("--epochs 8: with --lookahead 5, the averages so far"):
        resume.check_epochs(args, saved, steps_per_epoch=3)


def calls_of_an_update(layers):
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(layers)))
    lookahead = Lookahead(model, 5, 10)
    with CallCounter() as counter:
        lookahead.update(4), lookahead.update(5)
    return counter.calls.total()


def test_an_update_takes_two_calls_and_other_steps_none():
    assert calls_of_an_update(3) == calls_of_an_update(30) == 2


def test_the_average_is_counted_as_memory():
    need, larger = (
        memory.need_of_run(resolve(train_sota, *words(argv)), 10, device="cuda", dtype=None)
        for argv in ("--model resnet20", "--model resnet20 --lookahead 5")
    )
    averages = Lookahead(create_model("resnet20"), every=5, steps=10).averages
    size = sum(tensor.numel() * tensor.element_size() for tensor in averages.values())
    assert larger.fixed - need.fixed == size and larger.host - need.host == size
