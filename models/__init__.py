# ruff: noqa: F401
"""The models: image classifiers by name, from the table MODELS or from timm.

    model = create_model("resnet18", num_classes=10)        # float (B, 3, H, W) -> logits (B, 10)
    model = create_model("resnet20", 100, shortcut="pad")   # options of the constructor
    model = create_model("timm/resnet18", 10, pretrained=True)

table.py         MODELS: name -> constructor, fixed options, recipe, parameter count, source
recipes.py       training recipes
registry.py      models by name: their options and recipes, create_model
options.py       which options a model may be built with
inspection.py    parameters and multiply-accumulates, classifiers, choice of attention
weights.py       weights and checkpoints from files
lora.py          low-rank adapters
resnet.py        ResNet-18 to 152, plain and multi-scale networks
airbench.py      the fastest networks to train on CIFAR
cifar_resnet.py  ResNet-20 to 110, and with ECA, ghost and ConvNeXt blocks
adapted.py       timm's networks with stems for 32x32 images
coatnet.py       CoAtNet in three variations
hornet.py        HorNet: recursive gated convolutions
mscan.py         MSCAN: multi-scale convolutional attention
vit.py           vision transformer, with options for small data sets
published.py     timm's networks with published weights, at any image size
layers.py        layers that several families share
"""

from models.inspection import (
    checkpoint_gradients,
    choose_attention,
    classifiers,
    describe,
    normalization,
    print_table,
)
from models.recipes import TRANSFER
from models.registry import (
    canonical,
    check_options,
    create_model,
    family,
    from_card,
    is_published,
    parse_options,
    prefers_fp32,
    recipe,
    require_published,
    weights_name,
)
from models.table import MODELS
