"""What benchmarks/_server_metrics.py makes of a server's metrics, which the server itself writes here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from expertd_server.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _server_metrics import Batches, between, read


def test_what_the_server_writes_is_read() -> None:
    metrics = Metrics()
    nothing = read(generate_latest(metrics.registry).decode())
    assert nothing == Batches(0, 0, 0, 0)
    ids = np.zeros((1, 1), np.int32)
    for requests, tokens, busy_s in [(1, 100, 0.25), (3, 500, 0.5)]:
        metrics.observe_batch("layer", requests, tokens, [ids])
        metrics.observe_device(busy_s, tokens, None)
    after = read(generate_latest(metrics.registry).decode())
    assert after == Batches(count=2, requests=4, tokens=600, busy_s=0.75)
    assert between(nothing, after, seconds=1.5) == {
        "mean_batch_tokens": 300,
        "mean_batch_requests": 2,
        "busy_ratio": 0.5,
        "device_tokens_per_s": 800,
    }


def test_without_batches_there_is_nothing_to_say() -> None:
    one = Batches(5, 5, 5, 5)
    assert between(one, one, seconds=1) == {}


def test_a_device_that_takes_no_time_has_no_limit() -> None:
    said = between(Batches(0, 0, 0, 0), Batches(1, 1, 1, 0), seconds=1)
    assert said["device_tokens_per_s"] == pytest.approx(float("inf"))
