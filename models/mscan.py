"""MSCAN, the convolutional encoder of SegNeXt (arXiv 2209.08575), at a size for 32x32 images.

Blocks are as published: batch norm before attention and MLP, a 3x3 depthwise convolution inside the
MLP, a shortcut around the attention's gate as well as around the branch, layer scale on both
branches. Departures: three stages of 2, 2 and 3 blocks with widths 32, 64 and 128 instead of four;
a single 3x3 stride-1 convolution as the stem, so that the stages work at 32, 16 and 8 pixels; all
MLP ratios 4.
"""

import torch.nn as nn
import torch.nn.functional as F

from models.layers import DropPath, LayerNorm2d, LayerScale, drop_path_rates, init_he


def depthwise(channels, kernel):
    """Depthwise convolution that keeps the size; kernel: (height, width)."""
    height, width = kernel
    return nn.Conv2d(channels, channels, kernel, padding=(height // 2, width // 2), groups=channels)


class MSCA(nn.Module):
    """Gates from 5x5 and from strips of 7, 11, 21 px (eq. 1-2). (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels):
        super().__init__()
        self.local = depthwise(channels, (5, 5))
        self.strips = nn.ModuleList(
            nn.Sequential(depthwise(channels, (1, k)), depthwise(channels, (k, 1)))
            for k in (7, 11, 21)
        )
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        local = self.local(x)
        scales = sum((strip(local) for strip in self.strips), start=local)
        return self.mix(scales) * x


class Attention(nn.Module):
    """MSCA between two 1x1 convolutions, with a shortcut. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.msca = MSCA(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.proj_out(self.msca(F.gelu(self.proj_in(x))))


class ConvMlp(nn.Module):
    """1x1, 3x3 depthwise, GELU, 1x1. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, ratio):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, ratio * channels, 1)
        self.depthwise = depthwise(ratio * channels, (3, 3))
        self.fc2 = nn.Conv2d(ratio * channels, channels, 1)

    def forward(self, x):
        return self.fc2(F.gelu(self.depthwise(self.fc1(x))))


class Block(nn.Module):
    """Attention, then MLP. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, mlp_ratio, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.attention = Attention(channels)
        self.mlp = ConvMlp(channels, mlp_ratio)
        self.scale1, self.scale2 = LayerScale(channels, 1e-2), LayerScale(channels, 1e-2)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class MSCAN(nn.Module):
    """Three stages, average pooling, classifier. (B, 3, H, W) -> (B, num_classes)"""

    def __init__(self, num_classes=10, *, widths, depths, mlp_ratio, drop_path=0.1):
        super().__init__()
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        stages, channels = [], 3
        for width, depth in zip(widths, depths):
            stride = 1 if channels == 3 else 2
            entry = nn.Conv2d(channels, width, 3, stride, padding=1)
            blocks = [Block(width, mlp_ratio, next(rates)) for _ in range(depth)]
            stages.append(nn.Sequential(entry, nn.BatchNorm2d(width), *blocks, LayerNorm2d(width)))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x):
        x = self.stages(x)  # (B, C, H / 4, W / 4)
        return self.fc(x.mean((2, 3)))
