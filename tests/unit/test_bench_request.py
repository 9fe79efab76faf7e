"""benchmarks/bench_request.py follows the classes that it drives without a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bench_request.py"


@pytest.mark.parametrize("options", [[], ["--python"]], ids=["codec", "python"])
def test_every_request_is_answered(options: list[str]) -> None:
    command = [sys.executable, str(PROGRAM), "--tokens", "1", "3", "--count", "5", "--rounds", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(" tokens:")[0].strip() for line in done.stdout.splitlines()[1:]] == ["1", "3"]
