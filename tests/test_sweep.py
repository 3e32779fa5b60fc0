"""Sweeps: which runs are made, gone on with or left alone, what differences are worth, and what is refused before a start.

Most runs here are made by a few lines in place of train.py; one test trains.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import sweep
import train
from analysis import replicates
from common.errors import UserError
from datasets import shapes
from sweeps import launch, plans, suites

# Takes train.py's arguments and leaves what it leaves. resnet20 is right in 60, 62, 64 … %, with shortcut=pad 1.5 better.
STAND_IN = """
import json, signal, sys, time
from pathlib import Path

def value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text

given, words = {}, sys.argv[1:]
while words:
    name = words.pop(0)[2:].replace("-", "_")
    text = words.pop(0)
    given[name] = [text] if name == "model_arg" else value(text)
going_on = "resume" in given
path = Path(str(given.pop("resume" if going_on else "output_dir")))
path.mkdir(parents=True, exist_ok=True)
with open(path / "starts", "a") as file:
    file.write("go on\\\\n" if going_on else "start\\\\n")
if going_on:
    given = json.loads((path / "config.json").read_text())["arguments"]
else:
    arguments = given | {"warmup_epochs": 0.2}
    origin = {"warmup_epochs": "auto"}
    (path / "config.json").write_text(json.dumps({"arguments": arguments, "from": origin, "device": "none", "torch": "0"}))
(path / "last.pt").touch()

def end(status, code, **figures):
    (path / "summary.json").write_text(json.dumps({"status": status, "parameters": 1000, "gmacs": 0.5, **figures}))
    sys.exit(code)

def stop(number, frame):
    end("interrupted", 128 + number)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
if given.get("lr") == 9:
    print("train.py: error: the loss is not finite", file=sys.stderr)
    end("failed", 1)
if given.get("lr") == 5 and not going_on:
    (path / "waiting").touch()
    time.sleep(60)
print("done")
accuracy = 60 + 2 * given["seed"] + 1.5 * ("model_arg" in given)
(path / "metrics.csv").write_text(f"epoch,train_loss,train_acc,test_loss,test_acc\\\\n1,1,50,1,{accuracy}\\\\n")
end("finished", 0, test_acc=accuracy, reported="last epoch")
""".replace("\\\\n", "\\n")

TINY = suites.Suite(
    "a suite of this test",
    {"project": "--model resnet20", "pad": "--model resnet20 --model-arg shortcut=pad"},
    suites.ask("does it help?", "pad", "project"),
    "--dataset shapes",
)
SPOILT = TINY._replace(experiments=TINY.experiments | {"hot": "--model resnet20 --lr 9"})
SLOW = TINY._replace(experiments={"slow": "--model resnet20 --lr 5", **TINY.experiments})


@pytest.fixture
def run(tmp_path, monkeypatch, few_shapes):
    """run("--seeds", 0, suite=TINY) -> exit status; runs are made by STAND_IN and lie in sweep/."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        plans, "python", lambda script: [sys.executable, str(tmp_path / "stand_in.py")]
    )
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)

    def run(*arguments, suite=TINY):
        monkeypatch.setitem(suites.SUITES, "tiny", suite)
        return sweep.main(
            ["tiny", *map(str, arguments), "--device", "cpu", "--output-dir", "sweep"]
        )

    return run


def starts(name):
    path = Path("sweep") / name / "starts"
    return path.read_text().split("\n")[:-1] if path.exists() else []


# ---- differences -----------------------------------------------------------------------------------------------------


def test_paired_differences_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3), t of two degrees of freedom 4.303."""
    found = replicates.difference({0: 61, 1: 73, 2: 55}, {2: 52, 0: 60, 1: 71})
    assert (
        found.n == "3 paired"
        and found.value == pytest.approx(2)
        and found.error == pytest.approx(1 / math.sqrt(3))
    )
    assert (found.low, found.high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert found.verdict == "not resolved"
    more = replicates.difference(
        {s: 60 + s + 0.1 * (s % 2) for s in range(8)}, {s: 58 + s for s in range(8)}
    )
    assert more.verdict == "higher" and more.value == pytest.approx(2.05)
    assert replicates.difference({0: 1, 1: 2.1}, {0: 51, 1: 52}).verdict == "lower"


def test_unpaired_differences_by_hand():
    """Welch: variances 1 (n = 3) and 8 (n = 2): error sqrt(1/3 + 4), degrees of freedom 18.78 / (1/18 + 16) = 1.17, so 1."""
    found = replicates.difference({0: 1, 1: 2, 2: 3}, {3: 4, 4: 8})
    assert (
        found.n == "3, 2"
        and found.value == pytest.approx(-4)
        and found.error == pytest.approx(math.sqrt(13 / 3))
    )
    assert (
        found.high == pytest.approx(-4 + 12.706 * math.sqrt(13 / 3))
        and found.verdict == "not resolved"
    )


def test_one_seed_claims_no_error():
    for theirs in ({0: 60}, {1: 60}, {1: 60, 2: 60}):
        found = replicates.difference({0: 61.5}, theirs)
        assert (found.value, found.error, found.low) == (
            1.5,
            None,
            None,
        ) and found.verdict == "one seed: no error known"


def test_identical_results_and_a_difference_without_spread_are_not_resolved():
    same = replicates.difference({0: 61.2, 1: 60.1}, {0: 61.2, 1: 60.1})
    assert (same.value, same.error, same.low, same.high) == (
        0,
        0,
        0,
        0,
    ) and same.verdict == "not resolved"
    shifted = replicates.difference({0: 61.3, 1: 60.4}, {0: 60.2, 1: 59.3})
    assert shifted.error == 0 and shifted.verdict.startswith("not resolved (no spread")


def test_two_shared_seeds_pair_and_the_rest_is_left_out():
    found = replicates.difference({0: 1.0, 1: 3.0, 2: 99.0}, {0: 0.0, 1: 1.0})
    assert (found.n, found.value, found.error) == ("2 paired", 1.5, 0.5)


@pytest.mark.parametrize("freedom", [*range(1, 31), 40, 60, 120])
def test_the_quantiles_leave_two_and_a_half_percent_above(freedom):
    """The density of Student's t, integrated from 0 to the quantile (Simpson), gives 47.5 %, to half of the last digit."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi
    )
    steps, t = 2000, replicates.t975(freedom)
    heights = [
        scale * (1 + (i * t / steps) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i in range(steps + 1)
    ]
    area = (
        t
        / steps
        / 3
        * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    )
    assert area == pytest.approx(0.475, abs=0.00051 * heights[-1])


def test_between_the_quantiles_the_wider_interval_is_taken():
    t = replicates.t975
    assert (
        t(2.9) == t(2)
        and t(0.99999999999) == t(1)
        and t(35) == t(30)
        and t(50) == t(40)
        and t(10**6) == t(120)
    )


# ---- the suites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suites.SUITES)
def test_a_suite_names_models_that_exist_and_asks_about_its_own_experiments(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    suite = suites.SUITES[name]
    for _, ours, theirs in suite.questions:
        assert ours != theirs and {ours, theirs} <= set(suite.experiments)
    runs = plans.plan(name, {}, [0, 1], None)
    assert len({run.path for run in runs}) == 2 * len(suite.experiments)
    assert all(
        re.fullmatch(rf"runs/sweep-{name}-cifar100?/[\w-]+-s[01]", str(run.path)) for run in runs
    )
    resolved = {str(vars(run.args)) for run in runs[: len(suite.experiments)]}
    assert len(resolved) == len(suite.experiments)  # no two of them are one


def test_a_file_takes_the_place_of_published_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = plans.plan("vit-pretraining", {"weights": "vit.safetensors", "epochs": 2}, [0], None)
    assert [run.label for run in runs if "--weights vit.safetensors" in " ".join(run.start)] == [
        "vit_tiny-pretrained"
    ]
    assert not any("--pretrained" in run.start for run in runs)
    assert all(run.start[1].endswith("train_vit.py") for run in runs)
    assert all(
        run.args.weights
        for run in plans.plan("resolution", {"weights": "vit.safetensors"}, [0], None)
    )
    for name in ("pretraining", "degradation"):  # two models, and none
        with pytest.raises(UserError, match="--weights: the suite"):
            plans.plan(name, {"weights": "x"}, [0], None)


# ---- which runs are made ---------------------------------------------------------------------------------------------


def test_the_tables_of_a_sweep(run, capsys):
    assert run("--seeds", 0, 1, 2, "--jobs", 2, "--epochs", 3) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:6]] == [f"{i}/6" for i in range(1, 7)]
    assert "left" in out[2] and "left" not in out[5]
    text = Path("sweep/results.md").read_text()
    assert "| project | 3 | 62.00 ± 2.00 | 50.00 ± 0.00 | 1,000 | 0.500 |" in text
    assert (
        "| pad | project | +1.50 | 0.00 | +1.50 to +1.50 | 3 paired | not resolved (no spread to judge by) |"
        in text
    )
    assert (
        "python sweep.py tiny --seeds 0 1 2 --jobs 2 --epochs 3" in text and "seeds 0, 1, 2" in text
    )
    assert Path("sweep/curves.png").read_bytes().startswith(b"\x89PNG")
    assert Path("sweep/pad-s1.log").read_text() == "done\n"
    assert any(line.split()[:3] == ["project", "3", "62.00"] for line in out)


def test_finished_runs_are_left_alone_cut_off_ones_go_on_and_others_start(run, capsys):
    assert run("--seeds", 0) == 0
    before = Path("sweep/results.md").read_text()
    for name, files in (("project-s1", ("config.json", "last.pt")), ("pad-s1", ("config.json",))):
        (Path("sweep") / name).mkdir()
        for file in files:
            (Path("sweep") / name / file).write_text(
                Path("sweep", name.replace("s1", "s0"), file).read_text()
            )
        config = Path("sweep") / name / "config.json"
        config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    capsys.readouterr()
    assert run("--seeds", 0, 1, 2) == 0
    assert "6 runs, 2 finished, 1 to go on with, 3 to start" in capsys.readouterr().err
    assert (
        starts("project-s0")
        == starts("pad-s0")
        == starts("pad-s1")
        == starts("pad-s2")
        == ["start"]
    )
    assert starts("project-s1") == ["go on"]
    assert run("--seeds", 0) == 0 and Path("sweep/results.md").read_text() == before


def test_parts_of_a_batch_that_were_chosen_as_a_run_began_are_no_other_run(run):
    assert run("--seeds", 0, "--micro-batch", "auto") == 0
    for name in ("project-s0", "pad-s0"):  # as memory.cut_batches leaves them
        config = json.loads(Path("sweep", name, "config.json").read_text())
        config["arguments"] |= {"micro_batch": 16, "accumulate": 8}
        config["from"] |= {"micro_batch": "auto", "accumulate": "--micro-batch"}
        Path("sweep", name, "config.json").write_text(json.dumps(config))
    assert run("--seeds", 0, "--micro-batch", "auto") == 0 and starts("pad-s0") == ["start"]
    with pytest.raises(UserError, match="--micro-batch is 16 there, not 0"):
        run("--seeds", 0)


def test_another_run_in_the_way_is_refused_by_name_before_anything_runs(run):
    assert run("--seeds", 0, "--epochs", 3) == 0
    with pytest.raises(
        UserError, match="project-s0 holds another run: --epochs is 3 there, not 4"
    ) as refused:
        run("--seeds", 1, 0, "--epochs", 4)
    assert refused.value.status == 2 and not Path("sweep/project-s1").exists()
    with pytest.raises(UserError, match="--epochs is 3 there, not 200"):
        run("--seeds", 0)
    with pytest.raises(UserError, match="--warmup-epochs is 0.2 there, not 1.0"):
        run("--seeds", 0, "--epochs", 3, "--warmup-epochs", 1)
    Path("sweep/pad-s0/config.json").write_text("{")
    with pytest.raises(UserError, match="pad-s0 holds .*no config.json that can be read"):
        run("--seeds", 0, "--epochs", 3)


def test_a_failure_stops_none_of_the_rest_and_is_named(run, capsys):
    assert run("--seeds", 0, 1, suite=SPOILT) == 1
    out, err = capsys.readouterr()
    assert "2 of 6 runs failed: hot-s0, hot-s1" in err.splitlines()[-1]
    assert (
        "3/6  hot-s0  FAILED: exit status 1, train.py: error: the loss is not finite (sweep/hot-s0.log)"
        in out
    )
    text = Path("sweep/results.md").read_text()
    assert (
        "Not finished: hot-s0, hot-s1." in text
        and "| pad | 2 | 62.50 ± 1.41 |" in text
        and "| hot" not in text
    )
    assert run("--seeds", 0, suite=SPOILT) == 1 and starts("hot-s0") == ["start", "go on"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_runs_at_work_and_the_rest_does_not_start(run, capsys, number):
    def interrupt():
        while not Path("sweep/slow-s0/waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    assert run("--seeds", 0, suite=SLOW) == 128 + number
    assert (
        capsys.readouterr().out
        == "interrupted with 0 of 3 runs finished; the same command goes on\n"
    )
    assert json.loads(Path("sweep/slow-s0/summary.json").read_text())["status"] == "interrupted"
    assert not Path("sweep/project-s0").exists()
    assert run("--seeds", 0, suite=SLOW) == 0 and starts("slow-s0") == ["start", "go on"]


def test_the_commands_of_a_dry_run_are_train_py_s(run, capsys):
    assert (
        run(
            "--seeds",
            0,
            1,
            "--dry-run",
            "--lr",
            0.05,
            "--ema-decay",
            "auto",
            "--deterministic",
            "--augment",
            "none",
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert not Path("sweep").exists() and len(lines) == 4
    for line in lines:
        args = train.build_parser().parse_args(shlex.split(line)[2:])
        assert (args.lr, args.ema_decay, args.deterministic, args.augment, args.dataset) == (
            0.05,
            None,
            True,
            "none",
            "shapes",
        )
    assert (args.model_arg, args.seed, args.output_dir) == (["shortcut=pad"], 1, "sweep/pad-s1")


def test_time_left_is_told_by_what_the_experiments_took():
    class A:
        label, state, finished = "a", "new", False

    class B(A):
        label = "b"

    progress = launch.Progress([], places=2, estimate=True)
    assert progress.rest([A], {}) == "1 to go"
    progress.seconds = {"a": [10.0, 20.0]}
    assert progress.rest([A, B], {}) == "about 0:00:15 left (1 experiment not timed yet)"
    progress.seconds["b"] = [100.0]
    assert (
        progress.rest([A, A, B], {}) == "about 0:01:40 left"
    )  # as long as the longest of them at least
    assert progress.rest([A], {A: time.monotonic() - 5}) == "about 0:00:15 left"


# ---- where they are made ---------------------------------------------------------------------------------------------


def test_gpus_are_dealt_out_and_a_cpu_s_threads_are_shared(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert (
        launch.places("cpu", 1) == [{}]
        and launch.places("cpu", 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    )
    with pytest.raises(UserError, match="--jobs 9 is more than the 8 cores that there are"):
        launch.places("cpu", 9)
    monkeypatch.setattr(launch.engine, "select_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.places("cuda", 2) == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-x")
    assert launch.places("cuda", 2) == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "GPU-x"},
    ]
    assert launch.places("cuda:1", 1) == [{}]
    for device, jobs, count in (("cuda", 3, "2 GPUs"), ("cuda:1", 2, "1 device")):
        with pytest.raises(UserError, match=f"--jobs {jobs} is more than the {count} that there"):
            launch.places(device, jobs)


def test_a_job_array_of_submitit(run, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setattr(launch, "CLUSTER", "local")
    assert run("--seeds", 0, "--launcher", "submitit", "--slurm-gpus", 0, suite=SPOILT) == 1
    out, err = capsys.readouterr()
    assert (
        "1 of 3 runs failed: hot-s0" in err
        and "FAILED: exit status 1, train.py: error: the loss is not finite" in out
    )
    assert "| pad | 1 | 61.50 |" in Path("sweep/results.md").read_text()
    assert run("--seeds", 0, "--launcher", "submitit") == 0 and starts("pad-s0") == ["start"]


def test_submitit_is_asked_for_only_where_it_is_needed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)  # not installed
    with pytest.raises(UserError, match="pip install submitit") as refused:
        run("--launcher", "submitit")
    assert refused.value.status == 2 and not starts("pad-s0")


def test_without_slurm_submitit_is_refused(run, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no SLURM here"):
        run("--launcher", "submitit")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ecaa"], "unknown suite 'ecaa': did you mean eca"),
        (["tiny", "--seeds", "0", "1", "0"], "--seeds names 0 twice"),
        (["tiny", "--seeds", "0", "-1"], "at least 0, not '-1'"),
        (["tiny", "--seeds"], "expected at least one argument"),
        (["tiny", "--jobs", "0"], "at least 1, not '0'"),
        (["tiny", "--jobs", "100000", "--device", "cpu"], "--jobs 100000 is more than the"),
        (["tiny", "--device", "cuda:77"], "--device cuda:77"),
        (["tiny", "--seed", "1"], "--seed: the suite decides that .see --seeds"),
        (
            ["tiny", "--model", "resnet18", "--resume", "x"],
            "--model, --resume: the suite decides that",
        ),
        (["optimizer-schedule", "--schedule", "linear"], "--schedule: the suite decides that"),
        (["tiny", "--epocs", "1"], "unknown argument --epocs; did you mean --epochs"),
        (["tiny", "--dataset", "folder", "--data-dir", "nowhere"], "no folder nowhere"),
        (["tiny", "--limit-train", "1000000"], "--limit-train 1000000"),
        (["missing"], "the suite missing needs models that are not there: resnet19"),
        (["tiny", "--output-dir", "file/x"], "--output-dir file/x can't be written"),
        (
            ["tiny", "--launcher", "submitit", "--slurm-arg", "account"],
            "--slurm-arg takes key=value",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_runs(
    run, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setitem(
        suites.SUITES, "missing", TINY._replace(experiments={"a": "--model resnet19"})
    )
    monkeypatch.setattr(launch, "start_here", None)
    (tmp_path / "file").touch()
    try:
        with pytest.raises(UserError, match=message) as refused:
            sweep.main(arguments)
        assert refused.value.status == 2 and "\n" not in str(refused.value)
    except SystemExit as refused:  # by argparse
        err = capsys.readouterr().err
        assert refused.code == 2 and re.search(message, err) and len(err.splitlines()) == 1


def test_a_run_that_another_process_is_at_is_left_to_it(run):
    from training import run_directory

    Path("sweep/pad-s0").mkdir(parents=True)
    Path("sweep/pad-s0/config.json").write_text('{"arguments": {}}')
    with (
        contextlib.closing(run_directory.RunDir("sweep/pad-s0")),
        pytest.raises(UserError, match="being written by another"),
    ):
        plans.wait_until_free(Path("sweep/pad-s0"), seconds=0)
    plans.wait_until_free(Path("sweep/pad-s0"), seconds=0)


def test_one_sweep_at_a_time(run):
    assert run("--seeds", 0) == 0
    with (
        plans.occupy(Path("sweep")),
        pytest.raises(UserError, match="being written by another process"),
    ):
        run("--seeds", 0, 1)


# ---- from end to end -------------------------------------------------------------------------------------------------

DRIVER = """
import cli, sweep
from sweeps import suites
from test_sweep import TINY
suites.SUITES["tiny"] = TINY
cli.run(sweep.main)
"""


def test_killed_in_the_middle_and_started_again_a_sweep_gives_the_same_tables(
    tmp_path, monkeypatch, few_shapes
):
    for part, examples in (("train", few_shapes.train), ("test", few_shapes.test)):
        for i in range(80):
            directory = tmp_path / "pictures" / part / few_shapes.classes[examples.labels[i]]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(examples.images[i].permute(1, 2, 0).numpy()).save(
                directory / f"{i}.png"
            )
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [
        "tiny",
        "--seeds",
        "0",
        "--dataset",
        "folder",
        "--data-dir",
        str(tmp_path / "pictures"),
        "--batch-size",
        "20",
        "--epochs",
        "4",
        "--device",
        "cpu",
        "--output-dir",
        "sweep",
    ]
    processes = {}
    for name in ("whole", "cut"):  # both at once: a core each
        (tmp_path / name).mkdir()
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            cwd=tmp_path / name,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
    monkeypatch.chdir(tmp_path / "cut")
    while not Path("sweep/pad-s0/metrics.csv").exists():
        assert processes["cut"].poll() is None, processes["cut"].communicate()
        time.sleep(0.01)
    processes["cut"].kill()
    processes["cut"].communicate()
    assert sweep.main(arguments) == 0
    out, _ = processes["whole"].communicate(timeout=300)
    assert processes["whole"].returncode == 0, out
    whole = (tmp_path / "whole" / "sweep" / "results.md").read_text()
    assert Path("sweep/results.md").read_text() == whole and "| pad | project | " in whole

    monkeypatch.setattr(launch, "start_here", None)  # nothing is left to run
    before = os.stat("sweep/pad-s0/last.pt").st_mtime_ns
    assert sweep.main(arguments) == 0 and os.stat("sweep/pad-s0/last.pt").st_mtime_ns == before
    with pytest.raises(UserError, match="--epochs is 4 there, not 7"):
        sweep.main([*arguments, "--epochs", "7"])
