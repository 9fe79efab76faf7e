"""What the server counts, in Prometheus' terms. Every label has a bounded set of values."""

from __future__ import annotations

import collections
import contextlib
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expertd_server.histograms import LateHistogram
from expertd_server.native import HostIds, count_ids, count_tensor_ids
from expertd_server.timing import ForwardTiming

__all__ = ["ExpertLoad", "LayerFacts", "Metrics"]

T = TypeVar("T")

_DURATION_BUCKETS_S = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZE_BUCKETS = tuple(2**n for n in range(15))

# The imbalance ratio looks back this far, in slices that are forgotten one at a time.
_SLICE_S = 10.0
_NUM_SLICES = 6
# What was answered and what ran is noted for next to nothing and counted later, many at a time; so many wait at most.
_MOST_UNCOUNTED = 64


class ExpertLoad:
    """Tokens that each local expert of one layer got, ever and of late.

    local_expert_offset, local_num_experts: the slice of global expert ids held here; ids outside are not counted.
    clock: seconds, monotonic.
    """

    def __init__(
        self, local_expert_offset: int, local_num_experts: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._offset = local_expert_offset
        self._count = local_num_experts
        self._clock = clock
        self._lock = threading.Lock()
        self._before = np.zeros(local_num_experts, np.int64)
        """Of the slices that are forgotten."""
        self._recent: deque[tuple[float, npt.NDArray[np.int64]]] = deque()
        self._slice_ends_s = float("-inf")

    def add(self, topk_ids: npt.NDArray[np.signedinteger[Any]] | HostIds) -> None:
        """Count the selected global expert ids of some tokens, an array or a torch tensor; -1 is an empty slot."""
        with self._lock:
            now_s = self._clock()
            if now_s >= self._slice_ends_s:
                self._begin_slice(now_s)
            if isinstance(topk_ids, np.ndarray):
                count_ids(topk_ids, self._offset, self._recent[-1][1])
            else:
                count_tensor_ids(topk_ids, self._offset, self._recent[-1][1])

    def _begin_slice(self, now_s: float) -> None:
        start_s = now_s // _SLICE_S * _SLICE_S
        self._slice_ends_s = start_s + _SLICE_S
        if len(self._recent) == _NUM_SLICES:
            self._before += self._recent.popleft()[1]
        self._recent.append((start_s, np.zeros(self._count, np.int64)))

    def total(self) -> list[int]:
        """Tokens of each local expert since the start; [L]."""
        with self._lock:
            total = sum((counts for _, counts in self._recent), self._before)
        return [int(count) for count in total]

    def imbalance_ratio(self) -> float | None:
        """Tokens of the busiest local expert over the mean of all, in the last minute; None when there were none."""
        with self._lock:
            since_s = self._clock() - _SLICE_S * _NUM_SLICES
            slices = [counts for start_s, counts in self._recent if start_s > since_s]
        counts = np.sum(slices, axis=0) if slices else np.zeros(1, np.int64)
        return float(counts.max() / counts.mean()) if counts.any() else None


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What the metrics say about one version of a layer."""

    layer: str
    weights_version: int
    is_current: bool
    hidden_size: int
    intermediate_size: int
    experts: str
    """Global ids of the first and the last expert held here, as in 0-63."""
    top_k: int
    routing: str
    activation: str
    nbytes: int


class Metrics:
    """Every metric of one server, in a registry of its own.

    count_expert_tokens: also export tokens by layer and expert, a time series for each pair.
    """

    def __init__(self, *, count_expert_tokens: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._count_expert_tokens = count_expert_tokens
        self._loads: dict[str, tuple[int, ExpertLoad]] = {}
        # What the metrics below do not know yet; first in the registry, so that they do when they are read.
        self._answered: deque[tuple[str, ForwardTiming, float, float]] = deque()
        self._ran: deque[tuple[int, int]] = deque()
        self.registry.register(_WhenScraped(self._count))
        self.requests = Counter(
            "expertd_requests",
            "Requests answered, by method and google.rpc.Code; the requests of a stream count one by one.",
            ["method", "code"],
            registry=self.registry,
        )
        self._request_duration = LateHistogram(
            "expertd_request_duration_seconds",
            "Where the time of answered Forward requests went; send is from the end of the batch to the written "
            "answer, total from arrival to there.",
            label="phase",
            values=("queue", "copy_in", "compute", "copy_out", "send", "total"),
            buckets=_DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self._in_flight_requests = Gauge(
            "expertd_in_flight_requests",
            "Forward requests that have arrived and are not answered yet.",
            registry=self.registry,
        )
        self.serving = Gauge(
            "expertd_serving",
            "Processes that listen and whose health is SERVING: 1 or 0; with front-ends up to their number.",
            registry=self.registry,
        )
        self._open_streams = Gauge("expertd_open_streams", "Open ForwardStream calls.", registry=self.registry)
        self._batch_tokens = LateHistogram(
            "expertd_batch_tokens", "Tokens of each batch.", buckets=_SIZE_BUCKETS, registry=self.registry
        )
        self._batch_requests = LateHistogram(
            "expertd_batch_requests", "Requests of each batch.", buckets=_SIZE_BUCKETS, registry=self.registry
        )
        self._queue_tokens = Gauge("expertd_queue_tokens", "Tokens that wait for a batch.", registry=self.registry)
        self._queue_requests = Gauge(
            "expertd_queue_requests", "Requests that wait for a batch.", registry=self.registry
        )
        # Plain numbers, of one thread alone: a Counter's lock takes longer than what it guards.
        self._device_busy_s = 0.0
        self._graph_replays: dict[int, int] = {}
        self._padding_tokens = 0
        self._slots_in_use = Gauge(
            "expertd_slots_in_use",
            "Staging slots that hold a batch, from gathering to answering.",
            registry=self.registry,
        )
        self._device_memory = Gauge(
            "expertd_device_memory_bytes", "Memory of the GPU by purpose.", ["purpose"], registry=self.registry
        )
        self._backend_info = Gauge(
            "expertd_backend_info",
            "Always 1; the labels say what runs the layers.",
            ["backend", "device"],
            registry=self.registry,
        )
        self._build_info = Gauge(
            "expertd_build_info", "Always 1; the labels say what runs.", ["version", "python"], registry=self.registry
        )
        self._layers: Callable[[], Iterable[LayerFacts]] = tuple
        self.registry.register(_WhenScraped(self._collect_device))
        self.registry.register(_WhenScraped(self._collect_experts))
        self.registry.register(_WhenScraped(self._collect_layers))

    def count_answer(self, method: str, timing: ForwardTiming, send_s: float, total_s: float) -> None:
        """Record an answered Forward request and where its time went."""
        self._answered.append((method, timing, send_s, total_s))
        if len(self._answered) >= _MOST_UNCOUNTED:
            self._count()

    def _count(self) -> Iterable[Metric]:
        """Have the metrics know what was noted."""
        answered, ran = _taken(self._answered), _taken(self._ran)
        for method, count in collections.Counter(row[0] for row in answered).items():
            self.requests.labels(method, "OK").inc(count)
        self._request_duration.observe_all(
            (timing.queue_us / 1e6, timing.copy_in_us / 1e6, timing.compute_us / 1e6, timing.copy_out_us / 1e6, *rest)
            for _, timing, *rest in answered
        )
        self._batch_requests.observe_all((requests,) for requests, _ in ran)
        self._batch_tokens.observe_all((tokens,) for _, tokens in ran)
        return ()

    def observe_batch(
        self,
        layer: str,
        requests: int,
        tokens: int,
        topk_ids: Iterable[npt.NDArray[np.signedinteger[Any]] | HostIds],
    ) -> None:
        """Record a batch and the global expert ids that it selected, see `ExpertLoad.add`."""
        self._ran.append((requests, tokens))
        if len(self._ran) >= _MOST_UNCOUNTED:
            self._count()
        counted = self._loads.get(layer)
        if counted is not None:
            for ids in topk_ids:
                counted[1].add(ids)

    def observe_device(self, compute_s: float, tokens: int, graph_rows: int | None) -> None:
        """Record how long a batch computed, and the graph that ran it; graph_rows None: none. For one thread."""
        self._device_busy_s += compute_s
        if graph_rows is not None:
            self._graph_replays[graph_rows] = self._graph_replays.get(graph_rows, 0) + 1
            self._padding_tokens += graph_rows - tokens

    def watch_device(self, slots_in_use: Callable[[], float], memory: Callable[[], dict[str, int]]) -> None:
        """Read the slots in use, and bytes of device memory by purpose, from these when scraped."""
        self._slots_in_use.set_function(slots_in_use)
        for purpose in memory():
            self._device_memory.labels(purpose).set_function(partial(_of, memory, purpose))

    def watch_calls(self, in_flight_requests: Callable[[], float], open_streams: Callable[[], float]) -> None:
        """Read how many requests and streams there are from these when scraped."""
        self._in_flight_requests.set_function(in_flight_requests)
        self._open_streams.set_function(open_streams)

    def watch_queue(self, tokens: Callable[[], float], requests: Callable[[], float]) -> None:
        """Read the depth of the queue from these when scraped."""
        self._queue_tokens.set_function(tokens)
        self._queue_requests.set_function(requests)

    def set_server(self, *, version: str, backend: str, device: str) -> None:
        """Say what runs."""
        self._backend_info.labels(backend, device).set(1)
        self._build_info.labels(version, platform.python_version()).set(1)

    def watch_layers(self, layers: Callable[[], Iterable[LayerFacts]]) -> None:
        """Read what is held, version by version, from this when scraped."""
        self._layers = layers

    def count_experts(self, layer: str, local_expert_offset: int, local_num_experts: int) -> None:
        """Count the tokens of a layer's experts, from now on or from when this was said first."""
        self._loads.setdefault(layer, (local_expert_offset, ExpertLoad(local_expert_offset, local_num_experts)))

    def forget_experts(self, layer: str) -> None:
        """The layer is held no more."""
        self._loads.pop(layer, None)

    def _collect_device(self) -> Iterable[Metric]:
        yield CounterMetricFamily(
            "expertd_device_busy_seconds",
            "Time that the device spent computing batches; its rate is the busy ratio.",
            value=self._device_busy_s,
        )
        replays = CounterMetricFamily(
            "expertd_graph_replays", "Batches that ran as a CUDA graph, by the rows of the graph.", labels=["bucket"]
        )
        for rows, count in sorted(self._graph_replays.copy().items()):
            replays.add_metric([str(rows)], count)
        yield replays
        yield CounterMetricFamily(
            "expertd_padding_tokens",
            "Rows of replayed graphs that held no token; they take no time.",
            value=self._padding_tokens,
        )

    def _collect_layers(self) -> Iterable[Metric]:
        labels = ["hidden_size", "intermediate_size", "experts", "top_k", "routing", "activation"]
        info = GaugeMetricFamily(
            "expertd_layer_info",
            "Always 1; the labels say what the layer is, weights_version the current version.",
            labels=["layer", "weights_version", *labels],
        )
        nbytes = GaugeMetricFamily(
            "expertd_layer_weights_bytes",
            "Bytes of device memory that a version of a layer's weights holds.",
            labels=["layer", "weights_version"],
        )
        for facts in self._layers():
            key = [facts.layer, str(facts.weights_version)]
            nbytes.add_metric(key, facts.nbytes)
            if facts.is_current:
                info.add_metric([*key, *(str(getattr(facts, label)) for label in labels)], 1)
        yield info
        yield nbytes

    def _collect_experts(self) -> Iterable[Metric]:
        """The metrics by expert, counted when scraped."""
        imbalance = GaugeMetricFamily(
            "expertd_expert_imbalance_ratio",
            "Tokens of a layer's busiest expert over the mean of its experts, in the last minute.",
            labels=["layer"],
        )
        tokens = CounterMetricFamily(
            "expertd_expert_tokens", "Tokens that selected an expert held here.", labels=["layer", "expert"]
        )
        for layer, (offset, load) in list(self._loads.items()):
            ratio = load.imbalance_ratio()
            if ratio is not None:
                imbalance.add_metric([layer], ratio)
            if self._count_expert_tokens:
                for expert, count in enumerate(load.total(), start=offset):
                    tokens.add_metric([layer, str(expert)], count)
        yield imbalance
        if self._count_expert_tokens:
            yield tokens


def _taken(noted: deque[T]) -> list[T]:
    """All that is there, while others go on adding."""
    rows = []
    with contextlib.suppress(IndexError):
        while True:
            rows.append(noted.popleft())
    return rows


def _of(values: Callable[[], dict[str, int]], name: str) -> int:
    return values()[name]


class _WhenScraped(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()
