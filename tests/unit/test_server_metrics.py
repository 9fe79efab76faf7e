"""Metrics of several processes as one: sums, which never go down when a process dies."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from expertd_server.server_metrics import ServerMetrics


class Process:
    """What a process counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("x_requests", "Requests.", ["code"], registry=self.registry)
        self.duration = Histogram("x_duration_seconds", "Time.", buckets=(1, 2), registry=self.registry)
        self.open = Gauge("x_open", "Streams.", registry=self.registry)

    def families(self) -> list[Metric]:
        return list(self.registry.collect())


class Server:
    """Processes that answer at once, but for those that hang."""

    def __init__(self, *names: str) -> None:
        self.processes = {name: Process() for name in names}
        self.hanging: set[str] = set()
        self.metrics = ServerMetrics(self._ask)
        for name in names:
            self.metrics.started(name)

    def _ask(self, number: int) -> Iterable[str]:
        for name in self.processes.keys() - self.hanging:
            self.metrics.received(name, number, self.processes[name].families())
        return list(self.processes)

    def value(self, sample: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(sample, labels)


def test_counts_histograms_and_gauges_are_summed() -> None:
    server = Server("a", "b")
    a, b = server.processes["a"], server.processes["b"]
    a.requests.labels("OK").inc(3)
    b.requests.labels("OK").inc(4)
    b.requests.labels("INTERNAL").inc()
    a.duration.observe(0.5)
    b.duration.observe(1.5)
    a.open.set(2)
    b.open.set(5)
    assert server.value("x_requests_total", code="OK") == 7
    assert server.value("x_requests_total", code="INTERNAL") == 1
    assert server.value("x_duration_seconds_count") == 2
    assert server.value("x_duration_seconds_sum") == 2.0
    assert [server.value("x_duration_seconds_bucket", le=le) for le in ("1.0", "2.0", "+Inf")] == [1, 2, 2]
    assert server.value("x_open") == 7
    created = [process.families()[0].samples[-1].value for process in (a, b)]
    assert server.value("x_requests_created", code="OK") == min(created)


def test_what_a_dead_process_counted_stays_and_what_it_held_goes() -> None:
    server = Server("a", "b")
    for process in server.processes.values():
        process.requests.labels("OK").inc(10)
        process.duration.observe(0.5)
        process.open.set(1)
    assert server.value("x_requests_total", code="OK") == 20
    server.metrics.ended("a")
    server.processes["a"] = Process()
    server.metrics.started("a")
    server.processes["a"].requests.labels("OK").inc(1)
    assert server.value("x_requests_total", code="OK") == 21
    assert server.value("x_duration_seconds_count") == 2
    assert server.value("x_open") == 1
    server.metrics.ended("a")
    server.metrics.ended("b")
    server.processes.clear()
    assert server.value("x_open") is None


def test_a_process_that_hangs_is_counted_as_it_last_said() -> None:
    server = Server("a", "b")
    server.processes["a"].requests.labels("OK").inc(2)
    assert server.value("x_requests_total", code="OK") == 2
    server.hanging.add("a")
    server.processes["a"].requests.labels("OK").inc(2)
    server.processes["b"].requests.labels("OK").inc(5)
    assert server.value("x_requests_total", code="OK") == 7
    server.metrics.ended("a")
    assert server.value("x_requests_total", code="OK") == 7


def test_restarts_are_there_from_the_start() -> None:
    server = Server()
    assert server.value("expertd_frontend_restarts_total") == 0
    assert server.value("expertd_engine_restarts_total") == 0
