"""Servers for tests that do not start their own with `serving.running`: a real one, and one that fails on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fake_service import FakeServer
from sdk_cases import FLAVOURS, QUICK, Connect, Driver
from serving import Running, running, split

import expertd


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    """A server of two tiny layers on the CPU."""
    with running(metrics_port=0, expert_token_metrics=True) as server:
        yield server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server in this process that answers exactly and fails on demand."""
    running = FakeServer()
    yield running
    running.service.hook = lambda request: None
    running.stop()


@pytest.fixture(params=FLAVOURS, ids="-".join)
def connect(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Connect]:
    """Makes clients of `server`: synchronous and asynchronous, on streams and by unary calls."""
    flavour, transport = request.param
    drivers = []

    def make(**options: Any) -> Driver:
        config = {"target": server.target, "transport": transport, "timeout_s": 20.0, "retry": QUICK, **options}
        drivers.append(Driver(flavour, expertd.ClientConfig(**config)))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.shut()


@pytest.fixture(scope="module", params=["one process", "front-ends"])
def channel(request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    """To a server, or to a front-end of one."""
    if request.param == "one process":
        with running() as server:
            yield server.channel
    else:
        with split(1) as server:
            yield server.channels[0]
