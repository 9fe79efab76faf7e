"""A server that sends GOAWAY, because a connection is old or because it stops, fails no request of any client; and it
sends none because a connection is silent."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from cases import Case, make_case
from tier import PATIENCE_S, Load, address, start, stopping, sum_of_slices

from expertd import AsyncClient, AsyncExpertGroup, Client, ClientConfig, ExpertGroup, GroupConfig, RetryPolicy
from expertd_server.server import Server
from expertd_server.synthetic import synthetic_spec

LAYER = "layer"
CASE: Case = make_case(synthetic_spec("tiny"), 23, 20261127)
PATIENT = RetryPolicy(max_attempts=1000, max_backoff_s=0.2)
"""As often as the deadline allows: what is tried is whether anything fails, not how fast a server comes back."""

KINDS = ["auto", "stream", "unary", "group", "async stream", "async unary", "async group"]

AGING = (
    ("grpc.max_connection_age_ms", 200),
    ("grpc.max_connection_age_grace_ms", 50),  # then open streams are cut, with what is in flight on them
)
MANY_CONNECTIONS = 8  # more than any client below opens by itself

PING_S = 1.1  # just more than a server asks of its callers
SILENT_S = 6.0  # gRPC hangs up at the third ping that comes too soon


@pytest.fixture
def aging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers send GOAWAY on every connection as soon as it is a little old."""
    make = grpc.aio.server

    def make_aging(*, options: Any, **arguments: Any) -> grpc.aio.Server:
        return make(options=[*options, *AGING], **arguments)

    monkeypatch.setattr(grpc.aio, "server", make_aging)


class FromThreads:
    """An asynchronous client or group, called from threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inner: AsyncClient | AsyncExpertGroup) -> None:
        self._loop = loop
        self._inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        call = self._inner.forward(*arguments, **options)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(PATIENCE_S)


@contextlib.contextmanager
def from_threads(make: Callable[[], AsyncClient | AsyncExpertGroup]) -> Iterator[FromThreads]:
    """Made and closed in an event loop of a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="event-loop")
    thread.start()

    async def made() -> AsyncClient | AsyncExpertGroup:
        return make()

    try:
        inner = asyncio.run_coroutine_threadsafe(made(), loop).result(PATIENCE_S)
        yield FromThreads(loop, inner)
        asyncio.run_coroutine_threadsafe(inner.close(), loop).result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


@contextlib.contextmanager
def caller_of(kind: str, *servers: Server) -> Iterator[Any]:
    """What has `forward`: a client of the first server, or a group of all."""
    is_async = kind.startswith("async ")
    transport: Any = kind.removeprefix("async ")
    if transport == "group":
        addresses, config = [address(server) for server in servers], GroupConfig(no_replica_timeout_s=PATIENCE_S)
        if is_async:
            manager: Any = from_threads(lambda: AsyncExpertGroup(addresses, config))
        else:
            manager = ExpertGroup(addresses, config)
    else:
        client_config = ClientConfig(address(servers[0]), transport=transport, retry=PATIENT)
        manager = from_threads(lambda: AsyncClient(client_config)) if is_async else Client(client_config)
    with manager as caller:
        yield caller


def connections_to(server: Server) -> set[int]:
    """The callers' ports of all that are open."""
    return {
        each.raddr.port
        for each in psutil.Process().net_connections("tcp")
        if each.laddr.port == server.port and each.status == psutil.CONN_ESTABLISHED
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("aging")
def test_connections_that_end_of_age_fail_no_request(kind: str) -> None:
    num_shards = 2 if kind.endswith("group") else 1
    shards = [start({LAYER: CASE}, range(index, index + 1), of=num_shards) for index in range(num_shards)]
    with stopping(*shards), caller_of(kind, *shards) as caller, Load(caller, LAYER, CASE) as load:
        seen: set[int] = set()
        while len(seen) < MANY_CONNECTIONS:
            load.wait(3)
            seen |= connections_to(shards[0])
        load.wait(20)
        load.stop()
    assert load.failures == []
    assert len(load.outputs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_and_comes_back_on_its_port_fails_no_request(kind: str) -> None:
    server = start({LAYER: CASE})
    port = server.port
    expected = sum_of_slices(server, LAYER, CASE, [range(CASE.spec.num_experts)])
    with contextlib.ExitStack() as stack:
        caller = stack.enter_context(caller_of(kind, server))
        load = stack.enter_context(Load(caller, LAYER, CASE))
        for _ in range(3):
            load.wait(20)
            server.shutdown()
            server = start({LAYER: CASE}, port=port)
        stack.callback(server.shutdown)
        load.wait(20)
        load.stop()
    assert load.failures == []
    assert load.outputs == {expected}


def test_a_caller_whose_messages_go_through_rings_may_ping_over_its_silent_connection() -> None:
    server = start({LAYER: CASE})
    config = ClientConfig(address(server), transport="shm", keepalive_time_s=PING_S)
    with stopping(server), Client(config) as client, Load(client, LAYER, CASE) as load:
        load.wait(3)
        before = connections_to(server)
        time.sleep(SILENT_S)
        load.wait(3)
        assert connections_to(server) == before != set()
        load.stop()
    assert load.failures == []
