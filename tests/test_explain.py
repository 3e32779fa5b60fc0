"""Explanations: they equal their definition, and don't change the model."""

import copy
from contextlib import ExitStack

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat

from common.errors import UserError
from models import create_model
from show import explain

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


# ---- Grad-CAM ------------------------------------------------------------------------------------


def test_grad_cam_is_the_channel_that_the_class_depends_on():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), Mean())  # class k: the mean of channel k
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2, 3)[:, :, None, None])
    x = torch.zeros(2, 3, 8, 8)
    x[:, 0, 1, 2], x[:, 1, 5, 6] = 2.0, 3.0
    heat, method = explain.explain(model, x, torch.tensor([0, 1]))
    assert method == "Grad-CAM" and heat.shape == (2, 8, 8)
    assert heat.flatten(1).argmax(1).tolist() == [1 * 8 + 2, 5 * 8 + 6]
    assert heat.max() == 1 and heat.min() == 0


@pytest.mark.parametrize(
    "name", ["resnet20", "segnext_mscan_tiny", "coatnet_0", "hornet_tiny", "ghostnet_100"]
)
def test_networks_with_feature_maps_are_explained(name):
    torch.manual_seed(0)
    model = create_model(name, 10).train()
    with unchanged(model):
        heat, method = explain.explain(model, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert method == "Grad-CAM" and heat.shape == (2, 32, 32) and heat.isfinite().all()
    assert 0 <= heat.min() <= heat.max() <= 1


def test_images_of_a_batch_do_not_affect_each_other():
    torch.manual_seed(0)
    model, x = create_model("resnet20", 10), torch.randn(3, 3, 32, 32)
    together, _ = explain.explain(model, x, torch.tensor([1, 2, 3]))
    alone, _ = explain.explain(model, x[1:2], torch.tensor([2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def unchanged(model):
    """A context that leaves a model's state, settings, mode, hooks and gradients as they were."""

    def snapshot():
        hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]
        return [(vars(m).get("fused_attn"), m.training) for m in model.modules()], hooks

    before, state = snapshot(), copy.deepcopy(model.state_dict())

    def check(*error):
        assert snapshot() == before and all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    stack = ExitStack()
    stack.callback(check)
    return stack


# ---- attention rollout ---------------------------------------------------------------------------


def randomized(name, **options):
    """A model whose every parameter matters: many are initialized with a constant."""
    torch.manual_seed(0)
    model = create_model(name, 10, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rollout_by_hand(model, inputs, scores):
    """(B, N, N): the product over blocks of (mean over heads of the softmax of scores + 1) / 2."""
    seen = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda attn, args, named: seen.append((attn, args[0], named)), with_kwargs=True
        )
    model(inputs)
    flow = torch.eye(seen[0][1].shape[1])
    for attention, x, named in seen:
        weights = scores(attention, x, named.get("rope")).softmax(-1).mean(1)
        flow = (weights + torch.eye(x.shape[1])) / 2 @ flow
    return flow


def heads(attention, x):
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def plain_scores(attention, x, rope):
    q, k, _ = (heads(attention, each) for each in attention.qkv(x).chunk(3, -1))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q @ k.transpose(-2, -1) * attention.scale


def local_scores(attention, x, rope):
    """arXiv 2112.13492: a learnt temperature, and no token looks at itself."""
    scores = plain_scores(attention, x, rope) / attention.scale * attention.temperature
    return scores.masked_fill(torch.eye(x.shape[1], dtype=torch.bool), -torch.inf)


def eva_scores(attention, x, rope):
    if attention.qkv is None:
        q, k = attention.q_proj(x), attention.k_proj(x)
    else:
        q, k, _ = attention.qkv(x).chunk(3, -1)
        q = q + attention.q_bias
    q, k = heads(attention, q), heads(attention, k)
    if rope is not None:
        q = torch.cat([q[:, :, :1], apply_rot_embed_cat(q[:, :, 1:], rope)], 2)
        k = torch.cat([k[:, :, :1], apply_rot_embed_cat(k[:, :, 1:], rope)], 2)
    return q @ k.transpose(-2, -1) * attention.scale


def beit_scores(attention, x, rope):
    q, k, _ = attention.qkv(x).chunk(3, -1)
    q, k = heads(attention, q + attention.q_bias), heads(attention, k)
    table, index = attention.relative_position_bias_table, attention.relative_position_index
    return q @ k.transpose(-2, -1) * attention.scale + table[index].permute(2, 0, 1)


TIMM_VIT, EVA02 = "timm/vit_tiny_patch16_224", "timm/eva02_tiny_patch14_224"
DEIT, DISTILLED = "timm/deit3_small_patch16_224", "timm/deit_tiny_distilled_patch16_224"
GIANT, BEIT = "timm/eva_giant_patch14_224", "timm/beit_base_patch16_224"
AVG, TOKEN_POOL = VIT | {"global_pool": "avg"}, VIT | {"global_pool": "token"}
OURS = {"depth": 2, "width": 24, "heads": 2, "patch_size": 8}
TOKEN, MEAN = slice(0, 1), slice(1, None)  # the rows that the classifier sees


@pytest.mark.parametrize(
    ("name", "options", "scores", "rows", "prefix"),
    [
        (TIMM_VIT, VIT, plain_scores, TOKEN, 1),
        (TIMM_VIT, AVG, plain_scores, MEAN, 1),
        (TIMM_VIT, VIT | {"global_pool": "avgmax"}, plain_scores, MEAN, 1),
        (TIMM_VIT, AVG | {"class_token": False}, plain_scores, slice(None), 0),
        (TIMM_VIT, AVG | {"reg_tokens": 3}, plain_scores, slice(4, None), 4),
        (TIMM_VIT, VIT | {"reg_tokens": 3, "qk_norm": True}, plain_scores, TOKEN, 4),
        (DEIT, VIT, plain_scores, TOKEN, 1),
        (DISTILLED, VIT, plain_scores, slice(0, 2), 2),
        (EVA02, VIT, eva_scores, MEAN, 1),
        (EVA02, TOKEN_POOL | {"qkv_fused": False}, eva_scores, TOKEN, 1),
        (GIANT, VIT | {"mlp_ratio": 2}, eva_scores, MEAN, 1),
        (BEIT, VIT, beit_scores, MEAN, 1),
        (BEIT, TOKEN_POOL, beit_scores, TOKEN, 1),
        ("vit_custom", OURS, plain_scores, TOKEN, 1),
        ("vit_custom", OURS | {"pool": "mean"}, plain_scores, MEAN, 1),
        ("vit_small_data", OURS, local_scores, TOKEN, 1),
    ],
)
def test_rollout_equals_the_one_computed_by_hand(name, options, scores, rows, prefix):
    model, x = randomized(name, **options), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        heat = explain.attention_rollout(model, x)
        wanted = rollout_by_hand(model, x, scores)[:, rows].mean(1)[:, prefix:].view(2, 4, 4)
    torch.testing.assert_close(heat, wanted, atol=1e-6, rtol=1e-4)
    shown, method = explain.explain(model, x, torch.tensor([0, 1]))
    assert method == "attention rollout" and shown.shape == (2, 32, 32) and shown.max() == 1
    assert not torch.allclose(heat[0], heat[1], atol=1e-3)


def test_relative_positions_change_the_rollout():
    model, x = randomized(BEIT, **VIT), torch.randn(1, 3, 32, 32)
    before = explain.explain(model, x, torch.tensor([0]))[0]
    with torch.no_grad():
        model.blocks[1].attn.relative_position_bias_table.normal_()
    assert not torch.allclose(explain.explain(model, x, torch.tensor([0]))[0], before, atol=0.01)


@pytest.mark.parametrize(("name", "options"), [(EVA02, VIT), ("vit_small_data", OURS)])
def test_rollout_does_not_change_a_transformer(name, options):
    model, x = randomized(name, **options), torch.randn(2, 3, 32, 32)
    assert any(getattr(module, "fused_attn", False) for module in model.modules())
    before = model(x)
    with unchanged(model):
        explain.explain(model, x, torch.tensor([0, 1]))
    assert torch.equal(model(x), before)


def test_rollout_of_attention_to_a_single_patch():
    model = create_model(TIMM_VIT, 10, **VIT).eval()
    attention = F.one_hot(torch.tensor(6), 17).float().expand(1, 2, 17, 17)
    for block in model.blocks:
        block.attn.attn_drop.register_forward_pre_hook(lambda *_: attention)
    flow = explain.attention_rollout(model, torch.randn(1, 3, 32, 32))
    # Two blocks, each of which keeps half by its residual connection.
    assert flow.flatten()[5] == pytest.approx(0.75) and flow.sum() == pytest.approx(0.75)


SWIN = {"img_size": 56, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "embed_dim": 24}
SAM = {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2}
CONVIT = {"img_size": 64, "depth": 3, "local_up_to_layer": 2}
NOT_PLAIN = "it has no attention blocks of a plain transformer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size", "result"),
    [
        ("vit_base_patch16_siglip_224", VIT, 32, "its classifier pools the tokens by attention"),
        ("cait_xxs24_224", {"img_size": 64, "depth": 2}, 64, "its attention don't sum to one"),
        ("xcit_nano_12_p8_224", {"depth": 2}, 64, "doesn't see the tokens of its blocks"),
        ("convit_tiny", CONVIT, 64, "its blocks have different numbers of tokens"),
        ("levit_128s", {}, 224, NOT_PLAIN),
        ("crossvit_tiny_240", {}, 240, NOT_PLAIN),
        ("vit_relpos_small_patch16_224", VIT, 32, "attention rollout"),
        ("swin_tiny_patch4_window7_224", SWIN, 56, "Grad-CAM"),
        ("samvit_base_patch16", SAM, 64, "Grad-CAM"),
        ("pvt_v2_b0", {}, 64, "Grad-CAM"),
        ("maxvit_rmlp_pico_rw_256", {"img_size": 64}, 64, "Grad-CAM"),
    ],
)
def test_other_transformers_are_explained_or_refused(name, options, size, result):
    torch.manual_seed(0)
    model = create_model(f"timm/{name}", 10, **options)
    try:
        heat, said = explain.explain(model, torch.randn(2, 3, size, size), torch.tensor([0, 1]))
        assert heat.shape == (2, size, size) and heat.isfinite().all() and heat.max() == 1
    except UserError as error:
        said = str(error)
        assert said.startswith("--explain: ") and "\n" not in said
    assert result in said


def test_a_model_without_map_and_attention_is_refused():
    message = "--explain: MlpMixer has no last feature map, and it has no attention blocks"
    with pytest.raises(UserError, match=rf"\A{message}.*\Z"):
        model = create_model("mlp_mixer_tiny", 10)
        explain.explain(model, torch.randn(1, 3, 32, 32), torch.tensor([0]))
