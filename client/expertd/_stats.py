"""What a group has sent, received and survived, under the names that Prometheus would give it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

__all__ = ["GroupStats"]

_HELP = {
    "expertd_client_requests_total": "Calls of forward, by outcome: ok, partial or error.",
    "expertd_client_tokens_total": "Tokens of those calls.",
    "expertd_client_parts_total": "Parts that calls were split into, one or more for each slice of the experts.",
    "expertd_client_attempts_total": "Requests put on the wire: parts, failovers and hedges.",
    "expertd_client_failovers_total": "Parts sent again because a server failed, timed out or was taken out of use.",
    "expertd_client_hedges_total": "Parts sent to a second server because the first was slow.",
    "expertd_client_hedge_wins_total": "Hedges that were answered first.",
    "expertd_client_version_restarts_total": "Calls started over because servers no longer held a common version.",
    "expertd_client_sent_bytes_total": "Bytes of request messages, hedges and failovers included.",
    "expertd_client_received_bytes_total": "Bytes of response messages, those that came too late included.",
    "expertd_client_replica_up": "1 when the server gets requests, 0 when it drains or its circuit breaker is open.",
    "expertd_client_replica_in_flight_tokens": "Tokens on the wire to the server.",
    "expertd_client_hedge_delay_seconds": "When a second server is asked, for parts of up to max_tokens tokens.",
}

Labels = tuple[tuple[str, str], ...]


class GroupStats:
    """Counters of one group. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[tuple[str, Labels]] = Counter()

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to `expertd_client_<name>_total`."""
        with self._lock:
            self._counters[f"expertd_client_{name}_total", tuple(sorted(labels.items()))] += amount

    def value(self, name: str, **labels: str) -> int:
        """The counter `expertd_client_<name>_total`."""
        with self._lock:
            return self._counters[f"expertd_client_{name}_total", tuple(sorted(labels.items()))]

    def prometheus_text(self, gauges: Mapping[tuple[str, Labels], float] | None = None) -> str:
        """Everything in Prometheus' text format, with `gauges` by full name and labels."""
        with self._lock:
            samples = {**self._counters, **(gauges or {})}
        lines = []
        for name, text in _HELP.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for (sample, labels), value in sorted(samples.items()):
                if sample == name:
                    inside = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
                    lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
        return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
