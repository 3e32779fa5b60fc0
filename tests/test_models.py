"""Properties of every model of the table, and the formulas of the blocks written out on small tensors."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError
from datasets.pipeline import TRANSFORMS
from models import MODELS, create_model, describe, is_published, parse_options, prefers_fp32, recipe
from models.cifar_resnet import ECABlock, GhostModule, PadShortcut
from models.coatnet import Attention, MBConv, SelectiveKernel, Transformer, relative_index
from models.hornet import GnConv
from models.layers import ECA, DropPath, LayerNorm2d, drop_path_rates, eca_kernel
from models.mscan import MSCA
from models.published import sized_network, smallest
from training.optimizers import OPTIMIZERS, param_groups
from training.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Batches are small; on a busy machine several threads would wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


every = pytest.mark.parametrize("name", MODELS)
ours = pytest.mark.parametrize("name", [name for name in MODELS if not is_published(name)])
trainable = pytest.mark.parametrize(
    "name", [name for name, model in MODELS.items() if not model.large]
)
originals = pytest.mark.parametrize(
    "name", [name for name, model in MODELS.items() if model.original]
)


def having(option):
    return pytest.mark.parametrize(
        "name", [name for name, model in MODELS.items() if option in model.options]
    )


def side(name, wanted=32):
    """The size of pictures next to the wanted one that a model can take: 14 px a patch leave none over."""
    return wanted // 14 * 14 if MODELS[name].constructor is sized_network else wanted


def build(name, image_size=32, **options):
    """A model for pictures of 32 px, whatever size it is listed with."""
    assert not MODELS[name].large or torch.empty(0).is_meta, "gigabytes"
    return create_model(
        name, MODELS[name].classes, **parse_options([], name, side(name, image_size)) | options
    )


def count(model):
    return sum(p.numel() for p in model.parameters())


def without_drop_path(name):
    return dict(drop_path=0.0) if "drop_path" in MODELS[name].options else {}


def last_map(model, image_size):
    """Pixels (or tokens) on a side of the last output that still has pixels: the one that is pooled.

    Works on (B, C, H, W), (B, H, W, C) and (B, N, C): the width stands next to the last or last, and is less than C.
    """
    sides = []

    def note(module, args, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            sides.append(min(output.shape[2:]))
        elif isinstance(output, torch.Tensor) and output.ndim == 3 and output.shape[1] > 1:
            sides.append(math.isqrt(output.shape[1]))

    for module in model.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    return sides[-1]


def randomize(module):
    """Draws all parameters and running statistics, so that no term of a formula hides behind a zero or a one."""
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-1, 1)
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.uniform_(-0.5, 0.5)
    return module.eval()


def copy_weights(source, target):
    """Copies all values in their order: for modules of the same structure with other names."""
    theirs, ours = list(source.state_dict().values()), target.state_dict()
    assert [v.shape for v in theirs] == [v.shape for v in ours.values()]
    target.load_state_dict(dict(zip(ours, theirs)))


# ---- the table -----------------------------------------------------------------------------------------------------


@every
def test_parameter_count_and_work(name):
    size = MODELS[name].image_size
    parameters, macs = describe(name, MODELS[name].classes, size, parse_options([], name, size))
    assert parameters == MODELS[name].parameters
    assert macs > parameters / 10


@originals
def test_original_layout(name):
    model, size = MODELS[name], 224
    with torch.device("meta"):
        network = build(name, size, stem="imagenet").eval()
        assert count(network) == model.original
        assert network(torch.empty(1, 3, size, size)).shape == (1, model.classes)
        assert last_map(build(name, stem="imagenet"), 32) < 4  # why there is an adapted one


@every
def test_a_stem_is_an_option_where_there_is_an_original(name):
    assert ("stem" in MODELS[name].options) == (MODELS[name].original > 0)


@ours
def test_last_feature_map_is_at_least_4x4(name):
    with torch.device("meta"):
        assert last_map(build(name), 32) >= 4


@trainable
def test_each_model_trains(name):
    """A fresh loss near ln(classes); four pictures learnt by heart in a few steps; gradients in every parameter.

    Near: the loss averaged over all labels that the pictures could have is at most 0.2 above ln(classes), its least value;
    classifiers start with small weights, not with none. Learnt: a loss of half of ln(4), which takes telling the four
    apart, in at most 20 steps and in training mode.
    """
    classes = MODELS[name].classes
    torch.manual_seed(0)
    model = build(name, **without_drop_path(name)).train()
    images, labels = (
        torch.randn(4, 3, 32, 32) + 2 * torch.randn(4, 3, 1, 1),
        torch.tensor([0, 2, 5, 7]),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-3 if MODELS[name].parameters > 5e6 else 1e-2, fused=True
    )
    losses, fresh = [], None
    while len(losses) < 3 or (losses[-1] > math.log(4) / 2 and len(losses) < 20):
        logits = model(images)
        assert logits.shape == (4, classes)
        loss = F.cross_entropy(logits, labels)
        fresh = fresh or -logits.log_softmax(1).mean().item()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 <= fresh - math.log(classes) + 1e-5 < 0.2
    assert losses[-1] < math.log(4) / 2, losses
    # After some steps, because a branch that starts at zero (a norm's scale, the Mixers' classifier) lets none through.
    dead = [
        key
        for key, p in model.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    assert not dead


@every
def test_weight_decay_groups_cover_the_model(name):
    with torch.device("meta"):
        model = build(name)
    decayed = {id(p) for p in param_groups(model, 0.1)[0]["params"]}
    exempt = ("position_bias", "pos_embed", "cls_token", "temperature", "attention_biases")
    for key, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and not key.endswith(exempt)), key


@every
def test_recipe_is_made_of_training_arguments(name):
    recipe = dict(MODELS[name].recipe)
    numbers = (
        "lr",
        "weight_decay",
        "mixup",
        "cutmix",
        "mix_prob",
        "label_smoothing",
        "warmup_epochs",
        "clip_grad",
        "random_erasing",
        "layer_decay",
    )
    assert recipe.pop("optimizer", "sgd") in OPTIMIZERS
    assert recipe.pop("schedule", "cosine") in SCHEDULES
    assert set(recipe.pop("augment", "crop").split(",")) <= set(TRANSFORMS)
    for key, value in recipe.items():
        assert isinstance(value, float if key in numbers else int), key
        assert key in (*numbers, "epochs", "batch_size", "cutout", "image_size"), key


@every
def test_options_have_defaults_that_tell_their_type(name):
    for key, default in MODELS[name].options.items():
        assert isinstance(default, (bool, int, float, str)), key
        assert parse_options([f"{key}={default}"], name) == {key: default}


def test_importing_the_table_imports_no_model_library():
    code = "import sys, models; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- options -------------------------------------------------------------------------------------------------------


@every
def test_wrong_values_of_options_are_refused(name):
    wrong = dict(
        stem="bagel",
        shortcut="long",
        eca_position="bn3",
        drop_path=1.0,
        image_size=30,
        patch_size=7,
        width=50,
        depth=0,
        heads=7,
        mlp_ratio=-1.0,
        positions="random",
        pool="max",
    )
    for key in wrong.keys() & MODELS[name].options:
        with (
            pytest.raises(UserError, match=f"{key}|not a multiple of the patch"),
            torch.device("meta"),
        ):
            create_model(name, 10, **(parse_options([], name, side(name)) | {key: wrong[key]}))


@having("drop_path")
def test_drop_path_grows_with_depth(name):
    with torch.device("meta"):
        model = build(name, drop_path=0.3)
    # timm's ConvNeXt has an Identity for a rate of zero, and calls the rate drop_prob.
    rates = [
        m.rate if isinstance(m, DropPath) else m.drop_prob
        for m in model.modules()
        if type(m).__name__ == "DropPath"
    ]
    assert rates == sorted(rates)
    rates = sorted({0.0, *rates})  # a block may have several
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])


@pytest.mark.parametrize(
    "name, parameters",
    dict(
        resnet20=275_572, resnet32=470_004, resnet44=664_436, resnet56=858_868, resnet110=1_733_812
    ).items(),
)
def test_pad_shortcuts_have_no_parameters(name, parameters):
    with torch.device("meta"):
        assert count(build(name, shortcut="pad")) == parameters


@pytest.mark.parametrize("size", [24, 64])
@having("image_size")
def test_other_sizes_are_an_option_where_positions_are_learnt(name, size):
    size = side(name, size)
    with torch.device("meta"):
        assert build(name, image_size=size)(torch.empty(2, 3, size, size)).shape == (
            2,
            MODELS[name].classes,
        )
    with pytest.raises(UserError, match=f"{size} px"):
        describe(name, 10, size)


# ---- shared pieces -------------------------------------------------------------------------------------------------


def test_drop_path_drops_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    y = DropPath(0.25)(x)
    assert ((y == 0) | (y == 1 / 0.75)).all()
    assert (y == y[:, :1, :1, :1]).all()  # an image at a time
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(x), x) and torch.equal(DropPath(0.0)(x), x)
    assert drop_path_rates(0.2, 1) == [0]


def test_layer_norm_is_over_channels():
    x = torch.randn(2, 5, 3, 4)
    norm = randomize(LayerNorm2d(5))
    centred = x - x.mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    wanted = wanted * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), wanted)


# ---- efficient channel attention -------------------------------------------------------------------------------------


def test_eca_kernel_rule():
    from timm.layers import EcaModule

    wanted = {16: 3, 32: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {channels: eca_kernel(channels) for channels in wanted} == wanted
    assert all(
        eca_kernel(channels) == EcaModule(channels).conv.kernel_size[0] for channels in wanted
    )


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_eca_is_a_sum_over_neighbouring_channels(kernel):
    from timm.layers import EcaModule

    B, C = 2, 7
    x = torch.randn(B, C, 3, 4)
    eca = randomize(ECA(kernel))
    weight, means = eca.conv.weight.flatten(), x.mean((2, 3))
    wanted = torch.empty_like(x)
    for b, c in itertools.product(range(B), range(C)):
        total = 0.0
        for i in range(kernel):
            neighbour = c + i - kernel // 2
            if 0 <= neighbour < C:
                total += weight[i] * means[b, neighbour]
        wanted[b, c] = x[b, c] * torch.sigmoid(total)
    torch.testing.assert_close(eca(x), wanted)
    if kernel > 1:  # timm's takes no kernel of one
        theirs = EcaModule(kernel_size=kernel)
        theirs.conv.weight.data.copy_(eca.conv.weight)
        torch.testing.assert_close(eca(x), theirs(x))


def test_eca_takes_odd_kernels():
    with pytest.raises(ValueError, match="odd"):
        ECA(4)


@pytest.mark.parametrize("position", ["bn1", "bn2", "add"])
def test_eca_positions(position):
    x = torch.randn(2, 4, 6, 6)
    block = randomize(ECABlock(4, 8, 2, "project", kernel=3, position=position))
    eca = next(m for m in block.modules() if isinstance(m, ECA))
    none = nn.Identity()
    first, second, third = (eca if position == p else none for p in ("bn1", "bn2", "add"))
    wanted = third(block.shortcut(x) + second(block.conv2(first(block.conv1(x)).relu()))).relu()
    torch.testing.assert_close(block(x), wanted)


def test_adaptive_eca_is_the_fixed_kernel_of_three():
    adaptive, fixed = build("ecanet20_adaptive"), build("ecanet20_fixed_k3")
    fixed.load_state_dict(adaptive.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(adaptive.eval()(x), fixed.eval()(x))


def test_pad_shortcut_subsamples_and_adds_zeros():
    x = torch.randn(2, 4, 6, 6)
    y = PadShortcut(4, 9, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any() and y.shape[1] == 9


# ---- ghost modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8])
@pytest.mark.parametrize("relu", [True, False])
def test_ghost_module_equals_timms(width, relu):
    from timm.models.ghostnet import GhostModule as Theirs

    x = torch.randn(2, 3, 6, 6)
    ours = randomize(GhostModule(3, width, kernel=3, stride=2, relu=relu))
    theirs = Theirs(
        3, width, kernel_size=3, stride=2, act_layer=nn.ReLU if relu else nn.Identity
    ).eval()
    copy_weights(ours, theirs)
    assert ours(x).shape == (2, width, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_ghost_channels_come_from_the_intrinsic_ones():
    x = torch.randn(1, 3, 6, 6)
    module = randomize(GhostModule(3, 7, relu=False))
    intrinsic = module.primary(x)
    weight, norm = module.cheap[0].weight, module.cheap[1]
    for c in range(3):  # four intrinsic channels, and ghosts of the first three
        ghost = F.conv2d(intrinsic[:, c : c + 1], weight[c : c + 1], padding=1)[:, 0]
        ghost = (ghost - norm.running_mean[c]) / (
            norm.running_var[c] + norm.eps
        ).sqrt() * norm.weight[c] + norm.bias[c]
        torch.testing.assert_close(module(x)[:, 4 + c], ghost)


# ---- multi-scale convolutional attention -------------------------------------------------------------------------------


def test_msca_is_a_gate_from_a_sum_of_scales():
    C = 3
    x = torch.randn(2, C, 9, 9)
    msca = randomize(MSCA(C))

    def strip(x, convolution):
        height, width = convolution.kernel_size
        assert 1 in (height, width) or height == width == 5
        return F.conv2d(
            x, convolution.weight, convolution.bias, padding=(height // 2, width // 2), groups=C
        )

    local = strip(x, msca.local)
    scales = local.clone()  # scale 0 is the identity
    for k, (horizontal, vertical) in zip((7, 11, 21), msca.strips):
        assert horizontal.kernel_size == (1, k) and vertical.kernel_size == (k, 1)
        scales += strip(strip(local, horizontal), vertical)
    gate = (
        torch.einsum("oc,bchw->bohw", msca.mix.weight[:, :, 0, 0], scales)
        + msca.mix.bias[:, None, None]
    )
    torch.testing.assert_close(msca(x), gate * x)


# ---- recursive gated convolution ---------------------------------------------------------------------------------------


def test_gnconv_of_order_two_by_hand():
    C = 6
    x = torch.randn(2, C, 8, 8)
    gnconv = randomize(GnConv(C, order=2, scale=0.5))

    def linear(x, convolution):
        return (
            torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], x)
            + convolution.bias[:, None, None]
        )

    def depthwise(x, first, last):
        weight, bias = gnconv.depthwise.weight[first:last], gnconv.depthwise.bias[first:last]
        return F.conv2d(x, weight, bias, padding=3, groups=last - first)

    projected = linear(x, gnconv.proj_in)  # 12 channels: p0 has 3, q0 has 3, q1 has 6
    p0, q0, q1 = projected[:, :3], projected[:, 3:6], projected[:, 6:]
    p1 = p0 * depthwise(q0, 0, 3) * 0.5
    p2 = linear(p1, gnconv.gates[0]) * depthwise(q1, 3, 9) * 0.5
    torch.testing.assert_close(gnconv(x), linear(p2, gnconv.proj_out))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_gnconv_has_the_order_of_its_name(order):
    """Without biases y(t x) = t^(n + 1) y(x): n gates over one value."""
    gnconv = randomize(GnConv(32, order)).double()
    for module in gnconv.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    x = torch.randn(1, 32, 5, 5, dtype=torch.double)
    torch.testing.assert_close(gnconv(2 * x), 2 ** (order + 1) * gnconv(x))


# ---- CoAtNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_relative_position_bias_against_a_loop(size):
    C, heads = 6, 2
    x = torch.randn(2, C, size, size)
    attention = randomize(Attention(C, C, heads, size)).double()
    tokens = x.double().flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(tokens).chunk(3, dim=-1)
    table = attention.position_bias.view(2 * size - 1, 2 * size - 1, heads)
    pixels = list(itertools.product(range(size), range(size)))
    out = torch.empty_like(tokens)
    for b, h in itertools.product(range(2), range(heads)):
        part = slice(h * C // heads, (h + 1) * C // heads)
        for i, (yi, xi) in enumerate(pixels):
            scores = [
                (q[b, i, part] @ k[b, j, part]) / math.sqrt(C // heads)
                + table[yj - yi + size - 1, xj - xi + size - 1, h]
                for j, (yj, xj) in enumerate(pixels)
            ]
            out[b, i, part] = torch.stack(scores).softmax(0) @ v[b, :, part]
    torch.testing.assert_close(
        attention(x.double()), attention.proj(out).transpose(1, 2).view(2, C, size, size)
    )
    assert relative_index(size).unique().numel() == (2 * size - 1) ** 2


def test_attention_without_position_bias_ignores_the_order_of_pixels():
    x, shuffled = torch.randn(1, 4, 3, 3), torch.randperm(9)
    attention = randomize(Attention(4, 8, 2, 0))
    moved = attention(x.flatten(2)[:, :, shuffled].view(1, 4, 3, 3)).flatten(2)
    torch.testing.assert_close(moved, attention(x).flatten(2)[:, :, shuffled])


def test_attention_names_the_size_it_was_built_for():
    with pytest.raises(ValueError, match="8x8 pixels with a position bias for 4x4: set image_size"):
        Attention(4, 4, 1, 4)(torch.randn(1, 4, 8, 8))


def load_renamed(module, state, names):
    """Loads timm's values into ours: names maps their prefixes to ours; 1x1 convolutions may be linear layers here."""
    ours = module.state_dict()
    for key, value in state.items():
        theirs = next(
            prefix for prefix in sorted(names, key=len, reverse=True) if key.startswith(prefix)
        )
        name = names[theirs] + key.removeprefix(theirs)
        ours[name] = value.view_as(ours[name])
    module.load_state_dict(ours)


@pytest.mark.parametrize("in_channels, stride", [(8, 1), (4, 2)])
def test_mbconv_equals_timms(in_channels, stride):
    from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock

    x = torch.randn(2, in_channels, 6, 6)
    config = MaxxVitConvCfg(expand_output=False, pool_type="max2", attn_act_layer="gelu")
    theirs = randomize(MbConvBlock(in_channels, 8, stride, cfg=config))
    ours = MBConv(in_channels, 8, stride).eval()
    names = {
        "pre_norm": "norm",
        "conv1_1x1": "expand.0",
        "norm1": "expand.1",
        "conv2_kxk": "depthwise.0",
        "norm2": "depthwise.1",
        "se": "gate",
        "conv3_1x1": "project",
        "shortcut.expand": "shortcut.1",
    }
    load_renamed(ours, theirs.state_dict(), names)
    for norm in (ours.norm, ours.expand[1], ours.depthwise[1]):
        norm.eps = theirs.pre_norm.eps
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("in_channels, stride", [(64, 1), (32, 2)])
def test_transformer_equals_timms(in_channels, stride):
    from timm.layers import RelPosBias
    from timm.models.maxxvit import MaxxVitTransformerCfg, TransformerBlock2d

    x, width, heads = torch.randn(2, in_channels, 3 * stride, 3 * stride), 64, 2
    config = MaxxVitTransformerCfg(pool_type="max2")
    theirs = TransformerBlock2d(
        in_channels, width, stride, lambda **kw: RelPosBias(window_size=(3, 3), **kw), config
    )
    for p in theirs.eval().parameters():
        nn.init.normal_(p, std=0.2)
    state = theirs.state_dict()
    for key in (
        "attn.qkv.weight",
        "attn.qkv.bias",
    ):  # theirs: a head's q, k and v side by side; ours: all q, all k, all v
        state[key] = state[key].unflatten(0, (heads, 3, 32)).transpose(0, 1).flatten(0, 2)
    table = "attn.rel_pos.relative_position_bias_table"
    state[table] = state[table].flip(0)  # theirs: offset of i from j; ours: of j from i
    ours = Transformer(in_channels, width, heads, 3, stride)
    names = {
        "norm1": "norm1",
        "norm1.norm": "norm1",
        "norm2": "norm2",
        "attn": "attention",
        table: "attention.position_bias",
        "mlp": "mlp",
        "shortcut.expand": "shortcut.1",
    }
    load_renamed(ours, state, names)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_attention_in_half_precision():
    attention = randomize(Attention(8, 8, 2, 4))
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), attention(x), rtol=0.1, atol=0.1)


def test_selective_kernel_is_a_convex_mixture():
    x = torch.randn(2, 8, 6, 6)
    module = randomize(SelectiveKernel(8, stride=2))
    maps = [branch(x) for branch in module.branches]
    hidden = F.gelu(module.fc1((maps[0] + maps[1] + maps[2]).mean((2, 3))))
    wanted = torch.zeros_like(maps[0])
    for c in range(8):
        rows = [c, 8 + c, 16 + c]
        weights = (hidden @ module.fc2.weight[rows].T + module.fc2.bias[rows]).softmax(1)  # (B, 3)
        for k in range(3):
            wanted[:, c] += weights[:, k, None, None] * maps[k][:, c]
    torch.testing.assert_close(module(x), wanted)


# ---- timm's networks -----------------------------------------------------------------------------------------------------

TIMM = dict(ghostnet_100=64, convnext_tiny=64, cspresnet50=64, resnest50d=64, mixer_b16_224=224)


@pytest.mark.parametrize("name, size", TIMM.items())
def test_original_layouts_equal_timms(name, size):
    import timm

    options = dict(image_size=size) if size == 224 else {}
    ours = create_model(
        {"mixer_b16_224": "mlp_mixer_b16"}.get(name, name), 10, stem="imagenet", **options
    ).eval()
    theirs = timm.create_model(name, num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["ghostnet_100", "convnext_tiny", "cspresnet50", "resnest50d"])
def test_adapted_networks_differ_in_the_stem_alone(name):
    with torch.device("meta"):
        adapted, original = (build(name, stem=stem).state_dict() for stem in ("cifar", "imagenet"))
    assert list(adapted) == list(original)
    changed = [key for key in adapted if adapted[key].shape != original[key].shape]
    assert all(key.startswith("stem") for key in changed) and len(changed) <= 1


def test_auto_precision_spares_a_cpu_what_is_slower_there():
    slow = {name for name, model in MODELS.items() if not model.bf16_on_cpu}
    assert slow == {
        "ghostnet_100",
        "improved_resnet20_convnext",
        "coatnet_0_custom_enhanced",
        "segnext_mscan_tiny",
    }
    for name in MODELS:
        assert prefers_fp32(name, torch.device("cpu")) == (name in slow)
        assert not prefers_fp32(name, torch.device("cuda"))
    assert not prefers_fp32("timm/resnet18", torch.device("cpu"))


# ---- the largest ---------------------------------------------------------------------------------------------------------

LARGEST = dict(eva02_large=361.7, eva_giant=620.3, convnext_xxlarge=198.0)


def test_the_largest_are_the_published_ones():
    assert set(LARGEST) == {name for name, model in MODELS.items() if model.large}
    for name, gmacs in LARGEST.items():
        model = MODELS[name]
        parameters, macs = describe(
            name, 1000, model.image_size, parse_options([], name, model.image_size)
        )
        assert (parameters, macs / 1e9) == (model.parameters, pytest.approx(gmacs, rel=1e-3))
        for transfer, frozen in ((False, False), (True, False), (True, True)):
            assert recipe(name, transfer, frozen)["image_size"] == model.image_size
        assert (
            recipe(name, True)["layer_decay"] == 0.85
            and recipe(name, True, True)["layer_decay"] == 1.0
        )


@pytest.mark.parametrize("name", [*LARGEST, "vit_tiny", "tinyvit_5m"])
def test_the_smallest_of_a_family_has_its_layers_and_learns(name):
    path = f"timm/{MODELS[name].fixed['name']}"
    options, size = smallest(path.removeprefix("timm/"))
    torch.manual_seed(0)
    small = create_model(path, 10, **(parse_options([], path, size) | options))
    with torch.device("meta"):
        whole = build(name, 128)
    assert {type(m) for m in small.modules()} == {type(m) for m in whole.modules()} and count(
        small
    ) < 4e6
    images, labels = torch.randn(4, 3, size, size), torch.tensor([0, 2, 5, 7])
    optimizer, losses = torch.optim.AdamW(small.parameters(), 1e-3), []
    for _ in range(6):
        loss = F.cross_entropy(small(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
