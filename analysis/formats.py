"""Tables as text, Markdown and LaTeX.

    print_table([{"run": "resnet20", "test %": "91.04 ± 0.40"}])

rows: a {heading: text} for each, all with the same headings. Markdown and LaTeX escape their
special characters, as text may come from files that others wrote.
"""

import html
import re
import shutil
import sys

MISSING = "-"  # a cell without a value; empty in CSV


def _is_numeric(rows, title):
    cells = [row[title] for row in rows]
    filled = [cell for cell in cells if cell not in ("", MISSING)]
    return bool(filled) and all(map(is_number, filled))


def is_number(text):
    """Whether a cell holds a number, such as 93.36 ± 0.20, -0.14 to +9.39 or 5.1 %."""
    number = r"[+-]?\d[\d.,]*(e[+-]?\d+)?"
    return bool(re.fullmatch(f"{number}( ± {number}| to {number}| %)?", text))


def text_table(rows, width=None):
    """Aligned columns. What exceeds `width` characters follows below, after the first column."""
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    first, *rest = widths
    blocks, used = [[first]], widths[first]
    for title in rest:
        if width and used + 2 + widths[title] > width and len(blocks[-1]) > 1:
            blocks.append([first])
            used = widths[first]
        blocks[-1].append(title)
        used += 2 + widths[title]
    align = {title: ">" if _is_numeric(rows, title) else "<" for title in rows[0]}
    lines = []
    for titles in blocks:
        for row in [dict(zip(titles, titles)), *rows]:
            cells = [f"{row[title]:{align[title]}{widths[title]}}" for title in titles]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines)


def terminal_width():
    """The terminal's width in characters; None if standard output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(rows):
    print(text_table(rows, terminal_width()), end="")


def markdown_table(rows):
    marks = ["--:" if _is_numeric(rows, title) else ":--" for title in rows[0]]
    lines = [[markdown_text(title) for title in rows[0]], marks]
    lines += [[markdown_text(cell) for cell in row.values()] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def markdown_text(text):
    """Text that Markdown shows as it is."""
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    # An underscore inside a word has no meaning in Markdown.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return html.escape(text, quote=False)


def latex_table(rows):
    r"""A tabular with \usepackage{booktabs}."""
    columns = "".join("r" if _is_numeric(rows, title) else "l" for title in rows[0])
    head, *body = [" & ".join(map(_latex, cells)) for cells in (rows[0], *map(dict.values, rows))]
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", f"{head} \\\\", "\\midrule"]
    lines += [f"{cells} \\\\" for cells in body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


# fmt: off
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "*": "{*}",  # else, at the start of a row, they would belong to the line before it
    "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
} | {mark: f"\\{mark}" for mark in "&%$#_{}"}
# fmt: on


def _latex(text):
    return "".join(LATEX.get(mark, mark) for mark in text)
