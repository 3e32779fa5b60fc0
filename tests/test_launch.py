"""Where sweep.py executes runs, how long they may take, and when they end."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT
from helpers.processes import TIMEOUT

from common.errors import UserError
from sweeps import launch


def test_concurrent_runs_share_the_threads_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert launch.find_slots("cpu", 1) == [{}]
    assert launch.find_slots("cpu", 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    with pytest.raises(UserError, match="--jobs 9 is more than the 8 cores of this machine"):
        launch.find_slots("cpu", 9)


def test_each_concurrent_run_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(launch.devices, "select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, names in {"": ("0", "1"), "5,GPU-x": ("5", "GPU-x")}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.find_slots("cuda", 2) == [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    assert launch.find_slots("cuda:1", 1) == [{}]
    for device, jobs, count in (("cuda", 3, "2 GPUs"), ("cuda:1", 2, "1 device")):
        with pytest.raises(UserError, match=f"--jobs {jobs} is more than the {count} of"):
            launch.find_slots(device, jobs)


def test_the_remaining_time_is_estimated_per_experiment():
    a, b = SimpleNamespace(label="a"), SimpleNamespace(label="b")
    progress = launch.Progress([], 0, num_slots=2, estimate=True)
    assert progress.estimated_time([a]) == "1 to go"
    progress.seconds = {"a": [10.0, 20.0]}
    assert progress.estimated_time([a, b]) == "about 0:00:15 left"
    progress.seconds["b"] = [100.0]
    assert progress.estimated_time([a, a, b]) == "about 0:01:40 left"  # the longest run
    assert progress.estimated_time([a] * 4) == "about 0:00:30 left"


SWEEP = """
import pathlib, sys, time, types
from sweeps import launch
run = types.SimpleNamespace(command=[sys.executable, "-c", sys.argv[1]], log=pathlib.Path("log"))
launch.start_here(run, {})
time.sleep(600)
"""
RUN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("ended").touch(), sys.exit()))
pathlib.Path("started").touch()
time.sleep(600)
"""


SAVING = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
time.sleep(600)
"""


@dataclass(frozen=True)
class Run:
    command: tuple
    log: Path
    finished: bool = True


def test_an_error_of_a_sweep_waits_until_its_runs_are_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "import pathlib, time\nwhile not pathlib.Path('started').exists(): time.sleep(0.01)"
    runs = [Run((sys.executable, "-c", code), tmp_path / "log") for code in (SAVING, script)]

    def report(run, seconds, failure):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        launch.execute(launch.in_order(runs), launch.start_here, [{}, {}], report)
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't signal this")
def test_a_killed_sweep_ends_its_runs(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, RUN], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    wait_for(tmp_path / "started", process)
    process.kill()
    process.wait()
    wait_for(tmp_path / "ended")


def wait_for(path, process=None):
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < end and (process is None or process.poll() is None), path
        time.sleep(0.01)
