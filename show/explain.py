"""Where a model looks: Grad-CAM for networks with feature maps, attention rollout for transformers.

    heat, method = explain(model, inputs, classes)       # (B, H, W) in [0, 1], "Grad-CAM" or "attention rollout"

Grad-CAM (arXiv 1610.02391): the last feature map, its channels weighted by the mean gradient of the class's logit.
Attention rollout (arXiv 2005.00928): the product of all blocks' attention, averaged over heads, half of it the residual.
Rollout doesn't know the class: it shows where information came from, not what spoke for an answer.
"""

import torch
import torch.nn.functional as F

from errors import UserError


def explain(model, inputs, classes):
    """(heat (B, H, W) in [0, 1] on the CPU, the method's name) for normalised inputs (B, 3, H, W) and int64 classes (B,).

    Raises UserError for a model that has neither attention blocks as timm's nor a feature map before its classifier.
    """
    training = model.training
    model.eval()
    try:
        if _attention_blocks(model):
            heat, method = attention_rollout(model, inputs), "attention rollout"
        else:
            heat, method = grad_cam(model, inputs, classes), "Grad-CAM"
    finally:
        model.train(training)
    heat = F.interpolate(heat[:, None].float(), inputs.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp(min=1e-12)).cpu(), method


# ---- Grad-CAM --------------------------------------------------------------------------------------------------------


def grad_cam(model, inputs, classes):
    """(B, h, w), not negative: the size of the last feature map that has more than one pixel. Raises UserError."""
    name = _last_map(model, inputs[:1])
    kept = []
    handle = dict(model.named_modules())[name].register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        with torch.enable_grad():
            logits = model(inputs.detach().requires_grad_())
            chosen = logits.gather(1, classes.to(logits.device)[:, None]).sum()  # images don't see each other in eval mode
            (gradient,) = torch.autograd.grad(chosen, kept[-1])
    finally:
        handle.remove()
    maps, gradient = _channels_first(kept[-1].detach()), _channels_first(gradient)
    return F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1))


def _last_map(model, inputs):
    """Name of the last module that gives a map of more than one pixel, with little of the network after it."""
    order, handles = [], []  # (name, is it a map, parameters of a module without children)
    for name, module in model.named_modules():
        def note(module, args, out, name=name):
            parameters = 0 if any(module.children()) else sum(p.numel() for p in module.parameters())
            order.append((name, _is_map(out), parameters))

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
    if last is None or after > 0.5 * total:  # a token mixer's only map is its patches
        raise UserError(f"--explain: {type(model).__name__} has neither attention blocks nor a last feature map")
    return order[last][0]


def _is_map(out):
    return isinstance(out, torch.Tensor) and out.ndim == 4 and _channels_first(out).shape[-1] > 1


def _channels_first(maps):
    """(B, C, h, w) of a map that may be (B, h, w, C): pictures are square, so the equal sides tell."""
    _, a, b, c = maps.shape
    return maps.permute(0, 3, 1, 2) if a == b != c else maps


# ---- attention rollout -----------------------------------------------------------------------------------------------


def _attention_blocks(model):
    """The attention of each block, where the model is a plain transformer as timm names it: blocks[i].attn.qkv."""
    blocks = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    plain = all(hasattr(attention, "qkv") and hasattr(attention, "num_heads") for attention in blocks)
    return blocks if plain and hasattr(model, "patch_embed") else []


@torch.no_grad()
def attention_rollout(model, inputs):
    """(B, h, w): what reaches the class token, or the mean of all tokens where there is none, from each patch."""
    blocks, outputs = _attention_blocks(model), []
    handles = [attention.qkv.register_forward_hook(lambda module, args, out: outputs.append(out)) for attention in blocks]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    flow = None
    for attention, qkv in zip(blocks, outputs):
        weights = attention_weights(attention, qkv).mean(1)  # (B, N, N)
        weights = (weights + torch.eye(weights.shape[-1], device=weights.device)) / 2  # rows still sum to one
        flow = weights if flow is None else weights @ flow
    prefix = getattr(model, "num_prefix_tokens", 1 if getattr(model, "cls_token", None) is not None else 0)
    received = flow[:, 0, prefix:] if prefix else flow.mean(1)  # (B, patches)
    side = round(received.shape[1] ** 0.5)
    if side * side != received.shape[1]:
        raise UserError(f"--explain: {received.shape[1]} patches are no square")
    return received.view(-1, side, side)


def attention_weights(attention, qkv):
    """softmax(q k^T / sqrt(head_dim)), (B, heads, N, N), from the output (B, N, 3 D) of a block's qkv.

    An attention with a learnt temperature is local self-attention (arXiv 2112.13492): no token looks at itself.
    """
    batch, tokens, width = qkv.shape
    q, k, _ = qkv.float().view(batch, tokens, 3, attention.num_heads, width // 3 // attention.num_heads).permute(2, 0, 3, 1, 4)
    q, k = (getattr(attention, f"{name}_norm", torch.nn.Identity())(each) for name, each in (("q", q), ("k", k)))
    temperature = getattr(attention, "temperature", None)
    if temperature is None:
        return (q @ k.transpose(-2, -1) * getattr(attention, "scale", q.shape[-1] ** -0.5)).softmax(-1)
    itself = torch.eye(tokens, dtype=torch.bool, device=qkv.device)
    return (q @ k.transpose(-2, -1) * temperature).masked_fill(itself, -torch.inf).softmax(-1)
