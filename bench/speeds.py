"""The table of models: size, work, memory and speed on this machine; as CSV, Markdown and a plot.

    row = measure_model(Case("resnet18", args, device), args, ceilings={})
    write([row], "out", heading)

Inference and training are measured apart, each with its own batch. The row of a model that doesn't
fit says so. On a CPU this is computed beforehand, since the system would kill the process; on CUDA,
batches are halved until one fits.
"""

import csv
import gc
import io
import statistics
import textwrap
from pathlib import Path

import timm
import torch

import models
from analysis import figures, formats, metrics, replicates, tables
from bench import measure
from common.errors import UserError, first_line
from common.free_memory import available
from models.published import native_size
from training import memory, mixed_precision
from training.memory import GB
from training.out_of_memory import is_out_of_memory

SUITES = {
    "table": [name for name, model in models.MODELS.items() if not model.large],
    "sota": [name for name, model in models.MODELS.items() if model.large],
    "all": list(models.MODELS),
}
# Column: (heading, format or function, what the number is divided by)
MEASURED = {  # of inference and of training, whose name comes before the column's and the heading
    "batch_size": ("batch", ".0f", 1),
    "ms": ("ms", "", 1),  # of a batch, with least and most
    "us_per_image": ("µs/image", ",.0f", 1),
    "images_per_second": ("images/s", measure.rate, 1),
    "flops_per_second": ("TFLOP/s", ".3f", 1e12),
    "of_ceiling": ("% of ceiling", ".0f", 0.01),
    "peak_memory_bytes": ("peak GB", ".2f", GB),
}
PARTS = {
    part: {f"{part}_{key}": (f"{part} {how[0]}", *how[1:]) for key, how in MEASURED.items()}
    for part in ("inference", "train")
}
COLUMNS = {
    "model": ("model", "", 1),
    "image_size": ("px", ".0f", 1),
    "parameters": ("parameters", ",.0f", 1),
    "gmacs": ("GMACs", ".3f", 1),
    "published_top1": ("published top-1 %", ".2f", 1),
    "precision": ("precision", "", 1),
    **PARTS["inference"],
    **PARTS["train"],
    "activation_bytes": ("train MB/image", ".1f", 1e6),
    "status": ("", "", 1),
}
TIMES = tuple(f"{part}_ms_{end}" for part in PARTS for end in ("least", "most"))
RESULTS = "results-imagenet.csv"  # timm's file; a checkout of timm has it, its package doesn't


class Case:
    """A model as the arguments have it measured. Raises UserError for a wrong name or size."""

    def __init__(self, name, args, device):
        listed = models.MODELS.get(name)
        published = listed.image_size if listed else native_size(name.removeprefix("timm/"))
        self.name, self.device = name, device
        self.size = args.image_size or published
        self.classes = args.classes or (listed.classes if listed else 1000)
        self.options = models.parse_options([], name, self.size)
        self.dtype = mixed_precision.amp_dtype_for(name, args.amp, device)
        self.optimizer = models.recipe(name).get("optimizer", "sgd" if listed else "adamw")

    def describe(self):
        """(parameters, multiply-accumulates of one image)."""
        return models.describe(self.name, self.classes, self.size, self.options)

    def create(self):
        model = models.create_model(self.name, self.classes, **self.options)
        return models.choose_attention(model, self.device, self.dtype)

    def memory_need(self, part):
        with torch.device("meta"):
            model = self.create()
        options = dict(device=self.device.type, dtype=self.dtype)
        if part == "inference":
            return memory.inference_need(model, self.size, **options)
        return memory.training_need(
            model, self.size, ema=False, optimizer=self.optimizer, **options
        )


def print_table(args, device):
    """Prints a row for each model as soon as it is measured, then writes the files."""
    accuracy = accuracies(args.runs) if args.runs else None
    published, source = published_accuracies(args.timm_results)
    names = [models.canonical(name) for name in args.models or SUITES[args.suite]]
    if args.runs and not accuracy.keys() & names:
        raise UserError("--runs: there is no run of these models", 2)
    if args.output:
        _make_directory(args.output)
    cases = [Case(name, args, device) for name in names]
    if args.models:
        for case in cases:
            case.describe()  # wrong sizes are refused before anything is measured
    elif args.image_size:
        cases = [case for case in cases if _takes_its_size(case)]
        if not cases:
            raise UserError(f"--image-size {args.image_size}: no model can have it", 2)
    types = dict.fromkeys((None, mixed_precision.amp_dtype(args.amp, device)))
    ceilings = {dtype: measure.flop_ceiling(device, dtype, args.rounds) for dtype in types}
    pairs = [
        f"{flops / 1e12:.2f} TFLOP/s in {mixed_precision.name(t)}" for t, flops in ceilings.items()
    ]
    ceiling = f"ceiling, measured with products of square matrices: {', '.join(pairs)}"
    print(f"{ceiling}\n{source}")
    rows = []
    for case in cases:
        rows.append(measure_model(case, args, ceilings, published))
        print(line(rows[-1], with_headings=len(rows) == 1), flush=True)
    if args.output:
        heading = f"{measure.machine(device)}; median of {args.rounds} rounds; {ceiling}; {source}"
        print("written:", *write(rows, args.output, heading, accuracy))


def _takes_its_size(case):
    try:
        case.describe()
    except UserError as error:
        print(f"left out: {error}")
        return False
    return True


def print_precisions(args, device):
    """Prints each model's size, a training step in bf16 and in fp32, and their ratio."""
    size = f"{'model':<30}{'parameters':>14}{'GMACs':>9}"
    measure.print_headings(size, "bf16", "fp32")
    for name in map(models.canonical, args.models or SUITES["table"]):
        options = models.parse_options([], name, 32)
        parameters, macs = models.describe(name, 100, 32, options)
        steps = []
        for dtype in (torch.bfloat16, None):
            model = models.create_model(name, 100, **options)
            model = measure.to_device(model, device, dtype)
            optimizer = measure.create_optimizer(model)
            steps.append(measure.training_step(model, optimizer, device, dtype))
        size = f"{name:<30}{parameters:>14,}{macs / 1e9:>9.3f}"
        measure.print_steps(size, steps, args, device)


def accuracies(patterns):
    """{model: mean test accuracy in percent over seeds} of finished runs.

    Raises UserError for runs of a model that are not of one experiment, and for other test images.
    """
    runs = [run for run in metrics.load_runs(patterns) if run.scalars["test"] is not None]
    if not runs:
        raise UserError("--runs: none of these runs has a test accuracy", 2)
    groups = {}
    for group in replicates.group(runs):
        model = group.argument("model")
        if model in groups:
            names = f"{groups[model].name} and {group.name}"
            raise UserError(f"--runs: {names} are different experiments with {model}", 2)
        groups[model] = group
    test_images = replicates.test_images(groups.values())
    if len(test_images) > 1:
        raise UserError(f"--runs: the test images differ ({'; '.join(test_images)})", 2)
    return {model: group.scalar("test").mean for model, group in groups.items()}


def published_accuracies(path=None):
    """({name of timm's weights: top-1 on ImageNet in percent}, a sentence about them).

    path: timm's results-imagenet.csv; without it, that of the checkout that timm is installed from.
    """
    file = Path(path) if path else Path(timm.__file__).parents[1] / "results" / RESULTS
    if not path and not file.is_file():
        return {}, f"published top-1: give timm's {RESULTS} with --timm-results"
    try:
        rows = metrics.read_table(file, keep_torn_line=True)
        top1 = {row["model"]: float(row["top1"]) for row in rows}
    except (OSError, UserError, KeyError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--timm-results {file} is not timm's {RESULTS} ({reason})", 2) from error
    return top1, f"published top-1: of timm's weights on ImageNet, from {file}"


# ---- a row ---------------------------------------------------------------------------------------


def measure_model(case, args, ceilings, published=None):
    """The keys of COLUMNS and TIMES, None where there is no number; activations are of one image.

    args: batch_size and inference_batch_size (at most), skip_training, rounds; ceilings:
    {dtype: FLOP/s}; published: see `published_accuracies`. "status" says what was not measured.
    """
    parameters, macs = case.describe()
    row = dict.fromkeys((*COLUMNS, *TIMES)) | {
        "model": case.name,
        "image_size": case.size,
        "classes": case.classes,
        "parameters": parameters,
        "gmacs": macs / 1e9,
        "published_top1": (published or {}).get(models.weights_name(case.name)),
        "precision": mixed_precision.name(case.dtype),
        "optimizer": case.optimizer,
    }
    batch_sizes = {"inference": args.inference_batch_size or args.batch_size}
    if not args.skip_training:
        batch_sizes["train"] = args.batch_size
    problems = []
    for part, batch_size in batch_sizes.items():
        need, free = case.memory_need(part), available(case.device)
        if part == "train":
            row["activation_bytes"] = need.image
        if case.device.type != "cuda":
            batch_size = min(batch_size, need.largest(free))
        try:
            measured = _largest_that_fits(case, part, batch_size, args.rounds)
        except ValueError as error:  # batch norm can't be trained on a single pixel
            problems.append(f"{part}: {first_line(error)}")
            continue
        if measured is None:
            needed = f"one image needs {need.total(1) / GB:.1f} GB; {free / GB:.1f} GB are free"
            problems.append(f"{part} does not fit: {needed}, 10 % kept in reserve")
            continue
        ceiling = ceilings.get(case.dtype)
        measured["of_ceiling"] = measured["flops_per_second"] / ceiling if ceiling else None
        row |= {f"{part}_{key}": value for key, value in measured.items()}
    return row | {"status": "; ".join(problems)}


def _largest_that_fits(case, part, batch_size, rounds):
    """The result of `_speed`, with half the batch as long as memory is short; None without any."""
    while batch_size:
        try:
            return _speed(case, part, batch_size, rounds)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            gc.collect()
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
        batch_size //= 2
    return None


def _speed(case, part, batch_size, rounds):
    """The measured values of a part of a row."""
    device, dtype = case.device, case.dtype
    is_measured = measure.reset_peak(device)
    model = measure.to_device(case.create(), device, dtype)
    inputs, targets = measure.ready_batch(batch_size, case.size, case.classes, device)
    if part == "train":
        optimizer = measure.create_optimizer(model, case.optimizer)
        step = measure.training_step(model, optimizer, device, dtype)
        seconds = measure.repeated(device, rounds, lambda: step(inputs, targets))
        passes = 3  # the backward pass takes two
    else:
        infer = measure.inference_step(model, device, dtype)
        seconds = measure.repeated(device, rounds, lambda: infer(inputs))
        passes = 1
    flops = passes * 2 * case.describe()[1]  # a multiplication and an addition
    median = statistics.median(seconds)
    return {
        "batch_size": batch_size,
        "ms": 1000 * median,
        "ms_least": 1000 * min(seconds),
        "ms_most": 1000 * max(seconds),
        "us_per_image": 1e6 * median / batch_size,
        "images_per_second": batch_size / median,
        "flops_per_second": flops * batch_size / median,
        "peak_memory_bytes": measure.peak(device) if is_measured else None,
    }


# ---- what is written -----------------------------------------------------------------------------


def cells(row):
    """{heading: text} of a row."""
    texts = {}
    for key, (heading, style, unit) in COLUMNS.items():
        is_number = callable(style) and row[key] is not None
        texts[heading] = style(row[key] / unit) if is_number else tables.show(row[key], style, unit)
    for part in PARTS:
        if row[f"{part}_ms"] is not None:
            ms, least, most = (row[f"{part}_ms{end}"] for end in ("", "_least", "_most"))
            texts[f"{part} ms"] = f"{ms:.1f} ({least:.1f} to {most:.1f})"
    return texts


def line(row, with_headings=False):
    """A row as a line for the terminal, below the headings if they are wanted."""
    texts, lines = cells(row), []
    for values in (texts.keys(), texts.values()) if with_headings else (texts.values(),):
        padded = []
        for heading, text in zip(texts, values):
            width = max(24 if heading.endswith(" ms") else 7, len(heading))
            width = 13 if heading == "parameters" else width
            padded.append(f"{text:<26}" if heading == "model" else f"{text:>{width}}")
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _make_directory(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} can't be made: {error.strerror}", status=2) from error


def write(rows, directory, heading, accuracy=None):
    """Writes models.csv (in its columns' units), models.md and models.png; returns the paths.

    accuracy: {model: test accuracy in percent} to draw against speed, instead of parameters.
    """
    _make_directory(directory)
    csv_file, markdown_file = Path(directory) / "models.csv", Path(directory) / "models.md"
    text = io.StringIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    figures.write(csv_file, text.getvalue().encode())
    table = formats.markdown_table([cells(row) for row in rows])
    figures.write(markdown_file, f"{formats.markdown_text(heading)}\n\n{table}".encode())
    plot = Path(directory) / "models.png"
    drawn = draw(rows, plot, heading, accuracy)
    return [csv_file, markdown_file, plot] if drawn else [csv_file, markdown_file]


def draw(rows, path, heading, accuracy=None):
    """Draws parameters, or accuracy, against training speed; returns whether there was a point.

    Without measured training: against the speed of inference.
    """
    trained = any(row["train_images_per_second"] for row in rows)
    part = "train" if trained else "inference"
    points = []
    for row in rows:
        x = row[f"{part}_images_per_second"]
        y = accuracy.get(row["model"]) if accuracy else row["parameters"] / 1e6
        if x and y:
            points.append((x, y, row["model"]))
    if not points:
        return False
    figure, axis = figures.pyplot(font=9).subplots(figsize=(8, 5.5), layout="constrained")
    xs, ys, _ = zip(*points)
    if max(xs) > 10 * min(xs):
        axis.set_xscale("log")
        figures.plain_numbers(axis.xaxis)
    if max(ys) > 10 * min(ys) and not accuracy:
        axis.set_yscale("log")
        figures.plain_numbers(axis.yaxis)
    for i, (x, y, name) in enumerate(points):
        axis.plot(x, y, "o", color=figures.COLORS[i % len(figures.COLORS)], markersize=5)
        style = dict(xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.annotate(figures.plain(name, 30), (x, y), **style)
    axis.set_xlabel(f"{'training' if trained else 'inference'} images per second")
    axis.set_ylabel("test accuracy (%)" if accuracy else "parameters (millions)")
    axis.set_title("\n".join(textwrap.wrap(figures.plain(heading, 300), 110)), fontsize=8)
    axis.margins(x=0.12, y=0.08)
    figures.tidy(axis)
    figures.save(figure, path)
    return True
