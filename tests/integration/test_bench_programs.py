"""Programs of benchmarks/ that drive parts of a server without gRPC follow these parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("program", "options", "expected"),
    [
        ("bench_frontends.py", ["--tokens", "1", "--count", "5", "--rounds", "1"], "1 tokens: front-end"),
        ("bench_gate.py", ["--tokens", "3", "--in-flight", "4", "--seconds", "0.1", "--rounds", "1"], "req/batch"),
        (
            "bench_gate.py",
            ["--regions", "--tokens", "3", "--in-flight", "4", "--seconds", "0.1", "--rounds", "1"],
            "caller's memory",
        ),
        ("bench_engine_host.py", ["--tokens", "3", "--in-flight", "4", "--seconds", "0.1", "--rounds", "1"], "req/s"),
    ],
)
def test_it_runs(program: str, options: list[str], expected: str) -> None:
    options = options if program == "bench_frontends.py" else [*options, "--layers", "2"]
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *options], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
