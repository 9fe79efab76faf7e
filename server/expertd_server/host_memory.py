"""How much of the host's memory there is to have."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory_bytes"]

_UNLIMITED = 2**60


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """What the machine has left, or this process' control group, whichever is less; None where neither says.

    root: where /proc and /sys are.
    """
    known = [value for value in (_machine(root), _control_group(root)) if value is not None]
    return min(known) if known else None


def _machine(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group(root: Path) -> int | None:
    """The least that is left to the group of this process and to those around it (cgroup v2)."""
    path = next((line[3:] for line in _lines(root / "proc/self/cgroup") if line.startswith("0::")), None)
    if path is None:
        return None
    base = root / "sys/fs/cgroup"
    group = base / path.lstrip("/")
    left = []
    while True:
        limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
        if limit and used and limit[0] != "max" and int(limit[0]) < _UNLIMITED:
            # The cache of files counts as free: it makes room.
            stat = dict(line.split() for line in _lines(group / "memory.stat"))
            left.append(max(0, int(limit[0]) - int(used[0]) + int(stat.get("inactive_file", 0))))
        if group == base:
            break
        group = group.parent
    return min(left) if left else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
