"""A few seconds of benchmarks/soak.py, which is meant to run for minutes: clients of all kinds, some killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_a_short_soak_passes_every_check(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--minutes", "0.1", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert all(result["checks"].values())
    assert result["killed_clients"] >= 2
    assert result["outcomes"]["steady-shm"]["ok"]
    assert result["outcomes"]["malformed-grpc"]["refused"]
