"""Free memory: available(torch.device("cuda")) is in bytes."""

import os
from contextlib import suppress
from pathlib import Path

import torch


def available(device):
    """Bytes that this process can still allocate on a device.

    For a CPU: what the machine has free or, if that is less, what the container allows.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min([_free_memory(), *_left_in_container()])


def _free_memory():
    """What Linux can provide without swapping; on other systems half of the installed memory."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 2**32


def _left_in_container(root=Path("/sys/fs/cgroup")):
    """The bytes left under each memory limit of the container's control groups, versions 2 and 1.

    Cached files count as used there, but the system drops them when memory is needed.
    """
    versions = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    )
    left = []
    for limit, used, cached in versions:
        with suppress(OSError, ValueError):  # the file is missing, or holds "max"
            lines = (root / limit).with_name("memory.stat").read_text().splitlines()
            cached_bytes = int(dict(line.split() for line in lines).get(cached, 0))
            used_bytes = int((root / used).read_text()) - cached_bytes
            left.append(int((root / limit).read_text()) - used_bytes)
    return left
