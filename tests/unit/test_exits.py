"""How a process ends in which something hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest

PATIENCE_S = 60.0

HANGS = """
import atexit, threading
from expertd_server.exits import end_hung

atexit.register(threading.Event().wait)  # as the CUDA driver does
print("last words", end="")
end_hung({close}, 0.2)
"""


@pytest.mark.parametrize("close", ["lambda: None", "threading.Event().wait", "lambda: 1 / 0"])
def test_it_ends_whatever_waits_for_what_hangs(close: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(close=close)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    if "wait" not in close:
        assert done.stdout == "last words"
    assert ("ZeroDivisionError" in done.stderr) == ("1 / 0" in close)
