"""What the engine's process does for a request of a front-end, on a device that copies and computes nothing.

    PYTHONPATH=server:client python benchmarks/bench_gate.py

Front-ends in processes of their own keep requests in flight through the memory that they share with this one, in place
of gRPC; with --regions, hidden states and outputs lie in a caller's memory, which they have handed on. As with a GPU,
large tensors in shared memory are left where they are. CPU microseconds of this process for each request, its pinning
and such included, the least of some rounds, since other programs only add to it.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import header, write_json
from rich.console import Console
from rich.table import Table

from expertd.v1 import expertd_pb2 as pb
from expertd_server.promise import Promise
from expertd_server.region_handover import where_of
from expertd_server.remote import EngineState, RemoteEngine
from expertd_server.remote_codec import RemoteCall

ARENA_BYTES = 2**28
REGION_BYTES = 2**26
MAX_REQUESTS = 4096
PATIENCE_S = 60.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-30b-a3b", help="shape of the layers")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 48], help="that requests are for, by turns")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="request sizes")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[16, 128], help="of all front-ends")
    parser.add_argument("--front-ends", type=int, default=1)
    parser.add_argument("--regions", action="store_true", help="hidden states and outputs lie in a caller's memory")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--mailbox", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mailbox is not None:
        be_front_end(args)
    else:
        measure(args)


def engine_without_device(num_layers: int, preset: str, on_batch: Callable[[Any], None]) -> tuple[Any, Any]:
    """An engine on a device that does nothing, and the store of its layers, whose graphs are captured."""
    from bench_engine import MAX_BATCH_TOKENS  # noqa: PLC0415 (torch: not in the front-ends)
    from bench_engine_host import NullCapturer, NullSlot, null_layers  # noqa: PLC0415

    from expertd_server.backend_noop import NoopBackend  # noqa: PLC0415
    from expertd_server.batch import Limits  # noqa: PLC0415
    from expertd_server.engine import Engine  # noqa: PLC0415
    from expertd_server.garbage import look_rarely  # noqa: PLC0415
    from expertd_server.layer import MoELayer  # noqa: PLC0415
    from expertd_server.store import LayerStore  # noqa: PLC0415

    look_rarely()
    backend = NoopBackend()
    limits = Limits(max_batch_tokens=MAX_BATCH_TOKENS, max_queue_tokens=1 << 20, max_queue_requests=1 << 16)
    slots = [NullSlot(index) for index in range(5)]
    options: dict[str, Any] = {"slots": slots, "capturer": NullCapturer(), "max_graph_tokens": MAX_BATCH_TOKENS}
    engine = Engine(limits, backend, on_batch=on_batch, **options)
    layers = null_layers(num_layers, preset, backend)
    engine.capture(layers)
    store: LayerStore[MoELayer] = LayerStore()
    for layer in layers:
        store.add(layer)
    store.finish_loading()
    return engine, store


def measure(args: argparse.Namespace) -> None:
    """The table."""
    from bench_engine import Tally  # noqa: PLC0415 (torch: not in the front-ends)

    from expertd_server.gate import EngineGate  # noqa: PLC0415
    from expertd_server.pinning import Pinner  # noqa: PLC0415

    tally = Tally()
    engine, store = engine_without_device(max(args.layers), args.preset, tally.add)
    pinner = Pinner(lambda _address, _nbytes: None, lambda _address: None, 1 << 40)
    where = "a caller's memory" if args.regions else "front-ends' memory"
    table = Table(title=f"{args.preset}, {args.front_ends} front-ends, {where}, no device")
    for column in ("layers", "tokens", "in flight", "req/batch", "CPU us/req", "req/s"):
        table.add_column(column, justify="right")
    cells: list[dict[str, Any]] = []
    mailbox, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    options = {"share": pinner.share, "max_bundle_tokens": engine.max_bundle_tokens}
    gate = EngineGate(engine, store, mailbox, backend="noop", device="none", **options)
    engine.batcher.start(gate)
    gate.publish()
    gate.start()
    for count, tokens, in_flight in itertools.product(args.layers, args.tokens, args.in_flight):
        shape = [f"--layers={count}", f"--tokens={tokens}", f"--in-flight={in_flight // args.front_ends}"]
        command = [sys.executable, __file__, f"--mailbox={outlet.fileno()}", *shape, *["--regions"] * args.regions]
        front_ends = [
            subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[outlet.fileno()]) for _ in range(args.front_ends)
        ]
        tally.reset()  # what the front-ends before still had in flight
        until_s = time.monotonic() + PATIENCE_S
        while tally.reset().requests == 0:
            assert time.monotonic() < until_s, "no request came"
            time.sleep(0.1)
        time.sleep(0.5)  # to a steady state
        rounds = []
        for _ in range(args.rounds):
            tally.reset()
            cpu_s, start_s = time.process_time(), time.perf_counter()
            time.sleep(args.seconds)
            cpu_s, wall_s, done = time.process_time() - cpu_s, time.perf_counter() - start_s, tally.reset()
            rounds.append(
                {
                    "cpu_us_per_request": cpu_s / done.requests * 1e6,
                    "requests_per_s": done.requests / wall_s,
                    "mean_batch_requests": done.requests / done.batches,
                }
            )
        for front_end in front_ends:
            front_end.communicate(timeout=PATIENCE_S)
            assert front_end.returncode == 0
        least = min(rounds, key=lambda cell: cell["cpu_us_per_request"])
        cells.append({"layers": count, "tokens": tokens, "in_flight": in_flight, **least})
        shown = f"{least['mean_batch_requests']:.1f}", f"{least['cpu_us_per_request']:.1f}"
        table.add_row(*map(str, (count, tokens, in_flight)), *shown, f"{least['requests_per_s']:.0f}")
    Console(width=120).print(table)
    gate.close()
    engine.batcher.stop(PATIENCE_S)
    if args.json:
        write_json(args.json, {**header(), "arguments": vars(args), "cells": cells})


def region_of(engine: RemoteEngine) -> memoryview:
    """Memory of a caller, which the engine has mapped, too."""
    fd = os.memfd_create("bench-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, REGION_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    view = engine.regions.map_file(fd, REGION_BYTES)
    os.close(fd)
    until_s = time.monotonic() + PATIENCE_S
    while engine._link is None or where_of(view, engine._link.to_regions) is None:
        assert time.monotonic() < until_s, "the engine has not mapped it"
        time.sleep(0.01)
    return view


def be_front_end(args: argparse.Namespace) -> None:
    """Keep requests in flight until standard input ends."""
    states: list[EngineState] = []
    known, over, drained = threading.Event(), threading.Event(), threading.Semaphore(0)

    def on_state(state: EngineState | None) -> None:
        if state is not None and state.layers:
            states.append(state)
            known.set()

    mailbox = socket.socket(fileno=args.mailbox)
    engine = RemoteEngine(
        "front-end", mailbox, arena_bytes=ARENA_BYTES, max_requests=MAX_REQUESTS, on_state=on_state, loop=None
    )
    engine.start()
    assert known.wait(PATIENCE_S), "no engine came"
    tokens = args.tokens[0]
    chance = np.random.default_rng(0)
    calls = []
    region = region_of(engine) if args.regions else None
    for layer in states[-1].layers[: args.layers[0]]:
        spec = layer.spec
        hidden_states, place = memoryview(chance.integers(0, 120, tokens * spec.hidden_size, np.uint8)), None
        if region is not None:
            nbytes = len(hidden_states)
            region[:nbytes] = hidden_states
            hidden_states, place = region[:nbytes], region[nbytes : 3 * nbytes]
        logits = memoryview(chance.standard_normal(tokens * spec.num_experts, np.float32).view(np.uint8))
        parts = (pb.DATA_TYPE_FLOAT8_E4M3FN, hidden_states), (pb.DATA_TYPE_FLOAT32, logits), None, None
        calls.append(RemoteCall(layer, (tokens, *parts, pb.DATA_TYPE_BFLOAT16, True, False), place=place))
    turn = itertools.cycle(calls)

    def ask() -> None:
        engine.submit(next(turn), None, answered)

    def answered(promise: Promise[Any]) -> None:
        error = promise.exception(timeout=0)
        if over.is_set() or error is not None:
            drained.release()
            assert error is None, error
        else:
            ask()

    for _ in range(args.in_flight[0]):
        ask()
    sys.stdin.read()
    over.set()
    for _ in range(args.in_flight[0]):
        assert drained.acquire(timeout=PATIENCE_S), "a request was not answered"
    engine.stop(PATIENCE_S)


if __name__ == "__main__":
    main()
