"""A front-end and the engine's gate in one process, with an engine that a test answers for."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import struct
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from time import monotonic
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from google.rpc import code_pb2, error_details_pb2

from expertd.v1 import expertd_pb2 as pb
from expertd_server import blocks, gate, remote, result_blocks, ring
from expertd_server.backend import PreparedLayer
from expertd_server.backend_noop import NoopBackend
from expertd_server.blocks import (
    read_answer,
)
from expertd_server.engine import ForwardCall, ForwardResult, ForwardTiming
from expertd_server.errors import (
    ExpertdServerError,
    FieldViolation,
    InvalidArgumentError,
    OverloadedError,
    RequestTimeoutError,
    UnavailableError,
)
from expertd_server.event_loop import EventLoop
from expertd_server.gate import EngineGate
from expertd_server.layer import MoELayer
from expertd_server.remote import EngineState, Hello, RemoteEngine
from expertd_server.remote_codec import RemoteAnswer, RemoteCall
from expertd_server.remote_layer import RemoteLayer
from expertd_server.ring import ALIGNMENT_BYTES
from expertd_server.status import RelayedError, status_of
from expertd_server.store import LayerStore
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights
from expertd_server.wire import TORCH_DTYPES
from expertd_server.wire import call_of as engine_call_of
from expertd_server.wire_answer import AnswerTensor, layer_info

PATIENCE_S = 30.0
ARENA_BYTES = 64 * ALIGNMENT_BYTES
MAX_REQUESTS = 8
HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 64, 8, 2
TIMING = ForwardTiming(1, 2, 3, 4, 5, 6)


def a_layer(name: str = "a", version: int = 1) -> MoELayer:
    spec = LayerSpec(hidden_size=HIDDEN_SIZE, intermediate_size=32, num_experts=NUM_EXPERTS, top_k=TOP_K)
    nothing = torch.empty(0)
    weights = ExpertWeights(nothing, nothing, nothing, nothing, nothing, hidden_states_scale=2.0)
    return MoELayer(name, PreparedLayer(spec, weights, 1000, None), NoopBackend(), version, weights_fingerprint=7)


def test_a_front_end_describes_a_layer_as_the_engine_would() -> None:
    layer = a_layer()
    remote = pickle.loads(pickle.dumps(RemoteLayer.of(layer, 1, is_current=True)))
    assert layer_info(remote, [1]) == layer_info(layer, [1])
    assert layer_info(remote, [1]).weights_fingerprint == 7


class Answering(Future[Any]):
    """What an engine does with a result: the call's own encode makes of it what its caller gets."""

    def __init__(self, call: ForwardCall) -> None:
        super().__init__()
        self._encode = call.encode

    def set_result(self, result: ForwardResult) -> None:
        encode, self._encode = self._encode, None
        try:
            answer = result if encode is None else encode(result)
        except Exception as error:
            self.set_exception(error)
        else:
            super().set_result(answer)


class FakeEngine:
    """Keeps what is submitted, for the test to answer."""

    is_idle = True

    def __init__(self) -> None:
        self.queue_tokens = 0
        self.calls: list[tuple[ForwardCall, float | None]] = []
        self.futures: list[Answering] = []
        self.refusal: Exception | None = None
        self._changed = threading.Condition()

    def submit(self, call: ForwardCall, deadline_s: float | None = None) -> Answering:
        if self.refusal is not None:
            raise self.refusal
        with self._changed:
            self.calls.append((call, deadline_s))
            self.futures.append(Answering(call))
            self._changed.notify_all()
        return self.futures[-1]

    def hurry(self) -> None:
        """The test decides when."""

    def wait(self, count: int) -> Answering:
        """The count-th call's future, once it has come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.futures) >= count, PATIENCE_S), "the call never came"
        return self.futures[count - 1]


class Side:
    """A front-end's side: the remote engine, and the states it was told."""

    def __init__(self, name: str, mailbox: socket.socket) -> None:
        self.states: list[EngineState | None] = []
        self._changed = threading.Condition()
        self.remote = RemoteEngine(
            name, mailbox, arena_bytes=ARENA_BYTES, max_requests=MAX_REQUESTS, on_state=self._on_state
        )
        self.remote.start()

    def _on_state(self, state: EngineState | None) -> None:
        with self._changed:
            self.states.append(state)
            self._changed.notify_all()

    def wait_serving(self, serving: bool = True) -> None:
        def is_so() -> bool:
            state = self.states[-1] if self.states else None
            return (state is not None and not state.is_loading) == serving and bool(self.states)

        with self._changed:
            assert self._changed.wait_for(is_so, PATIENCE_S), self.states
        if serving:
            until_s = monotonic() + PATIENCE_S
            while self.remote._link is None:
                assert monotonic() < until_s

    def layer(self, name: str = "a") -> RemoteLayer:
        """The newest that was told under a name."""
        state = self.states[-1]
        assert state is not None
        return [one for one in state.layers if one.name == name][-1]

    def call(self, num_tokens: int = 3, **options: bool) -> RemoteCall:
        return call_of(self.layer(), num_tokens, **options)

    def is_arena_free(self) -> bool:
        link = self.remote._link
        assert link is not None
        return link._arena.free_bytes() == ARENA_BYTES

    def wait_arena_free(self) -> None:
        until_s = monotonic() + PATIENCE_S
        while not self.is_arena_free():
            assert monotonic() < until_s, "blocks are still held"


class Rig:
    """One gate, any number of front-ends, one mailbox."""

    def __init__(self) -> None:
        self.inlet, self.outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.engine = FakeEngine()
        self.store = LayerStore()
        self.gate = self._gate()
        self.sides: list[Side] = []

    def _gate(self) -> EngineGate:
        gate = EngineGate(self.engine, self.store, self.outlet, backend="fake", device="none")
        gate.start()
        return gate

    def restart(self) -> None:
        self.gate.close()
        self.engine = FakeEngine()
        self.store = LayerStore()
        self.gate = self._gate()

    def publish(self, *layers: MoELayer, timeout_s: float = PATIENCE_S) -> bool:
        self.store.replace([(layer, True) for layer in layers], is_loading=False)
        return self.gate.publish(timeout_s)

    def side(self) -> Side:
        """A front-end that serves."""
        if not self.store.all_held():
            self.publish(a_layer(), timeout_s=0)
        side = Side(f"frontend-{len(self.sides)}", self.inlet)
        self.sides.append(side)
        side.wait_serving()
        return side

    def close(self) -> None:
        for side in self.sides:
            assert side.remote.stop(PATIENCE_S)
        self.gate.close()
        self.inlet.close()
        self.outlet.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with a_rig() as rig:
        yield rig


@contextmanager
def a_rig() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


def call_of(layer: RemoteLayer, num_tokens: int, *, return_routing: bool = False) -> RemoteCall:
    hidden_states = np.arange(num_tokens * HIDDEN_SIZE, dtype="<f4").tobytes()
    logits = np.full(num_tokens * NUM_EXPERTS, 0x3F80, "<u2").tobytes()  # bfloat16 ones
    parts = (pb.DATA_TYPE_FLOAT32, hidden_states), (pb.DATA_TYPE_BFLOAT16, logits), None, None
    return RemoteCall(layer, (num_tokens, *parts, pb.DATA_TYPE_BFLOAT16, True, return_routing), to_result)


def to_result(answer: RemoteAnswer) -> ForwardResult:
    """The answer in memory of its own."""
    tensors = (to_tensor(tensor) for tensor in read_answer(answer.block.view))
    return ForwardResult(answer.weights_version, answer.timing, *tensors)


def to_tensor(written: AnswerTensor | None) -> torch.Tensor | None:
    if written is None:
        return None
    dtype, shape, data = written
    return of_bytes(np.frombuffer(data, np.uint8).copy(), TORCH_DTYPES[dtype], shape)


def of_bytes(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:  # type: ignore[type-arg]
    # torch gives no other type to what is empty.
    return torch.from_numpy(data).view(dtype).view(shape) if data.size else torch.empty(shape, dtype=dtype)


def result_of(num_tokens: int, value: float = 1.0) -> ForwardResult:
    return ForwardResult(7, TIMING, output=torch.full((num_tokens, HIDDEN_SIZE), value, dtype=torch.bfloat16))


def is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class TestCalls:
    def test_a_call_and_its_answer_cross(self, rig: Rig) -> None:
        side = rig.side()
        asked = side.call(5, return_routing=True)
        future = side.remote.submit(asked, 12.5)
        rig.engine.wait(1)
        call, deadline_s = rig.engine.calls[0]
        assert deadline_s == 12.5
        meant = engine_call_of(call.layer, asked.request)
        assert call.layer.name == "a"
        assert (call.hidden_states, call.routing_logits) == (meant.hidden_states, meant.routing_logits)
        assert (call.topk_ids, call.output_dtype, call.return_routing) == (None, torch.bfloat16, True)
        rig.engine.queue_tokens = 99
        rig.engine.futures[0].set_result(result_of(5))
        result = future.result(PATIENCE_S)
        assert is_same(result.output, result_of(5).output)
        assert (result.weights_version, result.timing, side.remote.queue_tokens) == (7, TIMING, 99)
        rig.engine.calls.clear()
        del call, meant, result, future
        side.wait_arena_free()

    def test_answers_come_in_any_order_and_each_to_its_own(self, rig: Rig) -> None:
        sides = [rig.side(), rig.side()]
        futures = [(number, side.remote.submit(side.call(number + 1))) for number in range(4) for side in sides]
        rig.engine.wait(8)
        for call, done in zip(reversed(rig.engine.calls), reversed(rig.engine.futures), strict=True):
            done.set_result(result_of(call[0].num_tokens, call[0].num_tokens))
        for number, future in futures:
            assert is_same(future.result(PATIENCE_S).output, result_of(number + 1, number + 1).output)

    def test_blocks_are_used_again(self, rig: Rig) -> None:
        side = rig.side()
        link = side.remote._link
        assert link is not None
        for number in range(1, 1001):
            future = side.remote.submit(side.call(1 + number % 50))
            rig.engine.wait(number).set_result(result_of(1 + number % 50, number))
            assert future.result(PATIENCE_S).output is not None
            rig.engine.calls.clear()
        del future
        side.wait_arena_free()
        assert not link._waiting

    def test_what_is_asked_of_a_layer_that_has_gone_is_told_to_come_again(self, rig: Rig) -> None:
        side = rig.side()
        stale = side.call()
        assert rig.publish(a_layer("b")), "all have applied it"
        assert [one.name for one in side.states[-1].layers] == ["b"]  # type: ignore[union-attr]
        with pytest.raises(RelayedError) as caught:
            side.remote.submit(stale).result(PATIENCE_S)
        assert status_of(caught.value).code == code_pb2.UNAVAILABLE
        assert retry_delay_s(caught.value) is not None

    def test_a_layer_keeps_its_identity_over_states(self, rig: Rig) -> None:
        side = rig.side()
        held = a_layer("kept")
        rig.publish(held)
        before = call_of(side.layer("kept"), 1)
        rig.publish(held, a_layer("other"))
        future = side.remote.submit(before)
        rig.engine.wait(1).set_result(result_of(1))
        future.result(PATIENCE_S)
        assert rig.engine.calls[0][0].layer is held


def test_where_nothing_was_compiled_python_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "Ring", ring.PythonRing)
    monkeypatch.setattr(remote, "Arena", ring.PythonArena)
    monkeypatch.setattr(remote, "block_bytes", blocks._block_bytes)
    monkeypatch.setattr(remote, "write_call", blocks._write_call)
    monkeypatch.setattr(gate, "read_call", blocks._read_call)
    monkeypatch.setattr(result_blocks, "BLOCKS", None)
    with a_rig() as rig:
        side = rig.side()
        asked = [side.call(number + 1) for number in range(4)]
        futures = [side.remote.submit(call) for call in asked]
        rig.engine.wait(4)
        assert futures[3].cancel()
        wait_for(rig.engine.futures[3].cancelled)
        rig.engine.futures[2].set_exception(RequestTimeoutError("too late"))
        for number in (1, 0):
            call = rig.engine.calls[number][0]
            assert call.hidden_states == engine_call_of(call.layer, asked[number].request).hidden_states
            rig.engine.futures[number].set_result(result_of(number + 1, number))
        for number in (0, 1):
            assert is_same(futures[number].result(PATIENCE_S).output, result_of(number + 1, number).output)
        with pytest.raises(RelayedError):
            futures[2].result(PATIENCE_S)
        rig.engine.calls.clear()
        del call, futures
        side.wait_arena_free()


class TestErrors:
    @pytest.mark.parametrize("when", ["refused", "failed"])
    @pytest.mark.parametrize(
        "error",
        [
            InvalidArgumentError([FieldViolation("x.shape", "is bad"), FieldViolation("y", "is worse")]),
            OverloadedError("full", 0.25),
            UnavailableError("draining"),
            UnavailableError("starting", 1.5),
            RequestTimeoutError("too late"),
            InvalidArgumentError([FieldViolation("f" * 1000, "d" * 9000)]),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_errors_cross_with_all_their_details(self, rig: Rig, error: ExpertdServerError, when: str) -> None:
        side = rig.side()
        if when == "refused":
            rig.engine.refusal = error
        future = side.remote.submit(side.call())
        if when == "failed":
            rig.engine.wait(1).set_exception(error)
        with pytest.raises(RelayedError) as caught:
            future.result(PATIENCE_S)
        expected = status_of(error)
        if expected.ByteSize() > 8192:
            expected.ClearField("details")
        assert status_of(caught.value) == expected
        del future, caught
        rig.engine.calls.clear()
        side.wait_arena_free()

    @pytest.mark.parametrize("when", ["refused", "failed"])
    def test_an_unforeseen_error_is_logged_where_it_happened_and_not_told(
        self, rig: Rig, when: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        side = rig.side()
        if when == "refused":
            rig.engine.refusal = RuntimeError("secret")
        future = side.remote.submit(side.call())
        if when == "failed":
            rig.engine.wait(1).set_exception(RuntimeError("secret"))
        with pytest.raises(RelayedError) as caught:
            future.result(PATIENCE_S)
        status = status_of(caught.value, "request-7")
        assert status.code == code_pb2.INTERNAL
        assert "secret" not in str(status)
        incident = status.message.split()[2].rstrip(";")
        assert "secret" in caplog.text
        assert any(incident in line and "request-7" in line for line in caplog.text.splitlines()), caplog.text

    @pytest.mark.parametrize("when", ["cancelled", "failed"])
    def test_what_fails_leaves_no_cycle(self, rig: Rig, when: str) -> None:
        side = rig.side()
        gc.collect()
        gc.disable()
        try:
            future = side.remote.submit(side.call())
            inner = weakref.ref(rig.engine.wait(1))
            if when == "failed":
                rig.engine.futures.pop().set_exception(RequestTimeoutError("too late"))
            else:
                rig.engine.futures.pop().cancel()
            with pytest.raises(RelayedError):
                future.result(PATIENCE_S)
            wait_for(lambda: inner() is None)
        finally:
            gc.enable()

    def test_an_answer_that_does_not_fit_fails_alone(self, rig: Rig) -> None:
        side = rig.side()
        future = side.remote.submit(side.call(1))
        rig.engine.wait(1).set_result(result_of(1000))
        with pytest.raises(RelayedError) as caught:
            future.result(PATIENCE_S)
        assert status_of(caught.value).code == code_pb2.INTERNAL
        again = side.remote.submit(side.call(1))
        rig.engine.wait(2).set_result(result_of(1))
        again.result(PATIENCE_S)


class TestCancelling:
    def test_a_call_that_waits_is_taken_back(self, rig: Rig) -> None:
        side = rig.side()
        future = side.remote.submit(side.call())
        inner = rig.engine.wait(1)
        assert future.cancel()
        wait_for(inner.cancelled)
        del future
        rig.engine.calls.clear()
        side.wait_arena_free()

    def test_a_call_that_runs_keeps_its_memory_until_it_has_run(self, rig: Rig) -> None:
        side = rig.side()
        future = side.remote.submit(side.call())
        inner = rig.engine.wait(1)
        assert inner.set_running_or_notify_cancel()
        assert future.cancel()
        side.remote.submit(side.call())
        rig.engine.wait(2).set_result(result_of(3))  # and the cancellation that came before it was read too
        assert not side.is_arena_free()
        inner.set_result(result_of(3))
        rig.engine.calls.clear()
        side.wait_arena_free()

    def test_cancelling_races_with_answering(self, rig: Rig) -> None:
        side = rig.side()
        link = side.remote._link
        assert link is not None
        for number in range(1, 301):
            future = side.remote.submit(side.call())
            inner = rig.engine.wait(number)
            if not inner.set_running_or_notify_cancel():
                continue
            answerer = threading.Thread(target=inner.set_result, args=(result_of(3),))
            answerer.start()
            future.cancel()
            answerer.join(PATIENCE_S)
            assert link.wait_idle(PATIENCE_S)
        rig.engine.calls.clear()
        del future
        side.wait_arena_free()
        assert not link._waiting


class TestLimits:
    def test_a_full_arena_makes_wait_and_then_refuses(self, rig: Rig) -> None:
        side = rig.side()
        large = 256  # tokens, of 64 KiB and some
        futures = [side.remote.submit(side.call(large)) for _ in range(3)]
        with pytest.raises(RequestTimeoutError):
            side.remote.submit(side.call(large), monotonic() + 0.01).result(PATIENCE_S)
        with pytest.raises(RequestTimeoutError):
            side.remote.submit(side.call(large), monotonic() - 1).result(PATIENCE_S)
        with pytest.raises(OverloadedError, match="frontend_arena_bytes"):
            side.remote.submit(call_of(side.layer(), 2000))
        with pytest.raises(OverloadedError, match="frontend_arena_bytes"):
            side.remote.submit(side.call(large), monotonic() + 1000).result(PATIENCE_S)
        rig.engine.wait(3)
        large_one = side.remote.submit(side.call(large), monotonic() + 1000)
        small_one = side.remote.submit(side.call(1), monotonic() + 1000)
        rig.engine.futures[0].set_result(result_of(large))
        futures.pop(0).result(PATIENCE_S)
        rig.engine.wait(4).set_result(result_of(large))
        assert large_one.result(PATIENCE_S).output.shape[0] == large, "it waited until there was room"
        del large_one
        rig.engine.wait(5).set_result(result_of(1))
        assert small_one.result(PATIENCE_S).output.shape[0] == 1, "nobody passes by who waits"

    def test_who_leaves_while_it_waits_for_room_is_not_computed(self, rig: Rig) -> None:
        side = rig.side()
        futures = [side.remote.submit(side.call(256)) for _ in range(3)]
        left, stays = side.remote.submit(side.call(256)), side.remote.submit(side.call(1))
        assert left.cancel()
        rig.engine.wait(3).set_result(result_of(256))
        futures.pop().result(PATIENCE_S)
        rig.engine.wait(4).set_result(result_of(1))
        assert stays.result(PATIENCE_S).output.shape[0] == 1

    def test_requests_in_flight_are_bounded(self, rig: Rig) -> None:
        side = rig.side()
        futures = [side.remote.submit(side.call(1)) for _ in range(MAX_REQUESTS)]
        with pytest.raises(OverloadedError, match="in flight"):
            side.remote.submit(side.call(1))
        rig.engine.wait(1).set_result(result_of(1))
        futures[0].result(PATIENCE_S)
        side.remote.submit(side.call(1))


class TestEnds:
    def test_before_there_is_an_engine_requests_are_told_to_come_back(self, rig: Rig) -> None:
        rig.gate.close()
        side = Side("early", rig.inlet)
        rig.sides.append(side)
        with pytest.raises(UnavailableError) as caught:
            side.remote.submit(call_of(RemoteLayer.of(a_layer(), 0, is_current=True), 1))
        assert caught.value.retry_delay_s is not None
        rig.gate = rig._gate()
        rig.publish(a_layer(), timeout_s=0)
        side.wait_serving()
        future = side.remote.submit(side.call())
        rig.engine.wait(1).set_result(result_of(3))
        future.result(PATIENCE_S)

    def test_when_the_engine_ends_its_requests_fail_and_the_next_serves(self, rig: Rig) -> None:
        side = rig.side()
        stale = side.call()
        futures = [side.remote.submit(stale) for _ in range(3)]
        rig.engine.wait(3)
        rig.restart()
        for future in futures:
            with pytest.raises(UnavailableError) as caught:
                future.result(PATIENCE_S)
            assert caught.value.retry_delay_s is not None
        side.wait_serving(False)
        rig.publish(a_layer(), timeout_s=0)
        side.wait_serving()
        with pytest.raises(RelayedError):
            side.remote.submit(stale).result(PATIENCE_S)  # never another layer that happens to have its number
        future = side.remote.submit(side.call())
        rig.engine.wait(1).set_result(result_of(3))
        future.result(PATIENCE_S)

    @pytest.mark.parametrize("is_closed", [False, True])
    def test_who_listened_in_an_event_loop_stops_whether_or_not_that_still_runs(self, is_closed: bool) -> None:
        """A front-end's thread may outlive the loop by a moment."""
        loop, fd = EventLoop(), os.eventfd(0)
        loop.soon(partial(loop.loop.add_reader, fd, lambda: None))
        try:
            if is_closed:
                loop.loop.call_soon_threadsafe(loop.loop.stop)
                loop._thread.join(PATIENCE_S)
                assert loop.loop.is_closed()
            remote._Link._hear_no_more(fd, loop)
            if not is_closed:
                assert not loop.loop.remove_reader(fd), "it is gone already"
        finally:
            if not is_closed:
                loop.loop.call_soon_threadsafe(loop.loop.stop)
                loop._thread.join(PATIENCE_S)
            os.close(fd)

    def test_answers_are_looked_for_where_requests_have_come_one_by_one_for_a_while(self, rig: Rig) -> None:
        side = rig.side()
        link = side.remote._link
        assert link is not None
        turns: list[object] = []
        number = 0

        def is_looked_for(in_flight: int) -> bool:
            """Of requests at once: whether the loop was asked to look for an answer."""
            nonlocal number
            turns.clear()
            futures = []
            for _ in range(in_flight):
                futures.append(side.remote.submit(side.call(), is_last=True))
                side.remote.hurry()
            for future in futures:
                number += 1
                rig.engine.wait(number).set_result(result_of(3))
                future.result(PATIENCE_S)
            link._look_until_s = 0.0  # as `_look` leaves it
            return link._look in turns

        link._may_look, link._loop = True, SimpleNamespace(soon=turns.append, is_here=True)  # type: ignore[assignment]
        try:
            for _ in range(2):
                looked = [is_looked_for(1) for _ in range(remote._LEAST_ALONE + 1)]
                assert looked == [False] * (remote._LEAST_ALONE - 1) + [True, True]
                is_looked_for(2)
        finally:
            link._may_look, link._loop = False, None

    def test_when_a_front_end_ends_the_others_go_on(self, rig: Rig) -> None:
        dying, living = rig.side(), rig.side()
        runs, waits = dying.remote.submit(dying.call()), dying.remote.submit(dying.call())
        of_another = living.remote.submit(living.call())
        rig.engine.wait(3)
        running, waiting, other = rig.engine.futures
        assert running.set_running_or_notify_cancel()
        assert dying.remote.stop(PATIENCE_S)
        wait_for(waiting.cancelled)
        running.set_result(result_of(3))  # into memory that nobody else maps any more
        other.set_result(result_of(3))
        assert of_another.result(PATIENCE_S).output is not None
        for future in (runs, waits):
            with pytest.raises(UnavailableError):
                future.result(PATIENCE_S)

    def test_drain_refuses_and_waits(self, rig: Rig) -> None:
        side = rig.side()
        future = side.remote.submit(side.call())
        inner = rig.engine.wait(1)
        assert not side.remote.drain(0.01)
        with pytest.raises(UnavailableError, match="draining"):
            side.remote.submit(side.call())
        inner.set_result(result_of(3))
        assert side.remote.drain(PATIENCE_S)
        assert future.done()

    def test_who_cannot_be_taken_in_harms_nobody_and_leaves_nothing_open(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        side = rig.side()
        before = len(os.listdir("/proc/self/fd"))
        # Nonsense; a memory too small to be mapped; four files; one that is no socket.
        hello = pickle.dumps(Hello("bad", ARENA_BYTES, MAX_REQUESTS))
        cases = [(b"nonsense", (0, 1, 2, 3, 3)), (hello, (0, 1, 2, 3, 3)), (hello, (0, 1, 2, 3))]
        cases += [(hello, (0, 1, 2, 3, 0)), (hello, (0, 1, 2, 0, 3))]
        for number, (data, which) in enumerate(cases, 1):
            mine, theirs = socket.socketpair()
            fds = [os.memfd_create("small"), *(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)), theirs.fileno()]
            socket.send_fds(rig.inlet, [data], [fds[each] for each in which])
            wait_for(lambda number=number: caplog.text.count("cannot take a front-end in") == number)
            for fd in fds[:3]:
                os.close(fd)
            theirs.close()
            assert mine.recv(1) == b"", "its files were closed"
            mine.close()
        assert len(os.listdir("/proc/self/fd")) <= before
        future = side.remote.submit(side.call())
        rig.engine.wait(1).set_result(result_of(3))
        future.result(PATIENCE_S)

    @pytest.mark.parametrize("says", [b"", struct.pack("<Q", 1) + b"?"])
    def test_a_front_end_that_does_not_read_keeps_nobody_waiting(self, rig: Rig, says: bytes) -> None:
        rig.publish(a_layer(), a_layer("x" * 2**20), timeout_s=0)  # more to be told than a socket takes
        side = rig.side()
        channel = ring.Channel.make(ARENA_BYTES, MAX_REQUESTS)
        mine, theirs = socket.socketpair()
        giving, taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine, giving:
            with theirs, taking:
                hello = pickle.dumps(Hello("asleep", ARENA_BYTES, MAX_REQUESTS))
                socket.send_fds(rig.inlet, [hello], [*channel.fds, theirs.fileno(), taking.fileno()])
                channel.close()
            mine.settimeout(PATIENCE_S)
            assert mine.recv(1), "it is being told what is held"
            start_s = monotonic()
            mine.sendall(says)  # perhaps nonsense, for which it is dropped
            wait_for(lambda: not says or len(rig.gate._peers) == 2)
            future = side.remote.submit(side.call())
            rig.engine.wait(1).set_result(result_of(3))
            future.result(PATIENCE_S)
            assert monotonic() - start_s < 2.0

    def test_a_front_end_that_was_not_taken_in_asks_again(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        refusals = [OSError("too many open files")]
        take_in = EngineGate._take_in

        def fail_once(*arguments: Any) -> Any:
            if refusals:
                raise refusals.pop()
            return take_in(*arguments)

        monkeypatch.setattr(EngineGate, "_take_in", fail_once)
        side = rig.side()
        assert not refusals
        future = side.remote.submit(side.call())
        rig.engine.wait(1).set_result(result_of(3))
        future.result(PATIENCE_S)

    def test_the_end_of_the_mailbox_is_seen_once(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        side = rig.side()
        rig.inlet.close()
        wait_for(lambda: "nobody is left" in caplog.text)
        future = side.remote.submit(side.call())
        rig.engine.wait(1).set_result(result_of(3))
        future.result(PATIENCE_S)
        assert caplog.text.count("nobody is left") == 1
        assert "cannot take" not in caplog.text

    def test_coming_and_going_leaves_nothing_open(self) -> None:
        def open_files() -> int:
            gc.collect()
            return len(os.listdir("/proc/self/fd"))

        def mappings() -> int:
            with open("/proc/self/maps") as maps:
                return sum("expertd-frontend" in line for line in maps)

        before = open_files(), mappings()
        for _ in range(3):
            with a_rig() as rig:
                side = rig.side()
                side.remote.submit(side.call())
                rig.engine.wait(1)
                rig.restart()
                rig.side()
                for one in rig.sides:
                    one.states.clear()
            del rig, side, one
        wait_for(lambda: (open_files(), mappings()) == before)


def retry_delay_s(error: RelayedError) -> float | None:
    for detail in error.status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToNanoseconds() / 1e9
    return None


def wait_for(condition: object) -> None:
    """Wait for what no event tells."""
    assert callable(condition)
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    pytest.fail(f"not so within {PATIENCE_S} s")
