"""What an error leaves behind: nothing. A cycle through its traceback would keep arrays until Python looks for cycles,
and with them memory that is shared with a server.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from cases import make_case, make_spec
from fake_service import MAX_TOKENS, FakeServer, H, RefusedError
from sdk_cases import Connect, tokens
from tier import GatedBackend, address, inputs, start, stopping

import expertd
from expertd import ForwardRequest
from expertd.v1 import expertd_pb2 as pb
from expertd_server.types import RoutingMethod

PATIENCE_S = 10.0
SEED = 20261126

Way = Callable[[FakeServer], dict[str, Any]]
References: TypeAlias = list[weakref.ref[Any]]


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refuse(code: grpc.StatusCode) -> Callable[[pb.ForwardRequest], None]:
    def hook(_: pb.ForwardRequest) -> None:
        raise RefusedError(code, "no")

    return hook


def refused(server: FakeServer, count: int = 3) -> dict[str, Any]:
    server.service.hook = refuse(grpc.StatusCode.INVALID_ARGUMENT)
    hidden, logits = tokens(count)
    return {"layer": "a", "hidden_states": hidden, "routing_logits": logits}


def refused_in_parts(server: FakeServer) -> dict[str, Any]:
    return refused(server, 3 * MAX_TOKENS)


def refused_each_time(server: FakeServer) -> dict[str, Any]:
    arguments = refused(server)
    server.service.hook = refuse(grpc.StatusCode.UNAVAILABLE)
    return arguments


def unknown(server: FakeServer) -> dict[str, Any]:
    return refused(server) | {"layer": "nobody's"}


def wrong_here(server: FakeServer) -> dict[str, Any]:
    return refused(server) | {"hidden_states": np.zeros((3, H), np.int64)}


def wrong_for_the_layer(server: FakeServer) -> dict[str, Any]:
    return refused(server) | {"hidden_states": np.zeros((3, H + 1), np.float32)}


def late(server: FakeServer) -> dict[str, Any]:
    is_over = threading.Event()
    arguments = refused(server) | {"timeout_s": 0.2}
    server.service.hook = lambda _: is_over.wait(0.5) and None
    return arguments


def odd_answer(server: FakeServer) -> dict[str, Any]:
    arguments = refused(server) | {"weights_version": 1}

    def hook(request: pb.ForwardRequest) -> None:
        request.weights_version = 2  # not what was asked for

    server.service.hook = hook
    return arguments


WAYS = [refused, refused_in_parts, refused_each_time, unknown, wrong_here, wrong_for_the_layer, late, odd_answer]


def assert_gone(references: References) -> None:
    # A thread of gRPC may be about to let go of what it has just delivered.
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.02)):
        if all(reference() is None for reference in references):
            return
        pause.wait(0.02)
    kept = [reference() for reference in references]
    pytest.fail(f"kept: {kept}, by {[gc.get_referrers(one) for one in kept if one is not None]}")


# NOTE: below, an error is let go of in the frame that caught it, and an asynchronous one within the event loop: every
# frame above, of the test or of asyncio's runner, would be part of a cycle.


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_error_and_its_arrays_are_let_go(connect: Connect, server: FakeServer, way: Way) -> None:
    driver = connect(timeout_s=2.0)
    client = driver.client

    def fail() -> References:
        arguments = way(server)
        try:
            client.forward(**arguments)
        except expertd.ExpertdError as error:
            return [weakref.ref(error), weakref.ref(arguments["hidden_states"])]
        raise AssertionError("it did not fail")

    async def fail_async() -> References:
        arguments = way(server)
        try:
            await client.forward(**arguments)
        except expertd.ExpertdError as error:
            return [weakref.ref(error), weakref.ref(arguments["hidden_states"])]
        raise AssertionError("it did not fail")

    assert_gone(driver.run(fail_async()) if isinstance(client, expertd.AsyncClient) else fail())


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_errors_of_many_requests_are_let_go(connect: Connect, server: FakeServer, return_exceptions: bool) -> None:
    driver = connect()
    client = driver.client

    def requests() -> tuple[list[ForwardRequest[Any]], References]:
        asked = [ForwardRequest(**refused(server)) for _ in range(3)]
        return asked, [weakref.ref(one.hidden_states) for one in asked]

    def fail() -> References:
        asked, references = requests()
        try:
            for error in client.forward_many(asked, return_exceptions=return_exceptions):
                references.append(weakref.ref(error))
                del error
        except expertd.ExpertdError as error:
            references.append(weakref.ref(error))
        return references

    async def fail_async() -> References:
        asked, references = requests()
        try:
            async for error in client.forward_many(asked, return_exceptions=return_exceptions):
                references.append(weakref.ref(error))
                del error
        except expertd.ExpertdError as error:
            references.append(weakref.ref(error))
        return references

    references = driver.run(fail_async()) if isinstance(client, expertd.AsyncClient) else fail()
    assert len(references) == 3 + (3 if return_exceptions else 1)
    assert_gone(references)


def fail_on_purpose(*_: object) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("fault", ["backend", "request", "layer"])
@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_errors_of_a_group_are_let_go(flavour: str, fault: str) -> None:
    case = make_case(make_spec(routing_method=RoutingMethod.RENORMALIZE), 5, SEED)
    tier_server = start({"a": case}, backend=GatedBackend(fail_on_purpose))
    config = expertd.GroupConfig(no_replica_timeout_s=0.5)

    def arguments() -> dict[str, Any]:
        hidden, logits = inputs(case)
        hidden = hidden.copy() if fault != "request" else np.zeros((3, 3), np.float32)
        return {"layer": "b" if fault == "layer" else "a", "hidden_states": hidden, "routing_logits": logits}

    def fail(group: expertd.ExpertGroup) -> References:
        given = arguments()
        try:
            group.forward(**given)
        except expertd.ExpertdError as error:
            return [weakref.ref(error), weakref.ref(given["hidden_states"])]
        raise AssertionError("it did not fail")

    async def fail_async(group: expertd.AsyncExpertGroup) -> References:
        given = arguments()
        try:
            await group.forward(**given)
        except expertd.ExpertdError as error:
            return [weakref.ref(error), weakref.ref(given["hidden_states"])]
        raise AssertionError("it did not fail")

    with stopping(tier_server):
        if flavour == "sync":
            with expertd.ExpertGroup([address(tier_server)], config) as group:
                assert_gone(fail(group))
        else:
            with asyncio.Runner() as runner:
                async_group = expertd.AsyncExpertGroup([address(tier_server)], config)
                references = runner.run(fail_async(async_group))
                assert_gone(references)
                runner.run(async_group.close())
