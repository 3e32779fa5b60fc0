"""Parameter groups and optimizers: those of OPTIMIZERS, and timm/<name> for those of timm.optim. To
add an optimizer: its defaults in OPTIMIZERS, its number of STATES, and a branch in
`build_optimizer`."""

import difflib
import fnmatch
import inspect

import torch
import torch.nn as nn
from timm.optim import (
    Muon,
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
)
from timm.optim.kron import Kron

from common.errors import UserError, first_line
from models import classifiers
from training.muon import MuonSGD

# The defaults of each optimizer. SGD: arXiv 1512.03385 with the weight decay of 1605.07146. Adam:
# the plain baseline, without anything else. AdamW: arXiv 2010.11929 and 2201.03545. Muon: updates
# scaled to the size of AdamW's (arXiv 2502.16982), with a rate for short runs of ResNet-20.
# Muon_sgd: arXiv 2404.00498's repository.
# fmt: off
OPTIMIZERS = {
    "sgd": dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": dict(lr=1e-3, momentum=0.9, weight_decay=0.0, schedule="constant", warmup_epochs=0.0,
                 label_smoothing=0.0, clip_grad=0.0, ema_decay=0.0),
    "adamw": dict(lr=1e-3, momentum=0.9, weight_decay=0.05),
    "muon": dict(lr=0.01, momentum=0.95, nesterov=True, weight_decay=0.05),
    "muon_sgd": dict(lr=0.24, momentum=0.6, weight_decay=4e-3),
}
# fmt: on
# Tensors that each optimizer keeps per weight, of the weight's size, for training/memory.py's
# estimate; Muon keeps two for the few weights that it leaves to AdamW.
STATES = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 1, "muon_sgd": 1}


def problem_with(name):
    """Why an optimizer can't be chosen, or None."""
    short = name.removeprefix("timm/")
    if name in OPTIMIZERS:
        return None
    if not name.startswith("timm/"):
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"must be one of {', '.join(OPTIMIZERS)}, or timm/<name>, not {name!r}{hint}"
    if short.startswith("lookahead_"):
        return f"{name} can't be used: it wraps another optimizer"
    if short not in list_optimizers():
        near = difflib.get_close_matches(short.lower(), list_optimizers(), n=4, cutoff=0)
        return f"timm has no optimizer {short!r}; the nearest names are {', '.join(near)}"
    info = get_optimizer_info(short)
    if isinstance(info.opt_class, str):
        return f"{name} can't be used: it is a part of {info.opt_class.partition('.')[0]}"
    if info.second_order:
        return f"{name} can't be used: it needs second derivatives"
    if info.opt_class is Kron:
        return f"{name} can't be used: it compiles code for minutes, for every shape of weights"
    return None


def optimizer_defaults(name):
    """{argument: default} of an optimizer, with momentum and nesterov if it has them.

    lr is None where timm has no default.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    values = _timm_values(name)
    defaults = {"lr": values["lr"] if isinstance(values["lr"], float) else None}
    defaults["weight_decay"] = float(values["weight_decay"])
    if "momentum" in values:
        # timm's factory replaces torch's default of 0 by 0.9
        defaults["momentum"] = float(values["momentum"] or 0.9)
    elif values.get("betas"):
        defaults["momentum"] = values["betas"][0]
    if "nesterov" in values:
        defaults["nesterov"] = values["nesterov"]
    return defaults


def _timm_values(name):
    """{parameter: default} of the constructor of an optimizer of timm, under this name."""
    info = get_optimizer_info(name.removeprefix("timm/"))
    parameters = inspect.signature(info.opt_class).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    return defaults | (info.defaults or {})


def create_optimizer(args, model, saved=None, dtype=None):
    """The optimizer of a run. saved: the contents of last.pt; dtype: autocast's, None for fp32."""
    groups = param_groups(model, args.weight_decay, args.layer_decay, args.optimizer)
    if _is_muon(args.optimizer):
        groups = muon_groups(groups, model, saved["training"]["optimizer"] if saved else None)
    elif args.optimizer == "muon_sgd":
        groups = muon_sgd_groups(groups, model, args.lr)
    # With a GradScaler, a fused optimizer doesn't tell which steps it skipped
    # (loop._optimizer_step), and torch's SGD starts from uninitialized momentum if its first step
    # is skipped.
    fused = dtype != torch.float16
    return build_optimizer(
        args.optimizer, groups, args.lr, args.momentum, fused, nesterov=args.nesterov
    )


def build_optimizer(name, groups, lr, momentum=0.9, fused=True, nesterov=True):
    """An optimizer over parameter groups that carry their own weight decay.

    momentum: of SGD and Muon; the first beta of Adam and AdamW. nesterov: of SGD and Muon;
    muon_sgd always has it, and 0.85 as the momentum of its SGD. fused: use one kernel for all
    parameters where there is one. There is none for SGD on sharded parameters, and none for sharded
    parameters on a CPU.
    """
    if problem := problem_with(name):
        raise UserError(f"--optimizer: {problem}", 2)
    if name.startswith("timm/"):
        return _timm_optimizer(name, groups, lr, momentum, nesterov)
    first = groups[0]["params"][0]
    if hasattr(first, "full_tensor"):  # sharded
        has_kernel = first.device.type == "cuda" and name != "sgd"
    else:
        has_kernel = first.device.type in ("cpu", "cuda")
    # None is torch's choice; False would be a kernel per parameter.
    fused = True if fused and has_kernel else None
    if name == "sgd":
        nesterov = nesterov and momentum > 0
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov, fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, lr, betas=(momentum, 0.999), fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.999), fused=fused)
    if name == "muon":
        # Filters are flattened to matrices. Depthwise filters and groups of muon_groups with
        # "use_fallback" get timm's AdamW: with Nesterov momentum NAdamW, with betas 0.9 and 0.95.
        return Muon(groups, lr, momentum=momentum, nesterov=nesterov)
    if name == "muon_sgd":
        return MuonSGD(groups, lr, momentum=momentum)
    raise NotImplementedError(name)


def _timm_optimizer(name, groups, lr, momentum, nesterov):
    """An optimizer of timm.optim. Raises UserError for what it refuses, for example a rate of 0."""
    values, options = _timm_values(name), {}
    if "momentum" not in values and values.get("betas"):
        options["betas"] = (momentum, *values["betas"][1:])
    if "nesterov" in values:
        options["nesterov"] = nesterov and momentum > 0
    short = name.removeprefix("timm/")
    try:
        return create_optimizer_v2(groups, short, lr=lr, momentum=momentum, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--optimizer {name} can't be used ({first_line(error)})", 2) from error


def _is_muon(name):
    if name in OPTIMIZERS:
        return name == "muon"
    return get_optimizer_info(name.removeprefix("timm/")).opt_class is Muon


def param_groups(model, weight_decay, layer_decay=1.0, optimizer=None):
    """Two groups: weights with decay; norms, biases and model.no_weight_decay() without.

    No decay of norms and biases is a heuristic of arXiv 1812.01187 §3.1. With layer_decay below 1,
    there are two groups per layer, with an "lr_scale" that falls by layer_decay from layer to layer
    towards the input (arXiv 1801.06146 §3.2, 2106.08254). Raises UserError for a model that doesn't
    define its layers.

    model.rate_groups(optimizer, weight_decay) may declare groups of its own for the optimizer of
    this name, with "lr_scale", and with "lr_end": the share of the run after which the rate is zero
    (see schedules.lr_schedule).
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if layer_decay != 1:
        return _layer_groups(model, weight_decay, layer_decay, exempt)
    own_groups = []
    if hasattr(model, "rate_groups"):
        for group in model.rate_groups(optimizer, weight_decay):
            own_groups.append(group | {"params": [p for p in group["params"] if p.requires_grad]})
    own = {id(p) for group in own_groups for p in group["params"]}
    trainable = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own
    ]
    decayed = [p for name, p in trainable if _has_decay(name, p, exempt)]
    plain = [p for name, p in trainable if not _has_decay(name, p, exempt)]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    return check_groups([group for group in groups + own_groups if group["params"]], model)


def _has_decay(name, parameter, exempt):
    """exempt: names and patterns, such as timm's pos_embed.*"""
    return parameter.ndim > 1 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt)


def _layer_groups(model, weight_decay, layer_decay, exempt):
    if not hasattr(model, "group_matcher"):
        raise UserError("--layer-decay: this model doesn't define its layers: leave it out", 2)
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
    )
    keys = ("params", "weight_decay", "lr_scale")
    return check_groups([{key: group[key] for key in keys} for group in groups], model)


def muon_groups(groups, model, optimizer_state=None):
    """The groups, each split into what Muon orthogonalizes and what AdamW trains ("use_fallback").

    Muon is for the matrices and filters of hidden layers. The first convolution or patch embedding,
    the classifier, other embeddings, norms and biases are trained by AdamW: see the usage in
    github.com/KellerJordan/Muon. Both have the same rate: Muon's updates have the size of AdamW's
    (arXiv 2502.16982 §2.2).

    optimizer_state: the one that is to be loaded. One from before the groups were split keeps its
    groups.
    """
    saved_groups = optimizer_state["param_groups"] if optimizer_state else []
    if saved_groups and not any("use_fallback" in group for group in saved_groups):
        return groups
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    in_classifier = {id(p) for head in classifiers(model) for p in head.parameters()}
    hidden = {id(layer.weight) for layer in layers[1:]} - in_classifier
    split = []
    for group in groups:
        muon = [p for p in group["params"] if id(p) in hidden]
        adamw = [p for p in group["params"] if id(p) not in hidden]
        split.append(group | {"params": muon, "use_fallback": False})
        split.append(group | {"params": adamw, "use_fallback": True})
    return check_groups([group for group in split if group["params"]], model)


def muon_sgd_groups(groups, model, lr):
    """The groups, each split into convolutions for Muon ("orthogonal") and what SGD trains.

    lr: the highest rate, at which a step of SGD subtracts the share weight_decay of a weight, as in
    arXiv 2404.00498's repository. MuonSGD multiplies decays by the rate, so they are divided by it.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    convolutions = {id(layer.weight) for layer in layers}
    split = []
    for group in groups:
        muon = [p for p in group["params"] if id(p) in convolutions]
        sgd = [p for p in group["params"] if id(p) not in convolutions]
        rate = lr * group.get("lr_scale", 1.0)
        decay = group["weight_decay"] / rate if rate else 0.0
        split.append(group | {"params": muon, "weight_decay": 0.0, "orthogonal": True})
        split.append(group | {"params": sgd, "weight_decay": decay, "orthogonal": False})
    return check_groups([group for group in split if group["params"]], model)


def check_groups(groups, model):
    """Returns the groups; raises ValueError unless each trainable parameter is in exactly one."""
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise ValueError(
            f"parameter groups hold {len(grouped)} parameters ({len(set(grouped))} different), "
            f"the model has {len(trainable)}"
        )
    return groups


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict that keeps this optimizer's kernels and its parameters' strides.

    Both depend on the device, the precision and the processes of now, not of the saved run. Fused
    kernels walk through memory without regard to strides: a contiguous momentum of channels_last
    weights would be applied to the wrong weights. Raises ValueError for a tensor of another shape,
    which only optimizers of timm may keep.
    """
    keeps_param_shapes = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, Muon, MuonSGD))
    kernels = [
        {key: group[key] for key in ("fused", "foreach") if key in group}
        for group in optimizer.param_groups
    ]
    groups = [group | own for group, own in zip(state["param_groups"], kernels, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for param, values in optimizer.state.items():
        for name, value in values.items():
            if not torch.is_tensor(value) or value.ndim == 0:
                continue
            if value.shape != param.shape:
                if not keeps_param_shapes:
                    continue
                shapes = f"{tuple(value.shape)} for a parameter of {tuple(param.shape)}"
                raise ValueError(f"the optimizer's {name} has shape {shapes}")
            if value.stride() != param.stride():
                values[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
