"""CoAtNet (arXiv 2106.04803): stages of inverted-bottleneck convolutions, then stages of transformers with relative bias.

Departures for 32x32 pictures: one 3x3 stem convolution instead of two, no stride in it nor in the first stage, so that
the transformers see 8x8 and 4x4 pixels; `coatnet_0` is 56 wide in the stem and 640 at the end (published: 64 and 768).
The stride of an MBConv is at its depthwise convolution, not at the first 1x1, and it expands its input's width.

`coatnet`, with large_kernel=True: the depthwise convolution of each MBConv becomes three in parallel whose outputs are
mixed by a softmax for each channel, for large receptive fields that the picture chooses (after arXiv 2303.09030; the
selection is that of arXiv 1903.06586).

`coatnet_cifar`: four changes that were made for CIFAR. Efficient channel attention (arXiv 1910.03151) instead of
squeeze-excitation, and after the MLPs; the width changes between transformer stages by 2x2 stride-2 convolutions instead
of pooled shortcuts; a batch norm after every convolution of an MBConv; and no bias anywhere but in the classifier. Its
`stem="imagenet"` is the layout that the name first stood for: stride 2 in the stem and no position bias.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers import ECA, DropPath, LayerNorm2d, Mlp, attend, drop_path_rates, init_he, one_of
from models.resnet import conv_bn


class SqueezeExcite(nn.Module):
    """Gates from the means of all channels (arXiv 1709.01507). (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, reduction=4):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x):
        gates = self.fc2(F.gelu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * gates[..., None, None]


class SelectiveKernel(nn.Module):
    """Depthwise 3x3, 5x5 and 7x7 in parallel, mixed by a softmax over the three for each channel.

    (B, C, H, W) -> (B, C, H / stride, W / stride)
    """

    def __init__(self, channels, stride, kernels=(3, 5, 7), reduction=8):
        super().__init__()
        self.branches = nn.ModuleList(
            conv_bn(channels, channels, k, stride, groups=channels) for k in kernels
        )
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, len(kernels) * channels)

    def forward(self, x):
        maps = [branch(x) for branch in self.branches]
        means = sum(m.mean((2, 3)) for m in maps)  # (B, C)
        scores = self.fc2(F.gelu(self.fc1(means))).unflatten(1, (len(maps), -1))
        weights = scores.softmax(1)[..., None, None].unbind(1)  # for each kernel (B, C, 1, 1)
        first, *rest = (w * m for w, m in zip(weights, maps))
        return sum(rest, start=first)


def depthwise3(channels, stride):
    return conv_bn(channels, channels, 3, stride, groups=channels)


def conv_bias(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 1)


def pooled(stride):
    return nn.MaxPool2d(stride) if stride > 1 else nn.Identity()


class MBConv(nn.Module):
    """Norm, 1x1 to four times the input width, depthwise, channel gate, 1x1. (B, C, H, W) -> (B, width, H / stride, W / stride)

    depthwise: (channels, stride) -> Module; gate: (channels) -> Module; project: (in_channels, out_channels) -> Module.
    """

    def __init__(
        self,
        in_channels,
        width,
        stride=1,
        drop_path=0.0,
        *,
        depthwise=depthwise3,
        gate=SqueezeExcite,
        project=conv_bias,
        shortcut_bias=True,
    ):
        super().__init__()
        hidden = 4 * in_channels
        self.norm = nn.BatchNorm2d(in_channels)
        self.expand = conv_bn(in_channels, hidden, 1)
        self.depthwise = depthwise(hidden, stride)
        self.gate = gate(hidden)
        self.project = project(hidden, width)
        self.drop_path = DropPath(drop_path)
        change = (
            nn.Identity()
            if in_channels == width
            else nn.Conv2d(in_channels, width, 1, bias=shortcut_bias)
        )
        self.shortcut = nn.Sequential(pooled(stride), change)

    def residual(self, x):
        x = F.gelu(self.expand(self.norm(x)))
        x = F.gelu(self.depthwise(x))
        return self.project(self.gate(x))

    def forward(self, x):
        return self.shortcut(x) + self.drop_path(self.residual(x))


def relative_index(size):
    """For each pair of pixels (i, j) of a size x size grid, the row of the bias table for their offset. int64 (N, N)

    Offsets (dy, dx) of j from i, each from 1 - size to size - 1, are numbered row by row.
    """
    y = torch.arange(size).repeat_interleave(size)
    x = torch.arange(size).repeat(size)
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    return (dy + size - 1) * (2 * size - 1) + dx + size - 1


class Attention(nn.Module):
    """Self-attention over pixels, with a learnt bias for each head and offset. (B, C, H, W) -> (B, width, H, W)

    softmax(q k' / sqrt(head_dim) + bias) v; size: H = W, or 0 for no position bias.
    """

    def __init__(self, in_channels, width, heads, size, bias=True):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(in_channels, 3 * width, bias)
        self.proj = nn.Linear(width, width, bias)
        if size:
            self.position_bias = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
            self.register_buffer("index", relative_index(size), persistent=False)

    def forward(self, x):
        B, _, H, W = x.shape
        if self.size and not H == W == self.size:
            raise ValueError(
                f"attention over {H}x{W} pixels with a position bias for {self.size}x{self.size}: set image_size"
            )
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (
            self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, N, head_dim)
        bias = (
            self.position_bias[self.index].permute(2, 0, 1).to(q.dtype) if self.size else None
        )  # (heads, N, N)
        x = attend(q, k, v, q.shape[-1] ** -0.5, bias)
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B, N, width)
        return x.transpose(1, 2).unflatten(2, (H, W))


class Transformer(nn.Module):
    """Attention, then MLP, each after a layer norm. (B, C, H, W) -> (B, width, H / stride, W / stride)

    size: pixels on a side after the stride, or 0 for no position bias; gate: a module that follows the MLP.
    """

    def __init__(
        self, in_channels, width, heads, size, stride=1, drop_path=0.0, bias=True, gate=nn.Identity
    ):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(in_channels), LayerNorm2d(width)
        self.pool = pooled(stride)
        self.attention = Attention(in_channels, width, heads, size, bias)
        self.mlp = Mlp(width, 4, bias)
        self.gate = gate()
        self.drop_path = DropPath(drop_path)
        change = nn.Identity() if in_channels == width else nn.Conv2d(in_channels, width, 1)
        self.shortcut = nn.Sequential(pooled(stride), change)

    def forward(self, x):
        x = self.shortcut(x) + self.drop_path(self.attention(self.pool(self.norm1(x))))
        return x + self.drop_path(self.gate(self.mlp(self.norm2(x))))


class CoAtNet(nn.Module):
    """Stem and blocks, norm, average pooling, classifier. (B, 3, H, W) -> (B, num_classes)"""

    def __init__(self, num_classes, stem, blocks, width):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        init_he(self)

    def no_weight_decay(self):
        return {name for name, _ in self.named_parameters() if name.endswith("position_bias")}

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x)))  # (B, C, H / 8, W / 8)
        return self.fc(x.mean((2, 3)))


def grid(image_size, reduction):
    if image_size % reduction:
        raise ValueError(f"image_size {image_size} is not a multiple of {reduction}")
    return image_size // reduction


def coatnet(num_classes=10, *, widths, depths, large_kernel=False, image_size=32, drop_path=0.2):
    """CoAtNet. widths: of the stem and four stages; depths: of the stages. At 32 px the stages work at 32, 16, 8 and 4."""
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    channels, *widths = widths
    stem = nn.Sequential(conv_bn(3, channels, 3), nn.GELU())
    convolution = partial(MBConv, depthwise=SelectiveKernel) if large_kernel else MBConv
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            if stage < 2:
                blocks.append(convolution(channels, width, stride, next(rates)))
            else:
                size = grid(image_size, 2**stage)
                blocks.append(Transformer(channels, width, width // 32, size, stride, next(rates)))
            channels = width
    return CoAtNet(num_classes, stem, blocks, channels)


def coatnet_cifar(
    num_classes=10, *, widths, depths, large_stem=False, stem="cifar", image_size=32, drop_path=0.2
):
    """The variation for CIFAR: five stages, the first three of convolutions. At 32 px they work at 32, 32, 16, 8 and 4."""
    cifar = one_of("stem", stem, ("cifar", "imagenet")) == "cifar"
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    entry, channels = 1 if cifar else 2, widths[0]
    if large_stem:
        large = nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False)
        layers = [conv_bn(3, 32, 3, entry), nn.GELU(), large, conv_bn(32, channels, 1), nn.GELU()]
    else:
        layers = [conv_bn(3, channels, 3, entry), nn.GELU()]
    eca = partial(ECA, 3)
    convolution = partial(
        MBConv, gate=lambda _: eca(), project=partial(conv_bn, kernel=1), shortcut_bias=False
    )
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        if stage > 2:
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, width, 2, stride=2, bias=False), nn.BatchNorm2d(width)
                )
            )
            channels = width
        size = grid(image_size, 2 ** (stage - 1)) if cifar and stage > 2 else 0
        for i in range(depth):
            if stage <= 2:
                blocks.append(
                    convolution(channels, width, 2 if stage == 2 and i == 0 else 1, next(rates))
                )
            else:
                blocks.append(
                    Transformer(channels, width, 8, size, 1, next(rates), bias=False, gate=eca)
                )
            channels = width
    return CoAtNet(num_classes, nn.Sequential(*layers), blocks, channels)
