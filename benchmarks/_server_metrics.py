"""What a server's own metrics say of a stretch of time: the batches that it made, and the device's part in it."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Batches:
    """Since the server's start. busy_s: that the device spent on them, one batch at a time."""

    count: float
    requests: float
    tokens: float
    busy_s: float


def scraped(port: int) -> Batches:
    """What the metrics port of a server on this machine says now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_TIMEOUT_S) as answer:
        return read(answer.read().decode())


def read(text: str) -> Batches:
    """The same from Prometheus' text. A series that is not there counts as 0: it appears with its first value."""
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
    return Batches(
        count=values.get("expertd_batch_tokens_count", 0.0),
        requests=values.get("expertd_batch_requests_sum", 0.0),
        tokens=values.get("expertd_batch_tokens_sum", 0.0),
        busy_s=values.get("expertd_device_busy_seconds_total", 0.0),
    )


def between(before: Batches, after: Batches, seconds: float) -> dict[str, float]:
    """Means over a stretch of time; empty when no batch ran.

    device_tokens_per_s: what the device alone would do, were there always a batch of this kind waiting for it. What is
    reached is busy_ratio of that.
    """
    count, tokens, busy_s = after.count - before.count, after.tokens - before.tokens, after.busy_s - before.busy_s
    if not count:
        return {}
    return {
        "mean_batch_tokens": tokens / count,
        "mean_batch_requests": (after.requests - before.requests) / count,
        "busy_ratio": busy_s / seconds,
        "device_tokens_per_s": tokens / busy_s if busy_s else float("inf"),
    }
