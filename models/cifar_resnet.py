"""The thin residual networks of He et al. for CIFAR (arXiv 1512.03385 §4.2).

Widths 16, 32 and 64, n blocks a stage, depth 6n + 2. The paper's CIFAR networks have option A,
`shortcut="pad"`: subsampling and zero channels, without parameters. `shortcut="project"` (default)
is option B.

Variations replace the block:
- Plain: the same convolutions without shortcuts.
- ECA (arXiv 1910.03151): channel attention after the second batch norm, before the addition;
  `eca_position` moves it.
- Ghost (arXiv 1911.11907): both 3x3 convolutions are ghost modules. An ordinary convolution makes
  one in `ratio` of their channels. The second has no ReLU, so that a block can subtract from its
  shortcut.
- ConvNeXt (arXiv 2201.03545): an inverted bottleneck around a 7x7 depthwise convolution. Unlike the
  paper's block it expands first, so that the large kernel works on the wide features, and it keeps
  ResNet's batch norm and its ReLU, also the one after the addition.

Each block: (B, in_channels, H, W) -> (B, width, H / stride, W / stride).
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers import ECA, DropPath, conv_bn, drop_path_rates, eca_kernel, one_of
from models.resnet import init_weights, projection

ECA_POSITIONS = ("bn1", "bn2", "add")


class PadShortcut(nn.Module):
    """Every stride-th pixel, and zeros for the new channels."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x):
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


def create_shortcut(in_channels, width, stride, kind):
    same_shape = stride == 1 and in_channels == width
    if kind == "pad" and not same_shape:
        return PadShortcut(in_channels, width, stride)
    return projection(in_channels, width, stride)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels, width, stride, shortcut):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)
        self.shortcut = create_shortcut(in_channels, width, stride, shortcut)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


class PlainBlock(nn.Module):
    """Two 3x3 convolutions. The shortcut is ignored."""

    def __init__(self, in_channels, width, stride, shortcut):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class ECABlock(Block):
    """Block with efficient channel attention at one of ECA_POSITIONS."""

    def __init__(self, in_channels, width, stride, shortcut, kernel, position):
        super().__init__(in_channels, width, stride, shortcut)
        eca = ECA(kernel or eca_kernel(width))
        self.eca_bn1 = eca if position == "bn1" else nn.Identity()
        self.eca_bn2 = eca if position == "bn2" else nn.Identity()
        self.eca_add = eca if position == "add" else nn.Identity()

    def forward(self, x):
        out = F.relu(self.eca_bn1(self.conv1(x)))
        out = self.eca_bn2(self.conv2(out))
        return F.relu(self.eca_add(self.shortcut(x) + out))


class GhostModule(nn.Module):
    """A 3x3 convolution makes 1 / ratio of the channels; 3x3 depthwise filters derive the others.

    Where ratio doesn't divide width, the surplus channels are dropped.
    """

    def __init__(self, in_channels, width, stride=1, ratio=2, relu=True):
        super().__init__()
        intrinsic = math.ceil(width / ratio)
        self.width = width
        self.primary = conv_bn(in_channels, intrinsic, 3, stride)
        self.cheap = conv_bn(intrinsic, intrinsic * (ratio - 1), 3, groups=intrinsic)
        self.act = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        intrinsic = self.act(self.primary(x))
        return torch.cat([intrinsic, self.act(self.cheap(intrinsic))], dim=1)[:, : self.width]


class GhostBlock(nn.Module):
    """Two ghost modules and a shortcut."""

    def __init__(self, in_channels, width, stride, shortcut, ratio):
        super().__init__()
        self.ghost1 = GhostModule(in_channels, width, stride, ratio)
        self.ghost2 = GhostModule(width, width, ratio=ratio, relu=False)
        self.shortcut = create_shortcut(in_channels, width, stride, shortcut)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.ghost2(self.ghost1(x)))


class ConvNeXtBlock(nn.Module):
    """1x1 to four times the input width, 7x7 depthwise, 1x1."""

    def __init__(self, in_channels, width, stride, shortcut):
        super().__init__()
        hidden = 4 * in_channels
        self.expand = conv_bn(in_channels, hidden, 1)
        self.depthwise = conv_bn(hidden, hidden, 7, stride, groups=hidden)
        self.project = conv_bn(hidden, width, 1)
        self.drop_path = DropPath()
        self.shortcut = create_shortcut(in_channels, width, stride, shortcut)

    def forward(self, x):
        out = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return F.relu(self.shortcut(x) + self.drop_path(out))


class CifarResNet(nn.Module):
    """Stem, three stages of n blocks, average pooling, classifier. (B, 3, H, W) -> (B, num_classes)

    block: (in_channels, width, stride, shortcut) -> Module.
    """

    def __init__(self, num_classes=10, block=Block, *, n, shortcut="project"):
        super().__init__()
        one_of("shortcut", shortcut, ("project", "pad"))
        self.stem = conv_bn(3, 16, 3)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for i in range(n):
                stride = 2 if width > 16 and i == 0 else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return self.blocks(F.relu(self.stem(x)))  # (B, 64, H / 4, W / 4)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def plain_network(num_classes=10, *, n):
    return CifarResNet(num_classes, PlainBlock, n=n)


def eca_resnet(num_classes=10, *, n, kernel, shortcut="project", eca_position="bn2"):
    """kernel: ECA's kernel size, or 0 to derive it from the width."""
    one_of("eca_position", eca_position, ECA_POSITIONS)
    block = partial(ECABlock, kernel=kernel, position=eca_position)
    return CifarResNet(num_classes, block, n=n, shortcut=shortcut)


def ghost_resnet(num_classes=10, *, n, shortcut="project", ratio=2):
    if not 2 <= ratio <= 16:
        raise ValueError(f"ratio must be 2 to 16, the width of the first stage, not {ratio}")
    block = partial(GhostBlock, ratio=ratio)
    return CifarResNet(num_classes, block, n=n, shortcut=shortcut)


def convnext_resnet(num_classes=10, *, n, drop_path=0.05):
    model = CifarResNet(num_classes, ConvNeXtBlock, n=n)
    for block, rate in zip(model.blocks, drop_path_rates(drop_path, 3 * n)):
        block.drop_path.rate = rate
    return model
