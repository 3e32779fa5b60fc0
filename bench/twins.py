"""A training step of our models against the same architectures, built from timm's blocks."""

import torch.nn as nn
from timm.models import maxxvit, resnet, vision_transformer

import models
from bench import measure
from training import mixed_precision

DEPTHS = {
    "18": (2, 2, 2, 2),
    "20": (3, 3, 3),
    "34": (3, 4, 6, 3),
    "50": (3, 4, 6, 3),
    "101": (3, 4, 23, 3),
    "152": (3, 8, 36, 3),
}


def print_table(args, device):
    dtype = mixed_precision.amp_dtype(args.amp, device)
    print(f"{'model':<20}{'ours ms':>9}{'timm ms':>9}  ours / timm")
    for name in args.models:
        batch, steps = measure.ready_batch(args.batch_size, 32, 100, device), {}
        for kind, create in (("ours", models.create_model), ("timm", timm_twin)):
            model = measure.to_device(create(name, 100), device)
            step = measure.training_step(model, measure.create_optimizer(model), device, dtype)
            steps[kind] = lambda step=step, batch=batch: step(*batch)
        seconds = measure.in_turn(device, args.rounds, **steps)
        ours, timm = (measure.median_ms(seconds, kind) for kind in steps)
        ratio = measure.ratio(seconds, "ours", "timm")
        print(f"{name:<20}{ours:>9.1f}{timm:>9.1f}  {ratio}", flush=True)


def timm_twin(name, num_classes):
    """The architecture of one of benchmark.TWINS: equal parameter count, equal work."""
    if name == "vit_custom":
        return _vit(num_classes)
    if name == "coatnet_0":
        return _coatnet(num_classes)
    layers = DEPTHS[name.partition("resnet")[2]]
    if len(layers) == 3:
        return _cifar_resnet(layers, num_classes, eca=name.startswith("eca"))
    return _resnet(layers, num_classes, bottleneck=name in ("resnet50", "resnet101", "resnet152"))


def _vit(num_classes):
    size = dict(img_size=32, patch_size=4, embed_dim=192, depth=9, num_heads=12, mlp_ratio=2)
    return vision_transformer.VisionTransformer(num_classes=num_classes, drop_path_rate=0.1, **size)


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


def _resnet(layers, num_classes, bottleneck):
    block = resnet.Bottleneck if bottleneck else resnet.BasicBlock
    model = resnet.ResNet(block, layers, num_classes)
    model.conv1, model.maxpool = _stem_conv(64), nn.Identity()
    return model


def _cifar_resnet(layers, num_classes, eca):
    attention = {"attn_layer": "eca"} if eca else {}
    widths = (16, 32, 64)
    block = resnet.BasicBlock
    model = resnet.ResNet(block, layers, num_classes, channels=widths, block_args=attention)
    model.conv1, model.bn1, model.maxpool = _stem_conv(16), nn.BatchNorm2d(16), nn.Identity()
    model.layer1[0], model.layer4 = block(16, 16, **attention), nn.Identity()
    return model


def _stem_conv(width):
    return nn.Conv2d(3, width, 3, padding=1, bias=False)
