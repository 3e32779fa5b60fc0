"""sweep.py: which runs are started, resumed or kept, what is reported, and what is refused.

In most tests helpers/stand_in_train.py takes the place of train.py. The last test trains.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT
from helpers.processes import TIMEOUT, output
from helpers.sweeps import TINY, kill_at
from PIL import Image

import sweep
import train
from common.errors import UserError
from sweeps import findings, launch, plans, suites
from training import run_directory

FAILING = TINY._replace(experiments=TINY.experiments | {"hot": "--model resnet20 --lr 9"})
WAITING = TINY._replace(experiments={"slow": "--model resnet20 --lr 5", **TINY.experiments})


@pytest.fixture
def run(monkeypatch, stand_in_runs):
    """run("--seeds", 0, suite=TINY) -> exit status of a sweep in sweep/, with stand-in runs."""
    monkeypatch.setattr(findings.curves, "draw", lambda groups, path: path.touch())

    def run(*arguments, suite=TINY):
        monkeypatch.setitem(suites.SUITES, "tiny", suite)
        place = ["--device", "cpu", "--output-dir", "sweep"]
        return sweep.main(["tiny", *map(str, arguments), *place])

    return run


def starts(name):
    path = Path("sweep") / name / "starts"
    return path.read_text().splitlines() if path.exists() else []


# ---- which runs are executed ---------------------------------------------------------------------


def test_the_tables_of_a_sweep(run, capsys):
    assert run("--seeds", 0, 1, 2, "--jobs", 2, "--epochs", 3) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:6]] == [f"{i}/6" for i in range(1, 7)]
    assert "left" in out[2] and "left" not in out[5]
    assert any(line.split()[:3] == ["project", "3", "62.00"] for line in out)
    text = Path("sweep/results.md").read_text()
    cells = ["project", "3", "62.00 ± 2.00", "38.00 ± 2.00", "-", "50.00 ± 0.00", "1,000"]
    assert f"| {' | '.join(cells)} | 62000.00 ± 2000.00 |" in text
    assert Path("sweep/results.csv").read_text().splitlines()[1].startswith("project,3,62,2,38,2,")
    results = json.loads(Path("sweep/results.json").read_text())
    assert results["experiments"][1]["test"] == {"mean": 63.5, "std": 2, "n": 3}
    assert results["differences"][0]["value"] == 1.5 and len(results["runs"]) == 6
    difference = "| pad | project | test images | +1.50 | +1.50 to +1.50 | 3 paired | not resolved"
    assert difference in text and "seeds 0, 1, 2" in text
    assert "python sweep.py tiny --seeds 0 1 2 --jobs 2 --epochs 3" in text
    assert results["differences"][0]["parameters_percent"] == 25 and "| +25.0 % | does it" in text
    assert Path("sweep/pad-s1.log").read_text() == "done\n"
    assert run("--seeds", 0, 1, 2, "--epochs", 3, suite=TINY._replace(ranked=True)) == 0
    rows = Path("sweep/results.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["pad", "project"]  # the best comes first


def test_finished_runs_are_kept_and_interrupted_ones_resumed(run, capsys):
    assert run("--seeds", 0) == 0
    before = Path("sweep/results.md").read_text()
    for name, files in {
        "project-s1": ("config.json", "last.pt"),
        "pad-s1": ("config.json",),
    }.items():
        (Path("sweep") / name).mkdir()
        for file in files:
            text = Path("sweep", name.replace("s1", "s0"), file).read_text()
            Path("sweep", name, file).write_text(text.replace('"seed": 0', '"seed": 1'))
    capsys.readouterr()
    assert run("--seeds", 0, 1, 2) == 0
    assert "6 runs, 2 finished, 1 to resume, 3 to start" in capsys.readouterr().err
    for name in ("project-s0", "pad-s0", "pad-s1", "pad-s2"):
        assert starts(name) == ["start"]
    assert starts("project-s1") == ["resume"]
    assert run("--seeds", 0) == 0 and Path("sweep/results.md").read_text() == before


def test_a_run_that_has_only_the_save_before_the_last_is_not_started_anew(run):
    assert run("--seeds", 0) == 0
    path = Path("sweep/pad-s0")
    (path / "last.pt").rename(path / "previous.pt")
    (path / "summary.json").unlink()
    assert run("--seeds", 0) == 0 and starts("pad-s0") == ["start", "resume"]


def test_nothing_beside_a_save_is_removed(tmp_path, monkeypatch):
    """Another sweep may have interrupted the run after its state was looked up."""
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    (new,) = plans.plan("tiny", {}, [0], tmp_path, ["pad"])
    assert new.state == "new"
    new.path.mkdir(parents=True)
    files = [new.path / name for name in ("config.json", "last.pt")]
    for file in files:
        file.touch()
    plans.remove_leftovers(new)
    assert all(file.exists() for file in files)
    files[1].unlink()
    plans.remove_leftovers(new)
    assert not files[0].exists()


def test_commands_after_a_sweep_count_for_its_status(run, monkeypatch, capsys):
    suite = TINY._replace(afterwards=("benchmark.py models --rounds nothing",))
    assert run("--seeds", 0, suite=suite) == 1
    assert "benchmark.py models --rounds nothing" in capsys.readouterr().out
    monkeypatch.setattr(sweep.subprocess, "run", None)
    assert sweep.follow([["benchmark.py"]], here=False)  # of SLURM: named only
    assert "on a machine like those of the runs:\nbenchmark.py\n" in capsys.readouterr().out


def test_a_directory_with_another_run_is_refused(run):
    assert run("--seeds", 0, "--epochs", 3) == 0
    other = "project-s0 holds another run: --epochs is 3 there, not 4"
    with pytest.raises(UserError, match=other) as refused:
        run("--seeds", 1, 0, "--epochs", 4)
    assert refused.value.status == 2 and not Path("sweep/project-s1").exists()
    with pytest.raises(UserError, match="--epochs is 3 there, not 200"):
        run("--seeds", 0)
    with pytest.raises(UserError, match="--warmup-epochs is 0.2 there, not 1.0"):
        run("--seeds", 0, "--epochs", 3, "--warmup-epochs", 1)
    Path("sweep/pad-s0/config.json").write_text("{")
    with pytest.raises(UserError, match="pad-s0 holds .*no readable config.json"):
        run("--seeds", 0, "--epochs", 3)


def test_a_failed_run_is_named_and_the_others_continue(run, capsys):
    assert run("--seeds", 0, 1, suite=FAILING) == 1
    out, err = capsys.readouterr()
    assert "2 of 6 runs failed: hot-s0, hot-s1" in err.splitlines()[-1]
    reason = "FAILED: exit status 1, train.py: error: the loss is not finite (sweep/hot-s0.log)"
    assert f"3/6  hot-s0  {reason}" in out
    text = Path("sweep/results.md").read_text()
    assert "Not finished: hot-s0, hot-s1." in text and "| pad | 2 | 62.50 ± 1.41 |" in text
    assert "| hot" not in text
    assert run("--seeds", 0, suite=FAILING) == 1 and starts("hot-s0") == ["start", "resume"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_active_runs_and_starts_no_others(run, capsys, number):
    kill_at(Path("sweep/slow-s0/waiting"), number)
    assert run("--seeds", 0, suite=WAITING) == 128 + number
    line = "interrupted with 0 of 3 runs finished; the same command resumes\n"
    assert capsys.readouterr().out == line
    assert json.loads(Path("sweep/slow-s0/summary.json").read_text())["status"] == "interrupted"
    assert not Path("sweep/project-s0").exists()
    assert run("--seeds", 0, suite=WAITING) == 0 and starts("slow-s0") == ["start", "resume"]


def test_a_dry_run_prints_commands_that_train_py_accepts(run, capsys):
    options = "--lr 0.05 --ema-decay auto --deterministic --augment none --no-estimate"
    assert run("--seeds", 0, 1, "--dry-run", *options.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    (project, pad), lines = lines[4:], lines[:4]
    assert "# pad: --model resnet20 --model-arg shortcut=pad --dataset shapes" in pad
    assert not Path("sweep").exists() and "--optimizer sgd --lr 0.05" in project
    for line in lines:
        args = train.build_parser().parse_args(shlex.split(line)[2:])
        assert (args.lr, args.ema_decay, args.deterministic) == (0.05, None, True)
        assert (args.augment, args.dataset) == ("none", "shapes")
    assert (args.model_arg, args.seed, args.output_dir) == (["shortcut=pad"], 1, "sweep/pad-s1")


def test_the_cost_of_concurrent_runs_is_that_with_their_threads(run, monkeypatch):
    threads, before = [], torch.get_num_threads()
    slots = [{"OMP_NUM_THREADS": str(before + 1)}] * 2
    monkeypatch.setattr(launch, "find_slots", lambda device, jobs: slots[:jobs])

    def print_plan(runs, num_slots, timed):
        threads.append((num_slots, torch.get_num_threads()))

    monkeypatch.setattr(sweep.estimate, "print_plan", print_plan)
    assert run("--seeds", 0, "--dry-run", "--jobs", 2) == 0
    assert threads == [(2, before + 1)] and torch.get_num_threads() == before


# ---- where they are executed ---------------------------------------------------------------------


@pytest.mark.extras("submitit")
@pytest.mark.slow
def test_a_job_array_of_submitit(run, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setattr(launch, "CLUSTER", "local")
    slurm = ("--launcher", "submitit", "--slurm-gpus", 0)
    assert run("--seeds", 0, *slurm, suite=FAILING) == 1
    out, err = capsys.readouterr()
    assert "1 of 3 runs failed: hot-s0" in err
    assert "FAILED: exit status 1, train.py: error: the loss is not finite" in out
    assert "| pad | 1 | 61.50 |" in Path("sweep/results.md").read_text()
    assert run("--seeds", 0, *slurm) == 0 and starts("pad-s0") == ["start"]


def test_ctrl_c_cancels_all_jobs_of_an_array(run, monkeypatch):
    """Also those that SLURM has not started, because of --jobs."""
    signaled, canceled = [], []

    def poll(job):
        if not signaled:
            signaled.append(job)
            os.kill(os.getpid(), signal.SIGINT)
        return 1 if job in canceled else None

    def submit(runs, folder, parameters):
        assert parameters["slurm_array_parallelism"] == 1
        return {
            run: SimpleNamespace(
                poll=lambda run=run: poll(run),
                send_signal=lambda number, run=run: canceled.append(run),
            )
            for run in runs
        }

    monkeypatch.setattr(launch, "submit", submit)
    assert run("--seeds", 0, 1, "--launcher", "submitit", "--jobs", 1) == 128 + signal.SIGINT
    assert len(canceled) == 4


def test_jobs_may_end_before_they_are_waited_for(run, monkeypatch, capsys):
    def submit(runs, folder, parameters):
        statuses = {run: subprocess.call(launch.shell_script(run), shell=True) for run in runs}
        return {run: SimpleNamespace(poll=lambda s=s: s) for run, s in statuses.items()}

    monkeypatch.setattr(launch, "submit", submit)
    assert run("--seeds", 0, "--launcher", "submitit", suite=FAILING) == 1
    out, err = capsys.readouterr()
    assert "1 of 3 runs failed: hot-s0" in err and "3/3  " in out


def test_submitit_is_required_only_for_its_launcher(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)  # not installed
    with pytest.raises(UserError, match="pip install submitit") as refused:
        run("--launcher", "submitit")
    assert refused.value.status == 2 and not starts("pad-s0")


@pytest.mark.extras("submitit")
def test_submitit_without_slurm_is_refused(run, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="this machine has no SLURM"):
        run("--launcher", "submitit")


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ecaa", "invalid choice: 'ecaa' .choose from '?ranking"),
        ("tiny --seeds 0 1 0", "--seeds holds 0 more than once"),
        ("tiny --seeds 0 -1", "at least 0, not '-1'"),
        ("tiny --seeds", "expected at least one argument"),
        ("tiny --jobs 0", "at least 1, not '0'"),
        ("tiny --jobs 100000 --device cpu", "--jobs 100000 is more than the"),
        ("tiny --device cuda:77", "--device cuda:77"),
        ("tiny --seed 1", "the suite decides --seed .use --seeds"),
        ("tiny --model resnet18 --resume x", "the suite decides --resume$"),
        ("tiny --model-arg shortcut=pad", "the suite decides --model-arg$"),
        ("depth --model resnet18 --lr 1", "the suite decides --model$"),
        ("augmentation --optimizer adam --mixup 1", "the suite decides --mixup, --optimizer"),
        ("tiny --lora-rank 4", "--lora-rank: the suite tiny doesn't use train_sota.py"),
        ("tiny --batch-size auto", "--micro-batch: the suite tiny doesn't use train_sota.py"),
        ("degradation --only plain20 plain21", "--only plain21: degradation has plain18, plain34"),
        ("stems --own-recipes", "--own-recipes: the suite stems uses them already"),
        ("ratio", "ghost_resnet20: ratio must be 2 to 16, the width of the first stage, not 99"),
        ("optimizer-schedule --schedule linear", "the suite decides --schedule"),
        ("tiny --epocs 1", "unknown argument --epocs; did you mean --epochs"),
        ("tiny --dataset folder --data-dir nowhere", "no folder nowhere"),
        ("tiny --limit-train 1000000", "--limit-train 1000000"),
        ("tiny --cutout 32", "project: --cutout 32 must be less than the image size, 32 px"),
        ("missing", "unknown model 'resnet19'"),
        ("tiny --output-dir file/x", "--output-dir file/x can't be written"),
        ("tiny --launcher submitit --slurm-arg account", "--slurm-arg must be KEY=VALUE"),
    ],
)
def test_bad_input_is_refused_before_any_run(run, tmp_path, monkeypatch, capsys, command, message):
    missing = TINY._replace(experiments={"a": "--model resnet19"})
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setitem(suites.SUITES, "missing", missing)
    ratio = TINY._replace(experiments={"a": "--model ghost_resnet20 --model-arg ratio=99"})
    monkeypatch.setitem(suites.SUITES, "ratio", ratio)
    monkeypatch.setattr(launch, "start_here", None)
    (tmp_path / "file").touch()
    try:
        with pytest.raises(UserError, match=message) as refused:
            sweep.main(command.split())
        assert refused.value.status == 2 and "\n" not in str(refused.value)
    except SystemExit as refused:  # by argparse
        err = capsys.readouterr().err
        assert refused.code == 2 and re.search(message, err) and len(err.splitlines()) == 1


def test_a_run_that_another_process_writes_is_refused(run):
    path = Path("sweep/pad-s0")
    path.mkdir(parents=True)
    refused = pytest.raises(UserError, match="being written by another")
    with contextlib.closing(run_directory.RunDir(path)), refused:
        plans.wait_until_free(path, seconds=0)
    plans.wait_until_free(path, seconds=0)


def test_one_sweep_at_a_time(run):
    assert run("--seeds", 0, "--dry-run", "--no-estimate") == 0
    with plans.lock(Path("sweep")), pytest.raises(UserError, match="being written by another"):
        run("--seeds", 0)


# ---- from end to end -----------------------------------------------------------------------------


def without_times(path):
    results = json.loads(path.read_text())
    for row in results["experiments"]:
        for key in ("seconds", "epoch_seconds", "speed"):
            assert row.pop(key)["mean"] > 0
    return results["experiments"], results["differences"]


@pytest.mark.slow
def test_a_killed_and_repeated_sweep_gives_the_same_tables(tmp_path, monkeypatch, few_shapes):
    for split, examples in (("train", few_shapes.train), ("test", few_shapes.test)):
        for i in range(80):
            label = few_shapes.classes[examples.labels[i]]
            directory = tmp_path / "images" / split / label
            directory.mkdir(parents=True, exist_ok=True)
            pixels = examples.images[i].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(directory / f"{i}.png")
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = "--seeds 0 --dataset folder --batch-size 20 --epochs 4 --device cpu"
    place = ["--data-dir", str(tmp_path / "images"), "--output-dir", "sweep"]
    arguments = ["tiny", *options.split(), *place]
    processes = {}
    for name in ("uninterrupted", "killed"):  # at the same time, each with one thread
        (tmp_path / name).mkdir()
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "helpers.sweeps", *arguments],
            cwd=tmp_path / name,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
    monkeypatch.chdir(tmp_path / "killed")
    while not Path("sweep/pad-s0/metrics.csv").exists():
        assert processes["killed"].poll() is None, processes["killed"].communicate()
        time.sleep(0.01)
    processes["killed"].kill()
    processes["killed"].communicate()
    plans.wait_until_free(Path("sweep/pad-s0"), seconds=TIMEOUT)  # its run still saves
    assert sweep.main(arguments) == 0
    out, _ = output(processes["uninterrupted"])
    assert processes["uninterrupted"].returncode == 0, out
    results = without_times(tmp_path / "uninterrupted/sweep/results.json")
    assert without_times(Path("sweep/results.json")) == results
    assert "| pad | project | " in Path("sweep/results.md").read_text()
    assert Path("sweep/curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(launch, "start_here", None)  # nothing is left to run
    before = os.stat("sweep/pad-s0/last.pt").st_mtime_ns
    assert sweep.main(arguments) == 0 and os.stat("sweep/pad-s0/last.pt").st_mtime_ns == before
    with pytest.raises(UserError, match="--epochs is 4 there, not 7"):
        sweep.main([*arguments, "--epochs", "7"])
