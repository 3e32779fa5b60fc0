"""Groups hold each parameter once; schedules at their corners; optimizers descend; the average is the average."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from common.errors import UserError
from training import moving_average, optimizers, schedules


def test_groups_hold_every_parameter_once_and_spare_norms_and_biases():
    model = models.create_model("resnet20", 10)
    decayed, plain = optimizers.param_groups(model, 5e-4)
    assert decayed["weight_decay"] == 5e-4 and plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])


def test_groups_follow_no_weight_decay_and_leave_frozen_parameters_out():
    model = torch.nn.Linear(3, 2)
    model.no_weight_decay = lambda: {"weight"}
    (only,) = optimizers.param_groups(model, 0.1)
    assert only["weight_decay"] == 0 and len(only["params"]) == 2
    model.bias.requires_grad_(False)
    (only,) = optimizers.param_groups(model, 0.1)
    assert [p.shape for p in only["params"]] == [(2, 3)]


@pytest.mark.parametrize("fault", ["twice", "missing"])
def test_groups_that_lose_or_repeat_a_parameter_are_refused(fault):
    model = torch.nn.Linear(3, 2)
    params = [model.weight, model.weight, model.bias] if fault == "twice" else [model.bias]
    with pytest.raises(ValueError, match="parameter groups"):
        optimizers.check_groups([dict(params=params)], model)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_goes_on_from_its_state(name):
    def descend(model, optimizer, steps):
        for _ in range(steps):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def start():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
        )
        groups = optimizers.param_groups(model, optimizers.OPTIMIZERS[name]["weight_decay"])
        return model, optimizers.create_optimizer(
            name, groups, 0.01, optimizers.OPTIMIZERS[name]["momentum"]
        )

    x, y = torch.randn(16, 3, 4, 4), torch.randn(16, 2)
    model, optimizer = start()
    first = descend(model, optimizer, 1)
    assert descend(model, optimizer, 60) < 0.8 * first
    again, other = start()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert descend(again, other, 3) == descend(model, optimizer, 3)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_are_those_of_now_and_not_those_of_the_saved_state(name, fused):
    """As of a run that goes on with a GradScaler, in parts, or on another kind of device."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.full((3,), 0.5)
    before, after = (
        optimizers.create_optimizer(name, [dict(params=[p])], 0.1, fused=kind)
        for p, kind in zip(params, (fused, not fused))
    )
    before.step()
    params[1].data.copy_(params[0].data)
    optimizers.load_optimizer(after, copy.deepcopy(before.state_dict()))
    assert [each.param_groups[0]["fused"] for each in (before, after)] == [
        fused or None,
        not fused or None,
    ]
    before.step(), after.step()
    torch.testing.assert_close(*params)


@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_state_saved_in_another_memory_format_gives_the_same_next_step(name, saved):
    """Sharded models are contiguous, others channels_last, and fused kernels don't look at strides."""

    def step(model, optimizer):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def in_format(value):
        return (
            value.to(memory_format=saved) if torch.is_tensor(value) and value.ndim == 4 else value
        )

    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    here = torch.contiguous_format if saved is torch.channels_last else torch.channels_last
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3)).to(
        memory_format=here
    )
    optimizer = optimizers.create_optimizer(name, optimizers.param_groups(model, 0.01), 0.01)
    for _ in range(2):
        step(model, optimizer)
    again = copy.deepcopy(model)
    other = optimizers.create_optimizer(name, optimizers.param_groups(again, 0.01), 0.01)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {
        i: {key: in_format(value) for key, value in each.items()}
        for i, each in state["state"].items()
    }
    optimizers.load_optimizer(other, state)
    step(model, optimizer), step(again, other)
    for ours, theirs in zip(again.parameters(), model.parameters()):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_a_state_of_another_shape_is_refused():
    params = [torch.nn.Parameter(torch.ones(size)) for size in (3, 4)]
    before, after = (optimizers.create_optimizer("adamw", [dict(params=[p])], 0.1) for p in params)
    params[0].grad = torch.ones(3)
    before.step()
    with pytest.raises(ValueError, match=r"exp_avg is \(3,\) for a parameter of \(4,\)"):
        optimizers.load_optimizer(after, before.state_dict())


def test_an_unknown_optimizer_and_schedule_are_named():
    with pytest.raises(UserError, match="unknown optimizer 'sgdd'.*sgd, adam"):
        optimizers.create_optimizer("sgdd", [dict(params=[torch.zeros(1)])], 0.1)
    with pytest.raises(UserError, match="unknown schedule 'cos'.*cosine"):
        schedules.learning_rate("cos", 0.1, 10)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_warmup_rises_evenly_to_the_rate(schedule):
    lr_at = schedules.learning_rate(schedule, 0.8, 100, warmup_steps=10)
    steps = [lr_at(step + 1) - lr_at(step) for step in range(9)]
    assert lr_at(0) > 0 and lr_at(10) == pytest.approx(0.8)
    assert all(step == pytest.approx(steps[0]) for step in steps)


def test_schedules_at_their_corners():
    def at(schedule, *steps, **options):
        lr_at = schedules.learning_rate(schedule, 1.0, 100, **options)
        return pytest.approx([lr_at(step) for step in steps], abs=1e-9)

    assert at("cosine", 0, 50, 100) == [1.0, 0.5, 0.0]
    assert at("linear", 0, 25, 50, 100) == [1.0, 0.75, 0.5, 0.0]
    assert at("one_cycle", 20, 60, 100, warmup_steps=20) == [1.0, 0.5, 0.0]
    assert at("multi_step", 0, 49, 50, 74, 75, 99) == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert at("constant", 0, 99) == [1.0, 1.0]
    assert at("cosine", 0, 100, final=0.1) == [1.0, 0.1]
    assert at("linear", 0, 100, final=0.1) == [1.0, 0.1]
    assert (
        0 < schedules.learning_rate("cosine", 1.0, 100, warmup_steps=10)(99) < 1e-3
    )  # the last step still moves


def test_a_schedule_never_goes_negative_and_never_over_its_rate():
    for schedule in schedules.SCHEDULES:
        lr_at = schedules.learning_rate(schedule, 0.3, 37, warmup_steps=5)
        rates = [lr_at(step) for step in range(37)]
        assert all(0 < rate <= 0.3 + 1e-12 for rate in rates)


def test_defaults_fit_the_length_of_a_run():
    assert (
        schedules.default_warmup("cosine", 200) == 5
        and schedules.default_warmup("cosine", 5) == 0.5
    )
    assert schedules.default_warmup("one_cycle", 8) == 2
    assert 1 / (1 - schedules.default_ema_decay(2000)) == pytest.approx(100)
    assert schedules.default_ema_decay(10**7) == 1 - 1e-4
    assert 0 <= schedules.default_ema_decay(3) < 1


def test_the_average_follows_its_formula_and_covers_the_buffers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = moving_average.Ema(model, 0.5)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(1, 4):
        model(torch.randn(8, 2))
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = (
                expected[name] * decay + value * (1 - decay)
                if value.is_floating_point()
                else value.clone()
            )
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_average_goes_on_from_its_state():
    model = torch.nn.Linear(2, 2)
    ema = moving_average.Ema(model, 0.9)
    ema.update()
    other = moving_average.Ema(torch.nn.Linear(2, 2), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1 and torch.equal(other.model.weight, ema.model.weight)


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        moving_average.Ema(torch.nn.Linear(2, 2), decay)


def adamw_names(model, **options):
    """Names of the parameters that Muon leaves to AdamW, after a step that gave each of them a gradient."""
    groups = optimizers.muon_groups(optimizers.param_groups(model, 0.05, **options), model)
    optimizer = optimizers.create_optimizer("muon", groups, 0.01, 0.95)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    return {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "exp_avg" in optimizer.state[p]
    }


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20", {}, {"stem.0.weight", "fc.weight"}),
        ("coatnet_0", {}, {"stem.0.0.weight", "fc.weight", "blocks.5.attention.position_bias"}),
        (
            "timm/test_vit",
            {"layer_decay": 0.8},
            {"patch_embed.proj.weight", "head.weight", "pos_embed"},
        ),
    ],
)
def test_muon_leaves_first_layer_classifier_and_embeddings_to_adamw(name, options, expected):
    model = models.create_model(name, 10)
    found = adamw_names(model, **options)
    assert expected <= found
    hidden = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)
    } - expected
    assert hidden and not hidden & found
    assert all(p.ndim > 1 or name in found for name, p in model.named_parameters())
    assert not any(
        "position_bias" in name for name, _ in model.named_parameters() if name not in found
    )


def test_muon_groups_keep_decay_and_scale_and_those_of_an_older_state():
    model = models.create_model("timm/test_vit", 10)
    groups = optimizers.param_groups(model, 0.05, layer_decay=0.5)
    divided = optimizers.muon_groups(groups, model)
    before = {id(p): (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert before == {
        id(p): (g["weight_decay"], g["lr_scale"]) for g in divided for p in g["params"]
    }
    assert optimizers.muon_groups(groups, model, {"param_groups": [{"lr": 0.1}]}) is groups
    assert (
        optimizers.muon_groups(groups, model, {"param_groups": [{"use_fallback": True}]}) == divided
    )
    head = next(g for g in divided if any(p is model.head.weight for p in g["params"]))
    assert head["use_fallback"] and head["weight_decay"] == 0.05


def test_integer_buffers_are_averaged_in_one_call():
    """They are copied, however many there are."""

    def calls(norms):
        model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(2) for _ in range(norms)))
        ema = moving_average.Ema(model, 0.5)
        model(torch.randn(8, 2))
        with Count() as count:
            ema.update()
        assert all(int(norm.num_batches_tracked) == 1 for norm in ema.model)
        return count.calls

    assert calls(2) == calls(50)


class Count(TorchDispatchMode):
    """Counts what is sent to a device."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))
