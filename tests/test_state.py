"""The state of a run: what last.pt and best.pt hold, and what is restored from it."""

import copy

import pytest
import torch
from helpers.errors import refused
from helpers.training import CPU, fit, network, same_weights, start

from common import checkpoint
from training.optimizers import OPTIMIZERS
from training.state import Confusion, Progress


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_that_is_saved_and_restored_trains_on_bit_identically(optimizer, tmp_path):
    """Also with momenta that are contiguous, as those of a sharded model, and fp16's scaler."""

    def new():
        model = network(norm=True).to(memory_format=torch.channels_last)
        return start(model, optimizer, 0.01, ema_decay=0.9, fp16=True)

    state, resumed = new(), new()
    fit(state, 1)
    state.best, state.history = {"epoch": 1, "value": 50.0}, [[1.5, 50.0, 90.0]]
    contents = copy.deepcopy(state.contents())
    for values in contents["training"]["optimizer"]["state"].values():
        for name, value in values.items():
            if torch.is_tensor(value):
                values[name] = value.contiguous()
    checkpoint.save(contents, tmp_path / "last.pt")
    resumed.restore(checkpoint.load(tmp_path / "last.pt"))
    assert (resumed.progress, resumed.best) == (state.progress, state.best)
    assert resumed.history == state.history and resumed.average.updates == 3
    for param, values in resumed.optimizer.state.items():
        tensors = [v for v in values.values() if torch.is_tensor(v) and v.ndim]
        assert all(value.stride() == param.stride() for value in tensors)
    assert fit(resumed, 2) == fit(state, 2)
    assert same_weights(resumed.model, state.model)
    assert same_weights(resumed.average.model, state.average.model)
    assert resumed.scaler.state_dict() == state.scaler.state_dict()


def test_contents_do_not_hold_what_changes_later():
    state = start(network())
    contents = state.contents()
    fit(state)
    state.best["epoch"] = 1
    state.history.append([1.0, 2.0, 3.0])
    training = contents["training"]
    assert training["progress"]["epoch"] == training["best"]["epoch"] == 0
    assert training["history"] == []


def test_a_checkpoint_without_a_history_has_an_empty_one():
    """As older versions saved it; resume.open_directory reads the rows instead."""
    contents = copy.deepcopy(start(network()).contents())
    del contents["training"]["history"]
    state = start(network())
    state.restore(contents)
    assert state.history == []


@pytest.mark.parametrize("part", ["state_dict", "training", "optimizer", "average", "progress"])
def test_contents_of_another_form_are_refused(part):
    contents = copy.deepcopy(start(network(), ema_decay=0.9).contents())
    if part == "average":
        contents["ema"] = None
    elif part in contents:
        del contents[part]
    else:
        contents["training"][part] = {"other": 1}
    with refused("can't resume: last.pt doesn't fit this run"):
        start(network(), ema_decay=0.9).restore(contents)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_best_contents_are_the_reported_weights(ema_decay):
    state = start(network(), ema_decay=ema_decay)
    state.card = {"model": "x"}
    fit(state)
    state.best = {"epoch": 1, "value": 50.0}
    best = state.best_contents("val")(state.contents())
    name = "ema_val_acc" if ema_decay else "val_acc"
    assert best["metric"] == {"name": name, "selected_on": "val", "epoch": 1, "value": 50.0}
    assert best["card"] == {"model": "x"}
    reported = state.average.model if ema_decay else state.model
    assert state.reported is reported and set(best) == {"card", "metric", "state_dict"}
    for key, value in reported.state_dict().items():
        assert torch.equal(best["state_dict"][key], value)


def test_compiling_keeps_the_names_of_the_weights():
    state = start(network(), ema_decay=0.9)
    before = list(state.contents()["state_dict"])
    state.compile()
    assert list(state.contents()["state_dict"]) == before


def test_progress_counts_images_whose_update_was_not_skipped():
    progress = Progress()
    progress.count_step(32, 64.0, 16.0, finite=True)
    progress.count_step(32, float("nan"), 0.0, finite=False)
    assert (progress.step, progress.batch, progress.seen) == (2, 2, 32)
    assert (progress.loss_sum, progress.correct) == (64.0, 16)
    progress.seconds = 2.5
    progress.finish_epoch()
    assert progress == Progress(epoch=1, step=2, total_seconds=2.5)


def test_confusion_counts_predictions_by_true_class():
    confusion = Confusion(3, CPU)
    for _ in range(2):
        confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]))
    assert confusion.counts.tolist() == [[2, 2, 0], [0, 0, 0], [0, 2, 0]]
