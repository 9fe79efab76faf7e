"""What Prometheus sees, over HTTP."""

from __future__ import annotations

import time
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    LAYER,
    NUM_EXPERTS,
    OTHER_LAYER,
    PATIENCE_S,
    TOP_K,
    Running,
    SteeredBackend,
    request,
    running,
)

from expertd.v1 import expertd_pb2 as pb
from expertd_server.metrics import ExpertLoad

SEED = 20261123

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(live: Running) -> Samples:
    """Every sample by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{live.server.metrics_port}/metrics", timeout=30) as response:
        text = response.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


def test_requests_batches_and_experts_are_counted() -> None:
    chance = np.random.default_rng(SEED)
    with running(metrics_port=0, expert_token_metrics=True) as live:
        for tokens in (3, 0, 5):
            live.stub.Forward(request(chance, tokens))
        messages = [pb.ForwardStreamRequest(id=n, request=request(chance, 2)) for n in range(4)]
        messages.append(pb.ForwardStreamRequest(id=9))
        assert len(list(live.stub.ForwardStream(iter(messages)))) == 5
        for call in (live.stub.Forward, live.stub.Forward):
            with pytest.raises(grpc.RpcError):
                call(pb.ForwardRequest(layer="nowhere"))
        live.stub.ListLayers(pb.ListLayersRequest())
        assert live.server.engine.batcher.drain(30)  # so that the last batch is counted
        samples = scrape(live)

    assert at(samples, "expertd_requests_total", method="Forward", code="OK") == 3
    assert at(samples, "expertd_requests_total", method="ForwardStream", code="OK") == 4
    assert at(samples, "expertd_requests_total", method="ForwardStream", code="INVALID_ARGUMENT") == 1
    assert at(samples, "expertd_requests_total", method="Forward", code="NOT_FOUND") == 2
    assert at(samples, "expertd_requests_total", method="ListLayers", code="OK") == 1
    for phase in ("queue", "copy_in", "compute", "copy_out", "send", "total"):
        assert at(samples, "expertd_request_duration_seconds_count", phase=phase) == 7
    spent = {p: at(samples, "expertd_request_duration_seconds_sum", phase=p) for p in ("send", "total")}
    parts = ("queue", "copy_in", "compute", "copy_out", "send")
    assert spent["send"] > 0
    # The parts follow one another; each is rounded to a microsecond.
    together = sum(at(samples, "expertd_request_duration_seconds_sum", phase=part) for part in parts)
    assert together <= spent["total"] + 7 * len(parts) * 1e-6
    assert at(samples, "expertd_batch_tokens_sum") == 16
    assert at(samples, "expertd_batch_requests_sum") == 7
    assert at(samples, "expertd_in_flight_requests") == 0
    assert at(samples, "expertd_open_streams") == 0
    by_expert = [at(samples, "expertd_expert_tokens_total", layer=LAYER, expert=str(e)) for e in range(NUM_EXPERTS)]
    assert sum(by_expert) == 16 * TOP_K
    assert at(samples, "expertd_expert_imbalance_ratio", layer=LAYER) == max(by_expert) / (16 * TOP_K / NUM_EXPERTS)
    assert ("expertd_expert_imbalance_ratio", frozenset({("layer", OTHER_LAYER)})) not in samples, "no tokens, no ratio"
    assert at(samples, "expertd_layer_weights_bytes", layer=LAYER, weights_version="1") > 0
    assert {"expertd_layer_info", "expertd_backend_info", "expertd_build_info"} <= names(samples)


def test_the_queue_is_seen_while_it_waits() -> None:
    chance = np.random.default_rng(SEED)
    backend = SteeredBackend()
    with running(backend, metrics_port=0) as live:
        futures = [live.stub.Forward.future(request(chance, 1))]
        backend.wait_started()
        messages = [pb.ForwardStreamRequest(id=n, request=request(chance, 5)) for n in range(2)]
        answers = live.stub.ForwardStream(iter(messages))
        until_s = time.monotonic() + PATIENCE_S
        while live.server.engine.batcher.queue_requests < 2:
            assert time.monotonic() < until_s, "the two never waited"
            time.sleep(0.01)
        samples = scrape(live)
        backend.gate.set()
        assert len(list(answers)) == 2
        assert futures[0].result(30).output.shape[0] == 1
    assert at(samples, "expertd_queue_tokens") == 10
    assert at(samples, "expertd_queue_requests") == 2
    assert at(samples, "expertd_in_flight_requests") == 3
    assert at(samples, "expertd_open_streams") == 1


def test_what_callers_send_makes_no_time_series(live: Running) -> None:
    before = scrape(live)
    for number in range(20):
        with pytest.raises(grpc.RpcError):
            live.stub.Forward(pb.ForwardRequest(layer=f"made-up-{number}"))
        with pytest.raises(grpc.RpcError):
            live.channel.unary_unary(f"/expertd.v1.ExpertService/MadeUp{number}")(b"")
    new = set(scrape(live)) - set(before)
    assert {name for name, _ in new} <= {"expertd_requests_total", "expertd_requests_created"}
    assert len(new) <= 2, f"one for Forward's NOT_FOUND: {new}"


def test_expert_series_are_off_by_default() -> None:
    with running(metrics_port=0) as live:
        live.stub.Forward(request(np.random.default_rng(SEED), 4))
        assert "expertd_expert_tokens_total" not in names(scrape(live))


class TestExpertLoad:
    def test_only_ids_held_here_count(self) -> None:
        load = ExpertLoad(4, 3)
        load.add(np.array([[4, 6], [-1, 6], [3, 7]], np.int32))
        assert load.total() == [1, 0, 2]
        assert load.imbalance_ratio() == 2.0

    def test_the_ratio_forgets_after_a_minute_and_the_total_never(self) -> None:
        now_s = 1000.0
        load = ExpertLoad(0, 2, clock=lambda: now_s)
        assert load.imbalance_ratio() is None
        load.add(np.array([[0], [0]], np.int32))
        now_s = 1030.0
        load.add(np.array([[1], [1]], np.int32))
        assert load.imbalance_ratio() == 1.0
        now_s = 1065.0
        assert load.imbalance_ratio() == 2.0
        now_s = 2000.0
        assert load.imbalance_ratio() is None
        assert load.total() == [2, 2]
