"""Residual networks and their plain counterparts for small pictures, and a residual network with multi-scale blocks.

He et al., arXiv 1512.03385: the ImageNet layouts (18 to 152 layers, widths 64 to 512) with a 3x3 stride-1 stem and no
max-pool, so that 32x32 pictures reach the last stage at 4x4; shortcuts that change shape are projections (option B).
`shortcut=False` leaves the shortcuts out: the plain networks of the paper's §4.1.

The multi-scale module puts the four branches of an Inception block (arXiv 1409.4842), a quarter of the channels each,
on the residual path before the addition.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv_bn(in_channels, out_channels, kernel, stride=1, groups=1):
    """Convolution without bias, and batch norm. (B, C, H, W) -> (B, out_channels, H / stride, W / stride)"""
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
    )


class MultiScale(nn.Module):
    """1x1, 3x3, 5x5 and pooled features side by side. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels):
        super().__init__()
        quarter = channels // 4

        def unit(in_channels, kernel):
            return nn.Sequential(conv_bn(in_channels, quarter, kernel), nn.ReLU())

        self.branches = nn.ModuleList(
            [
                unit(channels, 1),
                nn.Sequential(unit(channels, 1), unit(quarter, 3)),
                nn.Sequential(unit(channels, 1), unit(quarter, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(channels, 1)),
            ]
        )

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. (B, C, H, W) -> (B, width, H / stride, W / stride)"""

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
    """1x1 to `width`, 3x3, 1x1 to 4 * width. (B, C, H, W) -> (B, 4 * width, H / stride, W / stride)

    The stride is at the 3x3, as in the authors' later code and torchvision, not at the first 1x1 as in the paper.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride=1, shortcut=True):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 1)
        self.conv2 = conv_bn(width, width, 3, stride)
        self.conv3 = conv_bn(width, 4 * width, 1)
        self.shortcut = projection(in_channels, 4 * width, stride) if shortcut else None

    def residual(self, x):
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))

    forward = BasicBlock.forward


def projection(in_channels, out_channels, stride):
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_bn(in_channels, out_channels, 1, stride)


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
                blocks.append(
                    block(channels, width, 2 if stage > 0 and i == 0 else 1, **block_options)
                )
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x):
        x = self.stages(F.relu(self.stem(x)))  # (B, C, H / 8, W / 8)
        return self.fc(x.mean((2, 3)))


def init_weights(model):
    """He initialisation of convolutions (arXiv 1502.01852); norms start as the identity, the classifier near zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
