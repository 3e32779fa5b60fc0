"""A checkpoint as a file for other programs: ONNX, TorchScript or safetensors, with a README that says how to use it.

    line = export(predictor, "onnx", Path("runs/x/export-onnx"))

What is exported takes uint8 pictures (B, 3, S, S) in RGB and gives logits (B, K): the normalisation is inside, so that
nothing is left to be done differently. safetensors holds the weights only; its metadata and README say the rest. Each file
is read back, and its logits compared with the checkpoint's, before it counts as written.
"""

import contextlib
import copy
import inspect
import json
import warnings

import torch

from analysis import figures, metrics, tables
from common.errors import UserError, first_line
from common.text import printable
from datasets import image_folder

FILES = {"onnx": "model.onnx", "torchscript": "model.pt", "safetensors": "model.safetensors"}
MARKER = "<!-- written by show_example.py --export -->"  # a README.md without this line is somebody else's
TOLERANCE = 1e-3  # of logits, relative to the largest: another runtime orders its sums otherwise


class Deployed(torch.nn.Module):
    """A model with its normalisation. uint8 (B, 3, S, S) -> logits (B, K)"""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(1, 3, 1, 1)))
        self.register_buffer("shift", -(torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1))

    def forward(self, images):
        return self.model(images.float() * self.scale + self.shift)


def export(predictor, kind, directory):
    """Writes the model and README.md into the directory, and returns a line that says what was checked.

    Raises UserError, also where the directory has a README.md that no export wrote.
    """
    card, file = predictor.card, directory / FILES[kind]
    _check_readme(directory / "README.md")
    model = Deployed(copy.deepcopy(predictor.model).cpu(), card["mean"], card["std"]).eval()
    size = card["image_size"]
    images = torch.randint(
        0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {directory} can't be made: {error.strerror}", status=2
        ) from error
    temporary = directory / f".{file.name}.tmp"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own, of things that were decided here
            write = {
                "onnx": _write_onnx,
                "torchscript": _write_torchscript,
                "safetensors": _write_safetensors,
            }[kind]
            try:
                write(model, images, card, temporary)
                checked = _check(kind, temporary, model, images, card)
            except (UserError, OSError):
                raise
            except (
                Exception
            ) as error:  # exporters and runtimes have errors of their own for what they don't know
                raise UserError(
                    f"{card['model']} can't be exported as {kind}: {first_line(error)}"
                ) from error
        figures.write(directory / "README.md", readme(predictor, kind).encode())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # what was written stands in the way
                directory.rmdir()
    return f"{file} ({file.stat().st_size / 2**20:.1f} MB): {checked}; how to use it: {directory / 'README.md'}"


def _check_readme(path):
    """Raises UserError for a README.md that an export may not replace."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{path} can't be read, so it can't be replaced: {error.strerror}", status=2
        ) from error
    if MARKER not in lines:
        raise UserError(
            f"{path} was not written by --export: choose another directory with --output", status=2
        )


def _write_onnx(model, images, card, path):
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it, and says so late)
    except ImportError as error:
        raise UserError("--export onnx needs two packages: pip install onnx onnxscript") from error
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: batch}},
        verbose=False,
    )
    program.model.metadata_props.update({key: str(value) for key, value in metadata(card).items()})
    program.save(str(path), external_data=False)


def _write_torchscript(model, images, card, path):
    extra = {"card.json": json.dumps(metadata(card))}
    torch.jit.save(torch.jit.trace(model, images), str(path), _extra_files=extra)


def _write_safetensors(model, images, card, path):
    from safetensors.torch import save_file

    state = {key: value.contiguous().clone() for key, value in model.model.state_dict().items()}
    save_file(state, str(path), metadata={key: str(value) for key, value in metadata(card).items()})


def metadata(card):
    """What is needed to use the weights: JSON values, texts where they are lists or objects."""
    keys = ("model", "options", "num_classes", "classes", "image_size", "mean", "std", "dataset")
    return {
        key: card[key] if isinstance(card[key], (str, int)) else json.dumps(card[key])
        for key in keys
    }


def _check(kind, path, model, images, card):
    """Compares the file's logits with the model's, for another number of pictures, too."""
    wanted = model(images)
    if kind == "onnx":
        try:
            import onnxruntime
        except ImportError:
            return "not checked (pip install onnxruntime)"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def run(x):
            return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    elif kind == "torchscript":
        run = torch.jit.load(str(path))
    else:
        from safetensors.torch import load_file

        from models import from_card

        fresh = from_card(card)
        fresh.load_state_dict(load_file(str(path)))
        run = Deployed(fresh, card["mean"], card["std"]).eval()
    largest = max(
        float((run(images) - wanted).abs().max()), float((run(images[:1]) - wanted[:1]).abs().max())
    )
    if not largest <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise UserError(f"the exported model's logits differ by {largest:.3g}: nothing was written")
    return f"its logits are the checkpoint's (largest difference {largest:.1e})"


# ---- the card --------------------------------------------------------------------------------------------------------

USE = {
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(None, {"images": images})[0]
""",
    "torchscript": """\
import torch

logits = torch.jit.load("model.pt")(torch.from_numpy(images)).detach().numpy()
""",
    "safetensors": """\
# In the repository that it was trained with: the file holds weights, not code.
import torch
from safetensors.torch import load_file

from models import create_model

model = create_model({model!r}, {num_classes}, **{options!r}).eval()
model.load_state_dict(load_file("model.safetensors"))
mean, std = (torch.tensor(values).view(3, 1, 1) for values in ({mean}, {std}))
with torch.no_grad():
    logits = model((torch.from_numpy(images) / 255 - mean) / std).numpy()
""",
}

README = """\
{marker}
# {model}, trained on {dataset}

| | |
|---|---|
| file | `{file}` ({kind}) |
| input | pictures, uint8 RGB, (B, 3, {image_size}, {image_size}){inside} |
| output | logits, float32, (B, {num_classes}) |
| classes, in this order | {names} |
| weights of | {weights} |
| test accuracy | {accuracy} |
| parameters | {parameters} |
| seed | {seed} |

Images are turned upright, cut to the middle square and resized to {image_size} x {image_size} px, as here:

```python
import numpy as np
from PIL import Image


{square}

images = square(Image.open("picture.png"), {image_size}).transpose(2, 0, 1)[None].copy()

{use}
classes = {listed}
exp = np.exp(logits[0] - logits[0].max())
for k in np.argsort(-logits[0])[:3]:
    print(classes[k], f"{{100 * exp[k] / exp.sum():.1f}} %")
```
"""


def readme(predictor, kind):
    """The card: what the file is, what it was measured to be worth, and code that runs."""
    card, (accuracy, which) = predictor.card, predictor.standing()
    limited = metrics.read_arguments(predictor.path.parent).get("limit_test")
    parameters = sum(p.numel() for p in predictor.model.parameters())
    words = {
        key: card[key]
        for key in ("model", "num_classes", "image_size", "options", "mean", "std", "classes")
    }
    words["dataset"] = printable(card["dataset"])
    use = USE[kind].format(**words) if kind == "safetensors" else USE[kind]
    return README.format(
        **words,
        marker=MARKER,
        square=inspect.getsource(image_folder.square),
        kind=kind,
        file=FILES[kind],
        use=use.rstrip() + "\n",
        parameters=f"{parameters:,}",
        seed=card.get("seed", ""),
        inside="" if kind == "safetensors" else "; normalisation is inside",
        names=tables.markdown_text(printable(", ".join(card["classes"]))),
        listed=repr(list(card["classes"])).replace(
            "`", "\\x60"
        ),  # nothing in a name ends the block of code
        weights=which,
        accuracy=(
            f"{accuracy:.2f} %{f' ({limited} pictures)' if limited else ''}"
            if isinstance(accuracy, float)
            else "not known"
        ),
    )
