"""The SDK against a server in this process that answers exactly and fails on demand.

Every case runs through the synchronous and the asynchronous client, on streams and as unary calls.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from fake_service import (
    BFLOAT16,
    MAX_TOKENS,
    BrokenStreamError,
    E,
    FakeServer,
    H,
    Hook,
    K,
    RefusedError,
    expert_rows,
    finalize,
    is_local,
    route,
)
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, OTHER_LAYER, Running, running

import expertd
from expertd import ForwardRequest
from expertd.v1 import expertd_pb2 as pb
from expertd_server.backend import MoEOutput

CERTIFICATES = Path(__file__).parent / "certs"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    running = FakeServer()
    yield running
    running.service.hook = lambda request: None
    running.stop()


class Driver:
    """One of the two clients behind one synchronous face, so that a case is written once."""

    def __init__(self, flavour: str, config: expertd.ClientConfig) -> None:
        self._runner = asyncio.Runner() if flavour == "async" else None
        self.client: Any = expertd.AsyncClient(config) if self._runner else expertd.Client(config)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.run(method(*args, **kwargs))

        return call

    def run(self, value: Any) -> Any:
        return self._runner.run(value) if self._runner is not None and asyncio.iscoroutine(value) else value

    def forward_many(self, requests: Iterable[ForwardRequest[Any]], **kwargs: Any) -> Iterator[Any]:
        results = self.client.forward_many(requests, **kwargs)
        if self._runner is None:
            yield from results
            return
        while (result := self._runner.run(_next(results))) is not StopAsyncIteration:
            yield result

    def shut(self) -> None:
        self.run(self.client.close())
        if self._runner is not None:
            self._runner.close()


async def _next(results: AsyncIterator[Any]) -> Any:
    return await anext(results, StopAsyncIteration)


FLAVOURS = [("sync", "stream"), ("sync", "unary"), ("async", "stream"), ("async", "unary")]
QUICK = expertd.RetryPolicy(max_attempts=6, initial_backoff_s=0.01, max_backoff_s=0.05)
Connect = Callable[..., Driver]


@pytest.fixture(params=FLAVOURS, ids="-".join)
def connect(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Connect]:
    flavour, transport = request.param
    drivers = []

    def make(**options: Any) -> Driver:
        config = {"target": server.target, "transport": transport, "timeout_s": 20.0, "retry": QUICK, **options}
        drivers.append(Driver(flavour, expertd.ClientConfig(**config)))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.shut()


def is_stream(driver: Driver) -> bool:
    return bool(driver.client.config.transport == "stream")


def tokens(count: int, seed: int = 0, dtype: Any = BFLOAT16) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """hidden_states [count, H] and routing_logits [count, E]."""
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 8, (count, H)).astype(dtype), rng.standard_normal((count, E)).astype(np.float32)


def expected_output(hidden: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(finalize(hidden, *route(logits)))


def requests_of(sizes: Iterable[int]) -> list[ForwardRequest[np.ndarray[Any, Any]]]:
    made = []
    for seed, size in enumerate(sizes):
        hidden, logits = tokens(size, seed)
        made.append(ForwardRequest(layer="a", hidden_states=hidden, routing_logits=logits, output_dtype="float32"))
    return made


def check_answers(requests: list[ForwardRequest[Any]], results: list[Any]) -> None:
    assert len(results) == len(requests)
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        want = expected_output(request.hidden_states, np.asarray(request.routing_logits))
        assert np.array_equal(result.output, want), f"request {index}, {len(want)} tokens"


# ---- answers


@pytest.mark.parametrize("count", [0, 1, MAX_TOKENS, MAX_TOKENS + 1, 5 * MAX_TOKENS + 3])
@pytest.mark.parametrize("dtype", [BFLOAT16, ml_dtypes.float8_e4m3fn, np.float16, np.float32], ids=lambda d: d.__name__)
def test_output_is_exact_in_one_part_or_many(connect: Connect, server: FakeServer, count: int, dtype: Any) -> None:
    hidden, logits = tokens(count, seed=count, dtype=dtype)
    result = connect().forward("a", hidden, routing_logits=logits, output_dtype=np.float32)
    assert result.output.dtype == np.float32
    assert np.array_equal(result.output, expected_output(hidden, logits)), f"{count} tokens of {dtype}"
    assert sorted(server.service.parts, reverse=True) == [
        *[MAX_TOKENS] * (count // MAX_TOKENS),
        *([count % MAX_TOKENS] if count % MAX_TOKENS or not count else []),
    ]
    assert len(result.timings) == len(server.service.parts)
    assert result.weights_version == 1
    assert result.gemm2_output is result.topk_ids is result.expert_weights is None


def test_default_output_is_bfloat16_and_routing_comes_when_asked(connect: Connect) -> None:
    hidden, logits = tokens(25)
    result = connect().forward("a", hidden, routing_logits=logits, return_routing=True)
    ids, weights = route(logits)
    assert result.output.dtype == BFLOAT16
    assert np.array_equal(result.output, expected_output(hidden, logits).astype(BFLOAT16))
    assert np.array_equal(result.topk_ids, ids)
    assert np.array_equal(result.expert_weights, weights)


def test_pre_routed_tokens(connect: Connect) -> None:
    hidden, logits = tokens(23)
    ids, weights = route(logits)
    result = connect().forward(
        "a", hidden, topk_ids=ids, topk_weights=weights.astype(np.float32), output_dtype=np.float32
    )
    assert np.array_equal(result.output, expected_output(hidden, logits))


@pytest.mark.parametrize("count", [1, 7, 33])
@pytest.mark.parametrize("return_routing", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_separate_outputs_of_all_parts_are_grouped_again(
    connect: Connect, count: int, return_routing: bool, routed: bool
) -> None:
    hidden, logits = tokens(count, seed=count)
    ids, weights = route(logits)
    routing: dict[str, Any] = {"topk_ids": ids, "topk_weights": weights} if routed else {"routing_logits": logits}
    result = connect().forward("a", hidden, **routing, do_finalize=False, return_routing=return_routing)
    assert result.output is None
    assert (result.topk_ids is not None) == return_routing
    assert np.array_equal(result.expert_weights, weights)
    index = result.expanded_idx_to_permuted_idx
    assert (index.dtype, index.shape) == (np.int32, (count * K,))
    flat = ids.reshape(-1)
    assert np.array_equal(index >= 0, is_local(flat)), f"{count} tokens"
    slots = np.flatnonzero(index >= 0)
    rows = expert_rows(hidden, ids).reshape(-1, H)
    assert np.array_equal(result.gemm2_output[index[slots]], rows[slots]), f"{count} tokens"
    assert len(set(index[slots])) == len(slots)
    by_row = flat[slots][np.argsort(index[slots])]
    assert np.array_equal(by_row, np.sort(by_row)), "rows are grouped by ascending expert"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [0, 3, 27])
def test_torch_in_torch_out(connect: Connect, dtype: torch.dtype, count: int) -> None:
    hidden, logits = tokens(count)
    mine = torch.from_numpy(hidden.astype(np.float32)).to(dtype)
    result = connect().forward(
        "a", mine, routing_logits=torch.from_numpy(logits), output_dtype=torch.float32, return_routing=True
    )
    assert isinstance(result.output, torch.Tensor)
    assert result.output.dtype == torch.float32
    assert np.array_equal(result.output.numpy(), expected_output(hidden, logits))
    assert result.expert_weights.dtype == torch.bfloat16
    assert torch.equal(result.topk_ids, torch.from_numpy(route(logits)[0]))
    output = result.output
    output += 1  # torch has no read-only tensors, so this must be the caller's own memory
    assert np.array_equal(output.numpy(), expected_output(hidden, logits) + 1)


def test_server_limit_on_message_bytes_makes_smaller_parts(connect: Connect, server: FakeServer) -> None:
    server.service.max_message_bytes = 16 * 1024 + 4 * (H * 2 + E * 4)
    hidden, logits = tokens(9)
    result = connect().forward("a", hidden, routing_logits=logits, output_dtype="float32")
    assert np.array_equal(result.output, expected_output(hidden, logits))
    assert max(server.service.parts) <= 4


def test_weights_replaced_between_parts_never_mix(connect: Connect, server: FakeServer) -> None:
    service = server.service
    asked: list[int] = []
    lock = threading.Lock()

    def replace(request: pb.ForwardRequest) -> None:
        with lock:
            asked.append(request.weights_version)
            if len(asked) == 2:
                service.version = 2

    service.hook = replace
    hidden, logits = tokens(3 * MAX_TOKENS)
    result = connect(max_in_flight=1).forward("a", hidden, routing_logits=logits, output_dtype="float32")
    assert np.array_equal(result.output, expected_output(hidden, logits))
    assert result.weights_version == 2
    assert asked == [0, 0, 0, 2]


# ---- many requests


def test_many_results_come_in_order_whatever_the_order_of_completion(connect: Connect, server: FakeServer) -> None:
    later = threading.Event()

    def first_waits(request: pb.ForwardRequest) -> None:
        if request.hidden_states.shape[0] == 1:
            assert later.wait(20)
        elif request.hidden_states.shape[0] == 5:
            later.set()

    server.service.hook = first_waits
    requests = requests_of([1, 2, 3, 4, 5, 25])
    check_answers(requests, list(connect().forward_many(iter(requests))))


def test_failure_stays_in_its_place(connect: Connect, server: FakeServer) -> None:
    def refuse(request: pb.ForwardRequest) -> None:
        if request.hidden_states.shape[0] == 3:
            raise RefusedError(grpc.StatusCode.INTERNAL, "three is too much")

    server.service.hook = refuse
    requests = requests_of([1, 2, 3, 4, 5])
    driver = connect()
    results = list(driver.forward_many(requests, return_exceptions=True))
    failed = results.pop(2)
    assert isinstance(failed, expertd.ServerError)
    assert "three is too much" in str(failed)
    check_answers([*requests[:2], *requests[3:]], results)
    many = driver.forward_many(requests)
    check_answers(requests[:2], list(itertools.islice(many, 2)))
    with pytest.raises(expertd.ServerError, match="three"):
        next(many)
    last = requests[4]
    result = driver.forward("a", last.hidden_states, routing_logits=last.routing_logits, output_dtype="float32")
    check_answers([last], [result])


def test_local_mistake_fails_alone(connect: Connect) -> None:
    requests = requests_of([1, 2, 3])
    wrong = ForwardRequest(layer="a", hidden_states=requests[0].hidden_states)
    results = list(connect().forward_many([requests[0], wrong, requests[2]], return_exceptions=True))
    assert isinstance(results.pop(1), expertd.InvalidRequestError)
    check_answers([requests[0], requests[2]], results)


def test_slow_reader_bounds_what_is_sent(connect: Connect, server: FakeServer) -> None:
    driver = connect(max_in_flight=4)
    requests = requests_of([1] * 40)
    taken = 0

    def source() -> Iterator[ForwardRequest[np.ndarray[Any, Any]]]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    results = []
    for result in driver.forward_many(source()):
        results.append(result)
        assert taken <= len(results) + 4, f"{taken} requests taken after {len(results)} results"
        assert len(server.service.parts) <= len(results) + 4
    check_answers(requests, results)


def test_many_threads_share_a_client(server: FakeServer) -> None:
    requests = requests_of(range(64))
    for transport in ("stream", "unary"):
        config = expertd.ClientConfig(server.target, transport=transport, num_channels=2, max_in_flight=6)
        with expertd.Client(config) as client, ThreadPoolExecutor(16) as pool:

            def forward(request: ForwardRequest[Any], client: expertd.Client = client) -> Any:
                return client.forward(
                    "a", request.hidden_states, routing_logits=request.routing_logits, output_dtype="float32"
                )

            check_answers(requests, list(pool.map(forward, requests)))


# ---- failures of the server


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


def fails_at_first(times: int, failure: Exception) -> Hook:
    lock = threading.Lock()
    failures = iter([failure] * times)

    def hook(request: pb.ForwardRequest) -> None:
        with lock:
            error = next(failures, None)
        if error is not None:
            raise error

    return hook


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
    server.service.hook = lambda request: _wait(release) if request.hidden_states.shape[0] == 2 else None
    try:
        with pytest.raises(expertd.TimeoutError, match=r"0\.3 s"):
            driver.forward("a", hidden, routing_logits=logits, timeout_s=0.3)
        # The place of the request is free again, and its late answer must not be taken for that of the next one.
        other, other_logits = tokens(3, seed=5)
        result = driver.forward("a", other, routing_logits=other_logits, output_dtype="float32")
        assert np.array_equal(result.output, expected_output(other, other_logits))
    finally:
        release.set()
    if is_stream(driver):
        assert 0 < server.service.timeouts_ms[1] <= 300


def _wait(event: threading.Event) -> None:
    assert event.wait(20)


def test_nobody_answers(connect: Connect) -> None:
    hidden, logits = tokens(1)
    driver = connect(target="localhost:1")
    with pytest.raises(expertd.UnavailableError):
        driver.forward("a", hidden, routing_logits=logits)
    with pytest.raises(expertd.TimeoutError, match="not ready within"):
        driver.wait_ready(timeout_s=0.3)


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


# ---- mistakes of the caller, and what is known of the server


def test_arguments_that_do_not_fit_the_layer_are_named(connect: Connect, server: FakeServer) -> None:
    driver = connect()
    hidden, logits = tokens(2)
    with pytest.raises(expertd.InvalidRequestError, match=r"hidden_states.*has 15 columns, layer 'a' expects 16"):
        driver.forward("a", hidden[:, 1:], routing_logits=logits)
    with pytest.raises(expertd.InvalidRequestError, match=r"routing_logits.*has 7 columns, layer 'a' expects 8"):
        driver.forward("a", hidden, routing_logits=logits[:, 1:])
    server.service.scale = None
    with pytest.raises(expertd.InvalidRequestError, match="hidden_states_scale"):
        connect().forward("a", hidden, routing_logits=logits)
    with pytest.raises(expertd.InvalidRequestError, match="timeout_s"):
        driver.forward("a", hidden, routing_logits=logits, timeout_s=0)
    with pytest.raises(expertd.LayerNotFoundError, match="there are a, b"):
        driver.forward("c", hidden, routing_logits=logits)
    assert server.service.parts == []


def test_layer_that_changed_is_looked_up_again(connect: Connect, server: FakeServer) -> None:
    server.service.hidden_size = H + 1
    driver = connect()
    hidden, logits = tokens(1)
    with pytest.raises(expertd.InvalidRequestError):
        driver.forward("a", hidden, routing_logits=logits)
    server.service.hidden_size = H
    assert driver.forward("a", hidden, routing_logits=logits).output.shape == (1, H)


def test_layers_and_server_info(connect: Connect, server: FakeServer) -> None:
    driver = connect()
    first, second = driver.layers()
    assert (first.name, second.name) == ("a", "b")
    assert (first.routing_method, first.activation) == (expertd.RoutingMethod.DEFAULT, expertd.Activation.SWIGLU)
    assert (first.routed_scaling_factor, first.hidden_states_scale) == (None, 1.0)
    assert np.array_equal(first.routing_bias, np.arange(E))
    assert driver.layer("b").state is expertd.LayerState.READY
    with pytest.raises(expertd.LayerNotFoundError):
        driver.layer("c")
    assert driver.server_info().max_batch_tokens == MAX_TOKENS
    before = server.service.info_calls
    hidden, logits = tokens(1)
    driver.forward("a", hidden, routing_logits=logits)
    assert server.service.info_calls == before, "what is known is not asked again"


def test_metadata_goes_with_every_call_and_request_ids_come_back(connect: Connect, server: FakeServer) -> None:
    driver = connect(metadata=(("authorization", "Bearer x"),), send_request_id=True)
    server.service.hook = fails_at_first(1, RefusedError(grpc.StatusCode.INTERNAL, "no"))
    hidden, logits = tokens(1)
    with pytest.raises(expertd.ServerError) as raised:
        driver.forward("a", hidden, routing_logits=logits)
    sent = server.service.metadata[-1]
    assert sent["authorization"] == "Bearer x"
    assert raised.value.request_id == sent["x-request-id"]


def test_wait_ready_follows_the_health_of_server_and_layer(connect: Connect, server: FakeServer) -> None:
    driver = connect()
    server.health.set("", health_pb2.HealthCheckResponse.SERVING)
    driver.wait_ready(timeout_s=10)
    with pytest.raises(expertd.TimeoutError, match=r"layer 'a' was not ready within 0\.2 s"):
        driver.wait_ready("a", timeout_s=0.2)
    server.health.set("a", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(expertd.TimeoutError, match="NOT_SERVING"):
        driver.wait_ready("a", timeout_s=0.3)
    server.health.set("a", health_pb2.HealthCheckResponse.SERVING)
    driver.wait_ready("a", timeout_s=10)


def test_message_over_the_clients_limit_says_what_to_raise(connect: Connect, server: FakeServer) -> None:
    server.service.ballast = b"x" * 70_000
    hidden, logits = tokens(1)
    with pytest.raises(expertd.MessageTooLargeError, match=r"70.*raise ClientConfig\.max_message_bytes"):
        connect(max_message_bytes=64 * 1024).forward("a", hidden, routing_logits=logits)
    assert len(server.service.parts) == 1, "not retried"


# ---- closing


def client_threads() -> set[threading.Thread]:
    """All but the executors of the fake server and of the test."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("ThreadPoolExecutor")}


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_close_fails_what_is_in_flight_and_leaves_no_thread(
    server: FakeServer, transport: Literal["stream", "unary"]
) -> None:
    before = client_threads()
    arrived, release = threading.Semaphore(0), threading.Event()

    def hang(request: pb.ForwardRequest) -> None:
        arrived.release()
        _wait(release)

    server.service.hook = hang
    client = expertd.Client(expertd.ClientConfig(server.target, transport=transport, num_channels=2, max_in_flight=2))
    hidden, logits = tokens(1)
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(client.forward, "a", hidden, routing_logits=logits) for _ in range(4)]
            assert arrived.acquire(timeout=10)
            assert arrived.acquire(timeout=10)  # two in flight, two wait for a place
            client.close()
            for call in calls:
                assert isinstance(call.exception(timeout=10), expertd.ClosedError)
    finally:
        release.set()
    assert not [thread for thread in client_threads() - before if thread.name.startswith("expertd")]
    with pytest.raises(expertd.ClosedError):
        client.forward("a", hidden, routing_logits=logits)
    client.close()  # closing twice is fine
    server.stop()
    for thread in client_threads() - before:
        thread.join(10)  # those of gRPC end on their own time
    assert client_threads() - before == set()


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_async_close_fails_what_is_in_flight_and_leaves_no_task(
    server: FakeServer, transport: Literal["stream", "unary"]
) -> None:
    release = threading.Event()
    hidden, logits = tokens(1)

    async def scenario() -> None:
        arrived = asyncio.Semaphore(0)
        loop = asyncio.get_running_loop()

        def hang(request: pb.ForwardRequest) -> None:
            loop.call_soon_threadsafe(arrived.release)
            _wait(release)

        server.service.hook = hang
        client = expertd.AsyncClient(expertd.ClientConfig(server.target, transport=transport, max_in_flight=2))
        calls = [asyncio.create_task(client.forward("a", hidden, routing_logits=logits)) for _ in range(4)]
        async with asyncio.timeout(10):
            await arrived.acquire()
            await arrived.acquire()
        await client.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [expertd.ClosedError] * 4
        with pytest.raises(expertd.ClosedError):
            await client.forward("a", hidden, routing_logits=logits)
        await client.close()
        assert [task for task in asyncio.all_tasks() if task.get_name().startswith("expertd")] == []

    try:
        asyncio.run(scenario())
    finally:
        release.set()


def test_cancelling_one_task_leaves_the_stream_to_the_others(server: FakeServer) -> None:
    release = threading.Event()
    first, first_logits = tokens(1)
    other, other_logits = tokens(2)

    async def scenario() -> None:
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hang(request: pb.ForwardRequest) -> None:
            loop.call_soon_threadsafe(arrived.set)
            _wait(release)

        async with expertd.AsyncClient(server.target) as client:
            await client.forward("a", first, routing_logits=first_logits)
            server.service.hook = hang
            doomed = asyncio.create_task(client.forward("a", first, routing_logits=first_logits))
            async with asyncio.timeout(10):
                await arrived.wait()
            survivor = asyncio.create_task(
                client.forward("a", other, routing_logits=other_logits, output_dtype="float32")
            )
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            release.set()
            assert np.array_equal((await survivor).output, expected_output(other, other_logits))
        assert server.service.streams == 1

    try:
        asyncio.run(scenario())
    finally:
        release.set()


def test_async_source_of_requests(server: FakeServer) -> None:
    requests = requests_of([1, 2, 3, 4])

    async def source() -> AsyncIterator[ForwardRequest[np.ndarray[Any, Any]]]:
        for request in requests:
            await asyncio.sleep(0)
            yield request

    async def scenario() -> list[Any]:
        async with expertd.AsyncClient(expertd.ClientConfig(server.target, max_in_flight=2)) as client:
            return [result async for result in client.forward_many(source())]

    check_answers(requests, asyncio.run(scenario()))


_NEVER_CLOSED = """
import sys
import ml_dtypes, numpy as np
import expertd
client = expertd.Client(sys.argv[1])
x = np.zeros((1, 16), dtype=ml_dtypes.bfloat16)
client.forward("a", x, routing_logits=np.zeros((1, 8), dtype=np.float32))
assert "torch" not in sys.modules
print("done")
"""


def test_program_that_never_closes_its_client_still_ends(server: FakeServer) -> None:
    program = subprocess.run(
        [sys.executable, "-c", _NEVER_CLOSED, server.target], capture_output=True, text=True, timeout=60, check=False
    )
    assert (program.returncode, program.stdout) == (0, "done\n"), program.stderr


# ---- TLS


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_mutual_tls_from_files_and_from_bytes(flavour: str) -> None:
    def pem(name: str) -> bytes:
        return (CERTIFICATES / name).read_bytes()

    credentials = grpc.ssl_server_credentials(
        [(pem("server.key"), pem("server.pem"))], root_certificates=pem("authority.pem"), require_client_auth=True
    )
    server = FakeServer(credentials=credentials)
    hidden, logits = tokens(3)
    files: dict[str, Any] = {
        "ca_file": CERTIFICATES / "authority.pem",
        "cert_file": str(CERTIFICATES / "client.pem"),
        "key_file": CERTIFICATES / "client.key",
    }
    in_memory = {"ca_pem": pem("authority.pem"), "cert_pem": pem("client.pem"), "key_pem": pem("client.key")}
    once = expertd.RetryPolicy(max_attempts=1)

    def forward(**options: Any) -> Any:
        driver = Driver(flavour, expertd.ClientConfig(server.target, retry=once, **options))
        try:
            return driver.forward("a", hidden, routing_logits=logits, output_dtype="float32", timeout_s=10)
        finally:
            driver.shut()

    try:
        for options in (files, in_memory):
            result = forward(**options)
            assert np.array_equal(result.output, expected_output(hidden, logits))
        for options in (
            {**files, "server_name": "expertd.test"},  # the certificate is for localhost
            {**files, "ca_file": CERTIFICATES / "stranger.pem"},  # another authority
            {"ca_pem": pem("authority.pem")},  # no client certificate
            {"tls": True},  # the system does not know the authority
            {},  # no TLS at all
        ):
            with pytest.raises(expertd.UnavailableError):
                forward(**options)
        assert len(server.service.parts) == 2
    finally:
        server.stop()


# ---- everything at once


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


# ---- the real server


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with running(max_batch_tokens=16) as server:
        yield server


@pytest.mark.parametrize(("flavour", "transport"), FLAVOURS)
@pytest.mark.parametrize("count", [0, 1, 16, 50])
def test_real_server_answers_like_its_operator(real: Running, flavour: str, transport: Any, count: int) -> None:
    rng = np.random.default_rng(count)
    hidden = rng.standard_normal((count, HIDDEN_SIZE), dtype=np.float32).astype(BFLOAT16)
    logits = rng.standard_normal((count, NUM_EXPERTS), dtype=np.float32)
    layer = real.server.store.get(LAYER)
    inputs = torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16), torch.from_numpy(logits)

    def operator(**options: Any) -> MoEOutput:
        return layer.backend.forward(layer.prepared, inputs[0], routing_logits=inputs[1], **options)

    driver = Driver(flavour, expertd.ClientConfig(f"localhost:{real.server.port}", transport=transport))
    try:
        driver.wait_ready(timeout_s=20)
        driver.wait_ready(LAYER, timeout_s=20)
        assert [info.name for info in driver.layers()] == [LAYER, OTHER_LAYER]
        whole = driver.forward(LAYER, inputs[0], routing_logits=inputs[1], return_routing=True)
        want = operator()
        assert want.output is not None
        assert torch.equal(whole.output, want.output), f"{count} tokens"
        assert torch.equal(whole.topk_ids, want.topk_ids), f"{count} tokens"
        assert torch.equal(whole.expert_weights, want.expert_weights), f"{count} tokens"
        assert whole.timing.batch_tokens <= 16
        separate = driver.forward(
            LAYER, hidden, topk_ids=want.topk_ids, topk_weights=want.expert_weights, do_finalize=False
        )
        index = separate.expanded_idx_to_permuted_idx
        rows = operator(do_finalize=False)
        assert rows.gemm2_output is not None
        assert rows.expanded_idx_to_permuted_idx is not None
        expected = rows.gemm2_output[rows.expanded_idx_to_permuted_idx.long()].view(torch.int16).numpy()
        assert np.array_equal(separate.gemm2_output[index].view(np.int16), expected), f"{count} tokens"
        with pytest.raises(expertd.LayerNotFoundError):
            driver.forward("nowhere", hidden, routing_logits=logits)
        with pytest.raises(expertd.VersionNotHeldError):
            driver.forward(LAYER, hidden, routing_logits=logits, weights_version=99)
        if count:
            logits[0, 0] = np.nan
            with pytest.raises(expertd.InvalidRequestError, match="routing_logits") as raised:
                driver.forward(LAYER, hidden, routing_logits=logits)
            assert raised.value.violations
    finally:
        driver.shut()
