"""One HTML page of runs that opens without network: a sortable table, curves to point at, example pictures.

    text, notes = page(groups, tables.compare(groups))

The curves are plotly's (pip install plotly), whose script is copied into the page: it makes a page of five megabytes that
still works in ten years. The page's own policy forbids it to load anything. Names are others' words, and are escaped.
"""

import base64
import html
import math

from analysis import curves, figures, replicates
from common.errors import UserError
from common.text import printable

POINTS = 100_000  # more of them, and a browser becomes slow
PICTURE_BYTES = 2_000_000
DASHES = ("solid", "dash", "dashdot", "dot")
PICTURES = (
    "examples*.png",
    "errors*.png",
    "report*.png",
)  # what show_example.py leaves beside a checkpoint

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; } p.quiet, figcaption { color: #555; font-size: .875rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; } tbody tr:hover { background: #f3f6f9; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
"""

SORT = """
document.querySelectorAll("#runs th button").forEach((button, column) => button.addEventListener("click", () => {
  const header = button.parentElement, body = document.querySelector("#runs tbody");
  const down = header.getAttribute("aria-sort") !== "descending" && header.dataset.first === "descending"
    || header.getAttribute("aria-sort") === "ascending";
  document.querySelectorAll("#runs th").forEach(other => other.setAttribute("aria-sort", "none"));
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value, sign = down ? -1 : 1;
  [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // without a value: always last
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
  }).forEach(row => body.append(row));
}));
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<style>{style}</style></head><body>
<h1>{title}</h1>
<p class="quiet">A click on a heading sorts. Accuracies are in percent: mean ± sample standard deviation over n seeds.</p>
<div class="wide">{table}</div>
{said}
<h2>Curves</h2>
<p class="quiet">Bands: one standard deviation over seeds. A click on a name hides its curves, two show it alone.{thinned}</p>
{plot}
{pictures}
<script>{sort}</script>
</body></html>
"""


def page(groups, table, title="Runs compared"):
    """(the page as text, a note for each example picture that was left out). Raises UserError without plotly.

    groups: replicates.Group; table: tables.Table of them.
    """
    plot, thinned = _plot(groups)
    pictures, notes = _pictures(groups)
    text = PAGE.format(
        title=html.escape(title),
        style=STYLE,
        sort=SORT,
        table=_table(table),
        plot=plot,
        pictures=pictures,
        said="\n".join(
            f'<p class="quiet">{html.escape(sentence)}</p>' for sentence in table.said()
        ),
        thinned=f" Every {thinned}th epoch is drawn." if thinned > 1 else "",
    )
    return text, notes


def _table(table):
    cells = table.cells()
    numbers = (int, float, replicates.Figure, type(None))
    numeric = [all(isinstance(row[key], numbers) for row in table.rows) for key in table.columns]
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" * number} data-first="{_first(column)}">'
        f'<button type="button">{html.escape(title)}</button></th>'
        for title, column, number in zip(cells[0], table.columns.values(), numeric)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{" class=number" * number} data-value="{html.escape(_value(row[key]))}">{html.escape(text)}</td>'
            for key, text, number in zip(table.columns, texts.values(), numeric)
        )
        + "</tr>\n"
        for row, texts in zip(table.rows, cells)
    )
    return f'<table id="runs"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _first(column):
    return "descending" if column.higher_first else "ascending"


def _value(value):
    """What a cell is sorted by."""
    value = value.mean if isinstance(value, replicates.Figure) else value
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _plot(groups):
    """(the four panels as HTML with plotly's script in it, every how many epochs are drawn)."""
    try:
        import plotly.graph_objects as go
        import plotly.io
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise UserError("--html draws its curves with plotly: pip install plotly") from error
    panels = curves.PANELS["curves"]
    figure = make_subplots(
        2,
        2,
        subplot_titles=[title for _, title in panels],
        horizontal_spacing=0.07,
        vertical_spacing=0.1,
    )
    total = sum(len(group.band(name)[0]) for group in groups for name, _ in panels)
    every = max(1, math.ceil(total / POINTS))
    named = set()
    for cell, (name, _) in enumerate(panels):
        place = {"row": cell // 2 + 1, "col": cell % 2 + 1}
        for i, group in enumerate(groups):
            at, mean, std = (_thin(values, every) for values in group.band(name))
            if not at:
                continue
            colour, label = figures.COLOURS[i % len(figures.COLOURS)], html.escape(group.label)
            digits = ".2f" if name.endswith("acc") else ".4f"
            figure.add_trace(
                go.Scatter(
                    x=at,
                    y=mean,
                    name=label,
                    legendgroup=str(i),
                    showlegend=i not in named,
                    mode="markers" if len(at) < 2 else "lines",
                    customdata=std or None,
                    line={"color": colour, "dash": DASHES[i % len(DASHES)], "width": 2},
                    hovertemplate=f"%{{y:{digits}}}"
                    + (f" ± %{{customdata:{digits}}}" if std else "")
                    + " at epoch %{x}",
                ),
                **place,
            )
            named.add(i)
            if std:
                low, high = [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)]
                figure.add_trace(
                    go.Scatter(
                        x=at + at[::-1],
                        y=high + low[::-1],
                        fill="toself",
                        fillcolor=colour,
                        opacity=0.15,
                        line={"width": 0},
                        mode="lines",
                        legendgroup=str(i),
                        showlegend=False,
                        hoverinfo="skip",
                    ),
                    **place,
                )
    figure.update_layout(
        template="plotly_white",
        height=820,
        margin={"t": 40, "b": 20, "l": 40, "r": 20},
        hovermode="closest",
        legend={"orientation": "h", "y": -0.06},
        hoverlabel={"namelength": -1},
    )
    config = {
        "displaylogo": False,
        "responsive": True,
        "showSendToCloud": False,
        "plotlyServerURL": "",
    }  # nothing is uploaded
    return plotly.io.to_html(
        figure, include_plotlyjs=True, full_html=False, config=config, div_id="curves"
    ), every


def _thin(values, every):
    """Every so many values, and the last."""
    values = list(values)
    return values if every == 1 else values[:-1:every] + values[-1:]


def _pictures(groups):
    """(what show_example.py left in the runs' directories as HTML, a note for each file that was left out)."""
    found, notes = [], []
    for run in (run for group in groups for run in group.runs if run.own):
        for path in [
            path for pattern in PICTURES for path in sorted(run.path.parent.glob(pattern))
        ]:
            try:
                data = base64.b64encode(_read_png(path)).decode()
            except (OSError, ValueError) as error:
                notes.append(
                    printable(f"{path} is left out: {getattr(error, 'strerror', None) or error}")
                )
                continue
            caption = html.escape(f"{run.name}: {path.stem}")
            found.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    parts = found + [f'<p class="quiet">{html.escape(note)}</p>' for note in notes]
    return "<h2>Example pictures</h2>\n" + "\n".join(parts) if parts else "", notes


def _read_png(path):
    """The file's contents. Raises OSError, or ValueError for what doesn't belong into a page."""
    if path.stat().st_size > PICTURE_BYTES:
        raise ValueError(f"more than {PICTURE_BYTES:,} bytes")
    contents = path.read_bytes()
    if not contents.startswith(b"\x89PNG"):
        raise ValueError("not a PNG image")
    return contents
