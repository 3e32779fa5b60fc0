"""The times that a run reports: of all its processes, of training alone, to an accuracy."""

import csv
import time

import pytest
from helpers.runs import CNN, summary, words

from training import environment, evaluation
from training.run import _seconds_to
from training.run_directory import RunDir


def column(directory, name):
    with open(directory / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_total_seconds_are_those_of_all_processes(train, monkeypatch):
    """Each epoch has three steps; the run is interrupted in the second and in the third one."""
    totals, start = [], (*CNN, "--epochs", 3)
    for seconds, stop_after in ((100.0, 4), (30.0, 8), (5.0, None)):
        monkeypatch.setattr(environment, "process_seconds", lambda seconds=seconds: seconds)
        directory = train(*start, stop_after=stop_after)
        totals.append(summary(directory)["total_seconds"])
        start = ("--resume", directory)
    assert totals == [100, 130, 135]
    assert column(directory, "total_seconds") == [100, 130, 135]


def test_the_first_save_counts_the_time_before_it(train, monkeypatch):
    saved, save_last = [], RunDir.save_last
    monkeypatch.setattr(RunDir, "save_last", lambda *args: saved.append(args) or save_last(*args))
    train(*CNN, "--epochs", 1)
    assert saved[0][1]["training"]["progress"]["wall_seconds"] > 0


@pytest.mark.slow
def test_seconds_of_training_are_without_evaluations(train, monkeypatch):
    """Each evaluation takes 1,000 seconds more. There are two an epoch, and one at the end."""
    evaluate, perf_counter, waited = evaluation.evaluate, time.perf_counter, [0]

    def slow_evaluate(*args, **options):
        waited[0] += 1000
        return evaluate(*args, **options)

    monkeypatch.setattr(evaluation, "evaluate", slow_evaluate)
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + waited[0])
    directory = train(*CNN, *words("--epochs 2 --ema-decay 0.5 --val-size 20"))
    ended = summary(directory)
    assert sum(column(directory, "epoch_seconds")) == pytest.approx(ended["train_seconds"], 1e-3)
    assert ended["seconds_to_95"] <= ended["train_seconds"] < 500
    assert min(column(directory, "images_per_second")) > 1
    assert column(directory, "eval_seconds") == pytest.approx([2000, 4000], abs=500)
    assert ended["eval_seconds"] == pytest.approx(5000, abs=500)


@pytest.mark.parametrize(
    ("accuracies", "seconds"),
    [
        ([40, 91, 96, 100], (2, 3)),
        ([40, 90, 95, 100], (2, 3)),
        ([84, 86, 100, 90], (1, 2)),  # of the final accuracy, not of the best one
        ([100, 100], (1, 1)),
    ],
)
def test_seconds_to_a_share_of_the_final_accuracy(accuracies, seconds):
    history = [[epoch, accuracy, 0] for epoch, accuracy in enumerate(accuracies, 1)]
    assert _seconds_to(history) == dict(zip(("seconds_to_90", "seconds_to_95"), seconds))
