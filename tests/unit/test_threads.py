"""Threads that do not end when they are told to: nobody waits for them for long."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from expertd_server import threads
from expertd_server.gate import EngineGate
from expertd_server.layer import MoELayer
from expertd_server.metrics_endpoint import MetricsEndpoint
from expertd_server.region_door import RegionDoor
from expertd_server.store import LayerStore
from expertd_server.threads import ended

PATIENCE_S = 30.0


class Stuck:
    """What a thread may be called with that is not to come back before the end of the test."""

    def __init__(self) -> None:
        self.has_begun, self.is_over = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.has_begun.set()
        assert self.is_over.wait(PATIENCE_S)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setattr(threads, "_END_S", 0.1)
    made = Stuck()
    yield made
    made.is_over.set()


def test_one_that_ends_and_one_that_was_never_started(caplog: pytest.LogCaptureFixture) -> None:
    thread = threading.Thread(target=lambda: None)
    assert ended(thread)
    thread.start()
    assert ended(thread)
    assert caplog.messages == []


def close_leaving(name: str, close: Callable[[], object], stuck: Stuck, caplog: pytest.LogCaptureFixture) -> None:
    """Close something whose thread is stuck; then let it go on, and wait for its end."""
    assert stuck.has_begun.wait(PATIENCE_S)
    close()
    left = [thread for thread in threading.enumerate() if thread.name == name]
    assert [f"thread {name} has not ended after 0.1 s, and is left behind"] == caplog.messages
    stuck.is_over.set()
    for thread in left:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_the_region_door(stuck: Stuck, caplog: pytest.LogCaptureFixture) -> None:
    door = RegionDoor()
    door.forget(b"", stuck)
    close_leaving("expertd-region-door", door.close, stuck, caplog)


def test_the_gate(stuck: Stuck, caplog: pytest.LogCaptureFixture) -> None:
    store: LayerStore[MoELayer] = LayerStore()
    mailbox, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mailbox, other:
        gate = EngineGate(
            cast("Any", SimpleNamespace(hurry=lambda: None)), store, mailbox, backend="cpu", device="a CPU"
        )
        gate.soon(stuck)
        gate.start()
        close_leaving("expertd-gate", gate.close, stuck, caplog)
        gate.close()  # what it could not take from the thread


def test_the_metrics(stuck: Stuck, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = MetricsEndpoint(CollectorRegistry(), "127.0.0.1", 0)
    monkeypatch.setattr(endpoint._server, "service_actions", stuck)
    close_leaving("expertd-metrics-close", endpoint.close, stuck, caplog)
