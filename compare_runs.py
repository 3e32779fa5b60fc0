"""Compares runs: a table (means over seeds), figures, and a page that opens without network.

    python compare_runs.py runs/*/metrics.csv
    python compare_runs.py runs/* --baseline resnet20 --table results.md results.tex --output docs/curves.png
    python compare_runs.py runs/* --panel curves efficiency bars --html report.html
    python compare_runs.py runs/* --watch

Runs that differ by their seed only are one row and one curve. Other programs' metrics.csv with an epoch and one loss or
accuracy column work too. Pictures go beside the runs (runs/comparison.png), where git ignores them, unless --output says.
"""

import sys
import time
from pathlib import Path

from analysis import metrics, replicates, tables
from common import command_line
from common.errors import UserError
from common.text import printable

PANELS, X, SIZES = (
    ("curves", "error", "efficiency", "bars"),
    ("epoch", "step", "seconds"),
    ("screen", "page", "column"),
)


def build_parser():
    parser = command_line.Parser(__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", help="metrics.csv files, run directories, or patterns of either"
    )
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--group-by",
        nargs="+",
        default=["arguments"],
        metavar="NAME",
        help="arguments: runs that differ by the seed only share a row; run; or an argument's name",
    )
    group.add_argument(
        "--labels",
        nargs="+",
        metavar="TEXT",
        help="names for the rows, in the order in which their runs come",
    )
    group.add_argument(
        "--baseline",
        metavar="RUN",
        help="a row (or a run in it) that the differences are taken from",
    )
    group.add_argument("--sort", metavar="COLUMN", help="best first")
    group.add_argument("--reverse", action="store_true", help="worst first")
    group = parser.add_argument_group("table")
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help=f"from {', '.join(tables.COLUMNS)}, any argument, and * for the arguments that differ",
    )
    group.add_argument(
        "--format", choices=tuple(tables.KINDS), default="text", help="on standard output"
    )
    group.add_argument(
        "--table",
        nargs="+",
        default=[],
        metavar="FILE",
        help="also written to .txt, .md, .csv or .tex",
    )
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--panel", nargs="+", choices=PANELS, default=["curves"], help="which figures, a file each"
    )
    group.add_argument(
        "--output",
        nargs="+",
        default=[],
        metavar="FILE",
        help="the picture, as .png, .svg or .pdf; with several --panel their names are added "
        "(default: comparison.png beside the runs)",
    )
    group.add_argument("--no-figures", action="store_true", help="the table only")
    group.add_argument("--x", choices=X, default="epoch", help="what curves are drawn over")
    group.add_argument(
        "--smooth",
        type=command_line.number(int, low=1),
        default=1,
        metavar="N",
        help="evaluations to average over",
    )
    group.add_argument(
        "--log", action="store_true", help="losses and error rates on a logarithmic axis"
    )
    group.add_argument(
        "--size", choices=SIZES, default="screen", help="a page's width, or a column's of two"
    )
    group.add_argument(
        "--html",
        metavar="FILE",
        help="also a page: sortable table, interactive curves, example pictures",
    )
    parser.add_argument(
        "--watch",
        type=command_line.number(above=0),
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="do it again whenever the runs have gone on (looked for every 10 s)",
    )
    return parser


def rows(args):
    """The groups of runs, named as --labels has them, and the one that is the baseline or None. Raises UserError."""
    runs = metrics.load_runs(args.runs)
    groups = replicates.group(runs, args.group_by)
    if args.labels:
        if len(args.labels) != len(groups):
            several = " (--group-by run makes one of each run)" * (len(runs) > len(groups))
            raise UserError(
                f"--labels has {len(args.labels)} names for {len(groups)} rows{several}", status=2
            )
        for group, label in zip(groups, args.labels):
            group.name = printable(label)
    if not args.baseline:
        return groups, None
    wanted = str(args.baseline).rstrip("/")
    for group in groups:
        names = {
            name for run in group.runs for name in (run.name, str(run.path), str(run.path.parent))
        }
        if wanted == group.name or wanted in names:
            return groups, group
    raise UserError(
        f"--baseline {wanted}: the rows are {', '.join(group.name for group in groups)}", status=2
    )


def places(args, runs):
    """{panel: files to draw it to}."""
    default = {run.path.resolve().parent for run in runs}
    if len(default) > 1:
        default = {path.parent for path in default}
    here = default.pop() if len(default) == 1 else Path.cwd()
    here = Path(*here.parts[len(Path.cwd().parts) :]) if here.is_relative_to(Path.cwd()) else here
    files = [Path(name) for name in args.output] or [here / "comparison.png"]
    if len(args.panel) == 1:
        return {args.panel[0]: files}
    return {
        panel: [file.with_name(f"{file.stem}-{panel}{file.suffix}") for file in files]
        for panel in args.panel
    }


def check_places(args):
    """Raises UserError for what could not be written, before anything is."""
    if not args.no_figures and args.output:
        from analysis import figures

        figures.check_places(args.output)
    wanted = [("--table", path, tuple(tables.KINDS.values())) for path in args.table]
    for option, path, kinds in wanted + [("--html", args.html, (".html",))] * bool(args.html):
        if not path.endswith(kinds) or not Path(path).parent.is_dir():
            raise UserError(
                f"{option} {path}: it takes a {' or '.join(kinds)} file in a directory that is there",
                status=2,
            )


def compare(args):
    """Everything once."""
    groups, baseline = rows(args)
    table = tables.compare(groups, args.columns, baseline)
    if args.sort or args.reverse:
        table.sort(args.sort or "test", args.reverse)
    print(
        table.render(args.format, tables.terminal_width()), end="", flush=True
    )  # first: figures take seconds
    from analysis import figures

    for path in map(Path, args.table):
        kind = next(kind for kind, suffix in tables.KINDS.items() if suffix == path.suffix)
        figures.write(path, table.render(kind).encode())
    if not args.no_figures:
        from analysis import curves

        for panel, files in places(args, [run for group in groups for run in group.runs]).items():
            curves.draw(
                groups, files, panel, x=args.x, smooth=args.smooth, log=args.log, size=args.size
            )
            print(f"{panel}: {' '.join(map(str, files))}", file=sys.stderr)
    if args.html:
        from analysis import report

        text, notes = report.page(groups, table)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        figures.write(args.html, text.encode())
        print(f"page: {args.html}", file=sys.stderr)


def watch(args):
    """Compares again whenever a file has changed, until Ctrl-C."""
    before = None
    while True:
        files = [
            file
            for path in metrics.find_metrics(args.runs)
            for file in (path, path.with_name("summary.json"))
        ]
        now = {file: file.stat().st_mtime_ns for file in files if file.is_file()}
        if now != before:
            if sys.stdout.isatty():
                print("\033[2J\033[H", end="")
            compare(args)
            before = now
        time.sleep(args.watch)


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_places(args)
    (watch if args.watch else compare)(args)
    return 0


if __name__ == "__main__":
    command_line.run(main)
