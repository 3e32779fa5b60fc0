"""The step loop: exact metrics, equal updates however a batch is split, stopping after any step."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.training import CPU, CallCounter, batches, fit, network, same_weights, start

from training import loop, optimizers
from training.distributed import Ranks


def test_metrics_of_training_are_sums_over_the_images():
    state = start(network())
    (row,) = fit(state, lr_at=lambda step: 0.0)
    losses, correct = 0.0, 0
    for x, y in batches().epoch(0):
        logits = network()(x)
        losses += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    assert (row["epoch"], row["step"]) == (1, 3)
    assert row["train_loss"] == pytest.approx(losses / 96, rel=1e-6)
    assert row["train_acc"] == pytest.approx(100 * correct / 96)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_rank_stops_if_the_state_of_another_rank_is_not_finite(sharded):
    class OtherRankIsBad(Ranks):
        def sum(self, values):
            return values + 1

    state = start(network())
    alone, bad = Ranks(CPU), OtherRankIsBad(CPU, world_size=2, sharded=sharded)
    loop._check_state(state.model, state.optimizer, state.progress, 0.1, alone)
    with pytest.raises(loop.NonFiniteError, match="0.weight is not finite at step 0"):
        loop._check_state(state.model, state.optimizer, state.progress, 0.1, bad)


def test_only_the_last_part_of_a_batch_synchronizes_gradients():
    """DistributedDataParallel decides in the forward pass whether the backward pass sends."""

    class Parallel(nn.Linear):
        local, was_local = False, ()

        @contextlib.contextmanager
        def no_sync(self):
            self.local = True
            yield
            self.local = False

        def forward(self, x):
            self.was_local += (self.local,)
            return super().forward(x.flatten(1))

    model = Parallel(3 * 8 * 8, 10)
    fit(start(model), accumulate=3)
    assert model.was_local == (True, True, False) * 3 and not model.local


@pytest.mark.parametrize("parts", [2, 3, 32])
def test_accumulation_gives_the_update_of_the_undivided_batch(parts):
    states = [start(network()) for _ in range(2)]
    rows = fit(states[0], 2), fit(states[1], 2, accumulate=parts)
    for a, b in zip(*(state.model.parameters() for state in states)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert rows[0][1] == pytest.approx(rows[1][1], rel=1e-5)


def test_clipping_bounds_the_norm_of_the_gradient():
    state, norms = start(network()), []
    parameters = list(state.model.parameters())

    def measure(*_):
        norms.append(nn.utils.get_total_norm([p.grad for p in parameters]).item())

    state.optimizer.register_step_pre_hook(measure)
    fit(state, clip_grad=0.01)
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 3


def test_the_learning_rate_is_set_for_each_step_and_scaled_per_group():
    state, rates = start(network()), []
    groups = state.optimizer.param_groups
    groups[0]["lr_scale"] = 0.5

    def show(progress, loss):
        rates.append([group["lr"] for group in groups])

    rows = fit(state, 2, lr_at=lambda step: 0.01 * (step + 1), show=show)
    assert rates == [[pytest.approx(0.005 * k), pytest.approx(0.01 * k)] for k in range(1, 7)]
    assert [row["lr"] for row in rows] == [pytest.approx(0.03), pytest.approx(0.06)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon_sgd"])
def test_what_trains_no_longer_has_no_gradient_and_the_rest_is_updated_alike(
    optimizer, monkeypatch
):
    def train(computed):
        state = start(network(norm=True), optimizer, 0.01)
        (first, *_), *_ = (group["params"] for group in state.optimizer.param_groups)
        others = [p for p in state.model.parameters() if p is not first]
        kept = {key: v for key, v in state.optimizer.param_groups[0].items() if key != "params"}
        state.optimizer.param_groups[0]["params"].remove(first)
        state.optimizer.add_param_group(kept | {"params": [first], "lr_end": 0.5})
        first.register_post_accumulate_grad_hook(lambda p: computed.append(first))
        others[-1].register_post_accumulate_grad_hook(lambda p: computed.append(others[-1]))
        fit(state, 2, lr_at=lambda step, end=1.0: 0.01 if step < 6 * end else 0.0)
        return state.model, [tensor is first for tensor in computed]

    model, is_first = train([])
    assert is_first.count(True) == 3 and is_first.count(False) == 6  # of six steps
    monkeypatch.setattr(loop, "skip_gradients_at_rate_zero", lambda optimizer: None)
    other, is_first = train([])
    assert is_first.count(True) == 6 and same_weights(model, other)


def test_a_gradient_at_rate_zero_does_not_count_for_clipping(monkeypatch):
    def train():
        state = start(network())
        first, *others = state.optimizer.param_groups[0]["params"]
        state.optimizer.param_groups[0]["params"] = others
        state.optimizer.add_param_group({"params": [first], "lr_end": 0.0})
        fit(state, lr_at=lambda step, end=1.0: 0.01 * end, clip_grad=1e-3)
        return state.model

    model = train()
    monkeypatch.setattr(loop, "skip_gradients_at_rate_zero", lambda optimizer: None)
    assert same_weights(model, train())  # as several ranks and compiled models train it


def stop_after(steps):
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_run_that_stops_after_any_step_resumes_bit_identically(optimizer, steps):
    """With dropout, batch norm, mixing, accumulation and an average; an epoch has three steps."""

    def new():
        return start(network(dropout=0.3, norm=True), optimizer, 0.01, ema_decay=0.9)

    def train(state, stop=loop.never):
        source = batches(mixup_alpha=0.2, cutmix_alpha=1.0, mix_probability=0.5)
        return fit(state, 3, source, stop, lr_at=lambda step: 0.01 / (step + 1), accumulate=2)

    uninterrupted, stopped, resumed = new(), new(), new()
    rows = train(uninterrupted)
    with pytest.raises(loop.Interrupted):
        train(stopped, stop_after(steps))
    assert stopped.progress.step == steps
    torch.manual_seed(999)  # the global generator must not matter
    resumed.restore(copy.deepcopy(stopped.contents()))
    assert train(resumed) == rows[stopped.epoch :]
    assert same_weights(resumed.model, uninterrupted.model)
    assert same_weights(resumed.average.model, uninterrupted.average.model)


def dropout_masks(seed, rank=0):
    """Of each step of two epochs."""
    model, masks = network(), []
    model[4].register_forward_pre_hook(lambda *_: masks.append(F.dropout(torch.ones(1000))))
    fit(start(model), epochs=2, seed=seed, ranks=Ranks(CPU, rank=rank))
    return masks


def test_dropout_differs_between_steps_epochs_seeds_and_ranks():
    first, again = dropout_masks(0), dropout_masks(0)
    assert len(first) == 6 and all(map(torch.equal, first, again))
    different = {mask.numpy().tobytes() for mask in first + dropout_masks(1) + dropout_masks(0, 1)}
    assert len(different) == 18


class Overflowing(nn.Module):
    """The network, with infinite logits in some training steps (numbers from 1)."""

    def __init__(self, steps):
        super().__init__()
        self.network, self.steps, self.step = network(), steps, 0

    def forward(self, x):
        self.step += self.training
        return self.network(x) * (math.inf if self.step in self.steps else 1)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    state, weights = start(Overflowing({3})), []
    message = r"step 3 \(epoch 1\) with learning rate 0.05.*--lr"
    with pytest.raises(loop.NonFiniteError, match=message):
        fit(state, show=lambda *_: weights.append(copy.deepcopy(state.model)))
    assert len(weights) == 2 and same_weights(state.model, weights[-1])
    assert all(value.isfinite().all() for value in state.model.state_dict().values())


@pytest.mark.parametrize("interrupted", [False, True])
def test_weights_that_are_not_finite_are_not_passed_on(interrupted):
    """Neither as the row of an epoch nor as a state to save."""
    state = start(network())

    def spoil(progress, loss):
        if progress.step == 3:
            with torch.no_grad():
                state.model[0].weight[0, 0, 0, 0] = math.nan

    stop = stop_after(3) if interrupted else loop.never
    with pytest.raises(loop.NonFiniteError, match="0.weight is not finite at step 3"):
        fit(state, show=spoil, stop=stop)


def test_an_average_of_the_optimizer_that_overflowed_is_not_passed_on():
    """Adam divides by it: the weights stay finite, and would never change again."""
    state = start(network(), "adam")
    message = "the optimizer's exp_avg_sq is not finite at step 3"
    with pytest.raises(loop.NonFiniteError, match=message):
        fit(state, loss_fn=lambda logits, y: F.cross_entropy(logits, y) * 1e24)
    assert all(value.isfinite().all() for value in state.model.state_dict().values())


def test_an_overflow_in_fp16_skips_the_step():
    state, before = start(Overflowing({1, 2}), ema_decay=0.9, fp16=True), network()
    (row,) = fit(state)
    assert state.average.updates == 1 and state.progress.step == 3
    assert state.scaler.get_scale() == 65536 / 4
    assert math.isfinite(row["train_loss"]) and not same_weights(state.model.network, before)


def test_20_overflows_in_a_row_stop_the_run():
    with pytest.raises(loop.NonFiniteError, match="20 steps in a row"):
        fit(start(Overflowing(range(1000)), fp16=True), 100)


def test_20_overflows_with_steps_between_them_do_not_stop_it():
    state = start(Overflowing(range(1, 1000, 2)), fp16=True)
    assert len(fit(state, 14)) == 14 and state.progress.step == 42
    assert state.scaler.get_scale() == 65536 / 2**21


def test_a_skipped_step_does_not_change_batch_norm():
    model = network(norm=True)
    convolution, calls = model[0].forward, []

    def overflow_once(x):
        calls.append(x)
        return convolution(x) * (math.inf if len(calls) == 1 else 1)

    model[0].forward = overflow_once
    fit(start(model, fp16=True))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def reads_and_copies(steps, norms):
    """How often the host reads a value, and how many calls copy tensors, in an epoch in fp16."""
    model = nn.Sequential(network(norm=True), *(nn.BatchNorm1d(10) for _ in range(norms - 1)))
    with CallCounter() as counter:
        fit(start(model, fp16=True), source=batches(32 * steps))
    aten = torch.ops.aten
    copies = counter.calls[aten.clone.default] + counter.calls[aten._foreach_copy_.default]
    return torch.tensor([counter.calls[aten._local_scalar_dense.default], copies])


def test_a_step_in_fp16_reads_one_value_and_copies_statistics_at_once():
    """With any number of norms. For each value that is read the host waits for the device."""
    few, many = (reads_and_copies(6, norms) - reads_and_copies(2, norms) for norms in (1, 30))
    assert few.tolist() == many.tolist() and few[0] == 4


@pytest.mark.gpu
def test_training_on_a_gpu_resembles_the_cpu():
    cpu, gpu, source = network(), network().cuda(), batches(device="cuda")
    fit(start(cpu), 2)
    fit(start(gpu), 2, source)
    for a, b in zip(cpu.parameters(), gpu.parameters()):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=1e-3)
    overflowing = Overflowing({3}).cuda()
    with pytest.raises(loop.NonFiniteError, match="step 3 "):
        fit(start(overflowing), source=source)
    assert all(p.isfinite().all() for p in overflowing.parameters())
