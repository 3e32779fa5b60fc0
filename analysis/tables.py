"""Tables of groups of runs: their columns, and what stands in each row.

    table = compare(groups, baseline=groups[0])
    print(table.render("markdown"))

Names and arguments come from files that others wrote: each format escapes its special characters.
"""

import csv
import io
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from analysis import differences, documents, replicates
from analysis.formats import MISSING, latex_table, markdown_table, markdown_text, text_table
from analysis.replicates import MeanStd
from common.errors import UserError
from common.text import printable

SUFFIXES = {"text": ".txt", "markdown": ".md", "csv": ".csv", "latex": ".tex"}


class Column(NamedTuple):
    """style: a format for numbers, or "time" for seconds; higher_first: how --sort orders it."""

    title: str
    style: str = ""
    higher_first: bool = False


# Numbers are the runs' scalars (metrics.Run.scalars), except for n and the differences.
DEFAULT_COLUMNS = {
    "run": Column("run"),
    "family": Column("family"),
    "status": Column("status"),
    "n": Column("n", ",.0f", True),
    "test": Column("test %", ".2f", True),
    "top5": Column("top-5 %", ".2f", True),
    "tta": Column("test % with TTA", ".2f", True),
    "train_clean": Column("train % (clean)", ".2f", True),
    "of": Column("test % is of"),
    "epochs": Column("epochs", ",.0f"),
    "last": Column("last %", ".2f", True),
    "best": Column("best %", ".2f", True),
    "best_epoch": Column("best epoch", ".0f"),
    "on": Column("curve on"),
    "parameters": Column("parameters", ",.0f"),
    "gmacs": Column("GMACs", ".3f"),
    "per_million": Column("test % per million parameters", ".2f", True),
    "seconds": Column("training time", "time"),
    "epoch_seconds": Column("time per epoch (s)", ",.1f"),
    "speed": Column("images/s", ",.0f", True),
    "to90": Column("to 90 % of final", "time"),
    "to95": Column("to 95 % of final", "time"),
}
DIFFERENCE_COLUMNS = {
    "difference": Column("difference", "+.2f", True),
    "error": Column("std error", ".2f"),
    "interval": Column("95 % interval"),
    "verdict": Column("verdict"),
}
DOCUMENTED_COLUMNS = {
    "documented": Column("documented %", ".2f", True),
    "documented_epochs": Column("documented epochs", ",.0f"),
    "from_documented": Column("ours - documented", "+.2f", True),
    "in_epochs": Column("in epochs"),
}
OTHER_COLUMNS = {
    "experiment": Column("experiment"),
    "error_rate": Column("error %", ".2f"),
    "memory": Column("memory MiB", ",.0f"),
    "train": Column("last train %", ".2f", True),
}
TIMES = {"seconds", "epoch_seconds", "speed", "to90", "to95"}
COLUMNS = DEFAULT_COLUMNS | DIFFERENCE_COLUMNS | DOCUMENTED_COLUMNS | OTHER_COLUMNS


@dataclass
class Table:
    """columns: {key: Column}; rows: {key: string, number, MeanStd or None} each.

    sentences: what a reader must know, shown below the table (not in CSV).
    """

    columns: dict
    rows: list
    sentences: list = field(default_factory=list)

    def sort(self, key, reverse=False):
        """Sorts by a column, the best first and rows without a value last. Raises UserError."""
        if key not in self.columns:
            raise UserError(f"--sort {key}: the columns are {', '.join(self.columns)}", status=2)
        known = [row for row in self.rows if row[key] is not None]
        highest_first = self.columns[key].higher_first != reverse
        known.sort(key=lambda row: _sort_key(row[key]), reverse=highest_first)
        self.rows = known + [row for row in self.rows if row[key] is None]

    def cells(self):
        """The rows as {title: text}. The title of a column of times names their unit."""
        texts = [{} for _ in self.rows]
        for key, (title, style, _) in self.columns.items():
            scale = 1
            if style == "time":
                unit, scale, style = _time_unit([mean(row[key]) for row in self.rows])
                title += f" ({unit})"
            for row, text in zip(self.rows, texts):
                text[title] = show(row[key], style, scale)
        return texts

    def render(self, kind, width=None):
        """The table as text, markdown, csv or latex. width: limit of a line of text, if any."""
        if kind == "csv":
            return self._csv()
        if kind == "latex":
            comments = "".join(f"% {sentence}\n" for sentence in self.sentences)
            return comments + latex_table(self.cells())
        if kind == "markdown":
            below = "".join(f"\n{markdown_text(sentence)}\n" for sentence in self.sentences)
            return markdown_table(self.cells()) + below
        below = "".join(f"\n{sentence}\n" for sentence in self.sentences)
        return text_table(self.cells(), width) + below

    def _csv(self):
        """Numbers without units and not rounded; standard deviations in columns of their own."""
        headings = []
        for key in self.columns:
            headings.append(key)
            if any(_std(row[key]) is not None for row in self.rows):
                headings.append(f"{key}_std")
        text = io.StringIO()
        writer = csv.DictWriter(text, headings, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            means = {key: _csv_cell(mean(row[key])) for key in self.columns}
            stds = {f"{key}_std": _csv_cell(_std(row[key])) for key in self.columns}
            writer.writerow({key: text for key, text in (means | stds).items() if key in headings})
        return text.getvalue()


def compare(groups, columns=None, baseline=None, against=None):
    """Table with a row for each replicates.Group.

    columns: keys of COLUMNS, names of arguments, or "*" for the arguments that differ.
    baseline: the group that differences are taken from. against: "documents" adds what
    documents.py has. Raises UserError for an unknown column.
    """
    differing, common = replicates.compare_arguments(groups)
    wanted = columns or [*DEFAULT_COLUMNS, "*"]
    if baseline and not DIFFERENCE_COLUMNS.keys() & wanted:
        wanted = [*wanted, *DIFFERENCE_COLUMNS]
    if against == "documents" and not DOCUMENTED_COLUMNS.keys() & wanted:
        wanted = [*wanted, *DOCUMENTED_COLUMNS]
    wanted = [name for key in wanted for name in (differing if key == "*" else [key])]
    arguments = [*differing, *common]
    known = COLUMNS | {key: Column(printable(key)) for key in arguments if key not in COLUMNS}
    for key in wanted:
        if key not in known:
            names = f"{', '.join(known)}, or * for the arguments that differ"
            raise UserError(f"--columns {key}: must be one of {names}", status=2)
    rows = [_row(group, baseline, arguments) for group in groups]
    if not wanted:
        raise UserError("--columns *: no argument differs between these runs", status=2)
    if not columns:
        filled = {key for row in rows for key, value in row.items() if value not in (None, "")}
        wanted = [key for key in wanted if key in filled | {"run", "status", "documented"}]
        if all(len(group.runs) == 1 for group in groups):
            wanted.remove("n")
    return Table(
        columns={key: known[key] for key in wanted},
        rows=[{key: row.get(key) for key in wanted} for row in rows],
        sentences=list(_sentences(groups, baseline, against, common, wanted)),
    )


def _row(group, baseline, arguments):
    """All values of a group: its arguments, scalars and the rest of COLUMNS."""
    row = {name: _argument(group.argument(name)) for name in arguments}
    scalars = {key: group.scalar(key) for key in COLUMNS}
    if scalars["epochs"] is None:  # not even one epoch is finished: the planned number
        scalars["epochs"] = row.get("epochs")
    row |= scalars
    row |= {"run": group.name, "experiment": group.name, "status": group.status}
    row |= {"n": len(group.counted), "on": group.measured_on, "of": printable(group.reported)}
    row["family"] = group.family
    return row | _difference(group, baseline) | _from_documents(group, scalars["epochs"])


def _difference(group, baseline):
    """The values of DIFFERENCE_COLUMNS, as far as there are any."""
    if baseline is None or group is baseline:
        return {}
    if len(replicates.test_images([group, baseline])) > 1:
        return {"verdict": "other test images"}
    difference = differences.difference(group.tests, baseline.tests)
    if difference is None:
        return {}
    if group.varying or baseline.varying:  # no error is known of runs that are not of one kind
        return {"difference": difference.value, "verdict": "not only seeds differ"}
    both_finished = group.is_finished and baseline.is_finished
    return {
        "difference": difference.value,
        "error": difference.error,
        "interval": difference.interval or None,
        "verdict": difference.verdict if both_finished else "not finished",
    }


def _from_documents(group, epochs):
    """The values of DOCUMENTED_COLUMNS, as far as there are any. epochs: MeanStd or a number."""
    documented, accuracy = documents.find(group.argument), group.accuracy
    if documented is None:
        return {}
    values = {"documented": documented.accuracy, "documented_epochs": documented.epochs}
    if accuracy is None:
        return values
    values["from_documented"] = accuracy.mean - documented.accuracy
    values["in_epochs"] = f"{mean(epochs):.0f} of {documented.epochs}"
    return values


def _sentences(groups, baseline, against, common, columns):
    """What a reader of the table must know: common arguments, repeated seeds, other test images."""
    common = replicates.without_defaults(common, groups)
    shown = [f"{key} {show(value)}" for key, value in common.items() if value not in (None, [])]
    if shown:
        known = all(run.arguments for group in groups for run in group.runs)
        which = "in all" if known else "in all with a config.json"
        yield printable(f"The same {which}: {', '.join(shown)}.")
    for group in groups:
        if group.repeats:
            yield printable(f"{group.name}: of runs that repeat a seed, only the last counts.")
        if group.varying:
            names = ", ".join(group.varying[:3]) + (", …" if len(group.varying) > 3 else "")
            yield printable(f"{group.name}: its runs differ not only in the seed ({names}).")
        for name in ("precision", "device", "threads"):
            values = replicates.conditions([group], name)
            if len(values) > 1:
                yield printable(f"{group.name}: its runs differ in {name} ({', '.join(values)}).")
    for name in replicates.MACHINE:
        values = replicates.conditions(groups, name)
        if len(values) > 1 and TIMES & set(columns):
            yield printable(f"The runs differ in {name} ({', '.join(values)}); times depend on it.")
    test_images = replicates.test_images(groups)
    if len(test_images) > 1:
        names = "; ".join(test_images)
        yield printable(f"Accuracies on different test images ({names}) can't be compared.")
    if "best" in columns and any("test" in group.measured_on for group in groups):
        yield "The best % is the highest of the curve on test images, so it was selected on them."
    if baseline:
        yield printable(
            f"Differences are from {baseline.name}, in points of accuracy: of the seeds that both "
            "have or, if they share no seed or just one of several, of the means. Intervals are "
            "95 %, by Student's t."
        )
    if against == "documents":
        yield (
            "Documented accuracies are of the same dataset, model, input size, kind of "
            "augmentation and starting weights, as far as the documents say; a row without one "
            "has no such experiment."
        )


def difference_cells(ours, theirs, measure, difference):
    """{title: text} of a difference that differences.compare yields."""
    return {
        "experiment": ours.name,
        "against": theirs.name,
        "accuracy on": differences.MEASURES[measure],
        "difference": f"{difference.value:+.2f}",
        "95 % interval": difference.interval,
        "n": difference.n,
        "verdict": difference.verdict,
    }


def mean(value):
    return value.mean if isinstance(value, MeanStd) else value


def _std(value):
    return value.std if isinstance(value, MeanStd) else None


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sort_key(value):
    value = mean(value)
    return (0, value, "") if _is_number(value) else (1, 0, str(value).lower())


def _time_unit(seconds):
    """(name, seconds, style of a number) of the unit that suits the longest time."""
    longest = max((value for value in seconds if value is not None), default=0)
    if longest < 600:
        return "s", 1, ",.0f"
    return ("min", 60, ".1f") if longest < 7200 else ("h", 3600, ".1f")


def _argument(value):
    """An argument's value as a cell: numbers stay numbers."""
    if value is None or _is_number(value):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return printable(" ".join(map(str, value))) or "none"
    return printable(str(value))


def show(value, style="", scale=1):
    """The text of a cell: numbers by their style and in units of scale; MeanStd as "mean ± std"."""
    if value is None:
        return MISSING
    if isinstance(value, MeanStd):
        return _show_mean_std(value, style, scale)
    if not _is_number(value):
        return _argument(value)
    if style:
        return format(value / scale, style)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_mean_std(value, style, scale):
    text = format(value.mean / scale, style)
    if value.std is None or (value.std == 0 and style != ".2f"):
        return text
    if style in (".0f", ",.0f") and value.std / scale < 0.5:  # would be shown as 0
        return text
    return f"{text} ± {format(value.std / scale, style)}"


def _csv_cell(value):
    """Numbers with ten digits. Text that a spreadsheet would run as a formula gets a quote."""
    if isinstance(value, float):
        return f"{value:.10g}"
    is_interval = re.fullmatch(r"[+-][\d.]+( to [+-][\d.]+)?", str(value))
    if isinstance(value, str) and re.match(r"[=+@\t-]", value) and not is_interval:
        return f"'{value}"
    return value
