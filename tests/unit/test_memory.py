"""How much memory there is, as the system tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertd_server.memory import _available_bytes, _cgroup_free_bytes, free_bytes


def test_this_machine_has_some() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 0 < free < 2**50


def test_the_machine(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert _available_bytes(meminfo) is None
    meminfo.write_text("MemTotal:       100 kB\nMemFree:         10 kB\nMemAvailable:    60 kB\n")
    assert _available_bytes(meminfo) == 60 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [("1000", 600, 0, 400), ("1000", 900, 250, 350), ("1000", 1001, 0, 0), ("max", 600, 0, None)],
)
def test_a_container(tmp_path: Path, limit: str, used: int, cached: int, free: int | None) -> None:
    assert _cgroup_free_bytes(tmp_path) is None, "no limit is told"
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert _cgroup_free_bytes(tmp_path) == free
