"""Figures of runs: curves of loss and accuracy with bands over seeds, error rates, accuracy against cost, bars.

    draw(groups, ["comparison.png", "comparison.pdf"])                        # groups: replicates.Group
    draw(groups, ["cost.svg"], "efficiency", size="column")

Every curve has a colour, a line style and, from the fifth on, a marker, so that they can be told apart in grey.
"""

import math
from typing import NamedTuple

import numpy as np

from analysis import figures

PANELS = {
    "curves": (
        ("train_loss", "training loss"),
        ("eval_loss", "evaluation loss"),
        ("train_acc", "training accuracy (%)"),
        ("eval_acc", "evaluation accuracy (%)"),
    ),
    "error": (("train_error", "training error (%)"), ("eval_error", "evaluation error (%)")),
    "efficiency": (
        ("parameters", "parameters (millions)"),
        ("gmacs", "GMACs of one picture"),
        ("seconds", "training time (s)"),
    ),
    "bars": (),
}
X_TITLES = {"epoch": "epoch", "step": "step", "seconds": "seconds of training"}
STYLES = ("-", (0, (5, 1.5)), (0, (5, 1.2, 1, 1.2)), (0, (1, 1)))
MARKERS = (None, "o", "s", "^", "D", "v", "P")
POINTS = "osD^vPX*<>"
MOST = 24  # curves that have a colour and a name of their own; of more, the best dozen
TOP = 12


class Size(NamedTuple):
    """Of a panel, in inches; panels beside each other, the font in points, dots per inch."""

    width: float
    height: float
    columns: int
    font: float
    dpi: int


SIZES = {
    "screen": Size(5.6, 3.7, 2, 10, 150),
    "page": Size(3.5, 2.4, 2, 8, 300),
    "column": Size(3.4, 1.9, 1, 7, 300),
}


def draw(groups, paths, panel="curves", *, x="epoch", smooth=1, log=False, size="screen"):
    """Draws groups (replicates.Group) and writes the figure to each of the paths.

    x: epoch, step or seconds; smooth: evaluations that a curve is averaged over (its end's value is not); log: losses and
    error rates on a logarithmic axis; size: of SIZES.
    """
    paths = [paths] if not isinstance(paths, (list, tuple)) else paths
    for path in paths:
        plt = figures.pyplot(SIZES[size].font)
        if panel == "bars":
            figure = _bars(plt, groups, SIZES[size])
        elif panel == "efficiency":
            figure = _efficiency(plt, groups, SIZES[size])
        else:
            figure = _curves(plt, groups, PANELS[panel], SIZES[size], x, smooth, log)
        figures.save(figure, path, SIZES[size].dpi)


def _subplots(plt, count, size, columns=None):
    columns = min(columns or size.columns, count)
    rows = -(-count // columns)
    figsize = (size.width * columns, size.height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure, axes


def _look(groups, place):
    """How a curve is drawn: one of its own, or, among very many, grey unless it is among the best."""
    if len(groups) > MOST:
        ranked = sorted(range(len(groups)), key=lambda i: -_headline(groups[i]))[:TOP]
        if place not in ranked:
            return {
                "color": figures.QUIET,
                "linestyle": "-",
                "marker": None,
                "linewidth": 0.6,
                "alpha": 0.6,
                "zorder": 1,
            }
        place = ranked.index(place)
    colour, style = figures.COLOURS[place % len(figures.COLOURS)], STYLES[place % len(STYLES)]
    return {
        "color": colour,
        "linestyle": style,
        "marker": MARKERS[place // len(STYLES) % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.4,
        "zorder": 2 + (len(groups) - place) / 1000,
    }


def _headline(group):
    found = group.accuracy
    return found.mean if found else -math.inf


# ---- curves ----------------------------------------------------------------------------------------------------------


def _curves(plt, groups, panels, size, x, smooth, log):
    figure, axes = _subplots(plt, len(panels), size)
    handles, all_ends = {}, []
    mixed = (
        len({group.measured_on.removesuffix(" (ema)") for group in groups if group.measured_on}) > 1
        and len(groups) <= MOST
    )
    for axis, (name, title) in zip(axes.flat, panels):
        ends, places = [], set()
        logarithmic = log and not name.endswith("_acc")
        for i, group in enumerate(groups):
            at, mean, std = (np.asarray(values, dtype=float) for values in group.band(name, x))
            if not len(at):
                continue
            places |= {at[0], at[-1]}
            look = _look(groups, i)
            look["linewidth"] *= size.font / 10
            named = "alpha" not in look
            shown = _smoothed(mean, smooth)
            if smooth > 1 and named and len(groups) <= 8:
                axis.plot(
                    at,
                    mean,
                    **look | {"alpha": 0.25, "linewidth": 0.6, "linestyle": "-", "marker": None},
                )
            look["marker"] = "o" if len(at) == 1 else look["marker"]
            (line,) = axis.plot(
                at, shown, markevery=(0.05 * (i % 3), 0.18) if len(at) > 12 else None, **look
            )
            if len(std) and named:
                spread = _smoothed(std, smooth)
                low = (
                    np.maximum(shown - spread, 1e-9 + 0.5 * shown.min())
                    if logarithmic
                    else shown - spread
                )
                axis.fill_between(
                    at, low, shown + spread, color=look["color"], alpha=0.15, linewidth=0
                )
            if named:
                on = f", {group.measured_on}" * (mixed and bool(group.measured_on))
                handles.setdefault(group.label + on, line)
                ends.append((mean[-1], at[-1], shown[-1], look["color"]))
        axis.set_title(title)
        axis.set_xlabel(X_TITLES[x])
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axis.margins(x=0.02)
        if len(places) == 1:  # one epoch: no fractions of it beside it
            axis.set_xticks([*places])
        figures.tidy(axis)
        if logarithmic and ends:
            axis.set_yscale("log")
            figures.plain_numbers(axis.yaxis)
        if not ends:
            axis.text(
                0.5, 0.5, "not in these files", transform=axis.transAxes, ha="center", color="gray"
            )
            axis.set(xticks=[], yticks=[])
        all_ends.append((axis, ends, "{:.3f}" if name.endswith("loss") else "{:.2f}"))
    _legend(figure, handles, size, groups)
    texts = [_write_ends(*each, size) for each in all_ends]
    figure.draw_without_rendering()  # from here on the axes have their size, and a value's height is known
    for axis, annotations in zip(axes.flat, texts):
        _spread_ends(axis, annotations)
    return figure


def _smoothed(values, window):
    """Centred moving mean over `window` values, over fewer at the ends."""
    if window <= 1 or len(values) < 2:
        return values
    window = min(window, len(values))
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _write_ends(axis, ends, style, size):
    """The last values in a margin at the right, with a line from each curve's end to its value."""
    from matplotlib.transforms import ScaledTranslation

    margin = axis.transAxes + ScaledTranslation(
        (10 if len(ends) < 8 else 18) / 72, 0, axis.figure.dpi_scale_trans
    )
    last = max((x for _, x, _, _ in ends), default=0)
    leader = {
        "arrowstyle": "-",
        "lw": 0.5,
        "alpha": 0.6,
        "relpos": (0, 0.5),
        "shrinkA": 0,
        "shrinkB": 1,
    }
    return [
        axis.annotate(
            style.format(value),
            (x, y),
            xytext=(1, 0.5),
            textcoords=margin,
            color=_dark(colour),
            fontsize=size.font * 0.8,
            va="center",
            annotation_clip=False,
            arrowprops=leader
            | {
                "color": colour,
                "linestyle": "-" if x > 0.98 * last else ":",
            },  # no curve that goes on
        )
        for value, x, y, colour in ends
    ]


def _spread_ends(axis, annotations):
    """Moves the values apart, in smaller letters where there are many, and leaves out what finds no place."""
    if not annotations:
        return
    height = axis.get_window_extent().height * 72 / axis.figure.dpi  # points
    font = annotations[0].get_fontsize()
    font = min(font, max(5.0, height / (1.25 * len(annotations))))
    gap = 1.25 * font / height
    room = max(1, int(1 / gap) + 1)
    to_axes = (axis.transData + axis.transAxes.inverted()).transform
    wanted = sorted(((to_axes(note.xy)[1], note) for note in annotations), key=lambda each: each[0])
    if len(wanted) > room:  # the best and the worst stay, and an even choice between them
        keep = {round(i * (len(wanted) - 1) / max(1, room - 1)) for i in range(room)}
        for i, (_, note) in enumerate(wanted):
            if i not in keep:
                note.remove()
        wanted = [each for i, each in enumerate(wanted) if i in keep]
    places = spread([y for y, _ in wanted], gap, 0, 1)
    for place, (_, note) in zip(places, wanted):
        note.set_position((1, place))
        note.set_fontsize(font)


def spread(wanted, gap, low, high):
    """Places (sorted) at least `gap` apart and, where they fit, within low and high, as near as can be to the wanted ones.

    Neighbours that are too near form a block around the mean of what they want (pool adjacent violators).
    """
    blocks = []  # (sum of what its members want less their offset in the block, members)
    for value in wanted:
        blocks.append([value, 1])
        while len(blocks) > 1 and _start(blocks[-2], gap, low, high) + blocks[-2][1] * gap > _start(
            blocks[-1], gap, low, high
        ):
            total, count = blocks.pop()
            blocks[-1][0] += total - count * blocks[-1][1] * gap
            blocks[-1][1] += count
    return [_start(block, gap, low, high) + i * gap for block in blocks for i in range(block[1])]


def _start(block, gap, low, high):
    total, count = block
    return max(low, min(total / count, high - (count - 1) * gap))


def _dark(colour):
    """A darker shade, for letters."""
    return tuple(0.7 * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _legend(figure, handles, size, groups):
    """Below the panels in as many columns as fit; at the right when it is long and there is a screen's room."""
    if len(groups) > MOST:
        rank = {group.label: -_headline(group) for group in groups}
        handles = dict(sorted(handles.items(), key=lambda each: rank.get(each[0], math.inf)))
    labels = [figures.plain(label, 70 if size.columns > 1 else 44) for label in handles]
    lines = list(handles.values())
    if len(groups) > MOST:
        from matplotlib.lines import Line2D

        lines.append(Line2D([], [], color=figures.QUIET, linewidth=0.8))
        labels.append(f"{len(groups) - TOP} others")
    if not labels:
        return
    width = 0.56 * size.font * max(map(len, labels)) + 5.5 * size.font  # points
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 72 / width)))
    options = {"frameon": False, "handlelength": 3.2}
    if -(-len(labels) // columns) > 4 and size.columns > 1:
        figure.set_figwidth(figure.get_figwidth() + width / 72)
        figure.set_figheight(max(figure.get_figheight(), (len(labels) + 1) * size.font * 1.8 / 72))
        figure.legend(
            lines, labels, loc="outside right center", ncols=1, labelspacing=0.7, **options
        )
        return
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + rows * size.font * 1.6 / 72)
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, **options)


# ---- what accuracy costs ---------------------------------------------------------------------------------------------


def pareto(points):
    """The points (cost, gain) that no other beats in both, by rising cost."""
    front = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _efficiency(plt, groups, size):
    figure, axes = _subplots(
        plt, 3, size._replace(width=size.width * 0.75), columns=3 if size.columns > 1 else 1
    )
    handles = {}
    for axis, (name, title) in zip(axes.flat, PANELS["efficiency"]):
        points = []
        scale = 1e6 if name == "parameters" else 1
        for i, group in enumerate(groups):
            cost, accuracy = group.figure(name), group.accuracy
            if cost is None or accuracy is None or cost.mean <= 0:
                continue
            points.append((cost.mean / scale, accuracy.mean))
            look = _look(groups, i)
            quiet = "alpha" in look
            look = {
                "color": look["color"],
                "marker": "." if quiet else POINTS[i % len(POINTS)],
                "zorder": 3 - quiet,
                "markersize": 7,
                "markeredgecolor": "white",
                "markeredgewidth": 0.6,
            }
            handle = axis.errorbar(
                *points[-1], yerr=accuracy.std, capsize=2, elinewidth=0.8, linestyle="", **look
            )
            if not quiet:
                handles.setdefault(group.label, handle[0])
        axis.set_xlabel(title)
        if axis in axes[:, 0]:
            axis.set_ylabel("test accuracy (%)")
        figures.tidy(axis)
        if not points:
            axis.text(
                0.5, 0.5, "not in these files", transform=axis.transAxes, ha="center", color="gray"
            )
            axis.set(xticks=[], yticks=[])
            continue
        costs = [cost for cost, _ in points]
        if max(costs) > 10 * min(costs):
            axis.set_xscale("log")
            axis.set_xlabel(f"{title}, logarithmic")
            figures.plain_numbers(axis.xaxis)
        else:
            axis.locator_params(axis="x", nbins=5)
        axis.margins(0.12)
        if len(front := pareto(points)) > 1:
            (line,) = axis.plot(
                *zip(*front),
                color="#444444",
                linestyle=":",
                linewidth=1,
                drawstyle="steps-post",
                zorder=1,
            )
            handles["Pareto front"] = handles.pop("Pareto front", line)  # stays the last
    _legend(figure, handles, size, groups)
    return figure


def _bars(plt, groups, size):
    """Test accuracy: mean over seeds, standard deviation, and each run as a dot. Bars begin at zero, as lengths must."""
    found = [(group, group.accuracy) for group in groups]
    found = [(group, figure) for group, figure in found if figure]
    width = size.width * size.columns * 0.75
    figure, axis = plt.subplots(
        figsize=(width, 0.8 + size.font * 2.3 / 72 * max(1, len(found))), layout="constrained"
    )
    axis.set(xlabel="test accuracy (%)", xlim=(0, 100), ylim=(-0.6, len(found) - 0.4))
    for row, (group, accuracy) in enumerate(found):
        axis.barh(
            row, accuracy.mean, height=0.62, color="#9ecae1", edgecolor="#0072B2", linewidth=0.6
        )
        axis.errorbar(
            accuracy.mean,
            row,
            xerr=accuracy.std,
            color="#222222",
            capsize=2.5,
            linewidth=1,
            zorder=3,
        )
        if accuracy.n > 1:
            axis.plot(
                list(group.tests.values()),
                [row] * len(group.tests),
                ".",
                color="#222222",
                markersize=3.5,
                zorder=4,
            )
        text = f"{accuracy.mean:.2f}" + (
            f" ± {accuracy.std:.2f}" if accuracy.std is not None else ""
        )
        end = max([accuracy.mean + (accuracy.std or 0), *group.tests.values()])
        low = min([accuracy.mean - (accuracy.std or 0), *group.tests.values()])
        place = (
            {"xy": (low, row), "xytext": (-6, 0), "ha": "right"}
            if end > 50
            else {"xy": (end, row), "xytext": (6, 0)}
        )
        axis.annotate(
            text, **place, textcoords="offset points", va="center", fontsize=size.font * 0.85
        )
    axis.set_yticks(
        range(len(found)),
        [figures.plain(group.label, 70 if size.columns > 1 else 34) for group, _ in found],
    )
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    figures.tidy(axis)
    axis.grid(axis="y", visible=False)
    if not found:
        axis.text(
            0.5,
            0.5,
            "no accuracy in these files",
            transform=axis.transAxes,
            ha="center",
            color="gray",
        )
    return figure
