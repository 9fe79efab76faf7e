"""What the metrics say about the device."""

from __future__ import annotations

from expertd_server.metrics import Metrics


def test_replays_padding_and_busy_time_add_up() -> None:
    metrics = Metrics()
    for compute_s, tokens, rows in ((0.25, 3, 4), (0.5, 4, 4), (1.0, 5, 8), (2.0, 3000, None)):
        metrics.observe_device(compute_s, tokens, rows)
    value = metrics.registry.get_sample_value
    assert value("expertd_graph_replays_total", {"bucket": "4"}) == 2
    assert value("expertd_graph_replays_total", {"bucket": "8"}) == 1
    assert value("expertd_padding_tokens_total") == 1 + 0 + 3
    assert value("expertd_device_busy_seconds_total") == 3.75


def test_slots_and_memory_are_read_when_scraped() -> None:
    metrics, memory, in_use = Metrics(), {"weights": 1, "graphs": 2}, [0]
    metrics.watch_device(lambda: in_use[0], lambda: memory)
    memory["graphs"], in_use[0] = 5, 3
    value = metrics.registry.get_sample_value
    assert value("expertd_device_memory_bytes", {"purpose": "weights"}) == 1
    assert value("expertd_device_memory_bytes", {"purpose": "graphs"}) == 5
    assert value("expertd_slots_in_use") == 3
