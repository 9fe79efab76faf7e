"""A server of several processes, as `expertd-server serve --frontends N` starts it, and what happens when they die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    PATIENCE_S,
    answer_of,
    any_request,
    failure_of,
    insecure_channel,
    request,
    running,
)
from shared_memory import mapped_regions
from shared_port import skip_without_programs

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc

SEED = 20261126
NUM_FRONTENDS = 2
ARENA_BYTES = 2**22
START_S = 120.0
"""A process imports torch before it serves."""

OPTIONS = (
    *("--device", "cpu", "--synthetic", "tiny", "--synthetic-layers", "2", "--host", "127.0.0.1"),
    *("--max-message-bytes", str(2**21), "--frontend-arena-bytes", str(ARENA_BYTES)),
)


class Processes:
    """A server, ended at the end of the tests whatever state they left it in."""

    def __init__(
        self, directory: Path, *arguments: str, port: int = 0, environment: dict[str, str] | None = None
    ) -> None:
        self.ready_file, self._stdout, self._stderr = (directory / name for name in ("ready.json", "stdout", "stderr"))
        command = [sys.executable, "-m", "expertd_server", "serve", *OPTIONS, "--frontends", str(NUM_FRONTENDS)]
        command += ["--port", str(port), "--metrics-port", "0", "--ready-file", str(self.ready_file), *arguments]
        with self._stdout.open("w") as out, self._stderr.open("w") as err:
            self.popen = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | (environment or {}))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        children = psutil.Process(self.popen.pid).children() if self.popen.poll() is None else []
        for process in children:
            process.kill()
        self.popen.kill()
        self.popen.wait(PATIENCE_S)

    def facts(self) -> dict[str, Any]:
        """What the ready file says, as soon as it is there."""
        wait_for(lambda: self.ready_file.exists() or self.popen.poll() is not None, START_S)
        assert self.popen.poll() is None, self.errors()
        facts: dict[str, Any] = json.loads(self.ready_file.read_text())
        return facts

    def output(self) -> str:
        return self._stdout.read_text()

    def errors(self) -> str:
        return self._stderr.read_text()

    def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        url = f"http://127.0.0.1:{self.facts()['metrics_port']}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            families = text_string_to_metric_families(response.read().decode())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    @contextlib.contextmanager
    def stub_of(self, frontend_pid: int) -> Iterator[expertd_pb2_grpc.ExpertServiceStub]:
        """A stub whose connection this front-end has: the kernel deals them out, so ask until it is the one."""
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                channel = stack.enter_context(insecure_channel(self.facts()["port"]))
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                before = self._connections(frontend_pid)
                stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
                if self._connections(frontend_pid) > before:
                    yield stub
                    return
        pytest.fail("no connection reached the front-end")

    def _connections(self, pid: int) -> int:
        port = self.facts()["port"]
        held = psutil.Process(pid).net_connections("tcp")
        return sum(one.status == "ESTABLISHED" and one.laddr.port == port for one in held)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("server")) as processes:
        processes.facts()
        yield processes


class Clients:
    """Clients that ask one request after another, and check every answer; what each does a subclass says."""

    first_answers = 0
    """Of each client, before the test goes on."""

    def __init__(self, count: int) -> None:
        self.outcomes = [Counter[str]() for _ in range(count)]
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=pair) for pair in enumerate(self.outcomes)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_exact(self.first_answers)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def wait_exact(self, more: int, which: slice = slice(None)) -> None:
        """Wait until each client (of those) has got so many more exact answers."""
        targets = [(outcome, outcome["exact"] + more) for outcome in self.outcomes[which]]
        wait_for(lambda: all(outcome["exact"] >= target for outcome, target in targets), START_S)

    def _ask(self, client: int, outcomes: Counter[str]) -> None:
        """Until _is_over."""
        raise NotImplementedError


class Load(Clients):
    """Over connections of their own."""

    first_answers = 5

    def __init__(self, stubs: list[expertd_pb2_grpc.ExpertServiceStub], asked: list[pb.ForwardRequest]) -> None:
        with running() as one:
            self._expected = [answer_of(one.stub.Forward(request)) for request in asked]
        self._asked = asked
        self._stubs = stubs
        super().__init__(len(stubs))

    def _ask(self, client: int, outcomes: Counter[str]) -> None:
        stub, number = self._stubs[client], 0
        while not self._is_over.is_set():
            which = number % len(self._asked)
            number += 1
            try:
                is_exact = answer_of(stub.Forward(self._asked[which], timeout=PATIENCE_S)) == self._expected[which]
                outcomes["exact" if is_exact else f"wrong: seed {SEED}, request {which}"] += 1
            except grpc.RpcError as error:
                outcomes[error.code().name] += 1
                self._is_over.wait(0.02)


def requests() -> list[pb.ForwardRequest]:
    chance = np.random.default_rng(SEED)
    return [any_request(chance, int(chance.integers(1, 20))) for _ in range(16)]


class TestServing:
    def test_it_says_what_it_is(self, server: Processes) -> None:
        facts = server.facts()
        assert json.loads(server.output()) == facts
        assert facts["pid"] == server.popen.pid
        children = {child.pid for child in psutil.Process(server.popen.pid).children()}
        assert children == {facts["engine_pid"], *facts["frontend_pids"]}
        for name in ("supervisor", "engine", "frontend-0", "frontend-1"):
            assert f" INFO {name} " in server.errors()

    def test_the_supervisor_stays_small_and_the_engine_listens_nowhere(self, server: Processes) -> None:
        facts = server.facts()
        libraries = Path(f"/proc/{facts['pid']}/maps").read_text()
        assert not any(name in libraries for name in ("libtorch", "cygrpc", "numpy"))
        assert not psutil.Process(facts["engine_pid"]).net_connections("inet")

    def test_front_ends_compute_nothing_and_have_nothing_that_does(self, server: Processes) -> None:
        with contextlib.ExitStack() as stack:
            pids = server.facts()["frontend_pids"]
            for stub in [stack.enter_context(server.stub_of(pid)) for pid in pids]:
                stub.ListLayers(pb.ListLayersRequest(), timeout=PATIENCE_S)
            for pid in pids:
                assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()

    def test_every_front_end_answers_exactly_and_all_are_counted(self, server: Processes) -> None:
        before = server.scrape().get(("expertd_requests_total", frozenset({("method", "Forward"), ("code", "OK")})), 0)
        with contextlib.ExitStack() as stack:
            pids = server.facts()["frontend_pids"]
            stubs = [stack.enter_context(server.stub_of(pid)) for pid in pids]
            with Load(stubs, requests()) as load:
                load.wait_exact(16)
        assert all(set(outcome) == {"exact"} for outcome in load.outcomes), load.outcomes
        answered = sum(outcome["exact"] for outcome in load.outcomes)
        # A batch is counted when its callers have their answers.
        wait_for(lambda: server.scrape()["expertd_batch_requests_sum", frozenset()] >= answered, PATIENCE_S)
        samples = server.scrape()
        key = frozenset({("method", "Forward"), ("code", "OK")})
        assert samples["expertd_requests_total", key] == before + answered
        assert samples["expertd_in_flight_requests", frozenset()] == 0
        for name in ("expertd_frontend_restarts_total", "expertd_engine_restarts_total"):
            assert samples[name, frozenset()] == 0

    def test_nothing_grows_with_the_number_of_requests(self, server: Processes) -> None:
        facts = server.facts()
        processes = [psutil.Process(facts[name]) for name in ("pid", "engine_pid")]
        processes += [psutil.Process(pid) for pid in facts["frontend_pids"]]
        chance = np.random.default_rng(SEED)
        asked = [request(chance, 1 + n % 4) for n in range(16)]

        def some(count: int) -> None:
            for pid in facts["frontend_pids"]:
                with server.stub_of(pid) as stub:
                    messages = (pb.ForwardStreamRequest(id=n, request=asked[n % 16]) for n in range(count))
                    answers = list(stub.ForwardStream(messages, timeout=START_S))
                    assert len(answers) == count
                    assert not {answer.error.message for answer in answers if answer.HasField("error")}

        def used() -> list[tuple[int, int]]:
            return [(process.num_fds(), process.memory_info().rss) for process in processes]

        some(500)
        before = used()
        some(2000)
        after = used()
        for process, (fds, rss), (fds_now, rss_now) in zip(processes, before, after, strict=True):
            name = process.cmdline()[3:5]
            assert fds_now <= fds + 4, f"{name}: {fds} -> {fds_now} files"
            assert rss_now <= rss + 16 * 2**20, f"{name}: {rss} -> {rss_now} bytes"


class TestDeath:
    def test_of_a_front_end_harms_nobody_elses_requests(self, server: Processes) -> None:
        facts = server.facts()
        dying, living = facts["frontend_pids"]
        restarts = server.scrape()["expertd_frontend_restarts_total", frozenset()]
        with server.stub_of(dying) as one, server.stub_of(living) as other, Load([one, other], requests()) as load:
            os.kill(dying, signal.SIGSTOP)  # so that it dies with a request in hand
            load.wait_exact(20, slice(1, 2))
            os.kill(dying, signal.SIGKILL)
            load.wait_exact(20, slice(1, 2))
            load.wait_exact(5, slice(0, 1))  # over a new connection, wherever that leads
            wait_for(lambda: server.ready_file.exists() and dying not in server.facts()["frontend_pids"], START_S)
            load.wait_exact(5)
        assert set(load.outcomes[1]) == {"exact"}, load.outcomes
        assert set(load.outcomes[0]) == {"exact", "UNAVAILABLE"}, load.outcomes
        now = server.facts()
        assert now["engine_pid"] == facts["engine_pid"]
        assert now["frontend_pids"][1] == living
        with server.stub_of(now["frontend_pids"][0]) as stub:
            stub.Forward(requests()[0], timeout=PATIENCE_S)
        assert server.scrape()["expertd_frontend_restarts_total", frozenset()] == restarts + 1
        assert "frontend-0 was ended by signal 9" in server.errors()

    def test_of_the_engine_turns_readiness_off_until_the_next_one_serves(self, server: Processes) -> None:
        facts = server.facts()
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(insecure_channel(facts["port"]))
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=LAYER))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            stubs = [stack.enter_context(server.stub_of(pid)) for pid in facts["frontend_pids"]]
            load = stack.enter_context(Load(stubs, requests()))
            os.kill(facts["engine_pid"], signal.SIGKILL)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                expertd_pb2_grpc.ExpertServiceStub(channel).Forward(requests()[0], timeout=PATIENCE_S)
            failure = failure_of(caught.value)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
            assert failure.retry_delay_s is not None
            wait_for(
                lambda: server.ready_file.exists() and server.facts()["engine_pid"] != facts["engine_pid"], START_S
            )
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            load.wait_exact(5)
        assert all(set(outcome) == {"exact", "UNAVAILABLE"} for outcome in load.outcomes), load.outcomes
        assert server.facts()["frontend_pids"] == facts["frontend_pids"], "front-ends outlive the engine"
        samples = server.scrape()
        assert samples["expertd_engine_restarts_total", frozenset()] == 1
        assert samples["expertd_batch_requests_sum", frozenset()] > 0
        assert json.loads(server.output()) != server.facts(), "standard output has the first line only"

    def test_sigterm_under_load_loses_nothing(self, server: Processes) -> None:
        """The last of this server: every request gets its exact answer, or a refusal that says to go elsewhere."""
        facts = server.facts()
        children = psutil.Process(server.popen.pid).children()
        with contextlib.ExitStack() as stack:
            stubs = [stack.enter_context(server.stub_of(pid)) for pid in facts["frontend_pids"] * 2]
            load = stack.enter_context(Load(stubs, requests()))
            server.popen.send_signal(signal.SIGTERM)
            assert server.popen.wait(PATIENCE_S) == 0, server.errors()
        # gRPC resets calls that arrive in the moment it stops listening, which their callers see as CANCELLED.
        seen = {code for outcome in load.outcomes for code in outcome}
        assert {"exact"} < seen <= {"exact", "UNAVAILABLE", "CANCELLED"}, load.outcomes
        assert not server.ready_file.exists()
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in server.errors()


class SharedLoad(Clients):
    """Through memory that they share with the server."""

    first_answers = 20

    def __init__(self, port: int, count: int) -> None:
        chance = np.random.default_rng(SEED)
        hidden, logits = chance.standard_normal((16, HIDDEN_SIZE), np.float32), chance.random((16, NUM_EXPERTS), "f4")
        self._arguments: tuple[Any, ...] = (LAYER, hidden)
        self._logits = logits
        with running() as one, expertd.Client(f"127.0.0.1:{one.server.port}") as client:
            self._expected = client.forward(*self._arguments, routing_logits=logits).output.tobytes()
        self._config = expertd.ClientConfig(
            f"127.0.0.1:{port}", transport="shm", timeout_s=PATIENCE_S, retry=expertd.RetryPolicy(max_attempts=1)
        )
        super().__init__(count)

    def _ask(self, _: int, outcomes: Counter[str]) -> None:
        with expertd.Client(self._config) as client:
            while not self._is_over.is_set():
                try:
                    output = client.forward(*self._arguments, routing_logits=self._logits).output
                    outcomes["exact" if output.tobytes() == self._expected else "wrong"] += 1
                except expertd.ExpertdError as error:
                    outcomes[type(error).__name__] += 1
                    self._is_over.wait(0.02)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A server for callers that share memory with it."""
    with Processes(tmp_path_factory.mktemp("shared")) as processes:
        processes.facts()
        yield processes


class TestSharedMemory:
    """Regions of callers on this machine, which front-ends hand on to the engine."""

    def regions_of(self, server: Processes) -> tuple[int, int]:
        """Mappings by the engine, and by both front-ends together."""
        facts = server.facts()
        return mapped_regions(facts["engine_pid"]), sum(map(mapped_regions, facts["frontend_pids"]))

    def test_both_processes_map_them_and_nothing_is_left(self, shared: Processes) -> None:
        facts = shared.facts()
        processes = [psutil.Process(pid) for pid in (facts["engine_pid"], *facts["frontend_pids"])]
        with SharedLoad(facts["port"], 1):
            pass
        files = [process.num_fds() for process in processes]
        for _ in range(3):
            with SharedLoad(facts["port"], 4) as load:
                wait_for(lambda: self.regions_of(shared) == (4, 4))
            assert all(set(outcome) == {"exact"} for outcome in load.outcomes), load.outcomes
            wait_for(lambda: self.regions_of(shared) == (0, 0))
        wait_for(lambda: all(process.num_fds() <= before for process, before in zip(processes, files, strict=True)))

    def test_the_next_engine_gets_those_that_live(self, shared: Processes) -> None:
        facts = shared.facts()
        with SharedLoad(facts["port"], 4) as load:
            wait_for(lambda: self.regions_of(shared) == (4, 4))
            os.kill(facts["engine_pid"], signal.SIGKILL)
            wait_for(
                lambda: shared.ready_file.exists() and shared.facts()["engine_pid"] != facts["engine_pid"], START_S
            )
            wait_for(lambda: self.regions_of(shared) == (4, 4))
            load.wait_exact(20)
        assert all(set(outcome) == {"exact", "UnavailableError"} for outcome in load.outcomes), load.outcomes
        assert shared.facts()["frontend_pids"] == facts["frontend_pids"]
        wait_for(lambda: self.regions_of(shared) == (0, 0))

    def test_a_front_end_that_is_killed_takes_only_its_own_with_it(self, shared: Processes) -> None:
        facts = shared.facts()
        dying, living = facts["frontend_pids"]
        with SharedLoad(facts["port"], 6) as load:
            wait_for(lambda: self.regions_of(shared) == (6, 6))
            kept = mapped_regions(living)
            os.kill(dying, signal.SIGKILL)
            wait_for(lambda: shared.ready_file.exists() and dying not in shared.facts()["frontend_pids"], START_S)
            load.wait_exact(20)
            assert mapped_regions(living) >= kept
            wait_for(lambda: self.regions_of(shared) == (6, 6))
        assert all(set(outcome) <= {"exact", "UnavailableError"} for outcome in load.outcomes), load.outcomes
        assert sum(set(outcome) == {"exact"} for outcome in load.outcomes) >= kept, load.outcomes
        wait_for(lambda: self.regions_of(shared) == (0, 0))

    def test_a_client_that_is_killed_leaves_nothing(self, shared: Processes) -> None:
        facts = shared.facts()
        program = f"""
            import expertd, numpy as np
            client = expertd.Client(expertd.ClientConfig("127.0.0.1:{facts["port"]}", transport="shm"))
            hidden, logits = np.ones((16, {HIDDEN_SIZE}), np.float32), np.ones((16, {NUM_EXPERTS}), np.float32)
            while True:
                client.forward("{LAYER}", hidden, routing_logits=logits)
                print("answered", flush=True)
        """
        with SharedLoad(facts["port"], 2) as load:
            command = [sys.executable, "-c", textwrap.dedent(program)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                for _ in range(20):
                    assert client.stdout.readline() == "answered\n"
                wait_for(lambda: self.regions_of(shared) == (3, 3))
                client.kill()
            wait_for(lambda: self.regions_of(shared) == (2, 2))
            load.wait_exact(20)
        assert all(set(outcome) == {"exact"} for outcome in load.outcomes), load.outcomes
        assert "Traceback" not in shared.errors()


def test_without_restarts_the_server_ends_with_its_engine(tmp_path: Path) -> None:
    with Processes(tmp_path, "--no-engine-restart", "--frontends", "1") as server:
        facts = server.facts()
        os.kill(facts["engine_pid"], signal.SIGKILL)
        assert server.popen.wait(PATIENCE_S) == 1
        assert "engine_restart is off" in server.errors()
        assert not server.ready_file.exists()
        assert not any(psutil.pid_exists(pid) for pid in facts["frontend_pids"])


def test_a_drain_outlives_every_process_that_was_told(tmp_path: Path) -> None:
    with Processes(tmp_path, "--frontends", "1", "--admin", "--admin-port", "0") as server:
        facts = server.facts()
        with expertd.AdminClient(f"127.0.0.1:{facts['admin_port']}") as admin:
            assert admin.drain()
        told = [psutil.Process(pid) for pid in (facts["engine_pid"], *facts["frontend_pids"])]
        for process in told:
            process.kill()
        assert not psutil.wait_procs(told, PATIENCE_S)[1]

        def info() -> pb.GetServerInfoResponse:
            with insecure_channel(facts["port"]) as channel:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                try:
                    return stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
                except grpc.RpcError:  # nobody listens yet
                    return pb.GetServerInfoResponse()

        wait_for(lambda: info().draining, START_S)
        wait_for(lambda: info().backend == "cpu", START_S)  # the engine is there as well
        assert info().draining

        def refusal() -> str:
            with insecure_channel(facts["port"]) as channel, pytest.raises(grpc.RpcError) as caught:
                expertd_pb2_grpc.ExpertServiceStub(channel).Forward(requests()[0], timeout=PATIENCE_S)
            return failure_of(caught.value).message

        wait_for(lambda: "draining" in refusal(), START_S)  # before, its layers are not loaded yet
        assert not server.ready_file.exists()
        children = psutil.Process(server.popen.pid).children()
        (engine,) = [child for child in children if "engine" in child.cmdline()]
        (admin_port,) = [one.laddr.port for one in engine.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        with (
            expertd.AdminClient(f"127.0.0.1:{admin_port}") as admin,
            pytest.raises(expertd.UnavailableError, match="the server is draining and takes no others"),
        ):
            admin.load_layer("another", 1, synthetic="tiny")
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(PATIENCE_S) == 0, server.errors()


def test_front_ends_have_as_many_streams_as_each_other(tmp_path: Path) -> None:
    skip_without_programs()
    with Processes(tmp_path) as server, contextlib.ExitStack() as stack:
        facts = server.facts()
        clients = []
        for _ in range(20):  # of which lots alone would leave one with twelve or more every second time
            client = stack.enter_context(expertd.Client(f"127.0.0.1:{facts['port']}"))
            hidden, logits = np.ones((2, HIDDEN_SIZE), np.float32), np.ones((2, NUM_EXPERTS), np.float32)
            client.forward(LAYER, hidden, routing_logits=logits)
            clients.append(client)
        most, fewest = (pick(map(server._connections, facts["frontend_pids"])) for pick in (max, min))
        assert most - fewest <= 2
        assert most + fewest == 20


def test_grpc_stays_on_one_core_and_the_rest_of_the_process_does_not(tmp_path: Path) -> None:
    with Processes(tmp_path, "--grpc-on-one-core") as server:
        facts = server.facts()
        everywhere = os.sched_getaffinity(0)
        for number, pid in enumerate(sorted(facts["frontend_pids"])):
            cores = [os.sched_getaffinity(thread.id) for thread in psutil.Process(pid).threads()]
            staying = [each for each in cores if len(each) == 1]
            assert len(everywhere) == 1 or 1 < len(staying) < len(cores), (number, cores)
            assert len(set(map(frozenset, staying))) == 1
        assert os.sched_getaffinity(facts["engine_pid"]) == everywhere


def test_children_do_not_outlive_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    with Processes(tmp_path, "--frontends", "1") as server:
        facts = server.facts()
        children = [psutil.Process(pid) for pid in (facts["engine_pid"], *facts["frontend_pids"])]
        server.popen.kill()
        assert not psutil.wait_procs(children, PATIENCE_S)[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--synthetic", "no-such-model"), "no-such-model"),
        (("--frontend-arena-bytes", "1000"), "frontend_arena_bytes is 1000, expected 2162688 to"),
        (("--frontend-arena-bytes", str(2**50)), "available"),
        (("--tls-cert-file", "/nowhere"), "tls_key_file"),
        (("--ready-file", "/no/such/directory/ready.json"), "ready_file"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    with Processes(tmp_path, "--log-level", "error", *arguments) as server:
        assert server.popen.wait(START_S) == 2, server.errors()
        lines = [line for line in server.errors().splitlines() if line.startswith("expertd-server: ")]
        assert len(lines) == 1, server.errors()
        assert says in lines[0]
        assert server.output() == ""


def test_a_port_in_use_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with running() as one, Processes(tmp_path, port=one.server.port) as server:
        assert server.popen.wait(PATIENCE_S) == 2
        assert f"cannot listen on 127.0.0.1:{one.server.port}" in server.errors()
        assert "is process" not in server.errors()


def wait_for(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Wait for what no event tells."""
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail(f"not so within {timeout_s} s")
