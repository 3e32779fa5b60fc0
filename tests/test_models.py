"""Properties of every model in MODELS, and the blocks' formulas written out on small tensors."""

import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.networks import count, randomize, train

from common.errors import UserError
from datasets.pipeline import AUGMENTATIONS
from models import MODELS, create_model, describe, is_published, parse_options, prefers_fp32, recipe
from models import family as family_of
from models.airbench import Airbench
from models.cifar_resnet import ECA_POSITIONS, ECABlock, GhostModule, PadShortcut
from models.coatnet import Attention, MBConv, SelectiveKernel, Transformer, relative_index
from models.hornet import GnConv
from models.layers import ECA, Conv3x3, DropPath, LayerNorm2d, drop_path_rates, eca_kernel
from models.mscan import MSCA
from models.published import fixed_size_network, smallest
from training.optimizers import OPTIMIZERS, param_groups
from training.progressive import parse_stages
from training.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
# One small model of each family: tests that take long run on the others only with -m slow.
QUICK = """resnet20 eca_resnet32 ghost_resnet20 improved_resnet20_convnext
segnext_mscan_tiny mlp_mixer_tiny vit_custom vit_tiny airbench94"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(names=MODELS, condition=lambda entry: True, quick=None):
    """Parametrises a test with the models that meet a condition; all but `quick` are slow."""
    names = [name for name in names if condition(MODELS[name])]
    slow = [quick is not None and name not in quick.split() for name in names]
    marks = [[pytest.mark.slow] if is_slow else [] for is_slow in slow]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=mark) for name, mark in zip(names, marks)]
    )


every = cases()


def fitting_size(name, size=32):
    """The nearest smaller image size that the model's patches divide."""
    return size // 14 * 14 if MODELS[name].constructor is fixed_size_network else size


def build(name, image_size=32, **options):
    assert not MODELS[name].large or torch.empty(0).is_meta, "it would take gigabytes"
    options = parse_options([], name, fitting_size(name, image_size)) | options
    return create_model(name, MODELS[name].classes, **options)


@functools.cache
def on_meta(name):
    with torch.device("meta"):
        return build(name, MODELS[name].image_size).eval()


def last_map_size(model, image_size):
    """Pixels (or tokens) on a side of the last output that still has pixels, before the pooling.

    Works on (B, C, H, W), (B, H, W, C) and (B, N, C).
    """
    sides = []

    def note(module, args, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            sides.append(min(output.shape[2:]))
        elif isinstance(output, torch.Tensor) and output.ndim == 3 and output.shape[1] > 1:
            sides.append(math.isqrt(output.shape[1]))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    for handle in handles:
        handle.remove()
    return sides[-1]


# ---- the table -----------------------------------------------------------------------------------


@every
def test_parameter_count_is_as_listed(name):
    assert count(on_meta(name)) == MODELS[name].parameters


@cases(quick=QUICK)
def test_description_counts_parameters_and_work(name):
    size = MODELS[name].image_size
    parameters, macs = describe(name, MODELS[name].classes, size, parse_options([], name, size))
    assert parameters == MODELS[name].parameters
    assert macs > parameters / 10


@cases(condition=lambda entry: entry.original, quick="ghostnet_100 coatnet_cifar_opt")
def test_original_layout_is_kept_as_an_option(name):
    entry, size = MODELS[name], 224
    with torch.device("meta"):
        network = build(name, size, stem="imagenet").eval()
        assert count(network) == entry.original
        assert network(torch.empty(1, 3, size, size)).shape == (1, entry.classes)
        # This is why there is an adapted layout.
        assert last_map_size(build(name, stem="imagenet"), 32) < 4


@every
def test_stem_is_an_option_where_there_is_an_original(name):
    assert ("stem" in MODELS[name].options) == (MODELS[name].original > 0)


# Airbench's last map has 3x3 pixels, as published.
@cases(condition=lambda e: e.timm_name is None and e.constructor is not Airbench, quick=QUICK)
def test_last_feature_map_is_at_least_4x4(name):
    assert last_map_size(on_meta(name), 32) >= 4


@cases(condition=lambda entry: not entry.large, quick=QUICK)
def test_model_overfits_one_batch_from_a_uniform_guess(name):
    """The fresh loss is near ln(classes), four images are learned, all parameters have gradients.

    Near: the loss averaged over all labels is at most 0.2 above ln(classes), its least value.
    Learned: a loss of half of ln(4), which takes telling four images apart, within 20 steps; within
    60 in 30 and more layers without shortcuts, which learn more slowly (arXiv 1512.03385).
    """
    classes = MODELS[name].classes
    torch.manual_seed(0)
    options = {"drop_path": 0.0} if "drop_path" in MODELS[name].options else {}
    model = build(name, **options).train()
    images = torch.randn(4, 3, 32, 32) + 2 * torch.randn(4, 3, 1, 1)
    fresh = {}

    def note_first(module, args, logits):
        fresh.setdefault("loss", -logits.log_softmax(1).mean().item())
        assert logits.shape == (4, classes)

    model.register_forward_hook(note_first)
    lr = 1e-3 if MODELS[name].parameters > 5e6 else 1e-2
    if MODELS[name].constructor is Airbench:
        lr = 0.1  # its logits are divided by the width of the features
    steps = 20
    if name in ("plain32", "plain44", "plain56"):
        steps, lr = 60, 2e-3
    losses = train(model, images, torch.tensor([0, 2, 5, 7]), steps, lr, target=math.log(4) / 2)
    assert 0 <= fresh["loss"] - math.log(classes) + 1e-5 < 0.2
    assert losses[-1] < math.log(4) / 2, losses
    # After some steps, because a branch that starts at zero passes no gradient on.
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.any() and p.grad.isfinite().all() for p in trained)


@every
def test_weight_decay_spares_vectors_and_positions(name):
    model = on_meta(name)
    decayed = {id(p) for p in param_groups(model, 0.1)[0]["params"]}
    exempt = ("position_bias", "pos_embed", "cls_token", "temperature", "attention_biases")
    for key, p in model.named_parameters():
        wanted = p.requires_grad and p.ndim > 1 and not key.endswith(exempt)
        assert (id(p) in decayed) == wanted, key


@every
def test_recipe_consists_of_training_arguments(name):
    recipe = dict(MODELS[name].recipe)
    numbers = {"lr", "weight_decay", "mixup", "cutmix", "mix_prob", "label_smoothing", "clip_grad"}
    numbers |= {"warmup_epochs", "random_erasing", "layer_decay", "momentum", "ema_decay"}
    numbers |= {"final_lr", "jitter"}
    assert recipe.pop("optimizer", "sgd") in OPTIMIZERS
    assert recipe.pop("accumulate", None) is None  # auto
    assert recipe.pop("schedule", "cosine") in SCHEDULES
    parse_stages(recipe.pop("progressive", "none"))
    assert set(recipe.pop("augment", "crop").split(",")) <= set(AUGMENTATIONS)
    counts = {"epochs", "batch_size", "cutout", "image_size", "crop_pixels", "lookahead"}
    for key, value in recipe.items():
        if (key, value) != ("warmup_epochs", None):  # auto
            assert isinstance(value, float if key in numbers else int), key
        assert key in numbers | counts, key


def test_importing_models_imports_no_model_library():
    code = "import sys, models; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- options -------------------------------------------------------------------------------------


@every
def test_options_have_typed_defaults_that_can_be_given(name):
    for key, default in MODELS[name].options.items():
        assert isinstance(default, (bool, int, float, str)), key
        assert parse_options([f"{key}={default}"], name) == {key: default}


WRONG = dict(
    stem="bagel", shortcut="long", eca_position="bn3", drop_path=1.0, image_size=30, patch_size=7,
    width=50, depth=0, heads=7, mlp_ratio=-1.0, positions="random", pool="max",
    ratio=17,
)  # fmt: skip


@every
def test_wrong_values_of_options_are_refused(name):
    for key in WRONG.keys() & MODELS[name].options:
        options = parse_options([], name, fitting_size(name)) | {key: WRONG[key]}
        message = f"{key}|not a multiple of the patch"
        with pytest.raises(UserError, match=message), torch.device("meta"):
            create_model(name, 10, **options)


@cases(condition=lambda entry: "drop_path" in entry.options)
def test_drop_path_grows_with_depth(name):
    with torch.device("meta"):
        model = build(name, drop_path=0.3)
    layers = [module for module in model.modules() if type(module).__name__ == "DropPath"]
    rates = [m.rate if isinstance(m, DropPath) else m.drop_prob for m in layers]
    assert rates == sorted(rates)
    # A block may have several; timm's ConvNeXt has none for a rate of zero.
    rates = sorted({0.0, *rates})
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])


PADDED = dict(
    resnet20=275_572, resnet32=470_004, resnet44=664_436, resnet56=858_868, resnet110=1_733_812
)


@pytest.mark.parametrize(("name", "parameters"), PADDED.items())
def test_pad_shortcuts_have_no_parameters(name, parameters):
    with torch.device("meta"):
        assert count(build(name, shortcut="pad")) == parameters


def test_features_and_head_of_a_small_residual_network_make_its_logits():
    model, x = create_model("resnet20", 10).eval(), torch.randn(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, 64) and torch.equal(model.get_classifier()(features), model(x))


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_plain_networks_are_residual_ones_without_shortcuts(depth):
    plain, residual = f"plain{depth}", f"resnet{depth}"
    assert MODELS[plain].parameters == PADDED[residual]
    assert recipe(plain) == recipe(residual)
    model = build(plain).eval()
    for block in model.blocks:  # He et al. 2015: variance 2 / (outputs of a pixel)
        assert block.conv2[0].weight.std().item() == pytest.approx(
            (2 / (9 * block.conv2[0].out_channels)) ** 0.5, rel=0.1
        )
        nn.init.zeros_(block.conv2[1].weight)
    assert not model.blocks(torch.randn(2, 16, 32, 32)).any()  # no way around the convolutions


GHOSTS = {("ghost_resnet20", 3): 107_636, ("ghost_resnet20", 4): 82_412,
          ("ghost_resnet32", 3): 178_196, ("ghost_resnet32", 4): 134_716}  # fmt: skip


@pytest.mark.parametrize(("name", "ratio"), GHOSTS)
def test_a_ghost_ratio_saves_parameters(name, ratio):
    with torch.device("meta"):
        model = build(name, ratio=ratio)
        assert count(model) == GHOSTS[name, ratio]
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("ratio", [0, 1, 17])
def test_a_ghost_ratio_that_leaves_no_channels_is_refused(ratio):
    with pytest.raises(UserError, match=f"ghost_resnet20: ratio {ratio} leaves") as refused:
        create_model("ghost_resnet20", ratio=ratio)
    assert refused.value.status == 2


@cases(
    condition=lambda e: "image_size" in e.options and e.constructor is not Airbench,
    quick="mlp_mixer_tiny coatnet_0 vit_custom vit_tiny",
)
def test_image_size_is_an_option_where_positions_are_learned(name):
    size = fitting_size(name, 48)
    with torch.device("meta"):
        logits = build(name, image_size=size)(torch.empty(2, 3, size, size))
    assert logits.shape == (2, MODELS[name].classes)
    with pytest.raises(UserError, match=f"{size} px"):
        describe(name, 10, size)


def test_auto_precision_is_fp32_where_bf16_is_slower():
    slow = {name for name, entry in MODELS.items() if not entry.bf16_on_cpu}
    assert slow >= {"ghostnet_100", "segnext_mscan_tiny"}
    for name in (*MODELS, "timm/resnet18"):
        assert prefers_fp32(name, torch.device("cpu")) == (name in slow)
        assert not prefers_fp32(name, torch.device("cuda"))


# ---- shared layers -------------------------------------------------------------------------------


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
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


# ---- efficient channel attention -----------------------------------------------------------------


def test_eca_kernel_is_timms():
    from timm.layers import EcaModule

    expected = {16: 3, 32: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    for channels, kernel in expected.items():
        assert eca_kernel(channels) == kernel == EcaModule(channels).conv.kernel_size[0]


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_eca_is_a_sum_over_neighbouring_channels(kernel):
    B, C = 2, 7
    x = torch.randn(B, C, 3, 4)
    eca = randomize(ECA(kernel))
    weight, means = eca.conv.weight.flatten(), x.mean((2, 3))
    expected = torch.empty_like(x)
    for b, c in itertools.product(range(B), range(C)):
        neighbours = [(i, c + i - kernel // 2) for i in range(kernel)]
        total = sum(weight[i] * means[b, j] for i, j in neighbours if 0 <= j < C)
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
    adaptive, fixed = build("ecanet20_adaptive"), build("ecanet20_fixed_k3")
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


# ---- timm's networks -----------------------------------------------------------------------------

ADAPTED = ["ghostnet_100", "convnext_tiny", "cspresnet50", "resnest50d"]


@cases([*ADAPTED, "mlp_mixer_b16"], quick="ghostnet_100 cspresnet50")
def test_original_layouts_equal_timms(name):
    import timm

    size = 224 if name == "mlp_mixer_b16" else 64
    timm_name = "mixer_b16_224" if name == "mlp_mixer_b16" else name
    model = create_model(name, 10, stem="imagenet", **parse_options([], name, size)).eval()
    timms = timm.create_model(timm_name, num_classes=10).eval()
    timms.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), timms(x))


@cases(ADAPTED)
def test_adapted_networks_differ_in_the_stem_alone(name):
    with torch.device("meta"):
        original = build(name, stem="imagenet").state_dict()
    adapted = on_meta(name).state_dict()
    assert list(adapted) == list(original)
    changed = [key for key in adapted if adapted[key].shape != original[key].shape]
    assert all(key.startswith("stem") for key in changed) and len(changed) <= 1


# ---- the largest ---------------------------------------------------------------------------------

LARGEST = dict(eva02_large=361.7, eva_giant=620.3, convnext_xxlarge=198.0)  # published GMACs


@pytest.mark.slow
def test_largest_models_are_the_published_ones():
    assert set(LARGEST) == {name for name, entry in MODELS.items() if entry.large}
    assert all(is_published(name) for name in LARGEST)
    for name, gmacs in LARGEST.items():
        size = MODELS[name].image_size
        _, macs = describe(name, 1000, size, parse_options([], name, size))
        assert macs / 1e9 == pytest.approx(gmacs, rel=1e-3)
        for transfer, frozen in ((False, False), (True, False), (True, True)):
            assert recipe(name, transfer, frozen)["image_size"] == size
        assert recipe(name, transfer=True)["layer_decay"] == 0.85
        assert recipe(name, transfer=True, frozen=True)["layer_decay"] == 1.0


@cases([*LARGEST, "vit_tiny", "tinyvit_5m"], quick="eva02_large")
def test_smallest_of_a_family_has_its_layers_and_learns(name):
    options, size = smallest(MODELS[name].timm_name)
    torch.manual_seed(0)
    path = f"timm/{MODELS[name].timm_name}"
    small = create_model(path, 10, **(parse_options([], path, size) | options))
    with torch.device("meta"):
        full = build(name, 128)
    assert {type(m) for m in small.modules()} == {type(m) for m in full.modules()}
    assert count(small) < 4e6
    labels = torch.tensor([0, 2, 5, 7])
    losses = train(small, torch.randn(4, 3, size, size), labels, steps=6, lr=1e-3)
    assert losses[-1] < losses[0] - 0.2


def test_each_model_has_a_family():
    families = {name: family_of(name) for name in MODELS}
    assert all(families.values())
    wanted = {
        "resnet56": "resnet",
        "plain34": "plain",
        "ghostnet_100": "ghostnet",
        "coatnet_0": "coatnet",
    }
    wanted |= {
        "vit_custom": "vision_transformer",
        "vit_tiny": "vision_transformer",
        "eva_giant": "eva",
    }
    assert wanted.items() <= families.items()
    assert family_of("timm/resnet18.a1_in1k") == "resnet"
    assert family_of("timm/nothing") == family_of("nothing") == ""
