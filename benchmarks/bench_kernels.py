"""Times the CUDA backend: whole layers and stages, against ceilings measured in the same run.

Rules: routing logits in, bfloat16 out, hidden states already FP8, the whole layer in one CUDA graph; 256 MiB are read
before each replay, so that weights, logits and activations are cold; median of CUDA-event times. The floor of a cell is
the larger of (touched weights + tokens in and out) / measured read rate and FLOPs / best measured dense FP8 rate.

    python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json
    python benchmarks/bench_kernels.py --cases qwen3 --tokens 1 64 --sweep      every tile family
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import header, write_json

from expertd_server.backend import PreparedLayer
from expertd_server.backend_cuda import FAMILIES, CudaBackend
from expertd_server.cuda_call import Call
from expertd_server.routing import route
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

FP8 = torch.float8_e4m3fn
MI = 1 << 20
CASES = {
    "mixtral": LayerSpec(
        hidden_size=4096, intermediate_size=14336, num_experts=8, top_k=2, routing_method=RoutingMethod.RENORMALIZE
    ),
    "qwen3": LayerSpec(
        hidden_size=2048,
        intermediate_size=768,
        num_experts=128,
        top_k=8,
        routing_method=RoutingMethod.RENORMALIZE_NAIVE,
    ),
    "deepseek": LayerSpec(
        hidden_size=7168,
        intermediate_size=2048,
        num_experts=256,
        top_k=8,
        local_num_experts=32,
        routing_method=RoutingMethod.DEEPSEEK_V3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    "scout": LayerSpec(
        hidden_size=5120,
        intermediate_size=8192,
        num_experts=16,
        top_k=1,
        routing_method=RoutingMethod.LLAMA4,
        use_routing_scales_on_input=True,
    ),
    "nemotron": LayerSpec(
        hidden_size=4096,
        intermediate_size=2688,
        num_experts=512,
        top_k=22,
        routing_method=RoutingMethod.DEEPSEEK_V3,
        activation=Activation.RELU2,
        routed_scaling_factor=5.0,
    ),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PEER_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


# ---- measuring


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
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times[2:])


def read_rate_gbs(timer: Timer) -> dict[str, float]:
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


def fp8_rate_tflops(timer: Timer) -> dict[str, float]:
    """TFLOP/s of torch's dense FP8 product with fast accumulation, single products on a rested card."""
    rates = {}
    one = torch.ones((), device="cuda")
    for m, n, k in ((8192, 8192, 8192), (4096, 8192, 8192), (16384, 8192, 4096), (8192, 16384, 8192)):
        a = torch.randn(m, k, device="cuda").to(FP8)
        b = torch.randn(n, k, device="cuda").to(FP8).t()
        graph = timer.capture(partial(torch._scaled_mm, a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
        time.sleep(0.1)
        rates[f"{m}x{n}x{k}"] = round(2 * m * n * k / timer.median_us(graph, budget_s=0.02) / 1e6)
    return rates


if triton is not None:

    @triton.jit
    def read_kernel(x, out, n, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """Read x once, 16 bytes a thread."""
        total = tl.zeros((BLOCK,), dtype=tl.int32)
        start = tl.program_id(0).to(tl.int64) * BLOCK * UNROLL
        for i in tl.static_range(UNROLL):
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(x + at, mask=at < n, other=0, cache_modifier=".cg")
        if tl.sum(total, axis=0) == 123456789:  # never: keeps the loads
            tl.store(out, 1)


# ---- layers


def random_fp8(*shape: int, size: float = 1.0) -> torch.Tensor:
    """Normal values, expert by expert so that the float copy stays small."""
    out = torch.empty(*shape, dtype=FP8, device="cuda")
    for part in out if len(shape) == 3 else (out,):
        part.copy_((torch.randn(part.shape, device="cuda", dtype=torch.bfloat16) * size).to(FP8))
    return out


def make_layer(backend: CudaBackend, spec: LayerSpec, max_num_tokens: int) -> PreparedLayer:
    """A layer whose activations and outputs are of order 1."""
    experts, hidden, inter = spec.num_local, spec.hidden_size, spec.intermediate_size
    ones = torch.ones(experts, device="cuda")
    up = 16.0 if not spec.activation.is_gated else 16.0 / hidden**0.5
    weights = ExpertWeights(
        gemm1_weights=random_fp8(experts, spec.gemm1_rows, hidden),
        output1_scales_scalar=ones * up,
        output1_scales_gate_scalar=ones / hidden**0.5,
        gemm2_weights=random_fp8(experts, hidden, inter),
        output2_scales_scalar=ones / (16 * inter**0.5),
        routing_bias=torch.randn(spec.num_experts, device="cuda") * 0.01 if spec.routing_method.reads_bias else None,
    )
    return backend.prepare(spec, weights, max_num_tokens=max_num_tokens)


def make_logits(spec: LayerSpec, num_tokens: int, zipf: bool) -> torch.Tensor:
    """Even routing, or experts chosen in proportion to 1 / rank."""
    logits = torch.randn(num_tokens, spec.num_experts, device="cuda")
    if zipf:
        gumbel = -torch.rand(num_tokens, spec.num_experts, device="cuda").clamp_(1e-9, 1 - 1e-7).log().neg().log()
        logits = gumbel - torch.arange(1, spec.num_experts + 1, device="cuda").log()
    return logits


def make_call(layer: PreparedLayer, num_tokens: int, zipf: bool, touched: int | None) -> Call:
    """Random inputs; touched: drawn until that many local experts are chosen, so that runs compare."""
    spec = layer.spec
    for _ in range(100):
        logits = make_logits(spec, num_tokens, zipf)
        if touched is None or zipf:
            break
        ids, _ = route(spec, logits, layer.weights.routing_bias)
        local = ids[(ids >= spec.local_expert_offset) & (ids < spec.local_expert_offset + spec.num_local)]
        if int(local.unique().numel()) == touched:
            break
    return Call(
        hidden_states=random_fp8(num_tokens, spec.hidden_size),
        logits=logits,
        in_ids=None,
        in_weights=None,
        topk_ids=torch.empty(num_tokens, spec.top_k, dtype=torch.int32, device="cuda"),
        topk_weights=torch.empty(num_tokens, spec.top_k, dtype=torch.bfloat16, device="cuda"),
        replay=None,
        num_valid=None,
        pdl=True,
        stream=0,
    )


def work(spec: LayerSpec, ids: torch.Tensor) -> dict[str, float]:
    """Bytes and FLOPs that a call cannot do without."""
    local = ids[(ids >= spec.local_expert_offset) & (ids < spec.local_expert_offset + spec.num_local)]
    touched = int(local.unique().numel())
    per_expert = (spec.gemm1_rows + spec.intermediate_size) * spec.hidden_size
    return {
        "rows": int(local.numel()),
        "experts": touched,
        "max_rows": int(local.bincount().max()) if local.numel() else 0,
        "bytes": touched * per_expert + 3 * ids.shape[0] * spec.hidden_size,
        "flops": 2 * local.numel() * per_expert,
    }


def relative_error(backend: CudaBackend, layer: PreparedLayer, call: Call, output: torch.Tensor, rows: int) -> float:
    """Of some rows, against float64 with the same routing and no rounding of the intermediate."""
    spec, w = layer.spec, layer.weights
    picked = torch.linspace(0, call.num_tokens - 1, min(rows, call.num_tokens), device="cuda").long()
    x = call.hidden_states.view(torch.uint8)[picked].view(FP8).double()
    expected = torch.zeros(len(picked), spec.hidden_size, dtype=torch.float64, device="cuda")
    for i, t in enumerate(picked.tolist()):
        for k in range(spec.top_k):
            e = int(call.topk_ids[t, k]) - spec.local_expert_offset
            if not 0 <= e < spec.num_local:
                continue
            weight = call.topk_weights[t, k].double()
            a = w.gemm1_weights[e].to(torch.float32).double() @ x[i]
            if spec.use_routing_scales_on_input:
                a, weight = a * weight, torch.ones_like(weight)
            gate_scale, scale = w.output1_scales_gate_scalar[e].double(), w.output1_scales_scalar[e].double()
            if spec.activation.is_gated:
                up, gate = a.chunk(2)
                inter = torch.nn.functional.silu(gate * gate_scale) * (up * scale)
            else:
                inter = (a * gate_scale).clamp(min=0) ** 2 * scale
            g = w.output2_scales_scalar[e].double() * (w.gemm2_weights[e].to(torch.float32).double() @ inter)
            expected[i] += weight * g
    return float((output[picked].double() - expected).norm() / expected.norm()) if float(expected.norm()) else 0.0


# ---- cells


def time_cell(
    backend: CudaBackend, layer: PreparedLayer, call: Call, timer: Timer, *, stages: bool, check_rows: int
) -> dict[str, Any]:
    """Whole call and, where asked, each stage alone (cold, without PDL)."""
    spec = layer.spec
    out = torch.empty(call.num_tokens, spec.hidden_size, dtype=torch.bfloat16, device="cuda")
    family = backend.family(layer, call.num_tokens)

    def with_stream() -> Call:
        return Call(**{**call.__dict__, "stream": torch.cuda.current_stream().cuda_stream})

    def whole() -> None:
        for part, out_part in with_stream().chunks(out, layer.state.max_num_tokens):
            backend._run(layer, part, out_part)

    cell: dict[str, Any] = {"us": round(timer.median_us(timer.capture(whole)), 2), "family": family.name}
    if check_rows:
        cell["error"] = relative_error(backend, layer, call, out, check_rows)
    if not stages:
        return cell

    planned = layer.state.max_num_tokens
    slab = backend._workspaces.current(layer.state.scratch(planned).nbytes)

    def stage(name: str) -> Callable[[], None]:
        def run() -> None:
            part = Call(**{**with_stream().__dict__, "pdl": False})
            plan = layer.state.plan(slab, planned)  # NOTE: the eager slab also inside the capture: stages share it
            if name == "route":
                backend.route(layer, plan, part, family)
            elif name == "gemm1":
                backend.gemm1(layer, plan, part, family, part.hidden_states.data_ptr())
            elif name == "gemm2":
                backend.gemm2(layer, plan, part, family)
            else:
                backend.finalize(layer, plan, part, out)

        return run

    counters = slab[8:16]  # the products' dynamic tile counters, which routing zeroes
    for name in ("route", "gemm1", "gemm2", "finalize"):
        graph = torch.cuda.CUDAGraph()
        if name != "route":
            counters.zero_()
        stage(name)()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            stage(name)()
        before = None if name == "route" else counters.zero_
        cell[f"{name}_us"] = round(timer.median_us(graph, before=before), 2)
        if name == "route":
            cell["route_warm_us"] = round(timer.median_us(graph, cold=False), 2)
    return cell


def read_peers(path: str | None, device_name: str) -> dict[str, Any] | None:
    """What peers reached on the same kind of GPU, where it is known."""
    for kind in ("H100", "H200"):
        if path is None and kind in device_name:
            path = str(Path(__file__).with_name(f"peers_{kind.lower()}.json"))
    return json.loads(Path(path).read_text()) if path is not None else None


def summarize(cells: list[dict[str, Any]], peers: dict[str, Any] | None) -> dict[str, float]:
    """Geometric mean over the cells that peers were measured in."""
    known = [c for c in cells if c["routing"] == "even" and c["tokens"] in PEER_TOKENS and c["case"] != "nemotron"]
    ratios = [c["us"] / c["floor_us"] for c in known]
    summary = (
        {"cells": len(ratios), "geomean_times_floor": math.exp(statistics.fmean(map(math.log, ratios)))}
        if ratios
        else {}
    )
    if peers and ratios:
        slower = [c for c in known if c["us"] > min(peers["us"][c["case"]][str(c["tokens"])])]
        summary["slower_than_best_peer"] = len(slower)
    return summary


def main() -> int:  # noqa: PLR0915
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--zipf", action="store_true", help="skewed routing beside even routing")
    parser.add_argument("--sweep", action="store_true", help="time every tile family, not only the chosen one")
    parser.add_argument("--stages", action="store_true", help="time each stage alone")
    parser.add_argument("--check-rows", type=int, default=4, help="rows compared with float64 in each cell")
    parser.add_argument("--ceilings", help="JSON of an earlier run whose ceilings are taken instead of measuring them")
    parser.add_argument("--peers", help="JSON of peers' times; default: peers_h100.json or peers_h200.json by device")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()

    torch.manual_seed(0)
    timer, backend = Timer(), CudaBackend()
    if args.ceilings:
        ceilings = json.loads(Path(args.ceilings).read_text())["ceilings"]
    else:
        ceilings = {"read_gbs": read_rate_gbs(timer), "fp8_tflops": fp8_rate_tflops(timer)}
        empty = timer.capture(timer._sink.zero_)
        ceilings["one_kernel_graph_us"] = round(timer.median_us(empty), 2)
    read, flops = max(ceilings["read_gbs"].values()), max(ceilings["fp8_tflops"].values())
    print(f"{backend.device_name}: {ceilings}", flush=True)
    peers = read_peers(args.peers, backend.device_name)

    cells: list[dict[str, Any]] = []
    print("case          T routing   rows   max exp   floor       us /floor   peer   error family and stages")
    for name in args.cases:
        spec = CASES[name]
        layer = make_layer(backend, spec, max(args.tokens))
        for num_tokens in args.tokens:
            for zipf in (False, True) if args.zipf else (False,):
                touched = peers["experts_touched"].get(name, {}).get(str(num_tokens)) if peers else None
                call = make_call(layer, num_tokens, zipf, touched)
                backend.force_family = None
                cell = time_cell(backend, layer, call, timer, stages=args.stages, check_rows=args.check_rows)
                cell |= {"case": name, "tokens": num_tokens, "routing": "zipf" if zipf else "even"}
                cell |= work(spec, call.topk_ids)
                cell["floor_us"] = max(cell["bytes"] / read / 1e3, cell["flops"] / flops / 1e6)
                extra = " ".join(
                    f"{k.removesuffix('_us')} {v}" for k, v in cell.items() if k.endswith("_us") and k != "floor_us"
                )
                if args.sweep:
                    cell["families"] = {}
                    for family in FAMILIES:
                        backend.force_family = family
                        timed = time_cell(backend, layer, call, timer, stages=args.stages, check_rows=0)
                        cell["families"][family] = timed
                        extra += f" | {family} {timed['us']:.1f}"
                        if args.stages:
                            extra += f" ({timed['gemm1_us']:.1f} {timed['gemm2_us']:.1f})"
                error = cell.get("error", math.nan)
                best_peer = min(peers["us"].get(name, {}).get(str(num_tokens), [math.nan])) if peers else math.nan
                print(f"{name:9} {num_tokens:5} {cell['routing']:7} {cell['rows']:6} {cell['max_rows']:5} "
                      f"{cell['experts']:3} {cell['floor_us']:7.1f} {cell['us']:8.1f} "
                      f"{cell['us'] / cell['floor_us']:6.2f} {best_peer:6.0f} {error:7.4f} "
                      f"{cell['family']} {extra}", flush=True)  # fmt: skip
                cells.append(cell)
                if args.json:
                    write_json(args.json, {**header(), "ceilings": ceilings, "cells": cells})
                del call
        del layer
        torch.cuda.empty_cache()
    summary = summarize(cells, peers)
    print(summary)
    if args.json:
        write_json(args.json, {**header(), "ceilings": ceilings, "summary": summary, "cells": cells})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
