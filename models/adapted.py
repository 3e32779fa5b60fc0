"""timm's networks with stems for small pictures, and in their original layouts (`stem="imagenet"`).

An ImageNet stem shrinks a picture by four before the first block, and 32x32 pixels end as one. Here the first strides
and convolutions change and nothing else, so that the last feature map of a 32x32 picture is 4x4 (Mixer: 8x8 patches):

- GhostNet (arXiv 1911.11907): stride 1 in the stem and in the first block that had stride 2.
- ConvNeXt (arXiv 2201.03545): a 3x3 stride-1 convolution instead of patches of 4x4 pixels.
- CSPNet (arXiv 1911.11929): a 3x3 stride-1 stem instead of 7x7 with stride 2, no max-pool.
- ResNeSt (arXiv 2004.08955): stride 1 in the deep stem, no max-pool.
- MLP-Mixer (arXiv 2105.01601): patches of 4x4 pixels instead of 16x16. Drop-path grows with depth, as in the paper
  (timm's is the same in all blocks). Its token MLPs fix the number of patches, hence `image_size`.
"""

import torch.nn as nn

from models.layers import DropPath, drop_path_rates, one_of

STEMS = ("cifar", "imagenet")


def ghostnet_100(num_classes=10, *, stem="cifar"):
    import timm

    model = timm.create_model("ghostnet_100", num_classes=num_classes)
    if one_of("stem", stem, STEMS) == "cifar":
        model.conv_stem.stride = (1, 1)
        first = next(
            block for stage in model.blocks for block in stage if getattr(block, "stride", 1) == 2
        )
        first.conv_dw.stride = first.shortcut[0].stride = (
            1,
            1,
        )  # the depthwise convolution stays: same weights
    return model


def convnext_tiny(num_classes=10, *, stem="cifar", drop_path=0.1):
    import timm

    drop_path_rates(drop_path, 1)  # checks it
    model = timm.create_model("convnext_tiny", num_classes=num_classes, drop_path_rate=drop_path)
    if one_of("stem", stem, STEMS) == "cifar":
        model.stem[0] = nn.Conv2d(3, 96, 3, padding=1)
        nn.init.trunc_normal_(model.stem[0].weight, std=0.02)
        nn.init.zeros_(model.stem[0].bias)
    return model


def cspresnet50(num_classes=10, *, stem="cifar"):
    import timm
    from timm.models.cspnet import CspStemCfg

    changes = {}
    if one_of("stem", stem, STEMS) == "cifar":
        changes["stem"] = CspStemCfg(out_chs=64, kernel_size=3, stride=1, pool="")
    return timm.create_model("cspresnet50", num_classes=num_classes, **changes)


def resnest50d(num_classes=10, *, stem="cifar"):
    import timm

    model = timm.create_model("resnest50d", num_classes=num_classes)
    if one_of("stem", stem, STEMS) == "cifar":
        model.conv1[0].stride = (1, 1)
        model.maxpool = nn.Identity()
    return model


def mlp_mixer(num_classes=10, *, width, token_mlp, stem="cifar", image_size=32, drop_path=0.1):
    """12 blocks with a channel MLP of 4 * width. stem: patches of 4x4 pixels (cifar) or 16x16 (imagenet)."""
    from timm.models.mlp_mixer import MlpMixer

    patch = 4 if one_of("stem", stem, STEMS) == "cifar" else 16
    if image_size % patch:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch, {patch} px")
    # timm takes the token MLP's width as a share of `width`, rounded down: half a unit more is safe.
    ratios = ((token_mlp + 0.5) / width, 4.0)
    model = MlpMixer(
        num_classes, image_size, patch_size=patch, num_blocks=12, embed_dim=width, mlp_ratio=ratios
    )
    for block, rate in zip(model.blocks, drop_path_rates(drop_path, 12)):
        block.drop_path = DropPath(rate)
    return model
