"""A batch that never ends: who is told, and what becomes of the server. The watchdog alone: see unit/test_watchdog."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    PATIENCE_S,
    SteeredBackend,
    failure_of,
    insecure_channel,
    request,
    running,
    split,
    stream_failure_of,
)
from shared_memory import mapped_regions
from test_processes import START_S, Processes, wait_for

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc

pytestmark = pytest.mark.timeout(300)  # two engines start, one after the other, on as few as two cores
SEED = 20261126
FP8 = ml_dtypes.float8_e4m3fn
HANG_TIMEOUT_S = 1.0
REAL_HANG_TIMEOUT_S = 5.0
"""Of processes of their own: more than a good batch takes there while others have the machine."""

# Imported by every Python process that finds it: FP8 hidden states with this code hang the CPU backend.
HANGING_BACKEND = f"""
import time
from expertd_server.backend_cpu import TorchBackend
forward = TorchBackend.forward

def hang_on_poison(self, layer, hidden_states, **arguments):
    import torch
    while hidden_states.dtype == torch.float8_e4m3fn and (
        hidden_states.view(torch.uint8) == {SteeredBackend.POISON}
    ).any():
        time.sleep(1)
    return forward(self, layer, hidden_states, **arguments)

TorchBackend.forward = hang_on_poison
"""


def serving_status(channel: grpc.Channel, service: str) -> int:
    answer = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S
    )
    return int(answer.status)


def test_a_server_says_so_fails_everything_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    chance = np.random.default_rng(SEED)
    backend = SteeredBackend()
    with running(backend, engine_hang_timeout_s=HANG_TIMEOUT_S) as live:
        hanging = live.stub.Forward.future(request(chance, 3))
        backend.wait_started()
        waiting = live.stub.Forward.future(request(chance, 1))
        message = pb.ForwardStreamRequest(id=7, request=request(chance, 1))
        streamed = next(live.stub.ForwardStream(iter([message]), timeout=PATIENCE_S))
        for future in (hanging, waiting):
            with pytest.raises(grpc.RpcError) as caught:
                future.result(PATIENCE_S)
            assert failure_of(caught.value).code == grpc.StatusCode.UNAVAILABLE
            assert failure_of(caught.value).reason == "NOT_SERVING"
        assert stream_failure_of(streamed.error).code == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            live.stub.Forward(request(chance, 1), timeout=PATIENCE_S)
        assert failure_of(caught.value).code == grpc.StatusCode.UNAVAILABLE
        wait_for(lambda: serving_status(live.channel, LAYER) == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert serving_status(live.channel, "") == health_pb2.HealthCheckResponse.NOT_SERVING
        live.server.serve()  # returns
        assert live.server.has_hung
        assert live.server.metrics.registry.get_sample_value("expertd_engine_hangs_total") == 1
        assert f"layer '{LAYER}', 1 requests of 3 tokens together, no graph, not done after 1." in caplog.text
        assert "expertd-batcher: wait (threading.py:" in caplog.text
        assert live.server.shutdown() is False


def test_front_ends_fail_what_they_asked_for_and_live_on() -> None:
    chance = np.random.default_rng(SEED)
    backend = SteeredBackend()
    with split(2, backend, engine_hang_timeout_s=HANG_TIMEOUT_S) as server:
        hanging = server.stubs[0].Forward.future(request(chance, 3))
        backend.wait_started()
        waiting = server.stubs[1].Forward.future(request(chance, 3))
        for future in (hanging, waiting):
            with pytest.raises(grpc.RpcError) as caught:
                future.result(PATIENCE_S)
            failure = failure_of(caught.value)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
            assert failure.retry_delay_s is not None
        for channel in server.channels:
            wait_for(lambda one=channel: serving_status(one, "") == health_pb2.HealthCheckResponse.NOT_SERVING)  # type: ignore[misc]


@pytest.fixture
def hanging_backend(tmp_path: Path) -> dict[str, str]:
    """The environment of a server whose backend hangs on poison."""
    (tmp_path / "sitecustomize.py").write_text(HANGING_BACKEND)
    return {"PYTHONPATH": str(tmp_path)}


@contextlib.contextmanager
def failing(stub: expertd_pb2_grpc.ExpertServiceStub) -> Iterator[None]:
    """The call that hangs; it must fail with UNAVAILABLE by the end."""
    chance = np.random.default_rng(SEED)
    poisoned = request(chance, 1)
    poisoned.hidden_states.data = bytes([SteeredBackend.POISON]) * HIDDEN_SIZE
    future = stub.Forward.future(poisoned, timeout=START_S)
    yield
    with pytest.raises(grpc.RpcError) as caught:
        future.result(START_S)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


OPTIONS = ("--engine-hang-timeout-s", str(REAL_HANG_TIMEOUT_S))


def test_a_process_ends_with_exit_code_1(tmp_path: Path, hanging_backend: dict[str, str]) -> None:
    with Processes(tmp_path, *OPTIONS, "--frontends", "0", environment=hanging_backend) as server:
        with insecure_channel(server.facts()["port"]) as channel:
            stub = expertd_pb2_grpc.ExpertServiceStub(channel)
            stub.Forward(request(np.random.default_rng(SEED), 1), timeout=PATIENCE_S)
            with failing(stub):
                assert server.popen.wait(PATIENCE_S) == 1, server.errors()
        assert "the engine hangs: layer 'synthetic.tiny.0'" in server.errors()
        assert "Traceback" not in server.errors()
        assert not server.ready_file.exists()


def test_an_engine_process_is_killed_and_started_again(tmp_path: Path, hanging_backend: dict[str, str]) -> None:
    with Processes(tmp_path, *OPTIONS, "--frontends", "1", environment=hanging_backend) as server:
        before = server.facts()
        with insecure_channel(before["port"]) as channel:
            stub = expertd_pb2_grpc.ExpertServiceStub(channel)
            good = request(np.random.default_rng(SEED), 1)
            expected = stub.Forward(good, timeout=PATIENCE_S).output
            with failing(stub):
                pass
            wait_for(
                lambda: server.ready_file.exists() and server.facts()["engine_pid"] != before["engine_pid"], START_S
            )
            assert stub.Forward(good, timeout=PATIENCE_S).output == expected
        assert server.facts()["frontend_pids"] == before["frontend_pids"]
        samples = server.scrape()
        assert samples["expertd_engine_hangs_total", frozenset()] == 1
        assert samples["expertd_engine_restarts_total", frozenset()] == 1
        assert "engine is killed: the engine hangs: layer 'synthetic.tiny.0'" in server.errors()


def test_an_engine_process_that_stands_still_is_killed_and_started_again(tmp_path: Path) -> None:
    with Processes(tmp_path, *OPTIONS, "--frontends", "1") as server:
        before = server.facts()
        with insecure_channel(before["port"]) as channel:
            stub = expertd_pb2_grpc.ExpertServiceStub(channel)
            os.kill(before["engine_pid"], signal.SIGSTOP)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Forward(request(np.random.default_rng(SEED), 1), timeout=START_S)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            wait_for(
                lambda: server.ready_file.exists() and server.facts()["engine_pid"] != before["engine_pid"], START_S
            )
            stub.Forward(request(np.random.default_rng(SEED), 1), timeout=PATIENCE_S)
        assert server.scrape()["expertd_engine_hangs_total", frozenset()] == 1


def test_in_shared_memory_a_request_that_hangs_fails_when_its_engine_is_dead(
    tmp_path: Path, hanging_backend: dict[str, str]
) -> None:
    """Not before: what hangs may end after all, and write to memory that its caller uses again."""
    good, bad = (np.full((4, HIDDEN_SIZE), code, np.uint8).view(FP8) for code in (1, SteeredBackend.POISON))
    logits = np.random.default_rng(SEED).random((4, NUM_EXPERTS), np.float32)
    with Processes(tmp_path, *OPTIONS, "--frontends", "1", environment=hanging_backend) as server:
        config = expertd.ClientConfig(
            f"127.0.0.1:{server.facts()['port']}",
            transport="shm",
            timeout_s=START_S,
            retry=expertd.RetryPolicy(max_attempts=1),
        )
        with expertd.Client(config) as client:
            expected = client.forward(LAYER, good, routing_logits=logits).output.tobytes()
            wait_for(lambda: mapped_regions(server.facts()["engine_pid"]) == 1)
            with pytest.raises(expertd.UnavailableError):
                client.forward(LAYER, bad, routing_logits=logits)
            assert "engine is killed: the engine hangs" in server.errors()
            client.wait_ready()
            assert client.forward(LAYER, good, routing_logits=logits).output.tobytes() == expected
