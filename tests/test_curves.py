"""Figures of runs: what they show is what was measured, and nothing covers anything else."""

import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from samples import write, write_seeds

from analysis import curves, figures, metrics, replicates

matplotlib.use("Agg")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, kept open."""
    kept = []
    save = figures.save

    def keep(figure, path, dpi):
        kept.append(figure)
        monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
        save(figure, path, dpi)

    monkeypatch.setattr(figures, "save", keep)
    yield kept
    monkeypatch.undo()
    matplotlib.pyplot.close("all")


def many(tmp_path, count):
    """Runs whose curves nearly coincide."""
    for i in range(count):
        rows = [
            f"{e},{e},0.1,{2 / e:.3f},{50 + e + 0.01 * i},{2.1 / e:.3f},{40 + e + 0.02 * i},5,9"
            for e in range(1, 9)
        ]
        write(tmp_path / f"a_rather_long_name_of_run_{i}", rows=rows)
    return replicates.group(metrics.load_runs([str(tmp_path / "*")]))


def extent(text, renderer):
    """Of the letters: an annotation's own extent holds its line, too."""
    return matplotlib.text.Text.get_window_extent(text, renderer)


def overlaps(texts, renderer):
    boxes = [extent(text, renderer) for text in texts]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


@pytest.mark.parametrize(
    ("count", "size"), [(1, "screen"), (2, "column"), (5, "page"), (20, "screen"), (20, "column")]
)
def test_no_text_covers_another_and_none_is_cut(tmp_path, drawn, count, size):
    groups = many(tmp_path, count)
    for panel in ("curves", "efficiency", "bars"):
        curves.draw(groups, tmp_path / f"{panel}.png", panel, size=size)
    for figure in drawn:
        figure.canvas.draw()  # at its own resolution: saving left the places of another
        renderer = figure.canvas.get_renderer()
        hidden = {
            label
            for axis in figure.axes
            for each in (axis.xaxis, axis.yaxis)
            for label in labels_outside(each)
        }
        texts = [
            text
            for text in figure.findobj(matplotlib.text.Text)
            if text.get_text().strip() and text.get_visible()
        ]
        texts = [text for text in texts if text not in hidden]
        assert len(texts) > count and overlaps(texts, renderer) == []
        page = figure.bbox
        for text in texts:
            box = extent(text, renderer)
            assert (
                box.x0 >= page.x0 - 1
                and box.x1 <= page.x1 + 1
                and box.y0 >= page.y0 - 1
                and box.y1 <= page.y1 + 1
            ), text


def labels_outside(axis):
    """Labels of ticks beyond an axis' ends, which exist and are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [
        tick
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        if not low <= tick.get_loc() <= high
    ]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


def test_the_ends_are_the_last_values_and_bands_one_deviation(tmp_path, drawn):
    write_seeds(tmp_path, "a", [90.0, 94.0])
    curves.draw(
        replicates.group(metrics.load_runs([str(tmp_path / "*")])), tmp_path / "x.png", smooth=2
    )
    accuracy = drawn[0].axes[3]
    assert [text.get_text() for text in accuracy.texts] == ["92.00"]  # not smoothed
    (band,) = accuracy.collections
    assert np.ptp(band.get_paths()[0].vertices[:, 1]) > 0
    assert drawn[0].legends[0].get_texts()[0].get_text() == "a (n = 2)"


def test_every_curve_can_be_told_in_grey():
    groups = [replicates.Group(str(i), []) for i in range(curves.MOST)]
    looks = [curves._look(groups, i) for i in range(curves.MOST)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == curves.MOST


def test_of_very_many_runs_the_best_have_names(tmp_path, drawn):
    curves.draw(many(tmp_path, 30), tmp_path / "x.png")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(names) == 13 and names[0].endswith("run_29") and names[-1] == "18 others"


def test_spread_moves_as_little_as_it_must():
    assert curves.spread([0.1, 0.5, 0.9], 0.1, 0, 1) == [0.1, 0.5, 0.9]
    assert curves.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert curves.spread([0.0, 0.0, 0.02], 0.1, 0, 1) == pytest.approx([0, 0.1, 0.2])
    assert curves.spread([0.99, 0.99, 0.4], 0.1, 0, 1) is not None
    places = curves.spread(sorted(np.random.default_rng(0).random(9).tolist()), 0.1, 0, 1)
    assert min(np.diff(places)) >= 0.1 - 1e-9 and places[0] >= 0 and places[-1] <= 1 + 1e-9


def test_the_front_holds_what_nothing_beats():
    assert curves.pareto([(1, 5), (2, 4), (3, 9), (3, 8), (2, 6), (9, 9)]) == [
        (1, 5),
        (2, 6),
        (3, 9),
    ]


def test_kinds_of_files_and_names_that_are_drawn_as_they_are(tmp_path):
    write(tmp_path / "$x_1$ <b>")
    groups = replicates.group(metrics.load_runs([str(tmp_path / "*")]))
    for panel in curves.PANELS:
        curves.draw(groups, [tmp_path / "x.svg", tmp_path / "x.pdf"], panel, log=True, x="step")
        ET.parse(tmp_path / "x.svg")
        assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert figures.plain("_$x$") == r" _\$x\$" and len(figures.plain("x" * 100, 20)) == 20
    assert not list(tmp_path.glob(".*"))
