"""The table of models: size, work, memory and speed of each, on this machine; as CSV, Markdown and a plot.

    rows = [measure_model("resnet18", device=device, ...), ...]
    write(rows, "out", heading)

A row that doesn't fit the machine says so. On a CPU that is found by counting beforehand, since the system would end the
process for trying; on CUDA by trying, with batches that are halved until one fits.
"""

import csv
import gc
import io
import statistics
import textwrap
from pathlib import Path

import torch

import models
from analysis import figures, tables
from bench import measure
from common.errors import UserError
from models.published import native_size
from training import memory, mixed_precision
from training.memory import GB

SUITES = {
    "table": [name for name, model in models.MODELS.items() if not model.large],
    "sota": [name for name, model in models.MODELS.items() if model.large],
    "all": list(models.MODELS),
}
# Column: (heading, format or function, what the number is divided by)
COLUMNS = {
    "model": ("model", "", 1),
    "image_size": ("px", ".0f", 1),
    "parameters": ("parameters", ",.0f", 1),
    "gmacs": ("GMACs", ".3f", 1),
    "activation_bytes": ("activations MB", ".1f", 1e6),
    "batch_size": ("batch", ".0f", 1),
    "precision": ("precision", "", 1),
    "train_ms": ("step ms", "", 1),
    "train_images_per_second": ("train images/s", measure.rate, 1),
    "train_us_per_image": ("µs/image", ",.0f", 1),
    "inference_images_per_second": ("inference images/s", measure.rate, 1),
    "peak_memory_bytes": ("peak GB", ".2f", GB),
    "train_flops_per_second": ("TFLOP/s", ".3f", 1e12),
    "of_ceiling": ("% of ceiling", ".0f", 0.01),
    "status": ("", "", 1),
}
TIMES = tuple(
    f"{kind}_ms{part}" for kind in ("train", "inference") for part in ("", "_least", "_most")
)


def layout(name, image_size=None, classes=None):
    """(image size, classes, options) of a model's row: its own where none are given. Raises UserError for a wrong name."""
    listed = models.MODELS.get(name)
    size = image_size or (listed.image_size if listed else native_size(name.removeprefix("timm/")))
    options = models.parse_options([], name, size)
    return size, classes or (listed.classes if listed else 1000), options


def measure_model(
    name, *, device, amp, batch_size, rounds, image_size=None, classes=None, ceilings=None
):
    """A row: the keys of COLUMNS and TIMES, None where there is no number; activation_bytes: of one image, counted.

    amp: a value of --amp; image_size, classes: by default those that the model is listed or published with; ceilings: {type:
    FLOP/s} (see measure.flop_ceiling). "status" says what could not be measured, and why. Raises UserError for a name or a
    size that there is no model of.
    """
    size, classes, options = layout(name, image_size, classes)
    parameters, macs = models.describe(name, classes, size, options)
    auto_fp32 = amp == "auto" and models.prefers_fp32(name, device)
    dtype = None if auto_fp32 else mixed_precision.amp_dtype(amp, device)
    optimizer = models.recipe(name).get("optimizer", "sgd" if name in models.MODELS else "adamw")
    with torch.device("meta"):
        network = models.choose_attention(
            models.create_model(name, classes, **options), device, dtype
        )
    need = memory.training_need(
        network, size, device=device.type, dtype=dtype, optimizer=optimizer, ema=False
    )
    row = dict.fromkeys((*COLUMNS, *TIMES)) | {
        "model": name,
        "image_size": size,
        "classes": classes,
        "parameters": parameters,
        "gmacs": macs / 1e9,
        "activation_bytes": need.image,
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "optimizer": optimizer,
        "status": "",
    }
    free = memory.available(device)
    most = batch_size if device.type == "cuda" else min(batch_size, need.largest(free))
    ceiling = (ceilings or {}).get(dtype)
    while most:
        try:
            found = _speed(
                name, classes, size, options, device, dtype, optimizer, most, rounds, ceiling
            )
            return row | {"batch_size": most} | found
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        most //= 2
    row["status"] = (
        f"does not fit: one image needs {need.total(1) / GB:.1f} GB; {free / GB:.1f} GB are free, of which a "
        f"tenth is spared"
    )
    return row


def _speed(name, classes, size, options, device, dtype, optimizer, batch_size, rounds, ceiling):
    """The measured part of a row."""
    measure.reset_peak(device)
    model = models.choose_attention(models.create_model(name, classes, **options), device, dtype)
    model = model.to(device, memory_format=torch.channels_last)
    batch = measure.ready_batch(batch_size, size, classes, device)
    step = measure.training_step(model.train(), *batch, device, optimizer)
    train = measure.repeated(device, rounds, lambda: step(dtype))
    peak = measure.peak(device)
    model.eval()

    @torch.no_grad()
    def infer():
        with mixed_precision.autocast(device, dtype):
            model(batch[0])

    inference = measure.repeated(device, rounds, infer)
    speed = measure.step_flops(name, classes, size, options) * batch_size / statistics.median(train)
    found = {
        "peak_memory_bytes": peak,
        "train_flops_per_second": speed,
        "of_ceiling": speed / ceiling if ceiling else None,
    }
    for kind, seconds in (("train", train), ("inference", inference)):
        middle = statistics.median(seconds)
        found |= {
            f"{kind}_ms": 1000 * middle,
            f"{kind}_ms_least": 1000 * min(seconds),
            f"{kind}_ms_most": 1000 * max(seconds),
            f"{kind}_images_per_second": batch_size / middle,
            f"{kind}_us_per_image": 1e6 * middle / batch_size,
        }
    return found


def cells(row):
    """The row as texts under the headings of COLUMNS."""
    out = {}
    for key, (heading, style, unit) in COLUMNS.items():
        own = callable(style) and row[key] is not None
        out[heading] = style(row[key] / unit) if own else tables.show(row[key], style, unit)
    if row["train_ms"] is not None:
        out["step ms"] = (
            f"{row['train_ms']:.1f} ({row['train_ms_least']:.1f} to {row['train_ms_most']:.1f})"
        )
    return out


def line(row, first=False):
    """A line for the terminal, and the headings before the first."""
    found = cells(row)
    least = {"model": 26, "parameters": 13, "step ms": 24}
    widths = [max(len(heading), least.get(heading, 7)) for heading in found]
    texts = [list(found)] * first + [list(found.values())]
    return "\n".join(
        "  ".join(
            f"{text:<{w}}" if i == 0 else f"{text:>{w}}"
            for i, (text, w) in enumerate(zip(each, widths))
        ).rstrip()
        for each in texts
    )


def make_directory(path):
    """The Path of a directory, made where it was not there. Raises UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} can't be made: {error.strerror}", status=2) from error
    return path


def write(rows, directory, heading, accuracy=None):
    """models.csv (all figures, in the units of their names), models.md and models.png in a directory; returns their paths.

    accuracy: {model: test accuracy in percent} to draw against speed, instead of parameters. Raises UserError.
    """
    directory = make_directory(directory)
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows
    )
    figures.write(directory / "models.csv", text.getvalue().encode())
    markdown = (
        f"{tables.markdown_text(heading)}\n\n{tables.markdown_table([cells(row) for row in rows])}"
    )
    figures.write(directory / "models.md", markdown.encode())
    written = [directory / "models.csv", directory / "models.md"]
    if draw(rows, directory / "models.png", heading, accuracy):
        written.append(directory / "models.png")
    return written


def draw(rows, path, heading, accuracy=None):
    """Parameters, or accuracy, against training speed, one point a model; returns whether there was one to draw."""
    places = {
        row["model"]: accuracy.get(row["model"]) if accuracy else row["parameters"] / 1e6
        for row in rows
        if row["train_images_per_second"]
    }
    points = [
        (row["train_images_per_second"], places[row["model"]], row["model"])
        for row in rows
        if places.get(row["model"])
    ]
    if not points:
        return False
    plt = figures.pyplot(font=9)
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    ranges = [max(values) / min(values) for values in zip(*(point[:2] for point in points))]
    if ranges[0] > 10:
        axis.set_xscale("log")
        figures.plain_numbers(axis.xaxis)
    if ranges[1] > 10 and not accuracy:
        axis.set_yscale("log")
        figures.plain_numbers(axis.yaxis)
    for i, (x, y, name) in enumerate(points):
        axis.plot(x, y, "o", color=figures.COLOURS[i % len(figures.COLOURS)], markersize=5)
        axis.annotate(
            figures.plain(name, 30), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7
        )
    axis.set_xlabel("training images a second")
    axis.set_ylabel("test accuracy (%)" if accuracy else "parameters (millions)")
    axis.set_title("\n".join(textwrap.wrap(figures.plain(heading, 300), 110)), fontsize=8)
    axis.margins(x=0.12, y=0.08)
    figures.tidy(axis)
    figures.save(figure, path)
    return True
