"""Choosing, seeding and measuring the device."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from common.errors import UserError
from data import derive_seed


def select_device(name):
    """torch.device for "auto" (CUDA, then Apple's MPS, then the CPU) or a device's name. Raises UserError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("Expected one of those below")
        if name == "cuda" and torch.cuda.is_available():
            return device  # no tensor to try it: of several processes, each would take memory of the first GPU
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = (
            "" if "Expected one of" in str(error) else f" ({str(error).strip().splitlines()[0]})"
        )
        raise UserError(
            f"--device {name} can't be used here{reason}: auto, cpu, cuda, cuda:<n> or mps",
            status=2,
        ) from error
    return device


def make_deterministic(on):
    """Same seed, machine and versions: the same bits (on), or the fastest convolution for each shape (off).

    Either way fp32 is fp32: left alone, torch lets convolutions round to TF32, and matrix products not. Call it before the
    first matrix product on a GPU: cuBLAS reads its setting then.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not on
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(on)


def seed_model(seed, device, *place):
    """Seeds what modules draw from (initialisation, dropout, drop-path) for a place: a purpose, or an epoch and batch."""
    value = derive_seed(seed, *place)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def synchronize(device):
    """Waits for the device: before this a clock measures only what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device):
    """Lets peak_memory_mb begin anew on a GPU; the system's count of a process can't."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device):
    """Largest memory so far: of tensors on a GPU, of the whole process on a CPU; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(
        OSError, StopIteration
    ):  # of Linux; its ru_maxrss would count what the process that started this one took
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
