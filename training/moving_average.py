"""The exponential moving average of a model's weights."""

import contextlib
import copy
import itertools

import torch


class MovingAverage:
    """An exponential moving average of the weights and of the float buffers (batch norm's).

    averaged: a copy of the model for the average, where `model` can't be copied in place: one on
    the CPU keeps the average in host memory, of a sharded model it is sharded as well.
    """

    def __init__(self, model, decay, averaged=None):
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a moving average must be between 0 and 1, not {decay}")
        self.decay, self.updates, self.trained = decay, 0, model
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
        self.floats = [list(group) for _, group in by_kind]
        self.others = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self):
        """Call after each step.

        Early on, the decay is (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage: the
        average is over about the last ninth of the n steps.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for group in self.floats:
            trained = [b.to(self.device) if self.on_other_device else b for _, b in group]
            torch._foreach_lerp_([a for a, _ in group], trained, 1 - decay)
        if self.others:
            torch._foreach_copy_([a for a, _ in self.others], [b for _, b in self.others])

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
