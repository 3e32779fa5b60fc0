"""Layers that several model families share.

One alphabet everywhere: B images, C channels, H x W pixels, N tokens, D width, P patch size.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def one_of(option, value, choices):
    """Returns the value of an option. Raises ValueError unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{option} must be {' or '.join(choices)}, not {value!r}")
    return value


def has_cifar_stem(stem):
    """Whether a model's option `stem` asks for 32x32 images instead of the original layout."""
    return one_of("stem", stem, ("cifar", "imagenet")) == "cifar"


def check_drop_path(rate):
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path must lie in [0, 1), not {rate}")


def drop_path_rates(rate, depth):
    """The rates of `depth` blocks, linear from 0 to `rate`, after arXiv 1603.09382 §3."""
    check_drop_path(rate)
    return [rate * i / max(1, depth - 1) for i in range(depth)]


class DropPath(nn.Module):
    """Drops a branch for each image with probability `rate`. (B, ...) -> (B, ...)"""

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))


class LayerScale(nn.Module):
    """A learned factor for each channel (arXiv 2103.17239). (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), value))

    def forward(self, x):
        return x * self.weight[:, None, None]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, eps=1e-6):
        super().__init__(channels, eps)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them. (B, ..., D) -> (B, ..., D)"""

    def __init__(self, width, hidden, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias)
        self.fc2 = nn.Linear(hidden, width, bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Mlp2d(Mlp):
    """Mlp over the channels of each pixel. (B, C, H, W) -> (B, C, H, W)"""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


SMALL_MAP, WIDE = 16, 384  # pixels at most, channels at least: with fewer channels little is gained


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1, without bias. (B, C, H, W) -> (B, out_channels, H, W)

    On a CPU it trains wide layers on small maps by a product of all patches with the weights: the
    gradient of a convolution's weights is slow there (docs/results.md, "Small maps on a CPU").
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.product_on = "cpu"  # None: never

    def forward(self, x):
        height, width = x.shape[-2:]
        is_slow = height * width <= SMALL_MAP and self.out_channels >= WIDE
        if not (is_slow and self.training and x.device.type == self.product_on):
            return super().forward(x)
        x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        patches = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (out_channels, 9 C)
        return F.linear(torch.cat(patches, -1), weight).permute(0, 3, 1, 2)


def conv_bn(in_channels, out_channels, kernel, stride=1, groups=1):
    """Convolution without bias, then batch norm."""
    if (kernel, stride, groups) == (3, 1, 1):
        convolution = Conv3x3(in_channels, out_channels)
    else:
        options = dict(padding=kernel // 2, groups=groups, bias=False)
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def attention_weights(q, k, scale, bias=None):
    """softmax(scale q k' + bias). q, k: (B, heads, N, head_dim) -> (B, heads, N, N)"""
    scores = (q * scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1)


def eca_kernel(channels, gamma=2, b=1):
    """ECA's kernel size for a width C (arXiv 1910.03151 §3.2): near |(log2(C) + b) / gamma|.

    As in the authors' code, that is rounded down, and one is added to an even number; the paper
    takes the nearest odd one.
    """
    k = int(abs(math.log2(channels) + b) / gamma)
    return k if k % 2 else k + 1


class ECA(nn.Module):
    """Gates from a convolution over the channels' means. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, kernel):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"ECA's kernel size must be odd, not {kernel}")
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x):
        gates = self.conv(x.mean((2, 3))[:, None]).sigmoid()  # (B, 1, C)
        gates = gates.transpose(1, 2)[..., None]  # (B, C, 1, 1)
        return x * gates


def he_normal_(convolution):
    """Draws the weight as in arXiv 1502.01852, by the fan-out: with a variance of 2 / fan-out."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():  # torch's fan-out includes all groups; each input reaches only its own
        convolution.weight.mul_(math.sqrt(convolution.groups))


def init_he(model):
    """Convolutions: he_normal_. Linear layers: truncated normal. Biases: zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            he_normal_(module)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
