"""Where a model looks: Grad-CAM for networks with feature maps, attention rollout for transformers.

    heat, method = explain(model, inputs, classes)       # (B, H, W) in [0, 1], "Grad-CAM"

Grad-CAM (arXiv 1610.02391): the channels of the last feature map, weighted by the mean gradient of
the class's logit. Attention rollout (arXiv 2005.00928): the product of all blocks' attention,
averaged over heads, with half of it replaced by the residual connection. It doesn't depend on the
class: it shows where information comes from, not what supports an answer.
"""

import contextlib
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F

from common.errors import UserError


def explain(model, inputs, classes):
    """(heat (B, H, W) in [0, 1] on the CPU, the method's name).

    inputs: normalized, (B, 3, H, W); classes: int64 (B,). Raises UserError for a model that is
    neither a plain transformer nor has a feature map before its classifier.
    """
    was_training = model.training
    model.eval()
    try:
        heat, method = _heat(model, inputs, classes)
    finally:
        model.train(was_training)
    heat = heat[:, None].float()
    heat = F.interpolate(heat, inputs.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp(min=1e-12)).cpu(), method


def _heat(model, inputs, classes):
    try:
        return attention_rollout(model, inputs), "attention rollout"
    except NotPlainError as reason:
        layer = _last_map_layer(model, inputs[:1])
        if layer is None:
            kind = type(model).__name__
            message = f"--explain: {kind} has no last feature map, and {reason}"
            raise UserError(message) from reason
    return grad_cam(model, inputs, classes, layer), "Grad-CAM"


# ---- Grad-CAM ------------------------------------------------------------------------------------


def grad_cam(model, inputs, classes, layer):
    """(B, h, w), not negative, at the size of the feature map that the module `layer` returns."""
    outputs = []
    hook = layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    with hook, torch.enable_grad():
        logits = model(inputs.detach().requires_grad_())
        # The sum over images is enough: in eval mode they don't affect each other.
        chosen = logits.gather(1, classes.to(logits.device)[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, outputs[-1])
    maps, gradient = _channels_first(outputs[-1].detach()), _channels_first(gradient)
    return F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1))


def _last_map_layer(model, inputs):
    """The last module whose output is a feature map, or None.

    Also None where more than half of the parameters follow it: a token mixer's only map is its
    patch embedding.
    """
    # Queries and score matrices inside of attention are not feature maps.
    attentions = [module for module in model.modules() if hasattr(module, "num_heads")]
    inside = {part for attention in attentions for part in attention.modules()} - {*attentions}
    calls = []  # (module, whether its output is a map), in order

    def record(module, args, out):
        calls.append((module, module not in inside and _is_map(out, len(inputs))))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(record))
        model(inputs)
    maps = [i for i, (_, is_map) in enumerate(calls) if is_map]
    # Parameters are counted once, in the modules without children.
    leaves = [() if any(module.children()) else module.parameters() for module, _ in calls]
    sizes = [sum(p.numel() for p in parameters) for parameters in leaves]
    if not maps or sum(sizes[maps[-1] + 1 :]) > 0.5 * sum(sizes):
        return None
    return calls[maps[-1]][0]


def _is_map(out, batch):
    if not isinstance(out, torch.Tensor) or out.ndim != 4 or len(out) != batch:
        return False
    channels, height, width = _channels_first(out).shape[1:]
    return channels > 1 and height == width > 1  # a single channel is a gate


def _channels_first(maps):
    """(B, C, h, w) of a map that may be (B, h, w, C). Maps are square: equal sides are h and w."""
    _, a, b, c = maps.shape
    return maps.permute(0, 3, 1, 2) if a == b != c else maps


# ---- attention rollout ---------------------------------------------------------------------------


class NotPlainError(Exception):
    """Why attention rollout doesn't apply to a model."""


@torch.no_grad()
def attention_rollout(model, inputs):
    """(B, h, w): how much of each patch reaches the tokens that the classifier sees.

    A block's attention is the input of its dropout, so that it includes relative positions, rotary
    embeddings, norms and temperatures. Works for transformers with timm's names
    (blocks[i].attn.attn_drop, forward_features, forward_head). Raises NotPlainError for others, and
    for those whose attention is not one matrix over all tokens in each block.
    """
    attentions = _attention_modules(model)
    flow, calls = None, Counter()

    def follow(attention, dropout, args):
        nonlocal flow
        calls[attention] += 1
        flow = _through_block(flow, args[0], len(inputs))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_unfused(model))
        for attention in attentions:
            hook = partial(follow, attention)
            stack.enter_context(attention.attn_drop.register_forward_pre_hook(hook))
        tokens = model.forward_features(inputs)
    if any(calls[attention] != 1 for attention in attentions):
        raise NotPlainError("its attention is not one matrix in each block")
    is_sequence = isinstance(tokens, torch.Tensor) and tokens.ndim == 3
    if not is_sequence or tokens.shape[1] != flow.shape[1]:
        raise NotPlainError("its classifier doesn't see the tokens of its blocks")
    received = (_pooling_weights(model, tokens)[:, None] @ flow)[:, 0]  # (B, N)
    patches = received[:, getattr(model, "num_prefix_tokens", 0) :]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise NotPlainError(f"its {patches.shape[1]} patches are not a square")
    return patches.reshape(-1, side, side)


def _attention_modules(model):
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, torch.nn.Module):
        blocks = []
    attentions = [getattr(block, "attn", None) for block in blocks]
    dropouts = [getattr(attention, "attn_drop", None) for attention in attentions]
    if not dropouts or not all(isinstance(dropout, torch.nn.Module) for dropout in dropouts):
        raise NotPlainError("it has no attention blocks of a plain transformer")
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise NotPlainError("its classifier can't be called on its own")
    return attentions


def _through_block(flow, attention, batch):
    """The flow (B, N, N), None before the first block, after a block's attention (B, h, N, N)."""
    tokens = attention.shape[-1]
    if attention.ndim != 4 or len(attention) != batch or attention.shape[2] != tokens:
        raise NotPlainError("its attention is not over all tokens")
    if flow is not None and flow.shape[-1] != tokens:
        raise NotPlainError("its blocks have different numbers of tokens")
    attention = attention.float()
    row_sums = attention.sum(-1)
    if attention.min() < 0 or not torch.allclose(row_sums, row_sums.new_ones(()), atol=1e-2):
        raise NotPlainError("the rows of its attention don't sum to one")
    mixed = (attention.mean(1) + torch.eye(tokens, device=attention.device)) / 2
    return mixed if flow is None else mixed @ flow


@contextlib.contextmanager
def _unfused(model):
    """Has attention compute explicit matrices, which the fused kernel never forms."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _pooling_weights(model, tokens):
    """(B, N): each token's share in what the classifier sees, equal for all tokens that it sees.

    Those tokens are the ones with a gradient: the class token, or the patches that are averaged.
    """
    if getattr(model, "attn_pool", None) is not None:
        raise NotPlainError("its classifier pools the tokens by attention")
    with torch.enable_grad():
        tokens = tokens.detach().requires_grad_()
        pooled = model.forward_head(tokens, pre_logits=True)
        # Not a plain sum: the output of a norm always sums to zero.
        direction = torch.arange(1, pooled.shape[-1] + 1, device=pooled.device).cos()
        (gradient,) = torch.autograd.grad((pooled * direction).sum(), tokens)
    seen = (gradient != 0).any(-1).float()
    return seen / seen.sum(1, keepdim=True)
