"""How much memory there is for weights that are to be loaded beside others."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that tensors of a device could still take; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps of tensors that are gone is as good as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [value for value in (_available_bytes(), _cgroup_free_bytes()) if value is not None]
    return min(known, default=None)


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory of the machine that can be had without swapping."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_free_bytes(directory: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; None: it has none. The cache of files counts as free: it makes room."""
    try:
        limit = (directory / "memory.max").read_text().strip()
        used = int((directory / "memory.current").read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
