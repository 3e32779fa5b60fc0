# ruff: noqa: F401
"""The models: image classifiers by name, from the table MODELS or from timm.

    model = create_model("resnet18", num_classes=10)        # float (B, 3, H, W) -> logits (B, 10)
    model = create_model("resnet20", 100, shortcut="pad")   # options of the constructor
    model = create_model("timm/resnet18", 10, pretrained=True)

README.md lists the modules.
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
    defines_layers,
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
