"""The thin residual networks that He et al. made for CIFAR (arXiv 1512.03385 §4.2): widths 16, 32, 64 and n blocks a stage.

Depth is 6n + 2. `shortcut="pad"` is the paper's option A: subsampling and zero channels, no parameters;
`shortcut="project"`, the default, is option B, which trains a little better.
"""

import torch.nn as nn
import torch.nn.functional as F

from models.resnet import conv_bn, init_weights, projection


class PadShortcut(nn.Module):
    """Every stride-th pixel, and zeros for the new channels. (B, C, H, W) -> (B, out_channels, H / stride, W / stride)"""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.stride, self.new = stride, out_channels - in_channels

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. (B, C, H, W) -> (B, width, H / stride, W / stride)"""

    def __init__(self, in_channels, width, stride, shortcut):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)
        same = stride == 1 and in_channels == width
        kind = PadShortcut if shortcut == "pad" and not same else projection
        self.shortcut = kind(in_channels, width, stride)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


class CifarResNet(nn.Module):
    """Stem, three stages of n blocks, average pooling, classifier. (B, 3, H, W) -> (B, num_classes)"""

    def __init__(self, num_classes=10, *, n, shortcut="project"):
        super().__init__()
        if shortcut not in ("project", "pad"):
            raise ValueError(f"shortcut must be project or pad, not {shortcut!r}")
        self.stem = conv_bn(3, 16, 3)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for i in range(n):
                blocks.append(Block(channels, width, 2 if width > 16 and i == 0 else 1, shortcut))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))  # (B, 64, H / 4, W / 4)
        return self.fc(x.mean((2, 3)))
