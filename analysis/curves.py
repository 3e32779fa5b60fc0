"""Figures of groups of runs: curves with bands over seeds, or a panel of charts.py.

    draw(groups, ["comparison.png", "comparison.pdf"])
    draw(groups, ["cost.svg"], "efficiency", size="column")

The value at the end of each curve is written beside it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis import charts, figures, metrics, replicates
from analysis.panels import PANELS, SIZES, X_TITLES, Size
from analysis.styles import add_legend, curve_labels, line_style, say_empty, style_numbers, subplots
from common.errors import first_line
from common.text import printable

CURVES_WITH_RAW = 8  # up to so many smoothed curves are drawn with the original values behind them


class Options(NamedTuple):
    """How curves are drawn; see draw."""

    size: Size
    x: str
    smooth: int
    log: bool


class Curve(NamedTuple):
    """A curve with a name, as drawn: its last value, which is not smoothed, and its end (x, y)."""

    label: str
    line: object
    last: float
    x: float
    y: float


def draw(
    groups, paths, panel="curves", *, x="epoch", smooth=1, log=False, size="screen", show=False
):
    """Draws groups (replicates.Group) and writes the figure to each of the paths.

    x: a key of X_TITLES. smooth: evaluations to average over; the value at a curve's end is not
    smoothed. log: losses and error rates on a logarithmic axis. size: a key of SIZES. show: also
    draw it for figures.show.
    """
    options = Options(SIZES[size], x, smooth, log)
    plt = figures.pyplot(options.size.font, show)
    for path in [paths] if not isinstance(paths, (list, tuple)) else paths:
        figures.save(_figure(plt, groups, panel, options), path, options.size.dpi)
    if show:
        _figure(plt, groups, panel, options)


def draw_finished(run):
    """Writes curves.png of a training run (training.run.Run) that is finished.

    The run stays finished if that fails: then a warning is printed.
    """
    directory = run.directory.path
    if run.exit_status != 0 or not run.args.curves or directory is None:
        return
    try:
        groups = replicates.group([metrics.Run(Path(directory) / "metrics.csv")])
        draw(groups, Path(directory) / "curves.png")
    except Exception as error:  # a font, a full disk, or anything else
        message = f"{directory}/curves.png could not be drawn: {first_line(error)}"
        print(f"warning: {printable(message)}", file=sys.stderr)


def _figure(plt, groups, panel, options):
    if panel == "bars":
        return charts.bars(plt, groups, options.size)
    if panel == "family":
        return charts.families(plt, groups, options.size)
    if panel == "efficiency":
        return charts.efficiency(plt, groups, options.size)
    return _curves(plt, groups, PANELS[panel], options)


def _curves(plt, groups, panels, options):
    figure, axes = subplots(plt, len(panels), options.size)
    drawn = []  # (axis, its curves, digits of their values)
    for axis, (name, title) in zip(axes.flat, panels.items()):
        axis.set_ylabel(title)
        curves = _draw_panel(axis, name, groups, options)
        drawn.append((axis, curves, 3 if name.endswith("loss") else 2))
    handles = {}
    for _, curves, _ in drawn:
        for curve in curves:
            handles.setdefault(curve.label, curve.line)
    add_legend(figure, handles, groups, options.size)
    notes = [_annotate_ends(*panel, options.size) for panel in drawn]
    figure.draw_without_rendering()  # only now the axes have their final size
    for axis, axis_notes in zip(axes.flat, notes):
        _separate(axis, axis_notes)
    return figure


def _draw_panel(axis, name, groups, options):
    """Draws a column of all groups and returns the curves that have a name."""
    logarithmic = options.log and not name.endswith("_acc")
    labels, numbers = curve_labels(groups), style_numbers(groups)
    curves, ends = [], set()
    for i, (group, label, number) in enumerate(zip(groups, labels, numbers)):
        x, mean, std = (np.asarray(values, dtype=float) for values in group.band(name, options.x))
        if not len(x):
            continue
        smooth, last = _smoothed(mean, options.smooth), mean[-1]
        std = _smoothed(std, options.smooth)
        if logarithmic:  # zero has no place on the axis
            shown = smooth > 0
            x, mean, smooth = x[shown], mean[shown], smooth[shown]
            std = std[shown] if len(std) else std
            if not len(x):
                continue
        ends |= {x[0], x[-1]}
        style = line_style(number)
        style["linewidth"] *= options.size.font / 10
        if options.smooth > 1 and number is not None and len(groups) <= CURVES_WITH_RAW:
            faint = dict(alpha=0.25, linewidth=0.6, linestyle="-", marker=None)
            axis.plot(x, mean, **style | faint)
        if len(x) == 1:
            style["marker"] = "o"
        some_points = (0.05 * (i % 3), 0.18) if len(x) > 12 else None
        (line,) = axis.plot(x, smooth, markevery=some_points, **style)
        if number is None:
            continue
        if len(std):
            lowest = 0.5 * smooth.min() if logarithmic else -np.inf
            low, color = np.maximum(smooth - std, lowest), style["color"]
            axis.fill_between(x, low, smooth + std, color=color, alpha=0.15, linewidth=0)
        curves.append(Curve(label, line, last, x[-1], smooth[-1]))
    axis.set_xlabel(X_TITLES[options.x])
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axis.margins(x=0.02)
    if len(ends) == 1:  # a single epoch: without ticks at its fractions
        axis.set_xticks([*ends])
    figures.tidy(axis)
    if logarithmic and ends:
        axis.set_yscale("log")
        figures.plain_numbers(axis.yaxis)
    if not ends:
        say_empty(axis)
    return curves


def _smoothed(values, window):
    """Centered moving mean over `window` values, over fewer at the ends."""
    if window <= 1 or len(values) < 2:
        return values
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _annotate_ends(axis, curves, digits, size):
    """Writes the last values into the right margin, each with a line from its curve's end."""
    from matplotlib.transforms import ScaledTranslation

    points = 10 if len(curves) < 8 else 18
    shift = ScaledTranslation(points / 72, 0, axis.figure.dpi_scale_trans)
    style = dict(textcoords=axis.transAxes + shift, fontsize=size.font * 0.8, va="center")
    arrow = dict(arrowstyle="-", lw=0.5, alpha=0.6, relpos=(0, 0.5), shrinkA=0, shrinkB=1)
    last_x = max((curve.x for curve in curves), default=0)
    notes = []
    for curve in curves:
        text, color = f"{curve.last:.{digits}f}", curve.line.get_color()
        # Dotted after an early end: not to be taken for a curve that continues.
        arrow |= {"color": color, "linestyle": "-" if curve.x > 0.98 * last_x else ":"}
        style |= {"color": _darker(color), "arrowprops": arrow.copy()}
        end = (curve.x, curve.y)
        notes.append(axis.annotate(text, end, xytext=(1, 0.5), annotation_clip=False, **style))
    return notes


def _darker(color):
    return tuple(0.7 * int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _separate(axis, annotations):
    """Moves the values apart. Many are written smaller, and of too many only some stay."""
    if not annotations:
        return
    height = axis.get_window_extent().height * 72 / axis.figure.dpi  # points
    font = min(annotations[0].get_fontsize(), max(5.0, height / (1.25 * len(annotations))))
    gap = 1.25 * font / height
    room = max(1, int(1 / gap) + 1)
    to_axes = (axis.transData + axis.transAxes.inverted()).transform
    y_of = {note: to_axes(note.xy)[1] for note in annotations}
    notes = sorted(annotations, key=y_of.get)
    if len(notes) > room:  # the highest, the lowest and an even choice of the others
        chosen = {round(i * (len(notes) - 1) / max(1, room - 1)) for i in range(room)}
        for i, note in enumerate(notes):
            if i not in chosen:
                note.remove()
        notes = [notes[i] for i in sorted(chosen)]
    for y, note in zip(spread([y_of[note] for note in notes], gap, 0, 1), notes):
        note.set_position((1, y))
        note.set_fontsize(font)


def spread(wanted, gap, low, high):
    """Places at least `gap` apart, from low to high if they fit, as near as possible to `wanted`.

    wanted is sorted. Neighbors that are too near form a block around their mean (pool adjacent
    violators).
    """
    blocks = []  # [sum of the starts that its members want, number of members]

    def start(block):
        total, count = block
        return max(low, min(total / count, high - (count - 1) * gap))

    def end(block):
        return start(block) + block[1] * gap

    for place in wanted:
        blocks.append([place, 1])
        while len(blocks) > 1 and end(blocks[-2]) > start(blocks[-1]):
            total, count = blocks.pop()
            blocks[-1][0] += total - count * blocks[-1][1] * gap
            blocks[-1][1] += count
    return [start(block) + i * gap for block in blocks for i in range(block[1])]
