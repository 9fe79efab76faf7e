"""The arithmetic behind benchmarks/bench_faults.py, on traces whose answers are plain to see."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _faults import (
    Request,
    begun_between,
    between,
    longest_gap_s,
    outcomes,
    parse,
    percentile,
    rate,
    recovery_s,
    timeline,
)


def steady(start_s: float, stop_s: float, per_second: int) -> list[Request]:
    """Evenly spaced good answers."""
    count = round((stop_s - start_s) * per_second)
    return [Request(start_s + (index + 0.5) / per_second, 0.01, "ok") for index in range(count)]


def test_parse_leaves_out_a_line_that_is_still_being_written() -> None:
    assert parse("2.0 0.1 ok 3\n1.0 0.2 TimeoutError 0\n3.0 0.1 o") == [
        Request(1.0, 0.2, "TimeoutError", 0),
        Request(2.0, 0.1, "ok", 3),
    ]


def test_only_good_answers_count_as_throughput() -> None:
    requests = [*steady(0, 2, 10), Request(1.5, 0.01, "wrong_bits")]
    assert outcomes(requests) == {"ok": 20, "wrong_bits": 1}
    assert rate(requests, 0, 2) == 10
    assert timeline(requests, 0, 2, 0.5) == [5, 5, 5, 5]


def test_a_request_that_hangs_over_the_end_belongs_to_the_fault_it_was_sent_in() -> None:
    before, hanging, after = Request(5.5, 1.0, "ok"), Request(25.0, 19.5, "TimeoutError"), Request(8.5, 0.25, "ok")
    requests = [before, after, hanging]
    assert begun_between(requests, 5, 8) == [hanging]
    assert between(requests, 5, 8) == [before]


def test_recovery_is_the_first_window_at_the_wanted_rate() -> None:
    requests = [*steady(0, 5, 100), *steady(5.7, 10, 100)]
    assert recovery_s(requests, 5, 10, 95) == pytest.approx(0.7)
    assert longest_gap_s(requests, 5, 10) == pytest.approx(0.705)
    assert recovery_s(requests, 5, 10, 101) is None
    assert recovery_s(steady(0, 10, 100), 5, 10, 95) == 0


def test_percentile_is_a_latency_that_was_seen() -> None:
    requests = [Request(0, latency / 100, "ok") for latency in range(100, 0, -1)]
    assert percentile(requests, 0.99) == 0.99
    assert percentile(requests, 0.5) == 0.5
    assert percentile(requests[:1], 0.99) == 1.0
