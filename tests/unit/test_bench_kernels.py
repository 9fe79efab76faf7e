"""benchmarks/bench_kernels.py as far as no GPU is needed: its options, its table, its summary, sustained runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_kernels
from _kernel_table import row, summarize, title
from _kernel_timer import sustained_s

CELL: dict[str, Any] = {
    "us": 100.0,
    "family": "c160",
    "error": 0.025,
    "route_us": 5.5,
    "gemm1_us": 60.25,
    "case": "mixtral",
    "tokens": 8192,
    "routing": "even",
    "rows": 16384,
    "experts": 8,
    "max_rows": 2100,
    "bytes": 160e6,
    "flops": 80e9,
    "floor_us": 80.0,
    "peers": {},
}
CEILINGS = {"read_gbs": {"1 GiB": 2000, "4 GiB": 3200}, "fp8_tflops": {"a": 1600, "b": 1500}}


def test_the_options_ask_for_nothing_beside_unless_told() -> None:
    args = bench_kernels.options([])
    assert (args.sustained, args.beside) == (0.0, [])
    args = bench_kernels.options(["--sustained", "2.5", "--beside", "vllm", "torch", "--tokens", "1", "8192"])
    assert (args.sustained, args.beside, args.tokens) == (2.5, ["vllm", "torch"], [1, 8192])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sustained", "1"], "argument --sustained: is 1, expected more than 1 and at most 60 seconds"),
        (["--sustained", "90"], "argument --sustained: is 90"),
        (["--beside", "tensorrt"], "argument --beside: invalid choice: 'tensorrt'"),
        (["--cases", "gpt"], "argument --cases: invalid choice: 'gpt'"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_kernels.options(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


class Card:
    """Chunks of work that take what the card makes of them: it slows down after a while."""

    def __init__(self, fast_s: float, slow_s: float, fast_chunks: int) -> None:
        self._fast_s, self._slow_s, self._fast_chunks = fast_s, slow_s, fast_chunks
        self.launched = self.finished = self.most_queued = 0

    def launch(self) -> Callable[[], float]:
        took_s = self._fast_s if self.launched < self._fast_chunks else self._slow_s
        self.launched += 1
        self.most_queued = max(self.most_queued, self.launched - self.finished)

        def finish() -> float:
            self.finished += 1
            return took_s

        return finish


def test_a_sustained_time_is_that_of_the_end_not_of_the_burst() -> None:
    card = Card(fast_s=0.01, slow_s=0.02, fast_chunks=100)
    assert sustained_s(card.launch, 3.0) == 0.02
    assert card.most_queued == 2, "the card never waits, and no queue grows"
    assert card.finished == card.launched, "what was started is waited for"
    assert 200 <= card.launched <= 203


def test_a_run_that_only_just_slows_down_shows_the_burst() -> None:
    assert sustained_s(Card(fast_s=0.01, slow_s=0.02, fast_chunks=280).launch, 3.0) == 0.01


def test_floors_are_the_larger_of_memory_and_arithmetic_at_the_rates_of_their_kind() -> None:
    assert bench_kernels.floors(CELL, CEILINGS) == {"floor_us": 50.0}
    sustained = bench_kernels.floors({**CELL, "sustained_us": 130.0}, {**CEILINGS, "sustained_fp8_tflops": 1000})
    assert sustained == {"floor_us": 50.0, "sustained_floor_us": 80.0}


def ends(line: str, words: list[str]) -> list[int]:
    """Where each of the words, which follow one another, ends."""
    places, at = [], 0
    for word in words:
        at = line.index(word, at) + len(word)
        places.append(at)
    return places


def test_the_columns_stand_under_their_titles() -> None:
    peers = ["torch", "flashinfer"]
    cell = {**CELL, "sustained_us": 125.5, "sustained_floor_us": 100.0, "peers": {"flashinfer": {"us": 150.25}}}
    above = title(sustained=True, peers=peers)
    below = row(cell, 120.0, sustained=True, peers=peers)
    names = ["T", "rows", "max", "exp", "floor", "us", "/floor", "peer", "sustained", "/floor", *peers, "error"]
    values = ["8192", "16384", "2100", "8", "80.0", "100.0", "1.25", "120", "125.5", "1.25", "nan", "150.2", "0.0250"]
    assert ends(above, names) == ends(below, values)
    assert below.endswith(" c160 route 5.5 gemm1 60.25")


def test_a_row_has_no_columns_that_were_not_asked_for() -> None:
    below = row({**CELL, "families": {"p160": {"us": 110.0, "gemm1_us": 66.0, "gemm2_us": 33.0}}}, 120.0,
                sustained=False, peers=[])  # fmt: skip
    assert below.split()[9:11] == ["120", "0.0250"]
    assert below.endswith("| p160 110.0 (66.0 33.0)")
    assert len(title(sustained=False, peers=[]).split("error")[0]) == len(below.split("0.0250")[0]) + 1


def test_the_summary_tells_of_the_floor_and_of_each_peer() -> None:
    other = {**CELL, "us": 320.0, "case": "scout", "sustained_us": 400.0, "sustained_floor_us": 100.0}
    unpublished = {**CELL, "case": "nemotron", "us": 9000.0, "peers": {"torch": {"us": 18000.0}}}
    published = {"us": {"mixtral": {"8192": [90.0, 120.0]}, "scout": {"8192": [330.0]}}}
    cells = [{**CELL, "peers": {"torch": {"us": 200.0}, "vllm": {"us": 400.0}}}, other, unpublished]
    assert summarize(cells, published) == pytest.approx(
        {
            "cells": 2,
            "geomean_times_floor": (1.25 * 4.0) ** 0.5,
            "slower_than_best_peer": 1,
            "sustained_cells": 1,
            "sustained_geomean_times_floor": 4.0,
            "cells_beside_torch": 2,
            "geomean_times_torch": 0.5,
            "cells_beside_vllm": 1,
            "geomean_times_vllm": 0.25,
        }
    )
    assert summarize([unpublished | {"peers": {}}], None) == {}
