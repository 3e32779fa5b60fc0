"""MuonSGD: Muon on convolutions, SGD with Nesterov momentum on the rest."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from training import optimizers
from training.muon import COEFFICIENTS, MuonSGD, orthogonalize


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 4))


def optimizer_of(model, lr=0.1, **values):
    args = dict(optimizer="muon_sgd", lr=lr, momentum=0.6, weight_decay=0.01, layer_decay=1.0)
    args["nesterov"] = True
    return optimizers.create_optimizer(SimpleNamespace(**(args | values)), model)


def step(model, optimizer, images):
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (16, 16)])
def test_orthogonalize_keeps_directions_and_evens_out_sizes(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    expected, (a, b, c) = s / s.norm(), COEFFICIENTS
    for _ in range(3):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(orthogonalize(matrix), u @ torch.diag(expected) @ v)
    assert orthogonalize(torch.zeros(shape)).eq(0).all()


def test_only_convolutions_are_trained_by_muon():
    model = network()
    groups = optimizer_of(model).param_groups
    orthogonal = [p for group in groups if group["orthogonal"] for p in group["params"]]
    assert len(orthogonal) == 1 and orthogonal[0] is model[0].weight
    assert sum(len(group["params"]) for group in groups) == 6
    decays = {group["weight_decay"] for group in groups if not group["orthogonal"]}
    assert decays == {0.01 / 0.1, 0.0}  # of the classifier; of norms and biases


def test_a_rate_of_zero_changes_only_norms():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model, lr=0.0)
    step(model, optimizer, torch.randn(4, 3, 5, 5))
    assert torch.equal(model[3].weight, before["3.weight"])
    scale = 8**0.5 / before["0.weight"].norm()
    torch.testing.assert_close(model[0].weight.data, before["0.weight"] * scale)


def test_muon_follows_its_formula():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 2, 3, 3))
    optimizer = MuonSGD([dict(params=[p], orthogonal=True)], lr=0.2, momentum=0.6)
    expected, buffer = p.detach().clone(), torch.zeros_like(p)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        buffer = 0.6 * buffer + p.grad
        update = orthogonalize((p.grad + 0.6 * buffer).view(6, -1)).view_as(p)
        expected = expected * (6**0.5 / expected.norm()) - 0.2 * update
        torch.testing.assert_close(p.data, expected)


def test_the_size_of_a_gradient_does_not_change_muon():
    """So the mean over a batch gives the steps of the sum."""
    torch.manual_seed(0)
    start, gradient, results = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3), []
    for factor in (1.0, 2000.0):
        p = nn.Parameter(start.clone())
        p.grad = factor * gradient
        MuonSGD([dict(params=[p], orthogonal=True)], lr=0.2).step()
        results.append(p.data)
    torch.testing.assert_close(*results)


def test_the_rest_is_trained_as_by_torch_with_nesterov_momentum():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))] for _ in range(2))
    optimizer = MuonSGD(ours, 0.1, weight_decay=0.03)
    reference = torch.optim.SGD(theirs, 0.1, momentum=0.85, nesterov=True, weight_decay=0.03)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step(), reference.step()
    torch.testing.assert_close(ours, theirs)


def test_parameters_without_gradients_are_left_alone():
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    params[0].grad = torch.ones(2, 2)
    optimizer = MuonSGD(params, 0.1)
    optimizer.step()
    assert params[1].eq(1).all() and params[1] not in optimizer.state
