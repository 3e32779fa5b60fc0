"""Figures of predictions: no text covers another, whatever the number of images and the names."""

import matplotlib
import pytest
import torch
from helpers.figures import cut_texts, overlaps, text_boxes

from analysis import figures
from show import tiles


@pytest.mark.parametrize(("count", "models"), [(1, 1), (5, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("explained", [False, True])
def test_no_text_covers_another_and_none_is_cut(tmp_path, drawn, count, models, explained):
    classes = ["$x_1$", *(f"a class with a name that is long {i}" for i in range(1, 10))]
    top, labels = torch.rand(count, 4).sort(1, descending=True).values, torch.arange(4)
    heat, method = (torch.rand(count, 32, 32), "Grad-CAM") if explained else (None, "")
    name = "model-with-quite-a-long-name"
    labels = labels.expand(count, 4)
    answers = [tiles.Answer(f"{name}-{m}", top, labels, heat, method) for m in range(models)]
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    selection = tiles.Selection(images, ["test 12345"] * count, [3] * count)
    tiles.draw(answers, selection, classes, tmp_path / "x.png")
    (figure,) = drawn
    boxes = text_boxes(figure)
    assert len(boxes) >= count * (2 + 8 * models)
    assert overlaps(boxes) == [] and cut_texts(figure, boxes) == []


def test_images_are_not_blurred_and_colors_say_what_is_right(tmp_path, drawn):
    probabilities, labels = torch.tensor([[0.7, 0.2], [0.6, 0.3]]), torch.tensor([[0, 1], [1, 0]])
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    selection = tiles.Selection(images, ["a", "b"], [0, 0])
    answer = tiles.Answer("x", probabilities, labels)
    tiles.draw([answer], selection, ["yes", "no"], tmp_path / "x.png")
    (figure,) = drawn
    images = [image for axis in figure.axes for image in axis.images]
    assert len(images) == 2 and {image.get_interpolation() for image in images} == {"nearest"}
    colors = [
        [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axis.patches][1::2]
        for axis in figure.axes
        if axis.patches
    ]
    assert colors == [[figures.RIGHT, figures.OTHER], [figures.WRONG, figures.RIGHT]]
    assert [text.get_text() for text in figure.texts] == ["a", "yes ✓", "b", "yes ✗"]
