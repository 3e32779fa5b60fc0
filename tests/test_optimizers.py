"""Parameter groups hold each parameter once; optimizers descend and resume from their states."""

import copy
import io
import re

import pytest
import torch
import torch.nn as nn
from helpers.errors import refused
from helpers.runs import words
from helpers.training import fit, network, resolve, same_weights, start
from timm.optim import list_optimizers

import models
import train
from common import checkpoint
from common.errors import UserError
from training import loop, optimizers
from training.optimizers import OPTIMIZERS, build_optimizer, muon_groups, param_groups


def test_groups_hold_every_parameter_once_without_decay_of_norms():
    model = models.create_model("resnet20", 10)
    decayed, plain = param_groups(model, 5e-4)
    assert decayed["weight_decay"] == 5e-4 and plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])


def test_groups_respect_no_weight_decay_and_frozen_parameters():
    model = nn.Linear(3, 2)
    model.no_weight_decay = lambda: {"weight"}
    (group,) = param_groups(model, 0.1)
    assert group["weight_decay"] == 0 and len(group["params"]) == 2
    model.no_weight_decay = lambda: {"w*"}  # as in timm's xcit
    assert [group["weight_decay"] for group in param_groups(model, 0.1)] == [0]
    model.bias.requires_grad_(False)
    (group,) = param_groups(model, 0.1)
    assert [p.shape for p in group["params"]] == [(2, 3)]


def test_sgd_without_momentum_is_plain_gradient_descent():
    model, before = nn.Linear(3, 2), nn.Linear(3, 2)
    before.load_state_dict(model.state_dict())
    options = "--optimizer sgd --momentum 0 --weight-decay 0 --lr 0.5"
    args = resolve(train, *words(options))
    optimizer = optimizers.create_optimizer(args, model)
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters()):
        torch.testing.assert_close(p, q - 1)


@pytest.mark.parametrize("fault", ["twice", "missing"])
def test_groups_that_omit_or_repeat_a_parameter_are_refused(fault):
    model = nn.Linear(3, 2)
    params = [model.weight, model.weight, model.bias] if fault == "twice" else [model.bias]
    with pytest.raises(ValueError, match="parameter groups"):
        optimizers.check_groups([dict(params=params)], model)


def trained_by_adamw(model, layer_decay):
    """Names of the parameters for which AdamW's averages exist after a step of Muon."""
    args = resolve(train, "--optimizer", "muon", "--layer-decay", layer_decay)
    optimizer = optimizers.create_optimizer(args, model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {name for name, p in model.named_parameters() if "exp_avg" in optimizer.state[p]}


@pytest.mark.parametrize(
    ("name", "layer_decay", "expected"),
    [
        ("resnet20", 1.0, {"stem.0.weight", "fc.weight"}),
        ("coatnet_0", 1.0, {"stem.0.0.weight", "fc.weight", "blocks.5.attention.position_bias"}),
        ("timm/test_vit", 0.8, {"patch_embed.proj.weight", "head.weight", "pos_embed"}),
    ],
)
def test_muon_leaves_first_layer_classifier_and_embeddings_to_adamw(name, layer_decay, expected):
    model = models.create_model(name, 10)
    by_adamw = trained_by_adamw(model, layer_decay)
    assert expected <= by_adamw
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1
    }
    assert layers - expected and not (layers - expected) & by_adamw
    parameters = model.named_parameters()
    assert all(name in by_adamw for name, p in parameters if p.ndim < 2 or "position_bias" in name)


def test_muon_keeps_decay_and_scale_of_a_group_that_it_splits():
    model = models.create_model("timm/test_vit", 10)
    groups = param_groups(model, 0.05, layer_decay=0.5)
    split = muon_groups(groups, model)
    before, after = (
        {id(p): (g["weight_decay"], g["lr_scale"]) for g in some for p in g["params"]}
        for some in (groups, split)
    )
    assert before == after
    head = next(g for g in split if any(p is model.head.weight for p in g["params"]))
    assert head["use_fallback"] and head["weight_decay"] == 0.05


def test_a_saved_state_from_before_muon_split_its_groups_keeps_them():
    model = models.create_model("resnet20", 10)
    groups = param_groups(model, 0.05)
    assert muon_groups(groups, model, {"param_groups": [{"lr": 0.1}]}) is groups
    assert len(muon_groups(groups, model, {"param_groups": [{"use_fallback": True}]})) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 4, 4), torch.randn(16, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    defaults, losses = OPTIMIZERS[name], []
    groups = param_groups(model, defaults["weight_decay"])
    optimizer = build_optimizer(name, groups, 0.01, defaults["momentum"])
    for _ in range(60):
        losses.append((model(x) - y).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_momentum_is_nesterovs_unless_it_is_turned_off(name):
    args = [resolve(train, "--optimizer", name, *more) for more in ([], ["--no-nesterov"])]
    made = [optimizers.create_optimizer(one, models.create_model("resnet20", 10)) for one in args]
    assert [one.param_groups[0]["nesterov"] for one in made] == [True, False]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_state_does_not_change_the_kernels(name, fused):
    """A run may resume with a GradScaler, sharded, or on another type of device."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.full((3,), 0.5)
    before = build_optimizer(name, [dict(params=params[:1])], 0.1, fused=fused)
    after = build_optimizer(name, [dict(params=params[1:])], 0.1, fused=not fused)
    before.step()
    params[1].data.copy_(params[0].data)
    optimizers.load_optimizer(after, copy.deepcopy(before.state_dict()))
    kernels = [optimizer.param_groups[0]["fused"] for optimizer in (before, after)]
    assert kernels == ([True, None] if fused else [None, True])
    before.step(), after.step()
    torch.testing.assert_close(*params)


def test_a_state_of_another_shape_is_refused():
    params = [nn.Parameter(torch.ones(size)) for size in (3, 4)]
    before, after = (build_optimizer("adamw", [dict(params=[p])], 0.1) for p in params)
    params[0].grad = torch.ones(3)
    before.step()
    with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\) for a parameter of \(4,\)"):
        optimizers.load_optimizer(after, before.state_dict())


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("sgd", lambda group: group["momentum"]),
        ("adam", lambda group: group["betas"][0]),
        ("adamw", lambda group: group["betas"][0]),
        ("muon", lambda group: group["momentum"]),
        ("muon_sgd", lambda group: group["momentum"]),
        ("timm/lamb", lambda group: group["betas"][0]),
        ("timm/rmsproptf", lambda group: group["momentum"]),
    ],
)
def test_momentum_reaches_the_optimizer(name, read):
    groups = param_groups(models.create_model("resnet20", 10), 5e-4)
    optimizer = build_optimizer(name, groups, 0.01, momentum=0.55)
    assert {read(group) for group in optimizer.param_groups} == {0.55}


def test_an_unknown_optimizer_is_refused():
    with refused("--optimizer: must be one of sgd, adam", "not 'sgdd'; did you mean sgd?"):
        build_optimizer("sgdd", [dict(params=[torch.zeros(1)])], 0.1)


@pytest.mark.parametrize("name", [*list_optimizers(), "lookahead_adam"])
def test_an_optimizer_of_timm_resumes_bit_identically_or_is_refused(name):
    try:
        state, resumed = (start(network(norm=True), f"timm/{name}", 1e-3) for _ in range(2))
    except UserError as error:
        assert re.fullmatch(rf"--optimizer: timm/{name} can't be used: [^\n]+", str(error))
        assert re.fullmatch("bnb.*|fused.*|kron.*|lookahead_.*|adahessian", name)
        return
    with pytest.raises(loop.Interrupted):
        fit(state, stop=lambda: state.progress.step == 2)
    file = io.BytesIO()
    torch.save(state.contents(), file)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    for one in (state, resumed):
        fit(one, 2)
    assert not same_weights(state.model, network(norm=True))
    first, second = (checkpoint.to_cpu(one.contents()) for one in (state, resumed))
    for contents in (first, second):
        del contents["training"]["progress"]
    assert checkpoint.digest(first) == checkpoint.digest(second)
