"""Compares runs: a table on the terminal, and four panels (training and evaluation, loss and accuracy) as a picture.

    python compare_runs.py runs/*/metrics.csv
    python compare_runs.py runs/a runs/b --labels plain residual --output docs/plain.png

Reads metrics.csv by column names, so other programs' files with an epoch and one loss or accuracy column work too.
What a run was selected on, its parameters and its time come from summary.json beside it, where there is one.
"""

import glob
import json
import sys
from pathlib import Path

import cli
import rundir
from errors import UserError

PANELS = (("train_loss", "training loss"), ("eval_loss", "evaluation loss"),
          ("train_acc", "training accuracy (%)"), ("eval_acc", "evaluation accuracy (%)"))  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def build_parser():
    parser = cli.Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="metrics.csv files, run directories, or patterns of either")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="names for the runs, in their order")
    parser.add_argument("--output", default="comparison.png", metavar="FILE", help="the picture: .png, .svg or .pdf")
    return parser


def find_metrics(patterns):
    """The metrics.csv of each path or pattern, once, in order. Raises UserError."""
    found = []
    for pattern in patterns:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]
        paths = [Path(path) / "metrics.csv" if Path(path).is_dir() else Path(path) for path in paths]
        missing = [path for path in paths if not path.is_file()]
        if missing or not paths:
            raise UserError(f"there are no metrics at {missing[0] if missing else pattern}", status=2)
        found += [path for path in paths if path not in found]
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
        self.summary = _read_summary(path.parent / "summary.json")

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
            "images/s": f"{sorted(speed)[len(speed) // 2]:.0f}" if speed else "",
        }


def _show(value, style):
    return "" if value is None else format(value, style)


def _float(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _read_summary(path):
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def print_table(rows):
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for cells in ({key: key for key in widths}, *rows):
        print("  ".join(cells[key].ljust(w) if key in ("run", "status") else cells[key].rjust(w) for key, w in widths.items()))


def draw(runs, path):
    """Four panels, a curve a run, with the last values at the curves' ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path}: {error}", status=2) from error
    finally:
        plt.close(figure)


def _label_ends(axis, ends, style):
    """Writes each curve's last value beside its end, pushed apart where two would cover each other."""
    low, high = axis.get_ylim()
    gap, last = (high - low) * 0.045, float("-inf")
    for value, x, colour in sorted(ends):
        last = max(value, last + gap)
        axis.annotate(format(value, style), (x, last), xytext=(5, 0), textcoords="offset points", color=colour, fontsize=8,
                      va="center", annotation_clip=False)  # fmt: skip


def main(argv=None):
    args = build_parser().parse_args(argv)
    runs = [Run(path) for path in find_metrics(args.runs)]
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
