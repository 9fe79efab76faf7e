"""Answers through every client and transport: exact, in order, in as many parts as the server asks for."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from fake_service import BFLOAT16, MAX_TOKENS, E, FakeServer, H, K, RefusedError, expert_rows, is_local, route
from sdk_cases import Connect, check_answers, expected_output, requests_of, tokens

import expertd
from expertd import ForwardRequest
from expertd.v1 import expertd_pb2 as pb


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


def test_results_do_not_wait_for_requests_of_an_async_source(server: FakeServer) -> None:
    """Each request is made when the result before is there; then the source fails, or its reader leaves."""
    requests = requests_of([1, 2, 3])
    tasks: list[set[asyncio.Task[Any]]] = []

    async def scenario(leaves_after: int) -> list[Any]:
        seen, results = asyncio.Semaphore(1), []

        async def source() -> AsyncIterator[ForwardRequest[np.ndarray[Any, Any]]]:
            for request in requests:
                await seen.acquire()
                yield request
            raise RuntimeError("nothing more to ask")

        async with expertd.AsyncClient(expertd.ClientConfig(server.target)) as client:
            many = client.forward_many(source())
            try:
                async for result in many:
                    results.append(result)
                    seen.release()
                    if len(results) == leaves_after:
                        break
            except RuntimeError as error:
                results.append(str(error))
            await many.aclose()  # type: ignore[attr-defined]
        tasks.append(asyncio.all_tasks() - {asyncio.current_task()})  # type: ignore[arg-type]
        return results

    results = asyncio.run(asyncio.wait_for(scenario(4), 20))
    assert results.pop() == "nothing more to ask"
    check_answers(requests, results)
    check_answers(requests[:2], asyncio.run(asyncio.wait_for(scenario(2), 20)))
    assert not any(task.get_name() == "expertd-forward-many" for left in tasks for task in left)


def test_an_async_source_is_not_asked_for_more_than_may_be_ahead(server: FakeServer) -> None:
    requests = requests_of([1] * 20)
    taken = 0

    async def source() -> AsyncIterator[ForwardRequest[np.ndarray[Any, Any]]]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    async def scenario() -> list[Any]:
        results = []
        async with expertd.AsyncClient(expertd.ClientConfig(server.target, max_in_flight=4)) as client:
            async for result in client.forward_many(source()):
                results.append(result)
                await asyncio.sleep(0.005)
                assert taken <= len(results) + 4, f"{taken} requests taken after {len(results)} results"
        return results

    check_answers(requests, asyncio.run(scenario()))
