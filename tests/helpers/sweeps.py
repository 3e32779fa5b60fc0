"""A small suite for the tests of sweep.py. As a script: sweep.py with this suite."""

import sweep
from common import command_line
from sweeps import suites

TINY = suites.Suite(
    "a suite of the tests",
    {"project": "--model resnet20", "pad": "--model resnet20 --model-arg shortcut=pad"},
    [("does it help?", "pad", "project")],
    "--dataset shapes",
)

if __name__ == "__main__":
    suites.SUITES["tiny"] = TINY
    command_line.run(sweep.main)
