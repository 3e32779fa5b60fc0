"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929), with two options for few images.

Shifted patch tokenization (`spt`) and locality self-attention (`lsa`) are those of Lee et al.,
arXiv 2112.13492: a patch sees its surroundings, and attention learns its own temperature and
excludes a token's attention to itself.

Without options it is timm's VisionTransformer with the same parameter names, so that weights are
interchangeable. Departures from arXiv 2010.11929, as in timm: no hidden layer in the head, no
dropout, linear layers initialized by a truncated normal of 0.02.

Shapes: B images, N tokens (the class token, then the patches row by row), D width, P patch size.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from models.layers import DropPath, Mlp, attention_weights, drop_path_rates, one_of


class PatchEmbed(nn.Module):
    """One linear map of each patch (a convolution of stride P). (B, 3, H, W) -> (B, N - 1, D)"""

    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ShiftedPatchEmbed(nn.Module):
    """Patches of the image and of its four diagonal shifts by half a patch, normalized, projected.

    (B, 3, H, W) -> (B, N - 1, D). arXiv 2112.13492 §3.1.
    """

    def __init__(self, patch_size, width):
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"shifted patches need an even patch_size, not {patch_size}")
        self.patch_size = patch_size
        values = 5 * 3 * patch_size**2
        self.norm = nn.LayerNorm(values)
        self.proj = nn.Linear(values, width)

    def forward(self, x):
        H, W = x.shape[2:]
        s = self.patch_size // 2
        padded = F.pad(x, (s, s, s, s))
        corners = ((0, 0), (0, 2 * s), (2 * s, 0), (2 * s, 2 * s))
        shifted = [padded[:, :, top : top + H, left : left + W] for top, left in corners]
        x = torch.cat([x, *shifted], dim=1)  # (B, 15, H, W)
        # (B, N - 1, 15 P P)
        patches = F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)
        return self.proj(self.norm(patches))


class Attention(nn.Module):
    """softmax(q k' / sqrt(head_dim)) v for each head, projected. (B, N, D) -> (B, N, D)

    lsa: a token doesn't attend to itself, and `temperature` is a learned factor of each head's
    logits, at first 1 / sqrt(head_dim) (arXiv 2112.13492 §3.2, which divides by its inverse).
    """

    def __init__(self, width, heads, lsa=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), self.scale)) if lsa else None
        # As in timm's attention: where fused_attn is False, attn_drop sees the weights.
        self.fused_attn = True
        self.attn_drop = nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        mask = None
        if self.temperature is not None:
            q = q * (self.temperature / self.scale).to(q.dtype)
            itself = torch.eye(N, dtype=torch.bool, device=x.device)
            mask = q.new_zeros(N, N).masked_fill(itself, -torch.inf)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            x = self.attn_drop(attention_weights(q, k, self.scale, mask)) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Attention, then MLP, each after a layer norm and with a shortcut. (B, N, D) -> (B, N, D)"""

    def __init__(self, width, heads, hidden, drop_path, lsa):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, lsa)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Tokens, positions, blocks, norm, classifier. (B, 3, H, W) -> (B, num_classes)

    pool: what the classifier sees, the class token ("token") or the mean of the patches ("mean").
    """

    def __init__(
        self,
        num_classes=10,
        *,
        image_size=32,
        patch_size=4,
        width=192,
        depth=9,
        heads=12,
        mlp_ratio=2.0,
        spt=False,
        lsa=False,
        positions="learned",
        pool="token",
        drop_path=0.1,
    ):
        super().__init__()
        if min(patch_size, image_size) < 1 or image_size % patch_size:
            sizes = f"image_size {image_size}, patch_size {patch_size}"
            raise ValueError(f"{sizes}: the first must be a positive multiple of the second")
        shape = dict(width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        for option, value in shape.items():
            if value <= 0:
                raise ValueError(f"{option} must be above zero, not {value}")
        self.pool = one_of("pool", pool, ("token", "mean"))
        self.grad_checkpointing = False
        self.num_prefix_tokens = 1  # the class token
        self.patch_embed = (ShiftedPatchEmbed if spt else PatchEmbed)(patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        side = image_size // patch_size
        if one_of("positions", positions, ("learned", "sincos")) == "learned":
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + side**2, width))
        else:
            self.register_buffer("pos_embed", sincos_positions(side, width), persistent=False)
        hidden = int(mlp_ratio * width)
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.Sequential(*[Block(width, heads, hidden, rate, lsa) for rate in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self.apply(init_weights)

    def forward_features(self, x):
        """(B, 3, H, W) -> (B, N, D)"""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def forward_head(self, x, pre_logits=False):
        """(B, N, D) -> (B, num_classes), or the classifier's input (B, D) where pre_logits."""
        x = x[:, 0] if self.pool == "token" else x[:, 1:].mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.head

    def set_grad_checkpointing(self, enable=True):
        """Computes blocks again in the backward pass: less memory, a third more work."""
        self.grad_checkpointing = enable

    def adapt_weights(self, state):
        """Resizes the state dict of a ViT of another size to this one's.

        Patches are resampled (arXiv 2212.08013), positions interpolated.
        """
        from timm.layers import resample_abs_pos_embed, resample_patch_embed

        state, own = dict(state), self.state_dict()
        kernel, own_kernel = (s.get("patch_embed.proj.weight") for s in (state, own))
        if kernel is not None and kernel.ndim == own_kernel.ndim == 4:
            new_size = list(own_kernel.shape[2:])
            state["patch_embed.proj.weight"] = resample_patch_embed(kernel.float(), new_size)
        positions, own_positions = (s.get("pos_embed") for s in (state, own))
        both_learned = positions is not None and own_positions is not None
        if both_learned and positions.shape[1] != own_positions.shape[1]:
            side = round((own_positions.shape[1] - 1) ** 0.5)
            state["pos_embed"] = resample_abs_pos_embed(positions.float(), [side, side])
        return state

    def no_weight_decay(self):
        temperatures = {name for name, _ in self.named_parameters() if name.endswith("temperature")}
        return {"pos_embed", "cls_token"} | temperatures

    def group_matcher(self, coarse=False):
        """Depth of each parameter, for timm.optim.param_groups_layer_decay."""
        return dict(
            stem=r"^cls_token|^pos_embed|^patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )


def sincos_positions(side, width):
    """Sines and cosines of row and column at D / 4 frequencies (arXiv 2104.02057). (1, N, D)

    The class token's position is zero.
    """
    if width % 4:
        raise ValueError(f"sincos positions need a width that is a multiple of 4, not {width}")
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, D / 4)
    row, column = angles.repeat_interleave(side, 0), angles.repeat(side, 1)  # (N - 1, D / 4)
    patches = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None]


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
