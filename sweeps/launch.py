"""Executes the runs of a sweep (plans.Run) on the devices of this machine or on a SLURM cluster."""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch

from common.errors import UserError, first_line
from training import devices, terminal

CLUSTER = "slurm"  # submitit's name of it; tests use "local"
POLL_SECONDS = 0.1


def find_slots(device, jobs):
    """The environment variables of each of `jobs` concurrent runs: a GPU, or a share of the CPU.

    Raises UserError if the machine has fewer devices or cores.
    """
    device = devices.select_device(device)
    if device.type == "cuda" and device.index is None:
        kind, count = "GPU", torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",")[:count] if visible else map(str, range(count))
        environments = [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    elif device.type == "cpu":
        has_affinity = hasattr(os, "sched_getaffinity")
        kind, count = "core", len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        threads = str(max(1, torch.get_num_threads() // jobs))
        environments = [{"OMP_NUM_THREADS": threads} if jobs > 1 else {}] * count
    else:
        kind, environments = "device", [{}]
    if jobs > len(environments):
        available = f"{len(environments)} {kind}{'' if len(environments) == 1 else 's'}"
        raise UserError(f"--jobs {jobs} is more than the {available} of this machine", status=2)
    return environments[:jobs]


@contextlib.contextmanager
def threads_of(slot):
    """A block in which torch has as many threads as a run in this slot of find_slots."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int((slot or {}).get("OMP_NUM_THREADS", threads)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Linux sends a run SIGTERM (15) when the process of its sweep dies: PR_SET_PDEATHSIG is 1.
END_WITH_PARENT = [
    sys.executable,
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])",
]


def start_here(run, environment):
    """Starts a run in its own session, so that Ctrl-C reaches it only once, through `execute`."""
    command = [*END_WITH_PARENT, *run.command] if sys.platform == "linux" else run.command
    options = dict(start_new_session=True, env=os.environ | environment)
    with open(run.log, "a") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **options
        )


class SubmittedJob:
    """A job of submitit with the methods of a process."""

    def __init__(self, job):
        self.job = job
        self.reason = ""

    def poll(self):
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # its time limit, a failed node, scancel, ...
            self.reason = first_line(error)
            return 1

    def send_signal(self, number):
        # SLURM sends SIGTERM to all processes of the job, so the run saves.
        self.job.cancel(check=False)


def submit(runs, folder, parameters):
    """Submits the runs as one job array; returns {run: SubmittedJob}. Raises UserError.

    parameters: of submitit.AutoExecutor. A job that is preempted and queued again resumes its run.
    A job that reaches its time limit fails; the next sweep resumes its run.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher submitit needs submitit: pip install submitit", 2) from error
    if CLUSTER == "slurm" and not shutil.which("sbatch"):
        raise UserError("--launcher submitit: this machine has no SLURM (no sbatch)", status=2)
    try:
        executor = submitit.AutoExecutor(folder, cluster=CLUSTER)
        executor.update_parameters(**parameters)
        with executor.batch():
            call = dict(shell=True, cwd=os.getcwd())
            jobs = [executor.submit(subprocess.call, shell_script(run), **call) for run in runs]
    except Exception as error:  # submitit, SLURM and the file system raise unrelated classes
        raise UserError(
            f"--launcher submitit: the jobs could not be submitted ({first_line(error)})"
        ) from error
    return {run: SubmittedJob(job) for run, job in zip(runs, jobs)}


def shell_script(run):
    """Starts or resumes a run. `exec` replaces the shell, so SLURM's signals reach the run."""
    last, previous = (shlex.quote(str(run.path / f"{name}.pt")) for name in ("last", "previous"))
    log, start = shlex.quote(str(run.log)), shlex.join(run.start_command)
    saved, resume = f"[ -f {last} ] || [ -f {previous} ]", shlex.join(run.resume_command)
    return f"exec >>{log} 2>&1; {{ {saved}; }} && exec {resume}; exec {start}"


@dataclass
class ActiveRun:
    process: subprocess.Popen | SubmittedJob
    slot: object
    started: float  # time.monotonic()


def in_order(runs):
    """The function `choose` of `execute` for a list of runs."""
    waiting = list(runs)
    return lambda active: waiting.pop(0) if waiting else None


def execute(choose, start, slots, report, end=math.inf):
    """Executes runs, one at a time in each of `slots`.

    choose(active runs) returns the run to start next, or None if there is none until another one
    ends. start(run, slot) returns a process. report(run, seconds, failure) is called when a run
    has ended: failure says why, or is "". Returns ({failed run: reason}, number of the received
    signal or 0). The first SIGINT or SIGTERM is passed on to the active runs, which save and end;
    a second one ends this process immediately. At the time `end` (of time.monotonic) they get a
    SIGTERM.
    """
    free, active, failed = list(slots), {}, {}
    with terminal.StopSignal() as stop:

        def is_over():
            return stop() or time.monotonic() >= end

        def start_runs():
            while free and not is_over():
                run = choose(list(active))
                if run is None or is_over():
                    return
                slot = free.pop(0)
                active[run] = ActiveRun(start(run, slot), slot, time.monotonic())

        passed_on = False
        try:
            start_runs()
            while active:
                if is_over() and not passed_on:
                    passed_on = True
                    for job in active.values():
                        job.process.send_signal(stop.number or signal.SIGTERM)
                ended = {run: job.process.poll() for run, job in active.items()}
                ended = {run: status for run, status in ended.items() if status is not None}
                for run, status in ended.items():
                    job = active.pop(run)
                    free.append(job.slot)
                    if run.finished or not passed_on:
                        failure = "" if run.finished else failure_reason(run, job.process, status)
                        if failure:
                            failed[run] = failure
                        report(run, time.monotonic() - job.started, failure)
                if ended:
                    start_runs()
                else:
                    time.sleep(POLL_SECONDS)
        finally:  # after an error, too: a second signal would end a run while it saves
            if not passed_on:
                for job in active.values():
                    job.process.send_signal(signal.SIGTERM)
            while any(job.process.poll() is None for job in active.values()):
                time.sleep(POLL_SECONDS)
    return failed, stop.number


def failure_reason(run, process, status):
    """What submitit says, or the exit status and the last line of the log."""
    if getattr(process, "reason", ""):
        return process.reason
    log = run.log.read_text(encoding="utf-8", errors="replace") if run.log.is_file() else ""
    lines = log.split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}, {last}"


class Progress:
    """Prints a line for each of `runs` that ends, and estimates the remaining time.

    total: the number of runs, with those that were finished before.
    """

    def __init__(self, runs, total, num_slots, estimate):
        self.left = list(runs)
        self.total, self.num_slots, self.estimate = total, num_slots, estimate
        self.seconds = {}  # of the runs that ended, by experiment

    def report(self, run, seconds, failure):
        self.left.remove(run)
        if failure:
            result = f"FAILED: {failure} ({run.log})"
        else:
            result = f"{run.summary['test_acc']:.2f} %"
            if run.state == "new":
                self.seconds.setdefault(run.label, []).append(seconds)
        ended = f"{self.total - len(self.left)}/{self.total}"
        words = [ended, run.path.name, result, clock(seconds)]
        if self.left:
            words.append(self.estimated_time(self.left))
        print("  ".join(words), flush=True)

    def estimated_time(self, runs):
        """The time for `runs`, if each takes as long as earlier ones of its experiment (or all)."""
        if not self.estimate or not self.seconds:
            return f"{len(runs)} to go"
        means = {label: sum(times) / len(times) for label, times in self.seconds.items()}
        usual = sum(means.values()) / len(means)
        seconds = [means.get(run.label, usual) for run in runs]
        return f"about {clock(max(sum(seconds) / self.num_slots, *seconds))} left"


def clock(seconds):
    return str(timedelta(seconds=round(seconds)))
