"""The vision transformer against timm's and against its formulas, and at other sizes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import randomize

import models
from common.errors import UserError
from models.layers import attention_weights
from models.vit import Attention, ShiftedPatchEmbed, ViT, sincos_positions
from models.weights import load_weights
from training.optimizers import param_groups

SHAPE = dict(width=24, depth=3, heads=2)
CPU = torch.device("cpu")


def timm_vit(size=32, patch=4, **options):
    from timm.models.vision_transformer import VisionTransformer

    shape = dict(embed_dim=24, depth=3, num_heads=2, mlp_ratio=2) | options
    return VisionTransformer(img_size=size, patch_size=patch, num_classes=10, **shape)


def describe(name, size):
    return models.describe(name, 10, size, models.parse_options([], name, size))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit_equals_timms_with_the_same_weights(pool):
    global_pool = "avg" if pool == "mean" else "token"
    timms = randomize(timm_vit(global_pool=global_pool, fc_norm=False), 0.5)
    model = ViT(10, pool=pool, **SHAPE).eval()
    model.load_state_dict(timms.state_dict())
    x = torch.randn(3, 3, 32, 32)
    assert (model(x) - timms(x)).abs().max() < 1e-5
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model.get_classifier()(features), model(x))


def test_vit_custom_equals_timms():
    timms = timm_vit(embed_dim=192, depth=9, num_heads=12).eval()
    model = models.create_model("vit_custom", 10).eval()
    model.load_state_dict(timms.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert (model(x) - timms(x)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_are_those_of_the_fused_kernel(dtype, masked):
    q, k, v = torch.randn(3, 2, 4, 7, 5).to(dtype)
    mask = torch.randn(7, 7).to(dtype).fill_diagonal_(-torch.inf) if masked else None
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    plain = attention_weights(q, k, 0.3, mask) @ v
    torch.testing.assert_close(plain, fused, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fused", [True, False])
def test_local_attention_excludes_the_token_itself(fused):
    B, N, D, heads = 2, 6, 8, 2
    attention, x = randomize(Attention(D, heads, lsa=True), 0.5), torch.randn(B, N, D)
    attention.fused_attn = fused
    q, k, v = (part.view(B, N, heads, D // heads) for part in attention.qkv(x).split(D, dim=-1))
    expected = torch.zeros(B, N, heads, D // heads)
    for b in range(B):
        for head in range(heads):
            for i in range(N):
                others = [j for j in range(N) if j != i]
                scores = k[b, others, head] @ q[b, i, head] * attention.temperature[head].squeeze()
                expected[b, i, head] = scores.softmax(0) @ v[b, others, head]
    expected = attention.proj(expected.flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_temperature_starts_as_the_usual_scale():
    local, usual = Attention(8, 2, lsa=True), Attention(8, 2)
    torch.testing.assert_close(local.temperature.squeeze(), torch.full((2,), usual.scale))


def test_shifted_patches_hold_the_image_and_its_diagonal_shifts():
    P, x = 4, torch.randn(2, 3, 8, 8)
    embed = randomize(ShiftedPatchEmbed(P, 5))
    s, views = P // 2, [x]
    for dy, dx in ((-s, -s), (-s, s), (s, -s), (s, s)):
        view = torch.zeros_like(x)
        for row in range(8):
            for column in range(8):
                if 0 <= row + dy < 8 and 0 <= column + dx < 8:
                    view[:, :, row, column] = x[:, :, row + dy, column + dx]
        views.append(view)
    stacked = torch.cat(views, dim=1)
    expected = []
    for top in (0, P):
        for left in (0, P):
            patch = stacked[:, :, top : top + P, left : left + P].flatten(1)
            norm = F.layer_norm(patch, patch.shape[1:], embed.norm.weight, embed.norm.bias)
            expected.append(embed.proj(norm))
    torch.testing.assert_close(embed(x), torch.stack(expected, dim=1))


def test_sincos_positions_distinguish_all_patches():
    positions = sincos_positions(5, 16)[0]
    assert positions.shape == (26, 16) and not positions[0].any()
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    # Moving by a row is the same rotation everywhere: products depend on the distance only.
    products = positions[1:] @ positions[1:].T
    assert products[0, 6] == pytest.approx(products[12, 18].item(), abs=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, x = ViT(10, drop_path=0.0, spt=True, lsa=True, **SHAPE), torch.randn(2, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("size", "patch"), [(48, 4), (32, 8), (64, 8)])
def test_weights_of_another_size_are_resampled_as_by_timm(tmp_path, size, patch):
    from timm.models.vision_transformer import checkpoint_filter_fn

    source, path = randomize(timm_vit(), 0.5), tmp_path / "source.pt"
    torch.save(source.state_dict(), path)
    timms = timm_vit(size, patch).eval()
    timms.load_state_dict(checkpoint_filter_fn(dict(source.state_dict()), timms))
    model = ViT(10, image_size=size, patch_size=patch, **SHAPE).eval()
    assert "new" not in load_weights(model, path)[0]
    x = torch.randn(2, 3, size, size)
    assert (model(x) - timms(x)).abs().max() < 1e-5


def test_published_vit_takes_weights_of_another_size(tmp_path):
    source, path = models.create_model("vit_tiny", 5), tmp_path / "vit_tiny.pt"
    assert source.patch_embed.proj.weight.shape[-1] == 16
    torch.save(source.state_dict(), path)
    model = models.create_model("vit_tiny", 10, image_size=32)
    line, card = load_weights(model, path)
    assert "new: head.weight, head.bias" in line and card is None
    assert model.pos_embed.shape == (1, 65, 192) and model.patch_embed.proj.weight.shape[-1] == 4
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_timms_networks_get_the_size_where_they_need_it():
    assert models.parse_options([], "timm/vit_tiny_patch16_224", 64) == {"img_size": 64}
    assert models.parse_options([], "timm/resnet18", 64) == {}
    assert describe("timm/resnet18", 224)[0] == 11_181_642


def test_transformers_take_several_sizes():
    assert describe("vit_tiny", 32)[0] == 5_362_762
    for size in (64, 448):
        describe("vit_tiny", size)
    with pytest.raises(UserError, match="image_size 30, patch_size 4: the first must be"):
        models.create_model("vit_custom", 10, image_size=30)


@pytest.mark.parametrize("create", [lambda: ViT(10, **SHAPE), timm_vit])
def test_layers_nearer_to_the_input_have_smaller_rates(create):
    model, depth = create(), 3
    groups = param_groups(model, 0.1, layer_decay=0.5)
    group_of = {id(p): group for group in groups for p in group["params"]}
    group_of = {name: group_of[id(p)] for name, p in model.named_parameters()}
    assert group_of["head.weight"]["lr_scale"] == 1
    assert group_of["patch_embed.proj.weight"]["lr_scale"] == 0.5 ** (depth + 1)
    for i in range(depth):
        assert group_of[f"blocks.{i}.mlp.fc1.weight"]["lr_scale"] == 0.5 ** (depth - i)
    assert group_of["pos_embed"]["weight_decay"] == group_of["head.bias"]["weight_decay"] == 0
    assert group_of["head.weight"]["weight_decay"] == 0.1


def test_layer_decay_needs_a_model_that_knows_its_depth():
    with pytest.raises(UserError, match="--layer-decay"):
        param_groups(models.create_model("resnet20", 10), 0.1, layer_decay=0.5)


@pytest.mark.parametrize("name", ["vit_custom", "coatnet_0", "timm/test_vit"])
def test_attention_is_not_fused_in_bf16_on_a_cpu(name):
    with torch.device("meta"):
        model = models.create_model(name, 10)

    def fused():
        return {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}

    for device, dtype in ((CPU, None), (torch.device("cuda"), torch.bfloat16)):
        assert models.choose_attention(model, device, dtype) is model and fused() == {True}
    models.choose_attention(model, CPU, torch.bfloat16)
    assert fused() == {False}
