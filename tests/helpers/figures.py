"""Where the texts of a figure are."""

from matplotlib.text import Text


def text_boxes(figure):
    """(text, bounding box) of all texts that are drawn, without the arrows of annotations."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    boxes = [(text, Text.get_window_extent(text, renderer)) for text in texts]
    return [(text, box) for text, box in boxes if box.width > 1]  # hidden axes have empty boxes


def overlaps(boxes):
    """Pairs of texts that cover each other."""
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]


def cut_texts(figure, boxes):
    """Texts that aren't entirely inside the figure."""
    right, top = figure.bbox.x1, figure.bbox.y1
    return [t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > right or box.y1 > top]
