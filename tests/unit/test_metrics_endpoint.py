"""The metrics' port: an answer for who asks, and no thread for good for who does not."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from expertd_server import metrics_endpoint as module
from expertd_server.metrics_endpoint import MetricsEndpoint

PATIENCE_S = 30.0


def test_who_connects_and_says_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module._Handler, "timeout", 0.05)
    registry = CollectorRegistry()
    Counter("things", "What is counted.", registry=registry)
    endpoint = MetricsEndpoint(registry, "127.0.0.1", 0)
    try:
        for said in (b"", b"GET /metrics"):
            with socket.create_connection(("127.0.0.1", endpoint.port), PATIENCE_S) as silent:
                silent.sendall(said)
                assert silent.recv(1) == b"", "it hung up"
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=PATIENCE_S) as response:
            assert b"things_total 0.0" in response.read()
    finally:
        endpoint.close()
    assert capfd.readouterr() == ("", ""), "nobody is told of it"
