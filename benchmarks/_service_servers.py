"""The servers that bench_service.py measures, started and stopped: expertd as users start it, and the bare echo."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from _peers import terminated
from _service_measure import HERE, Target

from expertd_server.malloc import SETTINGS as MALLOC_SETTINGS


@contextlib.contextmanager
def running_echo(processes: int, answer_bytes: int) -> Iterator[Target]:
    """The echo, in this many processes. Its malloc settings are those of expertd's launcher."""
    port = free_port()
    command = [sys.executable, str(HERE / "_echo.py"), f"--port={port}", f"--processes={processes}"]
    environment = {**os.environ, **MALLOC_SETTINGS}
    with terminated(
        subprocess.Popen([*command, f"--answer-bytes={answer_bytes}"], env=environment, text=True)
    ) as process:
        wait_for_port(port)
        yield Target("echo", f"127.0.0.1:{port}", "expertd.benchmark.Echo", "Stream", "Unary", process)


@contextlib.contextmanager
def running_expertd(options: argparse.Namespace, frontends: int, folder: str) -> Iterator[tuple[Target, list[str]]]:
    """expertd-server, and the names of its layers."""
    ready = Path(folder) / "ready.json"
    command = [sys.executable, "-m", "expertd_server", "serve", "--port=0", "--metrics-port=0"]
    command += [f"--ready-file={ready}"]
    command += [f"--device={options.device}", f"--synthetic={options.preset}", f"--synthetic-layers={options.layers}"]
    places = options.clients * options.streams
    command += [f"--max-streams={max(64, places)}", f"--max-unary-requests={places * max(64, options.in_flight)}"]
    command.append("--log-level=warning")
    if options.device == "noop":
        command.append("--experts=0-0")  # the weights are dropped anyway
    if frontends:
        command.append(f"--frontends={frontends}")
    command += options.server_option
    with terminated(subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)) as process:
        until_s = time.monotonic() + options.start_timeout
        while not ready.exists():
            if time.monotonic() > until_s or process.status() == psutil.STATUS_ZOMBIE:
                sys.exit(f"the server was not ready within {options.start_timeout} s: {' '.join(command)}")
            time.sleep(0.05)
        facts = json.loads(ready.read_text())
        layers = [f"synthetic.{options.preset}.{n}" for n in range(options.layers)]
        service = "expertd.v1.ExpertService", "ForwardStream", "Forward"
        yield Target("expertd", facts["address"], *service, process, facts["metrics_port"]), layers


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Return when somebody listens."""
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    sys.exit(f"nobody listens on port {port}")
