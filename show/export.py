"""A checkpoint as a file for other programs, with a README that says how to use it.

    message = export(predictor, "onnx", Path("runs/x/export-onnx"))

ONNX and TorchScript files take uint8 RGB images (B, 3, S, S) and give logits (B, K): they contain
the normalization. safetensors holds the weights only; its metadata and README describe the rest.
Each file is read back and its logits compared with the checkpoint's before it counts as written
(ONNX: if onnxruntime is installed).
"""

import copy
import inspect
import json
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from analysis import figures, formats, metrics
from common.errors import UserError, first_line
from common.text import printable
from datasets import image_folder
from models import from_card

MARKER = "<!-- written by show_example.py --export -->"  # marks a README.md that may be replaced
CARD_KEYS = ("model", "options", "num_classes", "classes", "image_size", "mean", "std", "dataset")
TOLERANCE = 1e-3  # of logits, relative to the largest: runtimes sum in different orders


class Deployed(torch.nn.Module):
    """A model with its normalization. uint8 (B, 3, S, S) -> logits (B, K)"""

    def __init__(self, model, card):
        super().__init__()
        mean, std = (torch.tensor(card[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.model = model
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images):
        return self.model(images.float() * self.scale + self.shift)


def export(predictor, kind, directory):
    """Writes the model and README.md into the directory; returns a message about the result.

    kind: a key of FORMATS. Raises UserError, also for a README.md that no export wrote.
    """
    card, file = predictor.card, directory / FORMATS[kind].file
    readme_file = directory / "README.md"
    _check_readme(readme_file)
    model = Deployed(copy.deepcopy(predictor.model).cpu(), card).eval()
    temporary, is_new = directory / f".{file.name}.tmp", not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory} can't be made: {error.strerror}", 2) from error
    try:
        checked = _write_and_check(kind, model, card, temporary)
        figures.write(readme_file, readme(predictor, kind).encode())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
        if is_new and not any(directory.iterdir()):
            directory.rmdir()
    megabytes = file.stat().st_size / 2**20
    return f"{file} ({megabytes:.1f} MB): {checked}; how to use it: {readme_file}"


def _check_readme(path):
    """Raises UserError for a README.md that an export may not replace."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        message = f"{path} can't be read, so it can't be replaced: {error.strerror}"
        raise UserError(message, status=2) from error
    if MARKER not in lines:
        message = f"{path} was not written by --export: choose another directory with --output"
        raise UserError(message, status=2)


@torch.no_grad()
def _write_and_check(kind, model, card, path):
    """Writes the file and returns what its comparison with the model gave. Raises UserError."""
    shape, generator = (4, 3, card["image_size"], card["image_size"]), torch.Generator()
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator.manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FORMATS[kind].write(model, images, card, path)
            exported = FORMATS[kind].load(path, card)
            if exported is None:
                return "not checked (pip install onnxruntime)"
            expected = model(images)
            # One image alone, too: the batch size must not be fixed.
            differences = (exported(images) - expected, exported(images[:1]) - expected[:1])
    except (UserError, OSError):
        raise
    except Exception as error:  # each exporter and runtime has errors of its own
        message = f"{card['model']} can't be exported as {kind}: {first_line(error)}"
        raise UserError(message) from error
    largest = max(float(difference.abs().max()) for difference in differences)
    if not largest <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(f"the exported model's logits differ by {largest:.3g}: nothing was written")
    return f"its logits are the checkpoint's (largest difference {largest:.1e})"


def metadata(card):
    """What is needed to use the weights, as strings and numbers; lists and dicts are JSON."""
    values = {key: card[key] for key in CARD_KEYS}
    return {k: v if isinstance(v, (str, int)) else json.dumps(v) for k, v in values.items()}


def _metadata_strings(card):
    return {key: str(value) for key, value in metadata(card).items()}


# ---- the formats: each is written, and loaded as a function of uint8 images ----------------------


def _write_onnx(model, images, card, path):
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it, but fails late without it)
    except ImportError as error:
        raise UserError("--export onnx needs two packages: pip install onnx onnxscript") from error
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=65536)}},
        verbose=False,
    )
    program.model.metadata_props.update(_metadata_strings(card))
    program.save(str(path), external_data=False)


def _load_onnx(path, card):
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torchscript(model, images, card, path):
    extra_files = {"card.json": json.dumps(metadata(card))}
    torch.jit.save(torch.jit.trace(model, images), str(path), _extra_files=extra_files)


def _load_torchscript(path, card):
    return torch.jit.load(str(path))


def _write_safetensors(model, images, card, path):
    from safetensors.torch import save_file

    state = {key: value.contiguous().clone() for key, value in model.model.state_dict().items()}
    save_file(state, str(path), metadata=_metadata_strings(card))


def _load_safetensors(path, card):
    from safetensors.torch import load_file

    model = from_card(card)
    model.load_state_dict(load_file(str(path)))
    return Deployed(model, card).eval()


class Format(NamedTuple):
    file: str
    write: Callable  # (model, images, card, path) -> None
    load: Callable  # (path, card) -> a function of images, or None where it can't be loaded
    code: str  # in the README: from `images` to `logits`


FORMATS = {
    "onnx": Format("model.onnx", _write_onnx, _load_onnx, """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(None, {"images": images})[0]
"""),
    "torchscript": Format("model.pt", _write_torchscript, _load_torchscript, """\
import torch

logits = torch.jit.load("model.pt")(torch.from_numpy(images)).detach().numpy()
"""),
    "safetensors": Format("model.safetensors", _write_safetensors, _load_safetensors, """\
# In the repository that it was trained with: the file holds weights, not code.
import torch
from safetensors.torch import load_file

from models import create_model

model = create_model({model!r}, {num_classes}, **{options!r}).eval()
model.load_state_dict(load_file("model.safetensors"))
mean, std = (torch.tensor(values).view(3, 1, 1) for values in ({mean}, {std}))
with torch.no_grad():
    logits = model((torch.from_numpy(images) / 255 - mean) / std).numpy()
"""),
}  # fmt: skip


# ---- the README ----------------------------------------------------------------------------------

README = """\
{marker}
# {model}, trained on {dataset}

| | |
|---|---|
| file | `{file}` ({kind}) |
| input | images, uint8 RGB, (B, 3, {image_size}, {image_size}){inside} |
| output | logits, float32, (B, {num_classes}) |
| classes, in this order | {names} |
| weights of | {weights} |
| test accuracy | {accuracy} |
| parameters | {parameters:,} |
| seed | {seed} |

Images are turned upright, cut to the middle square and resized to {image_size} x {image_size} px:

```python
import numpy as np
from PIL import Image


{square}

images = square(Image.open("image.png"), {image_size}).transpose(2, 0, 1)[None].copy()

{code}
classes = {listed}
exp = np.exp(logits[0] - logits[0].max())
for k in np.argsort(-logits[0])[:3]:
    print(classes[k], f"{{100 * exp[k] / exp.sum():.1f}} %")
```
"""


def readme(predictor, kind):
    """What the file is, its test accuracy, and code that runs."""
    card, (test_acc, weights) = predictor.card, predictor.standing()
    accuracy = "not known"
    if isinstance(test_acc, float):
        limit = metrics.read_arguments(predictor.path.parent).get("limit_test")
        accuracy = f"{test_acc:.2f} %"
        if type(limit) is int and limit > 0:
            accuracy += f" ({limit} images)"
    code, inside = FORMATS[kind].code, "; the normalization is inside"
    dataset = formats.markdown_text(printable(card["dataset"]))
    values = {key: card[key] for key in CARD_KEYS} | {"dataset": dataset}
    if kind == "safetensors":
        code, inside = code.format(**values), ""
    return README.format(
        **values,
        marker=MARKER,
        file=FORMATS[kind].file,
        kind=kind,
        inside=inside,
        names=formats.markdown_text(printable(", ".join(card["classes"]))),
        weights=weights,
        accuracy=accuracy,
        parameters=sum(p.numel() for p in predictor.model.parameters()),
        seed=card["seed"] if type(card.get("seed")) is int else "not known",
        square=inspect.getsource(image_folder.square),
        code=code,
        # Escaped, so that no name ends the block of code.
        listed=repr(list(card["classes"])).replace("`", "\\x60"),
    )
