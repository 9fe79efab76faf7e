"""Times the CUDA backend: whole layers and stages, against ceilings measured in the same run.

Rules: routing logits in, bfloat16 out, hidden states already FP8, the whole layer in one CUDA graph; 256 MiB are read
before each replay, so that weights, logits and activations are cold; median of CUDA-event times. The floor of a cell is
the larger of (touched weights + tokens in and out) / measured read rate and FLOPs / best measured dense FP8 rate.
Weights, routing bias, logits and tokens are random, and the same in every run (`_kernel_cases.py`).

Sustained figures, of prefill: replays back to back for some seconds, so that the card's power is the bound; median of
the last second, and the dense FP8 rate of their floor is measured the same way.

    python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json
    python benchmarks/bench_kernels.py --cases qwen3 --tokens 1 64 --sweep      every tile family
    python benchmarks/bench_kernels.py --tokens 8192 --sustained 2 --beside torch vllm flashinfer
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import header, write_json
from _kernel_cases import CASES, make_call, make_layer, seed_of, work
from _kernel_cells import time_cell, time_peer
from _kernel_table import read_published, row, summarize, title
from _kernel_timer import WINDOW_S, Timer, fp8_rate_tflops, read_rate_gbs, sustained_fp8_rate_tflops
from peers_gpu import PEERS
from peers_gpu.beside import Beside

from expertd_server.backend import PreparedLayer

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREFILL_TOKENS = 2048
"""From here on there are sustained figures: with fewer tokens memory is the bound, not power."""


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--tokens", nargs="+", type=int, default=list(TOKENS))
    add("--zipf", action="store_true", help="skewed routing beside even routing")
    add("--sweep", action="store_true", help="time every tile family, not only the chosen one")
    add("--stages", action="store_true", help="time each stage alone")
    sustained = f"from {PREFILL_TOKENS} tokens on, time also the end of so long a run without a pause"
    add("--sustained", type=_seconds, default=0.0, metavar="SECONDS", help=sustained)
    add("--beside", nargs="+", default=[], choices=list(PEERS), help="peers to time as well, where they are installed")
    add("--check-rows", type=int, default=4, help="rows compared with float64 in each cell")
    add("--ceilings", help="JSON of an earlier run whose ceilings are taken instead of measuring them")
    add("--peers", help="JSON of published times of peers; default: peers_h100.json or peers_h200.json by device")
    add("--json", help="write the results here")
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not WINDOW_S < seconds <= 60:
        raise argparse.ArgumentTypeError(f"is {text}, expected more than {WINDOW_S:g} and at most 60 seconds")
    return seconds


def ceilings_of(timer: Timer, args: argparse.Namespace) -> dict[str, Any]:
    """What the card can do, measured, or read from an earlier run; measured in any case where that one lacks it."""
    ceilings: dict[str, Any] = {}
    if args.ceilings:
        ceilings = json.loads(Path(args.ceilings).read_text())["ceilings"]
    else:
        ceilings = {"read_gbs": read_rate_gbs(timer), "fp8_tflops": fp8_rate_tflops(timer)}
        empty = timer.capture(timer._sink.zero_)
        ceilings["one_kernel_graph_us"] = round(timer.median_us(empty), 2)
    if args.sustained and "sustained_fp8_tflops" not in ceilings:
        ceilings["sustained_fp8_tflops"] = sustained_fp8_rate_tflops(timer, args.sustained)
    return ceilings


def floors(cell: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, float]:
    """Microseconds that a cell's bytes or arithmetic take at the ceilings."""
    memory_us = cell["bytes"] / max(ceilings["read_gbs"].values()) / 1e3
    found = {"floor_us": max(memory_us, cell["flops"] / max(ceilings["fp8_tflops"].values()) / 1e6)}
    if "sustained_us" in cell:
        found["sustained_floor_us"] = max(memory_us, cell["flops"] / ceilings["sustained_fp8_tflops"] / 1e6)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(arguments)
    from expertd_server.backend_cuda import FAMILIES, CudaBackend  # noqa: PLC0415 (--help needs no kernels)

    torch.manual_seed(0)
    backend, timer = CudaBackend(), Timer()
    ceilings = ceilings_of(timer, args)
    print(f"{backend.device_name}: {ceilings}", flush=True)
    published = read_published(args.peers, backend.device_name)
    cells: list[dict[str, Any]] = []
    beside = Beside(args.beside)

    def write(**more: Any) -> None:
        if args.json:
            facts = {"ceilings": ceilings, **more, "peers_left_out": beside.left_out, "cells": cells}
            write_json(args.json, {**header(), **facts})

    def measure(layer: PreparedLayer, name: str, num_tokens: int, zipf: bool) -> None:
        touched = published["experts_touched"].get(name, {}).get(str(num_tokens)) if published else None
        call = make_call(layer, num_tokens, zipf, touched, seed_of(name, num_tokens, "zipf" if zipf else "even"))
        backend.force_family = None
        sustained_s = args.sustained if num_tokens >= PREFILL_TOKENS else 0.0
        more = {"stages": args.stages, "check_rows": args.check_rows, "sustained_s": sustained_s}
        cell = time_cell(backend, layer, call, timer, **more)
        cell |= {"case": name, "tokens": num_tokens, "routing": "zipf" if zipf else "even"}
        cell |= work(layer.spec, call.topk_ids)
        cell |= floors(cell, ceilings)
        time_beside = partial(time_peer, backend, layer, call, timer, sustained_s=sustained_s)
        cell["peers"] = beside.time(name, time_beside)
        if args.sweep:
            cell["families"] = {}
            for family in FAMILIES:
                backend.force_family = family
                cell["families"][family] = time_cell(backend, layer, call, timer, stages=args.stages)
        best = min(published["us"].get(name, {}).get(str(num_tokens), [math.nan])) if published else math.nan
        print(row(cell, best, sustained=bool(args.sustained), peers=args.beside), flush=True)
        cells.append(cell)
        write()

    print(title(sustained=bool(args.sustained), peers=args.beside))
    for name in args.cases:
        layer = make_layer(backend, CASES[name], max(args.tokens), seed_of(name))
        beside.open(name, layer.spec, layer.weights)
        for num_tokens in args.tokens:
            for zipf in (False, True) if args.zipf else (False,):
                measure(layer, name, num_tokens, zipf)
        del layer
        beside.close()
        torch.cuda.empty_cache()
    summary = summarize(cells, published)
    print(summary)
    write(summary=summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
