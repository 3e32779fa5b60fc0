"""The pictures of predictions: nothing covers anything, however many there are and whatever classes are called."""

import matplotlib
import pytest
import torch
from helpers.figures import cut_texts, drawn, overlaps, text_boxes  # noqa: F401 (a fixture)

from analysis import figures
from show import tiles


@pytest.mark.parametrize(("count", "models"), [(1, 1), (3, 1), (9, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("explained", [False, True])
def test_no_text_covers_another_and_none_is_cut(tmp_path, drawn, count, models, explained):  # noqa: F811
    labels = [f"a class with a name that is long {i}" if i else "$x_1$" for i in range(10)]
    top = torch.rand(count, 4).sort(1, descending=True).values
    heat = torch.rand(count, 32, 32) if explained else None
    classes, method = torch.randint(0, 10, (count, 4)), "Grad-CAM" * explained
    answers = [
        tiles.Answer(f"model-with-quite-a-long-name-{m}", top, classes, heat, method)
        for m in range(models)
    ]
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    tiles.draw(answers, ["test 12345"] * count, images, [3] * count, labels, tmp_path / "x.png")
    (figure,) = drawn
    boxes = text_boxes(figure)
    assert len(boxes) >= count * (2 + 8 * models)
    assert overlaps(boxes) == [] and cut_texts(figure, boxes) == []


def test_pictures_are_enlarged_without_blur_and_colours_say_what_is_right(tmp_path, drawn):  # noqa: F811
    answers = [
        tiles.Answer("x", torch.tensor([[0.7, 0.2], [0.6, 0.3]]), torch.tensor([[0, 1], [1, 0]]))
    ]
    tiles.draw(
        answers,
        ["a", "b"],
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        [0, 0],
        ["yes", "no"],
        tmp_path / "x.png",
    )
    (figure,) = drawn
    images = [image for axis in figure.axes for image in axis.images]
    assert len(images) == 2 and {image.get_interpolation() for image in images} == {"nearest"}
    bars = [
        [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axis.patches][1::2]
        for axis in figure.axes
        if axis.patches
    ]
    assert bars == [[figures.RIGHT, figures.OTHER], [figures.WRONG, figures.RIGHT]]
    assert [text.get_text() for text in figure.texts] == ["a", "yes ✓", "b", "yes ✗"]
