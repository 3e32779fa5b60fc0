"""A small suite for the tests of sweep.py. As a script: sweep.py with this suite."""

import os
import threading
import time

import sweep
from common import command_line
from sweeps import suites

TINY = suites.Suite(
    "a suite of the tests",
    {"project": "--model resnet20", "pad": "--model resnet20 --model-arg shortcut=pad"},
    [("does it help?", "pad", "project")],
    "--dataset shapes",
)


def kill_at(path, number, seconds=60):
    """Sends this process the signal `number` as soon as a file exists."""
    path, end = path.resolve(), time.monotonic() + seconds

    def wait():
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        if path.exists():
            os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    suites.SUITES["tiny"] = TINY
    command_line.run(sweep.main)
