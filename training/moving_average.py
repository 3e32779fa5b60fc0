"""The exponential moving average of a model's weights."""

import contextlib
import copy
import itertools

import torch


class Ema:
    """An exponential moving average of a model's weights and of its float buffers (batch norm's statistics).

    copied: a copy of the model, for one that can't be copied here because it is sharded; host: keep it in the host's memory.
    """

    def __init__(self, model, decay, copied=None, host=False):
        if not 0 < decay < 1:
            raise ValueError(f"an EMA decay must lie between 0 and 1, not {decay}")
        self.decay, self.updates = decay, 0
        self.trained, self.host = model, host
        there = (
            {id(t): _on_host(t) for t in (*model.parameters(), *model.buffers())} if host else {}
        )  # never twice on a GPU
        self.model = (
            (copied or copy.deepcopy(model, there)).eval().requires_grad_(False)
        )  # the averaged model, to be evaluated
        pairs = [
            pair
            for pair in zip(self.model.parameters(), model.parameters())
            if pair[1].requires_grad
        ]
        pairs += zip(self.model.buffers(), model.buffers())  # what is frozen stays as it is
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        # Of a sharded model the parameters are DTensors and the buffers are not: one call takes one kind.
        self.floats = [
            list(same)
            for _, same in itertools.groupby(floats, lambda pair: hasattr(pair[0], "full_tensor"))
        ]
        self.others = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self):
        """Call after each optimizer step. Early on the average is over the steps so far, not over the horizon."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for same in self.floats:
            here = [b.to(a.device) if self.host else b for a, b in same]
            torch._foreach_lerp_([a for a, _ in same], here, 1 - decay)
        if self.others:
            torch._foreach_copy_([a for a, _ in self.others], [b for _, b in self.others])

    @contextlib.contextmanager
    def at_hand(self):
        """The averaged model where it can be evaluated: one on the host lends its values to the trained one, which gets its own
        back at the end."""
        if not self.host:
            yield self.model
            return
        own = {key: _on_host(value) for key, value in self.trained.state_dict().items()}
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


def _on_host(tensor):
    copied = tensor.detach().to("cpu", copy=True)
    return (
        torch.nn.Parameter(copied, tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter)
        else copied
    )
