"""What the engine makes of the GPU, without gRPC: many layers resident, graphs of all, and callers that keep it busy.

Weights, capture time and graph memory of `--layers` layers; then, for each request size, requests in closed loop on one
layer and on random layers, beside the rate of the bare graphs replayed back to back on the same layers with the mean
batch that the engine made. Answers are compared with the operator's bytes first.

--memory own: requests and answers lie in memory of this process, and the processor copies them. shared: in memory that
others share with it, which the GPU copies from and to.

    python benchmarks/bench_engine.py --json benchmarks/results/engine.json
    python benchmarks/bench_engine.py --layers 4 --seconds 1       a quick look
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import header, write_json
from rich.console import Console
from rich.table import Table

from expertd_server.backend_cuda import CudaBackend
from expertd_server.batch import Limits
from expertd_server.cuda_slot import pinner_of
from expertd_server.engine import BatchReport, Engine, ForwardCall, ForwardResult, HostTensor
from expertd_server.event_loop import EventLoop
from expertd_server.garbage import look_rarely
from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind, input_layout, num_valid_tokens
from expertd_server.native import Copies
from expertd_server.pinning import Pinner, pinned_address
from expertd_server.promise import Promise
from expertd_server.spans import whole
from expertd_server.synthetic import synthetic_spec
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

PATIENCE_S = 60.0
USUAL = BatchKind(torch.float8_e4m3fn, False, torch.bfloat16)
MAX_BATCH_TOKENS = 4096
PINNED_BYTES = 4 << 30


def make_weights(spec: LayerSpec) -> ExpertWeights:
    """Random finite FP8 weights, made on the GPU: making them on the host would take minutes."""

    def fp8(*shape: int) -> torch.Tensor:
        weights = torch.empty(shape, dtype=torch.uint8, device="cuda")
        return weights.random_(0, 256).bitwise_and_(0xBF).view(torch.float8_e4m3fn)  # below 2 in magnitude

    ones = torch.ones(spec.num_local, device="cuda")
    return ExpertWeights(
        gemm1_weights=fp8(spec.num_local, spec.gemm1_rows, spec.hidden_size),
        output1_scales_scalar=ones / spec.hidden_size**0.5,
        output1_scales_gate_scalar=ones / spec.hidden_size**0.5,
        gemm2_weights=fp8(spec.num_local, spec.hidden_size, spec.intermediate_size),
        output2_scales_scalar=ones / spec.intermediate_size**0.5,
        hidden_states_scale=1.0,
    )


def make_call(layer: MoELayer, num_tokens: int, seed: int) -> ForwardCall:
    """FP8 hidden states and float32 logits in, bfloat16 out."""
    g = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_tokens, layer.spec.hidden_size, generator=g).to(torch.float8_e4m3fn)
    logits = torch.randn(num_tokens, layer.spec.num_experts, generator=g)
    return ForwardCall(layer, host(hidden_states), routing_logits=host(logits))


class Memory:
    """Where requests and their answers lie, one behind the other. pinner: shares it with the GPU; None: nobody does."""

    def __init__(self, nbytes: int, pinner: Pinner | None) -> None:
        mapped = mmap.mmap(-1, nbytes)
        self.view = memoryview(mapped) if pinner is None else pinner.share(mapped)
        self._next = 0

    def take(self, nbytes: int) -> memoryview:
        """The next so many bytes, aligned as a front-end's are."""
        start, self._next = self._next, -(-(self._next + nbytes) // 4096) * 4096
        return self.view[start : start + nbytes]

    def place(self, tensor: HostTensor) -> HostTensor:
        """The same, lying here."""
        data = self.take(len(tensor.data))
        data[:] = tensor.data
        return HostTensor(tensor.dtype, tensor.shape, data)


def answering(call: ForwardCall, memory: Memory) -> ForwardCall:
    """The same from and to memory, written as the service would: where it is to go, beside others' copies."""
    nbytes = call.num_tokens * call.layer.spec.hidden_size * call.output_dtype.itemsize
    assert call.routing_logits is not None
    call.hidden_states, call.routing_logits = memory.place(call.hidden_states), memory.place(call.routing_logits)
    call.place = place = memory.take(nbytes)

    def encode(result: ForwardResult) -> None:
        matrix = result.matrix
        assert matrix is not None
        copies = result.copies or Copies()
        copies.add_memory(place, 0, matrix.address, matrix.nbytes)
        if result.copies is None:  # it is alone in its batch
            copies.run()

    call.encode = encode
    return call


def placed(calls: list[ForwardCall], pinner: Pinner | None) -> list[ForwardCall]:
    """The calls in one memory, with their answers; pinned by now where there is somebody to do it."""
    spec, num_tokens = calls[0].layer.spec, max(call.num_tokens for call in calls)
    row_bytes = 3 * spec.hidden_size + 4 * spec.num_experts
    memory = Memory(len(calls) * (num_tokens * row_bytes + 3 * 4096), pinner)
    calls = [answering(call, memory) for call in calls]
    until_s = time.monotonic() + PATIENCE_S
    while pinner is not None and not all(
        pinned_address(data, len(data))
        for call in calls
        if call.routing_logits is not None and call.place is not None
        for data in (call.hidden_states.data, call.routing_logits.data, call.place)
    ):
        assert time.monotonic() < until_s, f"only {pinner.pinned_bytes} bytes were pinned"
        time.sleep(0.001)
    return calls


def host(tensor: torch.Tensor) -> HostTensor:
    """The tensor's bytes, as a request would hold them."""
    return HostTensor(tensor.dtype, tuple(tensor.shape), bytes(tensor.view(-1).view(torch.uint8).numpy().data))


def check(engine: Engine, layers: list[MoELayer], sizes: list[int]) -> int:
    """How many answers were compared with the operator's. Raises AssertionError when one differs."""
    pairs = [make_call(layer, size, size) for layer in layers for size in sizes]
    futures = [engine.submit(call) for call in pairs]
    for call, future in zip(pairs, futures, strict=True):
        assert call.routing_logits is not None
        expected = call.layer.forward(
            call.hidden_states.to_tensor().cuda(), routing_logits=call.routing_logits.to_tensor().cuda()
        ).output
        output = future.result(PATIENCE_S).output
        assert output is not None
        assert expected is not None
        same = torch.equal(output.view(torch.int16), expected.cpu().view(torch.int16))
        assert same, f"{call.layer.name}, {call.num_tokens} tokens: the answer is not the operator's"
    return len(pairs)


@dataclass
class Count:
    """What the engine's batches did since the last reset."""

    batches: int = 0
    replays: int = 0
    requests: int = 0
    tokens: int = 0
    rows: int = 0
    compute_s: float = 0.0

    def add(self, report: BatchReport) -> None:
        self.batches += 1
        self.replays += report.graph_rows is not None
        self.requests += report.num_requests
        self.tokens += report.num_tokens
        self.rows += report.graph_rows or report.num_tokens
        self.compute_s += report.compute_s


@dataclass
class Tally:
    """The count of now; reports come from the engine's thread."""

    count: Count = field(default_factory=Count)

    def add(self, report: BatchReport) -> None:
        self.count.add(report)

    def reset(self) -> Count:
        before, self.count = self.count, Count()
        return before


def closed_loop(
    engine: Engine, loop: EventLoop, tally: Tally, calls: list[ForwardCall], *, in_flight: int, seconds: float
) -> dict[str, Any]:
    """Keeps in_flight random calls waiting, from the loop that the engine runs in, as the service does."""
    chance = random.Random(0)
    latencies_s: list[float] = []
    failures: list[BaseException] = []
    over, ended = threading.Event(), threading.Semaphore(0)

    def ask() -> None:
        done = partial(answered, time.perf_counter())
        engine.submit(chance.choice(calls)).add_done_callback(done)

    def answered(start_s: float, promise: Promise[object]) -> None:
        latencies_s.append(time.perf_counter() - start_s)
        error = promise.exception(timeout=0)
        if error is not None:
            failures.append(error)
        if over.is_set() or failures:
            ended.release()
        else:
            ask()

    for _ in range(in_flight):
        loop.soon(ask)
    time.sleep(0.3)  # to a steady state
    tally.reset()
    latencies_s.clear()
    cpu_s, start_s = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    count, wall_s, cpu_s = tally.reset(), time.perf_counter() - start_s, time.process_time() - cpu_s
    over.set()
    for _ in range(in_flight):
        assert ended.acquire(timeout=PATIENCE_S), "a call was not answered"
    if failures:
        raise failures[0]
    merged = sorted(latencies_s)
    return {
        "tokens_per_s": count.tokens / wall_s,
        "requests_per_s": count.requests / wall_s,
        "mean_batch_tokens": count.tokens / max(1, count.batches),
        "mean_batch_requests": count.requests / max(1, count.batches),
        "padding_ratio": 1 - count.tokens / max(1, count.rows),
        "replay_ratio": count.replays / max(1, count.batches),
        "busy_ratio": count.compute_s / wall_s,
        "compute_us": count.compute_s / max(1, count.batches) * 1e6,
        "p50_us": statistics.median(merged) * 1e6,
        "p99_us": merged[int(len(merged) * 0.99)] * 1e6,
        "cpu_us_per_request": cpu_s / max(1, count.requests) * 1e6,
    }


def bare_graphs_us(engine: Engine, layers: list[MoELayer], num_tokens: int, replays: int = 200) -> float | None:
    """Microseconds a replay, back to back over the layers in turn, no copies; None: there is no graph that large."""
    assert engine.graphs is not None
    slot = engine.slots.take(PATIENCE_S)
    try:
        graphs = [engine.graphs.find(slot, layer, USUAL, num_tokens) for layer in layers]
        if graphs[0] is None:
            return None
        # Fresh tokens and logits, so that experts are chosen as in the requests.
        call = make_call(layers[0], graphs[0].num_rows, 1)
        layout = input_layout(layers[0].spec, USUAL, graphs[0].num_rows)
        arguments = layout.arguments(slot.host_in, graphs[0].num_rows)
        assert call.routing_logits is not None
        call.hidden_states.copy_to(arguments["hidden_states"])
        call.routing_logits.copy_to(arguments["routing_logits"])
        num_valid_tokens(slot.host_in).fill_(num_tokens)
        slot.send(whole(layout.nbytes(graphs[0].num_rows)))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        with slot.compute(), slot.stream():
            for turn in range(replays + 20):
                if turn == 20:  # warm
                    begin.record()
                graph = graphs[turn % len(graphs)]
                assert graph is not None
                graph.replay()
            end.record()
        slot.fetch([])
        slot.wait()
        return float(begin.elapsed_time(end)) / replays * 1e3
    finally:
        engine.slots.give_back(slot)


def table_of(cells: list[dict[str, Any]], title: str) -> Table:
    """One row a cell."""
    table = Table(title=title)
    columns = (
        "tokens",
        "memory",
        "in flight",
        "on",
        "Mtok/s",
        "req/batch",
        "tok/batch",
        "busy",
        "graphs",
        "compute us",
        "bare us",
        "of bare",
    )
    for column in (*columns, "of one layer", "p50 us", "p99 us", "CPU us/req", "lone p50 us", "lone compute us"):
        table.add_column(column, justify="right")
    for c in cells:
        values = (
            c["tokens"], c["memory"], c["in_flight"], c["on"], f"{c['tokens_per_s'] / 1e6:.3f}",
            f"{c['mean_batch_requests']:.1f}", f"{c['mean_batch_tokens']:.0f}", f"{c['busy_ratio']:.2f}",
            f"{c['replay_ratio']:.2f}", f"{c['compute_us']:.0f}", _shown(c["graph_us"], 0),
            _shown(c.get("of_bare_graphs"), 2), _shown(c.get("of_one_layer"), 2),
            f"{c['p50_us']:.0f}", f"{c['p99_us']:.0f}", f"{c['cpu_us_per_request']:.0f}",
            f"{c['lone_p50_us']:.0f}", f"{c['lone_compute_us']:.0f}",
        )  # fmt: skip
        table.add_row(*map(str, values))
    return table


def measure(
    engine: Engine, loop: EventLoop, tally: Tally, layers: list[MoELayer], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One cell for each size, memory, number in flight, and one layer or random ones."""
    cells = []
    pinner = pinner_of(layers[0].backend.device, PINNED_BYTES)
    for tokens, memory in itertools.product(args.tokens, args.memory):
        shared = pinner if memory == "shared" else None
        one = placed([make_call(layers[0], tokens, seed) for seed in range(32)], shared)
        some = placed([make_call(layers[n % len(layers)], tokens, n) for n in range(max(96, len(layers)))], shared)
        lone = closed_loop(engine, loop, tally, one, in_flight=1, seconds=args.seconds / 2)
        choices = [("one", one, layers[:1]), ("random", some, layers)][: len(layers)]
        for in_flight in args.in_flight:
            for name, calls, chosen in choices:
                cell = closed_loop(engine, loop, tally, calls, in_flight=in_flight, seconds=args.seconds)
                cell |= {"tokens": tokens, "memory": memory, "in_flight": in_flight, "on": name}
                cell |= {"lone_p50_us": lone["p50_us"], "lone_compute_us": lone["compute_us"]}
                cell["graph_us"] = bare_graphs_us(engine, chosen, round(cell["mean_batch_tokens"]))
                if cell["graph_us"] is not None:
                    cell["of_bare_graphs"] = cell["tokens_per_s"] * cell["graph_us"] / cell["mean_batch_tokens"] / 1e6
                cells.append(cell)
            if len(choices) > 1:
                cells[-1]["of_one_layer"] = cells[-1]["tokens_per_s"] / cells[-2]["tokens_per_s"]
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-30b-a3b", help="shape of the layers")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512], help="request sizes")
    parser.add_argument(
        "--in-flight", nargs="+", type=int, default=[64, 1024], help="requests that callers keep waiting"
    )
    parser.add_argument(
        "--memory", nargs="+", choices=("own", "shared"), default=["own", "shared"], help="where requests lie"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--max-graph-tokens", type=int, default=1024, help="rows of the largest graph")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    console = Console(width=150)

    backend, tally = CudaBackend(), Tally()
    spec = synthetic_spec(args.preset)
    started_s = time.perf_counter()
    layers = [
        MoELayer(f"layer{n}", backend.prepare(spec, make_weights(spec), max_num_tokens=MAX_BATCH_TOKENS), backend)
        for n in range(args.layers)
    ]
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started_s

    limits = Limits(max_batch_tokens=MAX_BATCH_TOKENS, max_queue_tokens=1 << 20, max_queue_requests=1 << 16)
    engine = Engine(limits, backend, max_graph_tokens=args.max_graph_tokens, on_batch=tally.add)
    free_bytes, started_s = torch.cuda.mem_get_info()[0], time.perf_counter()
    engine.capture(layers)
    torch.cuda.synchronize()
    capture_s = time.perf_counter() - started_s
    taken_bytes = free_bytes - torch.cuda.mem_get_info()[0]
    memory = engine.device_memory()
    assert engine.graphs is not None
    start = {
        "layers": args.layers,
        "load_s": load_s,
        "capture_s": capture_s,
        "graphs": len(engine.graphs),
        "memory_bytes": memory,
        "taken_by_capture_bytes": taken_bytes,
    }
    console.print(
        f"{args.layers} layers of {args.preset}: {memory['weights'] / 1e9:.2f} GB of weights in {load_s:.1f} s; "
        f"{len(engine.graphs)} graphs in {capture_s:.2f} s (target 60), {memory['graphs'] / 1e9:.3f} GB (target 2); "
        f"staging {memory['staging'] / 1e9:.3f} GB, workspace {memory['workspace'] / 1e9:.3f} GB"
    )

    loop = EventLoop.acquire()
    engine.batcher.start(loop)
    look_rarely()
    checked = check(engine, [layers[0], layers[-1]], [0, 1, 3, 64, 100, 1000, 1024, 1500, 4096])
    console.print(f"{checked} answers equal the operator's, byte for byte")
    cells = measure(engine, loop, tally, layers, args)
    leftover = {"slots_in_use": engine.slots.in_use, "queue_tokens": engine.batcher.queue_tokens}
    stopped = engine.batcher.stop(PATIENCE_S)
    loop.release()

    console.print(table_of(cells, "closed loop; lone: one request in flight"))
    console.print(f"stopped {stopped}, left over {leftover}")
    if args.json:
        write_json(args.json, {**header(), "arguments": vars(args), "start": start, "cells": cells})
    return 0 if stopped and not any(leftover.values()) else 1


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
