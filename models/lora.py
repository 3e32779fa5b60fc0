"""Low-rank adapters (arXiv 2106.09685): W x + SCALE · B (A x), where only A and B are trained.

    add_adapters(model, rank=16, layers=linear_layers("eva_giant", 10, 336))
    plain = merged(model.state_dict())      # keys of the plain model, values W + SCALE · B A

The peft library makes the adapters; merged weights don't need it. B starts at zero, so that the
model starts unchanged. The classifier is trained without an adapter; nothing else is trained.
"""

import importlib.util
import logging

import torch

from common.errors import UserError
from models.inspection import classifiers
from models.registry import create_model

SCALE = 2.0  # lora_alpha is twice the rank, so that another rank needs no other learning rate
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


def require_peft():
    """Raises UserError if the peft library is missing."""
    if importlib.util.find_spec("peft") is None:
        missing = "the peft library, which is not installed: pip install peft"
        raise UserError(f"--lora-rank needs {missing}")


def linear_layers(name, num_classes, image_size, options=None):
    """Names of a model's linear layers that can have adapters: all that are called as modules.

    The classifier is left out. Some of timm's attention layers use the weight of a linear layer
    without calling it: they would ignore an adapter. Raises UserError if no layer remains or the
    model's classifier is unknown.
    """
    called = []
    with torch.device("meta"), torch.no_grad():
        model = create_model(name, num_classes, **(options or {})).eval()
        _require_classifier(model)
        excluded = {module for head in classifiers(model) for module in head.modules()}
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module not in excluded:
                module.register_forward_hook(lambda *_, key=key: called.append(key))
        model(torch.empty(1, 3, image_size, image_size))
    if not called:
        raise UserError(f"{name} has no linear layers for --lora-rank", status=2)
    return called


def add_adapters(model, rank, layers):
    """Adds adapters to linear layers in place, and freezes all but them and the classifier.

    Raises UserError if peft is missing or the model's classifier is unknown.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    _require_classifier(model)
    logging.getLogger("peft").setLevel(logging.ERROR)
    layers = list(dict.fromkeys(layers))
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=layers)
    inject_adapter_in_model(config, model)
    _train_classifier(model)
    return model


def _require_classifier(model):
    if not hasattr(model, "get_classifier"):
        message = "--lora-rank needs one of timm's networks, vit_custom or vit_small_data"
        raise UserError(message, status=2)


def _train_classifier(model):
    for head in classifiers(model):
        head.requires_grad_(True)


class CountedAdapter(torch.nn.Module):
    """What peft makes of a linear layer, to count its memory without peft. (…, D) -> (…, E)"""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        # peft casts x to the adapter's type.
        return self.linear(x) + SCALE * self.up(self.down(x.float()))


def add_counted(model, rank, layers):
    """add_adapters without peft, for counting the memory of a model on the meta device."""
    _require_classifier(model)
    model.requires_grad_(False)
    for name in dict.fromkeys(layers):
        model.set_submodule(name, CountedAdapter(model.get_submodule(name), rank))
    _train_classifier(model)
    return model


def merged(state):
    """A plain model's state dict, with the adapters, if there are any, added to the weights."""
    plain = {}
    for key, value in state.items():
        if key.endswith((DOWN, UP)):
            continue
        layer, base, name = key.partition(BASE)
        if base and name == "weight":
            update = state[layer + UP].float() @ state[layer + DOWN].float()
            value = (value.float() + SCALE * update).to(value.dtype)
        plain[f"{layer}.{name}" if base else key] = value
    return plain


def adapted(plain, like):
    """A plain state dict with the keys of `like`, whose adapters, if any, then change nothing."""
    if not any(BASE in key for key in like):
        return plain
    state = {}
    for key, value in like.items():
        plain_key = key.replace(BASE, ".")
        if plain_key in plain:
            state[key] = plain[plain_key]
        else:
            state[key] = torch.zeros_like(value) if key.endswith(UP) else value
    return state
