"""HorNet (arXiv 2207.14284): interactions of order n by recursive gated convolutions.

Departure: a 3x3 stride-1 stem, so that the stages of a 32x32 image work at 32, 16, 8 and 4 pixels;
`stem="imagenet"` is the original's patches of 4x4 pixels. The large kernel is the depthwise 7x7
(the paper's other choice is a global filter).
"""

import torch.nn as nn

from models.layers import DropPath, LayerNorm2d, LayerScale, Mlp2d, drop_path_rates, has_cifar_stem


class GnConv(nn.Module):
    """Recursive gated convolution of order n (§3.1). (B, C, H, W) -> (B, C, H, W)

    [p0, q0 ... q(n-1)] = proj_in(x);  p(k+1) = g_k(p_k) * f_k(q_k) * scale;  y = proj_out(p_n)
    where q_k and g_k(p_k) have C / 2^(n-1-k) channels, f_k are depthwise convolutions (computed as
    one), g_0 is the identity and the other g_k are 1x1 convolutions that double the channels.
    """

    def __init__(self, channels, order, kernel=7, scale=1 / 3):
        super().__init__()
        self.widths = [channels // 2 ** (order - 1 - k) for k in range(order)]
        self.scale = scale
        total = sum(self.widths)  # 2C without the channels of p0
        self.proj_in = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(total, total, kernel, padding=kernel // 2, groups=total)
        self.gates = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:]))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        p, q = self.proj_in(x).split([self.widths[0], sum(self.widths)], dim=1)
        first, *others = (self.depthwise(q) * self.scale).split(self.widths, dim=1)
        p = p * first
        for gate, f in zip(self.gates, others):
            p = gate(p) * f
        return self.proj_out(p)


class Block(nn.Module):
    """gnConv, then MLP, each with layer scale. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, order, drop_path):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(channels), LayerNorm2d(channels)
        self.gnconv = GnConv(channels, order)
        self.mlp = Mlp2d(channels, 4 * channels)
        self.scale1, self.scale2 = LayerScale(channels, 1e-6), LayerScale(channels, 1e-6)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.scale1(self.gnconv(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class HorNet(nn.Module):
    """Stem, four stages, average pooling, norm, classifier. (B, 3, H, W) -> (B, num_classes)"""

    def __init__(self, num_classes=10, *, width, depths, orders, stem="cifar", drop_path=0.2):
        super().__init__()
        if has_cifar_stem(stem):
            layers = [nn.Conv2d(3, width, 3, padding=1), LayerNorm2d(width)]
        else:
            layers = [nn.Conv2d(3, width, 4, stride=4), LayerNorm2d(width)]
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        for stage, (depth, order) in enumerate(zip(depths, orders)):
            if stage > 0:
                layers += [LayerNorm2d(width), nn.Conv2d(width, 2 * width, 2, stride=2)]
                width *= 2
            layers += [Block(width, order, next(rates)) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():  # the authors' initialization
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.layers(x)  # (B, 8 * width, H / 8, W / 8); H / 32 with the imagenet stem
        return self.fc(self.norm(x.mean((2, 3))))
