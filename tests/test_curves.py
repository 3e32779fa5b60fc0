"""Figures show what was measured, and no text covers another."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from helpers.figures import cut_texts, overlaps, text_boxes
from helpers.samples import groups_in, write, write_seeds

from analysis import charts, curves, figures, metrics, panels, replicates, styles


def similar_groups(tmp_path, count):
    """Runs whose curves nearly coincide."""
    for i in range(count):
        rows = [
            f"{e},{e},0.1,{2 / e:.3f},{50 + e + 0.01 * i},{2.1 / e:.3f},{40 + e + 0.02 * i},5,9"
            for e in range(1, 9)
        ]
        write(tmp_path / f"a_rather_long_name_of_run_{i}", rows=rows)
    return groups_in(tmp_path)


def hidden_labels(figure):
    """Labels of ticks beyond the ends of an axis, which exist but are not drawn."""
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    return hidden


def drawn_boxes(figure):
    hidden = hidden_labels(figure)
    return [(text, box) for text, box in text_boxes(figure) if text not in hidden]


@pytest.mark.parametrize(
    ("count", "size"), [(1, "screen"), (2, "column"), (5, "page"), (20, "screen"), (20, "column")]
)
def test_no_text_covers_another_or_is_cut(tmp_path, drawn, count, size):
    groups = similar_groups(tmp_path, count)
    for panel in ("curves", "efficiency", "bars"):
        curves.draw(groups, tmp_path / "x.png", panel, size=size)
    for figure in drawn:
        boxes = drawn_boxes(figure)
        assert len(boxes) > count
        assert overlaps(boxes) == [] and cut_texts(figure, boxes) == []


def test_ends_are_the_last_values_and_bands_one_deviation(tmp_path, drawn):
    write_seeds(tmp_path, "a", [90.0, 94.0])
    for smooth in (1, 2):
        curves.draw(groups_in(tmp_path), tmp_path / "x.png", smooth=smooth)
        accuracy = drawn[-1].axes[3]
        assert [text.get_text() for text in accuracy.texts] == ["92.00"]  # not smoothed
    (band,) = drawn[0].axes[3].collections
    std = np.std([90, 94], ddof=1)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(92 + std)
    assert drawn[0].legends[0].get_texts()[0].get_text() == "a (n = 2)"


def test_smoothing_is_a_mean_over_neighbors_and_over_fewer_at_the_ends(tmp_path, drawn):
    rows = [f"{e},{e},0.1,1,50,1,{accuracy},5,9" for e, accuracy in enumerate((0, 30, 60, 0), 1)]
    write(tmp_path / "a", rows=rows)
    curves.draw(groups_in(tmp_path), tmp_path / "x.png", smooth=3)
    measured, smoothed = drawn[0].axes[3].lines
    assert measured.get_ydata().tolist() == [0, 30, 60, 0]
    assert smoothed.get_ydata().tolist() == pytest.approx([15, 30, 30, 30])


@pytest.mark.parametrize("size", panels.SIZES)
def test_a_family_has_a_dot_for_each_run_and_the_best_name(tmp_path, drawn, size):
    for name, accuracies in (("eca", [70.0, 74.0]), ("plain", [60.0])):
        write_seeds(tmp_path, name, accuracies)
    runs = metrics.load_runs([str(tmp_path / "*")])
    for run in runs:
        run.family = run.name.split("-")[0]
    curves.draw(replicates.group(runs), tmp_path / "x.png", "family", size=size)
    (axis,) = drawn[0].axes
    dots = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert dots == [[70, 74], [60]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["eca (2)", "plain (1)"]
    assert [text.get_text() for text in axis.texts] == ["74.00  eca", "60.00  plain-s0", "best run"]
    boxes = drawn_boxes(drawn[0])
    assert overlaps(boxes) == [] and cut_texts(drawn[0], boxes) == []


def test_every_axis_names_what_it_shows(tmp_path, drawn):
    write_seeds(tmp_path, "a", [90.0])
    for panel in panels.PANELS:
        curves.draw(groups_in(tmp_path), tmp_path / "x.png", panel)
    for axis in (axis for figure in drawn for axis in figure.axes):
        assert axis.get_xlabel() and axis.get_ylabel()


def test_curves_differ_in_gray():
    looks = [styles.line_style(place) for place in range(styles.MOST)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == styles.MOST


def test_of_very_many_runs_the_best_have_names(tmp_path, drawn):
    curves.draw(similar_groups(tmp_path, 30), tmp_path / "x.png")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(names) == 13 and names[0].endswith("run_29") and names[-1] == "18 others"


def test_spread_moves_values_as_little_as_possible():
    assert curves.spread([0.1, 0.5, 0.9], 0.1, 0, 1) == [0.1, 0.5, 0.9]
    assert curves.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert curves.spread([0.0, 0.0, 0.02], 0.1, 0, 1) == pytest.approx([0, 0.1, 0.2])
    places = curves.spread(sorted(np.random.default_rng(0).random(9).tolist()), 0.1, 0, 1)
    assert min(np.diff(places)) >= 0.1 - 1e-9 and places[0] >= 0 and places[-1] <= 1 + 1e-9


def test_nothing_beats_the_pareto_front():
    points = [(1, 5), (2, 4), (3, 9), (3, 8), (2, 6), (9, 9)]
    assert charts.pareto(points) == [(1, 5), (2, 6), (3, 9)]


def test_the_pareto_front_is_of_finished_runs_on_the_same_images(tmp_path, drawn):
    for name, dataset, accuracy in (("a", "x", 80.0), ("bb", "x", 90.0), ("ccc", "y", 95.0)):
        write_seeds(tmp_path, name, [accuracy], dataset=dataset)
    write(tmp_path / "d", arguments={"dataset": "x"}, parameters=1)
    groups = groups_in(tmp_path)
    for members in (groups[:2] + groups[3:], groups):
        curves.draw(members, tmp_path / "x.png", "efficiency")
        curves.draw(members, tmp_path / "x.png", "bars")
    alike, _, mixed, bars = drawn
    (front,) = [line for line in alike.axes[0].lines if line.get_linestyle() == ":"]
    assert front.get_ydata().tolist() == [80, 90]
    assert not [line for line in mixed.axes[0].lines if line.get_linestyle() == ":"]
    assert alike.axes[0].get_ylabel() == "test accuracy (%)"
    title = "test accuracy (%), different images"
    assert mixed.axes[0].get_ylabel() == bars.axes[0].get_xlabel() == title


def test_the_times_of_different_machines_have_no_pareto_front(tmp_path, drawn):
    for cost in (1, 2):
        rows = (f"1,10,0.1,2.0,20,1.8,{80 + cost},{cost},100",)
        size = {"parameters": cost, "gmacs": cost}
        write(tmp_path / f"{cost}", rows=rows, arguments={"lr": cost}, status="finished", **size)
    for device in ("cpu", "cuda"):
        config = {"arguments": {"lr": 2}, "device": device}
        (tmp_path / "2/config.json").write_text(json.dumps(config))
        (tmp_path / "1/config.json").write_text(json.dumps(config | {"device": "cpu"}))
        curves.draw(groups_in(tmp_path, "run"), tmp_path / "x.png", "efficiency")
    one, two = (
        [any(line.get_linestyle() == ":" for line in axis.lines) for axis in figure.axes]
        for figure in drawn
    )
    assert list(panels.PANELS["efficiency"]) == ["parameters", "gmacs", "seconds"]
    assert one == [True, True, True] and two == [True, True, False]


def test_each_panel_is_drawn_and_each_format_is_valid(tmp_path):
    write(tmp_path / "$x_1$ <b>")
    groups = groups_in(tmp_path)
    for panel in panels.PANELS:
        curves.draw(groups, tmp_path / "x.svg", panel, log=True, x="step")
        ET.parse(tmp_path / "x.svg")
    curves.draw(groups, [tmp_path / "x.pdf", tmp_path / "x.png"], "bars")
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))  # no temporary files


def test_names_are_drawn_literally():
    assert figures.plain("_$x$") == r" _\$x\$" and len(figures.plain("x" * 100, 20)) == 20


def test_an_error_of_zero_has_no_place_on_a_logarithmic_axis(tmp_path, drawn):
    for seed, accuracies in enumerate(([90, 100], [92, 100])):
        rows = [f"{i},{i},0.1,1,50,1,{acc},5,9" for i, acc in enumerate(accuracies, start=1)]
        write(tmp_path / f"a-s{seed}", rows=rows, arguments={"seed": seed})
    curves.draw(groups_in(tmp_path), tmp_path / "x.png", "error", log=True)
    axis = drawn[0].axes[1]
    low, high = axis.get_ylim()
    assert 1 < low < high < 100
    assert [list(line.get_ydata()) for line in axis.lines[:1]] == [[9.0]]


def test_of_many_runs_those_with_epochs_have_names(tmp_path):
    for i in range(30):
        arguments = {"dataset": "cifar10", "seed": 0, "lr": i, "val_size": 5000}
        rows = ("1,10,0.1,2.0,20,5,100",) if i >= 15 else ()
        header = "epoch,step,lr,val_loss,val_acc,epoch_seconds,images_per_second"
        write(tmp_path / f"run{i:02}", header, rows, arguments)
    groups = groups_in(tmp_path)
    named = [g for g, number in zip(groups, styles.style_numbers(groups)) if number is not None]
    assert len(named) == styles.TOP and all(group.counted[0].epochs for group in named)


def test_curves_name_what_was_evaluated_where_it_differs(tmp_path):
    write(tmp_path / "a", "epoch,train_loss,ema_test_acc", ["1,1,70"])
    write(tmp_path / "b", "epoch,train_loss,test_acc", ["1,1,66"])
    write(tmp_path / "c", "epoch,train_loss,val_acc", ["1,1,70"])
    groups = groups_in(tmp_path)
    assert styles.curve_labels(groups[:2]) == ["a", "b"]
    assert styles.curve_labels(groups) == ["a, test (ema)", "b, test", "c, held-out"]
