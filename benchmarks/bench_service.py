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
transport, which encodes every request and decodes every answer. With sdk-shm all of it goes through shared memory; with
sdk-shm-inplace the caller's arrays lie there, one set for each request in flight, and nothing is copied; with
sdk-shm-prepared each set has a prepared call, and one thread has all requests of a stream in flight.

--peer: other servers with an operator that computes nothing, each in an environment of its own, over unary gRPC with
the V2 inference protocol, the same bytes in and out; beside them expertd and the echo, by turns, and expertd as its SDK
reaches it from the same machine. A peer that is not there is left out, with its reason. --transports without a value:
nothing else.

lone: one request in flight. saturated: `--clients` processes with `--streams` streams of `--in-flight` requests each.
open loop: requests due at random times at a share of the transport's saturated rate (the echo's of its own, where that
is lower); latencies count from when a request was due, and no client waits for an answer before it sends what is due.
CPU µs/req: of all processes of the server, then of its front-ends, of its engine, of the echo, and of the server's
clients. MiB: resident memory of the largest front-end, or of the server that has none; pages of memory shared with the
engine count.
tok/batch, device: mean batch of the server, what its device alone would do with batches of that kind one after the
other (tokens over the time that it computed), and how much of that was reached. A no-op device has no time to speak of.
echo ratio: latency over the echo's, or throughput over the echo's. Rounds alternate between the two; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from _common import header, write_json
from _peers import PeerMissingError, compared, facts_of, peer_option, running_peer
from _requests import RequestShape
from _service_measure import Load, Point, Target, measure, median_of
from _service_servers import free_port, running_echo, running_expertd
from _service_tables import add_row, new_table, peer_table, plot
from rich.console import Console
from rich.table import Table

from expertd_server.synthetic import PRESETS


def main() -> None:
    """Measure, print, write."""
    options = parse_options()
    console = Console(width=215)
    results: list[dict[str, Any]] = []
    table = new_table(options.device)
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
    spec = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as folder, running_expertd(options, frontends, folder) as (expertd, layers):
        for num_tokens in options.tokens:
            shape = RequestShape(num_tokens, spec.hidden_size, spec.num_experts)

            def add(name: str, row: dict[str, Any], shape: RequestShape = shape, **more: Any) -> None:
                said = {"frontends": frontends, "tokens": shape.num_tokens, "load": name, **more, **row}
                results.append(said)
                add_row(table, shape, said)

            with running_echo(max(1, frontends), shape.answer_bytes) as echo:
                for name, load, seconds in loads(options):
                    row = compare(expertd, echo, shape, layers, load, seconds, options.rounds)
                    add(name, row)
                    if name.startswith("saturated"):
                        saturated = [row[who]["requests_per_s"] for who in ("expertd", "echo")]
                        places = open_places(load.transport, shape)
                        for share in options.shares:
                            ours, theirs = (
                                Load(load.transport, load.clients, load.streams, places, rate * share)
                                for rate in saturated
                            )
                            # The echo at our rate, if it can.
                            theirs = min(ours, theirs, key=lambda each: each.rate or 0)
                            row = compare(expertd, echo, shape, layers, ours, seconds, options.rounds, theirs)
                            add(f"open loop {load.transport}, {share:.0%} of saturated", row, share=share)


def open_places(transport: str, shape: RequestShape) -> int:
    """Requests that a stream of the open loop can have in flight: more than come in twenty milliseconds. What is due
    beyond that waits for a place, which counts. With the SDK sixty, fewer where arrays do not fit in the half of its
    memory that callers' may have."""
    if transport == "stream":
        return 100
    return max(8, min(60, 112 * 2**20 // (shape.request_bytes + shape.answer_bytes)))


def measure_peers(options: argparse.Namespace, num_tokens: int, console: Console) -> dict[str, Any]:
    """Other servers beside expertd and the echo, at one request size; prints a table."""
    spec = PRESETS[options.preset]
    shape = RequestShape(num_tokens, spec.hidden_size, spec.num_experts)
    frontends = options.frontends[0]
    facts: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        expertd, layers = stack.enter_context(running_expertd(options, frontends, folder))
        echo = stack.enter_context(running_echo(max(1, frontends), shape.answer_bytes))
        entries = [("expertd, stream", expertd, "stream"), ("expertd, unary", expertd, "unary")]
        entries += [("expertd, SDK through shared memory", expertd, "sdk-shm")]
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
            each["saturated"].cpu_us_per_request["all"],
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
    expertd: Target,
    echo: Target,
    shape: RequestShape,
    layers: list[str],
    load: Load,
    seconds: float,
    rounds: int,
    echo_load: Load | None = None,
) -> dict[str, Any]:
    """Both servers under the same load, by turns, or the echo under its own. The SDK's transports are compared with the
    echo's stream."""
    echo_load = echo_load or load
    if echo_load.transport not in ("stream", "unary"):
        echo_load = replace(echo_load, transport="stream")
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
        "--transports",
        nargs="*",
        default=["stream", "unary"],
        help="stream, unary, sdk-stream, sdk-shm, sdk-shm-inplace, sdk-shm-prepared, sdk-unary",
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
