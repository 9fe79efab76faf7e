"""The demo: its exit code follows its checks, and it leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from expertd_server import demo

pytestmark = pytest.mark.timeout(180)
TIMEOUT_S = 120  # more than anybody should wait for a demo; a quarter of a minute on two idle cores
COMMAND = [sys.executable, "-m", "expertd_server", "demo"]


def environment(tmp_path: Path) -> dict[str, str]:
    """Temporary files go below tmp_path, and an option of a server of the user's own is set."""
    return {**os.environ, "TMPDIR": str(tmp_path), "EXPERTD_MAX_BATCH_TOKENS": "1"}


def assert_nothing_left(tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if any(str(tmp_path) in word for word in command)]


def test_the_demo_holds(tmp_path: Path) -> None:
    done = subprocess.run(
        COMMAND, env=environment(tmp_path), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok ") == 5, done.stdout
    assert "FAILED" not in done.stdout
    for word in ("model.layers.3", "p99 ms", "Where to go next"):
        assert word in done.stdout, done.stdout
    assert done.stderr == ""
    assert_nothing_left(tmp_path)


def test_checks_that_do_not_hold_are_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MAX_RELATIVE_ERROR", -1.0)
    monkeypatch.setattr(demo, "MAX_REFERENCE_ERROR", -1.0)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert demo.run_demo() == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") == 2, text
    assert text.count("  ok ") == 3, text
    assert_nothing_left(tmp_path)


def test_a_server_that_does_not_start_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such luck >&2\nexit 7\n")
    program.chmod(0o755)
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(tempfile, "tempdir", str(files))
    assert demo.run_demo() == 1
    text = capsys.readouterr().out
    assert "ended with code 7" in text
    assert "no such luck" in text
    assert list(files.iterdir()) == []


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen(COMMAND, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        server = next(match for line in running.stdout if (match := re.search(r"from process (\d+) on port", line)))
        assert psutil.pid_exists(int(server[1]))
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(int(server[1]))
    assert_nothing_left(tmp_path)
