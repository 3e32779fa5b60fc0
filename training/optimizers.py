"""Parameter groups, optimizers, learning-rate functions and the moving average of weights."""

import torch
import torch.nn as nn

from common.errors import UserError
from models import classifiers

# What goes with an optimizer unless something says otherwise. SGD: arXiv 1512.03385 with the weight decay of 1605.07146.
# Adam: the plain baseline, nothing added. AdamW: arXiv 2010.11929 and 2201.03545. Muon: updates
# scaled to AdamW's size (arXiv 2502.16982), with the rate that suited ResNet-20 in short runs.
OPTIMIZERS = {
    "sgd": dict(lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adam": dict(
        lr=1e-3,
        momentum=0.9,
        weight_decay=0.0,
        schedule="constant",
        warmup_epochs=0.0,
        label_smoothing=0.0,
        clip_grad=0.0,
        ema_decay=0.0,
    ),
    "adamw": dict(lr=1e-3, momentum=0.9, weight_decay=0.05),
    "muon": dict(lr=0.01, momentum=0.95, weight_decay=0.05),
}


def param_groups(model, weight_decay, layer_decay=1.0):
    """Two groups: weights with decay; norms, biases and what `model.no_weight_decay()` names without.

    Decaying a norm's scale or a bias only shrinks what the next layer can undo (arXiv 1812.01187 §3.1). With layer_decay
    below one, two groups a layer, whose "lr_scale" is layer_decay for each layer that lies between it and the classifier
    (arXiv 1801.06146 §3.2, 2106.08254). Raises UserError for a model that doesn't say what its layers are.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if layer_decay != 1:
        return _groups_of_layers(model, weight_decay, layer_decay, exempt)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name in exempt]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name in exempt)]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    return check_groups([group for group in groups if group["params"]], model)


def _groups_of_layers(model, weight_decay, layer_decay, exempt):
    from timm.optim import param_groups_layer_decay

    if not hasattr(model, "group_matcher"):
        raise UserError(
            "this model doesn't say what its layers are: leave --layer-decay out", status=2
        )
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
    )
    keys = ("params", "weight_decay", "lr_scale")
    return check_groups([{key: group[key] for key in keys} for group in groups], model)


def muon_groups(groups, model, saved=None):
    """The groups, each divided into what Muon orthogonalises and what it leaves to AdamW ("use_fallback").

    Muon is for the matrices and filters of hidden layers; the first convolution or patch embedding, the classifier, other
    embeddings (positions, tokens, relative-position biases), norms and biases are AdamW's: see the usage in
    github.com/KellerJordan/Muon. Both take the same rate: Muon's updates have the size of AdamW's (arXiv 2502.16982 §2.2).

    saved: the state of a Muon that is to continue. One that was saved before the groups were divided keeps its own.
    """
    if saved and not any("use_fallback" in group for group in saved["param_groups"]):
        return groups
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    hidden = {id(layer.weight) for layer in layers[1:]} - {
        id(p) for head in classifiers(model) for p in head.parameters()
    }
    divided = [
        group
        | {
            "params": [p for p in group["params"] if (id(p) not in hidden) == fallback],
            "use_fallback": fallback,
        }
        for group in groups
        for fallback in (False, True)
    ]
    return check_groups([group for group in divided if group["params"]], model)


def check_groups(groups, model):
    """Returns the groups, or raises ValueError unless they hold every trainable parameter exactly once."""
    grouped = [id(p) for group in groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != wanted:
        raise ValueError(
            f"parameter groups hold {len(grouped)} parameters ({len(set(grouped))} different) of {len(wanted)}"
        )
    return groups


def create_optimizer(name, groups, lr, momentum=0.9, fused=True):
    """An optimizer of OPTIMIZERS over parameter groups that carry their own weight decay.

    momentum: of SGD (Nesterov) and Muon, and Adam's and AdamW's first beta; fused: one kernel for all parameters, where the
    device has it, else torch's choice (a few kernels on CUDA). Not with a GradScaler: torch's fused SGD, whose first step is
    skipped, goes on from momentum that was never initialised. Nor is there one of SGD for parameters of which each device
    has a part.
    """
    fused = (
        fused and groups[0]["params"][0].device.type in ("cpu", "cuda")
    ) or None  # False would be a kernel a parameter
    fused = None if name == "sgd" and hasattr(groups[0]["params"][0], "full_tensor") else fused
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, lr, betas=(momentum, 0.999), fused=fused)
    if name == "muon":
        from timm.optim import (
            Muon,  # filters flattened to matrices; AdamW for groups of muon_groups and depthwise filters
        )

        return Muon(groups, lr, momentum=momentum, nesterov=True)
    raise UserError(f"unknown optimizer {name!r}: the names are {', '.join(OPTIMIZERS)}", status=2)


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict that keeps this optimizer's kernels and its parameters' memory format.

    Both depend on the device, the precision and the ranks of this process, not on those that saved the state. Fused kernels
    walk through memory without looking at strides: a contiguous momentum of channels_last weights would be applied to the
    wrong ones. Raises ValueError for a state tensor whose shape is not its parameter's.
    """
    own = [
        {key: group[key] for key in ("fused", "foreach") if key in group}
        for group in optimizer.param_groups
    ]
    groups = [group | kernels for group, kernels in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for param, values in optimizer.state.items():
        tensors = {
            name: value for name, value in values.items() if torch.is_tensor(value) and value.ndim
        }
        for name, value in tensors.items():
            if value.shape != param.shape:
                raise ValueError(
                    f"the optimizer's {name} is {tuple(value.shape)} for a parameter of {tuple(param.shape)}"
                )
            if value.stride() != param.stride():
                values[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
