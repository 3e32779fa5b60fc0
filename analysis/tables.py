"""Tables of runs: as text, Markdown, CSV and LaTeX.

    table = compare(groups, baseline=groups[0])
    print(table.render("markdown"))

What runs are called comes from files that others wrote: each kind of table escapes what it would obey.
"""

import csv
import io
import re
import shutil
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from analysis import replicates
from common.errors import UserError
from common.text import printable

KINDS = {"text": ".txt", "markdown": ".md", "csv": ".csv", "latex": ".tex"}


class Column(NamedTuple):
    """title; style: a format of the mean, "time" for seconds, "" for text; higher_first: how --sort orders it."""

    title: str
    style: str = ""
    higher_first: bool = False


COLUMNS = {
    "run": Column("run"),
    "experiment": Column("experiment"),  # sweep.py's name for it
    "status": Column("status"),
    "n": Column("n", ",.0f", True),
    "epochs": Column("epochs", ",.0f"),
    "last": Column("last %", ".2f", True),
    "best": Column("best %", ".2f", True),
    "best_epoch": Column("best epoch", ".0f"),
    "on": Column("curve on"),
    "test": Column("test %", ".2f", True),
    "top5": Column("top-5 %", ".2f", True),
    "of": Column("test % is of"),
    "parameters": Column("parameters", ",.0f"),
    "gmacs": Column("GMACs", ".3f"),
    "seconds": Column("time", "time"),
    "speed": Column("images/s", ",.0f", True),
    "to90": Column("to 90 % of final", "time"),
    "to95": Column("to 95 % of final", "time"),
    "memory": Column("memory MB", ",.0f"),
    "train": Column("last train %", ".2f", True),
    "difference": Column("difference", "+.2f", True),
    "error": Column("std error", ".2f"),
    "interval": Column("95 % interval"),
    "verdict": Column("verdict"),
}
DEFAULT = (
    "run",
    "status",
    "n",
    "test",
    "top5",
    "of",
    "epochs",
    "last",
    "best",
    "best_epoch",
    "on",
    "parameters",
    "gmacs",
    "seconds",
    "speed",
    "to90",
    "to95",
    "*",
)
OF_BASELINE = ("difference", "error", "interval", "verdict")


@dataclass
class Table:
    """columns: Column by key; rows: texts, numbers, replicates.Figure or None by key; common: arguments that all rows share;
    notes: sentences that whoever reads the figures must know."""

    columns: dict
    rows: list
    common: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    def sort(self, key, reverse=False):
        """Sorts by a column, best first, rows without a value last. Raises UserError."""
        if key not in self.columns:
            raise UserError(f"--sort {key}: the columns are {', '.join(self.columns)}", status=2)
        having = [row for row in self.rows if row[key] is not None]
        having.sort(
            key=lambda row: _sortable(row[key]), reverse=self.columns[key].higher_first != reverse
        )
        self.rows = having + [row for row in self.rows if row[key] is None]

    def cells(self):
        """The rows as texts by title; a column of times has one unit, which the title names."""
        formats = {}
        for key, column in self.columns.items():
            title, style, scale = column.title, column.style, 1
            if style == "time":
                longest = max(
                    (_mean(row[key]) for row in self.rows if row[key] is not None), default=0
                )
                unit, scale, style = (
                    ("s", 1, ",.0f")
                    if longest < 600
                    else ("min", 60, ".1f")
                    if longest < 7200
                    else ("h", 3600, ".1f")
                )
                title += f" ({unit})"
            formats[key] = title, style, scale
        return [
            {title: show(row[key], style, scale) for key, (title, style, scale) in formats.items()}
            for row in self.rows
        ]

    def render(self, kind, width=None):
        """The table as text, markdown, csv or latex, with the common arguments said once (not in CSV, which has no room).

        width: characters in a line of text, if they are limited.
        """
        if kind == "csv":
            return self._csv()
        said = self.said()
        if kind == "latex":
            return "".join(f"% {sentence}\n" for sentence in said) + latex_table(self.cells())
        if kind == "text":
            return text_table(self.cells(), width) + "".join(f"\n{sentence}\n" for sentence in said)
        return markdown_table(self.cells()) + "".join(
            f"\n{markdown_text(sentence)}\n" for sentence in said
        )

    def said(self):
        """The sentences below the table: what the runs have in common, and the notes."""
        given = {
            key: value for key, value in self.common.items() if value is not None and value != []
        }
        shared = printable(", ".join(f"{key} {show(value)}" for key, value in given.items()))
        return [f"The same in all: {shared}."] * bool(shared) + self.notes

    def _csv(self):
        """Numbers as they are, in a column each: mean, standard deviation (over seeds), seconds not rounded."""
        spread = {
            key
            for key in self.columns
            if any(
                isinstance(row[key], replicates.Figure) and row[key].std is not None
                for row in self.rows
            )
        }
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                name
                for key in self.columns
                for name in ([key, f"{key}_std"] if key in spread else [key])
            ]
        )
        for row in self.rows:
            cells = []
            for key in self.columns:
                value = row[key]
                std = value.std if isinstance(value, replicates.Figure) else None
                cells += [_csv_cell(_mean(value))] + [_csv_cell(std)] * (key in spread)
            writer.writerow(cells)
        return text.getvalue()


def compare(groups, columns=None, baseline=None):
    """Table of replicates.Group, a row each. columns: keys of COLUMNS or arguments' names ("*": those that differ).

    baseline: the group that differences are taken from. Raises UserError for an unknown column.
    """
    differing, common = replicates.arguments(groups)
    wanted = list(columns or DEFAULT)
    if baseline and not set(OF_BASELINE) & set(wanted):
        wanted += OF_BASELINE
    keys = dict.fromkeys(key for name in wanted for key in (differing if name == "*" else [name]))
    known = {
        **COLUMNS,
        **{name: Column(printable(name)) for name in [*differing, *common] if name not in COLUMNS},
    }
    for key in keys:
        if key not in known:
            raise UserError(
                f"--columns {key}: there are {', '.join(known)}, and * (the arguments that differ)",
                status=2,
            )
    found = {key: known[key] for key in keys}
    rows = [
        {key: _value(group, key, baseline, arguments=(*differing, *common)) for key in found}
        for group in groups
    ]
    if not columns:  # what no run has would be an empty column; one run has no spread
        empty = {
            key
            for key in found
            if key not in ("run", "status") and all(row[key] in (None, "") for row in rows)
        }
        empty |= {"n"} if all(len(group.runs) == 1 for group in groups) else set()
        found = {key: column for key, column in found.items() if key not in empty}
    return Table(found, rows, replicates.noteworthy(groups, common), list(_notes(groups, baseline)))


def _notes(groups, baseline):
    for group in groups:
        if group.repeats:
            yield printable(
                f"{group.name}: n counts seeds; of runs that repeat one, the last counts."
            )
    data = dict.fromkeys(str(g.argument("dataset")) for g in groups if g.argument("dataset"))
    if len(data) > 1:
        yield printable(
            f"These are several data sets ({', '.join(data)}): accuracies compare within one only."
        )
    if baseline:
        yield printable(
            f"Differences are from {baseline.name}, in points of test accuracy, over the seeds that both "
            "have (paired), else between the means; intervals are 95 %, by Student's t."
        )


def _value(group, key, baseline, arguments):
    if key in OF_BASELINE:
        if (
            baseline
            and None not in (group.test_images, baseline.test_images)
            and group.test_images != baseline.test_images
        ):
            return "other test pictures" if key == "verdict" else None
        found = (
            replicates.difference(group.tests, baseline.tests)
            if baseline and group is not baseline
            else None
        )
        if found is None or (found.error is None and key in ("error", "interval")):
            return None
        if key == "verdict" and not (group.whole and baseline.whole):
            return "not finished"
        return {
            "difference": found.value,
            "error": found.error,
            "verdict": found.verdict,
            "interval": found.error is not None and f"{found.low:+.2f} to {found.high:+.2f}",
        }[key]
    if key == "train":
        return replicates.summarize(
            [(run.curve("train_acc")[1] or (None,))[-1] for run in group.counted]
        )
    texts = {
        "run": group.name,
        "experiment": group.name,
        "status": group.status,
        "n": len(group.counted),
        "on": group.measured_on,
        "of": printable(group.reported),
    }
    if key in texts:
        return texts[key]
    if key in COLUMNS and key != "epochs" or key == "epochs" and group.figure(key):
        return group.figure(key)
    value = group.argument(key) if key in arguments else None
    return (
        value
        if value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
        else _argument(value)
    )


def _argument(value):
    if isinstance(value, list):
        return printable(" ".join(map(str, value))) or "none"
    return printable(
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )


def _mean(value):
    return value.mean if isinstance(value, replicates.Figure) else value


def _sortable(value):
    value = _mean(value)
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value).lower())


def show(value, style="", scale=1):
    """A cell: text as it is, a number by its style, a Figure as "mean ± sample standard deviation", nothing for None."""
    if value is None:
        return ""
    if isinstance(value, replicates.Figure):
        mean = format(value.mean / scale, style)
        varies = value.std and not (style in (",.0f", ".0f") and value.std / scale < 0.5)
        return (
            f"{mean} ± {format(value.std / scale, style)}"
            if varies or value.std == 0 and style == ".2f"
            else mean
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            format(value / scale, style)
            if style
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
    return _argument(value)


# ---- rows of texts, with the same keys in each -----------------------------------------------------------------------


def _is_numeric(rows, key):
    return all(re.match(r"[+-]?[\d.,]+|$", row[key]) for row in rows) and any(
        row[key] for row in rows
    )


def text_table(rows, width=None):
    """Columns side by side; those beyond `width` characters (a terminal's) follow below, with the first column again."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    numeric = {key: _is_numeric(rows, key) for key in rows[0]}
    first, *rest = widths
    blocks, used = [[first]], widths[first]
    for key in rest:
        if width and used + 2 + widths[key] > width and len(blocks[-1]) > 1:
            blocks.append([first])
            used = widths[first]
        blocks[-1].append(key)
        used += 2 + widths[key]
    tables = []
    for keys in blocks:
        lines = [{key: key for key in keys}, *rows]
        tables.append(
            "".join(
                "  ".join(
                    f"{row[key]:>{widths[key]}}" if numeric[key] else f"{row[key]:<{widths[key]}}"
                    for key in keys
                ).rstrip()
                + "\n"
                for row in lines
            )
        )
    return "\n".join(tables)


def terminal_width():
    """Characters in a line of the terminal, or None where the output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(rows):
    print(text_table(rows, terminal_width()), end="")


def markdown_table(rows):
    lines = [
        map(markdown_text, rows[0]),
        ["--:" if _is_numeric(rows, key) else ":--" for key in rows[0]],
        *([markdown_text(cell) for cell in row.values()] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def markdown_text(text):
    """Text that Markdown shows as it is."""
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    text = re.sub(
        r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text
    )  # inside a word it means nothing
    return (
        text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        if re.search("[<>&]", text)
        else text
    )


def latex_table(rows):
    """A tabular in booktabs' manner (\\usepackage{booktabs})."""
    head = " & ".join(_latex(key) for key in rows[0])
    body = [" & ".join(_latex(cell) for cell in row.values()) for row in rows]
    columns = "".join("r" if _is_numeric(rows, key) else "l" for key in rows[0])
    lines = [
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        f"{head} \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in body),
    ]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def _latex(text):
    return "".join(LATEX.get(c, c) for c in text)


def _csv_cell(value):
    """A text that a spreadsheet would run as a formula gets a quote before it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if (
        isinstance(value, str)
        and re.match(r"[=+@\t-]", value)
        and not re.fullmatch(r"[+-][\d.]+( to [+-][\d.]+)?", value)
    ):
        return f"'{value}"
    return value
