"""Figures with a point or a bar for each group of runs: accuracy, and accuracy against cost."""

from analysis import figures, replicates
from analysis.panels import PANELS
from analysis.styles import add_legend, line_style, say_empty, style_numbers, subplots
from common.errors import UserError

POINTS = "osD^vPX*<>"
POINT_STYLE = dict(markersize=7, markeredgecolor="white", markeredgewidth=0.6, linestyle="")
DOT_STYLE = dict(markersize=6, markeredgecolor="white", markeredgewidth=0.5)


def pareto(points):
    """The points (cost, gain) that no other beats in both, by rising cost."""
    front = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def efficiency(plt, groups, size):
    """Test accuracy against parameters, work and time."""
    panels = PANELS["efficiency"]
    columns = len(panels) if size.columns > 1 else 1
    axis_size = size._replace(width=size.width * 0.75, columns=columns)
    figure, axes = subplots(plt, len(panels), axis_size)
    handles = {}
    for axis, (name, title) in zip(axes.flat, panels.items()):
        handles |= _draw_cost(axis, name, title, groups)
        axis.set_ylabel(_accuracy_title(groups))
    if "Pareto front" in handles:
        handles["Pareto front"] = handles.pop("Pareto front")  # the last
    add_legend(figure, handles, groups, size)
    return figure


def _draw_cost(axis, name, title, groups):
    """Draws a point for each group and the front of the finished ones; returns {label: artist}."""
    points, finished, handles = [], [], {}
    for i, (group, number) in enumerate(zip(groups, style_numbers(groups))):
        cost, accuracy = group.scalar(name), group.accuracy
        if cost is None or accuracy is None or cost.mean <= 0:
            continue
        points.append((cost.mean / 1e6 if name == "parameters" else cost.mean, accuracy.mean))
        if group.is_finished:
            finished.append(points[-1])
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
        say_empty(axis)
        return handles
    costs = [cost for cost, _ in points]
    if max(costs) > 10 * min(costs):
        axis.set_xscale("log")
        axis.set_xlabel(f"{title}, logarithmic")
        figures.plain_numbers(axis.xaxis)
    else:
        axis.locator_params(axis="x", nbins=5)
    axis.margins(0.12)
    front = pareto(finished)
    same_images = len(replicates.test_images(groups)) < 2
    values = [replicates.conditions(groups, name) for name in replicates.MACHINE]
    if len(front) > 1 and same_images and (name != "seconds" or max(map(len, values)) < 2):
        line = dict(color="#444444", linestyle=":", linewidth=1, drawstyle="steps-post", zorder=1)
        (handles["Pareto front"],) = axis.plot(*zip(*front), **line)
    return handles


def _accuracy_title(groups):
    """The title of an axis of accuracies, which can't be compared if they are of other images."""
    images = replicates.test_images(groups)
    if images == [replicates.HELD_OUT]:
        return "held-out accuracy (%)"
    title = PANELS["bars"]["test"]
    return f"{title}, different images" if len(images) > 1 else title


def bars(plt, groups, size):
    """Test accuracy: mean over seeds, standard deviation, and a dot for each run."""
    groups = [group for group in groups if group.accuracy]
    width = size.width * size.columns * 0.75
    height = 0.8 + size.font * 2.3 / 72 * max(1, len(groups))
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.set(xlabel=_accuracy_title(groups), xlim=(0, 100), ylim=(-0.6, len(groups) - 0.4))
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
        say_empty(axis, "no accuracy in these files")
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


def families(plt, groups, size):
    """Test accuracy by family of models: a dot for each run, a line at the mean, and the best.

    Raises UserError for runs on different test images, of which a mean has no meaning.
    """
    test_images = replicates.test_images(groups)
    if len(test_images) > 1:
        raise UserError(f"--panel family: the test images differ ({'; '.join(test_images)})", 2)
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
        color = figures.COLORS[row % len(figures.COLORS)]
        axis.plot(accuracies, [row] * len(accuracies), "o", color=color, alpha=0.7, **DOT_STYLE)
        mean = sum(accuracies) / len(accuracies)
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=1.5)
        best, name = max(members[family])
        text = figures.plain(f"{best:.2f}  {name}", length)
        text_position = dict(xytext=(1.02, row), textcoords=axis.get_yaxis_transform())
        axis.annotate(text, (best, row), **text_position, va="center", fontsize=size.font * 0.85)
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
        say_empty(axis, "no accuracy in these files")
    return figure
