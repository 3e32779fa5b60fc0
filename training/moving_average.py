"""The exponential moving average of a model's weights."""

import contextlib
import copy
import itertools

import torch


class MovingAverage:
    """An exponential moving average of the weights and of the float buffers (batch norm's).

    averaged: the model that keeps the average, by default a deep copy of `model`. One on the CPU
    keeps it in host memory; for a sharded model it has to be sharded in the same way.
    """

    def __init__(self, model, decay, averaged=None):
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a moving average must be between 0 and 1, not {decay}")
        self.decay, self.updates = decay, 0
        self.trained = model
        averaged = copy.deepcopy(model) if averaged is None else averaged
        self.model = averaged.eval().requires_grad_(False)
        self.device = next(self.model.parameters()).device
        self.on_other_device = self.device != next(model.parameters()).device
        # Frozen parameters stay as they are.
        pairs = [
            (a, b) for a, b in zip(self.model.parameters(), model.parameters()) if b.requires_grad
        ]
        pairs += zip(self.model.buffers(), model.buffers())
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        # Parameters of a sharded model are DTensors, its buffers are not: one call takes one kind.
        by_kind = itertools.groupby(floats, lambda pair: hasattr(pair[0], "full_tensor"))
        self.float_groups = [list(group) for _, group in by_kind]
        self.other_pairs = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self):
        """Call after each step.

        Early on, the decay is (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage: the
        average is over about the last ninth of the n steps.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for group in self.float_groups:
            values = [b.to(self.device) if self.on_other_device else b for _, b in group]
            torch._foreach_lerp_([a for a, _ in group], values, 1 - decay)
        if self.other_pairs:
            averages, values = zip(*self.other_pairs)
            torch._foreach_copy_(averages, values)

    @contextlib.contextmanager
    def on_device(self):
        """A block in which the yielded model has the averaged weights, on the training device.

        An average in host memory is lent to the trained model, which gets its own weights back.
        """
        if not self.on_other_device:
            yield self.model
            return
        own = {
            name: value.to("cpu", copy=True) for name, value in self.trained.state_dict().items()
        }
        try:
            self.trained.load_state_dict(self.model.state_dict())
            yield self.trained
        finally:
            self.trained.load_state_dict(own)

    def state_dict(self):
        return {"average": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.model.load_state_dict(state["average"])
