"""What a trace of requests says about a fault: how many failed, how soon the rate was back, how long they took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "Request",
    "begun_between",
    "between",
    "longest_gap_s",
    "outcomes",
    "parse",
    "percentile",
    "rate",
    "recovery_s",
    "timeline",
]


@dataclass(frozen=True)
class Request:
    """One request as the worker wrote it down. Times in seconds, `end_s` since the epoch."""

    end_s: float
    latency_s: float
    outcome: str
    version: int = 0
    """Of the weights; 0: there was no answer."""

    @property
    def start_s(self) -> float:
        """When it was sent, since the epoch."""
        return self.end_s - self.latency_s


def parse(trace: str) -> list[Request]:
    """The requests of a trace, in the order in which they ended. A last line that is not all there is left out."""
    requests = []
    for line in trace.splitlines(keepends=True):
        if line.endswith("\n"):
            end_s, latency_s, outcome, version = line.split()
            requests.append(Request(float(end_s), float(latency_s), outcome, int(version)))
    return sorted(requests, key=lambda request: request.end_s)


def between(requests: Iterable[Request], start_s: float, stop_s: float) -> list[Request]:
    """Those that ended from `start_s` on and before `stop_s`."""
    return [request for request in requests if start_s <= request.end_s < stop_s]


def begun_between(requests: Iterable[Request], start_s: float, stop_s: float) -> list[Request]:
    """Those that were sent from `start_s` on and before `stop_s`, whenever they ended."""
    return [request for request in requests if start_s <= request.start_s < stop_s]


def outcomes(requests: Iterable[Request]) -> dict[str, int]:
    """How many ended how."""
    return dict(Counter(request.outcome for request in requests))


def percentile(requests: Sequence[Request], share: float) -> float:
    """The latency in seconds that this share of the requests did not exceed."""
    latencies_s = sorted(request.latency_s for request in requests)
    return latencies_s[math.ceil(share * len(latencies_s)) - 1]


def rate(requests: Iterable[Request], start_s: float, stop_s: float) -> float:
    """Good answers a second."""
    return sum(request.outcome == "ok" for request in between(requests, start_s, stop_s)) / (stop_s - start_s)


def timeline(requests: Iterable[Request], start_s: float, stop_s: float, step_s: float = 0.1) -> list[int]:
    """Good answers in each step."""
    counts = [0] * math.ceil((stop_s - start_s) / step_s - 1e-9)
    for request in between(requests, start_s, stop_s):
        if request.outcome == "ok":
            counts[min(len(counts) - 1, int((request.end_s - start_s) / step_s))] += 1
    return counts


def longest_gap_s(requests: Iterable[Request], start_s: float, stop_s: float) -> float:
    """The longest time without an answer."""
    ends = [request.end_s for request in between(requests, start_s, stop_s)]
    return max(after - before for before, after in zip([start_s, *ends], [*ends, stop_s], strict=True))


def recovery_s(
    requests: Iterable[Request], fault_s: float, stop_s: float, wanted_rate: float, window_s: float = 1.0
) -> float | None:
    """How long after the fault the throughput over the following `window_s` was as wanted again; None: never."""
    counted = list(requests)
    for step in range(int((stop_s - window_s - fault_s) / 0.1) + 1):
        start_s = fault_s + 0.1 * step
        if rate(counted, start_s, start_s + window_s) >= wanted_rate:
            return round(0.1 * step, 1)
    return None
