"""Compares runs: a table on the terminal, and four panels (training and evaluation, loss and accuracy) as a picture.

    python compare_runs.py runs/*/metrics.csv
    python compare_runs.py runs/a runs/b --labels plain residual --output docs/plain.png

Reads metrics.csv by column names, so other programs' files with an epoch and one loss or accuracy column work too.
Its parameters and its headline come from summary.json beside it, where there is one.
sweep.py takes from here what several runs of one experiment say together, and what two experiments differ by.
"""

import glob
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import cli
import figures
import rundir
from errors import UserError

PANELS = (("train_loss", "training loss"), ("eval_loss", "evaluation loss"),
          ("train_acc", "training accuracy (%)"), ("eval_acc", "evaluation accuracy (%)"))  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
WORDS = ("run", "status", "experiment", "baseline", "verdict", "question")  # columns of text: flush left
# Student's t: 97.5 % lie below, for 1 to 30 degrees of freedom; beyond them the next smaller number's value is taken.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
T975_BEYOND = ((120, 1.980), (60, 2.000), (40, 2.021))


def build_parser():
    parser = cli.Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="metrics.csv files, run directories, or patterns of either")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="names for the runs, in their order")
    parser.add_argument("--output", default="comparison.png", metavar="FILE", help="the picture: .png, .svg or .pdf")
    return parser


def find_metrics(patterns):
    """The metrics.csv of each path or pattern, once, in order. Raises UserError."""
    found, missing = [], []
    for pattern in patterns:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]
        paths = [Path(path) / "metrics.csv" if Path(path).is_dir() else Path(path) for path in paths]
        if not paths:
            raise UserError(f"there are no metrics at {pattern}", status=2)
        missing += [path for path in paths if not path.is_file()]
        known = {path.resolve() for path in found}
        found += [path for path in paths if path.is_file() and path.resolve() not in known]
    wrong = [path for path in missing if not path.parent.is_dir() or path.name != "metrics.csv"]
    if wrong or not found:
        raise UserError(f"there are no metrics at {(wrong or missing)[0]} (runs/*/metrics.csv names all runs)", status=2)
    for path in missing:  # a run that has not finished its first epoch
        print(f"{path.parent} has no finished epoch yet, and is left out", file=sys.stderr)
    return found


class Run:
    """One run's curves (lists of floats by column, None where nothing was measured) and summary."""

    def __init__(self, path):
        try:
            rows = rundir.read_metrics(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} can't be read: {error}") from error
        if not rows:
            raise UserError(f"{path} has no finished epoch (or no column named epoch)")
        self.path = path
        self.name = path.resolve().parent.name if path.name == "metrics.csv" else path.stem
        self.epochs = [int(row["epoch"]) for row in rows]
        self.columns = {name: [_float(row[name]) for row in rows] for name in rows[0]}
        # The reported curve: of the averaged weights, where there are any; held-out images before test images.
        prefixes = ("ema_val", "val", "ema_test", "test")
        self.measured = next((p for p in prefixes if {f"{p}_acc", f"{p}_loss"} & set(self.columns)), "")
        for kind in ("loss", "acc"):
            self.columns[f"eval_{kind}"] = self.columns.get(f"{self.measured}_{kind}", [])
        if not any(self.columns.get(name) for name, _ in PANELS):
            raise UserError(f"{path} has no column of a loss or an accuracy: it has {', '.join(rows[0])}")
        self.summary = read_json(path.parent / "summary.json")

    def curve(self, name):
        """(epochs, values) where the column has a number."""
        points = [(e, v) for e, v in zip(self.epochs, self.columns.get(name, [])) if v is not None]
        return tuple(zip(*points)) if points else ((), ())

    def row(self):
        _, accuracy = self.curve("eval_acc")
        best = max(range(len(accuracy)), key=accuracy.__getitem__) if accuracy else None
        seconds = [v for v in self.columns.get("epoch_seconds", []) if v is not None]
        speed = [v for v in self.columns.get("images_per_second", []) if v is not None]
        on = "held-out" if "val" in self.measured else "test"
        return {
            "run": self.name,
            "status": self.summary.get("status", "unfinished"),
            "epochs": str(self.epochs[-1]),
            "last %": f"{accuracy[-1]:.2f}" if accuracy else "",
            "best %": f"{accuracy[best]:.2f} (epoch {self.curve('eval_acc')[0][best]})" if accuracy else "",
            "on": on + (" (ema)" if "ema" in self.measured else ""),
            "test %": _show(self.summary.get("test_acc"), ".2f"),
            "parameters": _show(self.summary.get("parameters"), ","),
            "GMACs": _show(self.summary.get("gmacs"), ".3f"),
            "seconds": f"{sum(seconds):.0f}" if seconds else "",
            "images/s": f"{statistics.median(speed):.0f}" if speed else "",
        }


def _show(value, style):
    return format(value, style) if isinstance(value, (int, float)) else ""


def _float(text):
    """The number in a cell, or None where there is none that can be drawn."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_json(path):
    """The object in a JSON file; {} where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def print_table(rows):
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for cells in ({key: key for key in widths}, *rows):
        print("  ".join(cells[key].ljust(w) if key in WORDS else cells[key].rjust(w) for key, w in widths.items()).rstrip())


def markdown_table(rows):
    lines = [list(rows[0]), [":--" if key in WORDS else "--:" for key in rows[0]], *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# ---- several runs of one experiment ----------------------------------------------------------------------------------


class Mean:
    """Runs of one experiment as one curve: their mean, at the epochs that all of them have."""

    def __init__(self, name, runs):
        self.name, self.runs = name, runs

    def curve(self, name):
        curves = [dict(zip(*run.curve(name))) for run in self.runs]
        epochs = sorted(set.intersection(*map(set, curves)))
        return tuple(epochs), tuple(statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs)


def mean_std(values):
    """"mean ± sample standard deviation"; one value stands alone."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def over_seeds(groups):
    """Rows of a table of {experiment: its runs}, which differ by their seeds: mean ± sample standard deviation, and n."""
    rows = []
    for name, runs in groups.items():
        first = runs[0].summary if runs else {}
        rows.append({
            "experiment": name,
            "n": str(len(runs)),
            "test %": mean_std([run.summary.get("test_acc") for run in runs]),
            "last train %": mean_std([(run.curve("train_acc")[1] or (None,))[-1] for run in runs]),
            "parameters": _show(first.get("parameters"), ","),
            "GMACs": _show(first.get("gmacs"), ".3f"),
        })  # fmt: skip
    return rows


class Difference(NamedTuple):
    """Of two experiments' means; error (a standard error), low and high (a 95 % interval) are None where nothing tells them."""

    value: float
    error: float | None
    low: float | None
    high: float | None
    n: str

    @property
    def verdict(self):
        if self.error is None:
            return "one seed: no error known"
        if self.error == 0 and self.value != 0:
            return "not resolved (no spread to judge by)"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not resolved"


def difference(ours, theirs):
    """Difference of {seed: figure} and {seed: figure}, or None where one is empty.

    Over the seeds that both have, where there are two or more: the error is that of the mean of the pairs' differences.
    Otherwise over all of them, with Welch's error and degrees of freedom, if both have two or more.
    """
    if not ours or not theirs:
        return None
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) > 1:
        value, error, freedom, n = statistics.fmean(pairs), _standard_error(pairs), len(pairs) - 1, f"{len(pairs)} paired"
    elif len(ours) > 1 and len(theirs) > 1:
        a, b = (_standard_error(list(figures.values())) for figures in (ours, theirs))
        value, error = statistics.fmean(ours.values()) - statistics.fmean(theirs.values()), math.hypot(a, b)
        freedom = error**4 / (a**4 / (len(ours) - 1) + b**4 / (len(theirs) - 1)) if error else 1
        n = f"{len(ours)}, {len(theirs)}"
    else:
        value = pairs[0] if pairs else statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
        return Difference(value, None, None, None, "1" if pairs else f"{len(ours)}, {len(theirs)}")
    if error < 1e-9:  # rounding
        error = 0.0
    half = t975(freedom) * error
    return Difference(value, error, value - half, value + half, n)


def _standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))


def t975(freedom):
    """Student's t below which 97.5 % lie; between the tabled degrees of freedom that of the next smaller number."""
    whole = max(1, int(freedom + 1e-9))
    if whole <= len(T975):
        return T975[whole - 1]
    return next((t for least, t in T975_BEYOND if whole >= least), T975[-1])


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(runs, path):
    """Four panels, a curve a run, with the last values at the curves' ends."""
    plt = figures.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axis, (name, title) in zip(axes.flat, PANELS):
        ends = []
        for i, run in enumerate(runs):
            x, y = run.curve(name)
            if x:
                colour = COLOURS[i % len(COLOURS)]
                axis.plot(x, y, color=colour, linestyle=STYLES[i // len(COLOURS) % len(STYLES)], label=run.name, linewidth=1.6,
                          marker="o" if len(x) == 1 else None)  # fmt: skip
                ends.append((y[-1], x[-1], colour))
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.09)  # room for the values at the ends
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        _label_ends(axis, ends, ".2f" if "acc" in name else ".3f")
        if not ends:
            axis.text(0.5, 0.5, "not in these files", transform=axis.transAxes, ha="center", color="gray")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 if len(runs) > 6 else 2, frameon=False)
    figures.save(figure, path, dpi=150)


def _label_ends(axis, ends, style):
    """Writes each curve's last value beside its end, pushed apart where two would cover each other."""
    low, high = axis.get_ylim()
    gap, taken = (high - low) * 0.045, {}
    for value, x, colour in sorted(ends):
        taken[x] = max(value, taken.get(x, float("-inf")) + gap)
        axis.annotate(format(value, style), (x, taken[x]), xytext=(5, 0), textcoords="offset points", color=colour, fontsize=8,
                      va="center", annotation_clip=False)  # fmt: skip


def main(argv=None):
    args = build_parser().parse_args(argv)
    runs = [Run(path) for path in find_metrics(args.runs)]
    for run in runs:
        if [other.name for other in runs].count(run.name) > 1:
            run.name = str(run.path.resolve().parent.relative_to(run.path.resolve().parents[2]))
    if args.labels:
        if len(args.labels) != len(runs):
            raise UserError(f"--labels has {len(args.labels)} names for {len(runs)} runs", status=2)
        for run, label in zip(runs, args.labels):
            run.name = label
    print_table([run.row() for run in runs])
    draw(runs, args.output)
    print(f"curves: {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
