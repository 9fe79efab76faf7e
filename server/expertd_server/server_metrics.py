"""The metrics of a server of several processes: the sum of theirs, asked for when Prometheus asks.

What counts up never goes down: of a process that died, its counts as last asked for stay in the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

__all__ = ["ServerMetrics", "engine_hangs"]

# A process that has not answered by then is counted as it last said.
_TIMEOUT_S: Final = 1.0

_Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class ServerMetrics(Collector):
    """What to register with an endpoint, in `registry`. ask: sends each process the request for its metrics.

    ask is called with a number, which comes back with the answers, and returns the names of the processes asked.
    """

    def __init__(self, ask: Callable[[int], Iterable[str]]) -> None:
        self._ask = ask
        self._asking = threading.Lock()
        self._changed = threading.Condition()
        self._number = 0
        self._living: set[str] = set()
        self._latest: dict[str, tuple[int, list[Metric]]] = {}
        """By process: which question its newest answer answers, and the answer."""
        self._ended: dict[str, _Samples] = {}
        """Of processes that ended: what counts up, by family."""
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.frontend_restarts = Counter(
            "expertd_frontend_restarts", "Front-end processes started again.", registry=self.registry
        )
        self.engine_hangs = engine_hangs(self.registry)
        self.engine_restarts = Counter(
            "expertd_engine_restarts", "Times that the engine's process was started again.", registry=self.registry
        )

    def started(self, process: str) -> None:
        """A process is there, and can be asked."""
        with self._changed:
            self._living.add(process)

    def received(self, process: str, number: int, families: list[Metric]) -> None:
        """A process' answer."""
        with self._changed:
            self._latest[process] = number, families
            self._changed.notify_all()

    def ended(self, process: str) -> None:
        """A process is gone."""
        with self._changed:
            self._living.discard(process)
            _, families = self._latest.pop(process, (0, []))
            for family in families:
                if family.type != "gauge":
                    _add(self._ended.setdefault(family.name, {}), family)
            self._changed.notify_all()

    def collect(self) -> Iterable[Metric]:
        """The sums; called by Prometheus' client."""
        with self._asking:
            self._number += 1
            number = self._number
            asked = set(self._ask(number))
            with self._changed:
                self._changed.wait_for(lambda: self._has_answered(asked, number), _TIMEOUT_S)
                return self._sum()

    def describe(self) -> Iterable[Metric]:
        """Nothing: the processes know, and must not be asked while the registry is made."""
        return []

    def _has_answered(self, asked: set[str], number: int) -> bool:
        return all(self._latest.get(process, (0,))[0] >= number for process in asked & self._living)

    def _sum(self) -> list[Metric]:
        sums: dict[str, tuple[Metric, _Samples]] = {}
        for _, families in self._latest.values():
            for family in families:
                if family.name not in sums:
                    sums[family.name] = family, dict(self._ended.get(family.name, {}))
                _add(sums[family.name][1], family)
        result = []
        for family, samples in sums.values():
            total = Metric(family.name, family.documentation, family.type, family.unit)
            for (name, labels), value in samples.items():
                total.add_sample(name, dict(labels), value)
            result.append(total)
        return result


def engine_hangs(registry: CollectorRegistry) -> Counter:
    """What an engine that hangs cannot be asked for: counted by whoever ends it."""
    return Counter(
        "expertd_engine_hangs",
        "Times that a batch did not end, or the engine said nothing, within engine_hang_timeout_s.",
        registry=registry,
    )


def _add(samples: _Samples, family: Metric) -> None:
    for sample in family.samples:
        key = sample.name, tuple(sample.labels.items())
        if sample.name.endswith("_created"):  # a time: the sum was begun when the first was
            samples[key] = min(sample.value, samples.get(key, sample.value))
        else:
            samples[key] = samples.get(key, 0.0) + sample.value
