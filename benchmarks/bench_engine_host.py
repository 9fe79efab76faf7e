"""What the engine's host does for a request, on a device that copies and computes nothing and is done at once.

    PYTHONPATH=server:client python benchmarks/bench_engine_host.py

Requests in closed loop, as in bench_engine.py, and without a GPU: what is left is Python and the compiled codec. CPU
microseconds for each request; of several rounds the least, since other programs only add to it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import header, write_json
from bench_engine import MAX_BATCH_TOKENS, PATIENCE_S, Tally, closed_loop, make_call, placed
from rich.console import Console
from rich.table import Table

from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.backend_noop import NoopBackend
from expertd_server.batch import Limits
from expertd_server.engine import Engine
from expertd_server.event_loop import EventLoop
from expertd_server.garbage import look_rarely
from expertd_server.layer import MoELayer
from expertd_server.pinning import Pinner
from expertd_server.spans import PackedSpans, Span
from expertd_server.staging import Graph, GraphTable, SlotTimes
from expertd_server.synthetic import synthetic_spec
from expertd_server.weights import ExpertWeights


class NullSlot:
    """A slot whose device side is its host side, where nothing happens."""

    is_host = False
    device_nbytes = 0

    def __init__(self, index: int) -> None:
        self.index = index
        self.host_in = self.device_in = self.host_out = self.device_out = torch.empty(0, dtype=torch.uint8)
        self.graphs: GraphTable = weakref.WeakKeyDictionary()

    def reserve(self, in_bytes: int, out_bytes: int) -> None:
        if in_bytes > self.host_in.numel() or out_bytes > self.host_out.numel():
            self.graphs.clear()
            self.host_in = self.device_in = torch.zeros(in_bytes, dtype=torch.uint8)
            self.host_out = self.device_out = torch.zeros(out_bytes, dtype=torch.uint8)

    def send(self, spans: list[Span] | PackedSpans) -> None:
        """Nothing."""

    def compute(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    stream = compute

    def fetch(self, spans: list[Span] | PackedSpans) -> None:
        """Nothing."""

    def run(self, sent: list[Span] | PackedSpans, graph: Graph, fetched: list[Span] | PackedSpans) -> None:
        graph.replay()

    def wait(self) -> None:
        """It is over."""

    def is_done_within(self, seconds: float) -> bool:
        return True

    def is_computed(self) -> bool:
        return True

    def ring_when_done(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

    def times(self) -> SlotTimes:
        return SlotTimes(0.0, 0.0, 0.0, 0.0)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def settle(self) -> None:
        """Nothing runs."""


class NullCapturer:
    """Graphs that do nothing."""

    def capture(self, run: Callable[[], MoEOutput]) -> tuple[Callable[[], None], MoEOutput]:
        return lambda: None, run()

    def warm_up(self, run: Callable[[], MoEOutput]) -> None:
        """Nothing has to be."""

    def free_bytes(self) -> int:
        return 0


def null_layers(count: int, preset: str, backend: NoopBackend) -> list[MoELayer]:
    """Layers of a preset's shape without weights."""
    spec = synthetic_spec(preset)
    nothing, ones = torch.empty(0, dtype=torch.float8_e4m3fn), torch.ones(spec.num_local)
    weights = ExpertWeights(nothing, ones, ones, nothing, ones, hidden_states_scale=1.0)
    prepared: PreparedLayer = backend.prepare(spec, weights, max_num_tokens=MAX_BATCH_TOKENS)
    return [MoELayer(f"layer{n}", prepared, backend) for n in range(count)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-30b-a3b", help="shape of the layers")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 48], help="that requests are for, at random")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="request sizes")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--memory", nargs="+", choices=("own", "shared"), default=["own", "shared"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()

    tally = Tally()
    limits = Limits(max_batch_tokens=MAX_BATCH_TOKENS, max_queue_tokens=1 << 20, max_queue_requests=1 << 16)
    slots = [NullSlot(index) for index in range(4)]
    backend = NoopBackend()
    engine = Engine(
        limits,
        backend,
        max_graph_tokens=MAX_BATCH_TOKENS,
        on_batch=tally.add,
        slots=slots,
        capturer=NullCapturer(),
    )
    look_rarely()
    layers = null_layers(max(args.layers), args.preset, backend)
    engine.capture(layers)
    loop = EventLoop.acquire()
    engine.batcher.start(loop)
    pinner = Pinner(lambda _address, _nbytes: None, lambda _address: None, 1 << 40)
    table = Table(title=f"{args.preset}, a device that does nothing")
    for column in ("layers", "tokens", "memory", "in flight", "req/batch", "CPU us/req", "req/s"):
        table.add_column(column, justify="right")
    cells: list[dict[str, Any]] = []
    for count, tokens, memory in itertools.product(args.layers, args.tokens, args.memory):
        calls = placed(
            [make_call(layers[n % count], tokens, n) for n in range(96)], pinner if memory == "shared" else None
        )
        for in_flight in args.in_flight:
            rounds = [
                closed_loop(engine, loop, tally, calls, in_flight=in_flight, seconds=args.seconds)
                for _ in range(args.rounds)
            ]
            least = min(rounds, key=lambda cell: float(cell["cpu_us_per_request"]))
            cells.append({"layers": count, "tokens": tokens, "memory": memory, "in_flight": in_flight, **least})
            shown = f"{least['mean_batch_requests']:.1f}", f"{least['cpu_us_per_request']:.1f}"
            table.add_row(*map(str, (count, tokens, memory, in_flight)), *shown, f"{least['requests_per_s']:.0f}")
    Console(width=120).print(table)
    engine.batcher.stop(PATIENCE_S)
    loop.release()
    if args.json:
        write_json(args.json, {**header(), "arguments": vars(args), "cells": cells})


if __name__ == "__main__":
    main()
