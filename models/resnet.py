"""Residual networks and their plain counterparts for small images, and one with multi-scale blocks.

He et al., arXiv 1512.03385: the ImageNet layouts (18 to 152 layers, widths 64 to 512) with a 3x3
stride-1 stem and no max-pool, so that 32x32 images reach the last stage at 4x4. Shortcuts that
change the shape are projections (option B). `shortcut=False` gives the plain networks of §4.1.

`multi_scale=True` puts the four branches of an Inception block (arXiv 1409.4842), each with a
quarter of the channels, on the residual path before the addition.

Each block: (B, in_channels, H, W) -> (B, expansion * width, H / stride, W / stride).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers import conv_bn, he_normal_


def conv_bn_relu(in_channels, out_channels, kernel):
    return nn.Sequential(conv_bn(in_channels, out_channels, kernel), nn.ReLU())


class MultiScale(nn.Module):
    """1x1, 3x3, 5x5 and pooled features, concatenated. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels):
        super().__init__()
        quarter = channels // 4
        branches = [
            conv_bn_relu(channels, quarter, 1),
            nn.Sequential(conv_bn_relu(channels, quarter, 1), conv_bn_relu(quarter, quarter, 3)),
            nn.Sequential(conv_bn_relu(channels, quarter, 1), conv_bn_relu(quarter, quarter, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn_relu(channels, quarter, 1)),
        ]
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def projection(in_channels, out_channels, stride):
    """1x1 convolution and batch norm where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_bn(in_channels, out_channels, 1, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels, width, stride=1, shortcut=True, multi_scale=False):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)
        self.multi_scale = MultiScale(width) if multi_scale else nn.Identity()
        self.shortcut = projection(in_channels, width, stride) if shortcut else None

    def residual(self, x):
        return self.multi_scale(self.conv2(F.relu(self.conv1(x))))

    def forward(self, x):
        if self.shortcut is None:
            return F.relu(self.residual(x))
        return F.relu(self.shortcut(x) + self.residual(x))


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3, 1x1 to 4 * width.

    The stride is in the 3x3 convolution, as in torchvision, not in the first 1x1 as in the paper.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride=1):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 1)
        self.conv2 = conv_bn(width, width, 3, stride)
        self.conv3 = conv_bn(width, 4 * width, 1)
        self.shortcut = projection(in_channels, 4 * width, stride)

    def forward(self, x):
        out = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.shortcut(x) + self.conv3(out))


class ResNet(nn.Module):
    """Stem, four stages of blocks, average pooling, classifier. (B, 3, H, W) -> (B, num_classes)"""

    def __init__(self, num_classes=10, *, block, layers, **block_options):
        super().__init__()
        self.stem = conv_bn(3, 64, 3)
        stages, channels = [], 64
        for stage, depth in enumerate(layers):
            width = 64 * 2**stage
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, width, stride, **block_options))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x):
        x = self.stages(F.relu(self.stem(x)))  # (B, C, H / 8, W / 8)
        return self.fc(x.mean((2, 3)))


def init_weights(model):
    """He initialization of convolutions, and a classifier near zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            he_normal_(module)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
