"""CoAtNet (arXiv 2106.04803): stages of convolutions, then of transformers.

Departures for 32x32 images: one 3x3 stem convolution instead of two, no stride in it nor in the
first stage, so that the transformers see 8x8 and 4x4 pixels; `coatnet_0` is 56 wide in the stem and
640 at the end (published: 64 and 768). The stride of an MBConv is in its depthwise convolution, not
in the first 1x1, and it expands its input's width.

`coatnet(large_kernel=True)`: the depthwise convolution of each MBConv becomes three in parallel,
mixed by a softmax for each channel: large receptive fields that depend on the image (after arXiv
2303.09030; the selection is that of arXiv 1903.06586).

`coatnet_cifar` has four changes for CIFAR: efficient channel attention (arXiv 1910.03151) instead
of squeeze-excitation, and after the MLPs; a 2x2 stride-2 convolution with batch norm before each
transformer stage instead of pooling; a batch norm after the last convolution of an MBConv's
residual branch, too; no bias in convolutions and linear layers except the classifier.
`stem="imagenet"` is its original layout: stride 2 in the stem and no position bias.

Each block: (B, in_channels, H, W) -> (B, width, H / stride, W / stride).
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers import (
    ECA,
    DropPath,
    LayerNorm2d,
    Mlp2d,
    attention_weights,
    conv_bn,
    drop_path_rates,
    has_cifar_stem,
    init_he,
)


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
    """Depthwise 3x3, 5x5 and 7x7 in parallel, mixed by a softmax over them for each channel."""

    def __init__(self, channels, stride, kernels=(3, 5, 7), reduction=8):
        super().__init__()
        depthwise = partial(conv_bn, channels, channels, stride=stride, groups=channels)
        self.branches = nn.ModuleList(depthwise(kernel) for kernel in kernels)
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, len(kernels) * channels)

    def forward(self, x):
        maps = [branch(x) for branch in self.branches]
        means = sum(m.mean((2, 3)) for m in maps)  # (B, C)
        scores = self.fc2(F.gelu(self.fc1(means))).unflatten(1, (len(maps), -1))
        weights = scores.softmax(1)[..., None, None].unbind(1)  # one (B, C, 1, 1) for each kernel
        first, *others = (w * m for w, m in zip(weights, maps))
        return sum(others, start=first)


def pool(stride):
    return nn.MaxPool2d(stride) if stride > 1 else nn.Identity()


def create_shortcut(in_channels, width, stride, bias=True):
    same = in_channels == width
    change = nn.Identity() if same else nn.Conv2d(in_channels, width, 1, bias=bias)
    return nn.Sequential(pool(stride), change)


class MBConv(nn.Module):
    """Norm, 1x1 to four times the input width, depthwise, channel gate, 1x1.

    large_kernel: a selective kernel as the depthwise convolution; eca: the variation for CIFAR.
    """

    def __init__(
        self, in_channels, width, stride=1, drop_path=0.0, *, large_kernel=False, eca=False
    ):
        super().__init__()
        hidden = 4 * in_channels
        self.norm = nn.BatchNorm2d(in_channels)
        self.expand = conv_bn(in_channels, hidden, 1)
        if large_kernel:
            self.depthwise = SelectiveKernel(hidden, stride)
        else:
            self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.gate = ECA(3) if eca else SqueezeExcite(hidden)
        self.project = conv_bn(hidden, width, 1) if eca else nn.Conv2d(hidden, width, 1)
        self.drop_path = DropPath(drop_path)
        self.shortcut = create_shortcut(in_channels, width, stride, bias=not eca)

    def forward(self, x):
        out = F.gelu(self.depthwise(F.gelu(self.expand(self.norm(x)))))
        out = self.project(self.gate(out))
        return self.shortcut(x) + self.drop_path(out)


def relative_index(size):
    """For each pair of pixels (i, j) of a size x size grid, the row of the bias table. int64 (N, N)

    Offsets (dy, dx) of j from i, each from 1 - size to size - 1, are numbered row by row.
    """
    y = torch.arange(size).repeat_interleave(size)
    x = torch.arange(size).repeat(size)
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    return (dy + size - 1) * (2 * size - 1) + dx + size - 1


class Attention(nn.Module):
    """softmax(q k' / sqrt(head_dim) + bias) v over pixels. (B, C, H, W) -> (B, width, H, W)

    The bias is learned for each head and offset. size: H = W, or 0 for no bias.
    """

    def __init__(self, in_channels, width, heads, size, bias=True):
        super().__init__()
        self.heads, self.size = heads, size
        self.fused_attn = True  # see models.choose_attention
        self.qkv = nn.Linear(in_channels, 3 * width, bias)
        self.proj = nn.Linear(width, width, bias)
        if size:
            self.position_bias = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
            self.register_buffer("index", relative_index(size), persistent=False)

    def forward(self, x):
        H, W = x.shape[2:]
        if self.size and not H == W == self.size:
            built_for = f"a position bias for {self.size}x{self.size}"
            raise ValueError(f"attention over {H}x{W} pixels with {built_for}: set image_size")
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        bias = None
        if self.size:
            bias = self.position_bias[self.index].permute(2, 0, 1).to(q.dtype)  # (heads, N, N)
        scale = q.shape[-1] ** -0.5
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        else:
            x = attention_weights(q, k, scale, bias) @ v
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B, N, width)
        return x.transpose(1, 2).unflatten(2, (H, W))


class Transformer(nn.Module):
    """Attention, then MLP, each after a layer norm. size: see Attention; eca: as for MBConv."""

    def __init__(self, in_channels, width, stride=1, drop_path=0.0, *, heads, size, eca=False):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(in_channels), LayerNorm2d(width)
        self.pool = pool(stride)
        self.attention = Attention(in_channels, width, heads, size, bias=not eca)
        self.mlp = Mlp2d(width, 4 * width, bias=not eca)
        self.gate = ECA(3) if eca else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.shortcut = create_shortcut(in_channels, width, stride)

    def forward(self, x):
        x = self.shortcut(x) + self.drop_path(self.attention(self.pool(self.norm1(x))))
        return x + self.drop_path(self.gate(self.mlp(self.norm2(x))))


class CoAtNet(nn.Module):
    """Stem and blocks, norm, average pooling, classifier. (B, 3, H, W) -> (B, num_classes)"""

    def __init__(self, num_classes, stem, blocks, width):
        super().__init__()
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        init_he(self)

    def no_weight_decay(self):
        return {name for name, _ in self.named_parameters() if name.endswith("position_bias")}

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x)))  # (B, C, H / 8, W / 8); imagenet stem: / 16
        return self.fc(x.mean((2, 3)))


def grid_size(image_size, reduction):
    """Pixels on a side after the image was reduced."""
    if image_size < 1 or image_size % reduction:
        raise ValueError(f"image_size {image_size} is not a positive multiple of {reduction}")
    return image_size // reduction


def create_stage(block, in_channels, width, depth, stride, rates):
    """`depth` blocks; the first has the stride and changes the width. rates: of drop-path."""
    first = block(in_channels, width, stride, next(rates))
    return [first, *(block(width, width, 1, next(rates)) for _ in range(depth - 1))]


def coatnet(num_classes=10, *, widths, depths, large_kernel=False, image_size=32, drop_path=0.2):
    """widths: of the stem and four stages, which see images of 32 px at 32, 16, 8 and 4 px."""
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    channels, *widths = widths
    stem = [conv_bn(3, channels, 3), nn.GELU()]
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        if stage >= 2:
            size = grid_size(image_size, 2**stage)
            block = partial(Transformer, heads=width // 32, size=size)
        else:
            block = partial(MBConv, large_kernel=large_kernel)
        stride = 1 if stage == 0 else 2
        blocks += create_stage(block, channels, width, depth, stride, rates)
        channels = width
    return CoAtNet(num_classes, stem, blocks, channels)


def coatnet_cifar(
    num_classes=10, *, widths, depths, large_stem=False, stem="cifar", image_size=32, drop_path=0.2
):
    """Five stages, the first three of convolutions: at 32, 32, 16, 8 and 4 px for 32 px images."""
    cifar = has_cifar_stem(stem)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    channels, stem_stride = widths[0], 1 if cifar else 2
    if large_stem:
        large = nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False)
        stem = [conv_bn(3, 32, 3, stem_stride), nn.GELU(), large, conv_bn(32, channels, 1)]
    else:
        stem = [conv_bn(3, channels, 3, stem_stride)]
    stem.append(nn.GELU())
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        if stage < 3:
            stride = 2 if stage == 2 else 1
            blocks += create_stage(partial(MBConv, eca=True), channels, width, depth, stride, rates)
        else:
            downsample = nn.Conv2d(channels, width, 2, stride=2, bias=False)
            blocks.append(nn.Sequential(downsample, nn.BatchNorm2d(width)))
            size = grid_size(image_size, 2 ** (stage - 1)) if cifar else 0
            block = partial(Transformer, heads=8, size=size, eca=True)
            blocks += create_stage(block, width, width, depth, 1, rates)
        channels = width
    return CoAtNet(num_classes, stem, blocks, channels)
