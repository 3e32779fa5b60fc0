"""docs/results.html: one page with the tables and figures of all published experiments.

    text = page(experiments, [("what was not measured", "its command")], "results")

The page has no script and loads nothing but the figures, which stay files beside the runs.
"""

import html
import re
from pathlib import Path
from string import Template

from analysis import formats
from analysis.published import FIGURE

TEMPLATE = Path(__file__).with_name("results.html")


def page(experiments, missing, results):
    """The page as text. results: name of the directory that holds the experiments."""
    parts = [_list_of_contents(experiments, missing)]
    for experiment in experiments:
        parts += _section(experiment, results)
    if missing:
        lines = [
            f"<dt>{html.escape(title)}</dt><dd><code>{html.escape(command)}</code></dd>"
            for title, command in missing
        ]
        parts += ['<h2 id="not-measured">Not measured</h2>', "<dl>", *lines, "</dl>"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        results=html.escape(results), contents="\n".join(parts)
    )


def _list_of_contents(experiments, missing):
    names = [(done.name, done.name, done.title) for done in experiments]
    if missing:
        text = "other experiments and seeds, with their commands"
        names.append(("not-measured", "not measured", text))
    items = [
        f'<li><a href="#{html.escape(key)}">{html.escape(name)}</a>: {html.escape(text)}</li>'
        for key, name, text in names
    ]
    return "\n".join(["<ul>", *items, "</ul>"])


def _section(experiment, results):
    name = html.escape(experiment.name)
    title = html.escape(experiment.heading)
    image = f'<img src="../{html.escape(results)}/{name}/{FIGURE}" loading="lazy"'
    return [
        f'<h2 id="{name}">{name}</h2>',
        f"<p>{title}.</p>",
        *(_table(rows) for rows in (experiment.rows, experiment.differences) if rows),
        *(f"<p>{_inline(note)}</p>" for note in experiment.notes),
        f'<figure>{image} alt="{title}: curves with bands over seeds"></figure>',
        *(f'<p class="quiet">{html.escape(fact)}</p>' for fact in experiment.facts),
        '<p class="quiet">Repeat it:</p>',
        f"<pre>{html.escape(experiment.about['command'])}</pre>",
    ]


def _inline(text):
    """Escaped text, in which `x` is code and [x](#y) a link."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\[([^]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', text)


def _table(rows):
    """Rows {title: text} as a table that scrolls where it is too wide."""

    def heading(title):
        css = ' class="number"' if any(formats.is_number(row[title]) for row in rows) else ""
        return f'<th scope="col"{css}>{html.escape(title)}</th>'

    def cell(text):
        css = ' class="number"' if formats.is_number(text) else ""
        return f"<td{css}>{html.escape(text)}</td>"

    head = "".join(map(heading, rows[0]))
    lines = ["".join(map(cell, row.values())) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table>"
    return f'<div class="wide">{table}</div>'
