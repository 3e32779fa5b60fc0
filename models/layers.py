"""Pieces that several families share."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def one_of(option, value, choices):
    """Returns the value of an option, or raises ValueError naming what it may be."""
    if value not in choices:
        raise ValueError(f"{option} must be {' or '.join(choices)}, not {value!r}")
    return value


def drop_path_rates(rate, depth):
    """The rate of each of `depth` blocks, growing linearly from 0 to `rate` (arXiv 1603.09382 §3)."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path must lie in [0, 1), not {rate}")
    return [rate * i / max(1, depth - 1) for i in range(depth)]


class DropPath(nn.Module):
    """Stochastic depth: leaves a branch out for each image with probability `rate`. (B, ...) -> (B, ...)"""

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self):
        return f"rate={self.rate:.3f}"


class LayerScale(nn.Module):
    """A learnt factor for each channel of a branch (arXiv 2103.17239). (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), value))

    def forward(self, x):
        return x * self.weight[:, None, None]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel. (B, C, H, W) -> (B, C, H, W); no copies where x lies as channels_last"""

    def __init__(self, channels, eps=1e-6):
        super().__init__(channels, eps)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two linear layers on each pixel. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, width, ratio=4, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width, bias)
        self.fc2 = nn.Linear(ratio * width, width, bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def attend(q, k, v, scale, bias=None):
    """softmax(scale q k' + bias) v; q, k, v (B, h, N, d), bias broadcast to (B, h, N, N) or None.

    The fused kernel, but for bf16 on a CPU: its backward pass there took 133 ms where this one took 19 (B 128, h 12, N 65,
    d 16, two threads); in fp32 it was the other way round, 34 against 59.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return attention_weights(q, k, scale, bias) @ v


def attention_weights(q, k, scale, bias=None):
    """softmax(scale q k' + bias), (B, h, N, N); arguments as those of `attend`."""
    scores = (q * scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1)


def eca_kernel(channels, gamma=2, b=1):
    """ECA's kernel size for a width (arXiv 1910.03151 §3.2): |(log2(C) + b) / gamma|, as the next odd integer."""
    k = int(abs(math.log2(channels) + b) / gamma)
    return k if k % 2 else k + 1


class ECA(nn.Module):
    """Efficient channel attention (arXiv 1910.03151): gates from a convolution across neighbouring channels' means.

    (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(self, kernel):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"ECA's kernel size must be odd, not {kernel}")
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x):
        gates = self.conv(x.mean((2, 3))[:, None]).sigmoid()  # (B, 1, C)
        return x * gates.transpose(1, 2)[..., None]


def init_he(model, linear_std=0.02):
    """He initialisation of convolutions by the fan-out of each group; linear layers truncated normal; biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=linear_std)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
