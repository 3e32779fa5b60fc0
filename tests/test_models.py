"""Properties of every model in MODELS, and its options."""

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from helpers.networks import count, train
from helpers.paths import ROOT

from common.errors import UserError
from datasets.pipeline import AUGMENTATIONS
from models import MODELS, create_model, describe, is_published, parse_options, recipe
from models import family as family_of
from models.airbench import Airbench
from models.layers import DropPath
from models.published import fixed_size_network, smallest
from training.optimizers import OPTIMIZERS, param_groups
from training.progressive import parse_stages
from training.schedules import SCHEDULES

pytestmark = pytest.mark.usefixtures("one_thread")
# One small model of each family: tests that take long run on the others only with -m slow.
QUICK = """resnet20 eca_resnet32 ghost_resnet20 improved_resnet20_convnext
segnext_mscan_tiny mlp_mixer_tiny vit_custom vit_tiny airbench94"""


def cases(names=MODELS, condition=lambda entry: True, quick=None):
    """Parametrizes a test with the models that meet a condition; all but `quick` are slow."""
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


@cases(
    condition=lambda entry: "drop_path" in entry.options and not entry.large,
    quick="improved_resnet20_convnext segnext_mscan_tiny vit_custom",
)
def test_drop_path_drops_while_training(name):
    images = torch.randn(4, 3, fitting_size(name), fitting_size(name))
    with torch.no_grad():
        for rate in (0.0, 0.5):
            model = build(name, drop_path=rate).train()
            for p in model.parameters():
                if not p.any():  # of a layer that starts without effect
                    nn.init.normal_(p, std=0.1)
            assert torch.equal(model(images), model(images)) == (rate == 0)


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
def test_a_ghost_ratio_outside_the_range_is_refused(ratio):
    with pytest.raises(
        UserError, match=f"ghost_resnet20: ratio must be 2 to 16, .*, not {ratio}$"
    ) as refused:
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


@pytest.mark.parametrize("size", [0, -32, 30])
@pytest.mark.parametrize("name", ["coatnet_0", "vit_custom"])
def test_an_image_size_without_whole_patches_is_refused(name, size):
    with pytest.raises(UserError, match=f"{name}: image_size {size}.*positive multiple"):
        create_model(name, image_size=size)


def test_a_timm_network_takes_an_image_that_is_not_square():
    name = "timm/vit_tiny_patch16_224"
    with torch.device("meta"):
        logits = create_model(name, img_size=[32, 64])(torch.empty(1, 3, 32, 64))
    assert logits.shape == (1, 10)
    with pytest.raises(UserError, match="not a multiple of the patch, 16 px"):
        create_model(name, img_size=[32, 60])


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
    wanted = dict(resnet56="resnet", plain34="plain", ghostnet_100="ghostnet", coatnet_0="coatnet")
    wanted |= dict.fromkeys(("vit_custom", "vit_tiny"), "vision_transformer")
    wanted |= dict(eva_giant="eva")
    assert wanted.items() <= families.items()
    assert family_of("timm/resnet18.a1_in1k") == "resnet"
    assert family_of("timm/nothing") == family_of("nothing") == ""
