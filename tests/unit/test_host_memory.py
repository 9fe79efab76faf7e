"""Available memory: of the machine and of the control groups around this process, whichever is least."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertd_server.host_memory import available_memory_bytes

GIB = 2**30


def machine(root: Path, available_kib: int, groups: dict[str, tuple[str, int]]) -> Path:
    """A /proc and a /sys. groups: limit and use by path; the last is the process' own."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kib} kB\n")
    for path, (limit, used) in groups.items():
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (root / "proc/self/cgroup").write_text(f"0::/{path}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 4 * GIB),
        ({"a": ("max", 1)}, 4 * GIB),
        ({"a": (str(3 * GIB), GIB)}, 2 * GIB),
        ({"a": (str(9 * GIB), GIB)}, 4 * GIB),
        ({"a": (str(3 * GIB), 2 * GIB), "a/b": ("max", 1)}, GIB),
        ({"a": (str(GIB), 2 * GIB)}, 0),
    ],
)
def test_the_least_counts(tmp_path: Path, groups: dict[str, tuple[str, int]], expected: int) -> None:
    assert available_memory_bytes(machine(tmp_path, 4 * 2**20, groups)) == expected


def test_cached_files_make_room(tmp_path: Path) -> None:
    root = machine(tmp_path, 4 * 2**20, {"a": (str(3 * GIB), 2 * GIB)})
    (root / "sys/fs/cgroup/a/memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert available_memory_bytes(root) == 2 * GIB


def test_where_nobody_says_nothing_is_known(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None


def test_this_machine_has_some() -> None:
    available = available_memory_bytes()
    assert available is None or available > 0
