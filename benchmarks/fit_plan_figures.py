"""Derives the figures of `expertd-server plan` from measured runs; run it again when there are new ones.

    python benchmarks/fit_plan_figures.py

Reads the newest benchmarks/results/kernels-*.json of each GPU (even routing), the newest group-*.json, a run of the
whole service with the no-op backend (SERVICE) and transport.json; writes server/expertd_server/plan_figures.json. The
transport is that of the service with as many processes as that run had, one and four; nothing is derived for other
numbers. The time of a layer is fitted as

    launch + ((read * r)^blend + (math * m)^blend)^(1 / blend) + rows * w

read: touched weights and tokens at the measured read rate; math: FLOPs at the best measured dense FP8 rate; rows: bytes
of routed rows between the kernels at the read rate. r, m, w, launch and blend are fitted, by least squares of the
logarithm over all cells; the error is told with the figures. A GPU without a run of its own gets the fit of the newest
one with its own ceilings, and says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expertd_server.plan_figures import Kernels, KernelWork
from expertd_server.synthetic import PRESETS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SERVICE = RESULTS / "service-noop-h100-host-2026-11-26.json"
TARGET = HERE.parent / "server" / "expertd_server" / "plan_figures.json"
GPUS = ("h100", "h200")
SHAPES = {
    "mixtral": "mixtral-8x7b",
    "qwen3": "qwen3-30b-a3b",
    "deepseek": "deepseek-v3",
    "scout": "llama4-scout",
    "nemotron": "nemotron-3-super",
}
"""The presets that the cases of bench_kernels.py have the sizes of."""
UNMEASURED: dict[str, dict[str, Any]] = {
    "h100": {
        "gpu": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 85_000_000_000,
        "ceilings": {"read_gbs": 3098, "fp8_tflops": 1466},
        "ceilings_source": "ceilings of the reference run in benchmarks/peers_h100.json",
    }
}
"""GPUs whose kernels may not have been timed yet; their ceilings have been."""


def fit(
    predict: Callable[[Sequence[float]], Sequence[float]], measured: Sequence[float], start: list[float]
) -> list[float]:
    """Positive parameters with the least mean squared logarithm of predicted / measured: a pattern search."""

    def error(parameters: Sequence[float]) -> float:
        return math.fsum(math.log(p / m) ** 2 for p, m in zip(predict(parameters), measured, strict=True))

    best, least, step = start, error(start), 0.3
    while step > 1e-4:
        improved = False
        for index in range(len(start)):
            for factor in (1 + step, 1 / (1 + step)):
                candidate = [*best]
                candidate[index] *= factor
                if (value := error(candidate)) < least:
                    best, least, improved = candidate, value, True
        if not improved:
            step /= 2
    return best


def work_of(cell: dict[str, Any]) -> KernelWork:
    """What a measured cell did."""
    return KernelWork.of(
        PRESETS[SHAPES[cell["case"]]], tokens=cell["tokens"], rows=cell["rows"], touched=cell["experts"]
    )


def fit_kernels(path: Path) -> dict[str, Any]:
    """The figures of one run."""
    run = json.loads(path.read_text())
    cells = [cell for cell in run["cells"] if cell["routing"] == "even"]
    read_gbs, fp8_tflops = max(run["ceilings"]["read_gbs"].values()), max(run["ceilings"]["fp8_tflops"].values())

    def kernels(parameters: Sequence[float]) -> Kernels:
        launch_us, read_factor, math_factor, rows_factor, blend = parameters
        return Kernels(
            read_gbs=read_gbs,
            fp8_tflops=fp8_tflops,
            launch_us=launch_us,
            read_factor=read_factor,
            math_factor=math_factor,
            rows_factor=rows_factor,
            blend=blend,
        )

    works, measured = [work_of(cell) for cell in cells], [cell["us"] for cell in cells]
    parameters = fit(lambda q: [kernels(q).layer_us(w) for w in works], measured, [15.0, 1.05, 1.1, 0.5, 2.0])
    fitted = kernels(parameters)
    errors = [abs(fitted.layer_us(w) / us - 1) for w, us in zip(works, measured, strict=True)]
    return {
        "source": f"benchmarks/results/{path.name}",
        "gpu": run["gpu"]["name"],
        "time": run["time"],
        "is_scaled": False,
        "memory_bytes": run["gpu"]["memory_bytes"],
        "kernels": {name: round(value, 4) for name, value in vars(fitted).items()},
        "cells": len(cells),
        "worst_error": round(max(errors), 4),
        "rms_error": round(math.sqrt(math.fsum(e * e for e in errors) / len(errors)), 4),
    }


def newest(pattern: str) -> Path | None:
    """The run that was measured last, by the time in it."""
    paths = [path for path in RESULTS.glob(pattern) if "zipf" not in path.name]
    return max(paths, key=lambda path: json.loads(path.read_text())["time"], default=None)


def fit_client(path: Path) -> dict[str, Any]:
    """Microseconds of routing, splitting and summing on the client: fixed, and for each returned value.

    Of the least times, to which the machine's other work adds nothing, and of the compiled kernels.
    """
    rows = [row for row in json.loads(path.read_text())["rows"] if row["arithmetic"] == "compiled"]
    values = [row["tokens"] * row["shards_per_token"] * PRESETS[row["layer"]].hidden_size for row in rows]
    measured = [row["all"]["least_us"] for row in rows]
    fixed_us, value_ns = fit(lambda q: [q[0] + q[1] * v / 1e3 for v in values], measured, [50.0, 0.5])
    errors = [abs((fixed_us + value_ns * v / 1e3) / us - 1) for v, us in zip(values, measured, strict=True)]
    return {
        "source": f"benchmarks/results/{path.name}, least times with the kernels of numba",
        "call_us": round(fixed_us, 2),
        "value_ns": round(value_ns, 4),
        "worst_error": round(max(errors), 4),
    }


def fit_transport() -> dict[str, Any]:
    """Straight lines through the measured points: the exchange of the whole service, copies of pinned memory."""
    little, much = json.loads((HERE / "transport.json").read_text())["pinned_copy"]
    times = [point["in_us"] + point["out_us"] for point in (little, much)]
    copy_byte_us = (times[1] - times[0]) / (much["bytes"] - little["bytes"]) / 2
    points = json.loads(SERVICE.read_text())["points"]
    return {
        "source": f"benchmarks/results/{SERVICE.name}, the service without a backend, over loopback",
        # Without front-ends the one process of the server serves, too.
        "servings": [
            fit_serving(max(1, frontends), [point for point in points if point["frontends"] == frontends])
            for frontends in sorted({point["frontends"] for point in points})
        ],
        "copies_us": round(times[0] - 2 * copy_byte_us * little["bytes"], 1),
        "copies_byte_ns": round(1e3 * copy_byte_us, 5),
    }


def fit_serving(processes: int, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a server with so many serving processes; points: a lone stream and saturated, two sizes each."""
    small, large = (point for point in points if point["load"] == "lone stream")
    bytes_of = [point["request_bytes"] + point["answer_bytes"] for point in (small, large)]
    small_us, large_us = (point["expertd"]["latency_us"]["p50"] for point in (small, large))
    byte_us = (large_us - small_us) / (bytes_of[1] - bytes_of[0])
    return {
        "processes": processes,
        "server_gbs": round(max(p["bytes_per_s"] for p in points if p["load"] == "saturated stream") / 1e9, 2),
        "exchange_us": round(small_us - byte_us * bytes_of[0], 1),
        "exchange_byte_ns": round(1e3 * byte_us, 4),
    }


def main() -> int:
    """Write the file; print what it says."""
    gpus = {name: fit_kernels(path) for name in GPUS if (path := newest(f"kernels-{name}*.json")) is not None}
    if not gpus:
        raise SystemExit("no benchmarks/results/kernels-*.json of a known GPU")
    measured = [*gpus.values()]
    for name in UNMEASURED.keys() - gpus.keys():
        other, known = max(measured, key=lambda figures: figures["time"]), UNMEASURED[name]
        gpus[name] = {
            **other,
            "source": f"{other['source']} ({other['gpu']}), scaled by the {known['ceilings_source']}",
            "is_scaled": True,
            "gpu": known["gpu"],
            "memory_bytes": known["memory_bytes"],
            "kernels": {**other["kernels"], **known["ceilings"]},
        }
    group = newest("group-*.json")
    assert group is not None
    figures = {"gpus": dict(sorted(gpus.items())), "client": fit_client(group), "transport": fit_transport()}
    TARGET.write_text(json.dumps(figures, indent=1) + "\n")
    print(TARGET.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
