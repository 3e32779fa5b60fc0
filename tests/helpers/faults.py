"""Faults of a process that trains. What they replace is gone when the process ends.

They replace what a run is made of by its interfaces: the loss function, `evaluate`, the methods of
RunDir, and the small functions of common.files.
"""

import errno
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch.nn.functional as F

from common import files
from training import evaluation, run
from training.run_directory import RunDir


def inject(text):
    """Calls the faults of processes.encode."""
    for name, *arguments in json.loads(text):
        globals()[name](*arguments)


def replace(owner, name, wrapper):
    """Puts wrapper(original) in the place of owner.name."""
    setattr(owner, name, wrapper(getattr(owner, name)))


def before(owner, name, number, act):
    """Calls act() before call number `number` (from 1) of owner.name."""
    calls = 0

    def wrapper(original):
        def counting(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                act()
            return original(*arguments, **options)

        return counting

    replace(owner, name, wrapper)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# ---- signals -------------------------------------------------------------------------------------

# The call before which something happens: (owner, name, number of the call).
PHASES = {
    "first step": (F, "cross_entropy", 1),
    "training": (F, "cross_entropy", 5),
    "evaluation": (evaluation, "evaluate", 1),
    "saving": (RunDir, "_write_last", 2),
    "test": (run.Run, "final_test", 1),
}


def send(phase, *numbers):
    """Sends signals to this process in that phase, each when the one before it was handled."""

    def act():
        for number, following in zip(numbers, (*numbers[1:], None)):
            os.kill(os.getpid(), number)
            handled = (signal.SIG_DFL, signal.default_int_handler)
            while following and signal.getsignal(following) not in handled:
                time.sleep(0.001)

    before(*PHASES[phase], act)


def terminate_job(phases, rank, sign):
    """Sends SIGTERM to torchrun and to all ranks, as SLURM does, from that rank in each phase.

    The file `sign` then holds the number of the training step in which the first ones were sent.
    """
    if os.environ["RANK"] != str(rank):
        return
    steps = []

    def act():
        if not Path(sign).exists():
            Path(sign).write_text(str(len(steps)))
        agent = os.getppid()
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for pid in (agent, *children):
            os.kill(int(pid), signal.SIGTERM)

    for phase in phases:
        before(*PHASES[phase], act)

    for step in range(1, 100):
        before(F, "cross_entropy", step, partial(steps.append, step))


def announce(moment, sign, until=None):
    """Creates the file `sign` when the run's directory is opened (moment 0) or in that step.

    until: a file; the process waits for it.
    """

    def act():
        Path(sign).touch()
        while until and not Path(until).exists():
            time.sleep(0.005)

    if moment == 0:
        before(RunDir, "__init__", 1, act)
    else:
        before(F, "cross_entropy", moment, act)


# ---- files ---------------------------------------------------------------------------------------

STAGES = ("opened", "half written", "written", "synced", "linked", "kept", "renamed")


def kill_in_save(number, stage):
    """SIGKILL in that save of last.pt (from 1; the first one is before the first step)."""
    saves = 0

    def die_at(*stages):
        if saves == number and stage in stages:
            die()

    def opening(original):
        def open_file(path, mode):
            nonlocal saves
            file = original(path, mode)
            if Path(path).name.startswith(".last.pt."):
                saves += 1
                die_at("opened")
                if saves == number and stage == "half written":
                    file.write = lambda data, write=file.write: die_in_write(file, write, data)
            return file

        return open_file

    def die_in_write(file, write, data):
        if file.tell() + len(data) > 20_000:
            write(data[: len(data) // 2])
            file.flush()
            die()
        return write(data)

    def surrounding(earlier, later):
        def wrapper(original):
            def operation(*arguments):
                die_at(earlier)
                result = original(*arguments)
                die_at(later)
                return result

            return operation

        return wrapper

    def renaming(original):
        def rename(path, target):
            if Path(target).name == "last.pt":
                die_at("kept")
            original(path, target)
            if Path(target).name == "last.pt":
                die_at("renamed")

        return rename

    replace(files, "open_file", opening)
    replace(files, "sync", surrounding("written", "synced"))
    replace(files, "link", surrounding(None, "linked"))
    replace(files, "rename", renaming)


def file_size_limit(limit):
    """No file may grow larger than so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_disk(size):
    """Each file takes so many bytes, then there is no space left."""

    def opening(original):
        def open_file(path, mode):
            file = original(path, mode)
            file.write = lambda data, write=file.write: write_if_space(file, write, data)
            return file

        return open_file

    def write_if_space(file, write, data):
        if file.tell() + len(data) > size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(data)

    replace(files, "open_file", opening)


# ---- losses --------------------------------------------------------------------------------------


def spoil_loss(value, first):
    """From that training step on (from 1), the loss is multiplied by "nan" or "inf"."""
    steps = 0

    def wrapper(original):
        def cross_entropy(*arguments, **options):
            nonlocal steps
            steps += 1
            loss = original(*arguments, **options)
            return loss * float(value) if steps >= first else loss

        return cross_entropy

    replace(F, "cross_entropy", wrapper)


# ---- accuracies ----------------------------------------------------------------------------------


def fix_accuracies(*accuracies):
    """The first evaluations have these accuracies in %: of a model, of its average, and so on."""
    left = list(accuracies)

    def wrapper(original):
        def evaluate(*arguments, **options):
            metrics = original(*arguments, **options)
            return metrics | {"acc": left.pop(0)} if left else metrics

        return evaluate

    replace(evaluation, "evaluate", wrapper)
