"""Times of CUDA graphs, in a burst and sustained, and what the card itself can do: the ceilings of the same run."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

__all__ = ["Timer", "fp8_rate_tflops", "read_rate_gbs", "sustained_fp8_rate_tflops", "sustained_s"]

FP8 = torch.float8_e4m3fn
MI = 1 << 20
CHUNK_S = 0.02
"""About what replays that are timed together take: long beside the launch of the next ones."""
WINDOW_S = 1.0
"""How much of the end of a sustained run counts."""


class Timer:
    """Median time of a captured graph, cold: 256 MiB are read before each replay."""

    def __init__(self) -> None:
        self._flush = torch.zeros(256 * MI // 4, dtype=torch.int32, device="cuda")
        self._sink = torch.empty((), dtype=torch.int64, device="cuda")

    def capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """One graph of what `run` launches."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def median_us(
        self,
        graph: torch.cuda.CUDAGraph,
        *,
        before: Callable[[], object] | None = None,
        cold: bool = True,
        budget_s: float = 0.06,
    ) -> float:
        """Median over 5 to 40 replays, the first two left out."""
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < 7 or (len(times) < 42 and time.perf_counter() - start < budget_s):
            if before is not None:
                before()
            if cold:
                torch.sum(self._flush, dtype=torch.int64, dim=0, out=self._sink)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times[2:])

    def sustained_us(self, graph: torch.cuda.CUDAGraph, seconds: float) -> float:
        """Time of one of the replays at the end of `seconds` of them back to back, when the card's power is the bound.

        Nothing is evicted in between, as that would be a rest: of what a replay reads, L2 may hold what it last read.
        """
        replays = max(1, round(CHUNK_S * 1e6 / self.median_us(graph)))

        def launch() -> Callable[[], float]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()

            def finish() -> float:
                end.synchronize()
                return float(begin.elapsed_time(end)) / 1e3

            return finish

        return sustained_s(launch, seconds) / replays * 1e6


def sustained_s(launch: Callable[[], Callable[[], float]], seconds: float, window_s: float = WINDOW_S) -> float:
    """Median time of the chunks that end in the last window_s of `seconds` of work without a pause.

    launch: starts a chunk of work and returns what waits for its end and says how many seconds it took. One chunk is
    queued behind the one that runs, and no more.
    """
    queued = deque([launch(), launch()])
    ends: list[tuple[float, float]] = []
    elapsed_s = 0.0
    while elapsed_s < seconds:
        took_s = queued.popleft()()
        elapsed_s += took_s
        ends.append((elapsed_s, took_s))
        queued.append(launch())
    for finish in queued:
        finish()
    return statistics.median(took_s for end_s, took_s in ends if end_s > elapsed_s - window_s)


def read_rate_gbs(timer: Timer) -> dict[str, int]:
    """GB/s of reading buffers of several sizes once, cold; by torch's sum where triton is not installed."""
    rates = {}
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    for name, size in (("64 MiB", 64 * MI), ("256 MiB", 256 * MI), ("1 GiB", 1024 * MI), ("4 GiB", 4096 * MI)):
        x = torch.randint(0, 3, (size // 4,), dtype=torch.int32, device="cuda")
        runs: list[Callable[[], object]] = [partial(torch.sum, x, dtype=torch.int64)]
        if triton is not None:
            for block, unroll, warps in ((1024, 4, 4), (1024, 8, 4), (2048, 4, 8)):
                run = read_kernel[(size // 4 // block // unroll,)]
                runs.append(partial(run, x, sink, x.numel(), BLOCK=block, UNROLL=unroll, num_warps=warps))
        rates[name] = round(max(size / timer.median_us(timer.capture(run)) / 1e3 for run in runs))
    return rates


def fp8_rate_tflops(timer: Timer) -> dict[str, int]:
    """TFLOP/s of torch's dense FP8 product with fast accumulation, single products on a rested card."""
    rates = {}
    for m, n, k in ((8192, 8192, 8192), (4096, 8192, 8192), (16384, 8192, 4096), (8192, 16384, 8192)):
        product = _dense_product(m, n, k)
        graph = timer.capture(product)
        time.sleep(0.1)
        rates[f"{m}x{n}x{k}"] = round(2 * m * n * k / timer.median_us(graph, budget_s=0.02) / 1e6)
    return rates


def sustained_fp8_rate_tflops(timer: Timer, seconds: float) -> float:
    """The same, at the end of `seconds` of one product after the other."""
    m, n, k = 8192, 8192, 8192
    product = _dense_product(m, n, k)
    return round(2 * m * n * k / timer.sustained_us(timer.capture(product), seconds) / 1e6)


def _dense_product(m: int, n: int, k: int) -> Callable[[], object]:
    """NOTE: it holds the operands, which a graph of it needs as long as it is replayed."""
    one = torch.ones((), device="cuda")
    a = torch.randn(m, k, device="cuda").to(FP8)
    b = torch.randn(n, k, device="cuda").to(FP8).t()
    return partial(torch._scaled_mm, a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def read_kernel(x, out, n, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """Read x once, 16 bytes a thread."""
        total = tl.zeros((BLOCK,), dtype=tl.int32)
        start = tl.program_id(0).to(tl.int64) * BLOCK * UNROLL
        for i in tl.static_range(UNROLL):
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(x + at, mask=at < n, other=0, cache_modifier=".cg")
        if tl.sum(total, axis=0) == 123456789:  # never: keeps the loads
            tl.store(out, 1)
