"""What a model is made of, and settings that timm's models and ours share."""

import torch

from common.errors import UserError, first_line
from models.registry import create_model, parse_options
from models.table import MODELS


def describe(name, num_classes, image_size, options=None):
    """(parameters, multiply-accumulates for one image) of a model, without memory or computation.

    Raises UserError if the model can't take images of image_size px, or makes no logits of them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        # With gradients, CaiT and PiT would build a graph that the counter can't follow.
        model = create_model(name, num_classes, **(options or {})).eval().requires_grad_(False)
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                logits = model(torch.empty(1, 3, image_size, image_size))
        except Exception as error:  # the first layer that doesn't fit may raise anything
            message = f"{name} can't take images of {image_size} px ({first_line(error)})"
            raise UserError(message, status=2) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        output = f"its output for an image is {shape}, not (1, {num_classes})"
        raise UserError(f"{name} is not a classifier: {output}", status=2)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def print_table():
    """Prints MODELS, with GMACs counted at each entry's classes and image size."""
    columns = f"{'parameters':>14}{'GMACs':>9}{'classes':>9}{'px':>5}  {'recipe':<21}source"
    print(f"{'name':<30}{columns}")
    for name, entry in MODELS.items():
        classes, size = entry.classes, entry.image_size
        parameters, macs = describe(name, classes, size, parse_options([], name, size))
        numbers = f"{parameters:>14,}{macs / 1e9:>9.3f}{classes:>9}{size:>5}"
        print(f"{name:<30}{numbers}  {_recipe_in_words(entry.recipe):<21}{entry.source}")


def _recipe_in_words(recipe):
    """Optimizer, learning rate and mixing."""
    if not recipe:
        return "the script's"
    words = f"{recipe['optimizer']} {recipe['lr']:g}"
    return f"{words}, mixing" if recipe["cutmix"] else words


def classifiers(model):
    """The modules that compute the logits: one as a rule, several in a distilled network."""
    if hasattr(model, "get_classifier"):  # timm's networks, ViT, CifarResNet
        head = model.get_classifier()
    else:
        head = getattr(model, "fc", None)
    heads = head if isinstance(head, (tuple, list)) else [head]
    return [module for module in heads if isinstance(module, torch.nn.Module)]


def normalization(model):
    """(mean, std) of the images that the published weights of timm's network were trained on."""
    config = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def checkpoint_gradients(model, name):
    """Makes the model compute its blocks again in the backward pass, or raises UserError."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        message = f"{name} has no gradient checkpointing: leave --grad-checkpointing out"
        raise UserError(message, status=2) from error


def choose_attention(model, device, dtype):
    """Turns fused attention off in bf16 on a CPU, and returns the model. dtype: autocast's.

    Fused attention is slower there: its backward pass took 133 ms, plain attention's 19 ms (batch
    size 128, 12 heads, 65 tokens, head_dim 16, two threads). In fp32 it is faster: 34 ms to 59 ms.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        for module in model.modules():
            if getattr(module, "fused_attn", False):
                module.fused_attn = False
    return model
