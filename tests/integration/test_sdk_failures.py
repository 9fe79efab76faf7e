"""A server that refuses, breaks off, is late or away: what is retried, and what the caller is told."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from fake_service import BrokenStreamError, FakeServer, H, RefusedError
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from sdk_cases import (
    QUICK,
    Connect,
    check_answers,
    expected_output,
    fails_at_first,
    is_stream,
    requests_of,
    tokens,
    wait,
)

import expertd
from expertd import ForwardRequest, _transport
from expertd._transport import _Stream
from expertd.v1 import expertd_pb2 as pb


def test_details_of_a_refused_reach_the_caller(connect: Connect, server: FakeServer) -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="routing_logits", description="row 0 holds NaN")
    info = error_details_pb2.ErrorInfo(reason="BAD_ROW")

    def refuse(request: pb.ForwardRequest) -> None:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "routing_logits: row 0 holds NaN", info, bad)

    server.service.hook = refuse
    hidden, logits = tokens(1)
    with pytest.raises(expertd.InvalidRequestError, match="row 0 holds NaN") as raised:
        connect().forward("a", hidden, routing_logits=logits)
    assert raised.value.violations == (expertd.FieldViolation("routing_logits", "row 0 holds NaN"),)
    assert (raised.value.reason, raised.value.code) == ("BAD_ROW", grpc.StatusCode.INVALID_ARGUMENT)
    assert len(server.service.parts) == 1, "not retried"


@pytest.mark.parametrize(
    "failure",
    [
        RefusedError(grpc.StatusCode.UNAVAILABLE, "draining"),
        RefusedError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "queue is full",
            error_details_pb2.RetryInfo(retry_delay=Duration(nanos=10_000_000)),
        ),
        BrokenStreamError(),
    ],
    ids=["unavailable", "overloaded", "broken"],
)
def test_passing_failure_is_retried(connect: Connect, server: FakeServer, failure: Exception) -> None:
    driver = connect()
    requests = requests_of([1, 2, 3, 25])
    server.service.hook = fails_at_first(3, failure)
    check_answers(requests, list(driver.forward_many(requests)))


def test_lasting_overload_is_told_with_its_delay(connect: Connect, server: FakeServer) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
    server.service.hook = fails_at_first(1000, RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry))
    hidden, logits = tokens(1)
    with pytest.raises(expertd.OverloadedError, match="full") as raised:
        connect().forward("a", hidden, routing_logits=logits)
    assert raised.value.retry_after_s == 0.001
    assert len(server.service.parts) == QUICK.max_attempts


def test_stream_that_keeps_breaking_ends_in_unavailable(connect: Connect, server: FakeServer) -> None:
    server.service.hook = fails_at_first(1000, BrokenStreamError())
    hidden, logits = tokens(1)
    driver = connect()
    with pytest.raises(expertd.UnavailableError):
        driver.forward("a", hidden, routing_logits=logits)
    server.service.hook = lambda request: None
    assert driver.forward("a", hidden, routing_logits=logits).output.shape == (1, H)


def test_unavailable_answer_moves_to_a_new_stream(server: FakeServer) -> None:
    server.service.hook = fails_at_first(1, RefusedError(grpc.StatusCode.UNAVAILABLE, "draining"))
    hidden, logits = tokens(1)
    with expertd.Client(expertd.ClientConfig(server.target, retry=QUICK)) as client:
        client.forward("a", hidden, routing_logits=logits)
        client.forward("a", hidden, routing_logits=logits)
    assert server.service.streams == 2


def test_timeout_is_the_callers_and_the_client_goes_on(connect: Connect, server: FakeServer) -> None:
    release = threading.Event()
    driver = connect(max_in_flight=1)
    hidden, logits = tokens(2)
    driver.forward("a", hidden, routing_logits=logits)
    server.service.hook = lambda request: wait(release) if request.hidden_states.shape[0] == 2 else None
    try:
        # gRPC, which has the same deadline, may be the first to say so.
        with pytest.raises(expertd.TimeoutError, match=r"0\.3 s|Deadline Exceeded"):
            driver.forward("a", hidden, routing_logits=logits, timeout_s=0.3)
        # The place of the request is free again, and its late answer must not be taken for that of the next one.
        other, other_logits = tokens(3, seed=5)
        result = driver.forward("a", other, routing_logits=other_logits, output_dtype="float32")
        assert np.array_equal(result.output, expected_output(other, other_logits))
    finally:
        release.set()
    if is_stream(driver):
        assert 0 < server.service.timeouts_ms[1] <= 300


@pytest.mark.parametrize("timeout_s", [0, float("nan"), float("inf"), 1e10])
def test_a_timeout_that_cannot_be_waited_for_is_named(connect: Connect, server: FakeServer, timeout_s: float) -> None:
    hidden, logits = tokens(1)
    driver = connect()
    for call in (
        lambda: driver.forward("a", hidden, routing_logits=logits, timeout_s=timeout_s),
        lambda: driver.wait_ready(timeout_s=timeout_s),
    ):
        with pytest.raises(expertd.InvalidRequestError, match=r"timeout_s: is .*, expected a positive number"):
            call()
    assert driver.forward("a", hidden, routing_logits=logits, timeout_s=1e9).output.shape == (1, H)
    assert server.service.parts == [1]


def test_nobody_answers(connect: Connect) -> None:
    hidden, logits = tokens(1)
    driver = connect(target="localhost:1")
    with pytest.raises(expertd.UnavailableError):
        driver.forward("a", hidden, routing_logits=logits)
    with pytest.raises(expertd.TimeoutError, match="not ready within"):
        driver.wait_ready(timeout_s=0.3)


def test_streams_that_end_at_once_are_opened_as_often_as_the_policy_says(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However soon they end: with nobody at the other end, before the request is encoded."""
    encode = _transport.encode_stream_request

    def encode_slowly(*arguments: Any) -> bytes:
        message = encode(*arguments)
        time.sleep(0.05)
        return message

    opened: list[_Stream] = []
    open_stream = _Stream.__init__

    def count(stream: _Stream, *arguments: Any) -> None:
        opened.append(stream)
        open_stream(stream, *arguments)

    hidden, logits = tokens(1)
    config = expertd.ClientConfig(server.target, transport="stream", retry=QUICK, timeout_s=10)
    with expertd.Client(config) as client:
        client.forward("a", hidden, routing_logits=logits)
        server.stop()
        monkeypatch.setattr(_transport, "encode_stream_request", encode_slowly)
        monkeypatch.setattr(_Stream, "__init__", count)
        with pytest.raises(expertd.UnavailableError):
            client.forward("a", hidden, routing_logits=logits)
    assert 1 <= len(opened) <= QUICK.max_attempts


def test_server_that_comes_back_is_found_again(connect: Connect, server: FakeServer) -> None:
    patient = expertd.RetryPolicy(max_attempts=100, initial_backoff_s=0.05, max_backoff_s=0.1)
    driver = connect(retry=patient)
    hidden, logits = tokens(4)
    driver.forward("a", hidden, routing_logits=logits)
    server.stop()
    back: list[FakeServer] = []
    starter = threading.Timer(0.5, lambda: back.append(FakeServer(server.target)))
    starter.start()
    try:
        result = driver.forward("a", hidden, routing_logits=logits, output_dtype="float32")
        assert np.array_equal(result.output, expected_output(hidden, logits))
    finally:
        starter.join()
        driver.close()
        back[0].stop()


@pytest.mark.parametrize("seed", [1, 2])
def test_storm_of_failures_never_mixes_up_answers_and_gives_every_place_back(server: FakeServer, seed: int) -> None:
    rng, lock = random.Random(seed), threading.Lock()

    def trouble(request: pb.ForwardRequest) -> None:
        with lock:
            dice = rng.random()
        if dice < 0.02:
            raise BrokenStreamError
        if dice < 0.06:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "draining")
        if dice < 0.10:
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        if dice < 0.15:
            raise RefusedError(grpc.StatusCode.INTERNAL, "lost")

    server.service.hook = trouble
    retry = expertd.RetryPolicy(max_attempts=50, initial_backoff_s=0.001, max_backoff_s=0.01)
    config = expertd.ClientConfig(server.target, retry=retry, num_channels=3, max_in_flight=5)

    def check(requests: list[ForwardRequest[Any]], results: list[Any]) -> int:
        good = [(one, two) for one, two in zip(requests, results, strict=True) if not isinstance(two, Exception)]
        bad = [result for result in results if isinstance(result, Exception)]
        assert all(type(error) is expertd.ServerError for error in bad), f"seed {seed}: {bad}"
        check_answers([one for one, _ in good], [two for _, two in good])
        return len(good)

    work = [requests_of(range(worker, worker + 25)) for worker in range(6)]
    with expertd.Client(config) as client, ThreadPoolExecutor(6) as pool:
        results = pool.map(lambda requests: list(client.forward_many(requests, return_exceptions=True)), work)
        assert sum(check(*pair) for pair in zip(work, results, strict=True)) > 50, f"seed {seed}"
        server.service.hook = lambda request: None
        assert client._slots._free == 5

    async def scenario() -> None:
        async with expertd.AsyncClient(config) as client:

            async def many(requests: list[ForwardRequest[Any]]) -> list[Any]:
                return [result async for result in client.forward_many(requests, return_exceptions=True)]

            server.service.hook = trouble
            results = await asyncio.gather(*map(many, work))
            assert sum(check(*pair) for pair in zip(work, results, strict=True)) > 50, f"seed {seed}"

    asyncio.run(scenario())
