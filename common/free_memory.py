"""How much memory a device has free.

available(torch.device("cuda"))                 # bytes
"""

import os
from pathlib import Path

import torch


def available(device):
    """Bytes that this process may still take on a device; of a CPU, of the machine's or, if less, the container's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min([_free_memory(), *_left_in_container()])


def _free_memory():
    """Linux says what can be had without swapping; elsewhere half of what is built in stands for it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
            if hasattr(os, "sysconf")
            else 2**32
        )


def _left_in_container(root=Path("/sys/fs/cgroup")):
    """[what a control group leaves], versions 2 and 1, or []. Cached files count as taken there, but give way."""
    versions = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    )
    for limit, used, cached in versions:
        try:
            stat = dict(
                line.split()
                for line in (root / limit).with_name("memory.stat").read_text().splitlines()
            )
            return [
                int((root / limit).read_text())
                - int((root / used).read_text())
                + int(stat.get(cached, 0))
            ]
        except (OSError, ValueError):  # not there, or "max"
            continue
    return []
