"""A Prometheus histogram that takes observations for nothing and sorts them into buckets later, many at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["LateHistogram"]

# Observations that wait at most; sorting so many takes some ten microseconds.
_MOST_WAITING: Final = 512


class LateHistogram(Collector):
    """Looks like `prometheus_client.Histogram`, but for its series _created.

    buckets: upper bounds, ascending; +Inf is added. label, values: what tells the series apart; one row of
    `observe` has a number for each of the values. Without a label a row is one number.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        label: str | None = None,
        values: Sequence[str] = ("",),
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = np.array(buckets, np.float64)
        self._names = [*map(floatToGoString, buckets), "+Inf"]
        self._label = label
        self._values = tuple(values)
        self._rows: deque[tuple[float, ...]] = deque()
        self._sorting = threading.Lock()
        self._counts = np.zeros((len(self._values), len(self._names)), np.int64)
        self._sums = np.zeros(len(self._values), np.float64)
        registry.register(self)

    def observe(self, *row: float) -> None:
        """Record one observation of each series, in the order of `values`."""
        self.observe_all((row,))

    def observe_all(self, rows: Iterable[tuple[float, ...]]) -> None:
        """Record several; each row as `observe` takes it."""
        self._rows.extend(rows)
        if len(self._rows) >= _MOST_WAITING:
            self._sort()

    def collect(self) -> Iterable[Metric]:
        """Called by Prometheus' client."""
        self._sort()
        with self._sorting:
            counts, sums = self._counts.cumsum(1).tolist(), self._sums.tolist()
        labels = [] if self._label is None else [self._label]
        family = HistogramMetricFamily(self._name, self._documentation, labels=labels)
        for value, cumulative, total in zip(self._values, counts, sums, strict=True):
            named = list(zip(self._names, cumulative, strict=True))
            family.add_metric([] if self._label is None else [value], named, total)
        yield family

    def describe(self) -> Iterable[Metric]:
        """Called by Prometheus' client, which keeps names apart."""
        yield HistogramMetricFamily(self._name, self._documentation)

    def _sort(self) -> None:
        with self._sorting:
            rows = []
            while self._rows:  # others go on adding
                rows.append(self._rows.popleft())
            if not rows:
                return
            observed = np.array(rows, np.float64)
            self._sums += observed.sum(0)
            # A value that equals a bound belongs to it.
            for series, column in enumerate(observed.T):
                buckets = np.searchsorted(self._bounds, column)
                self._counts[series] += np.bincount(buckets, minlength=len(self._names))
