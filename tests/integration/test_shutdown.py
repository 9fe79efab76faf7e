"""The end of a server: what is in flight is finished, nothing new is taken, the process leaves within its grace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import (
    LAYER,
    PATIENCE_S,
    SteeredBackend,
    answer_of,
    failure_of,
    insecure_channel,
    request,
    running,
    stream_failure_of,
    tiny_layers,
)

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server.cli import main
from expertd_server.config import Config
from expertd_server.server import Server

SEED = 20261123

SERVE = (sys.executable, "-m", "expertd_server", "serve", "--device", "cpu")


class TestDrain:
    def test_what_is_in_flight_is_finished_and_nothing_new_taken(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with running(backend) as live:
            asked = [request(chance, tokens) for tokens in (1, 2, 3)]
            held = threading.Event()

            def messages() -> Iterator[pb.ForwardStreamRequest]:
                yield pb.ForwardStreamRequest(id=0, request=asked[0])
                held.wait(PATIENCE_S)  # the stream stays open

            stream = live.stub.ForwardStream(messages())
            backend.wait_started()
            unary = [live.stub.Forward.future(one) for one in asked[1:]]
            poll(lambda: live.server.engine.batcher.queue_requests == 2)
            watch = health_pb2_grpc.HealthStub(live.channel).Watch(health_pb2.HealthCheckRequest(service=LAYER))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING

            outcome: list[bool] = []
            stopper = threading.Thread(target=lambda: outcome.append(live.server.shutdown()))
            stopper.start()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            poll(lambda: live.stub.GetServerInfo(pb.GetServerInfoRequest()).draining)
            poll(lambda: refused(live, asked[0]))
            assert stopper.is_alive(), "it waits for what is in flight"
            live_check = health_pb2.HealthCheckRequest(service="live")
            status = health_pb2_grpc.HealthStub(live.channel).Check(live_check, timeout=PATIENCE_S).status
            assert status == health_pb2.HealthCheckResponse.SERVING, "a server that drains is not to be killed"

            backend.gate.set()
            assert [future.result(PATIENCE_S).output.shape[0] for future in unary] == [2, 3]
            assert next(stream).response.output.shape[0] == 1
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert failure_of(caught.value).reason == "NOT_SERVING"
            held.set()
            stopper.join(PATIENCE_S)
            assert outcome == [True]
            assert backend.batches == [1, 5]

    def test_drain_under_load_loses_no_answer(self) -> None:
        """Every request that was sent gets its exact answer or a refusal that says to go elsewhere."""
        chance = np.random.default_rng(SEED)
        asked = [request(chance, int(chance.integers(1, 33))) for _ in range(8)]
        outcomes: list[str] = []
        lock = threading.Lock()
        with running() as live:
            lone = [answer_of(live.stub.Forward(one)) for one in asked]
            under_way = threading.Semaphore(0)

            def client(number: int) -> None:
                with insecure_channel(live.server.port) as channel:
                    stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                    for n in range(100_000):
                        which = (number + n) % len(asked)
                        try:
                            exact = answer_of(stub.Forward(asked[which], timeout=PATIENCE_S)) == lone[which]
                            outcome = "exact" if exact else f"wrong: seed {SEED} request {which}"
                        except grpc.RpcError as error:
                            outcome = error.code().name
                        with lock:
                            outcomes.append(outcome)
                        if n == 10:
                            under_way.release()
                        if outcome != "exact":
                            return

            threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for _ in threads:
                assert under_way.acquire(timeout=PATIENCE_S)
            assert live.server.shutdown()
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
        # gRPC resets calls that arrive in the moment it stops listening, which their callers see as CANCELLED.
        assert {"exact"} < set(outcomes) <= {"exact", "UNAVAILABLE", "CANCELLED"}, set(outcomes)

    def test_a_batch_that_never_ends_does_not_outlast_the_grace(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with running(backend, shutdown_grace_s=0.2) as live:
            stuck = live.stub.Forward.future(request(chance, 1))
            backend.wait_started()
            waiting = live.stub.Forward.future(request(chance, 1))
            poll(lambda: live.server.engine.batcher.queue_requests == 1)
            assert live.server.shutdown() is False
            for future in (stuck, waiting):
                with pytest.raises(grpc.RpcError) as caught:
                    future.result(PATIENCE_S)
                assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    def test_stop_during_loading_ends_it(self) -> None:
        backend = SteeredBackend()

        def layers() -> Iterator[Any]:
            yield tiny_layers(backend)[0]
            server.stop()
            yield tiny_layers(backend)[1]
            raise AssertionError("loading went on")

        server = Server(Config(port=0), backend=backend, layers=layers())
        try:
            assert server.startup() is False
        finally:
            assert server.shutdown()

    def test_a_stream_that_opens_late_is_closed_too(self) -> None:
        """Between the begin of the drain and the end of the server a stream may still open; it is told to go."""
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with running(backend) as live:
            unary = live.stub.Forward.future(request(chance, 1))
            backend.wait_started()
            stopper = threading.Thread(target=live.server.shutdown)
            stopper.start()
            poll(lambda: live.stub.GetServerInfo(pb.GetServerInfoRequest()).draining)
            silent = (
                message for message in iter(lambda: backend.gate.wait(PATIENCE_S), True)
            )  # open, with nothing to say
            with pytest.raises(grpc.RpcError) as caught:
                next(live.stub.ForwardStream(silent, timeout=PATIENCE_S))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            backend.gate.set()
            unary.result(PATIENCE_S)
            stopper.join(PATIENCE_S)
            assert not stopper.is_alive()


class TestProcess:
    """`expertd-server serve` as a process of its own."""

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_with_exit_code_0(self, tmp_path: Path, signum: signal.Signals) -> None:
        with Process(tmp_path) as process:
            facts = process.wait_ready()
            with insecure_channel(facts["port"]) as channel:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
                assert info.instance_id == facts["instance_id"]
                answers = stub.ForwardStream(iter_forever())
                answer = next(answers)
                assert stream_failure_of(answer.error).reason == "LAYER_NOT_FOUND"
                process.popen.send_signal(signum)
                with pytest.raises(grpc.RpcError) as caught:
                    next(answers)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE, "an idle stream does not hold up the end"
            assert process.popen.wait(PATIENCE_S) == 0
            assert json.loads(process.output()) == facts
            assert not process.ready_file.exists()
            assert "stopped" in process.errors()
            assert "Traceback" not in process.errors()

    def test_a_long_batch_does_not_outlast_the_grace(self, tmp_path: Path) -> None:
        """Its pieces are queued in a pool whose threads Python would wait for."""
        slow = "TorchBackend.forward = lambda *_, **__: run_all(begin, [0.5] * 1000, by_workers=True)"
        with slow_process(tmp_path, slow, "--shutdown-grace-s", "0.5") as process:
            facts = process.wait_ready()
            with insecure_channel(facts["port"]) as channel:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                future = stub.Forward.future(request(np.random.default_rng(SEED), 1))
                poll(lambda: "begun" in process.output())
                process.popen.send_signal(signal.SIGTERM)
                assert process.popen.wait(PATIENCE_S) == 3, process.errors()
                with pytest.raises(grpc.RpcError) as caught:
                    future.result(PATIENCE_S)
                assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert "stopped after 0.5 s, with requests still in flight" in process.errors()
            assert not process.ready_file.exists()

    def test_an_order_to_load_does_not_hold_up_the_end(self, tmp_path: Path) -> None:
        slow = """
prepare = TorchBackend.prepare

def slow_prepare(*given, **options):
    if threading.current_thread().name.startswith("expertd-admin"):
        begin()
    return prepare(*given, **options)

TorchBackend.prepare = slow_prepare
"""
        with slow_process(tmp_path, slow, "--admin", "--admin-port", "0") as process:
            facts = process.wait_ready()
            with expertd.AdminClient(f"127.0.0.1:{facts['admin_port']}") as admin, ThreadPoolExecutor(1) as pool:
                order = pool.submit(admin.load_layer, LAYER, 2, synthetic="tiny", timeout_s=PATIENCE_S)
                poll(lambda: "begun" in process.output())
                process.popen.send_signal(signal.SIGTERM)
                assert process.popen.wait(PATIENCE_S) == 0, process.errors()
                assert isinstance(order.exception(PATIENCE_S), expertd.ExpertdError)

    def test_loading_does_not_outlast_the_grace(self, tmp_path: Path) -> None:
        slow = "TorchBackend.prepare = lambda *_, **__: begin()"
        with slow_process(tmp_path, slow, "--shutdown-grace-s", "0.5") as process:
            poll(lambda: "begun" in process.output())
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(PATIENCE_S) == 3, process.errors()

    def test_a_frozen_one_accepts_connections_and_is_not_live(self, tmp_path: Path) -> None:
        with Process(tmp_path) as process:
            port = process.wait_ready()["port"]
            health = ["health", "--target", f"127.0.0.1:{port}", "--service", "live", "--timeout-s"]
            assert main([*health, str(PATIENCE_S)]) == 0
            os.kill(process.popen.pid, signal.SIGSTOP)
            try:
                with socket.create_connection(("127.0.0.1", port), PATIENCE_S):
                    assert main([*health, "1"]) == 1
            finally:
                os.kill(process.popen.pid, signal.SIGCONT)
            assert main([*health, str(PATIENCE_S)]) == 0

    def test_a_second_signal_ends_it_at_once(self, tmp_path: Path) -> None:
        """Where one signal alone ends it with exit code 0."""
        with Process(tmp_path, "--shutdown-grace-s", "600") as process:
            facts = process.wait_ready()
            assert facts["pid"] == process.popen.pid
            os.kill(process.popen.pid, signal.SIGSTOP)  # so that both are pending when it goes on
            process.popen.send_signal(signal.SIGTERM)
            process.popen.send_signal(signal.SIGINT)
            os.kill(process.popen.pid, signal.SIGCONT)
            assert process.popen.wait(PATIENCE_S) in (128 + signal.SIGINT, 128 + signal.SIGTERM)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ((), "nothing to serve"),
            (("--synthetic", "no-such-model"), "no-such-model"),
            (("--checkpoint", "/no/such/checkpoint"), "/no/such"),
            (("--synthetic", "tiny", "--port", "99999"), "port"),
            (("--synthetic", "tiny", "--memory-budget-bytes", "1000"), "memory_budget_bytes"),
            (("--synthetic", "tiny", "--tls-cert-file", "/nowhere"), "tls_key_file"),
            (("--synthetic", "tiny", "--ready-file", "/no/such/directory/ready.json"), "ready_file"),
            (("--synthetic", "tiny", "--device", "gpu"), "device"),
            (("--synthetic", "tiny", "--device", "cuda:99"), "cuda:99"),
        ],
    )
    def test_what_cannot_be_served_is_one_clear_line_and_exit_code_2(
        self, tmp_path: Path, arguments: tuple[str, ...], says: str
    ) -> None:
        port = () if "--port" in arguments else ("--port", "0")
        result = subprocess.run(
            [*SERVE, "--log-level", "error", *port, *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("expertd-server: ")
        assert says in lines[0]
        assert result.stdout == ""

    def test_a_port_in_use_is_said_before_anything_is_loaded(self, tmp_path: Path) -> None:
        with running() as live:
            result = subprocess.run(
                [*SERVE, "--synthetic", "tiny", "--port", str(live.server.port)],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        assert result.returncode == 2
        assert f"cannot listen on 127.0.0.1:{live.server.port}" in result.stderr
        assert "layer synthetic" not in result.stderr


class Process:
    """A server process, killed at the end if it still lives."""

    def __init__(self, directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.ready_file = directory / "ready.json"
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        command = [*SERVE, "--synthetic", "tiny", "--port", "0", "--ready-file", str(self.ready_file), *arguments]
        with self._stdout.open("w") as out, self._stderr.open("w") as err:
            self.popen = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | (environment or {}))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(PATIENCE_S)

    def wait_ready(self) -> dict[str, Any]:
        poll(lambda: self.ready_file.exists() or self.popen.poll() is not None)
        assert self.popen.poll() is None, self.errors()
        facts: dict[str, Any] = json.loads(self.ready_file.read_text())
        return facts

    def output(self) -> str:
        return self._stdout.read_text()

    def errors(self) -> str:
        return self._stderr.read_text()


# Imported by every Python process that finds it. What is begun says so, and takes longer than anybody here waits.
SLOW_BACKEND = """
import threading, time
from expertd_server.backend_cpu import TorchBackend
from expertd_server.workers import run_all

def begin(seconds=600):
    print("begun", flush=True)
    time.sleep(seconds)
"""


def slow_process(directory: Path, slow: str, *arguments: str) -> Process:
    """A server of which something is slow. slow: lines of Python that see to it."""
    (directory / "sitecustomize.py").write_text(SLOW_BACKEND + slow)
    environment = {"PYTHONPATH": str(directory), "OMP_NUM_THREADS": "2"}
    return Process(directory, *arguments, environment=environment)


def iter_forever() -> Iterator[pb.ForwardStreamRequest]:
    """One request, and then a stream that stays open."""
    yield pb.ForwardStreamRequest(id=1, request=pb.ForwardRequest(layer="nowhere"))
    threading.Event().wait(PATIENCE_S)


def refused(live: Any, asked: pb.ForwardRequest) -> bool:
    """Whether a new request is told to go elsewhere."""
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Forward(asked)
    failure = failure_of(caught.value)
    assert failure.code == grpc.StatusCode.UNAVAILABLE
    return failure.reason == "NOT_SERVING"


def poll(condition: Any) -> None:
    """Wait for what no event tells."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail(f"not so within {PATIENCE_S} s")
