"""What one server does under one load: clients are started, watched, and their figures put together."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _requests import RequestShape
from _server_metrics import Batches, between, scraped

HERE = Path(__file__).resolve().parent
PERCENTILES = (50, 90, 99, 99.9)
WARMUP_S = 0.7
START_S = 0.1  # what client processes need to read when to begin


@dataclass
class Usage:
    """Of processes of one role: CPU seconds of all, and MiB in memory of the largest, shared pages included."""

    cpu_s: float
    rss_mib: float


@dataclass(frozen=True)
class Target:
    """A running server and how to call it."""

    name: str
    address: str
    service: str
    stream: str
    unary: str
    process: psutil.Process
    metrics_port: int | None = None
    """Of expertd; the others have none."""

    def batches(self) -> Batches | None:
        """The batches that the server has made so far."""
        return None if self.metrics_port is None else scraped(self.metrics_port)

    def usage(self) -> dict[str, Usage]:
        """What the server's processes have used so far, by role: server, supervisor, front-ends together, engine."""
        roles: dict[str, Usage] = {}
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times, role = process.cpu_times(), role_of(process.cmdline())
                used = roles.setdefault(role, Usage(0.0, 0.0))
                used.cpu_s += times.user + times.system
                used.rss_mib = max(used.rss_mib, process.memory_info().rss / 2**20)
        return roles

    def method(self, transport: str) -> str:
        """Full name of the method that a transport calls."""
        return f"/{self.service}/{self.unary if transport == 'unary' else self.stream}"


@dataclass(frozen=True)
class Load:
    """How much, from how many. rate: requests per second over all clients; None: closed loop."""

    transport: str
    clients: int
    streams: int
    in_flight: int
    rate: float | None = None


@dataclass(frozen=True)
class Point:
    """What one measurement saw."""

    requests_per_s: float
    latency_us: dict[str, float]
    cpu_us_per_request: dict[str, float]
    """By role of the server's processes, "all" of them, and "clients", all of those."""
    rss_mib: dict[str, float]
    """Of the largest process of each role."""
    errors: dict[str, int]
    batches: dict[str, float]
    """See `_server_metrics.between`; empty where the server tells nothing."""


def role_of(command: list[str]) -> str:
    """What a process of a server is to it, by its command line."""
    if "expertd_server.child" not in command:
        return "server"
    name = command[command.index("expertd_server.child") + 1]
    return "engine" if name == "engine" else "front-ends"


def measure(target: Target, shape: RequestShape, layers: list[str], load: Load, seconds: float) -> Point:
    """Run the clients against a server for `seconds`, after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{n}.npy") for n in range(load.clients)]
        clients = []
        for n, file in enumerate(files):
            job = {
                "target": target.address,
                "method": target.method(load.transport),
                "transport": load.transport,
                "layers": layers,
                "shape": asdict(shape),
                "streams": load.streams,
                "in_flight": load.in_flight,
                "rate": None if load.rate is None else load.rate / load.clients,
                "warmup_s": WARMUP_S,
                "seed": n,
                "result_file": file,
            }
            command = [sys.executable, str(HERE / "_load.py")]
            clients.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            tell(clients[-1], job)
        for client in clients:
            assert client.stdout is not None
            if client.stdout.readline() != "ready\n":
                sys.exit(f"a client of {target.name} did not start")
        begin_s = time.monotonic() + START_S + WARMUP_S
        end_s = begin_s + seconds
        for client in clients:
            tell(client, {"begin_s": begin_s, "end_s": end_s})
        time.sleep(max(0.0, begin_s - time.monotonic()))
        before, batches_before, from_s = target.usage(), target.batches(), time.monotonic()
        clients_from_s = cpu_s_of(clients)
        time.sleep(max(0.0, end_s - time.monotonic()))
        clients_to_s = cpu_s_of(clients)
        after, batches_after, to_s = target.usage(), target.batches(), time.monotonic()
        errors: dict[str, int] = {}
        for client in clients:
            said, _ = client.communicate(timeout=120)
            if client.returncode:
                sys.exit(f"a client of {target.name} failed with exit code {client.returncode}")
            for what, count in json.loads(said).items():
                errors[what] = errors.get(what, 0) + count
        times = np.concatenate([np.load(file) for file in files])
    due_s, done_s = times[:, 0], times[:, 1]
    answered = int(((done_s >= begin_s) & (done_s < end_s)).sum())
    counted = (due_s >= begin_s) & (due_s < end_s)
    if not answered or not counted.any():
        sys.exit(
            f"{target.name} answered no request of {load.transport} within the {seconds} s that count, and "
            f"{len(times)} before or after; what failed: {errors}"
        )
    latencies_us = (done_s - due_s)[counted] * 1e6
    cpu_us = {role: (used.cpu_s - before[role].cpu_s) * 1e6 / answered for role, used in after.items()}
    return Point(
        requests_per_s=answered / seconds,
        latency_us={f"p{p:g}": float(np.percentile(latencies_us, p)) for p in PERCENTILES},
        cpu_us_per_request=cpu_us
        | {"all": sum(cpu_us.values()), "clients": (clients_to_s - clients_from_s) * 1e6 / answered},
        rss_mib={role: used.rss_mib for role, used in after.items()},
        errors=errors,
        batches=between(batches_before, batches_after, to_s - from_s) if batches_before and batches_after else {},
    )


def cpu_s_of(clients: list[subprocess.Popen[str]]) -> float:
    """Processor time of all of them so far."""
    times = [psutil.Process(client.pid).cpu_times() for client in clients]
    return sum(each.user + each.system for each in times)


def tell(client: subprocess.Popen[str], what: dict[str, Any]) -> None:
    """Write a line to a client's standard input."""
    assert client.stdin is not None
    client.stdin.write(json.dumps(what) + "\n")
    client.stdin.flush()


def median_of(points: list[Point]) -> Point:
    """Median of each figure over the rounds; errors of all."""
    errors: dict[str, int] = {}
    for point in points:
        for what, count in point.errors.items():
            errors[what] = errors.get(what, 0) + count
    return Point(
        requests_per_s=statistics.median(p.requests_per_s for p in points),
        latency_us=medians([p.latency_us for p in points]),
        cpu_us_per_request=medians([p.cpu_us_per_request for p in points]),
        rss_mib=medians([p.rss_mib for p in points]),
        errors=errors,
        batches=medians([p.batches for p in points if p.batches]),
    )


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Key by key; empty of no rounds."""
    return {key: statistics.median(one[key] for one in rounds) for key in (rounds[0] if rounds else ())}
