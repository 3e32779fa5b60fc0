"""Compares runs: a table of means over seeds, figures, and an HTML page that opens without network.

    python compare_runs.py runs/*/metrics.csv
    python compare_runs.py runs/* --baseline cifar10-resnet20 --table results.md --output curves.png
    python compare_runs.py runs/* --panel curves efficiency bars --html report.html
    python compare_runs.py runs --against documents --panel family --show
    python compare_runs.py runs --watch

A directory without a run stands for the runs in it, its sweeps and its campaigns. Runs that differ
by their seed only share one row and one curve. metrics.csv files of other programs need an epoch
and a loss or an accuracy. Figures are written into the directory of the runs (runs/comparison.png),
where git ignores them, unless --output is given.
"""

import os
import sys
import time
from pathlib import Path

from analysis import figures, formats, metrics, replicates, tables
from analysis.panels import PANELS, SIZES, X_TITLES
from common import command_line
from common.errors import UserError
from common.text import printable


def build_parser():
    parser = command_line.Parser(__doc__.split("\n")[0])
    at_least_one, positive = command_line.number(int, low=1), command_line.number(above=0)
    add = parser.add_argument
    add("runs", nargs="+", help="metrics.csv files, run directories, or patterns of either")
    seconds = dict(type=positive, nargs="?", const=10.0, metavar="SECONDS")
    add("--watch", **seconds, help="compare again when a run has changed; looks every 10 s")

    add = parser.add_argument_group("rows").add_argument
    by = "run, arguments (runs that differ by the seed only share a row), or names of arguments"
    grouped = dict(nargs="+", default=["arguments"], metavar="NAME")
    add("--group-by", **grouped, help=by).shown_default = "arguments"
    add("--labels", nargs="+", metavar="TEXT", help="names of the rows, one for each")
    add("--baseline", metavar="RUN", help="row, or a run in it, that differences are taken from")
    documents = "add the accuracies of analysis/documents.py, with their epochs and the difference"
    add("--against", choices=("documents",), help=documents)
    add("--sort", metavar="COLUMN", help="sort by a column, best first")
    add("--reverse", action="store_true", help="with --sort: worst first")

    add = parser.add_argument_group("table").add_argument
    names = f"from {', '.join(tables.COLUMNS)}, any argument (not seed, device, ...), and '*' for "
    names += "the arguments that differ"
    add("--columns", nargs="+", metavar="NAME", help=names)
    formats = tuple(tables.SUFFIXES)
    add("--format", choices=formats, default="text", help="format on standard output")
    suffixes = f"also write the table to files ({', '.join(tables.SUFFIXES.values())})"
    add("--table", nargs="+", default=[], metavar="FILE", help=suffixes)

    add = parser.add_argument_group("figures").add_argument
    panels = dict(choices=tuple(PANELS), default=["curves"])
    which = "which figures to draw, one file each"
    add("--panel", nargs="+", **panels, help=which).shown_default = "curves"
    output = (
        f"files of the figure ({', '.join(figures.SUFFIXES)}); with several --panel each "
        "name is appended (default: comparison.png beside the runs)"
    )
    add("--output", nargs="+", default=[], metavar="FILE", help=output)
    add("--no-figures", action="store_true", help="only the table")
    add("--show", action="store_true", help="also open the figures in windows")
    add("--x", choices=tuple(X_TITLES), default="epoch", help="x axis of the curves")
    add("--smooth", type=at_least_one, default=1, metavar="N", help="average over N evaluations")
    add("--log", action="store_true", help="logarithmic axis for losses and error rates")
    size = "for a screen, a page's width, or one of two columns"
    add("--size", choices=tuple(SIZES), default="screen", help=size)
    page = "also write an HTML page: table, curves, example images (needs pip install plotly)"
    add("--html", metavar="FILE", help=page)
    return parser


def load_groups(args):
    """(groups of runs, the group that is the baseline or None). Raises UserError."""
    runs = metrics.load_runs(args.runs)
    add_families(runs)
    groups = replicates.group(runs, args.group_by)
    if args.labels:
        if len(args.labels) != len(groups):
            hint = "; --group-by run makes a row of each run" if len(runs) > len(groups) else ""
            counts = f"{len(args.labels)} names for {len(groups)} rows"
            raise UserError(f"--labels has {counts}{hint}", status=2)
        if len(set(args.labels)) < len(args.labels):
            raise UserError("--labels must differ from one another", status=2)
        for group, label in zip(groups, args.labels):
            group.name = printable(label)
    if not args.baseline:
        return groups, None
    path = Path(args.baseline).resolve()
    for group in groups:
        paths = {path for run in group.runs for path in (run.path, run.path.parent)}
        named = args.baseline in (group.name, *(run.name for run in group.runs))
        if named or path in {path.resolve() for path in paths}:
            return groups, group
    names = ", ".join(group.name for group in groups)
    raise UserError(f"--baseline {args.baseline}: the rows are {names}", status=2)


def add_families(runs):
    """The family of the model in runs of earlier versions, which didn't record it."""
    names = {run: run.arguments.get("model") for run in runs if not run.family}
    if any(isinstance(name, str) for name in names.values()):
        import models  # takes seconds

        for run, name in names.items():
            run.family = models.family(name) if isinstance(name, str) else ""


def figure_files(args, groups):
    """{panel: files to write it to}."""
    files = [Path(name) for name in args.output] or [_default_file(groups)]
    if len(args.panel) == 1:
        return {args.panel[0]: files}
    return {panel: [f.with_stem(f"{f.stem}-{panel}") for f in files] for panel in args.panel}


def _default_file(groups):
    """comparison.png in the directory of a single run, or in the nearest that holds all runs."""
    directories = {run.path.parent for group in groups for run in group.runs}
    if len(directories) > 1:
        directories = {directory.parent for directory in directories}
    try:
        directory = Path(os.path.commonpath(directories))
    except ValueError:  # some are absolute, some relative
        directory = Path()
    if directory == Path(directory.anchor):  # nothing in common but the root
        directory = Path()
    return directory / "comparison.png"


def check_files(args):
    """Raises UserError for a file that can't be written, before any work is done."""
    if args.reverse and not args.sort:
        raise UserError("--reverse needs --sort COLUMN", status=2)
    if args.show and (args.no_figures or args.watch):
        other = "--no-figures" if args.no_figures else "--watch"
        raise UserError(f"--show can't be used with {other}", status=2)
    if args.no_figures and args.output:
        raise UserError("--output names a figure and can't be used with --no-figures", status=2)
    if not args.baseline and tables.DIFFERENCE_COLUMNS.keys() & set(args.columns or ()):
        raise UserError("--columns: differences need --baseline RUN", status=2)
    if not args.no_figures:
        figures.check_places(args.output)
    outputs = [("--table", path, tuple(tables.SUFFIXES.values())) for path in args.table]
    if args.html:
        outputs.append(("--html", args.html, (".html",)))
    metrics_files = {path.resolve() for path in metrics.find_metrics(args.runs)}
    for path in map(Path, args.table):
        if path.name == "metrics.csv" or path.resolve() in metrics_files:
            raise UserError(f"--table {path}: would replace the metrics of a run", status=2)
    for option, path, suffixes in outputs:
        if Path(path).suffix not in suffixes or not Path(path).parent.is_dir():
            kind = f"a {' or '.join(suffixes)} file in an existing directory"
            raise UserError(f"{option} {path}: must be {kind}", status=2)
    if args.html:
        from analysis import report

        report.require_plotly()


def compare(args):
    groups, baseline = load_groups(args)
    if not args.no_figures:
        for files in figure_files(args, groups).values():
            figures.check_places(files)
    table = tables.compare(groups, args.columns, baseline, args.against)
    if args.sort:
        table.sort(args.sort, args.reverse)
    # Before the figures, which take seconds.
    print(table.render(args.format, formats.terminal_width()), end="", flush=True)
    for path in map(Path, args.table):
        kind = next(kind for kind, suffix in tables.SUFFIXES.items() if suffix == path.suffix)
        figures.write(path, table.render(kind).encode())
    if not args.no_figures:
        draw(args, groups)
    if args.html:
        from analysis import report

        text, notes = report.page(groups, table)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        figures.write(args.html, text.encode())
        print(f"page: {args.html}", file=sys.stderr)
    if args.show:
        figures.show([file for files in figure_files(args, groups).values() for file in files])


def draw(args, groups):
    from analysis import curves

    options = dict(x=args.x, smooth=args.smooth, log=args.log, size=args.size)
    options["show"] = args.show and figures.has_display()
    for panel, files in figure_files(args, groups).items():
        curves.draw(groups, files, panel, **options)
        print(f"{panel}: {' '.join(map(str, files))}", file=sys.stderr)


def watch(args):
    """Compares again whenever a file has changed, until Ctrl-C."""
    before = None
    while True:
        metrics_files = metrics.find_metrics(args.runs)
        files = [*metrics_files, *(path.with_name("summary.json") for path in metrics_files)]
        now = {file: file.stat().st_mtime_ns for file in files if file.is_file()}
        if now != before:
            if sys.stdout.isatty():
                print("\033[2J\033[H", end="")  # clear the screen
            try:
                compare(args)
            except metrics.NoEpochYet as waiting:
                print(waiting, flush=True)
            before = now
        time.sleep(args.watch)


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_files(args)
    if args.watch:
        watch(args)
    else:
        compare(args)
    return 0


if __name__ == "__main__":
    command_line.run(main)
