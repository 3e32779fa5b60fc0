"""The table of models: MODELS[name] -> Entry. A new model is one file and one entry here.

The tests run over the table, so that they cover a new entry.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from models.adapted import convnext_tiny, cspresnet50, ghostnet_100, mlp_mixer, resnest50d
from models.airbench import Airbench
from models.cifar_resnet import (
    CifarResNet,
    convnext_resnet,
    eca_resnet,
    ghost_resnet,
    plain_network,
)
from models.coatnet import coatnet, coatnet_cifar
from models.hornet import HorNet
from models.mscan import MSCAN
from models.published import any_size_network, fixed_size_network, vision_transformer
from models.recipes import (
    AIRBENCH94,
    AIRBENCH95,
    AIRBENCH96,
    AIRBENCH_C100,
    DEFAULT,
    LARGE,
    LARGEST,
    MODERN,
    MODERN_SMALL,
    SCRATCH,
    SMALL,
)
from models.resnet import BasicBlock, Bottleneck, ResNet
from models.vit import ViT


@dataclass(frozen=True)
class Entry:
    """A model: constructor(num_classes, **fixed, **options), and what is known about it."""

    constructor: Callable
    fixed: dict  # options of the constructor that make this model
    recipe: dict  # training arguments that differ from the script's defaults, see models/recipes.py
    parameters: int  # with this number of classes, at this image size
    classes: int
    source: str
    image_size: int = 32  # px
    original: int = 0  # parameters with stem=imagenet, where the model has this option
    bf16_on_cpu: bool = True  # False where `benchmark.py models` finds bf16 slower there than fp32
    alias: str = ""

    @property
    def large(self):
        """Whether the model takes gigabytes: tests of all models build it without memory."""
        return self.parameters > 200_000_000

    @property
    def options(self):
        """{name: default} of what --model-arg may set."""
        excluded = {"pretrained", *self.fixed}
        parameters = inspect.signature(self.constructor).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        return {p.name: p.default for p in keywords if p.name not in excluded}

    @property
    def timm_name(self):
        """timm's name for the model and its published weights, or None."""
        return self.fixed.get("name")


JORDAN = "arXiv 2404.00498"
HE = "arXiv 1512.03385"
NO_ECA = "arXiv 1910.03151; the control: resnet20"
ECA = "arXiv 1910.03151"
ECA_RULE = "arXiv 1910.03151; the rule gives 3 at these widths: ecanet20_fixed_k3"
GHOST = "arXiv 1911.11907"
GHOST_TIMM = "arXiv 1911.11907, timm"
CONVNEXT = "arXiv 2201.03545"
CONVNEXT_TIMM = "arXiv 2201.03545, timm"
CSP = "arXiv 1911.11929, timm"
RESNEST = "arXiv 2004.08955, timm"
MIXER = "arXiv 2105.01601, timm"
COATNET = "arXiv 2106.04803"
VIT = "arXiv 2010.11929"
VIT_TIMM = "arXiv 2010.11929, timm"

# The families of models whose constructor's module doesn't say it; see registry.family.
FAMILIES = {
    CifarResNet: "resnet",
    eca_resnet: "eca",
    ghost_resnet: "ghostnet",
    ghostnet_100: "ghostnet",
    convnext_resnet: "convnext",
    convnext_tiny: "convnext",
    cspresnet50: "cspnet",
    resnest50d: "resnest",
    mlp_mixer: "mlp_mixer",
    ViT: "vision_transformer",
}

# fmt: off
# Fixed options.
BASIC18 = dict(block=BasicBlock, layers=(2, 2, 2, 2))
BASIC34 = dict(block=BasicBlock, layers=(3, 4, 6, 3))
PLAIN18 = BASIC18 | dict(shortcut=False)
PLAIN34 = BASIC34 | dict(shortcut=False)
MULTI_SCALE18 = BASIC18 | dict(multi_scale=True)
DEEP50 = dict(block=Bottleneck, layers=(3, 4, 6, 3))
DEEP101 = dict(block=Bottleneck, layers=(3, 4, 23, 3))
DEEP152 = dict(block=Bottleneck, layers=(3, 8, 36, 3))
MSCAN_TINY = dict(widths=(32, 64, 128), depths=(2, 2, 3), mlp_ratio=4)
MIXER_TINY = dict(width=192, token_mlp=32, stem="cifar")
MIXER_B = dict(width=768, token_mlp=384)
COATNET_0 = dict(widths=(56, 96, 192, 384, 640), depths=(2, 3, 5, 2), large_kernel=False)
COATNET_0_LK = COATNET_0 | dict(large_kernel=True)
COATNET_C = dict(widths=(64, 96, 192, 384, 512), depths=(2, 2, 6, 10, 2), large_stem=False)
COATNET_C_LS = COATNET_C | dict(large_stem=True)
HORNET_TINY = dict(width=64, depths=(2, 3, 18, 2), orders=(2, 3, 4, 5))
# The bias of the whitening layer is trained for the published share of the run: three epochs of 8,
# 15, 40 and 10.
AIR94 = dict(
    widths=(64, 256, 256), residual=False, whitening_share=3 / 8, logit_scale=None, bias_scale=64
)
AIR95 = dict(
    widths=(128, 384, 384), residual=False, whitening_share=3 / 15, logit_scale=1 / 9, bias_scale=64
)
AIR96 = dict(
    widths=(128, 384, 512), residual=True, whitening_share=3 / 40, logit_scale=1 / 9, bias_scale=64
)
AIR_C100 = dict(
    widths=(64, 256, 768), residual=True, whitening_share=3 / 10, logit_scale=1.25 / 9,
    bias_scale=32,
)
VIT_TINY = dict(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
VIT_BASE = dict(name="vit_base_patch8_224.augreg_in21k_ft_in1k", patch_size=8)
TINYVIT = dict(name="tiny_vit_5m_224.dist_in22k_ft_in1k")
NFNET = dict(name="dm_nfnet_f0.dm_in1k")
EVA02_LARGE = dict(name="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k")
EVA_GIANT = dict(name="eva_giant_patch14_336.clip_ft_in1k")
CONVNEXT_XXL = dict(name="convnext_xxlarge.clip_laion2b_soup_ft_in1k")

# Recipes that depend on the model: the image size that the weights were made for.
LARGEST_448, LARGEST_336, LARGEST_256 = (LARGEST | dict(image_size=px) for px in (448, 336, 256))

MODELS = {
    # name: constructor, fixed options, recipe, parameters, classes, source, image size
    "airbench94": Entry(Airbench, AIR94, AIRBENCH94, 1_972_792, 10, JORDAN),
    "airbench95": Entry(Airbench, AIR95, AIRBENCH95, 4_606_520, 10, JORDAN),
    "airbench96": Entry(Airbench, AIR96, AIRBENCH96, 9_918_776, 10, JORDAN),
    "airbench_c100": Entry(Airbench, AIR_C100, AIRBENCH_C100, 13_884_600, 100, JORDAN),
    "resnet18": Entry(ResNet, BASIC18, DEFAULT, 11_173_962, 10, HE),
    "resnet34": Entry(ResNet, BASIC34, DEFAULT, 21_282_122, 10, HE),
    "resnet50": Entry(ResNet, DEEP50, DEFAULT, 23_520_842, 10, HE),
    "resnet101": Entry(ResNet, DEEP101, DEFAULT, 42_512_970, 10, HE),
    "resnet152": Entry(ResNet, DEEP152, DEFAULT, 58_156_618, 10, HE),
    "plain18": Entry(ResNet, PLAIN18, DEFAULT, 11_000_138, 10, HE),
    "plain34": Entry(ResNet, PLAIN34, DEFAULT, 21_108_298, 10, HE),
    "resnet18_ms": Entry(ResNet, MULTI_SCALE18, DEFAULT, 13_355_722, 10, "arXiv 1409.4842",
                         alias="ResNet18WithMS"),
    "resnet20": Entry(CifarResNet, dict(n=3), SMALL, 278_324, 100, HE),
    "resnet32": Entry(CifarResNet, dict(n=5), SMALL, 472_756, 100, HE),
    "resnet44": Entry(CifarResNet, dict(n=7), SMALL, 667_188, 100, HE),
    "resnet56": Entry(CifarResNet, dict(n=9), SMALL, 861_620, 100, HE),
    "resnet110": Entry(CifarResNet, dict(n=18), SMALL, 1_736_564, 100, HE),
    "plain20": Entry(plain_network, dict(n=3), SMALL, 275_572, 100, HE),
    "plain32": Entry(plain_network, dict(n=5), SMALL, 470_004, 100, HE),
    "plain44": Entry(plain_network, dict(n=7), SMALL, 664_436, 100, HE),
    "plain56": Entry(plain_network, dict(n=9), SMALL, 858_868, 100, HE),
    "eca_resnet20": Entry(eca_resnet, dict(n=3, kernel=3), SMALL, 278_351, 100, ECA),
    "eca_resnet32": Entry(eca_resnet, dict(n=5, kernel=5), SMALL, 472_831, 100, ECA),
    "ecanet20_fixed_k3": Entry(eca_resnet, dict(n=3, kernel=3), SMALL, 278_351, 100, ECA),
    "ecanet20_fixed_k5": Entry(eca_resnet, dict(n=3, kernel=5), SMALL, 278_369, 100, ECA),
    "ecanet20_fixed_k7": Entry(eca_resnet, dict(n=3, kernel=7), SMALL, 278_387, 100, ECA),
    "ecanet20_fixed_k9": Entry(eca_resnet, dict(n=3, kernel=9), SMALL, 278_405, 100, ECA),
    "ecanet20_adaptive": Entry(eca_resnet, dict(n=3, kernel=0), SMALL, 278_351, 100, ECA_RULE),
    "resnet20_no_eca": Entry(CifarResNet, dict(n=3), SMALL, 278_324, 100, NO_ECA),
    "ghost_resnet20": Entry(ghost_resnet, dict(n=3), SMALL, 147_716, 100, GHOST),
    "ghost_resnet32": Entry(ghost_resnet, dict(n=5), SMALL, 247_396, 100, GHOST),
    "improved_resnet20_convnext": Entry(convnext_resnet, dict(n=3), SMALL, 174_868, 100, CONVNEXT,
                                        bf16_on_cpu=False),
    "ghostnet_100": Entry(ghostnet_100, {}, LARGE, 4_029_608, 100, GHOST_TIMM, original=4_029_608,
                          bf16_on_cpu=False),
    "convnext_tiny": Entry(convnext_tiny, {}, MODERN, 27_895_012, 100, CONVNEXT_TIMM,
                           original=27_897_028),
    "segnext_mscan_tiny": Entry(MSCAN, MSCAN_TINY, MODERN_SMALL, 854_820, 100, "arXiv 2209.08575",
                                bf16_on_cpu=False),
    "mlp_mixer_tiny": Entry(mlp_mixer, MIXER_TINY, MODERN_SMALL, 3_639_076, 100, MIXER),
    "mlp_mixer_b16": Entry(mlp_mixer, MIXER_B, MODERN, 57_417_316, 100, MIXER,
                           original=59_188_372),
    "cspresnet50": Entry(cspresnet50, {}, LARGE, 20_685_988, 100, CSP, original=20_693_668),
    "resnest50d": Entry(resnest50d, {}, LARGE, 25_639_140, 100, RESNEST, original=25_639_140),
    "coatnet_0": Entry(coatnet, COATNET_0, MODERN, 20_041_448, 100, COATNET),
    "coatnet_0_custom_enhanced": Entry(coatnet, COATNET_0_LK, MODERN, 21_008_900, 100,
                                       "arXiv 2303.09030", bf16_on_cpu=False),
    "coatnet_cifar_opt": Entry(coatnet_cifar, COATNET_C, MODERN, 27_027_270, 100, COATNET,
                               original=27_008_486),
    "coatnet_cifar_opt_large_stem": Entry(coatnet_cifar, COATNET_C_LS, MODERN, 27_029_318, 100,
                                          COATNET, original=27_010_534),
    "hornet_tiny": Entry(HorNet, HORNET_TINY, MODERN, 21_946_468, 100, "arXiv 2207.14284",
                         original=21_947_812),
    "vit_custom": Entry(ViT, {}, SCRATCH, 2_697_610, 10, VIT),
    "vit_small_data": Entry(ViT, dict(spt=True, lsa=True), SCRATCH, 2_735_062, 10,
                            "arXiv 2112.13492", alias="SL-ViT"),
    "vit_tiny": Entry(vision_transformer, VIT_TINY, SCRATCH, 5_526_346, 10, VIT_TIMM, 224),
    "tinyvit_5m": Entry(any_size_network, TINYVIT, SCRATCH, 5_074_974, 10,
                        "arXiv 2207.10666, timm", 224),
    "nfnet_f0": Entry(any_size_network, NFNET, MODERN, 68_723_584, 100, "arXiv 2102.06171, timm"),
    "vit_base_patch8": Entry(vision_transformer, VIT_BASE, SCRATCH, 85_294_948, 100, VIT_TIMM),
    "eva02_large": Entry(fixed_size_network, EVA02_LARGE, LARGEST_448, 305_080_232, 1000,
                         "arXiv 2303.11331, timm", 448),
    "eva_giant": Entry(fixed_size_network, EVA_GIANT, LARGEST_336, 1_013_005_672, 1000,
                       "arXiv 2211.07636, timm", 336),
    "convnext_xxlarge": Entry(any_size_network, CONVNEXT_XXL, LARGEST_256, 846_471_016, 1000,
                              CONVNEXT_TIMM, 256),
}
# fmt: on
