"""How a process ends in which something hangs, or goes on for long."""

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


LONG = """
import threading
from concurrent.futures import ThreadPoolExecutor
from expertd_server.errors import ConfigError
from expertd_server.exits import end_with

pool = ThreadPoolExecutor(1)
pool.submit(threading.Event().wait)  # Python waits for it

def run():
    print("last words", end="")
    {run}

end_with(run)
"""


@pytest.mark.parametrize(
    ("run", "code", "says"),
    [
        ("return 3", 3, ""),
        ("raise ConfigError('no such thing')", 2, "expertd-server: no such thing\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_it_ends_with_the_code_whatever_its_threads_do(run: str, code: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LONG.format(run=run)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (code, "last words")
    assert says in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
