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


def _left_in_container(root=Path("/sys/fs/cgroup"), membership=Path("/proc/self/cgroup")):
    """The bytes left under each memory limit of this process's control groups, versions 2 and 1.

    A container has its own root; a job of SLURM or systemd is in a group below it. Cached files
    count as used there, but the system drops them when memory is needed.
    """
    versions = (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    left, own = [], _own_groups(membership)
    for controller, limit, used, cached in versions:
        parts = own.get(controller, ())
        for depth in range(len(parts) + 1):
            group = root.joinpath(controller, *parts[:depth])
            with suppress(OSError, ValueError):  # the file is missing, or holds "max"
                lines = (group / "memory.stat").read_text().splitlines()
                cached_bytes = int(dict(line.split() for line in lines).get(cached, 0))
                used_bytes = int((group / used).read_text()) - cached_bytes
                left.append(int((group / limit).read_text()) - used_bytes)
    return left


def _own_groups(membership):
    """{"" of version 2, or "memory" of version 1: the names that lead to this process's group}."""
    groups = {}
    with suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                groups["memory" if controllers else ""] = path.strip("/").split("/")
    return {name: parts for name, parts in groups.items() if parts[0] not in ("", "..")}
