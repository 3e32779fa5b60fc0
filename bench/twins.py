"""A training step of our models against the same architectures, built from timm's blocks."""

import timm
import torch.nn as nn
from timm.models import maxxvit, resnet

import models
from bench import measure
from training import mixed_precision


def print_table(args, device):
    dtype = mixed_precision.amp_dtype(args.amp, device)
    print(f"training steps of {args.batch_size} images in {mixed_precision.name(dtype)}:")
    measure.print_headings(f"{'model':<20}", "ours", "timm")
    for name in args.models:
        steps = []
        for create in (models.create_model, timm_twin):
            model = measure.to_device(create(name, 100), device, dtype)
            optimizer = measure.create_optimizer(model)
            steps.append(measure.training_step(model, optimizer, device, dtype))
        measure.print_steps(f"{name:<20}", steps, args, device)


def timm_twin(name, num_classes):
    """The architecture of one of benchmark.TWINS: equal parameter count, equal work."""
    if name == "vit_custom":
        size = dict(img_size=32, patch_size=4, embed_dim=192, depth=9, num_heads=12, mlp_ratio=2)
        vit = "vit_tiny_patch16_224"
        return timm.create_model(vit, num_classes=num_classes, drop_path_rate=0.1, **size)
    if name == "coatnet_0":
        return _coatnet(num_classes)
    if name.endswith("resnet20"):
        return _resnet20(num_classes, {"attn_layer": "eca"} if name.startswith("eca") else {})
    model = timm.create_model(name, num_classes=num_classes)
    model.conv1, model.maxpool = _stem_conv(64), nn.Identity()
    return model


def _resnet20(num_classes, attention):
    widths, block = (16, 32, 64), resnet.BasicBlock
    model = resnet.ResNet(block, (3, 3, 3), num_classes, channels=widths, block_args=attention)
    model.conv1, model.bn1, model.maxpool = _stem_conv(16), nn.BatchNorm2d(16), nn.Identity()
    model.layer1[0], model.layer4 = block(16, 16, **attention), nn.Identity()
    return model


def _coatnet(num_classes):
    blocks = maxxvit.MaxxVitConvCfg(expand_output=False, init_values=None)
    widths, depths, kinds = (96, 192, 384, 640), (2, 3, 5, 2), ("C", "C", "T", "T")
    config = maxxvit.MaxxVitCfg(widths, depths, kinds, stem_width=56, conv_cfg=blocks)
    # Built for 128 px: without the two strides that are removed below, the stages of a 32 px image
    # have 32 to 4 pixels.
    model = maxxvit.MaxxVit(config, img_size=128, num_classes=num_classes, drop_path_rate=0.2)
    model.stem = nn.Sequential(_stem_conv(56), nn.BatchNorm2d(56), nn.GELU())
    first = model.stages[0].blocks[0]
    first.conv2_kxk.stride, first.shortcut.pool = (1, 1), nn.Identity()
    return model


def _stem_conv(width):
    return nn.Conv2d(3, width, 3, padding=1, bias=False)
