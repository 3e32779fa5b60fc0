"""What figures of groups of runs share: the style of each group, axes, and the legend.

Curves differ in color, line style and, from the fifth on, marker: they can be told apart in gray.
"""

import math

from analysis import figures

LINE_STYLES = ("-", (0, (5, 1.5)), (0, (5, 1.2, 1, 1.2)), (0, (1, 1)))
MARKERS = (None, "o", "s", "^", "D", "v", "P")
MOST = 24  # groups with a color and a name of their own; of more groups, only the TOP best
TOP = 12


def subplots(plt, count, size):
    columns = min(size.columns, count)
    rows = math.ceil(count / columns)
    figsize = (size.width * columns, size.height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure, axes


def say_empty(axis, text="not in these files"):
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="gray")
    axis.set(xticks=[], yticks=[])


def accuracy_of(group):
    return group.accuracy.mean if group.accuracy else -math.inf


def curve_labels(groups):
    """A label for each group's curve, with what was evaluated where that differs."""
    kinds = {group.measured_on.removesuffix(" (ema)") for group in groups} - {""}
    if len(kinds) < 2:
        return [group.label for group in groups]
    return [", ".join(filter(None, (group.label, group.measured_on))) for group in groups]


def style_numbers(groups):
    """For each group the number of its line style; None for groups that are only drawn in gray."""
    if len(groups) <= MOST:
        return list(range(len(groups)))
    with_epochs = [any(run.epochs for run in group.counted) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (-accuracy_of(groups[i]), not with_epochs[i]))
    best = order[:TOP]
    return [best.index(i) if i in best else None for i in range(len(groups))]


def line_style(number):
    """Arguments of matplotlib's plot for a curve; number: see style_numbers."""
    if number is None:
        return dict(color=figures.QUIET, linestyle="-", linewidth=0.6, alpha=0.6, zorder=1)
    return dict(
        color=figures.COLORS[number % len(figures.COLORS)],
        linestyle=LINE_STYLES[number % len(LINE_STYLES)],
        marker=MARKERS[number // len(LINE_STYLES) % len(MARKERS)],
        markersize=3.5,
        linewidth=1.4,
        zorder=2.1 - number / 1000,
    )


def add_legend(figure, handles, groups, size):
    """Below the panels in as many columns as fit; a long one at the right, where there is room."""
    if not handles:
        return
    if len(groups) > MOST:
        from matplotlib.lines import Line2D

        accuracies = {group.label: accuracy_of(group) for group in groups}
        best_first = sorted(handles, key=lambda label: -accuracies.get(label, -math.inf))
        handles = {label: handles[label] for label in best_first}
        gray = Line2D([], [], color=figures.QUIET, linewidth=0.8)
        handles[f"{len(groups) - TOP} others"] = gray
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
