"""--lookahead N: every N steps, the weights are set to a moving average of themselves.

    lookahead = Lookahead(model, every=5, steps=200)
    lookahead.update(step)      # after each step, 1 … steps

Source: arXiv 2404.00498 §3.4 and its repository, a variant of arXiv 1907.08610. The average starts
as the initial weights. After steps N, 2N, … it becomes decay * average + (1 - decay) * weights with
decay = 0.95**N * (step / steps)**3, and the weights are set to it. After the last step (unless
--patience ends the run), the weights are set to the average as it is: the changes since the last
multiple of N are dropped. The average covers the float buffers (statistics of batch norm), too. The
optimizer's momentum is left alone.

Differences from the published code: N is 5 there; it also averages frozen weights, which changes
nothing; a run of fewer than N steps would end with its initial weights, here it is left alone.
A step that fp16 skips counts as a step.
"""

import torch

from training import distributed


class Lookahead:
    """The averages of a model's trained weights and float buffers, {name: tensor}.

    steps: of the whole run. Averages are on the devices of the weights, and sharded as they are.
    """

    def __init__(self, model, every, steps):
        self.every, self.steps = every, steps
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self.averages = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    @torch.no_grad()
    def update(self, step):
        """Call after step number `step`, from 1. Changes the model's weights in place."""
        is_multiple = step % self.every == 0
        is_last = step == self.steps and step > self.every
        if not (is_multiple or is_last):
            return
        averages, weights = _local(self.averages), _local(self.weights)
        if is_multiple:
            decay = 0.95**self.every * (step / self.steps) ** 3
            torch._foreach_lerp_(averages, weights, 1 - decay)
        torch._foreach_copy_(weights, averages)

    def state_dict(self):
        return self.averages

    @torch.no_grad()
    def load_state_dict(self, state):
        """Raises KeyError or ValueError for averages of other weights."""
        state = distributed.shard_like(state, self.averages)
        for name, average in self.averages.items():
            if state[name].shape != average.shape:
                raise ValueError(f"the average of {name} has shape {tuple(state[name].shape)}")
            average.copy_(state[name])


def _local(tensors):
    """The tensors, or this rank's shards of them."""
    return [distributed.local_tensor(tensor) for tensor in tensors.values()]
