"""Low-rank adapters (arXiv 2106.09685): W x + SCALE · B (A x) with W as it was and A, B learnt. The peft library makes them.

    add_adapters(model, rank=16, layers=linear_layers("eva_giant", 10, 336))
    plain = merged(model.state_dict())          # the model's own keys, W + SCALE · B A: needs no peft to be used

B begins at zero, so that the model begins as it was. The classifier is trained as a whole; nothing else is.
"""

import importlib.util
import logging

import torch

import models
from common.errors import UserError

SCALE = 2.0  # lora_alpha is twice the rank, so that another rank needs no other learning rate
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


def require_peft():
    """Raises UserError where the library is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "--lora-rank needs the peft library, which is not installed: pip install peft"
        )


def linear_layers(name, num_classes, image_size, options=None):
    """Names of the linear layers of a model, without the classifier, that are called as such.

    Some of timm's attentions take the weight out of the layer to add a bias of their own: an adapter there would be passed by.
    """
    called = []
    with torch.device("meta"), torch.no_grad():
        model = models.create_model(name, num_classes, **(options or {})).eval()
        head = {id(module) for part in models.classifiers(model) for module in part.modules()}
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and id(module) not in head:
                module.register_forward_hook(lambda *_, key=key: called.append(key))
        model(torch.empty(1, 3, image_size, image_size))
    if not called:
        raise UserError(f"{name} has no linear layers for --lora-rank", status=2)
    return called


def add_adapters(model, rank, layers):
    """Puts adapters of a rank around linear layers of the model, in place; what is not adapter or classifier is frozen.

    Raises UserError where peft is missing, or the model doesn't tell its classifier.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    _check_classifier(model)
    logging.getLogger("peft").setLevel(logging.ERROR)
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(dict.fromkeys(layers)))
    inject_adapter_in_model(config, model)
    for head in models.classifiers(model):
        head.requires_grad_(True)
    return model


def _check_classifier(model):
    if not hasattr(model, "get_classifier"):
        raise UserError("this model doesn't tell its classifier: leave --lora-rank out", status=2)


class Counted(torch.nn.Module):
    """What peft puts in place of a linear layer, for counting its memory where peft is not needed. (…, D) -> (…, E)"""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + SCALE * self.up(
            self.down(x.float())
        )  # peft brings x to the adapter's type


def add_counted(model, rank, layers):
    """As add_adapters, without peft, for a model on the meta device."""
    _check_classifier(model)
    model.requires_grad_(False)
    for name in dict.fromkeys(layers):
        model.set_submodule(name, Counted(model.get_submodule(name), rank))
    for head in models.classifiers(model):
        head.requires_grad_(True)
    return model


def merged(state):
    """A state dict of a model with adapters as that of the plain model; another one as it is."""
    plain = {}
    for key, value in state.items():
        if key.endswith((DOWN, UP)):
            continue
        prefix, base, name = key.partition(BASE)
        if base and name == "weight":
            update = state[prefix + UP].float() @ state[prefix + DOWN].float()
            value = (value.float() + SCALE * update).to(value.dtype)
        plain[f"{prefix}.{name}" if base else key] = value
    return plain


def adapted(plain, like):
    """The opposite: `plain` with the keys of `like`, where that has adapters; they do nothing then."""
    if not any(BASE in key for key in like):
        return plain
    out = {}
    for key, value in like.items():
        own = key.replace(BASE, ".")
        out[key] = (
            plain[own] if own in plain else torch.zeros_like(value) if key.endswith(UP) else value
        )
    return out
