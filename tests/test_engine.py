"""The loop: exact figures, the same update however a batch is cut, stopping after any step, and before a bad one."""

import contextlib
import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import models
from datasets.examples import Examples
from datasets.pipeline import Pipeline
from training import devices, linear_probe, loop, mixed_precision, moving_average, optimizers
from training.distributed import Ranks

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def net(dropout=0.0, norm=False, seed=0):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
    ]
    return nn.Sequential(*layers, nn.Linear(72, 10))


def batches(count=100, size=32, seed=0, device="cpu", **options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(
        0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator
    ).permute(0, 3, 1, 2)
    examples = Examples(images, torch.randint(0, 10, (count,), generator=generator))
    pipeline = Pipeline(MEAN, STD, 8, ("crop", "flip"), num_classes=10, **options)
    return data.Batches(examples, size, pipeline, seed=seed, device=device)


def start(model, name="sgd", lr=0.05, **options):
    return optimizers.create_optimizer(name, optimizers.param_groups(model, 1e-3), lr, **options)


def fit(model, epochs=2, source=None, optimizer=None, **options):
    source = source or batches()
    return loop.fit(
        model,
        source,
        optimizer=optimizer or start(model),
        lr_at=lambda step: 0.05,
        epochs=epochs,
        **options,
    )


def test_figures_are_sums_over_examples_and_steps_are_counted():
    model, rows = net(), []
    progress = loop.fit(
        model,
        batches(),
        optimizer=start(model),
        lr_at=lambda step: 0.0,
        epochs=1,
        after_epoch=rows.append,
    )
    losses, correct, count = 0.0, 0, 0
    for x, y in batches().epoch(0):
        logits = net()(x)
        losses += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
        count += len(y)
    assert (rows[0]["epoch"], rows[0]["step"], count) == (1, 3, 96)
    assert rows[0]["train_loss"] == pytest.approx(losses / count, rel=1e-6)
    assert rows[0]["train_acc"] == pytest.approx(100 * correct / count)
    assert (progress.epoch, progress.step, progress.batch) == (1, 3, 0)


def test_a_rank_stops_for_what_is_not_finite_in_the_part_of_another(monkeypatch):
    ranks = Ranks(torch.device("cpu"), sharded=True)
    fit(net(), epochs=1, ranks=ranks)
    monkeypatch.setattr(
        Ranks, "sum", lambda self, values: values + 1 if values.dtype == torch.float32 else values
    )
    with pytest.raises(loop.NonFiniteLoss, match="0.weight is not finite at step 3"):
        loop._check_state(net(), start(net()), loop.Progress(step=3), 0.1, ranks)


def test_evaluation_counts_every_image_once():
    model = net().eval()
    images = torch.randint(0, 256, (10_001, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    examples = Examples(images, torch.randint(0, 10, (10_001,)))
    pipeline = Pipeline(MEAN, STD, 8)
    found = loop.evaluate(model, data.Batches(examples, 500, pipeline, shuffle=False))
    x, y = pipeline(images, examples.labels, None)
    logits = model(x).detach()
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert found["acc"] == pytest.approx(100 * (logits.argmax(1) == y).sum().item() / 10_001)
    top5 = sum(int(label) in row for label, row in zip(y, logits.topk(5).indices.tolist()))
    assert found["top5"] == pytest.approx(100 * top5 / 10_001)


def evaluate_on_two_ranks(examples, batch_size, stop_after=None):
    """([what evaluate returned or raised on each of two ranks, threads], reductions, batches each rank began, labels seen).

    stop_after: during this batch the second rank, and no other, is asked to stop.
    """
    barrier, slots, reductions = threading.Barrier(2, timeout=60), [None, None], []
    models, begun, seen = [net().eval() for _ in range(2)], [[], []], []

    class ThreadRanks(Ranks):
        def sum(self, values):
            slots[self.rank] = values.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            reductions.append(self.rank)
            return values.copy_(total)

    def run(rank):
        models[rank].register_forward_pre_hook(lambda *_: begun[rank].append(1))
        batches = data.Batches(
            examples, batch_size, Pipeline(MEAN, STD, 8), shuffle=False, rank=rank, world=2
        )
        try:
            return loop.evaluate(
                models[rank],
                batches,
                ranks=ThreadRanks(torch.device("cpu"), rank, 2),
                stop=lambda: rank == 1 and stop_after and len(begun[rank]) >= stop_after,
                see=lambda answers, labels: seen.extend(labels.tolist()),
            )
        except loop.Interrupted:
            return "interrupted"

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    return found, reductions.count(0), [len(each) for each in begun], seen


def test_ranks_evaluate_every_image_once_and_talk_every_few_batches():
    examples = Examples(
        torch.randint(0, 256, (10_001, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 10, (10_001,))
    )
    alone = loop.evaluate(
        net().eval(), data.Batches(examples, 500, Pipeline(MEAN, STD, 8), shuffle=False)
    )
    found, reductions, batches, seen = evaluate_on_two_ranks(examples, 1000)
    assert found[0] == found[1] and sorted(seen) == sorted(examples.labels.tolist())
    assert (found[0]["acc"], found[0]["top5"]) == (alone["acc"], alone["top5"])
    assert found[0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert (
        batches == [10, 11] and reductions <= 3
    )  # the last image is the second rank's; one reduction is for the figures


@pytest.mark.parametrize(("asked_in", "at_most"), [(2, 4), (4, 4), (5, 8), (9, 11), (11, 11)])
def test_ranks_stop_an_evaluation_together(asked_in, at_most):
    examples = Examples(
        torch.zeros(11_000, 3, 8, 8, dtype=torch.uint8), torch.zeros(11_000, dtype=torch.int64)
    )
    found, _, batches, _ = evaluate_on_two_ranks(examples, 1000, stop_after=asked_in)
    assert found == ["interrupted"] * 2 and batches[0] == batches[1] <= at_most


def test_top5_of_fewer_classes_is_everything():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    examples = Examples(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    assert (
        loop.evaluate(model, data.Batches(examples, 4, Pipeline(MEAN, STD, 8), shuffle=False))[
            "top5"
        ]
        == 100
    )


@pytest.mark.parametrize("parts", [2, 3, 32])
def test_accumulation_gives_the_update_of_the_whole_batch(parts):
    whole, cut = net(), net()
    fit(whole)
    fit(cut, accumulate=parts)
    for a, b in zip(whole.parameters(), cut.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_parts_but_the_last_keep_their_gradients_from_the_other_ranks():
    """DistributedDataParallel decides in the forward pass whether the backward pass that follows sends."""

    class Parallel(torch.nn.Linear):
        local, seen = False, ()

        @contextlib.contextmanager
        def no_sync(self):
            self.local = True
            yield
            self.local = False

        def forward(self, x):
            self.seen += (self.local,)
            return super().forward(x.flatten(1))

    model = Parallel(3 * 8 * 8, 10)
    fit(model, accumulate=3)
    assert model.seen[:3] == (True, True, False) and not model.local


def test_clipping_bounds_the_gradient():
    model, norms = net(), []
    optimizer = start(model)
    real = optimizer.step

    def step(*args, **options):
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        return real(*args, **options)

    optimizer.step = step
    fit(model, optimizer=optimizer, clip_grad=0.01)
    assert norms and max(norms) <= 0.01 * 1.001


def test_the_rate_is_set_for_each_step_and_scaled_for_a_group():
    model, seen = net(), []
    optimizer = start(model)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    loop.fit(
        model,
        batches(),
        optimizer=optimizer,
        lr_at=lambda step: 0.01 * (step + 1),
        epochs=2,
        after_step=lambda: seen.append([g["lr"] for g in optimizer.param_groups]),
    )
    assert seen == [[pytest.approx(0.005 * k), pytest.approx(0.01 * k)] for k in range(1, 7)]


def stopping_after(steps):
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_run_that_stops_after_any_step_goes_on_to_the_same_bits(name, steps):
    """With dropout, batch norm, mixing, accumulation and an average; 3 steps are an epoch."""

    def make():
        model = net(dropout=0.3, norm=True)
        return model, start(model, name, 0.01), moving_average.Ema(model, 0.9), loop.Progress(), []

    def go(model, optimizer, ema, progress, rows, stop=None):
        source = batches(mixup_alpha=0.2, cutmix_alpha=1.0, mix_probability=0.5)
        loop.fit(
            model,
            source,
            optimizer=optimizer,
            lr_at=lambda step: 0.01 / (step + 1),
            epochs=3,
            progress=progress,
            accumulate=2,
            after_step=ema.update,
            after_epoch=rows.append,
            stop=stop,
        )

    whole = make()
    go(*whole)
    first = make()
    with pytest.raises(loop.Interrupted):
        go(*first, stop=stopping_after(steps))
    second = make()
    torch.manual_seed(999)  # nothing may depend on it
    for old, new in zip(first[:4], second[:4]):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    second[4].extend(first[4])
    go(*second)
    for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values()):
        assert torch.equal(a, b)
    for a, b in zip(whole[2].model.state_dict().values(), second[2].model.state_dict().values()):
        assert torch.equal(a, b)
    timing = ("epoch_seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timing} for row in whole[4]] == [
        {k: v for k, v in row.items() if k not in timing} for row in second[4]
    ]


def test_dropout_differs_between_steps_and_repeats_with_the_seed():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = net(), []

        def forward(self, x):
            self.seen.append(F.dropout(torch.ones(1000), 0.5, self.training))
            return self.net(x)

    runs = [Spy(), Spy(), Spy()]
    for spy, seed in zip(runs, (0, 0, 1)):
        fit(spy, epochs=1, seed=seed)
    a, b, c = (torch.stack(spy.seen) for spy in runs)
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[0], a[1])


class Exploding(nn.Module):
    """Returns infinities from its third training step on."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = net(), 0

    def forward(self, x):
        self.calls += self.training
        return self.net(x) * (math.inf if self.calls >= 3 else 1)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = Exploding()
    states = [copy.deepcopy(model.state_dict())]
    with pytest.raises(
        loop.NonFiniteLoss, match=r"step 3 \(epoch 1\) with learning rate 0.05.*--lr"
    ):
        fit(model, after_step=lambda: states.append(copy.deepcopy(model.state_dict())))
    assert len(states) == 3
    for key, value in model.state_dict().items():
        assert torch.equal(value, states[-1][key]) and value.isfinite().all()


def test_a_rate_that_blows_the_weights_up_stops_the_run():
    model = net()
    with pytest.raises(loop.NonFiniteLoss):
        loop.fit(model, batches(), optimizer=start(model), lr_at=lambda step: 1e30, epochs=3)


def test_weights_that_went_bad_in_the_last_step_are_not_passed_on():
    model, seen = net(), []

    def spoil():
        seen.append(1)
        if len(seen) == 3:
            with torch.no_grad():
                model[0].weight[0, 0, 0, 0] = math.nan

    rows = []
    with pytest.raises(loop.NonFiniteLoss, match="weight"):
        fit(model, after_step=spoil, after_epoch=rows.append)
    assert not rows


def test_an_average_of_the_optimizer_that_overflowed_is_not_passed_on():
    """Adam divides by it, so the weights stay finite, and stay as they are for ever after."""
    model, rows = net(), []

    def steep(logits, y):
        return F.cross_entropy(logits, y) * 1e24

    with pytest.raises(
        loop.NonFiniteLoss, match="the optimizer's exp_avg_sq is not finite at step 3"
    ):
        fit(model, optimizer=start(model, "adam"), loss_fn=steep, after_epoch=rows.append)
    assert not rows and all(value.isfinite().all() for value in model.state_dict().values())


class Overflowing(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.net, self.left = net(), steps

    def forward(self, x):
        self.left -= 1
        return self.net(x) * (math.inf if self.left >= 0 else 1)


def test_with_fp16_an_overflow_skips_the_step_and_a_row_of_them_stops():
    model = Overflowing(2)
    before = copy.deepcopy(model.state_dict())
    seen = []
    scaler = torch.amp.GradScaler("cpu")
    fit(
        model,
        epochs=1,
        scaler=scaler,
        optimizer=start(model, fused=False),
        after_step=lambda: seen.append(1),
        after_epoch=seen.append,
    )
    assert (
        seen[0] == 1 and len(seen) == 2 and scaler.get_scale() == 65536 / 4
    )  # one update of three steps
    assert math.isfinite(seen[1]["train_loss"])
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(loop.NonFiniteLoss, match="20 steps in a row"):
        model = Overflowing(1000)
        fit(
            model,
            epochs=100,
            scaler=torch.amp.GradScaler("cpu"),
            optimizer=start(model, fused=False),
        )


def test_a_skipped_step_leaves_batch_norm_as_it_was():
    model = nn.Sequential(net(norm=True))
    real, calls = model[0][0].forward, []

    def overflow_once(x):
        calls.append(1)
        return real(x) * (math.inf if len(calls) == 1 else 1)

    model[0][0].forward = overflow_once
    fit(model, epochs=1, scaler=torch.amp.GradScaler("cpu"), optimizer=start(model, fused=False))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_evaluation_can_be_interrupted_and_leaves_the_weights_alone():
    model = net(norm=True)
    before = copy.deepcopy(model.state_dict())
    examples = batches()
    with pytest.raises(loop.Interrupted):
        loop.evaluate(model, examples, stop=lambda: True)
    loop.evaluate(model, examples)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_precision_is_chosen_for_the_device():
    cpu = torch.device("cpu")
    assert (
        mixed_precision.amp_dtype("off", cpu) is None
        and mixed_precision.amp_dtype("fp16", cpu) == torch.float16
    )
    assert mixed_precision.amp_dtype("auto", torch.device("mps")) is None
    assert mixed_precision.amp_dtype("auto", cpu) in (None, torch.bfloat16)
    with mixed_precision.autocast(cpu, None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with mixed_precision.autocast(cpu, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_device_that_is_not_there_is_refused():
    for name in ("cuda:99", "tpu", "mps" if not torch.backends.mps.is_available() else "cuda:99"):
        with pytest.raises(loop.UserError, match=f"--device {name}"):
            devices.select_device(name)


@pytest.mark.gpu
def test_training_on_a_gpu_resembles_the_cpu_and_stops_before_a_bad_step():
    cpu, gpu = net(), net().cuda()
    fit(cpu)
    source = batches(device="cuda")
    fit(gpu, source=source, optimizer=start(gpu))
    for a, b in zip(cpu.parameters(), gpu.parameters()):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=1e-3)
    exploding = Exploding().cuda()
    with pytest.raises(loop.NonFiniteLoss, match="step 3 "):
        fit(exploding, source=source, optimizer=start(exploding))
    assert all(p.isfinite().all() for p in exploding.parameters())


@pytest.mark.parametrize("kind", ["model", "probe", "compiled", "copy"])
def test_an_evaluation_in_bf16_tells_logits_apart_that_tie_there(kind):
    """Two classes differ by a 500th: bf16, with its eight bits, gives both 1.0, and the first, wrong one is chosen."""
    model = Close()
    if kind == "probe":
        model = linear_probe.Probe(model)
    elif kind == "copy":
        model = moving_average.Ema(model, 0.9).model
    elif kind == "compiled":
        model.compile(backend="eager")
        with mixed_precision.autocast(torch.device("cpu"), torch.bfloat16):
            model(torch.ones(2, 3, 8, 8)).sum().backward()
    examples = [(torch.ones(4, 3, 8, 8), torch.ones(4, dtype=torch.int64))]
    with mixed_precision.autocast(torch.device("cpu"), torch.bfloat16), torch.no_grad():
        tied = model.eval()(examples[0][0])
    if kind != "compiled":  # the graph is made once for evaluation
        assert tied.dtype == torch.bfloat16 and tied.argmax(1).tolist() == [0] * 4
    else:
        torch.compiler.reset()
    found = [loop.evaluate(model, examples, dtype=torch.bfloat16) for _ in range(3)]
    assert [each["acc"] for each in found] == [100.0] * 3
    with mixed_precision.autocast(torch.device("cpu"), torch.bfloat16):
        assert model.train()(examples[0][0]).dtype == torch.bfloat16  # training is as it was


class Close(nn.Module):
    """Logits 1 and 1.002 for any image of ones. (B, 3, H, W) -> (B, 2)"""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, 0, 0], [1.002, 0, 0]]))

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return x.mean((2, 3))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_an_evaluation_in_between_leaves_training_bits_alone():
    """The classifier is another in evaluation only."""
    runs = []
    for measure in (None, lambda model: loop.evaluate(model, batches(), dtype=torch.bfloat16)):
        torch.manual_seed(0)
        model = models.create_model("resnet20", 10)
        fit(
            model,
            dtype=torch.bfloat16,
            measure=measure and (lambda _, model=model, measure=measure: measure(model)),
        )
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(run.values() for run in runs)))


def test_fp16_reads_one_value_a_step_and_copies_the_statistics_in_one_call():
    """However many norms there are. A value that is read makes the host wait for the device."""
    few, many = fp16_calls(norms=1), fp16_calls(norms=30)
    assert few == many and few["reads"] == 1


def fp16_calls(norms):
    """How many values a step reads, and how many calls copy tensors of statistics: six steps less two."""
    found = []
    for steps in (2, 6):
        model = nn.Sequential(net(norm=True), *(nn.BatchNorm1d(10) for _ in range(norms - 1)))
        optimizer = start(model, fused=False)
        with Count() as count:
            fit(
                model,
                source=batches(count=32 * steps),
                epochs=1,
                scaler=torch.amp.GradScaler("cpu"),
                optimizer=optimizer,
            )
        found.append(count)
    return {
        name: (getattr(found[1], name) - getattr(found[0], name)) / 4
        for name in ("reads", "copies")
    }


class Count(TorchDispatchMode):
    """Counts values that are read on the host, and calls that copy tensors as they are."""

    reads = copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        self.copies += function in (
            torch.ops.aten.clone.default,
            torch.ops.aten._foreach_copy_.default,
        )
        return function(*args, **(kwargs or {}))
