"""The table of bench_kernels.py, its summary, and the published figures that it is held against."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_published", "row", "summarize", "title"]

PUBLISHED_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
PUBLISHED_CASES = ("mixtral", "qwen3", "deepseek", "scout")
_FIXED = ("floor_us", "sustained_us", "sustained_floor_us")


def read_published(path: str | None, device_name: str) -> dict[str, Any] | None:
    """What peers reached in published runs on the same kind of GPU, where it is known."""
    for kind in ("H100", "H200"):
        if path is None and kind in device_name:
            path = str(Path(__file__).with_name(f"peers_{kind.lower()}.json"))
    return json.loads(Path(path).read_text()) if path is not None else None


def title(*, sustained: bool, peers: Sequence[str]) -> str:
    """The line above the rows; peers: those that run beside the kernels."""
    columns = "case          T routing   rows   max exp   floor       us /floor   peer"
    if sustained:
        columns += " sustained /floor"
    return columns + "".join(f" {peer:>10}" for peer in peers) + "   error family and stages"


def row(cell: dict[str, Any], published_us: float, *, sustained: bool, peers: Sequence[str]) -> str:
    """A cell's line. published_us: of the best published peer; NaN: not known."""
    line = (
        f"{cell['case']:9} {cell['tokens']:5} {cell['routing']:7} {cell['rows']:6} {cell['max_rows']:5} "
        f"{cell['experts']:3} {cell['floor_us']:7.1f} {cell['us']:8.1f} {cell['us'] / cell['floor_us']:6.2f} "
        f"{published_us:6.0f}"
    )
    if sustained:
        us = cell.get("sustained_us", math.nan)
        line += f" {us:9.1f} {us / cell.get('sustained_floor_us', math.nan):6.2f}"
    for peer in peers:
        line += f" {cell['peers'].get(peer, {}).get('us', math.nan):10.1f}"
    stages = [
        f"{key.removesuffix('_us')} {us}" for key, us in cell.items() if key.endswith("_us") and key not in _FIXED
    ]
    for name, timed in cell.get("families", {}).items():
        stages.append(f"| {name} {timed['us']:.1f}")
        if "gemm1_us" in timed:
            stages.append(f"({timed['gemm1_us']:.1f} {timed['gemm2_us']:.1f})")
    return f"{line} {cell.get('error', math.nan):7.4f} {' '.join([cell['family'], *stages])}"


def summarize(cells: list[dict[str, Any]], published: dict[str, Any] | None) -> dict[str, float]:
    """Geometric means: times the floor in the cells that peers were published for; times each peer that ran beside."""
    known = [
        c for c in cells if c["routing"] == "even" and c["tokens"] in PUBLISHED_TOKENS and c["case"] in PUBLISHED_CASES
    ]
    summary: dict[str, float] = {}
    if known:
        summary["cells"] = len(known)
        summary["geomean_times_floor"] = _geomean(c["us"] / c["floor_us"] for c in known)
        if published:
            slower = [c for c in known if c["us"] > min(published["us"][c["case"]][str(c["tokens"])])]
            summary["slower_than_best_peer"] = len(slower)
    sustained = [c for c in known if "sustained_us" in c]
    if sustained:
        summary["sustained_cells"] = len(sustained)
        summary["sustained_geomean_times_floor"] = _geomean(
            c["sustained_us"] / c["sustained_floor_us"] for c in sustained
        )
    for peer in sorted({peer for cell in cells for peer in cell.get("peers", {})}):
        beside = [c for c in cells if peer in c.get("peers", {})]
        summary[f"cells_beside_{peer}"] = len(beside)
        summary[f"geomean_times_{peer}"] = _geomean(c["us"] / c["peers"][peer]["us"] for c in beside)
        if sustained := [c for c in beside if "sustained_us" in c["peers"][peer]]:
            ratios = (c["sustained_us"] / c["peers"][peer]["sustained_us"] for c in sustained)
            summary[f"sustained_geomean_times_{peer}"] = _geomean(ratios)
    return summary


def _geomean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))
