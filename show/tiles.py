"""Pictures with what models make of them: a tile each, with the truth and a bar for each of the top classes.

    draw(answers, names, images, truth, classes, "examples.png")      # answers: a list of Answer, one for each model

The true class is blue and a wrong first answer orange; a mark beside the name says the same in grey.
"""

from typing import NamedTuple

import torch

from analysis import figures

TILE, LINE = 1.75, 0.27  # inches: a picture's side, and the height of a bar with its name


class Answer(NamedTuple):
    """What one model makes of N pictures. heat: where it looked, (N, S, S) in [0, 1], or None."""

    name: str
    probabilities: torch.Tensor  # (N, K)
    classes: torch.Tensor  # (N, K)
    heat: torch.Tensor | None = None
    method: str = ""


def answer(predictor, logits, images, topk, explained):
    """Answer of a predict.Predictor with these logits (N, K) for these pictures (N, 3, h, w)."""
    top = logits.softmax(1).topk(min(topk, logits.shape[1]), dim=1)
    heat, method = predictor.explain(images, top.indices[:, 0]) if explained else (None, "")
    return Answer(predictor.name, top.values, top.indices, heat, method)


def draw(answers, names, images, truth, labels, path):
    """Writes the picture. images: uint8 (N, 3, H, W); truth: N classes, or None; labels: the classes' names."""
    plt = figures.pyplot(8.5)
    several, topk, explained = (
        len(answers) > 1,
        answers[0].classes.shape[1],
        answers[0].heat is not None,
    )
    # Of one model: pictures in a grid, bars below. Of several: a row for each picture, models beside each other.
    views = 1 + explained if not several else 1
    columns = 1 if several else min(len(images), 4 if not explained else 3)
    rows = -(-len(images) // columns)
    bars, title, gap = LINE * topk, 0.42, 0.28
    if several:
        tile = max(TILE if explained else 1.2, bars)
        block_width, block_height = (
            tile + gap + len(answers) * ((TILE + gap) * (1 + explained)),
            title + tile,
        )
    else:
        block_width, block_height = TILE * views + 0.08 * (views - 1), title + TILE + 0.1 + bars
    head = 0.3 if several else 0
    width, height = columns * (block_width + gap) + gap, rows * (block_height + 0.2) + 0.55 + head
    width, extra = max(width, 4.2), max(0.0, 4.2 - width) / 2
    figure = plt.figure(figsize=(width, height))

    def axes(x, y, w, h):  # from the upper left corner, in inches
        axis = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        axis.axis("off")
        return axis

    for i, picture in enumerate(images.permute(0, 2, 3, 1).numpy()):
        x = extra + gap + (i % columns) * (block_width + gap)
        y = 0.1 + head + (i // columns) * (block_height + 0.2)
        true = None if truth is None else truth[i]
        marks = (
            "" if true is None or several else " ✓" if answers[0].classes[i, 0] == true else " ✗"
        )
        figure.text(
            x / width,
            1 - (y + 0.14) / height,
            figures.plain(names[i], 26),
            fontsize=7.5,
            color="#666666",
            va="center",
        )
        if true is not None:
            figure.text(
                x / width,
                1 - (y + 0.31) / height,
                figures.plain(labels[true], 22) + marks,
                va="center",
                weight="bold",
            )
        y += title
        side = tile if several else TILE
        axes(x, y, side, side).imshow(picture, interpolation="nearest")
        if not several:
            if explained:
                _overlay(axes(x + TILE + 0.08, y, TILE, TILE), picture, answers[0].heat[i])
            _bars(axes(x, y + TILE + 0.1, block_width, bars), answers[0], i, true, labels)
            continue
        for k, each in enumerate(answers):
            left = x + side + gap + k * (TILE + gap) * (1 + explained)
            if i == 0:
                figure.text(
                    left / width,
                    1 - (0.1 + head / 2) / height,
                    figures.plain(each.name, 24 * (1 + explained)),
                    weight="bold",
                    va="center",
                )
            if explained:
                _overlay(axes(left, y, side, side), picture, each.heat[i])
                left += TILE + gap / 2
            _bars(axes(left, y, TILE, bars), each, i, true, labels, marked=True)
    _legend(
        figure,
        truth is not None,
        " and ".join(dict.fromkeys(each.method for each in answers if each.method)),
        height,
    )
    figures.save(figure, path, dpi=130)


def _overlay(axis, picture, heat):
    """The picture in grey, and over it where the model looked: transparent, then purple, orange, yellow."""
    import matplotlib.pyplot as plt

    side = picture.shape[0]
    axis.imshow(
        picture.mean(2),
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
        extent=(0, side, side, 0),
    )
    coloured = plt.get_cmap("inferno")(heat.numpy())
    coloured[..., 3] = 0.15 + 0.6 * heat.numpy()
    axis.imshow(coloured, interpolation="nearest", extent=(0, side, side, 0))


def _bars(axis, answer, i, true, labels, marked=False):
    """A line for each of the top classes: its name, its probability, and a bar below them."""
    topk = answer.classes.shape[1]
    axis.set(xlim=(0, 1), ylim=(topk, 0))
    room = (
        int(axis.get_position().width * axis.figure.get_figwidth() * 72 / 4.9) - 9
    )  # letters beside the number
    for k, (kind, p) in enumerate(
        zip(answer.classes[i].tolist(), answer.probabilities[i].tolist())
    ):
        first_wrong = k == 0 and true is not None and kind != true
        colour = figures.RIGHT if kind == true else figures.WRONG if first_wrong else figures.OTHER
        mark = (" ✓" if kind == true else " ✗") if marked and true is not None and k == 0 else ""
        axis.text(0, k + 0.36, figures.plain(labels[kind], room) + mark, fontsize=8, va="center")
        axis.text(1, k + 0.36, f"{100 * p:.1f} %", fontsize=8, va="center", ha="right")
        axis.barh(k + 0.78, 1, height=0.2, color="#EEEEEE")
        axis.barh(k + 0.78, p, height=0.2, color=colour)


def _legend(figure, known, method, height):
    from matplotlib.patches import Patch

    entries = [
        (figures.RIGHT, "true class"),
        (figures.WRONG, "wrong first answer"),
        (figures.OTHER, "other class"),
    ]
    handles = [Patch(color=colour, label=label) for colour, label in entries] if known else []
    if method:
        handles.append(Patch(color="#F98E09", label=f"where it looks: {method}"))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=2 if len(handles) > 3 else 4,
            frameon=False,
            fontsize=7.5,
            handlelength=1,
            columnspacing=1.2,
            borderaxespad=0.3,
        )
