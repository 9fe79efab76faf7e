"""Two shards with two replicas each and a worker, as processes of this machine or as the running Compose stack."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

__all__ = [
    "LAYERS",
    "NUM_LAYERS",
    "PRESET",
    "ROOT",
    "SERVERS",
    "ComposeTier",
    "ProcessTier",
    "Tier",
    "gauge",
    "wait_until_used",
]

ROOT = Path(__file__).parents[1]
SERVERS = ("shard-0-a", "shard-0-b", "shard-1-a", "shard-1-b")
PRESET, NUM_LAYERS = "tiny", 2  # as in deploy/docker-compose.yml
LAYERS = tuple(f"synthetic.{PRESET}.{index}" for index in range(NUM_LAYERS))
EXPERTS = {"shard-0": "0-3", "shard-1": "4-7"}
START_TIMEOUT_S = 120.0
POLL_S = 0.1


class Tier(Protocol):
    """What can be done to a server, and what the worker has seen of it."""

    def kill(self, server: str) -> None:
        """End it at once; nothing is finished, nobody is told."""

    def stop(self, server: str) -> None:
        """Ask it to drain and end; return when it has."""

    def start(self, server: str) -> None:
        """Start it again."""

    def pause(self, server: str) -> None:
        """Freeze it: its connections stay open and say nothing."""

    def unpause(self, server: str) -> None:
        """Let it go on."""

    def admin(self, server: str, *order: str) -> None:
        """Give it an order, as `expertd-server admin` does."""

    def trace(self) -> str:
        """Every request of the worker so far: see deploy/worker.py."""

    def worker_metrics(self) -> str:
        """The worker's metrics in Prometheus' text format."""


def wait_until_used(tier: Tier, num_servers: int = len(SERVERS)) -> None:
    """Return when the worker sends requests to so many servers."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while (num_up := sum(gauge(tier, "expertd_client_replica_up").values())) != num_servers:
        if time.monotonic() > until_s:
            raise TimeoutError(f"the worker uses {num_up:.0f} servers after {START_TIMEOUT_S:.0f} s, not {num_servers}")
        time.sleep(POLL_S)


def gauge(tier: Tier, name: str) -> dict[str, float]:
    """The samples of one of the worker's metrics, by their labels as they are written."""
    try:
        text = tier.worker_metrics()
    except (OSError, subprocess.CalledProcessError):
        return {}  # it does not listen yet
    samples = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return {labels.removeprefix(name): float(value) for labels, value in samples}


class ProcessTier:
    """Real server processes on free ports of this machine. A context manager: ends them all."""

    def __init__(self, folder: Path, concurrency: int, rate: float) -> None:
        """folder: for logs and the trace."""
        self._folder = folder
        names = (*SERVERS, *(f"{server} admin" for server in SERVERS), "worker")
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._worker_environment = {
            "TARGETS": ",".join(f"127.0.0.1:{self._ports[server]}" for server in SERVERS),
            "CONCURRENCY": str(concurrency),
            "RATE": str(rate),
            "METRICS_PORT": str(self._ports["worker"]),
            "TRACE_FILE": str(folder / "trace"),
        }

    def __enter__(self) -> ProcessTier:
        for server in SERVERS:
            self.start(server)
        self._run("worker", [sys.executable, str(ROOT / "deploy" / "worker.py")], self._worker_environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def start(self, server: str) -> None:
        """See Tier."""
        options = ["--port", str(self._ports[server]), "--synthetic", PRESET, "--synthetic-layers", str(NUM_LAYERS)]
        options += ["--device", "cpu", "--experts", EXPERTS[server[:-2]]]
        options += ["--admin", "--admin-port", str(self._ports[f"{server} admin"])]
        self._run(server, [sys.executable, "-m", "expertd_server", "serve", *options], {"OMP_NUM_THREADS": "1"})

    def kill(self, server: str) -> None:
        """See Tier."""
        self._processes[server].kill()
        self._processes[server].wait()

    def stop(self, server: str) -> None:
        """See Tier."""
        self._processes[server].terminate()
        self._processes[server].wait(60)

    def pause(self, server: str) -> None:
        """See Tier."""
        self._processes[server].send_signal(signal.SIGSTOP)

    def unpause(self, server: str) -> None:
        """See Tier."""
        self._processes[server].send_signal(signal.SIGCONT)

    def admin(self, server: str, *order: str) -> None:
        """See Tier."""
        target = f"127.0.0.1:{self._ports[f'{server} admin']}"
        command = [sys.executable, "-m", "expertd_server", "admin", *order, "--target", target]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def trace(self) -> str:
        """See Tier."""
        return (self._folder / "trace").read_text()

    def worker_metrics(self) -> str:
        """See Tier."""
        url = f"http://127.0.0.1:{self._ports['worker']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def _run(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt is for this program, which then ends them
            )


class ComposeTier:
    """The containers of a stack that runs already, started with WORKER_TRACE_FILE and EXPERTD_ADMIN set."""

    def __init__(self, compose: Sequence[str]) -> None:
        """compose: "docker", "compose" and the files."""
        self._compose = compose

    def kill(self, server: str) -> None:
        """See Tier."""
        self._run("kill", "--signal", "KILL", server)

    def stop(self, server: str) -> None:
        """See Tier."""
        self._run("stop", server)

    def start(self, server: str) -> None:
        """See Tier."""
        self._run("start", server)

    def pause(self, server: str) -> None:
        """See Tier."""
        self._run("pause", server)

    def unpause(self, server: str) -> None:
        """See Tier."""
        self._run("unpause", server)

    def admin(self, server: str, *order: str) -> None:
        """See Tier."""
        self._run("exec", "-T", server, "expertd-server", "admin", *order)

    def trace(self) -> str:
        """See Tier."""
        return self._run("exec", "-T", "worker", "sh", "-c", "cat $TRACE_FILE")

    def worker_metrics(self) -> str:
        """See Tier."""
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9091/metrics').read().decode())"
        return self._run("exec", "-T", "worker", "python3", "-c", code)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([*self._compose, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
