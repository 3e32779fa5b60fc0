"""The moving average follows its formula, covers buffers, and leaves the model as it is."""

import pytest
import torch
import torch.nn as nn
from helpers.training import CallCounter

from training.moving_average import MovingAverage


def test_the_average_follows_its_formula_and_covers_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, 0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 4):
        model(torch.randn(8, 2))
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = expected[name] * decay + value * (1 - decay)
            else:
                expected[name] = value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_an_average_on_another_device_lends_its_weights_to_the_model():
    """As with --ema-device cpu, where the model gets its own weights back, also after an error."""
    model = nn.Linear(2, 2)
    average = MovingAverage(model, 0.9)
    average.on_other_device = True
    own = model.weight.detach().clone()
    with torch.no_grad():
        average.model.weight.fill_(7)
    with pytest.raises(RuntimeError, match="stop"), average.on_device() as lent:
        assert lent is model and (model.weight == 7).all()
        raise RuntimeError("stop")
    assert torch.equal(model.weight, own)


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        MovingAverage(nn.Linear(2, 2), decay)


def calls_of_an_update(norms):
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(norms)))
    average = MovingAverage(model, 0.5)
    model(torch.randn(8, 2))
    with CallCounter() as counter:
        average.update()
    assert all(int(norm.num_batches_tracked) == 1 for norm in average.model)
    return counter.calls.total()


def test_an_update_takes_as_many_calls_for_50_norms_as_for_two():
    assert calls_of_an_update(2) == calls_of_an_update(50)
