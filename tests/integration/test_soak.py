"""A few seconds of benchmarks/soak.py, which is meant to run for minutes: clients of all kinds, some killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

START_S = 280
"""Eight processes import before it begins, on as few as two cores."""

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.timeout(START_S)
def test_a_short_soak_passes_every_check(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--minutes", "0.05", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S - 10, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert all(result["checks"].values())
    assert result["killed_clients"] >= 2  # the two that are left at the end at least
    assert result["outcomes"]["steady-shm"]["ok"]
    assert result["outcomes"]["prepared-shm"]["ok"]
    assert result["outcomes"]["malformed-grpc"]["refused"]
