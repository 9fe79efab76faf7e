"""What is noted for each request and batch is in the metrics when they are read, however much or little there is."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from expertd_server.metrics import Metrics
from expertd_server.timing import ForwardTiming


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    return 0.0 if found is None else found


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_it_is_there_when_it_is_read(count: int) -> None:
    metrics = Metrics()
    for n in range(count):
        metrics.count_answer("Forward" if n % 4 else "ForwardStream", ForwardTiming(10, 20, 30, 40, 5, 2), 1e-3, 2e-3)
        metrics.observe_batch("a", 2, 5, [np.zeros((1, 1), np.int32)])
    streamed = -(-count // 4)
    assert value(metrics, "expertd_requests_total", method="ForwardStream", code="OK") == streamed
    assert value(metrics, "expertd_requests_total", method="Forward", code="OK") == count - streamed
    sums = {"queue": 1e-5, "copy_in": 2e-5, "compute": 3e-5, "copy_out": 4e-5, "send": 1e-3, "total": 2e-3}
    for phase, seconds in sums.items():
        name = "expertd_request_duration_seconds"
        assert value(metrics, f"{name}_count", phase=phase) == count
        assert value(metrics, f"{name}_sum", phase=phase) == pytest.approx(count * seconds)
    assert value(metrics, "expertd_batch_tokens_sum") == 5 * count
    assert value(metrics, "expertd_batch_requests_sum") == 2 * count
    assert value(metrics, "expertd_batch_requests_count") == count


def test_nothing_is_lost_or_counted_twice_while_others_note_and_read() -> None:
    metrics, count = Metrics(), 2000

    def note() -> None:
        for _ in range(count):
            metrics.count_answer("Forward", ForwardTiming(1, 1, 1, 1, 1, 1), 1e-3, 1e-3)
            metrics.observe_batch("a", 1, 1, [])

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert value(metrics, "expertd_requests_total", method="Forward", code="OK") <= 4 * count
    for thread in threads:
        thread.join()
    assert value(metrics, "expertd_requests_total", method="Forward", code="OK") == 4 * count
    assert value(metrics, "expertd_request_duration_seconds_count", phase="total") == 4 * count
    assert value(metrics, "expertd_batch_tokens_sum") == 4 * count
