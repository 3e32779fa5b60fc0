"""Makes many runs: several at once on the devices of this machine, or as a SLURM job array.

A run, here, is what plans.py makes: it has a `label` and a `state`, knows the command that makes it and those to `start` it
or to `go_on` with it, writes to `log`, and is `finished` or not.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import torch

from common.errors import UserError
from training import devices, terminal

CLUSTER = "slurm"  # of submitit's executors; the tests take "local"


def places(device, jobs):
    """The environment of each of `jobs` runs at once: a GPU, or its share of the CPU's threads. Raises UserError."""
    device = devices.select_device(device)
    if device.type == "cuda" and device.index is None:
        count = torch.cuda.device_count()
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        environments, kind = (
            [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")[:count]],
            "GPU",
        )
    elif device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = str(max(1, torch.get_num_threads() // jobs))
        environments, kind = [{"OMP_NUM_THREADS": threads} if jobs > 1 else {}] * cores, "core"
    else:
        environments, kind = [{}], "device"
    if jobs > (n := len(environments)):
        raise UserError(
            f"--jobs {jobs} is more than the {n} {kind}{'s' * (n > 1)} that there {'are' if n > 1 else 'is'}",
            2,
        )
    return environments[:jobs]


# On Linux a run gets SIGTERM when the sweep dies without a word (PR_SET_PDEATHSIG is 1): nobody would wait for it.
TIED = [
    sys.executable,
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])",
]


def start_here(run, environment):
    """Starts a run in a session of its own: Ctrl-C in a terminal reaches it once, by way of `execute`."""
    command = [*TIED, *run.command] if sys.platform == "linux" else run.command
    with open(run.log, "a") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | environment,
        )


class Submitted:
    """A job of submitit, asked like a process."""

    def __init__(self, job):
        self.job, self.reason = job, ""

    def poll(self):
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # whatever ended it: its time, its node, an scancel
            self.reason = first_line(error)
            return 1

    def send_signal(self, number):
        self.job.cancel(
            check=False
        )  # SLURM sends SIGTERM to every process of the job, so train.py saves


def submit(runs, folder, parameters):
    """Hands the runs to SLURM as one job array through submitit; {run: Submitted}. Raises UserError.

    parameters: of submitit.AutoExecutor. A job that is preempted and queued again goes on from its run's last.pt; one that
    reaches its time limit ends as failed, and goes on when the sweep is started again.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "--launcher submitit needs the package submitit (pip install submitit)", 2
        ) from error
    if CLUSTER == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "--launcher submitit: there is no SLURM here (no sbatch); without it the runs are made here",
            2,
        )

    def script(run):
        """For sh, which becomes train.py: nothing stands between it and SLURM's signals."""
        last, log = (shlex.quote(str(path)) for path in (run.path / "last.pt", run.log))
        return f"exec >>{log} 2>&1; [ -f {last} ] && exec {shlex.join(run.go_on)}; exec {shlex.join(run.start)}"

    try:
        executor = submitit.AutoExecutor(folder, cluster=CLUSTER)
        executor.update_parameters(**parameters)
        with executor.batch():
            jobs = [
                executor.submit(subprocess.call, script(run), shell=True, cwd=os.getcwd())
                for run in runs
            ]
    except Exception as error:  # submitit's, SLURM's and the file system's have no class in common
        raise UserError(
            f"--launcher submitit: the jobs could not be handed over ({first_line(error)})"
        ) from error
    return {run: Submitted(job) for run, job in zip(runs, jobs)}


def execute(runs, start, places, report):
    """Makes the runs, one at a time at each of `places`; ({run that failed: why}, number of the signal that came, or 0).

    start(run, place) -> a process; report(run, seconds, why it failed or "", runs that wait, {runs at work: since when}).
    The first SIGINT or SIGTERM goes on to the runs at work, which save; a second one ends this at once.
    """
    waiting, places, active, failed, told = list(runs), list(places), {}, {}, False
    with terminal.StopSignal() as stop:
        try:
            while waiting or active:
                while waiting and places and not stop():
                    run, place = waiting.pop(0), places.pop(0)
                    active[run] = start(run, place), place, time.monotonic()
                if stop() and not told:
                    told = True
                    waiting.clear()
                    for process, _, _ in active.values():
                        process.send_signal(stop.number)
                for run, (process, place, since) in list(active.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del active[run]
                    places.append(place)
                    if not run.finished:
                        if stop():
                            continue
                        failed[run] = (
                            getattr(process, "reason", "")
                            or f"exit status {status}, {last_line(run.log)}"
                        )
                    others = {other: at for other, (_, _, at) in active.items()}
                    report(run, time.monotonic() - since, failed.get(run, ""), waiting, others)
                time.sleep(0.1)
        finally:
            for process, _, _ in active.values():
                process.send_signal(signal.SIGTERM)
    return failed, stop.number


class Progress:
    """A line for each run that ends, and how long the rest will take, judged by what the experiments took so far."""

    def __init__(self, runs, places, estimate):
        self.total, self.done = len(runs), sum(run.finished for run in runs)
        self.places, self.estimate, self.seconds = places, estimate, {}

    def __call__(self, run, seconds, failure, waiting, active):
        self.done += 1
        if not failure and run.state == "new":
            self.seconds.setdefault(run.label, []).append(seconds)
        said = f"FAILED: {failure} ({run.log})" if failure else f"{run.summary['test_acc']:.2f} %"
        rest = f"  {self.rest(waiting, active)}" if waiting or active else ""
        print(
            f"{self.done}/{self.total}  {run.path.name}  {said}  {clock(seconds)}{rest}", flush=True
        )

    def rest(self, waiting, active):
        """The time left if a run takes what its experiment took before, or, where that is not known, what the others took."""
        if not self.estimate or not self.seconds:
            return f"{len(waiting) + len(active)} to go"
        means = {label: sum(times) / len(times) for label, times in self.seconds.items()}
        usual, now = sum(means.values()) / len(means), time.monotonic()
        left = [means.get(run.label, usual) for run in waiting]
        left += [
            max(0.0, means.get(run.label, usual) - (now - since)) for run, since in active.items()
        ]
        unknown = len({run.label for run in (*waiting, *active)} - set(means))
        doubt = f" ({unknown} experiment{'s' * (unknown > 1)} not timed yet)" if unknown else ""
        return f"about {clock(max(sum(left) / self.places, *left))} left{doubt}"


def clock(seconds):
    return str(timedelta(seconds=round(seconds)))


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


def last_line(path):
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
