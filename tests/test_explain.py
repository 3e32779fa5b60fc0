"""Explanations: what they are by definition, and that they don't change the model."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from models import create_model
from show import explain

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


class TwoMaps(nn.Module):
    """Class k's logit is the mean of channel k of the map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_grad_cam_is_the_channel_that_the_class_depends_on():
    model = TwoMaps()
    with torch.no_grad():
        model.conv.weight.copy_(torch.eye(2, 3)[:, :, None, None])
    x = torch.zeros(2, 3, 8, 8)
    x[:, 0, 1, 2], x[:, 1, 5, 6] = 2.0, 3.0
    heat, method = explain.explain(model, x, torch.tensor([0, 1]))
    assert method == "Grad-CAM" and heat.shape == (2, 8, 8)
    assert heat[0].argmax() == 1 * 8 + 2 and heat[1].argmax() == 5 * 8 + 6 and heat.max() == 1 and heat.min() == 0


@pytest.mark.parametrize("name", ["resnet20", "segnext_mscan_tiny", "coatnet_0", "hornet_tiny", "ghostnet_100"])
def test_networks_with_maps_are_explained_and_stay_as_they_are(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    model.train()
    before = copy.deepcopy(model.state_dict())
    heat, method = explain.explain(model, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert method == "Grad-CAM" and heat.shape == (2, 32, 32) and heat.isfinite().all() and 0 <= heat.min() <= heat.max() <= 1
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_pictures_of_a_batch_do_not_change_each_other():
    torch.manual_seed(0)
    model, x = create_model("resnet20", 10), torch.randn(3, 3, 32, 32)
    together, _ = explain.explain(model, x, torch.tensor([1, 2, 3]))
    alone, _ = explain.explain(model, x[1:2], torch.tensor([2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_recomputed_attention_is_the_models():
    """Through the values it gives what the block's own attention gives."""
    torch.manual_seed(0)
    model = create_model("timm/vit_tiny_patch16_224", 10, **VIT).eval()
    attention = model.blocks[0].attn
    x = torch.randn(2, 17, 24)
    with torch.no_grad():
        qkv = attention.qkv(x)
        weights = explain.attention_weights(attention, qkv)
        values = qkv.view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)[2]
        out = attention.proj((weights @ values).transpose(1, 2).reshape(2, 17, 24))
        torch.testing.assert_close(out, attention(x), atol=1e-5, rtol=1e-5)


def test_local_attention_never_looks_at_itself():
    """arXiv 2112.13492: two tokens that see only each other."""
    attention = SimpleNamespace(num_heads=1, temperature=torch.ones(1, 1, 1))
    weights = explain.attention_weights(attention, torch.randn(1, 2, 12))
    torch.testing.assert_close(weights, torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]))


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True}])
def test_rollout_is_a_distribution_over_patches(options):
    torch.manual_seed(0)
    model = create_model("timm/vit_tiny_patch16_224", 10, **VIT, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    flow = explain.attention_rollout(model, x)
    assert flow.shape == (2, 4, 4) and (flow > 0).all() and (flow.sum((1, 2)) <= 1 + 1e-5).all()
    if not options.get("class_token", True):
        torch.testing.assert_close(flow.sum((1, 2)), torch.ones(2))
    heat, method = explain.explain(model, x, torch.tensor([0, 1]))
    assert method == "attention rollout" and heat.shape == (2, 32, 32) and heat.max() == 1


def test_rollout_of_attention_that_only_looks_at_one_patch():
    model = create_model("timm/vit_tiny_patch16_224", 10, **VIT).eval()

    def only_six(attention, qkv):
        return F.one_hot(torch.tensor(6), 17).float().expand(len(qkv), 2, 17, 17)

    original, explain.attention_weights = explain.attention_weights, only_six
    try:
        flow = explain.attention_rollout(model, torch.randn(1, 3, 32, 32))
    finally:
        explain.attention_weights = original
    assert flow.flatten()[5] == pytest.approx(0.75) and flow.sum() == pytest.approx(0.75)  # two blocks, half residual each


def test_a_model_with_neither_says_so_in_one_line():
    with pytest.raises(UserError, match=r"\A--explain: \w+ has neither attention blocks nor a last feature map\Z"):
        explain.explain(create_model("mlp_mixer_tiny", 10), torch.randn(1, 3, 32, 32), torch.tensor([0]))
