"""Figures of groups of runs: curves with bands over seeds, accuracy against cost, by family, bars.

    draw(groups, ["comparison.png", "comparison.pdf"])
    draw(groups, ["cost.svg"], "efficiency", size="column")

Curves differ in colour, line style and, from the fifth on, marker: they can be told apart in grey.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis import figures, metrics, replicates
from analysis.panels import PANELS, SIZES, X_TITLES, Size
from common.errors import first_line
from common.text import printable

LINE_STYLES = ("-", (0, (5, 1.5)), (0, (5, 1.2, 1, 1.2)), (0, (1, 1)))
MARKERS = (None, "o", "s", "^", "D", "v", "P")
POINTS = "osD^vPX*<>"
DOT_STYLE = dict(markersize=6, markeredgecolor="white", markeredgewidth=0.5)
POINT_STYLE = dict(markersize=7, markeredgecolor="white", markeredgewidth=0.6, linestyle="")
MOST = 24  # groups with a colour and a name of their own; of more groups, only the TOP best
TOP = 12
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
        return _bars(plt, groups, options.size)
    if panel == "family":
        return _families(plt, groups, options.size)
    if panel == "efficiency":
        return _efficiency(plt, groups, options.size)
    return _curves(plt, groups, PANELS[panel], options)


def _subplots(plt, count, size):
    columns = min(size.columns, count)
    rows = math.ceil(count / columns)
    figsize = (size.width * columns, size.height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure, axes


def _say_empty(axis, text="not in these files"):
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="gray")
    axis.set(xticks=[], yticks=[])


def _accuracy(group):
    return group.accuracy.mean if group.accuracy else -math.inf


def _style_numbers(groups):
    """For each group the number of its line style; None for groups that are only drawn in grey."""
    if len(groups) <= MOST:
        return list(range(len(groups)))
    best = sorted(range(len(groups)), key=lambda i: -_accuracy(groups[i]))[:TOP]
    return [best.index(i) if i in best else None for i in range(len(groups))]


def line_style(number):
    """Arguments of matplotlib's plot for a curve; number: see _style_numbers."""
    if number is None:
        return dict(color=figures.QUIET, linestyle="-", linewidth=0.6, alpha=0.6, zorder=1)
    return dict(
        color=figures.COLOURS[number % len(figures.COLOURS)],
        linestyle=LINE_STYLES[number % len(LINE_STYLES)],
        marker=MARKERS[number // len(LINE_STYLES) % len(MARKERS)],
        markersize=3.5,
        linewidth=1.4,
        zorder=2.1 - number / 1000,
    )


def _curves(plt, groups, panels, options):
    figure, axes = _subplots(plt, len(panels), options.size)
    drawn = []  # (axis, its curves, digits of their values)
    for axis, (name, title) in zip(axes.flat, panels.items()):
        axis.set_ylabel(title)
        curves = _draw_panel(axis, name, groups, options)
        drawn.append((axis, curves, 3 if name.endswith("loss") else 2))
    handles = {}
    for _, curves, _ in drawn:
        for curve in curves:
            handles.setdefault(curve.label, curve.line)
    _add_legend(figure, handles, groups, options.size)
    notes = [_annotate_ends(*panel, options.size) for panel in drawn]
    figure.draw_without_rendering()  # only now the axes have their final size
    for axis, axis_notes in zip(axes.flat, notes):
        _separate(axis, axis_notes)
    return figure


def _draw_panel(axis, name, groups, options):
    """Draws a column of all groups and returns the curves that have a name."""
    logarithmic = options.log and not name.endswith("_acc")
    measured_on = {group.measured_on.removesuffix(" (ema)") for group in groups} - {""}
    curves, ends = [], set()
    for i, (group, number) in enumerate(zip(groups, _style_numbers(groups))):
        x, mean, std = (np.asarray(values, dtype=float) for values in group.band(name, options.x))
        if not len(x):
            continue
        ends |= {x[0], x[-1]}
        style = line_style(number)
        style["linewidth"] *= options.size.font / 10
        smooth = _smoothed(mean, options.smooth)
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
            std = _smoothed(std, options.smooth)
            lowest = 1e-9 + 0.5 * smooth.min() if logarithmic else -np.inf
            low, colour = np.maximum(smooth - std, lowest), style["color"]
            axis.fill_between(x, low, smooth + std, color=colour, alpha=0.15, linewidth=0)
        label = group.label
        if len(measured_on) > 1 and len(groups) <= MOST and group.measured_on:
            label += f", {group.measured_on}"
        curves.append(Curve(label, line, mean[-1], x[-1], smooth[-1]))
    axis.set_xlabel(X_TITLES[options.x])
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axis.margins(x=0.02)
    if len(ends) == 1:  # a single epoch: without ticks at its fractions
        axis.set_xticks([*ends])
    figures.tidy(axis)
    if logarithmic and curves:
        axis.set_yscale("log")
        figures.plain_numbers(axis.yaxis)
    if not curves:
        _say_empty(axis)
    return curves


def _smoothed(values, window):
    """Centred moving mean over `window` values, over fewer at the ends."""
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
        text, colour = f"{curve.last:.{digits}f}", curve.line.get_color()
        # Dotted after an early end: not to be taken for a curve that continues.
        arrow |= {"color": colour, "linestyle": "-" if curve.x > 0.98 * last_x else ":"}
        style |= {"color": _darker(colour), "arrowprops": arrow.copy()}
        end = (curve.x, curve.y)
        notes.append(axis.annotate(text, end, xytext=(1, 0.5), annotation_clip=False, **style))
    return notes


def _darker(colour):
    return tuple(0.7 * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


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

    wanted is sorted. Neighbours that are too near form a block around their mean (pool adjacent
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


def _add_legend(figure, handles, groups, size):
    """Below the panels in as many columns as fit; a long one at the right, where there is room."""
    if not handles:
        return
    if len(groups) > MOST:
        from matplotlib.lines import Line2D

        accuracies = {group.label: _accuracy(group) for group in groups}
        best_first = sorted(handles, key=lambda label: -accuracies.get(label, -math.inf))
        handles = {label: handles[label] for label in best_first}
        grey = Line2D([], [], color=figures.QUIET, linewidth=0.8)
        handles[f"{len(groups) - TOP} others"] = grey
    wide = size.columns > 1
    labels = [figures.plain(label, 70 if wide else 44) for label in handles]
    width = size.font * (0.56 * max(map(len, labels)) + 5.5)  # points
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 72 / width)))
    rows = math.ceil(len(labels) / columns)
    legend = dict(handles=list(handles.values()), labels=labels, frameon=False, handlelength=3.2)
    if rows > 4 and wide:
        figure.set_figwidth(figure.get_figwidth() + width / 72)
        figure.set_figheight(max(figure.get_figheight(), (len(labels) + 1) * size.font * 1.8 / 72))
        figure.legend(**legend, loc="outside right center", ncols=1, labelspacing=0.7)
    else:
        figure.set_figheight(figure.get_figheight() + rows * size.font * 1.6 / 72)
        figure.legend(**legend, loc="outside lower center", ncols=columns)


def pareto(points):
    """The points (cost, gain) that no other beats in both, by rising cost."""
    front = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _efficiency(plt, groups, size):
    """Test accuracy against parameters, work and time."""
    panels = PANELS["efficiency"]
    columns = len(panels) if size.columns > 1 else 1
    axis_size = size._replace(width=size.width * 0.75, columns=columns)
    figure, axes = _subplots(plt, len(panels), axis_size)
    handles = {}
    for axis, (name, title) in zip(axes.flat, panels.items()):
        handles |= _draw_cost(axis, name, title, groups)
        axis.set_ylabel("test accuracy (%)")
    if "Pareto front" in handles:
        handles["Pareto front"] = handles.pop("Pareto front")  # the last
    _add_legend(figure, handles, groups, size)
    return figure


def _draw_cost(axis, name, title, groups):
    """Draws a point for each group and the Pareto front; returns {label: artist}."""
    points, handles = [], {}
    for i, (group, number) in enumerate(zip(groups, _style_numbers(groups))):
        cost, accuracy = group.scalar(name), group.accuracy
        if cost is None or accuracy is None or cost.mean <= 0:
            continue
        points.append((cost.mean / 1e6 if name == "parameters" else cost.mean, accuracy.mean))
        artist = axis.errorbar(
            *points[-1],
            yerr=accuracy.std,
            capsize=2,
            elinewidth=0.8,
            color=line_style(number)["color"],
            marker="." if number is None else POINTS[i % len(POINTS)],
            zorder=2 if number is None else 3,
            **POINT_STYLE,
        )
        if number is not None:
            handles[group.label] = artist[0]
    axis.set_xlabel(title)
    figures.tidy(axis)
    if not points:
        _say_empty(axis)
        return handles
    costs = [cost for cost, _ in points]
    if max(costs) > 10 * min(costs):
        axis.set_xscale("log")
        axis.set_xlabel(f"{title}, logarithmic")
        figures.plain_numbers(axis.xaxis)
    else:
        axis.locator_params(axis="x", nbins=5)
    axis.margins(0.12)
    front = pareto(points)
    if len(front) > 1:
        line = dict(color="#444444", linestyle=":", linewidth=1, drawstyle="steps-post", zorder=1)
        (handles["Pareto front"],) = axis.plot(*zip(*front), **line)
    return handles


def _bars(plt, groups, size):
    """Test accuracy: mean over seeds, standard deviation, and a dot for each run."""
    groups = [group for group in groups if group.accuracy]
    width = size.width * size.columns * 0.75
    height = 0.8 + size.font * 2.3 / 72 * max(1, len(groups))
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.set(xlabel=PANELS["bars"]["test"], xlim=(0, 100), ylim=(-0.6, len(groups) - 0.4))
    axis.set_ylabel("run")
    for row, group in enumerate(groups):
        _draw_bar(axis, row, group, size.font * 0.85)
    length = 70 if size.columns > 1 else 34
    labels = [figures.plain(group.label, length) for group in groups]
    axis.set_yticks(range(len(groups)), labels)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    figures.tidy(axis)
    axis.grid(axis="y", visible=False)
    if not groups:
        _say_empty(axis, "no accuracy in these files")
    return figure


def _draw_bar(axis, row, group, font):
    mean, std, n = group.accuracy
    tests, dark = list(group.tests.values()), "#222222"
    axis.barh(row, mean, height=0.62, color="#9ecae1", edgecolor="#0072B2", linewidth=0.6)
    axis.errorbar(mean, row, xerr=std, color=dark, capsize=2.5, linewidth=1, zorder=3)
    if n > 1:
        axis.plot(tests, [row] * n, ".", color=dark, markersize=3.5, zorder=4)
    text = f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"
    low, high = min(mean - (std or 0), *tests), max(mean + (std or 0), *tests)
    if high > 50:
        position = dict(xy=(low, row), xytext=(-6, 0), ha="right")
    else:
        position = dict(xy=(high, row), xytext=(6, 0))
    axis.annotate(text, **position, textcoords="offset points", va="center", fontsize=font)


def _families(plt, groups, size):
    """Test accuracy by family of models: a dot for each run, a line at the mean, and the best."""
    members = {}  # {family: [(accuracy, label of its row)]}
    for group in groups:
        for run in group.counted:
            if run.accuracy is not None:
                members.setdefault(run.family or "unknown", []).append((run.accuracy, group.name))
    best_first = sorted(members, key=lambda family: -max(members[family])[0])
    height = 0.8 + size.font * 2.6 / 72 * max(1, len(members))
    width = size.width * size.columns * 0.75
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    length = 40 if size.columns > 1 else 22
    for row, family in enumerate(best_first):
        accuracies = [accuracy for accuracy, _ in members[family]]
        colour = figures.COLOURS[row % len(figures.COLOURS)]
        axis.plot(accuracies, [row] * len(accuracies), "o", color=colour, alpha=0.7, **DOT_STYLE)
        mean = sum(accuracies) / len(accuracies)
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=1.5)
        best, name = max(members[family])
        text = figures.plain(f"{best:.2f}  {name}", length)
        place = dict(xytext=(1.02, row), textcoords=axis.get_yaxis_transform())
        axis.annotate(text, (best, row), **place, va="center", fontsize=size.font * 0.85)
    axis.set(xlabel=PANELS["family"]["test"], ylim=(len(members) - 0.4, -0.6))
    labels = [figures.plain(f"{family} ({len(members[family])})", 30) for family in best_first]
    axis.set_yticks(range(len(members)), labels)
    axis.set_ylabel("family (runs)")
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.05)
    figures.tidy(axis)
    style = dict(transform=axis.transAxes, va="bottom", fontsize=size.font * 0.85)
    axis.text(1.02, 1, "best run", **style)
    if not members:
        _say_empty(axis, "no accuracy in these files")
    return figure
