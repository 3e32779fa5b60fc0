"""timm's networks with stems for small images, and in their original layouts (`stem="imagenet"`).

The layouts for ImageNet shrink an image by 32, so that 32x32 pixels end as one (Mixer: by 16, to
2x2 patches). Here the first strides and convolutions change, so that the last feature map of a
32x32 image is 4x4 (Mixer: 8x8 patches):

- GhostNet (arXiv 1911.11907): stride 1 in the stem and in the first block that had stride 2.
- ConvNeXt (arXiv 2201.03545): a 3x3 stride-1 convolution instead of patches of 4x4 pixels.
- CSPNet (arXiv 1911.11929): a 3x3 stride-1 stem instead of 7x7 with stride 2, no max-pool.
- ResNeSt (arXiv 2004.08955): stride 1 in the deep stem, no max-pool.
- MLP-Mixer (arXiv 2105.01601): patches of 4x4 pixels instead of 16x16. The only other change:
  drop-path grows with depth, as in the paper (timm's is the same in all blocks). The token MLPs fix
  the number of patches.
"""

import torch.nn as nn

from models.layers import DropPath, check_drop_path, drop_path_rates, has_cifar_stem


def ghostnet_100(num_classes=10, *, stem="cifar"):
    import timm

    model = timm.create_model("ghostnet_100", num_classes=num_classes)
    if has_cifar_stem(stem):
        model.conv_stem.stride = (1, 1)
        blocks = [block for stage in model.blocks for block in stage]
        first = next(block for block in blocks if getattr(block, "stride", 1) == 2)
        # The block keeps its strided layers, so that weights fit both layouts.
        first.conv_dw.stride = first.shortcut[0].stride = (1, 1)
    return model


def convnext_tiny(num_classes=10, *, stem="cifar", drop_path=0.1):
    import timm

    check_drop_path(drop_path)
    model = timm.create_model("convnext_tiny", num_classes=num_classes, drop_path_rate=drop_path)
    if has_cifar_stem(stem):
        model.stem[0] = nn.Conv2d(3, 96, 3, padding=1)
        nn.init.trunc_normal_(model.stem[0].weight, std=0.02)
        nn.init.zeros_(model.stem[0].bias)
    return model


def cspresnet50(num_classes=10, *, stem="cifar"):
    import timm
    from timm.models.cspnet import CspStemCfg

    changes = {}
    if has_cifar_stem(stem):
        changes["stem"] = CspStemCfg(out_chs=64, kernel_size=3, stride=1, pool="")
    return timm.create_model("cspresnet50", num_classes=num_classes, **changes)


def resnest50d(num_classes=10, *, stem="cifar"):
    import timm

    model = timm.create_model("resnest50d", num_classes=num_classes)
    if has_cifar_stem(stem):
        model.conv1[0].stride = (1, 1)
        model.maxpool = nn.Identity()
    return model


def mlp_mixer(num_classes=10, *, width, token_mlp, stem="cifar", image_size=32, drop_path=0.1):
    """12 blocks with a channel MLP of 4 * width and a token MLP of `token_mlp` units."""
    from timm.models.mlp_mixer import MlpMixer

    patch = 4 if has_cifar_stem(stem) else 16
    if image_size % patch:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch, {patch} px")
    # timm rounds the token MLP's width, a share of `width`, down: half a unit more is safe.
    ratios = ((token_mlp + 0.5) / width, 4.0)
    model = MlpMixer(
        num_classes, image_size, patch_size=patch, num_blocks=12, embed_dim=width, mlp_ratio=ratios
    )
    for block, rate in zip(model.blocks, drop_path_rates(drop_path, 12)):
        block.drop_path = DropPath(rate)
    return model
