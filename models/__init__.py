"""The models: one table, one line for each.

    model = create_model("resnet18", num_classes=10)                 # float (B, 3, H, W) -> logits (B, num_classes)
    model = create_model("resnet20", 100, shortcut="pad")            # options of the constructor
    model = create_model("timm/resnet18", 10, pretrained=True)       # any of timm's

Adding a model is one file and one line. The tests run over MODELS, so a new line is tested without being asked.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common.errors import UserError
from models import options as model_options
from models.adapted import convnext_tiny, cspresnet50, ghostnet_100, mlp_mixer, resnest50d
from models.cifar_resnet import CifarResNet, convnext_resnet, eca_resnet, ghost_resnet
from models.coatnet import coatnet, coatnet_cifar
from models.hornet import HorNet
from models.mscan import MSCAN
from models.published import create_timm, has_fixed_size, network, sized_network, vision_transformer
from models.resnet import BasicBlock, Bottleneck, ResNet
from models.vit import ViT


@dataclass(frozen=True)
class Model:
    """A line of the table: constructor(num_classes, **fixed, **options), its parameter count, source and recipe.

    parameters: at `classes` classes and pictures of `image_size` px; recipe: training arguments that differ from the scripts'
    defaults, each with its reason where the recipe is made; original: parameters of the layout made for ImageNet, which
    stem=imagenet gives (with image_size=224 where the model has that option), or 0 where the model has none.
    """

    constructor: Callable
    fixed: dict
    parameters: int
    source: str
    classes: int = 10
    image_size: int = 32
    recipe: dict = field(default_factory=dict)
    also: str = ""  # another name that people use
    original: int = 0
    bf16_on_cpu: bool = True  # False where `benchmark.py models` finds it slower there than fp32

    @property
    def large(self):
        """Whether it takes gigabytes: left out of what runs over the whole table with real weights."""
        return self.parameters > 200_000_000

    @property
    def options(self):
        """{name: default} of what --model-arg may set."""
        signature = inspect.signature(self.constructor).parameters.values()
        taken = {"pretrained", *self.fixed}
        return {
            p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY and p.name not in taken
        }


# ---- recipes: made once, shared by models --------------------------------------------------------------------------

# Residual networks of under two million parameters underfit: mixing and smoothing would cost them more than they bring.
# Rate and batch of arXiv 1512.03385 §4.2, decay and 200 epochs of 1605.07146, cosine of 1608.03983.
# fmt: off
SMALL = dict(
    optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128, schedule="cosine", epochs=200,
    augment="crop,flip", mixup=0.0, cutmix=0.0, label_smoothing=0.0,
)
# 4 to 26 million parameters memorise 50,000 pictures: the same with mixing of every second picture (arXiv 1905.04899) and
# smoothing (1812.01187 §5.2). Warmup fits the run's length by default: five of 200 epochs (1706.02677 §2.2).
LARGE = SMALL | dict(mixup=0.2, cutmix=1.0, mix_prob=0.5, label_smoothing=0.1)
# AdamW, decay 0.05, warmup, RandAugment, MixUp 0.8, CutMix 1, smoothing and drop-path (each constructor's default) are what
# ConvNeXt and HorNet are published with (arXiv 2201.03545, 2207.14284); cutting gradients at 1 is CoAtNet's (2106.04803).
# The rate is their 4e-3 for batches of 4096, brought to 128 by the square root (2205.10287) and rounded up.
MODERN = dict(
    optimizer="adamw", lr=1e-3, weight_decay=0.05, batch_size=128, schedule="cosine", epochs=200,
    augment="crop,flip,rand_augment", mixup=0.8, cutmix=1.0, mix_prob=1.0, label_smoothing=0.1, clip_grad=1.0,
)
# Under four million parameters: half of the pictures stay whole.
MODERN_SMALL = MODERN | dict(mix_prob=0.5)

# What the authors of shifted patches and local attention train small transformers with for 100 epochs, CutMix, MixUp and
# erasing included (arXiv 2112.13492 §4.1); RandAugment in place of their AutoAugment, and half of their warmup.
SCRATCH = dict(
    optimizer="adamw", lr=1e-3, weight_decay=0.05, batch_size=128, schedule="cosine", epochs=100,
    augment="crop,flip,rand_augment", mixup=0.8, cutmix=1.0, mix_prob=1.0, random_erasing=0.25, label_smoothing=0.1,
    clip_grad=1.0,
)
# From published weights: few epochs, a small rate that falls by a quarter from layer to layer towards the input (arXiv
# 2106.08254 §A), mixing of every second picture; timm's weights at 224 px, which most of them were made for.
TRANSFER = dict(
    optimizer="adamw", lr=3e-4, weight_decay=0.05, layer_decay=0.75, batch_size=128, schedule="cosine", epochs=10,
    augment="crop,flip", mixup=0.2, cutmix=1.0, mix_prob=0.5, label_smoothing=0.1, clip_grad=1.0,
)
# The largest models are fine-tuned at a tenth of that rate, which falls slower with depth (arXiv 2211.07636, 2303.11331), each
# at the size of picture that its weights were made for. Not tuned here.
LARGEST = TRANSFER | dict(lr=3e-5, layer_decay=0.85, epochs=5)
# A linear classifier on features that stay as they are: nothing to regularise.
PROBE = TRANSFER | dict(
    lr=3e-3, weight_decay=0.0, layer_decay=1.0, epochs=30, augment="none", mixup=0.0, cutmix=0.0, label_smoothing=0.0
)

# ---- the table -----------------------------------------------------------------------------------------------------

HE = "arXiv 1512.03385"
ECA = "arXiv 1910.03151"
ECA_RULE = f"{ECA}; the rule gives 3 at these widths: ecanet20_fixed_k3"
GHOST = "arXiv 1911.11907"
CONVNEXT = "arXiv 2201.03545"
MIXER = "arXiv 2105.01601, timm"
COATNET = "arXiv 2106.04803"
VIT = "arXiv 2010.11929"
SMALL_DATA = "arXiv 2112.13492"

BASIC = dict(block=BasicBlock)
PLAIN = dict(block=BasicBlock, shortcut=False)
DEEP = dict(block=Bottleneck)
MULTI_SCALE = dict(block=BasicBlock, layers=(2, 2, 2, 2), multi_scale=True)
MSCAN_TINY = dict(widths=(32, 64, 128), depths=(2, 2, 3), mlp_ratio=4)
MIXER_TINY = dict(width=192, token_mlp=32, stem="cifar")
MIXER_B = dict(width=768, token_mlp=384)
COATNET_0 = dict(widths=(56, 96, 192, 384, 640), depths=(2, 3, 5, 2), large_kernel=False)
COATNET_0_LK = COATNET_0 | dict(large_kernel=True)
COATNET_C = dict(widths=(64, 96, 192, 384, 512), depths=(2, 2, 6, 10, 2), large_stem=False)
COATNET_C_LS = COATNET_C | dict(large_stem=True)
VIT_TINY = dict(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
VIT_BASE = dict(name="vit_base_patch8_224.augreg_in21k_ft_in1k", patch_size=8)
TINYVIT = dict(name="tiny_vit_5m_224.dist_in22k_ft_in1k")
NFNET = dict(name="dm_nfnet_f0.dm_in1k")
EVA02_LARGE = dict(name="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k")
EVA_GIANT = dict(name="eva_giant_patch14_336.clip_ft_in1k")
CONVNEXT_XXL = dict(name="convnext_xxlarge.clip_laion2b_soup_ft_in1k")
HORNET_TINY = dict(width=64, depths=(2, 3, 18, 2), orders=(2, 3, 4, 5))

MODELS = {
    "resnet18": Model(ResNet, BASIC | dict(layers=(2, 2, 2, 2)), 11_173_962, HE),
    "resnet34": Model(ResNet, BASIC | dict(layers=(3, 4, 6, 3)), 21_282_122, HE),
    "resnet50": Model(ResNet, DEEP | dict(layers=(3, 4, 6, 3)), 23_520_842, HE),
    "resnet101": Model(ResNet, DEEP | dict(layers=(3, 4, 23, 3)), 42_512_970, HE),
    "resnet152": Model(ResNet, DEEP | dict(layers=(3, 8, 36, 3)), 58_156_618, HE),
    "plain18": Model(ResNet, PLAIN | dict(layers=(2, 2, 2, 2)), 11_000_138, HE),
    "plain34": Model(ResNet, PLAIN | dict(layers=(3, 4, 6, 3)), 21_108_298, HE),
    "resnet18_ms": Model(ResNet, MULTI_SCALE, 13_355_722, "arXiv 1409.4842", also="ResNet18WithMS"),
    "resnet20": Model(CifarResNet, dict(n=3), 278_324, HE, classes=100, recipe=SMALL),
    "resnet32": Model(CifarResNet, dict(n=5), 472_756, HE, classes=100, recipe=SMALL),
    "resnet44": Model(CifarResNet, dict(n=7), 667_188, HE, classes=100, recipe=SMALL),
    "resnet56": Model(CifarResNet, dict(n=9), 861_620, HE, classes=100, recipe=SMALL),
    "resnet110": Model(CifarResNet, dict(n=18), 1_736_564, HE, classes=100, recipe=SMALL),
    "eca_resnet20": Model(eca_resnet, dict(n=3, kernel=3), 278_351, ECA, classes=100, recipe=SMALL),
    "eca_resnet32": Model(eca_resnet, dict(n=5, kernel=5), 472_831, ECA, classes=100, recipe=SMALL),
    "ecanet20_fixed_k3": Model(eca_resnet, dict(n=3, kernel=3), 278_351, ECA, classes=100, recipe=SMALL),
    "ecanet20_fixed_k5": Model(eca_resnet, dict(n=3, kernel=5), 278_369, ECA, classes=100, recipe=SMALL),
    "ecanet20_fixed_k7": Model(eca_resnet, dict(n=3, kernel=7), 278_387, ECA, classes=100, recipe=SMALL),
    "ecanet20_fixed_k9": Model(eca_resnet, dict(n=3, kernel=9), 278_405, ECA, classes=100, recipe=SMALL),
    "ecanet20_adaptive": Model(eca_resnet, dict(n=3, kernel=0), 278_351, ECA_RULE, classes=100, recipe=SMALL),
    "resnet20_no_eca": Model(CifarResNet, dict(n=3), 278_324, f"{ECA}; the control: resnet20", classes=100, recipe=SMALL),
    "ghost_resnet20": Model(ghost_resnet, dict(n=3), 147_716, GHOST, classes=100, recipe=SMALL),
    "ghost_resnet32": Model(ghost_resnet, dict(n=5), 247_396, GHOST, classes=100, recipe=SMALL),
    "improved_resnet20_convnext": Model(
        convnext_resnet, dict(n=3), 174_868, CONVNEXT, classes=100, recipe=SMALL, bf16_on_cpu=False
    ),
    "ghostnet_100": Model(
        ghostnet_100, {}, 4_029_608, f"{GHOST}, timm", classes=100, recipe=LARGE, original=4_029_608, bf16_on_cpu=False
    ),
    "convnext_tiny": Model(convnext_tiny, {}, 27_895_012, f"{CONVNEXT}, timm", classes=100, recipe=MODERN, original=27_897_028),
    "segnext_mscan_tiny": Model(
        MSCAN, MSCAN_TINY, 854_820, "arXiv 2209.08575", classes=100, recipe=MODERN_SMALL, bf16_on_cpu=False
    ),
    "mlp_mixer_tiny": Model(mlp_mixer, MIXER_TINY, 3_639_076, MIXER, classes=100, recipe=MODERN_SMALL),
    "mlp_mixer_b16": Model(mlp_mixer, MIXER_B, 57_417_316, MIXER, classes=100, recipe=MODERN, original=59_188_372),
    "cspresnet50": Model(cspresnet50, {}, 20_685_988, "arXiv 1911.11929, timm", classes=100, recipe=LARGE, original=20_693_668),
    "resnest50d": Model(resnest50d, {}, 25_639_140, "arXiv 2004.08955, timm", classes=100, recipe=LARGE, original=25_639_140),
    "coatnet_0": Model(coatnet, COATNET_0, 20_041_448, COATNET, classes=100, recipe=MODERN),
    "coatnet_0_custom_enhanced": Model(
        coatnet, COATNET_0_LK, 21_008_900, "arXiv 2303.09030", classes=100, recipe=MODERN, bf16_on_cpu=False
    ),
    "coatnet_cifar_opt": Model(coatnet_cifar, COATNET_C, 27_027_270, COATNET, classes=100, recipe=MODERN, original=27_008_486),
    "coatnet_cifar_opt_large_stem": Model(
        coatnet_cifar, COATNET_C_LS, 27_029_318, COATNET, classes=100, recipe=MODERN, original=27_010_534
    ),
    "hornet_tiny": Model(HorNet, HORNET_TINY, 21_946_468, "arXiv 2207.14284", classes=100, recipe=MODERN, original=21_947_812),
    "vit_custom": Model(ViT, {}, 2_697_610, VIT, recipe=SCRATCH),
    "vit_small_data": Model(ViT, dict(spt=True, lsa=True), 2_735_062, SMALL_DATA, recipe=SCRATCH, also="SL-ViT"),
    "vit_tiny": Model(vision_transformer, VIT_TINY, 5_526_346, f"{VIT}, timm", image_size=224, recipe=SCRATCH),
    "tinyvit_5m": Model(network, TINYVIT, 5_074_974, "arXiv 2207.10666, timm", image_size=224, recipe=SCRATCH),
    "nfnet_f0": Model(network, NFNET, 68_723_584, "arXiv 2102.06171, timm", classes=100, recipe=MODERN),
    "vit_base_patch8": Model(vision_transformer, VIT_BASE, 85_294_948, f"{VIT}, timm", classes=100, recipe=SCRATCH),
    "eva02_large": Model(
        sized_network, EVA02_LARGE, 305_080_232, "arXiv 2303.11331, timm", 1000, 448, LARGEST | dict(image_size=448)
    ),
    "eva_giant": Model(
        sized_network, EVA_GIANT, 1_013_005_672, "arXiv 2211.07636, timm", 1000, 336, LARGEST | dict(image_size=336)
    ),
    "convnext_xxlarge": Model(
        network, CONVNEXT_XXL, 846_471_016, f"{CONVNEXT}, timm", 1000, 256, LARGEST | dict(image_size=256)
    ),
}
# fmt: on

TIMM_NAME = re.compile(r"timm/[A-Za-z0-9_.-]{1,128}")


def canonical(name):
    """The table's name for `name`, which may differ in case, '-' and '_'; timm/<name> stays. Raises UserError."""
    if not isinstance(name, str):
        raise UserError(
            f"the name of a model must be a string, not {type(name).__name__}", status=2
        )
    if name.startswith("timm/"):
        if not TIMM_NAME.fullmatch(
            name
        ):  # timm takes addresses and paths for names: hf-hub:…, local-dir:…
            raise UserError(
                f"{name[:80]!r} is not timm/<name>, with a name that timm.list_models() has",
                status=2,
            )
        return name

    def bare(text):
        return text.lower().replace("-", "").replace("_", "")

    known = {bare(key): key for key in MODELS} | {
        bare(model.also): key for key, model in MODELS.items() if model.also
    }
    if bare(name) not in known:
        near = difflib.get_close_matches(bare(name), known, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(known[key] for key in near)}?"
            if near
            else f"the names are {', '.join(MODELS)}"
        )
        more = "--list-models shows all, timm/<name> takes any of timm's"
        raise UserError(f"unknown model {name[:80]!r}: {hint} ({more})", status=2)
    return known[bare(name)]


def prefers_fp32(name, device):
    """Whether --amp auto should leave a model in fp32 on a device: depthwise convolutions are slow in bf16 on CPUs."""
    return device.type == "cpu" and name in MODELS and not MODELS[name].bf16_on_cpu


def recipe(name, transfer=False, frozen=False):
    """The training arguments that go with a model (see Model.recipe), or with starting from weights; a copy."""
    if transfer:
        chosen = dict(PROBE if frozen else TRANSFER)
        if name in MODELS and MODELS[name].large:
            return (
                chosen | {"image_size": MODELS[name].image_size}
                if frozen
                else dict(MODELS[name].recipe)
            )
        if is_published(name):
            return chosen | {"image_size": 224}
        if not hasattr(MODELS[name].constructor, "group_matcher"):
            chosen["layer_decay"] = 1.0
        return chosen
    return dict(MODELS[name].recipe) if name in MODELS else {}


def parse_options(pairs, name, image_size=None, drop_path=None):
    """["key=value", …] as options of the model, checked (see check_options), values read as Python literals.

    A model that has to know the size of its images (an option image_size) gets image_size, unless a pair has another one;
    in the same way drop_path, where it is not None.
    """
    name = canonical(name)
    if drop_path is not None and name in MODELS and "drop_path" not in MODELS[name].options:
        raise UserError(f"{name} takes no --drop-path", status=2)
    if drop_path is not None:
        pairs = [f"{'drop_path' if name in MODELS else 'drop_path_rate'}={drop_path}", *pairs]
    options = model_options.read_pairs(pairs)
    check_options(name, options)
    if name in MODELS:
        if image_size and "image_size" in MODELS[name].options:
            options.setdefault("image_size", image_size)
    elif image_size and has_fixed_size(name.removeprefix("timm/")):
        options.setdefault("img_size", image_size)
    return options


def check_options(name, options):
    """Raises UserError unless a model may be built with these options, wherever they come from.

    Plain values that describe an architecture (see models/options.py); of a model of the table, its own options only.
    """
    model_options.check(name, options)
    if name not in MODELS:
        return
    valid = MODELS[name].options
    for key, value in options.items():
        if key not in valid:
            names = ", ".join(f"{k}={v}" for k, v in valid.items()) or "none"
            raise UserError(
                f"{name} has no option {key!r}; its options (and defaults) are: {names}", status=2
            )
        wanted = type(valid[key])
        if valid[key] is not None and not isinstance(
            value, (int, float) if wanted is float else wanted
        ):
            raise UserError(f"{name}: {key} takes {wanted.__name__}, not {value!r}", status=2)


def from_card(card):
    """The model that a checkpoint's card describes, with fresh weights. Raises UserError for one that was tampered with."""
    name, num_classes, options = (card[key] for key in ("model", "num_classes", "options"))
    if type(num_classes) is not int or not 0 < num_classes <= 1_000_000:
        raise UserError(
            f"num_classes must be a whole number from 1 to 1,000,000, not {str(num_classes)[:80]!r}"
        )
    check_options(
        canonical(name), options
    )  # before create_model takes "pretrained" for its own argument
    return create_model(name, num_classes, **options)


def create_model(name, num_classes=10, *, pretrained=False, **options):
    """Builds a model of MODELS, or timm/<name>, with fresh weights or (timm's, pretrained=True) weights from the hub.

    Raises UserError for an unknown name or option, and where weights were asked for and can't be downloaded.
    """
    name = canonical(name)
    check_options(name, options)
    if pretrained:
        require_published(name)
        options = options | {"pretrained": True}
    if name.startswith("timm/"):
        return create_timm(name.removeprefix("timm/"), num_classes, **options)
    model = MODELS[name]
    try:
        return model.constructor(num_classes, **model.fixed, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}", status=2) from error


def is_published(name):
    """Whether somebody publishes weights of a model of the table: timm does, of some."""
    return name.startswith("timm/") or bool(MODELS[name].fixed.get("name"))


def require_published(name):
    """Raises UserError for a model that has no published weights."""
    if not is_published(name):
        names = [key for key in MODELS if is_published(key)]
        raise UserError(
            f"{name} has no published weights: take {', '.join(names)} or timm/<name>, or a file with --weights",
            status=2,
        )


def checkpoint_gradients(model, name):
    """Makes the model compute its blocks again in the backward pass. Raises UserError where it can't."""
    try:
        model.set_grad_checkpointing(True)
    except (
        AttributeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # some of timm's have it to say that they don't
        raise UserError(
            f"{name} has no gradient checkpointing: leave --grad-checkpointing out", status=2
        ) from error


def choose_attention(model, device, dtype):
    """The model; timm's attention not fused in bf16 on a CPU, where the fused kernel is the slow one (see layers.attend)."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        for module in model.modules():
            if getattr(module, "fused_attn", False):
                module.fused_attn = False
    return model


def classifiers(model):
    """The modules that compute the logits, one as a rule: timm says which they are, ours is called fc."""
    head = (
        model.get_classifier() if hasattr(model, "get_classifier") else getattr(model, "fc", None)
    )
    heads = head if isinstance(head, (tuple, list)) else [head]  # several: of a distilled network
    return [module for module in heads if isinstance(module, torch.nn.Module)]


def describe(name, num_classes, image_size, options=None):
    """(parameters, multiply-accumulates of one image) of a model, from a copy on the meta device: no memory, no work.

    Raises UserError when the model can't take images of image_size pixels, or makes no logits of them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        # Parameters that require gradients would have some models (CaiT, PiT) build a graph that the counter can't follow.
        model = create_model(name, num_classes, **(options or {})).eval().requires_grad_(False)
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                logits = model(torch.empty(1, 3, image_size, image_size))
        except Exception as error:  # whatever the first layer that doesn't fit says
            reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
            raise UserError(
                f"{name} can't take images of {image_size} px ({reason})", status=2
            ) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise UserError(
            f"{name} is not a classifier: its output for an image is {shape}, not (1, {num_classes})",
            status=2,
        )
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def normalization(model):
    """(mean, std) that published weights were trained with: timm's models carry them."""
    config = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def print_table():
    """Prints the table: name, parameters and GMACs at the source's classes and size, classes, size, recipe, source."""
    print(
        f"{'name':<30}{'parameters':>14}{'GMACs':>9}{'classes':>9}{'px':>5}  {'recipe':<21}source"
    )
    for name, model in MODELS.items():
        options = parse_options([], name, model.image_size)
        parameters, macs = describe(name, model.classes, model.image_size, options)
        print(f"{name:<30}{parameters:>14,}{macs / 1e9:>9.3f}{model.classes:>9}{model.image_size:>5}  "
              f"{_recipe_in_words(model):<21}{model.source}")  # fmt: skip


def _recipe_in_words(model):
    recipe = {"optimizer": "sgd", "lr": 0.1, "cutmix": 1.0} | model.recipe
    return f"{recipe['optimizer']} {recipe['lr']:g}" + (", mixing" if recipe["cutmix"] else "")
