"""A server that is still loading says so, of itself and of every layer, and refuses requests until it is done."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LAYER, OTHER_LAYER, PATIENCE_S, failure_of, insecure_channel, request, running, tiny_layers

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server import cpu_experts
from expertd_server.backend_cpu import TorchBackend
from expertd_server.config import Config
from expertd_server.engine_process import EngineProcess
from expertd_server.frontend import Frontend
from expertd_server.products import probe
from expertd_server.server import Server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SEED = 4


def poll(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@contextlib.contextmanager
def one_process(layers: Iterator[Any]) -> Iterator[tuple[Callable[[], bool], Callable[[], int]]]:
    """A server that is yet to load: what loads, and what tells its port."""
    server = Server(Config(port=0), backend=TorchBackend("cpu"), layers=layers)
    try:
        yield server.startup, lambda: server.port
    finally:
        server.shutdown()


@contextlib.contextmanager
def front_end(layers: Iterator[Any]) -> Iterator[tuple[Callable[[], bool], Callable[[], int]]]:
    """The same with the engine behind a front-end."""
    config = Config(port=0, frontends=1, max_message_bytes=2**21, frontend_arena_bytes=2**22)
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inlet, outlet, contextlib.ExitStack() as stack:
        engine = EngineProcess(config, outlet, backend=TorchBackend("cpu"), layers=layers)
        stack.callback(engine.shutdown)
        frontend = Frontend(config, "frontend-0", inlet, "an-instance")
        stack.callback(frontend.shutdown)
        port = frontend.start(0)
        yield lambda: engine.startup(lambda: False), lambda: port


@pytest.mark.parametrize("kind", [one_process, front_end])
def test_layers_are_loading_until_all_are_there(kind: Any) -> None:
    first_is_held, go_on = threading.Event(), threading.Event()

    def layers() -> Iterator[Any]:
        one, other = tiny_layers(TorchBackend("cpu"))
        yield one
        first_is_held.set()  # it is asked for the second: the first is held
        assert go_on.wait(PATIENCE_S)
        yield other

    with kind(layers()) as (load, port_of):
        loader = threading.Thread(target=load)
        loader.start()
        try:
            assert first_is_held.wait(PATIENCE_S)
            target = f"127.0.0.1:{port_of()}"
            with insecure_channel(port_of()) as channel, expertd.ExpertGroup(target) as group:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                health = health_pb2_grpc.HealthStub(channel)

                def states() -> dict[str, int]:
                    return {layer.name: layer.state for layer in stub.ListLayers(pb.ListLayersRequest()).layers}

                def status(service: str) -> int:
                    return health.Check(health_pb2.HealthCheckRequest(service=service)).status

                poll(lambda: LAYER in states())
                assert states() == {LAYER: pb.LAYER_STATE_LOADING}
                assert stub.GetLayer(pb.GetLayerRequest(layer=LAYER)).layer.state == pb.LAYER_STATE_LOADING
                assert {status(service) for service in ("", "expertd.v1.ExpertService", LAYER)} == {NOT_SERVING}
                assert status("live") == SERVING
                asked = request(np.random.default_rng(SEED), 3)
                for layer in (LAYER, OTHER_LAYER):
                    with pytest.raises(grpc.RpcError) as caught:
                        stub.Forward(request(np.random.default_rng(SEED), 3, layer))
                    failure = failure_of(caught.value)
                    assert failure.code is grpc.StatusCode.UNAVAILABLE
                    assert failure.retry_delay_s
                    assert f"'{layer}' is not loaded yet" in failure.message
                with pytest.raises(expertd.TopologyError, match="no layer is held"):
                    group.layers(timeout_s=PATIENCE_S)

                go_on.set()
                loader.join(PATIENCE_S)
                poll(lambda: status("") == SERVING)
                assert states() == {LAYER: pb.LAYER_STATE_READY, OTHER_LAYER: pb.LAYER_STATE_READY}
                assert {status(service) for service in (LAYER, OTHER_LAYER)} == {SERVING}
                assert stub.Forward(asked).weights_version == 1
                group.wait_ready(timeout_s=PATIENCE_S)
                assert {layer.name for layer in group.layers()} == {LAYER, OTHER_LAYER}
        finally:
            go_on.set()
            loader.join(PATIENCE_S)


def test_no_request_waits_for_products_to_be_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds for layers of real sizes."""
    monkeypatch.setattr(cpu_experts, "find_unit", lambda: None)
    probe.cache_clear()
    with running() as live:
        num_probed = probe.cache_info().misses
        live.stub.Forward(request(np.random.default_rng(SEED), 3), timeout=PATIENCE_S)
        assert num_probed > 0
        assert probe.cache_info().misses == num_probed
