"""Measures the service over gRPC, each figure beside the bare gRPC echo of the same bytes in the same run.

    python benchmarks/bench_service.py --quick                      a table in about two minutes
    python benchmarks/bench_service.py --out benchmarks/results/service.json --plot docs/service.png
    python benchmarks/bench_service.py --frontends 0 4 --clients 8   without front-ends, and with four
    python benchmarks/bench_service.py --device cuda --frontends 8 --clients 16
    python benchmarks/bench_service.py --transports --tokens 128 --peer kserve=/path/to/venv/bin/python

The compiled codec is used where it lies beside the server's modules. Without an installation:

    cmake -G Ninja -S csrc -B build/codec -DEXPERTD_CUDA=off && ninja -C build/codec
    cp build/codec/_*.so server/expertd_server/ && export PYTHONPATH=server:client

Server: `expertd-server serve` as users start it, with the no-op backend unless --device says otherwise, so that what is
measured is the service. Echo: `_echo.py`, a Python gRPC server that answers with a constant of the answer's size, in as
many processes. Clients: processes of `_load.py`, the same for both; prepared messages, so that they cost little.
--transports: stream and unary send such messages; sdk-stream, sdk-shm and sdk-unary are `expertd.Client` with that
transport, which encodes every request and decodes every answer.

--peer: other servers with an operator that computes nothing, each in an environment of its own, over unary gRPC with
the V2 inference protocol, the same bytes in and out; beside them expertd and the echo, by turns. A peer that is not
there is left out, with its reason. --transports without a value: nothing else.

lone: one request in flight. saturated: `--clients` processes with `--streams` streams of `--in-flight` requests each.
open loop: requests due at random times at a share of the saturated rate; latencies count from when a request was due.
CPU µs/req: of all processes of the server, then of its front-ends, of its engine, and of the echo. MiB: resident memory
of the largest front-end, or of the server that has none; pages of memory shared with the engine count.
tok/batch, device: mean batch of the server, what its device alone would do with batches of that kind one after the
other (tokens over the time that it computed), and how much of that was reached. A no-op device has no time to speak of.
echo ratio: latency over the echo's, or throughput over the echo's. Rounds alternate between the two; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _common import header, write_json
from _peers import PeerMissingError, compared, facts_of, peer_option, running_peer
from _requests import RequestShape
from _server_metrics import Batches, between, scraped
from rich.console import Console
from rich.table import Table

from expertd_server.malloc import SETTINGS as MALLOC_SETTINGS

HERE = Path(__file__).resolve().parent
PERCENTILES = (50, 90, 99, 99.9)
WARMUP_S = 0.7
START_S = 0.1  # what client processes need to read when to begin
PRESETS = {"qwen3-30b-a3b": (2048, 128), "mixtral-8x7b": (4096, 8), "tiny": (256, 8)}
"""hidden_size and num_experts of the synthetic layers that can be asked for."""


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
    """By role of process, and "all"."""
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
        time.sleep(max(0.0, end_s - time.monotonic()))
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
        cpu_us_per_request=cpu_us | {"all": sum(cpu_us.values())},
        rss_mib={role: used.rss_mib for role, used in after.items()},
        errors=errors,
        batches=between(batches_before, batches_after, to_s - from_s) if batches_before and batches_after else {},
    )


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


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def terminated(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """Stop a server at the end, and wait for it."""
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
    command += [f"--max-streams={max(64, places)}", f"--max-unary-requests={max(64, places * options.in_flight)}"]
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


def wait_for_port(port: int) -> None:
    """Return when somebody listens."""
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    sys.exit(f"nobody listens on port {port}")


def main() -> None:
    """Measure, print, write."""
    options = parse_options()
    console = Console(width=215)
    results: list[dict[str, Any]] = []
    table = Table(title=f"expertd over gRPC, backend {options.device}")
    for column in (
        "front-ends",
        "tokens",
        "KiB in/out",
        "load",
        "p50 µs",
        "p99 µs",
        "req/s",
        "ktok/s",
        "GB/s",
        "CPU µs/req",
        "front-ends",
        "engine",
        "echo",
        "MiB",
        "tok/batch",
        "device ktok/s",
        "of device",
    ):
        table.add_column(column, justify="right" if column != "load" else "left")
    table.add_column("p50 / echo", justify="right")
    table.add_column("req/s / echo", justify="right")
    if options.transports:
        for frontends in options.frontends:
            measure_server(options, frontends, results, table)
        console.print(table)
    peers = [measure_peers(options, num_tokens, console) for num_tokens in options.tokens] if options.peer else []
    if options.out is not None:
        said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        said["peer"] = [peer.name for peer in options.peer]
        found = {"cores": os.cpu_count(), "options": said, "points": results, "peers": peers}
        write_json(options.out, {**header(), **found})
    if options.plot is not None:
        plot(results, options)


def measure_server(options: argparse.Namespace, frontends: int, results: list[dict[str, Any]], table: Table) -> None:
    """Every load on one layout of processes, and on as many processes of the echo."""
    hidden_size, num_experts = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as folder, running_expertd(options, frontends, folder) as (expertd, layers):
        for num_tokens in options.tokens:
            shape = RequestShape(num_tokens, hidden_size, num_experts)

            def add(name: str, row: dict[str, Any], shape: RequestShape = shape, **more: Any) -> None:
                said = {"frontends": frontends, "tokens": shape.num_tokens, "load": name, **more, **row}
                results.append(said)
                add_row(table, shape, said)

            with running_echo(max(1, frontends), shape.answer_bytes) as echo:
                for name, load, seconds in loads(options):
                    row = compare(expertd, echo, shape, layers, load, seconds, options.rounds)
                    add(name, row)
                    if name == "saturated stream":
                        rate = row["expertd"]["requests_per_s"]
                        for share in options.shares:
                            open_load = Load("stream", load.clients, load.streams, 100, rate * share)
                            row = compare(expertd, echo, shape, layers, open_load, seconds, options.rounds)
                            add(f"open loop, {share:.0%} of saturated", row, share=share)


def measure_peers(options: argparse.Namespace, num_tokens: int, console: Console) -> dict[str, Any]:
    """Other servers beside expertd and the echo, at one request size; prints a table."""
    shape = RequestShape(num_tokens, *PRESETS[options.preset])
    frontends = options.frontends[0]
    facts: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        expertd, layers = stack.enter_context(running_expertd(options, frontends, folder))
        echo = stack.enter_context(running_echo(max(1, frontends), shape.answer_bytes))
        entries = [("expertd, stream", expertd, "stream"), ("expertd, unary", expertd, "unary")]
        entries += [("echo, stream", echo, "stream"), ("echo, unary", echo, "unary")]
        for peer in options.peer:
            try:
                facts[peer.name] = facts_of(peer)
                port = free_port()
                process = stack.enter_context(running_peer(peer, port, shape, options.start_timeout))
            except PeerMissingError as error:
                skipped[peer.name] = str(error)
                continue
            target = Target(peer.name, f"127.0.0.1:{port}", "", "", "", psutil.Process(process.pid))
            entries += [(f"{peer.name}, {encoding}", target, f"v2-{encoding}") for encoding in peer.encodings]
        points: dict[str, dict[str, list[Point]]] = {name: {"lone": [], "saturated": []} for name, _, _ in entries}
        for _ in range(options.rounds):
            for name, target, transport in entries:
                lone = Load(transport, 1, 1, 1)
                saturated = Load(transport, options.clients, options.streams, options.in_flight)
                points[name]["lone"].append(measure(target, shape, layers, lone, options.seconds))
                points[name]["saturated"].append(measure(target, shape, layers, saturated, options.seconds))
    medians = {name: {load: median_of(seen) for load, seen in each.items()} for name, each in points.items()}
    figures = {
        name: (
            each["lone"].latency_us["p50"],
            each["saturated"].requests_per_s,
            each["saturated"].cpu_us_per_request,
        )
        for name, each in medians.items()
    }
    rows = compared(figures, "expertd, stream")
    console.print(peer_table(shape, medians, rows))
    for name, why in skipped.items():
        console.print(f"{name} was left out: {why}")
    return {
        "tokens": num_tokens,
        "frontends": frontends,
        "request_bytes": shape.request_bytes,
        "answer_bytes": shape.answer_bytes,
        "versions": facts,
        "skipped": skipped,
        "rows": rows,
        "points": {name: {load: asdict(point) for load, point in each.items()} for name, each in medians.items()},
        "rounds": {
            name: {load: [asdict(point) for point in seen] for load, seen in each.items()}
            for name, each in points.items()
        },
    }


def peer_table(shape: RequestShape, medians: dict[str, dict[str, Point]], rows: dict[str, dict[str, float]]) -> Table:
    """A line for each server; one that met errors says so."""
    table = Table(
        title=f"{shape.num_tokens} tokens a request, {shape.request_bytes / 1024:.0f} KiB in, "
        f"{shape.answer_bytes / 1024:.0f} KiB out"
    )
    table.add_column("server")
    for column in ("lone p50 µs", "req/s", "CPU µs/req", "p50 / ours", "ours / req/s", "CPU / ours"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        errors = medians[name]["lone"].errors | medians[name]["saturated"].errors
        table.add_row(
            name + (f" [failed: {', '.join(errors)}]" if errors else ""),
            f"{row['lone_p50_us']:.0f}",
            f"{row['saturated_requests_per_s']:.0f}",
            f"{row['cpu_us_per_request']:.0f}",
            f"{row['p50_over_ours']:.2f}",
            f"{row['ours_over_throughput']:.2f}",
            f"{row['cpu_over_ours']:.2f}",
        )
    return table


def loads(options: argparse.Namespace) -> Iterator[tuple[str, Load, float]]:
    """The loads of one request size."""
    for transport in options.transports:
        yield f"lone {transport}", Load(transport, 1, 1, 1), options.seconds
        yield (
            f"saturated {transport}",
            Load(transport, options.clients, options.streams, options.in_flight),
            options.seconds,
        )


def compare(  # noqa: PLR0917
    expertd: Target, echo: Target, shape: RequestShape, layers: list[str], load: Load, seconds: float, rounds: int
) -> dict[str, Any]:
    """Both servers under the same load, by turns. The SDK's transports are compared with the echo's stream."""
    echo_load = load if load.transport in ("stream", "unary") else replace(load, transport="stream")
    seen: dict[str, list[Point]] = {"expertd": [], "echo": []}
    for _ in range(rounds):
        seen["expertd"].append(measure(expertd, shape, layers, load, seconds))
        seen["echo"].append(measure(echo, shape, layers, echo_load, seconds))
    ours, theirs = median_of(seen["expertd"]), median_of(seen["echo"])
    return {
        "request_bytes": shape.request_bytes,
        "answer_bytes": shape.answer_bytes,
        "load_options": asdict(load),
        "expertd": asdict(ours),
        "echo": asdict(theirs),
        "tokens_per_s": ours.requests_per_s * shape.num_tokens,
        "bytes_per_s": ours.requests_per_s * (shape.request_bytes + shape.answer_bytes),
        "p50_over_echo": ours.latency_us["p50"] / theirs.latency_us["p50"],
        "throughput_over_echo": ours.requests_per_s / theirs.requests_per_s,
    }


def add_row(table: Table, shape: RequestShape, row: dict[str, Any]) -> None:
    """One line of the table; a load that met errors says so."""
    ours = row["expertd"]
    failed, cpu_us = sum(ours["errors"].values()), ours["cpu_us_per_request"]
    table.add_row(
        str(row["frontends"]),
        str(shape.num_tokens),
        f"{shape.request_bytes / 1024:.0f}/{shape.answer_bytes / 1024:.0f}",
        row["load"] + (f" [{failed} failed: {', '.join(ours['errors'])}]" if failed else ""),
        f"{ours['latency_us']['p50']:.0f}",
        f"{ours['latency_us']['p99']:.0f}",
        f"{ours['requests_per_s']:.0f}",
        f"{row['tokens_per_s'] / 1e3:.0f}",
        f"{row['bytes_per_s'] / 1e9:.2f}",
        f"{cpu_us['all']:.0f}",
        *(f"{cpu_us[role]:.0f}" if role in cpu_us else "" for role in ("front-ends", "engine")),
        f"{row['echo']['cpu_us_per_request']['all']:.0f}",
        f"{ours['rss_mib'].get('front-ends', ours['rss_mib']['server']):.0f}",
        *device_columns(ours["batches"], row["tokens_per_s"]),
        f"{row['p50_over_echo']:.2f}",
        f"{row['throughput_over_echo']:.2f}",
    )


def device_columns(batches: dict[str, float], tokens_per_s: float) -> tuple[str, str, str]:
    """The mean batch, what the device alone would do with such ones, and how much of that was reached."""
    if not batches:
        return "", "", ""
    alone = batches["device_tokens_per_s"]
    return f"{batches['mean_batch_tokens']:.0f}", f"{alone / 1e3:.0f}", f"{tokens_per_s / alone:.2f}"


def plot(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Latency over throughput of the open loop, one panel for each request size."""
    import matplotlib as mpl  # noqa: PLC0415 (only where a plot is asked for)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    _, axes = plt.subplots(1, len(options.tokens), figsize=(4.2 * len(options.tokens), 3.6), squeeze=False)
    for axis, num_tokens in zip(axes[0], options.tokens, strict=True):
        layout = options.frontends[-1]
        rows = [r for r in results if (r["tokens"], r["frontends"]) == (num_tokens, layout) and "share" in r]
        for who, colour in (("expertd", "tab:blue"), ("echo", "tab:grey")):
            for percentile, style in (("p50", "-"), ("p99", "--")):
                x = [row[who]["requests_per_s"] * num_tokens / 1e3 for row in rows]
                y = [row[who]["latency_us"][percentile] / 1e3 for row in rows]
                axis.plot(x, y, style, color=colour, marker=".", label=f"{who} {percentile}")
        axis.set(
            title=f"{num_tokens} tokens a request", xlabel="thousand tokens / s", ylabel="latency, ms", yscale="log"
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    plt.tight_layout()
    plt.savefig(options.plot, dpi=120)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--device", default="noop", help="device of the server (default: noop)")
    parser.add_argument("--preset", default="qwen3-30b-a3b", choices=PRESETS, help="shape of the layers")
    parser.add_argument("--layers", type=int, default=1, help="layers served and asked for")
    parser.add_argument(
        "--frontends",
        type=int,
        nargs="+",
        default=[0],
        help="front-end processes, one or more numbers; 0: none, and one echo process (default: 0)",
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a request")
    parser.add_argument(
        "--transports", nargs="*", default=["stream", "unary"], help="stream, unary, sdk-stream, sdk-shm, sdk-unary"
    )
    parser.add_argument(
        "--peer",
        type=peer_option,
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="measure this server too: kserve, mlserver or ray, with the interpreter that has it; repeatable",
    )
    parser.add_argument("--clients", type=int, default=max(2, min(16, (os.cpu_count() or 2) // 2)), help="processes")
    parser.add_argument("--streams", type=int, default=2, help="streams of each client process")
    parser.add_argument("--in-flight", type=int, default=4, help="requests in flight on each stream when saturated")
    parser.add_argument(
        "--shares", type=float, nargs="*", help="loads of the open loop, as shares of the saturated rate"
    )
    parser.add_argument("--seconds", type=float, help="length of each measurement")
    parser.add_argument("--rounds", type=int, help="measurements of each point")
    parser.add_argument("--start-timeout", type=float, default=300.0, help="seconds that the server may take to load")
    parser.add_argument("--server-option", action="append", default=[], help="handed to expertd-server serve")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--plot", type=Path, help="write a latency-throughput plot here")
    options = parser.parse_args(arguments)
    defaults = ([32, 128], [0.5], 2.0, 1) if options.quick else ([1, 8, 32, 128, 512], [0.25, 0.5, 0.75, 0.9], 4.0, 3)
    for name, default in zip(("tokens", "shares", "seconds", "rounds"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


if __name__ == "__main__":
    main()
