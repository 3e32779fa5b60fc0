"""benchmark.py time-to: which runs it trains, what it reads from them, and what it prints."""

import importlib
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.errors import refused
from helpers.paths import ROOT
from helpers.runs import CNN, TINY, read_json, words

import benchmark
import models
from bench import measure, time_to
from common import files
from sweeps import launch
from training import environment

MODEL = CNN[1]
TRAINING = [*TINY[:-2], *CNN[2:], *words("--device cpu --epochs 2 --ema-decay 0")]


@pytest.fixture
def time_runs(train, tmp_path, monkeypatch):
    """time_runs("--runs", 2) -> the report; runs train in this process, see `started`."""
    started = []

    def start(run, environment):
        started.append((run.path.name, run.state))
        status = importlib.import_module(run.script).main(run.command[2:])
        return SimpleNamespace(poll=lambda: status, send_signal=lambda number: None)

    def time_runs(*options):
        place = ["--output-dir", tmp_path, "--json", tmp_path / "report.json"]
        argv = ["time-to", "--model", MODEL, "--rounds", 1, *place, *options, "--", *TRAINING]
        assert benchmark.main([*map(str, argv), "--tta", "flip"]) == 0
        return read_json(tmp_path / "report.json")

    monkeypatch.setattr(launch, "start_here", start)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0)
    monkeypatch.setattr(measure, "MIN_ROUND", 0.0)
    monkeypatch.setitem(measure.SIDES, "cpu", (64,))
    monkeypatch.setattr(time_to, "TARGETS", (1, 100))
    time_runs.started, time_runs.train = started, train
    return time_runs


@pytest.mark.slow
def test_runs_are_trained_resumed_and_kept(time_runs, tmp_path, capsys):
    options = ["--model", MODEL, *TRAINING, "--seed", 0, "--tta", "flip"]
    names = [f"{MODEL.replace('/', '_')}-s{seed}" for seed in (0, 1)]
    time_runs.train(*options, output=names[0], stop_after=2)
    report = time_runs("--runs", 2)
    assert time_runs.started == [*zip(names, ("interrupted", "new"))]
    assert [one["seed"] for one in report["runs"]] == [0, 1]
    assert [one["resumed"] for one in report["runs"]] == [1, 0]
    for one in report["runs"]:
        summary = read_json(Path(one["path"]) / "summary.json")
        assert all(one[name] == summary[name] for name in ("test_acc", "test_tta_acc"))
        # Both epochs have an evaluation; the last test has another one.
        assert 0 < summary["test_tta_seconds"] < one["eval_seconds"]
        first, never = one["charged_and_training_seconds_to"].values()
        assert one["charged_seconds"] > first[0] > first[1] > 0 and never is None
        assert one["train_seconds"] >= first[1]
        assert one["images_per_second"] == pytest.approx(6 * 32 / one["train_seconds"])
    text = capsys.readouterr().out
    assert re.search(r"to 1 % +2 of 2 +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+", text)
    assert re.search(r"to 100 % +0 of 2\b", text) and "n = 2" in text
    assert f"torch {version('torch')}" in text
    assert "--tta flip" in text and "resumed" in text and "bare" not in text
    time_to.print_report(report | {"measured_on": "held-out"})
    assert re.search("to 1 % on held-out images +2 of 2", capsys.readouterr().out)

    report = time_runs("--runs", 2, "--bare")
    assert len(time_runs.started) == 2
    text, bare = capsys.readouterr().out, report["bare"]
    assert re.search(r"bare step: [\d.]+", text) and "of 2 epochs of bare steps" in text
    charged = report["runs"][1]["charged_seconds"]
    assert bare["ratios"][1] == pytest.approx(charged / (2 * 3 * bare["step_seconds"][0]))


def written(path, epochs, **summary):
    """A finished run with rows (train seconds, evaluation so far, total so far, accuracy)."""
    names = ("epoch", "step", "epoch_seconds", "eval_seconds", "total_seconds", "test_acc")
    lines = [",".join(names)]
    lines += [",".join(map(str, (i, 25 * i, *row))) for i, row in enumerate(epochs, 1)]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    files.write_json(path / "config.json", {"arguments": {}})
    files.write_json(path / "summary.json", {"status": "finished", **summary})
    args = SimpleNamespace(seed=3, batch_size=2000)
    return SimpleNamespace(path=path, summary=read_json(path / "summary.json"), args=args)


def test_evaluations_are_not_charged(tmp_path):
    """The second epoch has none."""
    epochs = [(10, 2, 15, 90.0), (10, 2, 26, ""), (9, 4, 38, 93.9), (9, 6, 50, 94.2)]
    times = dict(train_seconds=38, eval_seconds=9.0, total_seconds=55.0)
    run = written(tmp_path, epochs, steps=100, test_acc=94.2, test_tta_acc=94.8, **times)
    result = time_to.result(run, (90, 92, 94, 95))
    reached = {"90": [13, 10], "92": [34, 29], "94": [44, 38], "95": None}
    assert result["charged_and_training_seconds_to"] == reached
    assert (result["charged_seconds"], result["eval_seconds"]) == (46, 9)
    assert result["images_per_second"] == pytest.approx(100 * 2000 / 38)
    assert (result["test_acc"], result["test_tta_acc"], result["seed"]) == (94.2, 94.8, 3)


def test_work_is_averaged_over_the_input_sizes():
    card = dict(model="resnet20", num_classes=10, image_size=32, options={})
    small, large = (models.describe("resnet20", 10, size)[1] for size in (24, 32))
    average = time_to.average_macs(card, SimpleNamespace(progressive="24:0,32:0.25"), 8)
    assert average == pytest.approx((2 * small + 6 * large) / 8)
    assert time_to.average_macs(card, SimpleNamespace(progressive="none"), 8) == large


def test_a_model_is_trained_by_its_script():
    scripts = {"airbench94": "train", "vit_small_data": "train_vit", "eva_giant": "train_sota"}
    assert {name: time_to.script_of(name) for name in scripts} == scripts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model airbench93", "unknown model 'airbench93'"),
        ("-- --seed 1", "--seed can't be given to the runs of time-to"),
        ("-- --model resnet18", "--model can't be given"),
        ("-- --image-size 28", "airbench94: image_size must be 32 px"),
        ("-- --batch-size 8 --accumulate 9", "--accumulate 9 is more than the 8 images"),
        ("--json missing/report.json", "--json missing/report.json: there is no such directory"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(message) as error:
        benchmark.main(["time-to", *words(argv)])
    assert error.value.status == 2 and not list(tmp_path.iterdir())


def test_a_run_with_other_arguments_is_refused(tmp_path):
    (tmp_path / "airbench94-s0").mkdir()
    given = {"model": "airbench94", "epochs": 3}
    files.write_json(tmp_path / "airbench94-s0/config.json", {"arguments": given, "from": {}})
    with refused(f"{tmp_path}/airbench94-s0 holds another run: --epochs is 3 there, not 5"):
        benchmark.main(["time-to", "--output-dir", str(tmp_path), "--", "--epochs", "5"])


def test_the_time_of_a_process_begins_with_it(monkeypatch):
    if sys.platform == "linux":  # it includes the imports
        code = "import time; start = time.monotonic(); from training import environment; "
        code += "imports = time.monotonic() - start; print(environment.process_seconds(), imports)"
        start, command = time.monotonic(), [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, imports = map(float, done.stdout.split())
        assert imports <= seconds <= time.monotonic() - start + 0.1  # ticks of 10 ms
    monkeypatch.setattr(environment, "IMPORTED", environment.IMPORTED - 1000)
    monkeypatch.setattr(Path, "read_text", lambda path: path.with_name("missing").read_bytes())
    assert environment.process_seconds() > 1000
