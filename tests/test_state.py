"""The state of a run: what last.pt and best.pt hold, and what is restored from it."""

import copy

import pytest
import torch
from helpers.training import CPU, fit, network, same_weights, start

import models
from common import checkpoint
from training.optimizers import OPTIMIZERS
from training.state import Confusion, State

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize(("here", "saved"), [FORMATS, FORMATS[::-1]])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_state_trains_on_bit_identically(optimizer, here, saved, tmp_path):
    """Also in another memory format: sharded models are contiguous, others are channels_last."""

    def new():
        model = network(norm=True).to(memory_format=here)
        return start(model, optimizer, 0.01, ema_decay=0.9)

    state, resumed = new(), new()
    fit(state, 1)
    state.best, state.history = {"epoch": 1, "value": 50.0}, [[1.5, 50.0, 90.0]]
    contents = copy.deepcopy(state.contents())
    for values in contents["training"]["optimizer"]["state"].values():
        momenta = {k: v for k, v in values.items() if torch.is_tensor(v) and v.ndim == 4}
        values |= {name: value.to(memory_format=saved) for name, value in momenta.items()}
    checkpoint.save(contents, tmp_path / "last.pt")
    resumed.restore(checkpoint.load(tmp_path / "last.pt"))
    assert (resumed.progress, resumed.best) == (state.progress, state.best)
    assert resumed.history == state.history and resumed.average.updates == 3
    for param, values in resumed.optimizer.state.items():
        momenta = [value for value in values.values() if torch.is_tensor(value) and value.ndim]
        assert momenta and all(value.stride() == param.stride() for value in momenta)
    assert fit(resumed, 2) == fit(state, 2)
    assert same_weights(resumed.model, state.model)
    assert same_weights(resumed.average.model, state.average.model)


def test_the_scale_of_fp16_is_restored():
    state, resumed = start(network(), fp16=True), start(network(), fp16=True)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 256.0})
    resumed.restore(copy.deepcopy(state.contents()))
    assert resumed.scaler.get_scale() == 256


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_best_contents_are_the_reported_weights(ema_decay):
    state = start(network(), ema_decay=ema_decay)
    fit(state)
    state.card, state.best = {"model": "x"}, {"epoch": 1, "value": 50.0}
    best = state.best_contents("val")(state.contents())
    name = "ema_val_acc" if ema_decay else "val_acc"
    assert best["metric"] == {"name": name, "selected_on": "val", "epoch": 1, "value": 50.0}
    assert best["card"] == {"model": "x"} and set(best) == {"card", "metric", "state_dict"}
    assert state.reported is (state.average.model if ema_decay else state.model)
    for key, value in state.reported.state_dict().items():
        assert torch.equal(best["state_dict"][key], value)


def test_confusion_counts_predictions_by_true_class():
    confusion = Confusion(3, CPU)
    for _ in range(2):
        confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]))
    assert confusion.counts.tolist() == [[2, 2, 0], [0, 0, 0], [0, 2, 0]]


def test_each_shape_is_compiled(monkeypatch):
    """Torch computes shapes above its limit without compiling them, unless it is raised."""
    compile_model, graphs = torch.nn.Module.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_with_count(self, **options):
        compile_model(self, backend=count, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_count)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    state = State(model=models.create_model("plain20"), optimizer=None)
    state.compile()
    for size in range(8, 18):
        state.model(torch.zeros(1, 3, size, size))
    assert len(graphs) == 10
