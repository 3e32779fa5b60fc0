"""Muon for convolutions and SGD for the rest, as in the fastest training on CIFAR.

Muon orthogonalizes the momentum of each weight (K. Jordan, github.com/KellerJordan/Muon). This
variant (of arXiv 2404.00498 and its repository) takes three steps of Newton-Schulz, resets the norm
of each weight before the update, and takes SGD with Nesterov momentum for all other parameters.
"""

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x^3 and x^5


class MuonSGD(torch.optim.Optimizer):
    """Groups with `orthogonal` use Muon, on weights of two or more dimensions; the others use SGD.

    lr: of both. Muon scales a weight so that the root mean square of its rows' norms is 1, and
    subtracts lr times a matrix with singular values near 1. momentum: Muon's, sgd_momentum: SGD's,
    both Nesterov's. weight_decay: SGD's: this share of the weight is added to the gradient. Muon
    has none, because it resets the norms.
    """

    def __init__(self, params, lr, momentum=0.6, sgd_momentum=0.85, weight_decay=0.0):
        options = dict(lr=lr, momentum=momentum, sgd_momentum=sgd_momentum)
        super().__init__(params, options | dict(weight_decay=weight_decay, orthogonal=False))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["orthogonal"]:
                self._muon_step(params, group["lr"], group["momentum"])
            else:
                self._sgd_step(params, group["lr"], group["sgd_momentum"], group["weight_decay"])
        return loss

    def _muon_step(self, params, lr, momentum):
        updates = self._with_momentum(params, [p.grad for p in params], momentum)
        for p, update in zip(params, updates):
            p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-7))
            p.sub_(orthogonalize(update.flatten(1)).view(p.shape), alpha=lr)

    def _sgd_step(self, params, lr, momentum, weight_decay):
        gradients = [p.grad for p in params]
        if weight_decay:
            gradients = torch._foreach_add(gradients, params, alpha=weight_decay)
        updates = self._with_momentum(params, gradients, momentum)
        torch._foreach_sub_(params, updates, alpha=lr)

    def _with_momentum(self, params, gradients, momentum):
        """Nesterov momentum: buffer = momentum * buffer + g; returns g + momentum * buffer."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return torch._foreach_add(gradients, buffers, alpha=momentum)


def orthogonalize(matrix, steps=3):
    """A matrix with the singular vectors of `matrix` and singular values near 1.

    The published code computes in bfloat16. In float32 it takes about a percent of a step
    of airbench94 on a CPU.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
