"""The models: one table, one line for each.

    model = create_model("resnet18", num_classes=10)                 # float (B, 3, H, W) -> logits (B, num_classes)
    model = create_model("resnet20", 100, shortcut="pad")            # options of the constructor
    model = create_model("timm/resnet18", 10, pretrained=True)       # any of timm's

Adding a model is one file and one line. The tests run over MODELS, so a new line is tested without being asked.
"""

import ast
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from errors import UserError
from models.cifar_resnet import CifarResNet
from models.resnet import BasicBlock, Bottleneck, ResNet


@dataclass(frozen=True)
class Model:
    """A line of the table: constructor(num_classes, **fixed, **options), its parameter count, source and recipe.

    parameters: at `classes` classes; recipe: training arguments that differ from the scripts' defaults, each with its
    reason where the recipe is made.
    """

    constructor: Callable
    fixed: dict
    parameters: int
    source: str
    classes: int = 10
    image_size: int = 32
    recipe: dict = field(default_factory=dict)
    also: str = ""  # another name that people use

    @property
    def options(self):
        """{name: default} of what --model-arg may set."""
        signature = inspect.signature(self.constructor).parameters.values()
        return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed}


# Networks of under two million parameters underfit: mixing and smoothing would cost them more than they bring.
SMALL = dict(mixup=0.0, cutmix=0.0, label_smoothing=0.0)

HE = "arXiv 1512.03385"
BASIC = dict(block=BasicBlock)
PLAIN = dict(block=BasicBlock, shortcut=False)
DEEP = dict(block=Bottleneck)
MULTI_SCALE = dict(block=BasicBlock, layers=(2, 2, 2, 2), multi_scale=True)

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
}


def canonical(name):
    """The table's name for `name`, which may differ in case, '-' and '_'; timm/<name> stays. Raises UserError."""
    if name.startswith("timm/"):
        return name

    def bare(text):
        return text.lower().replace("-", "").replace("_", "")

    known = {bare(key): key for key in MODELS} | {bare(model.also): key for key, model in MODELS.items() if model.also}
    if bare(name) not in known:
        near = difflib.get_close_matches(bare(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(known[key] for key in near)}?" if near else f"the names are {', '.join(MODELS)}"
        raise UserError(f"unknown model {name!r}: {hint} (--list-models shows all, timm/<name> takes any of timm's)", status=2)
    return known[bare(name)]


def recipe(name):
    """The training arguments that go with a model (see Model.recipe); a copy."""
    return dict(MODELS[name].recipe) if name in MODELS else {}


def parse_options(pairs, name):
    """["key=value", …] as options of the model: checked against its constructor, values read as Python literals."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--model-arg takes key=value, not {pair!r}", status=2)
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    if name in MODELS:
        valid = MODELS[name].options
        for key, value in options.items():
            if key not in valid:
                names = ", ".join(f"{k}={v}" for k, v in valid.items()) or "none"
                raise UserError(f"{name} has no option {key!r}; its options (and defaults) are: {names}", status=2)
            wanted = type(valid[key])
            if valid[key] is not None and not isinstance(value, (int, float) if wanted is float else wanted):
                raise UserError(f"{name}: {key} takes {wanted.__name__}, not {value!r}", status=2)
    return options


def create_model(name, num_classes=10, *, pretrained=False, **options):
    """Builds a model of MODELS, or timm/<name>, with fresh weights or (timm's, pretrained=True) weights from the hub.

    Raises UserError for an unknown name or option, and where weights were asked for and are not to be had.
    """
    name = canonical(name)
    if name.startswith("timm/"):
        return _create_timm(name, num_classes, pretrained, options)
    if pretrained:
        raise UserError(f"{name} has no published weights: take timm/<name>, or a file with --weights", status=2)
    model = MODELS[name]
    try:
        return model.constructor(num_classes, **model.fixed, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}", status=2) from error


def _create_timm(name, num_classes, pretrained, options):
    import timm

    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        near = difflib.get_close_matches(short, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(f'timm/{key}' for key in near)}?" if near else ""
        raise UserError(f"timm has no model {short!r}{hint}", status=2)
    try:
        return timm.create_model(short, pretrained=pretrained, num_classes=num_classes, **options)
    except Exception as error:  # the hub's, the network's and the constructor's errors have no common class
        reason = str(error).strip().split("\n")[0][:200]
        if pretrained:
            raise UserError(
                f"{name}: the pretrained weights could not be had ({reason}); without network, fetch model.safetensors of "
                f"timm/{short} from the Hugging Face hub on another machine and give it with --weights FILE"
            ) from error
        raise UserError(f"{name}: {reason}", status=2) from error


def describe(name, num_classes, image_size, **options):
    """(parameters, multiply-accumulates of one picture) of a model, from a copy on the meta device: no memory, no work.

    Raises UserError when the model can't take pictures of image_size pixels.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = create_model(name, num_classes, **options).eval()
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, image_size, image_size))
        except Exception as error:  # whatever the first layer that doesn't fit says
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(f"{name} can't take pictures of {image_size} px ({reason})", status=2) from error
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def normalization(model):
    """(mean, std) that published weights were trained with: timm's models carry them."""
    config = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def print_table():
    """Prints the table: name, parameters and GMACs at the source's classes and size, classes, size, source."""
    print(f"{'name':<30}{'parameters':>12}{'GMACs':>8}{'classes':>9}{'px':>5}  source")
    for name, model in MODELS.items():
        parameters, macs = describe(name, model.classes, model.image_size)
        print(f"{name:<30}{parameters:>12,}{macs / 1e9:>8.3f}{model.classes:>9}{model.image_size:>5}  {model.source}")
