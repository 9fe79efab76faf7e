"""Tests of what a process can do to itself only once, and for good."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable

_PATIENCE_S = 300.0


def alone(case: Callable[[], None]) -> Callable[[], None]:
    """Has a test that takes nothing run in a process of its own."""

    @functools.wraps(case)
    def test() -> None:
        module, name = case.__module__, case.__name__
        command = [sys.executable, "-W", "error", "-c", f"import {module}; {module}.{name}.__wrapped__()"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return test
