"""An HTML page of runs that opens without network: sortable table, interactive curves, images.

    text, notes = page(groups, tables.compare(groups))

The curves are drawn by plotly (pip install plotly). Its script is copied into the page, which takes
five megabytes. The page's policy forbids it to load anything. All names are escaped.
"""

import base64
import html
import importlib.util
import math
from pathlib import Path
from string import Template

from analysis import figures, styles, tables
from analysis.panels import PANELS
from common.errors import UserError
from common.text import printable

TEMPLATE = Path(__file__).with_name("page.html")
MAX_POINTS = 100_000  # with more of them a browser becomes slow
MAX_IMAGE_BYTES = 2_000_000
DASHES = ("solid", "dash", "dashdot", "dot")
IMAGES = ("examples*.png", "errors*.png", "report*.png")  # what show_example.py writes


def page(groups, table, title="Runs compared"):
    """(the page as text, a note for each example image that was left out).

    groups: list of replicates.Group; table: their tables.Table. Needs plotly.
    """
    plot, every = _plot(groups)
    images, notes = _images(groups)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        table=_table(table),
        sentences="\n".join(map(_quiet, table.sentences)),
        thinned=f" One epoch in {every} is drawn." if every > 1 else "",
        plot=plot,
        images=images,
    )
    return text, notes


def _quiet(text):
    return f'<p class="quiet">{html.escape(text)}</p>'


def _table(table):
    """The table's head and body as HTML."""
    cells = table.cells()
    head, rows = "", ["" for _ in cells]
    for (key, column), title in zip(table.columns.items(), cells[0]):
        values = [tables.mean(row[key]) for row in table.rows]
        is_number = all(isinstance(value, (int, float, type(None))) for value in values)
        css = ' class="number"' if is_number else ""
        first = "descending" if column.higher_first else "ascending"
        button = f'<button type="button">{html.escape(title)}</button>'
        head += f'<th scope="col" aria-sort="none"{css} data-first="{first}">{button}</th>'
        for i, value in enumerate(values):
            sort_by = html.escape("" if value is None else str(value))
            text = html.escape(cells[i][title])
            rows[i] += f'<td{css} data-value="{sort_by}">{text}</td>'
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"


def require_plotly():
    """Raises UserError where it is not installed."""
    if not importlib.util.find_spec("plotly"):
        raise UserError("--html draws its curves with plotly: pip install plotly")


def _plot(groups):
    """(the curves as HTML with plotly's script in it, every how many epochs a point is drawn)."""
    import plotly.io
    from plotly.subplots import make_subplots

    panels = PANELS["curves"]
    points = sum(len(group.band(name)[0]) for group in groups for name in panels)
    every = max(1, math.ceil(points / MAX_POINTS))
    rows = math.ceil(len(panels) / 2)
    figure = make_subplots(rows, 2, horizontal_spacing=0.07, vertical_spacing=0.2 / rows)
    in_legend = set()
    for cell, (name, title) in enumerate(panels.items()):
        figure.update_yaxes(title_text=title, row=cell // 2 + 1, col=cell % 2 + 1)
        figure.update_xaxes(title_text="epoch", row=cell // 2 + 1, col=cell % 2 + 1)
        for i, (group, label) in enumerate(zip(groups, styles.curve_labels(groups))):
            for trace in _traces(group, label, i, name, every):
                trace.showlegend = trace.hoverinfo != "skip" and i not in in_legend
                in_legend.add(i)
                figure.add_trace(trace, row=cell // 2 + 1, col=cell % 2 + 1)
    figure.update_layout(
        template="plotly_white",
        height=410 * rows,
        margin=dict(t=40, b=20, l=40, r=20),
        hovermode="closest",
        legend=dict(orientation="h", y=-0.06),
        hoverlabel=dict(namelength=-1),
    )
    # No buttons that upload anything.
    config = dict(displaylogo=False, responsive=True, showSendToCloud=False, plotlyServerURL="")
    options = dict(include_plotlyjs=True, full_html=False, config=config, div_id="curves")
    return plotly.io.to_html(figure, **options), every


def _traces(group, label, i, name, every):
    """plotly's traces of group i: its curve, and the band of several seeds; [] without values."""
    from plotly.graph_objects import Scatter

    x, mean, std = (_thinned(values, every) for values in group.band(name))
    if not x:
        return []
    color = figures.COLORS[i % len(figures.COLORS)]
    digits = ".2f" if name.endswith("acc") else ".4f"
    deviation = f" ± %{{customdata:{digits}}}" if std else ""
    curve = Scatter(
        x=x,
        y=mean,
        name=html.escape(label, quote=False),
        legendgroup=str(i),
        mode="lines" if len(x) > 1 else "markers",
        customdata=std or None,
        line=dict(color=color, dash=DASHES[i % len(DASHES)], width=2),
        hovertemplate=f"%{{y:{digits}}}{deviation} at epoch %{{x}}",
    )
    if not std:
        return [curve]
    band = Scatter(
        x=x + x[::-1],
        y=[m + s for m, s in zip(mean, std)] + [m - s for m, s in zip(mean, std)][::-1],
        fill="toself",
        fillcolor=color,
        opacity=0.15,
        line=dict(width=0),
        mode="lines",
        legendgroup=str(i),
        hoverinfo="skip",
    )
    return [curve, band]


def _thinned(values, every):
    """One of `every` values, and the last."""
    values = list(values)
    return values if every == 1 else values[:-1:every] + values[-1:]


def _images(groups):
    """(example images in the runs' directories as HTML, a note for each that was left out)."""
    parts, notes = [], []
    for run in (run for group in groups for run in group.runs if run.is_ours):
        directory = run.path.parent
        for path in [path for pattern in IMAGES for path in sorted(directory.glob(pattern))]:
            try:
                data = base64.b64encode(_read_png(path)).decode()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                notes.append(printable(f"{path} is left out: {reason}"))
                continue
            caption = html.escape(f"{run.name}: {path.stem}")
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    parts += map(_quiet, notes)
    return "\n".join(["<h2>Example images</h2>", *parts]) if parts else "", notes


def _read_png(path):
    """The bytes of a PNG file. Raises OSError, and ValueError for a file that doesn't fit."""
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"more than {MAX_IMAGE_BYTES:,} bytes")
    contents = path.read_bytes()
    if not contents.startswith(b"\x89PNG"):
        raise ValueError("not a PNG image")
    return contents
