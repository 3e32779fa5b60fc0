"""Draws images with what models predict for them: the truth, and a bar for each of the top classes.

    draw([Answer(...)], Selection(images, names, truth), classes, "examples.png")

The bar of the true class is blue, that of a wrong first answer orange; a mark says the same.
"""

import math
from dataclasses import dataclass

import torch

from analysis import figures

# In inches: the side of an image, the height of a class with its bar, of a title and of the models'
# names, and the space around them.
TILE, LINE, TITLE, HEADER = 1.75, 0.27, 0.42, 0.3
GAP, SMALL_GAP, ROW_GAP, MARGIN = 0.28, 0.08, 0.2, 0.1


@dataclass
class Selection:
    """N images that are shown, uint8 (N, 3, H, W), with their names and, if known, classes."""

    images: torch.Tensor
    names: list[str]
    truth: list[int] | None = None


@dataclass
class Answer:
    """What one model predicts for N images, with its top k classes, the first one first."""

    name: str
    probabilities: torch.Tensor  # (N, k)
    classes: torch.Tensor  # (N, k)
    heat: torch.Tensor | None = None  # where the model looked: (N, S, S) in [0, 1]
    method: str = ""


def answer(predictor, logits, images, topk, explained):
    """The Answer of a predict.Predictor that gave these logits (N, K) for images (N, 3, h, w)."""
    top = logits.softmax(1).topk(min(topk, logits.shape[1]), dim=1)
    heat, method = predictor.explain(images, top.indices[:, 0]) if explained else (None, "")
    return Answer(predictor.name, top.values, top.indices, heat, method)


def draw(answers, selection, classes, path, show=False):
    """Writes a figure: a grid of images for one Answer, a row for each image for several.

    show: also draw it for figures.show.
    """
    plt = figures.pyplot(8.5, show)
    figures.save(_figure(plt, answers, selection, classes), path, dpi=130)
    if show:
        _figure(plt, answers, selection, classes)


def _figure(plt, answers, selection, classes):
    figure = plt.figure()
    if len(answers) == 1:
        _draw_grid(figure, answers[0], selection, classes)
    else:
        _draw_rows(figure, answers, selection, classes)
    _add_legend(figure, answers, selection.truth is not None)
    return figure


def _draw_grid(figure, answer, selection, classes):
    explained, bars_height = answer.heat is not None, LINE * answer.classes.shape[1]
    columns = min(len(selection.images), 3 if explained else 4)
    width = 2 * TILE + SMALL_GAP if explained else TILE
    size = (width, TITLE + TILE + MARGIN + bars_height)
    for tile, x, y in _tiles(figure, selection, classes, columns, size):
        tile.draw_image(x, y, TILE, marked=answer)
        if explained:
            tile.draw_heat(x + TILE + SMALL_GAP, y + TITLE, TILE, answer)
        tile.draw_bars(x, y + TITLE + TILE + MARGIN, width, answer)


def _draw_rows(figure, answers, selection, classes):
    explained, bars_height = answers[0].heat is not None, LINE * answers[0].classes.shape[1]
    side = max(TILE if explained else 1.2, bars_height)
    answer_width = (TILE + GAP) * (2 if explained else 1)
    size = (side + GAP + len(answers) * answer_width, TITLE + side)
    for tile, x, y in _tiles(figure, selection, classes, 1, size, header=HEADER):
        tile.draw_image(x, y, side)
        for k, answer in enumerate(answers):
            left = x + side + GAP + k * answer_width
            if tile.i == 0:
                name = figures.plain(answer.name, 48 if explained else 24)
                tile.text(left, MARGIN + HEADER / 2, name, weight="bold")
            if explained:
                tile.draw_heat(left, y + TITLE, side, answer)
                left += TILE + GAP / 2
            tile.draw_bars(left, y + TITLE, TILE, answer, marked=True)


def _tiles(figure, selection, classes, columns, size, header=0.0):
    """Yields (Tile, x, y) for each image, in columns of tiles of a size, in a figure that fits."""
    (width, height), count = size, len(selection.images)
    content = columns * (width + GAP) + GAP
    total_width = max(content, 4.2)  # of the legend
    rows = math.ceil(count / columns)
    figure.set_size_inches(total_width, rows * (height + ROW_GAP) + 0.55 + header)
    for i in range(count):
        x = (total_width - content) / 2 + GAP + (i % columns) * (width + GAP)
        y = MARGIN + header + (i // columns) * (height + ROW_GAP)
        yield Tile(figure, selection, classes, i), x, y


@dataclass
class Tile:
    """Image i of a selection in a figure, where places are inches from the upper left corner."""

    figure: object
    selection: Selection
    classes: list[str]
    i: int

    def __post_init__(self):
        self.image = self.selection.images[self.i].permute(1, 2, 0).numpy()
        self.true = None if self.selection.truth is None else self.selection.truth[self.i]

    def text(self, x, y, text, **style):
        width, height = self.figure.get_size_inches()
        self.figure.text(x / width, 1 - y / height, text, va="center", **style)

    def axes(self, x, y, width, height):
        total_width, total_height = self.figure.get_size_inches()
        left, bottom = x / total_width, 1 - (y + height) / total_height
        axis = self.figure.add_axes((left, bottom, width / total_width, height / total_height))
        axis.axis("off")
        return axis

    def mark(self, answer):
        """Whether the model is right, as a mark; nothing where that isn't known."""
        if self.true is None:
            return ""
        return " ✓" if answer.classes[self.i, 0] == self.true else " ✗"

    def draw_image(self, x, y, side, marked=None):
        """The image below its name and class; marked: an Answer whose mark follows the class."""
        name = figures.plain(self.selection.names[self.i], 26)
        self.text(x, y + 0.14, name, fontsize=7.5, color="#666666")
        if self.true is not None:
            mark = self.mark(marked) if marked else ""
            text = figures.plain(self.classes[self.true], 22) + mark
            self.text(x, y + 0.31, text, weight="bold")
        self.axes(x, y + TITLE, side, side).imshow(self.image, interpolation="nearest")

    def draw_heat(self, x, y, side, answer):
        """The image in gray; over it, in color and more opaque, where the model looks."""
        import matplotlib

        axis, pixels = self.axes(x, y, side, side), len(self.image)
        extent = dict(interpolation="nearest", extent=(0, pixels, pixels, 0))
        axis.imshow(self.image.mean(2), cmap="gray", vmin=0, vmax=255, **extent)
        heat = answer.heat[self.i].numpy()
        colored = matplotlib.colormaps["inferno"](heat)
        colored[..., 3] = 0.15 + 0.6 * heat
        axis.imshow(colored, **extent)

    def draw_bars(self, x, y, width, answer, marked=False):
        """For each of the top classes its name, its probability, and a bar below them."""
        classes, probabilities = answer.classes[self.i].tolist(), answer.probabilities[self.i]
        axis = self.axes(x, y, width, LINE * len(classes))
        axis.set(xlim=(0, 1), ylim=(len(classes), 0))
        most_letters = int(width * 72 / 4.9) - 9  # beside the percentage
        for k, (label, probability) in enumerate(zip(classes, probabilities.tolist())):
            color = figures.OTHER
            if label == self.true:
                color = figures.RIGHT
            elif k == 0 and self.true is not None:
                color = figures.WRONG
            mark = self.mark(answer) if marked and k == 0 else ""
            name, height = figures.plain(self.classes[label], most_letters), k + 0.36
            axis.text(0, height, name + mark, fontsize=8, va="center")
            percent = f"{100 * probability:.1f} %"
            axis.text(1, height, percent, fontsize=8, va="center", ha="right")
            axis.barh(k + 0.78, 1, height=0.2, color="#EEEEEE")
            axis.barh(k + 0.78, probability, height=0.2, color=color)


def _add_legend(figure, answers, truth_is_known):
    from matplotlib.patches import Patch

    handles = []
    if truth_is_known:
        handles.append(Patch(color=figures.RIGHT, label="true class"))
        handles.append(Patch(color=figures.WRONG, label="wrong first answer"))
        handles.append(Patch(color=figures.OTHER, label="other class"))
    methods = dict.fromkeys(answer.method for answer in answers if answer.method)
    if methods:
        handles.append(Patch(color="#F98E09", label=f"where it looks: {' and '.join(methods)}"))
    if handles:
        style = dict(fontsize=7.5, handlelength=1, columnspacing=1.2, borderaxespad=0.3)
        columns = 2 if len(handles) > 3 else 4
        figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, **style)
