"""Layers and blocks: their formulas written out on small tensors, or timm's modules."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.networks import randomize

from models import create_model
from models.cifar_resnet import ECA_POSITIONS, ECABlock, GhostModule, PadShortcut
from models.coatnet import Attention, MBConv, SelectiveKernel, Transformer, relative_index
from models.hornet import GnConv
from models.layers import (
    ECA,
    Conv3x3,
    DropPath,
    LayerNorm2d,
    drop_path_rates,
    eca_kernel,
    he_normal_,
)
from models.mscan import MSCA

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- shared layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4, 64])
def test_he_initialization_keeps_the_variance_of_gradients(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 128, 3, padding=1, groups=groups, bias=False)
    he_normal_(layer)
    x = torch.randn(8, 64, 32, 32, requires_grad=True)
    y = layer(x)
    gradient = torch.randn_like(y) * (torch.rand_like(y) < 0.5)  # as through a ReLU
    (back,) = torch.autograd.grad(y, x, gradient)
    assert back[..., 1:-1, 1:-1].var().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (2, 5)])
def test_wide_convolutions_of_small_maps_are_those_of_large_ones(size, dtype, tolerance):
    torch.manual_seed(0)
    layer = Conv3x3(5, 384).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(2, 5, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(2, 384, *size, dtype=dtype)
    results = []
    for training in (True, False):
        inputs = x.clone().requires_grad_()
        outputs = layer.train(training)(inputs)
        assert outputs.is_contiguous(memory_format=torch.channels_last)
        by_product = "Permute" in type(outputs.grad_fn).__name__
        assert by_product == training
        results.append((outputs, *torch.autograd.grad(outputs, [inputs, layer.weight], gradient)))
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(("channels", "size"), [(383, 4), (384, 5)])
def test_other_convolutions_stay_convolutions(channels, size):
    outputs = Conv3x3(3, channels).train()(torch.randn(2, 3, size, size))
    assert "Convolution" in type(outputs.grad_fn).__name__


def test_drop_path_drops_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    y = DropPath(0.25)(x)
    assert ((y == 0) | (y == 1 / 0.75)).all()
    assert (y == y[:, :1, :1, :1]).all()  # whole images
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(x), x) and torch.equal(DropPath(0.0)(x), x)
    assert drop_path_rates(0.2, 1) == [0]


def test_layer_norm_is_over_channels():
    x = torch.randn(2, 5, 3, 4)
    norm = randomize(LayerNorm2d(5))
    centered = x - x.mean(1, keepdim=True)
    expected = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


# ---- efficient channel attention -----------------------------------------------------------------


def test_eca_kernel_is_timms():
    from timm.layers import EcaModule

    expected = {16: 3, 32: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    for channels, kernel in expected.items():
        assert eca_kernel(channels) == kernel == EcaModule(channels).conv.kernel_size[0]


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_eca_is_a_sum_over_neighboring_channels(kernel):
    B, C = 2, 7
    x = torch.randn(B, C, 3, 4)
    eca = randomize(ECA(kernel))
    weight, means = eca.conv.weight.flatten(), x.mean((2, 3))
    expected = torch.empty_like(x)
    for b, c in itertools.product(range(B), range(C)):
        neighbors = [(i, c + i - kernel // 2) for i in range(kernel)]
        total = sum(weight[i] * means[b, j] for i, j in neighbors if 0 <= j < C)
        expected[b, c] = x[b, c] * torch.sigmoid(total)
    torch.testing.assert_close(eca(x), expected)


def test_eca_takes_odd_kernels():
    with pytest.raises(ValueError, match="odd"):
        ECA(4)


@pytest.mark.parametrize("position", ECA_POSITIONS)
def test_eca_is_at_the_position_of_its_name(position):
    x = torch.randn(2, 4, 6, 6)
    block = randomize(ECABlock(4, 8, 2, "project", kernel=3, position=position))
    eca = next(m for m in block.modules() if isinstance(m, ECA))
    first, second, third = (eca if position == p else nn.Identity() for p in ("bn1", "bn2", "add"))
    expected = third(block.shortcut(x) + second(block.conv2(first(block.conv1(x)).relu()))).relu()
    torch.testing.assert_close(block(x), expected)


def test_adaptive_eca_is_the_fixed_kernel_of_three():
    adaptive, fixed = create_model("ecanet20_adaptive", 10), create_model("ecanet20_fixed_k3", 10)
    fixed.load_state_dict(adaptive.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(adaptive.eval()(x), fixed.eval()(x))


def test_pad_shortcut_subsamples_and_adds_zeros():
    x = torch.randn(2, 4, 6, 6)
    y = PadShortcut(4, 9, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any() and y.shape[1] == 9


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Identity])
@pytest.mark.parametrize("ratio", [2, 3])
def test_ghost_module_equals_timms(width, act, ratio):
    from timm.models.ghostnet import GhostModule as TimmGhostModule

    x = torch.randn(2, 3, 6, 6)
    module = randomize(GhostModule(3, width, stride=2, ratio=ratio, relu=act is nn.ReLU))
    timms = TimmGhostModule(3, width, kernel_size=3, stride=2, ratio=ratio, act_layer=act).eval()
    timms.load_state_dict(dict(zip(timms.state_dict(), module.state_dict().values())))
    assert module(x).shape == (2, width, 3, 3)
    torch.testing.assert_close(module(x), timms(x))


def pointwise(x, convolution):
    """A 1x1 convolution as a sum over channels."""
    products = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], x)
    return products + convolution.bias[:, None, None]


def test_msca_is_a_gate_from_a_sum_of_scales():
    C = 3
    x = torch.randn(2, C, 9, 9)
    msca = randomize(MSCA(C))

    def strip(x, convolution, kernel):
        assert convolution.kernel_size == kernel
        padding = (kernel[0] // 2, kernel[1] // 2)
        return F.conv2d(x, convolution.weight, convolution.bias, padding=padding, groups=C)

    local = strip(x, msca.local, (5, 5))
    scales = local.clone()
    for k, (horizontal, vertical) in zip((7, 11, 21), msca.strips):
        scales += strip(strip(local, horizontal, (1, k)), vertical, (k, 1))
    torch.testing.assert_close(msca(x), pointwise(scales, msca.mix) * x)


def test_gnconv_of_order_two_is_the_formula():
    x = torch.randn(2, 6, 8, 8)
    gnconv = randomize(GnConv(6, order=2, scale=0.5))

    def depthwise(x, first, last):
        weight, bias = gnconv.depthwise.weight[first:last], gnconv.depthwise.bias[first:last]
        return F.conv2d(x, weight, bias, padding=3, groups=last - first)

    projected = pointwise(x, gnconv.proj_in)  # 12 channels: p0 has 3, q0 has 3, q1 has 6
    p0, q0, q1 = projected[:, :3], projected[:, 3:6], projected[:, 6:]
    p1 = p0 * depthwise(q0, 0, 3) * 0.5
    p2 = pointwise(p1, gnconv.gates[0]) * depthwise(q1, 3, 9) * 0.5
    torch.testing.assert_close(gnconv(x), pointwise(p2, gnconv.proj_out))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_gnconv_has_the_order_of_its_name(order):
    """Without biases y(t x) = t^(n + 1) y(x): n gates over one value."""
    gnconv = randomize(GnConv(32, order)).double()
    for module in gnconv.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    x = torch.randn(1, 32, 5, 5, dtype=torch.double)
    torch.testing.assert_close(gnconv(2 * x), 2 ** (order + 1) * gnconv(x))


def test_selective_kernel_is_a_convex_mixture():
    x = torch.randn(2, 8, 6, 6)
    module = randomize(SelectiveKernel(8, stride=2))
    maps = [branch(x) for branch in module.branches]
    hidden = F.gelu(module.fc1((maps[0] + maps[1] + maps[2]).mean((2, 3))))
    expected = torch.zeros_like(maps[0])
    for c in range(8):
        rows = [c, 8 + c, 16 + c]
        weights = (hidden @ module.fc2.weight[rows].T + module.fc2.bias[rows]).softmax(1)  # (B, 3)
        for k in range(3):
            expected[:, c] += weights[:, k, None, None] * maps[k][:, c]
    torch.testing.assert_close(module(x), expected)


# ---- CoAtNet -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_relative_position_bias_against_a_loop(size, fused):
    C, heads = 6, 2
    x = torch.randn(2, C, size, size, dtype=torch.double)
    attention = randomize(Attention(C, C, heads, size)).double()
    attention.fused_attn = fused
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(tokens).chunk(3, dim=-1)
    table = attention.position_bias.view(2 * size - 1, 2 * size - 1, heads)
    pixels = list(itertools.product(range(size), range(size)))
    out = torch.empty_like(tokens)
    for b, h in itertools.product(range(2), range(heads)):
        part = slice(h * C // heads, (h + 1) * C // heads)
        for i, (yi, xi) in enumerate(pixels):
            offsets = [(yj - yi + size - 1, xj - xi + size - 1) for yj, xj in pixels]
            bias = torch.stack([table[dy, dx, h] for dy, dx in offsets])
            scores = k[b, :, part] @ q[b, i, part] / math.sqrt(C // heads) + bias
            out[b, i, part] = scores.softmax(0) @ v[b, :, part]
    expected = attention.proj(out).transpose(1, 2).view(2, C, size, size)
    torch.testing.assert_close(attention(x), expected)
    assert relative_index(size).unique().numel() == (2 * size - 1) ** 2


def test_attention_without_position_bias_ignores_the_order():
    x, shuffled = torch.randn(1, 4, 3, 3), torch.randperm(9)
    attention = randomize(Attention(4, 8, 2, 0))
    moved = attention(x.flatten(2)[:, :, shuffled].view(1, 4, 3, 3)).flatten(2)
    torch.testing.assert_close(moved, attention(x).flatten(2)[:, :, shuffled])


def test_attention_names_the_size_it_was_built_for():
    with pytest.raises(ValueError, match="8x8 pixels with a position bias for 4x4: set image_size"):
        Attention(4, 4, 1, 4)(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_in_half_precision(fused):
    torch.manual_seed(0)
    attention = randomize(Attention(8, 8, 2, 4))
    attention.fused_attn = fused
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), attention(x), rtol=0.1, atol=0.1)


def load_renamed(module, state, names):
    """Loads timm's values. names: timm's prefixes -> ours; our 1x1 convolutions may be linear."""
    own = module.state_dict()
    for key, value in state.items():
        prefix = max((p for p in names if key.startswith(p)), key=len)
        name = names[prefix] + key.removeprefix(prefix)
        own[name] = value.view_as(own[name])
    module.load_state_dict(own)


@pytest.mark.parametrize("in_channels, stride", [(8, 1), (4, 2)])
def test_mbconv_equals_timms(in_channels, stride):
    from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock

    x = torch.randn(2, in_channels, 6, 6)
    config = MaxxVitConvCfg(expand_output=False, pool_type="max2", attn_act_layer="gelu")
    timms = randomize(MbConvBlock(in_channels, 8, stride, cfg=config))
    block = MBConv(in_channels, 8, stride).eval()
    names = {
        "pre_norm": "norm", "conv1_1x1": "expand.0", "norm1": "expand.1", "norm2": "depthwise.1",
        "conv2_kxk": "depthwise.0", "se": "gate", "conv3_1x1": "project",
        "shortcut.expand": "shortcut.1",
    }  # fmt: skip
    load_renamed(block, timms.state_dict(), names)
    for norm in (block.norm, block.expand[1], block.depthwise[1]):
        norm.eps = timms.pre_norm.eps
    torch.testing.assert_close(block(x), timms(x))


@pytest.mark.parametrize("in_channels, stride", [(64, 1), (32, 2)])
def test_transformer_equals_timms(in_channels, stride):
    from timm.layers import RelPosBias
    from timm.models.maxxvit import MaxxVitTransformerCfg, TransformerBlock2d

    x, width, heads = torch.randn(2, in_channels, 3 * stride, 3 * stride), 64, 2
    config = MaxxVitTransformerCfg(pool_type="max2")
    position_bias = functools.partial(RelPosBias, window_size=(3, 3))
    timms = randomize(TransformerBlock2d(in_channels, width, stride, position_bias, config), 0.3)
    state = timms.state_dict()
    # timm has q, k and v of one head side by side; ours has all q, all k, all v.
    for key in ("attn.qkv.weight", "attn.qkv.bias"):
        state[key] = state[key].unflatten(0, (heads, 3, 32)).transpose(0, 1).flatten(0, 2)
    # timm's offset is that of i from j; ours is that of j from i.
    table = "attn.rel_pos.relative_position_bias_table"
    state[table] = state[table].flip(0)
    block = Transformer(in_channels, width, stride, heads=heads, size=3)
    names = {
        "norm1": "norm1", "norm1.norm": "norm1", "norm2": "norm2", "attn": "attention",
        table: "attention.position_bias", "mlp": "mlp", "shortcut.expand": "shortcut.1",
    }  # fmt: skip
    load_renamed(block, state, names)
    torch.testing.assert_close(block(x), timms(x), rtol=1e-4, atol=1e-4)
