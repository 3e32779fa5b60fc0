"""Batch norm with the statistics of the global batch, over all ranks."""

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import convert_sync_batchnorm  # knows timm's norms with an activation, too

from common.errors import UserError


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, on each; the gradient is summed as well."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient.contiguous())


class SyncBatchNorm(nn.BatchNorm2d):
    """Works on any device; torch's own needs a GPU. (B, C, H, W) -> same"""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        x32 = x.float()
        mean = _SumOverRanks.apply(x32.sum((0, 2, 3))) / count
        centered = x32 - mean[:, None, None]
        var = _SumOverRanks.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum
            if momentum is None:
                momentum = 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * count / (count - 1), momentum)
        out = centered * (var + self.eps).rsqrt()[:, None, None]
        return (out * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def sync_batch_norm(model, device):
    """The model with batch norm over all ranks: torch's on a GPU, else ours. Raises UserError."""
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for module in list(model.modules()):
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"--sync-bn: {type(module).__name__} needs a GPU for this", 2)
    return model
