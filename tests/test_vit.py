"""The vision transformer against timm's and against its formulas, and at other sizes."""

import pytest
import torch
import torch.nn.functional as F

import models
from common.errors import UserError
from models.layers import attend
from models.vit import Attention, ShiftedPatchEmbed, ViT, sincos_positions
from training.optimizers import param_groups

SHAPE = dict(width=24, depth=3, heads=2)


def timm_vit(classes=10, size=32, patch=4, **options):
    from timm.models.vision_transformer import VisionTransformer

    shape = dict(embed_dim=24, depth=3, num_heads=2, mlp_ratio=2) | options
    return VisionTransformer(img_size=size, patch_size=patch, num_classes=classes, **shape)


def drawn(module):
    """The module with all its parameters drawn, so that no term of a formula hides behind a zero or a one."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module.eval()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_it_equals_timms_with_the_same_weights(pool):
    theirs = drawn(timm_vit(global_pool={"token": "token", "mean": "avg"}[pool], fc_norm=False))
    ours = ViT(10, pool=pool, **SHAPE).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 32, 32)
    assert (ours(x) - theirs(x)).abs().max() < 1e-5
    features = ours.forward_head(ours.forward_features(x), pre_logits=True)
    assert torch.equal(ours.get_classifier()(features), ours(x))


def test_the_named_shape_equals_timms():
    theirs = timm_vit(embed_dim=192, depth=9, num_heads=12)
    ours = models.create_model("vit_custom", 10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert (ours(x) - theirs.eval()(x)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_formula(dtype, masked):
    q, k, v = torch.randn(3, 2, 4, 7, 5).to(dtype)
    bias = torch.randn(7, 7).to(dtype).fill_diagonal_(-torch.inf) if masked else None
    scores = 0.3 * q.double() @ k.double().transpose(-2, -1) + (bias.double() if masked else 0)
    wanted = scores.softmax(-1) @ v.double()
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(attend(q, k, v, 0.3, bias).double(), wanted, rtol=0, atol=tolerance)


def test_local_attention_leaves_a_tokens_look_at_itself_out():
    B, N, D, heads = 2, 6, 8, 2
    attention, x = drawn(Attention(D, heads, local=True)), torch.randn(B, N, D)
    q, k, v = (part.view(B, N, heads, D // heads) for part in attention.qkv(x).split(D, dim=-1))
    wanted = torch.zeros(B, N, heads, D // heads)
    for b in range(B):
        for head in range(heads):
            for i in range(N):
                others = [j for j in range(N) if j != i]
                scores = torch.stack(
                    [
                        q[b, i, head] @ k[b, j, head] * attention.temperature[head].squeeze()
                        for j in others
                    ]
                )
                wanted[b, i, head] = sum(
                    w * v[b, j, head] for w, j in zip(scores.softmax(0), others)
                )
    torch.testing.assert_close(
        attention(x), attention.proj(wanted.flatten(2)), rtol=1e-4, atol=1e-5
    )


def test_the_temperature_starts_as_the_usual_scale():
    local, usual = Attention(8, 2, local=True), Attention(8, 2)
    torch.testing.assert_close(local.temperature.squeeze(), torch.full((2,), usual.scale))


def test_shifted_patches_hold_the_picture_and_its_four_diagonal_shifts():
    P, x = 4, torch.randn(2, 3, 8, 8)
    embed = drawn(ShiftedPatchEmbed(P, 5))
    s, views = P // 2, [x]
    for dy, dx in ((-s, -s), (-s, s), (s, -s), (s, s)):  # the pixel that stands dy, dx away
        view = torch.zeros_like(x)
        for y in range(8):
            for z in range(8):
                if 0 <= y + dy < 8 and 0 <= z + dx < 8:
                    view[:, :, y, z] = x[:, :, y + dy, z + dx]
        views.append(view)
    stacked = torch.cat(views, dim=1)
    wanted = []
    for row in range(2):
        for column in range(2):
            patch = stacked[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P].flatten(1)
            wanted.append(
                embed.proj(
                    F.layer_norm(patch, (patch.shape[1],), embed.norm.weight, embed.norm.bias)
                )
            )
    torch.testing.assert_close(embed(x), torch.stack(wanted, dim=1))


def test_sincos_positions_tell_all_patches_apart():
    positions = sincos_positions(5, 16)[0]
    assert positions.shape == (26, 16) and not positions[0].any()
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    # Moving by a row is the same rotation everywhere: scalar products depend on the distance only.
    products = positions[1:] @ positions[1:].T
    assert products[0, 6] == pytest.approx(products[12, 18].item(), abs=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, x = ViT(10, drop_path=0.0, spt=True, lsa=True, **SHAPE), torch.randn(2, 3, 32, 32)
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("size", "patch"), [(48, 4), (32, 8), (64, 8)])
def test_weights_of_another_size_are_resampled_as_timm_does(tmp_path, size, patch):
    from timm.models.vision_transformer import checkpoint_filter_fn

    from models.weights import load_weights

    source, path = drawn(timm_vit()), tmp_path / "source.pt"
    torch.save(source.state_dict(), path)
    theirs = timm_vit(size=size, patch=patch)
    theirs.load_state_dict(checkpoint_filter_fn(dict(source.state_dict()), theirs))
    ours = ViT(10, image_size=size, patch_size=patch, **SHAPE)
    assert "new" not in load_weights(ours, path)[0]
    x = torch.randn(2, 3, size, size)
    assert (ours.eval()(x) - theirs.eval()(x)).abs().max() < 1e-5


def test_published_transformers_take_weights_of_another_size(tmp_path):
    from models.weights import load_weights

    source, path = (
        models.create_model("vit_tiny", 5),
        tmp_path / "vit_tiny.pt",
    )  # 224 px, patches of 16
    torch.save(source.state_dict(), path)
    model = models.create_model("vit_tiny", 10, image_size=32)
    line, card = load_weights(model, path)
    assert "new: head.weight, head.bias" in line and card is None
    assert model.pos_embed.shape == (1, 65, 192) and model.patch_embed.proj.weight.shape[-1] == 4
    # Resampled, not fresh: the class token's position is kept, a patch's mean response to grey nearly so.
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_timms_networks_are_told_the_size_where_they_need_it():
    assert models.parse_options([], "timm/vit_tiny_patch16_224", 64) == {"img_size": 64}
    assert models.parse_options([], "timm/resnet18", 64) == {}
    assert models.describe("timm/resnet18", 10, 224)[0] == 11_181_642


def test_sizes_and_parameters_of_the_transformers():
    sizes = {
        ("vit_tiny", 32): 5_362_762,
        ("vit_custom", 32): 2_697_610,
        ("vit_small_data", 32): 2_735_062,
    }
    for (name, size), parameters in sizes.items():
        assert (
            models.describe(name, 10, size, models.parse_options([], name, size))[0] == parameters
        )
    for size in (32, 64, 128, 224, 448):
        models.describe("vit_tiny", 10, size, models.parse_options([], "vit_tiny", size))
    with pytest.raises(UserError, match="30 is not a multiple of patch_size 4"):
        models.create_model("vit_custom", 10, image_size=30)


def test_layers_nearer_to_the_input_have_smaller_rates():
    for model, layers in ((ViT(10, **SHAPE), 3), (timm_vit(), 3)):
        groups = param_groups(model, 0.1, layer_decay=0.5)
        scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        named = dict(model.named_parameters())
        assert scale[id(named["head.weight"])] == 1 and scale[
            id(named["patch_embed.proj.weight"])
        ] == 0.5 ** (layers + 1)
        for i in range(layers):
            assert scale[id(named[f"blocks.{i}.mlp.fc1.weight"])] == 0.5 ** (layers - i)
        assert (
            decay[id(named["pos_embed"])] == decay[id(named["head.bias"])] == 0
            and decay[id(named["head.weight"])] == 0.1
        )
    with pytest.raises(UserError, match="--layer-decay"):
        param_groups(models.create_model("resnet20", 10), 0.1, layer_decay=0.5)


def test_timms_attention_is_not_fused_in_bf16_on_a_cpu():
    model = timm_vit()
    assert model.blocks[0].attn.fused_attn
    assert models.choose_attention(model, torch.device("cpu"), None).blocks[0].attn.fused_attn
    assert (
        not models.choose_attention(model, torch.device("cpu"), torch.bfloat16)
        .blocks[0]
        .attn.fused_attn
    )
