"""Calls that are made many times: the bits and the errors of forward, without what forward does each time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from admin_cases import ADMIN, admin_of
from in_place import BFLOAT16, an_out, break_off, lent, stream_of, values
from sdk_cases import Driver, connected
from serving import HIDDEN_SIZE, LAYER, PATIENCE_S, Running, SteeredBackend, running, split
from shared_memory import eventually, forget_tests_before, mapped_regions

import expertd
from expertd._shm import StreamMemory
from expertd._standing import FIRST_STANDING_ID, STANDING_KEY, key_of
from expertd._transport import _Stream
from expertd._transport_aio import _Stream as _AsyncStream
from expertd.v1 import expertd_pb2 as pb

FLAVOURS = ("sync", "async")
QUICK = expertd.RetryPolicy(max_attempts=5, initial_backoff_s=0.01, max_backoff_s=0.05)
SOON_S = 5.0
"""Much less than any deadline here."""


class Spy:
    """How often requests were placed in memory, and standing ones sent."""

    def __init__(self) -> None:
        self.placed = self.sent = self.refused = 0


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen, place = Spy(), StreamMemory.place

    def spied_place(memory: StreamMemory, *arguments: Any) -> Any:
        seen.placed += 1
        return place(memory, *arguments)

    def spied_send(stream: Any, send: Any, standing: Any) -> bool:
        is_sent: bool = send(stream, standing)
        seen.sent += is_sent
        seen.refused += not is_sent
        return is_sent

    monkeypatch.setattr(StreamMemory, "place", spied_place)
    for kind in (_Stream, _AsyncStream):
        monkeypatch.setattr(kind, "send_standing", partialmethod(spied_send, kind.send_standing))
    return seen


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_batch_tokens=64) as one:
        yield one


class InPlace:
    """A prepared call all of whose arrays lie in the client's memory."""

    def __init__(self, driver: Driver, num_tokens: int, seed: int = 0, **options: Any) -> None:
        hidden, logits = values(num_tokens, seed)
        self.hidden, self.logits = lent(driver, hidden), lent(driver, logits)
        self.out = an_out(driver, num_tokens)
        self._driver = driver
        self.call: Any = driver.prepare(LAYER, self.hidden, routing_logits=self.logits, out=self.out, **options)

    def run(self) -> Any:
        return self._driver.run(self.call.run())

    def expected(self, other: Driver) -> bytes:
        """The bits of what `other`, of another client, is answered."""
        output = other.forward(LAYER, np.array(self.hidden), routing_logits=np.array(self.logits)).output
        return bytes(output.tobytes())


def intercept(stream: Any, change: Callable[[bytes], bytes]) -> None:
    """Have its answers changed on their way, from now on."""
    deliver = stream._deliver_bytes
    if isinstance(stream, _Stream):
        stream._rings._deliver = lambda data: deliver(change(data))  # type: ignore[union-attr]
    else:
        stream._deliver_bytes = lambda data: deliver(change(data))


def while_it_runs(driver: Driver, look: Callable[[], Any]) -> Callable[[], Any]:
    """A look that lets an asynchronous client do something before."""

    def run_and_look() -> Any:
        driver.server_info()
        return look()

    return run_and_look


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_in_place_it_is_placed_once_and_has_the_bits_of_forward(flavour: str, server: Running, spy: Spy) -> None:
    """Whatever the arrays hold by then."""
    port = server.server.port
    with connected(flavour, port) as driver, connected(flavour, port, "grpc") as grpc:
        mine = InPlace(driver, 20)
        for seed in range(10):
            hidden, logits = values(20, seed)
            mine.hidden[...], mine.logits[...], mine.out[...] = hidden, logits, -77
            result = mine.run()
            assert result.output is mine.out
            assert mine.out.tobytes() == mine.expected(grpc)
            assert (result.gemm2_output, result.topk_ids, result.expert_weights) == (None, None, None)
            assert result.expanded_idx_to_permuted_idx is None
            assert result.weights_version == 1
            assert (len(result.timings), result.timing.batch_tokens) == (1, 20)
        assert not stream_of(driver)._placed
    assert (spy.placed, spy.sent, spy.refused) == (1, 10, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("transport", ["shm", "grpc", "unary"])
def test_any_arrays_on_every_transport(server: Running, flavour: str, transport: str) -> None:
    """Each call sends what they hold, also where that has to be copied first; in parts, either routing, all outputs."""
    port = server.server.port
    hidden, logits = values(100)
    with connected(flavour, port, transport) as driver, connected(flavour, port, "grpc") as grpc:
        routed = grpc.forward(LAYER, hidden, routing_logits=logits, return_routing=True)
        ids, weights = routed.topk_ids, routed.expert_weights
        strided = np.zeros((100, 2 * HIDDEN_SIZE), np.float32)[:, ::2]
        for states in (np.zeros_like(hidden), strided, driver.empty(hidden.shape, "float32")):
            for options in (
                {"routing_logits": np.array(logits)},
                {"topk_ids": np.array(ids), "topk_weights": np.array(weights), "return_routing": True},
                {"routing_logits": lent(driver, logits), "do_finalize": False},
                {"routing_logits": lent(driver, logits), "out": an_out(driver, 100)},
                {"routing_logits": lent(driver, logits), "out": np.empty(hidden.shape, np.float16)},
            ):
                if (out := options.get("out")) is not None:
                    options["output_dtype"] = out.dtype
                call = driver.prepare(LAYER, states, **options)
                options.pop("out", None)
                for sign in (1, -1):
                    states[...] = sign * hidden
                    result = driver.run(call.run())
                    expected = grpc.forward(LAYER, sign * hidden, **options)
                    for name in ("output", "gemm2_output", "expert_weights", "topk_ids"):
                        one, other = getattr(result, name), getattr(expected, name)
                        assert (one is None) == (other is None), name
                        assert one is None or one.tobytes() == other.tobytes(), name
                    assert out is None or result.output is out


def test_torch_tensors(server: Running, spy: Spy) -> None:
    hidden, logits = values(20)
    with connected("sync", server.server.port) as driver:
        expected = driver.forward(LAYER, torch.from_numpy(hidden).bfloat16(), routing_logits=logits).output
        mine, shared = driver.empty(hidden.shape, torch.bfloat16), driver.empty(logits.shape, torch.float32)
        shared.copy_(torch.from_numpy(logits))
        out = driver.empty(hidden.shape, torch.bfloat16)
        elsewhere = torch.zeros(hidden.shape, dtype=torch.bfloat16)
        turned = torch.zeros((HIDDEN_SIZE, 20), dtype=torch.bfloat16).T
        for states in (mine, elsewhere, turned):
            call = driver.prepare(LAYER, states, routing_logits=shared, out=out)
            states.copy_(torch.from_numpy(hidden))
            for _ in range(2):
                out.zero_()
                assert call.run().output is out
                assert torch.equal(out, expected)
    assert spy.sent == 2


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_all_outputs_beside_one_in_place(flavour: str, server: Running, spy: Spy) -> None:
    """One token: an answer as short as one without them."""
    port = server.server.port
    with connected(flavour, port) as driver, connected(flavour, port, "grpc") as grpc:
        mine = InPlace(driver, 1, return_routing=True)
        for seed in range(3):
            mine.hidden[...], mine.logits[...] = values(1, seed)
            result = mine.run()
            assert result.output.tobytes() == mine.expected(grpc)
            expected = grpc.forward(
                LAYER, np.array(mine.hidden), routing_logits=np.array(mine.logits), return_routing=True
            )
            assert result.topk_ids.tobytes() == expected.topk_ids.tobytes()
            assert result.expert_weights.tobytes() == expected.expert_weights.tobytes()
    assert spy.sent == 3


def test_many_in_flight_of_one_thread(server: Running, spy: Spy) -> None:
    """Waited for in any order, and each has its own."""
    port = server.server.port
    with connected("sync", port) as driver, connected("sync", port, "grpc") as grpc:
        many = [InPlace(driver, 1 + seed, seed) for seed in range(8)]
        expected = [mine.expected(grpc) for mine in many]
        chance = np.random.default_rng(0)
        for _ in range(20):
            for mine in many:
                mine.out[...] = -77
                mine.call.start()
            for number in chance.permutation(8):
                assert many[number].call.wait().output.tobytes() == expected[number]
    assert spy.sent == 160


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_which_are_answered_is_known_when_one_was_waited_for(transport: str) -> None:
    backend = SteeredBackend()
    with running(backend) as one, connected("sync", one.server.port, transport) as driver:
        first, second = InPlace(driver, 1, 1), InPlace(driver, 1, 2)
        assert not first.call.is_answered, "nothing was started"
        first.call.start()
        backend.wait_started()
        second.call.start()
        assert not first.call.is_answered
        assert not second.call.is_answered
        backend.gate.set()
        second.call.wait()
        assert first.call.is_answered
        assert not second.call.is_answered, "it was waited for"
        first.call.wait()


def test_more_in_flight_than_places(server: Running, spy: Spy) -> None:
    """Places become free although nobody waits for the answers that hold them."""
    port = server.server.port
    with connected("sync", port, max_in_flight=2) as driver, connected("sync", port, "grpc") as grpc:
        many = [InPlace(driver, 1 + seed, seed) for seed in range(7)]
        begin_s = time.monotonic()
        for mine in many:
            mine.call.start()
        driver.forward(LAYER, values(3)[0], routing_logits=values(3)[1])
        for mine in many:
            assert mine.call.wait().output.tobytes() == mine.expected(grpc)
        assert time.monotonic() - begin_s < SOON_S
    assert spy.sent >= 2
    assert spy.refused


def test_with_more_in_flight_the_rings_are_longer(spy: Spy) -> None:
    backend = SteeredBackend()
    with (
        running(backend, max_stream_requests=200) as one,
        connected("sync", one.server.port, max_in_flight=100) as driver,
    ):
        many = [InPlace(driver, 1, seed) for seed in range(100)]
        for mine in many:
            mine.call.start()
        backend.gate.set()
        for mine in many:
            mine.call.wait()
        assert (spy.sent, spy.refused) == (100, 0)


def test_a_ring_that_is_full(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds no room goes over gRPC, and finds room again later."""
    monkeypatch.setattr("expertd._shm.num_slots", lambda *_: 2)
    backend = SteeredBackend()
    with running(backend, max_stream_requests=1) as one, connected("sync", one.server.port) as driver:
        many = [InPlace(driver, 1 + seed, seed) for seed in range(8)]
        for mine in many:
            mine.call.start()
        backend.gate.set()
        outputs = [mine.call.wait().output.tobytes() for mine in many]
        assert spy.sent
        assert spy.refused
        before = spy.sent
        assert [mine.call.run().output.tobytes() for mine in many] == outputs
        assert spy.sent == before + 8


def test_threads_beside_each_other(server: Running, spy: Spy) -> None:
    """Prepared calls and others of one client: whoever reads gives each its own."""
    port = server.server.port
    wrong: list[int] = []

    def ask(driver: Driver, number: int, many: list[InPlace], expected: list[bytes]) -> None:
        for turn in range(40):
            for mine in many:
                mine.call.start()
            if number % 2 and turn % 3 == 0:
                hidden, logits = np.array(many[0].hidden), np.array(many[0].logits)
                if driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes() != expected[0]:
                    wrong.append(number)
            for mine, want in zip(many, expected, strict=True):
                if mine.call.wait().output.tobytes() != want:
                    wrong.append(number)

    with connected("sync", port) as driver, connected("sync", port, "grpc") as grpc:
        threads = []
        for number in range(6):
            many = [InPlace(driver, 1 + number, 10 * number + seed) for seed in range(1 + number % 3)]
            expected = [mine.expected(grpc) for mine in many]
            threads.append(threading.Thread(target=ask, args=(driver, number, many, expected)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert not stream_of(driver)._awaited
        assert not stream_of(driver)._standing
    assert not wrong
    assert spy.sent == 40 * (1 + 2 + 3) * 2


def test_who_has_one_in_flight_and_does_not_wait_leaves_the_thread_asleep(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is taken when it is waited for, by who does."""
    readers: list[str] = []
    deliver = _Stream._deliver_bytes

    def spied(stream: Any, data: bytes) -> None:
        readers.append(threading.current_thread().name)
        deliver(stream, data)

    monkeypatch.setattr(_Stream, "_deliver_bytes", spied)
    with connected("sync", server.server.port) as driver:
        many = [InPlace(driver, 1 + seed, seed) for seed in range(4)]
        for mine in many:
            mine.call.run()
        readers.clear()
        for _ in range(10):
            for mine in many:
                mine.call.start()
            for mine in many:
                mine.call.wait()
        assert readers == ["MainThread"] * 40


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_wrong_is_said_when_it_is_prepared(server: Running, flavour: str) -> None:
    hidden, logits = values(5)
    with connected(flavour, server.server.port) as driver:
        with pytest.raises(expertd.InvalidRequestError, match="expected either routing_logits or topk_ids"):
            driver.prepare(LAYER, hidden)
        with pytest.raises(expertd.InvalidRequestError, match=r"hidden_states\.shape: has 9 columns"):
            driver.prepare(LAYER, hidden[:, :9], routing_logits=logits)
        with pytest.raises(expertd.InvalidRequestError, match="timeout_s: is 0"):
            driver.prepare(LAYER, hidden, routing_logits=logits, timeout_s=0)
        with pytest.raises(expertd.LayerNotFoundError):
            driver.prepare("no such layer", hidden, routing_logits=logits)
        with pytest.raises(expertd.InvalidRequestError, match="out: shares memory with hidden_states"):
            driver.prepare(LAYER, hidden, routing_logits=logits, out=hidden, output_dtype="float32")


@pytest.mark.parametrize("where", ["in place", "elsewhere"])
def test_start_and_wait_come_by_turns(server: Running, where: str) -> None:
    hidden, logits = values(5)
    with connected("sync", server.server.port) as driver:
        call = InPlace(driver, 5).call if where == "in place" else driver.prepare(LAYER, hidden, routing_logits=logits)
        for _ in range(2):
            with pytest.raises(expertd.InvalidRequestError, match="wait: is called before start"):
                call.wait()
            call.start()
            for again in (call.start, call.run):
                with pytest.raises(expertd.InvalidRequestError, match="start: is called again before wait"):
                    again()
            assert call.wait().output.shape == (5, HIDDEN_SIZE)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_who_has_given_up_gets_the_array_back_at_once(flavour: str, spy: Spy) -> None:
    """The late answer is nobody's, and the next call does without that memory."""
    backend = SteeredBackend()
    unwanted: list[int] = []
    with running(backend) as one, connected(flavour, one.server.port) as driver:
        driver.client.on_unwanted = unwanted.append
        mine = InPlace(driver, 32, timeout_s=0.5)
        with pytest.raises(expertd.TimeoutError, match=r"no answer within 0\.5 s"):
            mine.run()
        backend.wait_started()
        mine.out[...] = 5
        backend.gate.set()
        eventually(while_it_runs(driver, lambda: len(stream_of(driver)._placed)), 0)
        assert not stream_of(driver)._given_up
        assert (mine.out == 5).all()
        assert unwanted == [32 * HIDDEN_SIZE * 2 + unwanted[0] % 1024]
        with connected(flavour, one.server.port, "grpc") as grpc:
            for _ in range(2):
                mine.out[...] = 5
                assert mine.run().output is mine.out
                assert mine.out.tobytes() == mine.expected(grpc)
    assert (spy.sent, spy.refused) == (1, 0)


def test_an_array_that_is_still_read_for_nobody_can_be_written_to(spy: Spy) -> None:
    """Two calls with the arrays of the other, and the first is given up."""
    backend = SteeredBackend()
    hidden, logits = values(32)
    with running(backend) as one, connected("sync", one.server.port) as driver:
        ping, pong = lent(driver, hidden.astype(BFLOAT16)), an_out(driver, 32)
        shared = lent(driver, logits)
        there = driver.prepare(LAYER, ping, routing_logits=shared, out=pong, timeout_s=0.5)
        back = driver.prepare(LAYER, np.array(ping), routing_logits=shared, out=ping)
        other = InPlace(driver, 3)
        with pytest.raises(expertd.TimeoutError):
            there.run()
        backend.wait_started()
        threading.Timer(0.3, backend.gate.set).start()
        back.run()
        with connected("sync", one.server.port, "grpc") as grpc:
            expected = grpc.forward(LAYER, hidden.astype(BFLOAT16), routing_logits=logits).output
            assert ping.tobytes() == expected.tobytes()
            assert other.call.run().output.tobytes() == other.expected(grpc)
            before = spy.sent
            assert other.call.run().output.tobytes() == other.expected(grpc)
    assert spy.sent == before + 1


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("when", ["in flight", "before"])
def test_a_stream_that_breaks(flavour: str, spy: Spy, when: str) -> None:
    """The request is sent again on the next stream, and all after, as ordinary arrays are until new ones are made."""
    backend = SteeredBackend()
    backend.gate.set()
    with running(backend) as one, connected(flavour, one.server.port, retry=QUICK) as driver:
        mine = InPlace(driver, 32)
        with connected("sync", one.server.port, "grpc") as grpc:
            expected = mine.expected(grpc)
        assert mine.run().output.tobytes() == expected
        backend.started = threading.Semaphore(0)
        first = stream_of(driver)

        def break_it() -> None:
            if when == "in flight":
                backend.wait_started()
            break_off(first, flavour)
            backend.gate.set()

        breaker = threading.Thread(target=break_it)
        if when == "in flight":
            backend.gate.clear()
            breaker.start()
        else:
            breaker.start()
            driver.run(asyncio.to_thread(breaker.join, PATIENCE_S) if flavour == "async" else None)
            breaker.join(PATIENCE_S)
        for _ in range(3):
            mine.out[...] = -77
            assert mine.run().output is mine.out
            assert mine.out.tobytes() == expected
        breaker.join(PATIENCE_S)
        assert stream_of(driver) is not first
        assert spy.sent == 1 + (when == "in flight")
        again = InPlace(driver, 32)
        before = spy.sent
        assert again.run().output.tobytes() == expected
        assert spy.sent == before + 1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_that_is_replaced(flavour: str) -> None:
    """Its client waits for the next one, and goes on there."""
    hidden, logits = values(40)
    with running() as one:
        port = one.server.port
        retry = expertd.RetryPolicy(max_attempts=1000, initial_backoff_s=0.05, max_backoff_s=0.1)
        driver = Driver(flavour, expertd.ClientConfig(f"127.0.0.1:{port}", timeout_s=PATIENCE_S, retry=retry))
        mine, shared, out = lent(driver, hidden), lent(driver, logits), an_out(driver, 40)
        call = driver.prepare(LAYER, mine, routing_logits=shared, out=out)
        expected = driver.run(call.run()).output.tobytes()
    out[...] = -77
    with running(port=port):
        result = driver.run(call.run())
        assert result.output is out
        assert out.tobytes() == expected
        driver.shut()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_draining_server_is_left(flavour: str, spy: Spy) -> None:
    """Whose answer to a standing request says so."""
    with running() as one, connected(flavour, one.server.port) as driver:
        mine = InPlace(driver, 5)
        mine.run()
        stream = stream_of(driver)
        answer = pb.ForwardStreamResponse(error=pb.StreamError(code=14, message="I drain"))
        intercept(stream, lambda data: data[STANDING_KEY] + answer.SerializeToString())
        with pytest.raises(expertd.UnavailableError, match="I drain"):
            mine.run()
        assert not stream.is_open
        assert mine.run().output is mine.out
    assert (spy.sent, spy.refused) == (2, 1)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_request_that_was_refused_is_sent_again(flavour: str, spy: Spy) -> None:
    """The queue is full until the gate is open."""
    backend = SteeredBackend()
    options: dict[str, Any] = {"max_batch_tokens": 32, "max_queue_tokens": 32}
    retry = expertd.RetryPolicy(max_attempts=1000, initial_backoff_s=0.01, max_backoff_s=0.05)
    hidden, logits = values(32)
    with (
        running(backend, **options) as one,
        connected("sync", one.server.port) as other,
        connected(flavour, one.server.port, retry=retry) as driver,
        connected(flavour, one.server.port) as impatient,
    ):
        mine, hasty = InPlace(driver, 32), InPlace(impatient, 32)
        fillers = [
            threading.Thread(target=other.forward, args=(LAYER, hidden), kwargs={"routing_logits": logits})
            for _ in range(2)
        ]
        fillers[0].start()
        backend.wait_started()
        fillers[1].start()
        eventually(lambda: one.server.engine.batcher.queue_requests, 1)
        with pytest.raises(expertd.OverloadedError):
            hasty.run()

        def open_later() -> None:
            eventually(lambda: spy.placed > 6, True)
            backend.gate.set()

        opener = threading.Thread(target=open_later)
        opener.start()
        result = mine.run()
        for thread in (*fillers, opener):
            thread.join(PATIENCE_S)
        expected = driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
        assert result.output.tobytes() == expected
        assert hasty.run().output.tobytes() == expected
    assert spy.sent == 3


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_versions_of_the_weights(flavour: str, spy: Spy) -> None:
    """Those that come are answered with, one that was asked for is insisted on, and one that has gone is missed."""
    with running(**ADMIN) as one, admin_of(one) as admin, connected(flavour, one.server.port) as driver:
        newest, first = InPlace(driver, 5), InPlace(driver, 5, weights_version=1)
        before = newest.run().output.tobytes()
        admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)
        admin.swap_weights(LAYER, 2)
        for _ in range(3):
            result = newest.run()
            assert result.weights_version == 2
            assert newest.out.tobytes() != before
            assert first.run().weights_version == 1
            assert first.out.tobytes() == before
        admin.unload_layer(LAYER, 1)
        with pytest.raises(expertd.VersionNotHeldError):
            first.run()
        assert newest.run().weights_version == 2
    assert (spy.sent, spy.refused) == (9, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_layer_that_is_unloaded(flavour: str) -> None:
    with running(**ADMIN) as one, admin_of(one) as admin, connected(flavour, one.server.port) as driver:
        mine = InPlace(driver, 5)
        mine.run()
        admin.unload_layer(LAYER)
        with pytest.raises(expertd.LayerNotFoundError):
            mine.run()


@pytest.mark.parametrize("when", ["in flight", "before"])
def test_close(when: str) -> None:
    backend = SteeredBackend()
    with running(backend) as one, connected("sync", one.server.port) as driver:
        mine, idle = InPlace(driver, 5), InPlace(driver, 5)
        begin_s = time.monotonic()
        if when == "in flight":
            threading.Timer(0.3, driver.client.close).start()
            mine.call.start()
            with pytest.raises(expertd.ClosedError):
                mine.call.wait()
            mine.out[...] = 6
            backend.gate.set()
            assert (mine.out == 6).all()
        else:
            driver.client.close()
        with pytest.raises(expertd.ClosedError):
            idle.call.run()
        idle.call.start()
        with pytest.raises(expertd.ClosedError):
            idle.call.wait()
        assert time.monotonic() - begin_s < SOON_S


def test_an_interrupt_abandons_what_is_in_flight(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    backend = SteeredBackend()
    with running(backend) as one, connected("sync", one.server.port) as driver:
        mine = InPlace(driver, 5)
        with monkeypatch.context() as patch:

            def interrupted(*_: Any) -> None:
                backend.wait_started()
                raise KeyboardInterrupt

            patch.setattr(_Stream, "settle_standing", interrupted)
            with pytest.raises(KeyboardInterrupt):
                mine.call.run()
        mine.out[...] = 6
        backend.gate.set()
        eventually(lambda: len(stream_of(driver)._placed), 0)
        assert (mine.out == 6).all()
        assert driver.client._slots._free == driver.client.config.max_in_flight
        with connected("sync", one.server.port, "grpc") as grpc:
            assert mine.call.run().output.tobytes() == mine.expected(grpc)


@pytest.mark.parametrize("how", ["run", "start"])
def test_an_interrupt_before_it_is_sent_leaves_the_call_as_it_was(
    how: str, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, logits = values(5)
    with connected("sync", server.server.port, "grpc") as driver:
        call = driver.prepare(LAYER, hidden, routing_logits=logits)
        with monkeypatch.context() as patch:

            def interrupted(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(driver.client._transport, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                getattr(call, how)()
        assert not driver.client._pipelines
        assert call.run().output.shape == (5, HIDDEN_SIZE)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nonsense_in_an_answer_breaks_the_stream(flavour: str, server: Running) -> None:
    with connected(flavour, server.server.port) as driver:
        mine = InPlace(driver, 5)
        expected = mine.run().output.tobytes()
        stream = stream_of(driver)
        intercept(stream, lambda data: data[STANDING_KEY] + b"\xff" * 30)
        with pytest.raises(expertd.ProtocolError):
            mine.run()
        eventually(while_it_runs(driver, lambda: stream.is_open), False)
        assert mine.run().output.tobytes() == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_answer_in_other_words(flavour: str, server: Running) -> None:
    """Its id comes last, as protobuf allows."""
    with connected(flavour, server.server.port) as driver:
        mine = InPlace(driver, 5)
        mine.run()
        turned = []

        def turn(data: bytes) -> bytes:
            turned.append(data)
            stop = STANDING_KEY.stop
            return data[stop:] + data[:stop]

        intercept(stream_of(driver), turn)
        result = mine.run()
        assert len(turned) == 1
        assert result.output is mine.out


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_memory_of_others_in_an_answer_is_refused(flavour: str, server: Running) -> None:
    with connected(flavour, server.server.port) as driver:
        mine, other = InPlace(driver, 5), InPlace(driver, 5)
        mine.run()

        def lie(data: bytes) -> bytes:
            message = pb.ForwardStreamResponse.FromString(data)
            message.response.output.slice.offset = other.call._standing.placed.offset
            return message.SerializeToString()

        intercept(stream_of(driver), lie)
        with pytest.raises(expertd.ProtocolError, match="outside of the request's answer_slice"):
            mine.run()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("what", ["refused", "draining", "nonsense", "late"])
def test_an_error_and_its_arrays_are_let_go(flavour: str, what: str, server: Running) -> None:
    """At once: no cycle keeps them."""
    refusals = {
        "refused": pb.ForwardStreamResponse(error=pb.StreamError(code=3, message="no")).SerializeToString(),
        "draining": pb.ForwardStreamResponse(error=pb.StreamError(code=14, message="no")).SerializeToString(),
        "nonsense": b"\xff" * 30,
    }

    def fail(driver: Driver) -> list[weakref.ref[Any]]:
        mine = InPlace(driver, 5, **({"timeout_s": 0.1} if what == "late" else {}))
        if what == "late":
            intercept(stream_of(driver), lambda data: data if len(data) < 20 else b"")
        else:
            intercept(stream_of(driver), lambda data: data[STANDING_KEY] + refusals[what])
        call, references = mine.call, [weakref.ref(mine), weakref.ref(mine.call)]
        del mine

        async def fail_async() -> None:
            try:
                await call.run()
            except expertd.ExpertdError as error:
                references.append(weakref.ref(error))

        if flavour == "async":
            driver.run(fail_async())
        else:
            try:
                call.run()
            except expertd.ExpertdError as error:
                references.append(weakref.ref(error))
        assert len(references) == 3
        return references

    gc.collect()
    gc.disable()
    try:
        with connected(flavour, server.server.port) as driver:
            references = fail(driver)
            eventually(while_it_runs(driver, lambda: [each() for each in references if each() is not None]), [])
    finally:
        gc.enable()


def test_nothing_is_left_of_them(server: Running) -> None:
    """Neither of those that are let go of in flight."""
    forget_tests_before()
    eventually(mapped_regions, 0)
    with connected("sync", server.server.port) as driver:
        mine = InPlace(driver, 5)
        mine.call.run()
        mine.call.start()
        free = stream_of(driver)._memory._arena._free
        del mine
        again = InPlace(driver, 5)
        again.call.run()
        assert driver.client._slots._free == driver.client.config.max_in_flight
        del again
        forget_tests_before()
        driver.empty(5, "float32")
        assert stream_of(driver)._memory._arena._free > free
    del driver
    forget_tests_before()
    eventually(mapped_regions, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_front_ends(flavour: str, spy: Spy) -> None:
    with split(2) as servers:
        for port in servers.ports:
            with connected(flavour, port) as driver, connected(flavour, port, "grpc") as grpc:
                mine = InPlace(driver, 50)
                for seed in range(3):
                    mine.hidden[...], mine.logits[...] = values(50, seed)
                    assert mine.run().output.tobytes() == mine.expected(grpc)
    assert spy.sent == 6


def test_ids_are_those_of_protobuf() -> None:
    for request_id in (FIRST_STANDING_ID, FIRST_STANDING_ID + 1, 2**56 - 1, FIRST_STANDING_ID + 2**31 + 77):
        data = pb.ForwardStreamResponse(id=request_id).SerializeToString()
        assert data == data[STANDING_KEY] == key_of(request_id)


def test_many_tasks(server: Running, spy: Spy) -> None:
    """Each with calls of its own, fewer places than tasks, and one that two tasks run at a time."""
    port = server.server.port

    async def scenario(many: list[InPlace], expected: list[bytes], shared: Any) -> None:
        async def ask(number: int) -> None:
            for _ in range(20):
                output = (await many[number].call.run()).output
                assert output.tobytes() == expected[number]
                assert (await shared.run()).output.tobytes() == expected[0]

        await asyncio.gather(*(ask(number) for number in range(len(many))))

    with connected("async", port, max_in_flight=3) as driver, connected("sync", port, "grpc") as grpc:
        many = [InPlace(driver, 1 + seed, seed) for seed in range(6)]
        expected = [mine.expected(grpc) for mine in many]
        shared = driver.prepare(LAYER, many[0].hidden, routing_logits=many[0].logits)
        driver.run(scenario(many, expected, shared))
        assert not stream_of(driver)._standing
    assert spy.sent == 120


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_task_that_is(how: str, spy: Spy) -> None:
    """It gets the array back at once."""
    backend = SteeredBackend()

    async def scenario(driver: Driver, mine: InPlace) -> None:
        task = asyncio.create_task(mine.call.run())
        await asyncio.to_thread(backend.wait_started)
        if how == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await driver.client.close()
            with pytest.raises(expertd.ClosedError):
                await task
        mine.out[...] = 5
        backend.gate.set()
        if how == "cancelled":
            while stream_of(driver)._placed:
                await asyncio.sleep(0.01)
        assert (mine.out == 5).all()

    with running(backend) as one, connected("async", one.server.port) as driver:
        mine = InPlace(driver, 5)
        driver.run(asyncio.wait_for(scenario(driver, mine), PATIENCE_S))
        if how == "cancelled":
            with connected("sync", one.server.port, "grpc") as grpc:
                assert mine.run().output.tobytes() == mine.expected(grpc)
        else:
            with pytest.raises(expertd.ClosedError):
                mine.run()
    assert spy.sent == 1


def test_a_task_that_waits_for_a_place_and_goes_another_way_has_one_deadline(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout_s = 1.0

    async def scenario(driver: Driver, mine: InPlace) -> float:
        begin_s = time.monotonic()
        await driver.client._places.acquire()
        task = asyncio.create_task(mine.call.run())
        await asyncio.sleep(0.7 * timeout_s)
        driver.client._places.release()
        with pytest.raises(expertd.TimeoutError, match="no answer within 1 s"):
            await task
        return time.monotonic() - begin_s

    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    with connected("async", server.server.port, max_in_flight=1) as driver:
        mine = InPlace(driver, 5, timeout_s=timeout_s)
        monkeypatch.setattr(_AsyncStream, "send_standing", lambda *_: False)
        monkeypatch.setattr(_AsyncStream, "forward", never)
        took_s = driver.run(asyncio.wait_for(scenario(driver, mine), PATIENCE_S))
    assert took_s < 1.5 * timeout_s
