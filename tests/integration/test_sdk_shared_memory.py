"""The SDK through shared memory: the same bits as over gRPC, by itself where it can, a word where it cannot."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, PATIENCE_S, Running, SteeredBackend, running, split
from shared_memory import ANSWERED, eventually, forget_tests_before, mapped_regions, shared_fds

import expertd
from expertd import _shm
from expertd._shm import Placed, StreamMemory
from expertd.types import ForwardRequest
from expertd_server.region_door import RegionDoor

FLAVOURS = ("sync", "async")
SEED = 20261126
FP8, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
Transport = Literal["auto", "grpc", "shm", "stream", "unary"]


class Spy:
    """Counts the requests that were placed in memory, and those that found no place."""

    def __init__(self) -> None:
        self.placed = self.refused = 0


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen, place = Spy(), StreamMemory.place

    def spied(memory: StreamMemory, *arguments: Any) -> tuple[bytes, Placed] | None:
        result = place(memory, *arguments)
        seen.placed += result is not None
        seen.refused += result is None
        return result

    monkeypatch.setattr(StreamMemory, "place", spied)
    return seen


class Driver:
    """One of the two clients behind one synchronous face."""

    def __init__(self, flavour: str, port: int, transport: Transport = "shm", **options: Any) -> None:
        options = {"timeout_s": PATIENCE_S, "retry": expertd.RetryPolicy(max_attempts=1)} | options
        config = expertd.ClientConfig(f"127.0.0.1:{port}", transport=transport, **options)
        self._runner = asyncio.Runner() if flavour == "async" else None
        self.client: Any = expertd.AsyncClient(config) if self._runner else expertd.Client(config)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self.client.close())
        if self._runner is not None:
            self._runner.close()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self._run(self.client.forward(*arguments, **options))

    def forward_many(self, requests: list[ForwardRequest[Any]]) -> list[Any]:
        if self._runner is None:
            return list(self.client.forward_many(requests))

        async def collect() -> list[Any]:
            return [result async for result in self.client.forward_many(requests)]

        return self._runner.run(collect())

    def _run(self, value: Any) -> Any:
        return value if self._runner is None else self._runner.run(value)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_batch_tokens=64) as one:
        yield one


def inputs(num_tokens: int, seed: int = SEED) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    chance = np.random.default_rng(seed)
    hidden = chance.standard_normal((num_tokens, HIDDEN_SIZE), np.float32)
    return hidden, chance.standard_normal((num_tokens, NUM_EXPERTS), np.float32)


def bits(array: Any) -> bytes:
    """Of a numpy array or a torch tensor."""
    if isinstance(array, torch.Tensor):
        return bytes(array.contiguous().reshape(-1).view(torch.uint8).numpy())
    return bytes(np.ascontiguousarray(array).tobytes())


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", [FP8, BFLOAT16, np.float16, np.float32])
def test_bits_are_those_of_grpc(server: Running, spy: Spy, flavour: str, dtype: Any) -> None:
    """Sizes from nothing to several parts, either routing, all outputs."""
    port = server.server.port
    with Driver(flavour, port) as shm, Driver(flavour, port, "grpc") as grpc:
        for num_tokens in (0, 1, 33, 150):
            hidden, logits = inputs(num_tokens)
            hidden = hidden.astype(dtype)
            routed = grpc.forward(LAYER, hidden, routing_logits=logits, return_routing=True)
            for routing in (
                {"routing_logits": logits},
                {"routing_logits": logits.astype(BFLOAT16)},
                {"topk_ids": routed.topk_ids, "topk_weights": routed.expert_weights},
            ):
                for options in (
                    {},
                    {"output_dtype": "float32", "return_routing": True},
                    {"do_finalize": False, "return_routing": True},
                ):
                    one, other = (each.forward(LAYER, hidden, **routing, **options) for each in (shm, grpc))
                    for name in ANSWERED:
                        mine, theirs = getattr(one, name), getattr(other, name)
                        assert (mine is None) == (theirs is None), name
                        if mine is not None:
                            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
                            assert bits(mine) == bits(theirs), f"{name} of {num_tokens} tokens, {options}"
    assert spy.placed >= 4 * 9
    assert not spy.refused


def test_a_group_counts_the_same_bytes_through_memory_as_through_grpc(server: Running, spy: Spy) -> None:
    hidden, logits = inputs(40)
    target = f"127.0.0.1:{server.server.port}"
    counted = {}
    for transport in ("shm", "grpc"):
        client = functools.partial(expertd.ClientConfig, transport=transport)
        with expertd.ExpertGroup(target, expertd.GroupConfig(client=client, hedge_percentile=None)) as group:
            result = group.forward(LAYER, hidden, routing_logits=logits)
            counted[transport] = (result.sent_bytes, result.received_bytes)
    assert spy.placed
    assert counted["shm"][0] == counted["grpc"][0] > hidden.nbytes
    # But for the times in the answer, and where in the memory it lies.
    assert counted["shm"][1] == pytest.approx(counted["grpc"][1], abs=100)
    assert min(counted["shm"][1], counted["grpc"][1]) > 2 * hidden.size


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_torch_in_torch_out(server: Running, spy: Spy, flavour: str) -> None:
    hidden, logits = (torch.from_numpy(array) for array in inputs(40))
    port = server.server.port
    with Driver(flavour, port) as shm, Driver(flavour, port, "grpc") as grpc:
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            one, other = (each.forward(LAYER, hidden.to(dtype), routing_logits=logits) for each in (shm, grpc))
            assert isinstance(one.output, torch.Tensor)
            assert torch.equal(one.output, other.output)
            transposed = hidden.to(dtype).T.contiguous().T  # not contiguous
            assert torch.equal(shm.forward(LAYER, transposed, routing_logits=logits).output, other.output)
    assert spy.placed == 4


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_answers_that_are_kept_stay_as_they_are_and_leave_room_for_others(
    server: Running, spy: Spy, flavour: str
) -> None:
    """More answers than the memory holds: those in it stay, later ones are copies, and every request is placed."""
    requests = []
    for seed in range(300):
        hidden, logits = inputs(32, seed)
        requests.append(ForwardRequest(layer=LAYER, hidden_states=hidden, routing_logits=logits))
    port = server.server.port
    with Driver(flavour, port, "shm", shared_memory_bytes=1 << 20, max_in_flight=8) as shm:
        kept = shm.forward_many(requests)
        with Driver(flavour, port, "grpc") as grpc:
            expected = grpc.forward_many(requests)
        for one, other in zip(kept, expected, strict=True):
            assert bits(one.output) == bits(other.output)
            one.output[:] = 0  # it is the caller's own
    for one in kept:  # also when the client is closed
        assert not one.output.astype(np.float32).any()
    assert (spy.placed, spy.refused) == (300, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_request_that_finds_no_room_goes_by_bytes(server: Running, spy: Spy, flavour: str) -> None:
    hidden, logits = inputs(64)
    many = np.concatenate([hidden] * 40)  # parts of 64 KiB
    port = server.server.port
    options = {"shared_memory_bytes": 1 << 20, "max_in_flight": 40}
    with Driver(flavour, port, "shm", **options) as shm, Driver(flavour, port, "grpc") as grpc:
        answers = [each.forward(LAYER, many, routing_logits=np.concatenate([logits] * 40)) for each in (shm, grpc)]
    assert bits(answers[0].output) == bits(answers[1].output)
    assert spy.placed
    assert spy.refused


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_memory_of_a_request_that_was_given_up_is_not_used_before_it_is_answered(flavour: str, spy: Spy) -> None:
    backend = SteeredBackend()
    hidden, logits = inputs(32)
    other_hidden, other_logits = inputs(32, SEED + 1)
    with running(backend) as one, Driver(flavour, one.server.port) as shm:
        with pytest.raises(expertd.TimeoutError):
            shm.forward(LAYER, hidden, routing_logits=logits, timeout_s=0.5)  # it runs, held up by the gate
        backend.wait_started()
        threading.Timer(0.3, backend.gate.set).start()
        answer = shm.forward(LAYER, other_hidden, routing_logits=other_logits)
        with Driver(flavour, one.server.port, "grpc") as grpc:
            expected = grpc.forward(LAYER, other_hidden, routing_logits=other_logits)
        assert bits(answer.output) == bits(expected.output)
        (stream,) = shm.client._transport._streams
        eventually(lambda: len(stream._placed), 0)
    assert spy.placed == 2


def said_by_client(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the client logged, without the lines of the server that runs in this process."""
    return [record for record in caplog.records if record.name == "expertd.client"]


class TestFallback:
    """auto goes over gRPC and says so once; shm fails and says why."""

    def check(self, port: int, flavour: str, caplog: pytest.LogCaptureFixture, why: str) -> None:
        hidden, logits = inputs(5)
        caplog.set_level(logging.INFO, "expertd.client")
        with Driver(flavour, port, "auto") as auto:
            answers = [auto.forward(LAYER, hidden, routing_logits=logits) for _ in range(3)]
            eventually(lambda: len(said_by_client(caplog)), 1)
            answers.append(auto.forward(LAYER, hidden, routing_logits=logits))
        assert len({bits(answer.output) for answer in answers}) == 1
        (record,) = said_by_client(caplog)
        assert "no memory is shared" in record.message
        assert why in record.message
        with Driver(flavour, port) as shm, pytest.raises(expertd.SharedMemoryError, match="transport='auto'") as no:
            shm.forward(LAYER, hidden, routing_logits=logits)
        assert why in str(no.value)

    @pytest.mark.parametrize("flavour", FLAVOURS)
    def test_a_server_that_shares_nothing(self, flavour: str, caplog: pytest.LogCaptureFixture) -> None:
        with running(shared_memory=False) as one:
            self.check(one.server.port, flavour, caplog, "takes no shared memory")

    @pytest.mark.parametrize("flavour", FLAVOURS)
    def test_a_server_elsewhere(
        self, server: Running, flavour: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its socket has a name that means nothing here."""
        door = server.server._listener._region_door
        assert door is not None
        monkeypatch.setattr(door, "address", "@expertd-regions-elsewhere")
        self.check(server.server.port, flavour, caplog, "another machine")

    def test_a_server_of_another_user(
        self, server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        self.check(server.server.port, "sync", caplog, "--shared-memory-any-user")

    def test_a_server_that_names_a_socket_of_somebody_else(
        self, server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        door = server.server._listener._region_door
        assert door is not None
        monkeypatch.setattr(door, "address", "/run/docker.sock")
        self.check(server.server.port, "sync", caplog, "/run/docker.sock")

    def test_a_server_that_maps_something_else(
        self, server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RegionDoor, "_take", lambda *_: (bytes(16), ()))
        self.check(server.server.port, "sync", caplog, "other memory")

    def test_a_system_without_memfd(
        self, server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Elsewhere:
            path = os.path

        monkeypatch.setattr(_shm, "os", Elsewhere)
        self.check(server.server.port, "sync", caplog, "memfd_create")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_auto_uses_it_by_itself_and_grpc_never(
    server: Running, spy: Spy, flavour: str, caplog: pytest.LogCaptureFixture
) -> None:
    forget_tests_before()
    hidden, logits = inputs(5)
    caplog.set_level(logging.INFO, "expertd.client")
    with Driver(flavour, server.server.port, "auto") as auto:
        auto.forward(LAYER, hidden, routing_logits=logits)
        eventually(lambda: any("through shared memory" in record.message for record in caplog.records), True)
        before = spy.placed
        auto.forward(LAYER, hidden, routing_logits=logits)
        assert spy.placed == before + 1
    eventually(mapped_regions, 0)
    for transport in ("grpc", "stream", "unary"):
        before, regions = spy.placed, 0
        with Driver(flavour, server.server.port, transport) as other:
            other.forward(LAYER, hidden, routing_logits=logits)
            assert (spy.placed, mapped_regions()) == (before, regions)


def test_a_socket_in_a_directory(spy: Spy) -> None:
    """For clients in another network namespace, which have the directory too."""
    hidden, logits = inputs(5)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with running(shared_memory_dir=Path(folder)) as one, Driver("sync", one.server.port) as shm:
            assert len(os.listdir(folder)) == 1
            shm.forward(LAYER, hidden, routing_logits=logits)
        assert spy.placed == 1
        assert not os.listdir(folder)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_server_is_unavailable_also_where_memory_is_required(flavour: str) -> None:
    hidden, logits = inputs(5)
    with running() as one:
        port = one.server.port
        driver = Driver(flavour, port, timeout_s=2.0)
        driver.forward(LAYER, hidden, routing_logits=logits)
    with driver, socket.socket() as nobody:
        # Bound and not listening: connections are refused, and no other test's server comes to this port.
        nobody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        nobody.bind(("127.0.0.1", port))
        for _ in range(3):
            with pytest.raises(expertd.UnavailableError):
                driver.forward(LAYER, hidden, routing_logits=logits)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_left_of_many_clients(server: Running, flavour: str) -> None:
    forget_tests_before()
    hidden, logits = inputs(5)

    def once() -> None:
        with Driver(flavour, server.server.port) as shm:
            shm.forward(LAYER, hidden, routing_logits=logits)

    once()
    eventually(mapped_regions, 0)
    fds = shared_fds()
    for _ in range(15):
        once()
    eventually(mapped_regions, 0)
    eventually(lambda: shared_fds() <= fds, True)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_front_ends(spy: Spy, flavour: str) -> None:
    """The memory is mapped by the front-end that the stream has reached."""
    hidden, logits = inputs(50)
    with split(2) as server:
        for port in server.ports:
            with Driver(flavour, port) as shm, Driver(flavour, port, "grpc") as grpc:
                one, other = (each.forward(LAYER, hidden, routing_logits=logits) for each in (shm, grpc))
                assert bits(one.output) == bits(other.output)
    assert spy.placed == 2


def test_groups_use_it_too(server: Running, spy: Spy) -> None:
    hidden, logits = inputs(20)
    target = f"127.0.0.1:{server.server.port}"

    def answer(transport: Transport) -> Any:
        config = expertd.GroupConfig(client=lambda address: expertd.ClientConfig(address, transport=transport))
        with expertd.ExpertGroup([target], config) as group:
            return group.forward(LAYER, hidden, routing_logits=logits).output

    through_memory = answer("shm")
    assert spy.placed == 1
    assert bits(through_memory) == bits(answer("grpc"))
    assert spy.placed == 1

    async def asynchronous() -> Any:
        config = expertd.GroupConfig(client=lambda address: expertd.ClientConfig(address, transport="shm"))
        async with expertd.AsyncExpertGroup([target], config) as group:
            return (await group.forward(LAYER, hidden, routing_logits=logits)).output

    assert bits(asyncio.run(asynchronous())) == bits(through_memory)
    assert spy.placed == 2


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path, spy: Spy) -> None:
    """The client's memory goes with the stream; the next stream has its own. Nothing lies in /dev/shm."""
    forget_tests_before()
    hidden, logits = inputs(5)
    ready = tmp_path / "ready.json"

    def start(port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "expertd_server", "serve", "--device=cpu", "--synthetic=tiny"]
        command += [f"--port={port}", f"--ready-file={ready}", "--log-level=error"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        eventually(ready.exists, True)
        return process

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(port)
    try:
        eventually(mapped_regions, 0)
        with Driver("sync", port) as driver:
            expected = bits(driver.forward(LAYER, hidden, routing_logits=logits).output)
            assert mapped_regions() == 1
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_S)
            for _ in range(3):
                with pytest.raises(expertd.UnavailableError):
                    driver.forward(LAYER, hidden, routing_logits=logits)
            eventually(mapped_regions, 0)
            ready.unlink()
            process = start(port)
            driver.client.wait_ready()
            before = spy.placed
            assert bits(driver.forward(LAYER, hidden, routing_logits=logits).output) == expected
            assert spy.placed == before + 1
            assert not list(Path("/dev/shm").glob("*expertd*"))
        eventually(mapped_regions, 0)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
