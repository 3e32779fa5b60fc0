"""Where a model looks: Grad-CAM for networks with feature maps, attention rollout for transformers.

    heat, method = explain(model, inputs, classes)       # (B, H, W) in [0, 1], "Grad-CAM" or "attention rollout"

Grad-CAM (arXiv 1610.02391): the last feature map, its channels weighted by the mean gradient of the class's logit.
Attention rollout (arXiv 2005.00928): the product of all blocks' attention, averaged over heads, half of it the residual.
Rollout doesn't know the class: it shows where information came from, not what spoke for an answer.
"""

import contextlib

import torch
import torch.nn.functional as F

from common.errors import UserError


def explain(model, inputs, classes):
    """(heat (B, H, W) in [0, 1] on the CPU, the method's name) for normalised inputs (B, 3, H, W) and int64 classes (B,).

    Raises UserError for a model that is neither a plain transformer nor has a feature map before its classifier.
    """
    training = model.training
    model.eval()
    try:
        heat, method = _heat(model, inputs, classes)
    finally:
        model.train(training)
    heat = F.interpolate(
        heat[:, None].float(), inputs.shape[-2:], mode="bilinear", align_corners=False
    )[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp(min=1e-12)).cpu(), method


def _heat(model, inputs, classes):
    try:
        return attention_rollout(model, inputs), "attention rollout"
    except NotPlainError as reason:
        name = _last_map(model, inputs[:1])
        if name is None:
            raise UserError(
                f"--explain: {type(model).__name__} has no last feature map, and {reason}"
            ) from reason
    return grad_cam(model, inputs, classes, name), "Grad-CAM"


# ---- Grad-CAM --------------------------------------------------------------------------------------------------------


def grad_cam(model, inputs, classes, name):
    """(B, h, w), not negative: of the size of the feature map that the module called `name` returns."""
    kept = []
    handle = dict(model.named_modules())[name].register_forward_hook(
        lambda module, args, out: kept.append(out)
    )
    try:
        with torch.enable_grad():
            logits = model(inputs.detach().requires_grad_())
            chosen = logits.gather(
                1, classes.to(logits.device)[:, None]
            ).sum()  # images don't see each other in eval mode
            (gradient,) = torch.autograd.grad(chosen, kept[-1])
    finally:
        handle.remove()
    maps, gradient = _channels_first(kept[-1].detach()), _channels_first(gradient)
    return F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1))


def _last_map(model, inputs):
    """Name of the last module that gives a map of more than one pixel, with little of the network after it, or None."""
    order, handles = [], []  # (name, is it a map, parameters of a module without children)
    inside = {
        module
        for attention in model.modules()
        if hasattr(attention, "num_heads")
        for module in attention.modules()
    }
    inside -= {
        module for module in inside if hasattr(module, "num_heads")
    }  # queries and matrices of scores, not maps
    for name, module in model.named_modules():

        def note(module, args, out, name=name):
            parameters = (
                0 if any(module.children()) else sum(p.numel() for p in module.parameters())
            )
            order.append((name, module not in inside and _is_map(out, len(inputs)), parameters))

        if name:
            handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    last = max((i for i, (_, is_map, _) in enumerate(order) if is_map), default=None)
    after = sum(parameters for _, _, parameters in order[last + 1 :]) if last is not None else 0
    total = sum(parameters for *_, parameters in order)
    return (
        order[last][0] if last is not None and after <= 0.5 * total else None
    )  # a token mixer's only map is its patches


def _is_map(out, batch):
    if not isinstance(out, torch.Tensor) or out.ndim != 4 or len(out) != batch:
        return False
    channels, height, width = _channels_first(out).shape[1:]
    return channels > 1 and height == width > 1  # one channel is a gate


def _channels_first(maps):
    """(B, C, h, w) of a map that may be (B, h, w, C): pictures are square, so the equal sides tell."""
    _, a, b, c = maps.shape
    return maps.permute(0, 3, 1, 2) if a == b != c else maps


# ---- attention rollout -----------------------------------------------------------------------------------------------


class NotPlainError(Exception):
    """Why attention rollout doesn't apply to a model."""


@torch.no_grad()
def attention_rollout(model, inputs):
    """(B, h, w): how much of each patch reaches the tokens that the classifier sees.

    For transformers as timm names them (blocks[i].attn.attn_drop, forward_features, forward_head). Raises NotPlainError for
    others, and for those whose attention is not one matrix over all tokens in each block.
    """
    rollout = _Rollout(len(inputs))
    with rollout.following(_attention_modules(model)), _unfused(model):
        tokens = model.forward_features(inputs)
    flow = rollout.flow
    if (
        flow is None
        or not isinstance(tokens, torch.Tensor)
        or tokens.ndim != 3
        or tokens.shape[1] != flow.shape[1]
    ):
        raise NotPlainError("its classifier doesn't see the tokens of its blocks")
    received = (_pooling_weights(model, tokens)[:, None] @ flow)[:, 0]  # (B, N)
    patches = received[:, getattr(model, "num_prefix_tokens", 0) :]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise NotPlainError(f"its {patches.shape[1]} patches are not a square")
    return patches.reshape(-1, side, side)


def _attention_modules(model):
    blocks = getattr(model, "blocks", None)
    found = (
        [getattr(block, "attn", None) for block in blocks]
        if isinstance(blocks, torch.nn.Module)
        else []
    )
    if not found or not all(
        isinstance(getattr(attention, "attn_drop", None), torch.nn.Module) for attention in found
    ):
        raise NotPlainError("it has no attention blocks of a plain transformer")
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise NotPlainError("its classifier can't be called on its own")
    return found


class _Rollout:
    """The product of the blocks' attention, taken while the model runs: no more than one block's matrices are kept.

    A block's attention is what its dropout is given, so that relative positions, rotary embeddings, norms of queries and
    keys, and temperatures are in it.
    """

    def __init__(self, batch):
        self.batch, self.flow = batch, None

    @contextlib.contextmanager
    def following(self, modules):
        calls = dict.fromkeys(modules, 0)

        def follow(attention, weights):
            calls[attention] += 1
            self._multiply(weights)

        handles = [
            attention.attn_drop.register_forward_pre_hook(
                lambda _, args, attention=attention: follow(attention, args[0])
            )
            for attention in modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if set(calls.values()) != {1}:
            raise NotPlainError("its attention is not one matrix in each block")

    def _multiply(self, weights):
        """weights: (B, heads, N, N)"""
        tokens = weights.shape[-1]
        if weights.ndim != 4 or len(weights) != self.batch or weights.shape[2] != tokens:
            raise NotPlainError("its attention is not over all tokens")
        if self.flow is not None and self.flow.shape[-1] != tokens:
            raise NotPlainError("its blocks have different numbers of tokens")
        weights = weights.float()
        if weights.min() < 0 or not torch.allclose(
            weights.sum(-1), weights.new_ones(()), atol=1e-2
        ):
            raise NotPlainError("the rows of its attention don't sum to one")
        mixed = (
            weights.mean(1) + torch.eye(tokens, device=weights.device)
        ) / 2  # rows still sum to one
        self.flow = mixed if self.flow is None else mixed @ self.flow


@contextlib.contextmanager
def _unfused(model):
    """Attention as explicit matrices while this lasts: the fused kernel never forms them."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _pooling_weights(model, tokens):
    """(B, N): each token's share in what the classifier sees, the same for all that it depends on, found by its gradient.

    The class token's row is 1 where the model takes that token; patches share equally where it takes their mean.
    """
    if getattr(model, "attn_pool", None) is not None:
        raise NotPlainError("its classifier pools the tokens by attention")
    with torch.enable_grad():
        tokens = tokens.detach().requires_grad_()
        pooled = model.forward_head(tokens, pre_logits=True)
        direction = torch.arange(
            1, pooled.shape[-1] + 1, device=pooled.device
        ).cos()  # a norm's output always sums to zero
        (gradient,) = torch.autograd.grad((pooled * direction).sum(), tokens)
    seen = (gradient != 0).any(-1).float()
    return seen / seen.sum(1, keepdim=True)
