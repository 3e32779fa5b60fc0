"""Selecting, seeding and measuring the device."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from common.errors import UserError, first_line
from data import derive_seed

try:
    import resource
except ImportError:  # Windows
    resource = None


def select_device(name):
    """torch.device for "auto" (CUDA, else MPS, else the CPU) or a name. Raises UserError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("Expected one of those below")
        if name == "cuda" and torch.cuda.is_available():
            # Trying it would take memory of the first GPU in each of several processes.
            return device
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = "" if "Expected one of" in str(error) else f" ({first_line(error)})"
        allowed = "auto, cpu, cuda, cuda:<n> or mps"
        raise UserError(f"--device {name} can't be used{reason}: must be {allowed}", 2) from error
    return device


def configure_backends(deterministic):
    """Makes results bitwise reproducible for the same seed, machine and versions, or lets cuDNN
    choose the fastest convolutions.

    Either way fp32 is fp32: by default torch lets convolutions round to TF32. Call it before the
    first matrix product on a GPU, which is when cuBLAS reads its setting.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(deterministic)


def keep_freed_memory():
    """Keeps the memory that a step frees for the next one (Linux with glibc; for runs on a CPU).

    By default a large tensor is returned to the operating system, and the next one is made of new
    pages. With airbench94 on two cores this takes a quarter of the time at 2,000 images at once,
    and 5 to 10 % of it at 500.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def seed_model(seed, device, *key):
    """Seeds what modules draw from (initialization, dropout, drop-path).

    key: what derive_seed takes after the seed, e.g. an epoch, a purpose and a batch.
    """
    value = derive_seed(seed, *key)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def synchronize(device):
    """Waits for the device: before this a clock measures only what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device):
    """Restarts peak_memory_mb on a GPU; the peak of a process can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device):
    """Largest memory so far in MiB: of tensors on a GPU, of the process on a CPU; or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux's ru_maxrss would include the process that started this one.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
