"""What a run is on: versions, device, git commit, command, and how long its process has run."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
IMPORTED = time.monotonic()


def environment(device):
    """{name: JSON value} for config.json."""
    on_cuda = device.type == "cuda"
    name = f"{device.type} ({processor()})"
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git": git_state(),
        "command": shlex.join([script_name(), *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def process_seconds():
    """Seconds since this process started.

    On Linux with the start of Python and all imports; elsewhere since this module was imported.
    """
    try:
        # The second field is the name of the program, which may contain spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.monotonic() - IMPORTED


def script_name():
    """The file name of the script that runs."""
    return Path(sys.argv[0]).name


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor():
    """The name of the processor, where the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def is_intel():
    """Whether the processor says that it is Intel's; False if it says nothing."""
    return "Intel" in (_cpuinfo("vendor_id") or platform.processor())


def _cpuinfo(key):
    """The value of a key for the first processor under Linux, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (line.split(":", 1)[1].strip() for line in lines if line.startswith(key))
    return next(values, "")


# Paths of git: without published results and pages.
CODE = (":/", ":(top,exclude)results", ":(top,exclude)docs", ":(top,exclude)README.md")


def git_state():
    """Commit of this code and whether it was changed since; None outside a repository.

    Results and pages are no code: a campaign and `sweep.py report` change them between runs.
    """
    try:
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments):
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
