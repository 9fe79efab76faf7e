"""A late histogram against Prometheus' own, which counts at once."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import Metric

from expertd_server.histograms import LateHistogram

BUCKETS = (0.5, 1, 2.5, 10)


def samples(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families: list[Metric] = list(registry.collect())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 2000])
def test_it_counts_as_prometheus_does(count: int) -> None:
    chance = random.Random(count)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    late = LateHistogram("x", "y", label="phase", values=("a", "b"), buckets=BUCKETS, registry=ours)
    plain = LateHistogram("n", "y", buckets=BUCKETS, registry=ours)
    by_phase = Histogram("x", "y", ["phase"], buckets=BUCKETS, registry=theirs)
    alone = Histogram("n", "y", buckets=BUCKETS, registry=theirs)
    by_phase.labels("a"), by_phase.labels("b")
    for _ in range(count):
        a, b, n = (chance.choice([0, 0.5, 1, 1.25, 2.5, 3, 10, 11, 1000]) for _ in range(3))
        late.observe(a, b)
        plain.observe(n)
        by_phase.labels("a").observe(a)
        by_phase.labels("b").observe(b)
        alone.observe(n)
    assert samples(ours) == samples(theirs)
    assert samples(ours) == samples(theirs), "asking changes nothing"


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    LateHistogram("x", "y", buckets=BUCKETS, registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram("x", "y", registry=registry)
