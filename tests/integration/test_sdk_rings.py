"""The SDK's messages through rings: by themselves, in both clients, and over gRPC where there are none."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sdk_cases import Driver, connected
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, PATIENCE_S, Running, SteeredBackend, running, split
from shared_memory import eventually, forget_tests_before, mapped_regions, shared_fds

import expertd
from expertd import ForwardRequest, _ring_reader, _transport, _transport_aio
from expertd._rings import StreamRings
from expertd.v1.message_ring import RingWriter
from expertd_server import ring_pair
from expertd_server.ring_pair import RingPlace

FLAVOURS = ("sync", "async")
SEED = 20261127
FP8 = ml_dtypes.float8_e4m3fn
SOON_S = 5.0
"""Much less than any deadline here."""


class Spy:
    """Counts the requests and answers of clients here that went through rings, and requests that found no room."""

    def __init__(self) -> None:
        self.put = self.refused = self.taken = 0


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy()

    class Spied(StreamRings):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            put = self.put

            def spied(message: bytes) -> bool:
                done = put(message)
                seen.put += done
                seen.refused += not done
                return done

            self.put = spied

        def take(self) -> bytes | None:
            answer = super().take()
            seen.taken += answer is not None
            return answer

    monkeypatch.setattr("expertd._shm.StreamRings", Spied)
    return seen


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_batch_tokens=64) as one:
        yield one


def a_request(seed: int = 0, num_tokens: int = 3, dtype: Any = np.float32) -> ForwardRequest[Any]:
    chance = np.random.default_rng(SEED + seed)
    hidden = chance.standard_normal((num_tokens, HIDDEN_SIZE), np.float32).astype(dtype)
    logits = chance.standard_normal((num_tokens, NUM_EXPERTS), np.float32)
    return ForwardRequest(layer=LAYER, hidden_states=hidden, routing_logits=logits)


def forward(driver: Any, asked: ForwardRequest[Any], **options: Any) -> bytes:
    """The bits of the answer."""
    result = driver.forward(LAYER, asked.hidden_states, routing_logits=asked.routing_logits, **options)
    return bytes((result.output if result.output is not None else result.gemm2_output).tobytes())


def rings_of(driver: Driver) -> StreamRings:
    """Those of its only stream."""
    (stream,) = driver.client._transport._streams
    rings = stream._rings
    found = rings._rings if isinstance(rings, _ring_reader.RingReader) else rings
    assert isinstance(found, StreamRings)
    return found


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_request_goes_through_the_ring_and_has_the_bits_of_grpc(server: Running, spy: Spy, flavour: str) -> None:
    requests = [a_request(seed, seed % 40) for seed in range(150)]
    port = server.server.port
    with connected(flavour, port) as driver, connected(flavour, port, "grpc") as grpc:
        assert forward(driver, requests[1]) == forward(grpc, requests[1])
        for one, other in zip(driver.forward_many(requests), grpc.forward_many(requests), strict=True):
            assert one.output.tobytes() == other.output.tobytes()
    assert (spy.put, spy.taken, spy.refused) == (151, 151, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_deadline_that_is_years_away(server: Running, spy: Spy, flavour: str) -> None:
    """poll counts 24 days."""
    with connected(flavour, server.server.port) as driver:
        for _ in range(20):  # of which not all find their answer at once
            forward(driver, a_request(), timeout_s=1e9)
    assert spy.taken == 20


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_front_ends_have_them_too(spy: Spy, flavour: str) -> None:
    with split(2) as servers:
        for port in servers.ports:
            with connected(flavour, port) as driver, connected(flavour, port, "grpc") as grpc:
                assert forward(driver, a_request()) == forward(grpc, a_request())
    assert (spy.put, spy.taken) == (2, 2)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_answers_that_come_over_grpc_are_not_waited_for_in_the_ring(server: Running, spy: Spy, flavour: str) -> None:
    """Rows that are not summed come as bytes, and so over gRPC."""
    with connected(flavour, server.server.port) as driver, connected(flavour, server.server.port, "grpc") as grpc:
        begin_s = time.monotonic()
        for seed in range(3):
            asked = a_request(seed, 40, FP8)  # more comes out than went in
            assert forward(driver, asked, do_finalize=False) == forward(grpc, asked, do_finalize=False)
        assert time.monotonic() - begin_s < SOON_S
    assert (spy.put, spy.taken) == (3, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_ring_that_is_full(spy: Spy, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd._shm.num_slots", lambda *_: 2)
    backend = SteeredBackend()
    requests = [a_request(seed) for seed in range(20)]
    with running(backend, max_stream_requests=3) as one:
        threading.Timer(0.3, backend.gate.set).start()
        with connected(flavour, one.server.port) as driver, connected(flavour, one.server.port, "grpc") as grpc:
            results = list(driver.forward_many(requests))
            for mine, theirs in zip(results, grpc.forward_many(requests), strict=True):
                assert mine.output.tobytes() == theirs.output.tobytes()
    assert spy.put
    assert spy.refused
    assert spy.put + spy.refused == 20


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("who", ["server", "client", "server's machine"])
def test_older_ones_go_on_over_grpc(
    spy: Spy, flavour: str, who: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With their tensors in shared memory."""
    if who == "server":
        monkeypatch.setattr(RingPlace, "asked_for", lambda _: None)
    elif who == "client":
        monkeypatch.setattr("expertd._shm.wanted_rings", lambda _: None)
    else:
        monkeypatch.setattr(ring_pair, "IS_SUPPORTED", False)
    caplog.set_level(logging.INFO, "expertd.client")
    forget_tests_before()
    with running() as one:
        port = one.server.port
        eventually(mapped_regions, 0)
        with connected(flavour, port) as driver, connected(flavour, port, "grpc") as grpc:
            assert forward(driver, a_request()) == forward(grpc, a_request())
            assert mapped_regions() == 2
    assert (spy.put, spy.taken) == (0, 0)
    assert "tensors go through shared memory" in caplog.text


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_auto_changes_over_by_itself(server: Running, spy: Spy, flavour: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expertd.client")
    with connected(flavour, server.server.port, "auto") as driver:
        until_s = time.monotonic() + PATIENCE_S
        while not spy.taken:
            forward(driver, a_request())
            assert time.monotonic() < until_s
    assert caplog.text.count("requests and answers go through shared memory") == 1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_a_draining_server_has_answered_is_not_lost(flavour: str) -> None:
    """Neither with one request in flight nor with several: the stream's end comes after them, on another way."""
    for count in (1, 8):
        backend = SteeredBackend()
        with running(backend) as one, connected(flavour, one.server.port, max_in_flight=8) as driver:
            stopping = threading.Timer(0.1, one.server.shutdown)
            opening = threading.Timer(0.3, backend.gate.set)
            stopping.start()
            opening.start()
            results = list(driver.forward_many([a_request(seed) for seed in range(count)]))
            assert all(result.output.shape == (3, HIDDEN_SIZE) for result in results)
            stopping.join()
            opening.join()


def answers_of(server: Running) -> RingWriter:
    """The server's end of the answers of its only stream."""
    (stream,) = server.server._listener.service._streams
    assert stream._rings is not None
    return stream._rings._pair.answers


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("what", ["a count", "a message"])
def test_a_server_that_writes_nonsense_breaks_the_stream_and_the_next_one_is_good(
    flavour: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as one, connected(flavour, one.server.port) as driver:
        expected = forward(driver, a_request())
        answers = answers_of(one)
        put = answers.put

        def spoiled(answer: bytes) -> bool:
            is_put = put(b"\xff" * len(answer))
            if what == "a count":
                answers._head[0] = 2**40
            return is_put

        monkeypatch.setattr(answers, "put", spoiled)
        with pytest.raises(expertd.ProtocolError):
            forward(driver, a_request())
        assert forward(driver, a_request()) == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_that_hangs_up_and_does_not_end_the_stream(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_ring_reader, _transport_aio):
        monkeypatch.setattr(module, "HUNG_UP_S", 0.2)
    with running() as one, connected(flavour, one.server.port, timeout_s=1.0) as driver:
        expected = forward(driver, a_request())
        transport = driver.client._transport
        first = transport._streams[0]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, answers_of(one).bell_fd)
        os.close(null)
        until_s = time.monotonic() + PATIENCE_S
        while transport._streams[0] is first:
            with contextlib.suppress(expertd.ProtocolError, expertd.TimeoutError):
                forward(driver, a_request())
            assert time.monotonic() < until_s
        assert forward(driver, a_request()) == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_left_of_many_clients(server: Running, flavour: str) -> None:
    forget_tests_before()

    def once() -> None:
        with connected(flavour, server.server.port) as driver:
            forward(driver, a_request())

    once()
    eventually(mapped_regions, 0)
    fds, threads = shared_fds(), threading.active_count()
    for _ in range(10):
        once()
    eventually(mapped_regions, 0)
    eventually(lambda: shared_fds() <= fds, True)
    eventually(lambda: threading.active_count() <= threads, True)


class TestWhoReads:
    """In the synchronous client."""

    @pytest.fixture
    def readers(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the threads that answers were delivered in."""
        names: list[str] = []
        deliver = _transport._Stream._deliver_bytes

        def spied(stream: Any, data: bytes) -> None:
            names.append(threading.current_thread().name)
            deliver(stream, data)

        monkeypatch.setattr(_transport._Stream, "_deliver_bytes", spied)
        return names

    def test_a_lone_caller_takes_its_answer_itself(self, server: Running, readers: list[str]) -> None:
        with connected("sync", server.server.port) as driver:
            forward(driver, a_request())
            readers.clear()
            for seed in range(20):
                forward(driver, a_request(seed))
        assert set(readers) == {"MainThread"}

    def test_many_threads_each_get_their_own(self, server: Running, spy: Spy) -> None:
        asked = [a_request(seed) for seed in range(8)]
        with connected("sync", server.server.port, "grpc") as grpc:
            expected = [forward(grpc, one) for one in asked]
        wrong: list[int] = []

        def ask(driver: Driver, number: int) -> None:
            for _ in range(60):
                if forward(driver, asked[number]) != expected[number]:
                    wrong.append(number)

        with connected("sync", server.server.port, max_in_flight=5) as driver:
            threads = [threading.Thread(target=ask, args=(driver, number)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
        assert not wrong
        assert spy.taken == 8 * 60

    def test_answers_to_who_has_turned_away_make_room_for_others(self, server: Running) -> None:
        """A reader of forward_many that rests holds every place until its answers are taken, if nobody takes them."""
        with connected("sync", server.server.port, max_in_flight=4) as driver:
            results = driver.forward_many([a_request(seed) for seed in range(4)])
            next(results)
            begin_s = time.monotonic()
            for seed in range(3):
                forward(driver, a_request(seed))
            assert time.monotonic() - begin_s < SOON_S
            assert len(list(results)) == 3

    def test_a_request_in_more_parts_than_places(self, server: Running) -> None:
        with connected("sync", server.server.port, max_in_flight=2) as driver:
            begin_s = time.monotonic()
            assert len(forward(driver, a_request(num_tokens=64 * 7))) == 64 * 7 * HIDDEN_SIZE * 2
            assert time.monotonic() - begin_s < SOON_S

    def test_a_caller_that_leaves_at_its_deadline_leaves_the_rest_to_the_thread(self, readers: list[str]) -> None:
        backend = SteeredBackend()
        with running(backend) as one, connected("sync", one.server.port) as driver:
            with pytest.raises(expertd.TimeoutError):
                forward(driver, a_request(), timeout_s=0.3)
            backend.gate.set()
            (stream,) = driver.client._transport._streams
            eventually(lambda: len(stream._placed), 0)
            assert readers[-1] == "expertd-ring-reader"
            forward(driver, a_request())
            assert readers[-1] == "MainThread"

    def test_an_interrupt_while_answers_are_taken_fails_those_that_it_may_have_lost(
        self, server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deliver = _transport._Stream._deliver_bytes
        interrupts: list[type[BaseException]] = []

        def interrupted(stream: Any, data: bytes) -> None:
            if interrupts:
                raise interrupts.pop()
            deliver(stream, data)

        monkeypatch.setattr(_transport._Stream, "_deliver_bytes", interrupted)
        with connected("sync", server.server.port) as driver:
            expected = forward(driver, a_request())
            (first,) = driver.client._transport._streams
            interrupts.append(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                forward(driver, a_request())
            eventually(lambda: first.is_open, False)
            assert forward(driver, a_request()) == expected

    def test_a_caller_that_comes_when_the_thread_is_about_to_leave(self, server: Running) -> None:
        """It finds that somebody reads, who has just seen that nothing is awaited."""
        with connected("sync", server.server.port) as driver:
            forward(driver, a_request())
            (stream,) = driver.client._transport._streams
            assert stream._rings._turn.acquire(timeout=PATIENCE_S)
            threading.Timer(0.2, stream._rings._turn.release).start()
            begin_s = time.monotonic()
            forward(driver, a_request())
            assert time.monotonic() - begin_s < SOON_S

    def test_without_a_file_descriptor_to_wait_with(
        self, server: Running, spy: Spy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none_left(*_: Any) -> int:
            raise OSError(errno.EMFILE, "no more")

        monkeypatch.setattr(_ring_reader.os, "eventfd", none_left)
        with connected("sync", server.server.port) as driver, connected("sync", server.server.port, "grpc") as grpc:
            assert forward(driver, a_request()) == forward(grpc, a_request())
        assert spy.put == 0

    def test_close_wakes_whoever_reads(self) -> None:
        backend = SteeredBackend()
        with running(backend) as one, connected("sync", one.server.port) as driver:
            threading.Timer(0.3, driver.client.close).start()
            begin_s = time.monotonic()
            with pytest.raises(expertd.ClosedError):
                forward(driver, a_request())
            assert time.monotonic() - begin_s < SOON_S


def test_bells_are_not_inherited(server: Running) -> None:
    with connected("sync", server.server.port) as driver:
        forward(driver, a_request())
        rings = rings_of(driver)
        for fd in (rings._requests.bell_fd, rings._answers.bell_fd):
            assert not os.get_inheritable(fd)
            assert not os.get_blocking(fd)
        assert struct.unpack_from("<Q", rings._answers._head)[0] == 1
