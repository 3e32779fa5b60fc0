"""Networks for the fastest training on CIFAR: K. Jordan, arXiv 2404.00498. For images of 32 px.

The first layer is a 2x2 convolution that whitens the patches of the training images. `initialize`
sets its weights, which are not trained; its bias is, in the first epochs. Groups of 3x3
convolutions follow, which start as the identity on their first channels. Batch norm has a bias and
no scale, pooling is by maximum, and the logits are scaled down.

`rate_groups` declares the learning rates of the published trainings: with Muon (--optimizer
muon_sgd) for 94 %, and with SGD (--optimizer sgd) for more. One rate differs: with SGD, the bias of
the whitening layer is published with the rate of the convolutions. Here it has that of the other
biases, on a schedule that ends when its training does, as with Muon. The published filters are
those of the second moments of the patches, ours of their covariance.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError
from models.layers import Conv3x3

IMAGE_SIZE = 32
PATCH = 3 * 2 * 2  # values of a 2x2 patch
MIN_IMAGES = 2 * PATCH  # the patches of one image are alike: fewer images give no covariance
EPSILON = 5e-4  # added to the variances of patches, of normalized images
# Rates of biases and classifier relative to --lr, the rate of the convolutions, with Muon. The
# published ones (0.24; 0.053 and 0.67) are for a loss that is summed over a batch of 2,000 images.
# Ours is the mean, with a gradient that is 2,000 times smaller: a rate 2,000 times as large gives
# the same steps. Muon's steps don't depend on the size of the gradient.
MUON_BIAS_SCALE = 2000 * 0.053 / 0.24
MUON_HEAD_SCALE = 2000 * 0.67 / 0.24


def whitening_filters(images):
    """Filters that whiten 2x2 patches, and their negatives. (N, 3, H, W) -> (24, 3, 2, 2)

    The outputs of the first 12 on these patches are uncorrelated, with a variance near one. They
    are the eigenvectors of the covariance of the patches, from the largest eigenvalue to the
    smallest, each divided by the root of its eigenvalue.
    """
    count, total, products = 0, 0.0, 0.0
    for chunk in images.split(50):  # small enough for the caches
        patches = F.unfold(chunk.double(), 2).transpose(0, 1).flatten(1)  # (12, patches)
        count += patches.shape[1]
        total = total + patches.sum(1)
        products = products + patches @ patches.T
    mean = total / count
    covariance = products / count - mean.outer(mean)
    variances, directions = torch.linalg.eigh(covariance)  # ascending; one direction per column
    filters = (directions / (variances + EPSILON).sqrt()).T.flip(0)
    return torch.cat([filters, -filters]).view(2 * PATCH, 3, 2, 2).to(images.dtype)


def conv3x3(in_channels, out_channels):
    """A convolution whose first `in_channels` outputs start as copies of its inputs."""
    layer = Conv3x3(in_channels, out_channels)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:in_channels])
    return layer


def batch_norm(channels):
    """Batch norm with a trained bias and a scale of one, and statistics of the last few steps."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class Group(nn.Module):
    """Two convolutions and a pooling; `residual` adds a third convolution and a shortcut.

    (B, in_channels, H, W) -> (B, width, H // 2, W // 2)
    """

    def __init__(self, in_channels, width, residual):
        super().__init__()
        self.conv1, self.norm1 = conv3x3(in_channels, width), batch_norm(width)
        self.conv2, self.norm2 = conv3x3(width, width), batch_norm(width)
        self.residual = residual
        if residual:
            self.conv3, self.norm3 = conv3x3(width, width), batch_norm(width)

    def forward(self, x):
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        out = self.norm2(self.conv2(x))
        if self.residual:
            out = x + self.norm3(self.conv3(F.gelu(out)))
        return F.gelu(out)


class Airbench(nn.Module):
    """Whitening layer, three groups, global max pooling, classifier. (B, 3, H, W) -> (B, K)

    whitening_share: share of the run in which the bias of the whitening layer is trained.
    logit_scale: factor of the logits, with PyTorch's initial weights of the classifier. None: the
    factor is 1 / C for C features, and the classifier starts with weights of variance one.
    bias_scale: rate of the biases relative to --lr with --optimizer sgd.
    """

    def __init__(
        self,
        num_classes=10,
        *,
        widths,
        residual,
        whitening_share,
        logit_scale,
        bias_scale,
        image_size=IMAGE_SIZE,
    ):
        super().__init__()
        if image_size != IMAGE_SIZE:
            raise ValueError(f"image_size must be {IMAGE_SIZE} px, not {image_size}")
        self.whitening_share = whitening_share
        self.whitening = nn.Conv2d(3, 2 * PATCH, 2)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(self.whitening.bias)
        channels = (2 * PATCH, *widths)
        groups = [Group(*pair, residual) for pair in zip(channels, widths)]
        self.groups = nn.Sequential(*groups)
        self.fc = nn.Linear(channels[-1], num_classes, bias=False)
        self.bias_scale = bias_scale
        if logit_scale is None:
            self.logit_scale, self.fc_variance = 1 / channels[-1], 1.0
            with torch.no_grad():
                self.fc.weight.div_(self.fc.weight.std())
        else:  # PyTorch's initial weights
            self.logit_scale, self.fc_variance = logit_scale, 1 / (3 * channels[-1])

    def initialize(self, images):
        """Sets the whitening layer. images: normalized, of the training set (N, 3, H, W).

        Raises UserError if these are too few.
        """
        if len(images) < MIN_IMAGES:
            raise UserError(
                f"the whitening layer needs at least {MIN_IMAGES} training images, "
                f"not {len(images)}",
                status=2,
            )
        with torch.no_grad():
            self.whitening.weight.copy_(whitening_filters(images))

    def rate_groups(self, optimizer, weight_decay):
        """Parameter groups for the optimizer of this name, where they differ from the usual ones.

        See training.optimizers.param_groups. Each parameter has the rate --lr times lr_scale. The
        bias of the whitening layer is trained until the share lr_end of the run.
        """
        whitening = dict(params=[self.whitening.bias], lr_end=self.whitening_share)
        # The outputs change as fast as those of a classifier with the published initial weights
        # if the rate is in proportion to the variance of the weights.
        if optimizer == "muon_sgd":
            bias_scale, bias_decay = MUON_BIAS_SCALE, weight_decay
            head_scale, head_decay = MUON_HEAD_SCALE * self.fc_variance, weight_decay
        elif optimizer == "sgd":  # the rate times the decay is the same for all
            # Published for PyTorch's initial variance, 1 / (3 * in_features).
            bias_scale, head_scale = self.bias_scale, self.fc_variance * 3 * self.fc.in_features
            bias_decay, head_decay = weight_decay / bias_scale, weight_decay / head_scale
        else:
            return [whitening | dict(weight_decay=0.0)]
        norm_biases = [norm.bias for norm in self.modules() if hasattr(norm, "running_mean")]
        biases = dict(lr_scale=bias_scale, weight_decay=bias_decay)
        head = dict(lr_scale=head_scale, weight_decay=head_decay)
        return [
            whitening | biases,
            dict(params=norm_biases) | biases,
            dict(params=[self.fc.weight]) | head,
        ]

    def forward(self, x):
        x = self.groups(F.gelu(self.whitening(x)))  # (B, C, 3, 3) for 32 px
        x = F.max_pool2d(x, x.shape[-2:]).flatten(1)
        return self.fc(x) * self.logit_scale
