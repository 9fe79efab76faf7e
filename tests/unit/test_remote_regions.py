"""Calls in memory that a caller shares with a front-end, from there to the engine and back, without being copied."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_remote import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    PATIENCE_S,
    TIMING,
    FakeEngine,
    Rig,
    Side,
    a_layer,
    a_rig,
    is_same,
    result_of,
    to_result,
    wait_for,
)

from expertd.v1 import expertd_pb2 as pb
from expertd_server import blocks, gate, remote, result_blocks, ring
from expertd_server.blocks import MAX_ERROR_BYTES
from expertd_server.errors import InvalidArgumentError, RequestTimeoutError, UnavailableError
from expertd_server.forward import ForwardResult, Matrix
from expertd_server.native import address_of
from expertd_server.region_handover import RegionTaker, where_of
from expertd_server.remote_codec import RemoteCall
from expertd_server.status import RelayedError

NBYTES = 1 << 18
LOGIT_BYTES, ROW_BYTES = NUM_EXPERTS * 2, HIDDEN_SIZE * 2


@pytest.fixture(params=["as built", "python"])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    if request.param == "python":
        monkeypatch.setattr(ring, "Ring", ring.PythonRing)
        monkeypatch.setattr(remote, "Arena", ring.PythonArena)
        monkeypatch.setattr(remote, "block_bytes", blocks._block_bytes)
        monkeypatch.setattr(remote, "write_call", blocks._write_call)
        monkeypatch.setattr(gate, "read_call", blocks._read_call)
        monkeypatch.setattr(result_blocks, "BLOCKS", None)
    gc.collect()
    wait_for(lambda: not mappings())
    with a_rig() as rig:
        yield rig
    forget(rig.engine)
    gc.collect()
    wait_for(lambda: not mappings())


def mappings() -> int:
    return sum("memfd:test-remote" in line for line in Path("/proc/self/maps").read_text().splitlines())


def map_one(side: Side) -> memoryview:
    """A region of a caller, filled with what nobody has written."""
    fd = os.memfd_create("test-remote", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    view = side.remote.regions.map_file(fd, NBYTES)
    os.close(fd)
    view[:] = b"\xaa" * NBYTES
    return view


def wait_taken(side: Side, view: memoryview) -> memoryview:
    def is_taken() -> bool:
        link = side.remote._link
        return link is not None and where_of(view, link.to_regions) is not None

    wait_for(is_taken)
    return view


def map_taken(side: Side) -> memoryview:
    return wait_taken(side, map_one(side))


def placed(side: Side, view: memoryview, num_tokens: int = 3, start: int = 1000, place: int = 50_000) -> RemoteCall:
    """A call whose hidden states lie in a region, and whose answer goes there."""
    hidden_states = np.arange(num_tokens * HIDDEN_SIZE, dtype="<f4").tobytes()
    view[start : start + len(hidden_states)] = hidden_states
    parts = (
        (pb.DATA_TYPE_FLOAT32, view[start : start + len(hidden_states)]),
        (pb.DATA_TYPE_BFLOAT16, logits(num_tokens)),
    )
    request = num_tokens, *parts, None, None, pb.DATA_TYPE_BFLOAT16, True, False
    return RemoteCall(side.layer(), request, to_placed_result, view[place : place + num_tokens * ROW_BYTES])


def logits(num_tokens: int) -> bytes:
    return np.full(num_tokens * NUM_EXPERTS, 0x3F80, "<u2").tobytes()


def to_placed_result(answer: Any) -> tuple[bool, ForwardResult]:
    """Whether it lay in its place, and the answer in memory of its own."""
    if answer.place is None:
        return False, to_result(answer)
    output = torch.frombuffer(bytearray(answer.place), dtype=torch.bfloat16).view(-1, HIDDEN_SIZE)
    return True, ForwardResult(answer.weights_version, answer.timing, output=output)


def engine_views(rig: Rig) -> list[memoryview]:
    """Of all regions that the gate has."""
    return [view for peer in set(rig.gate._peers.values()) for view in peer.regions.views.values()]


def forget(engine: FakeEngine) -> None:
    engine.calls.clear()
    engine.futures.clear()


def test_neither_hidden_states_nor_output_are_copied(rig: Rig) -> None:
    side = rig.side()
    view = map_taken(side)
    future = side.remote.submit(placed(side, view, 100))
    inner = rig.engine.wait(1)
    call, _ = rig.engine.calls[0]
    (theirs,) = engine_views(rig)
    hidden_states, place = call.hidden_states.data, call.place
    assert isinstance(hidden_states, memoryview)
    assert place is not None
    assert address_of(hidden_states) == address_of(theirs) + 1000
    assert bytes(hidden_states) == np.arange(100 * HIDDEN_SIZE, dtype="<f4").tobytes()
    assert (address_of(place), len(place)) == (address_of(theirs) + 50_000, 100 * ROW_BYTES)
    assert call.routing_logits is not None
    assert bytes(call.routing_logits.data) == logits(100), "these were checked, and lie where nobody changes them"
    assert address_of(call.routing_logits.data) not in range(address_of(theirs), address_of(theirs) + NBYTES)
    inner.set_result(result_of(100))
    is_placed, result = future.result(PATIENCE_S)
    assert is_placed
    assert is_same(result.output, result_of(100).output)
    assert (result.weights_version, result.timing) == (7, TIMING)
    after = bytes(view)
    assert after[50_000 : 50_000 + 100 * ROW_BYTES] == result_of(100).output.view(torch.uint8).numpy().tobytes()  # type: ignore[union-attr]
    untouched = after[:1000] + after[1000 + 100 * HIDDEN_SIZE * 4 : 50_000] + after[50_000 + 100 * ROW_BYTES :]
    assert untouched == b"\xaa" * len(untouched)
    del call, hidden_states, place, theirs, future
    forget(rig.engine)
    side.wait_arena_free()


def test_an_answer_over_its_request(rig: Rig) -> None:
    side = rig.side()
    view = map_taken(side)
    for number in range(1, 51):
        future = side.remote.submit(placed(side, view, 1 + number % 7, place=1000))
        rig.engine.wait(number).set_result(result_of(1 + number % 7, number))
        is_placed, result = future.result(PATIENCE_S)
        assert is_placed
        assert is_same(result.output, result_of(1 + number % 7, number).output)
        rig.engine.calls.clear()


def test_an_output_that_a_device_has_put_in_its_place_stays_as_it_is(rig: Rig) -> None:
    side = rig.side()
    view = map_taken(side)
    future = side.remote.submit(placed(side, view))
    inner = rig.engine.wait(1)
    place = rig.engine.calls[0][0].place
    assert place is not None
    place[:] = bytes(range(128)) * 3
    result = ForwardResult(7, TIMING)
    result.lies_at(Matrix(torch.bfloat16, 3, HIDDEN_SIZE, address_of(place)), place)
    inner.set_result(result)
    assert future.result(PATIENCE_S)[0]
    assert bytes(view[50_000:][: 3 * ROW_BYTES]) == bytes(range(128)) * 3
    del place, result
    forget(rig.engine)


def test_the_arena_keeps_little_of_them(rig: Rig) -> None:
    side = rig.side()
    view = map_taken(side)
    link = side.remote._link
    assert link is not None
    future = side.remote.submit(placed(side, view, 300))
    rig.engine.wait(1)
    (asked,) = link._waiting.values()
    assert asked.nbytes < 2 * MAX_ERROR_BYTES
    assert 300 * ROW_BYTES > 4 * MAX_ERROR_BYTES
    rig.engine.futures[0].set_result(result_of(300))
    assert future.result(PATIENCE_S)[0]


class TestPartly:
    """One of the two is elsewhere: the front-end carries it, as ever."""

    def test_hidden_states_alone(self, rig: Rig) -> None:
        side = rig.side()
        call = placed(side, map_taken(side))
        call.place = None
        future = side.remote.submit(call)
        rig.engine.wait(1)
        (theirs,) = engine_views(rig)
        assert address_of(rig.engine.calls[0][0].hidden_states.data) == address_of(theirs) + 1000
        rig.engine.futures[0].set_result(result_of(3))
        is_placed, result = future.result(PATIENCE_S)
        assert not is_placed
        assert is_same(result.output, result_of(3).output)
        del theirs
        forget(rig.engine)

    def test_the_answer_alone(self, rig: Rig) -> None:
        side = rig.side()
        call = placed(side, map_taken(side))
        num_tokens, (dtype, data), *others = call.request
        call.request = num_tokens, (dtype, bytes(data)), *others  # type: ignore[assignment]
        future = side.remote.submit(call)
        rig.engine.wait(1).set_result(result_of(3))
        is_placed, result = future.result(PATIENCE_S)
        assert is_placed
        assert is_same(result.output, result_of(3).output)
        (theirs,) = engine_views(rig)
        carried = rig.engine.calls[0][0].hidden_states.data
        assert address_of(carried) not in range(address_of(theirs), address_of(theirs) + NBYTES)
        del theirs, carried
        forget(rig.engine)

    def test_what_the_engine_has_not_mapped(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            refused: list[int] = []
            patch.setattr(RegionTaker, "_map", lambda _self, number, _nbytes, _fds: refused.append(number))
            side = rig.side()
            view = map_one(side)
            wait_for(lambda: refused)
        call = placed(side, view)
        future = side.remote.submit(call)
        rig.engine.wait(1)
        assert not engine_views(rig)
        assert bytes(rig.engine.calls[0][0].hidden_states.data) == bytes(view[1000:][: 3 * HIDDEN_SIZE * 4])
        view[1000:][: 3 * HIDDEN_SIZE * 4] = bytes(3 * HIDDEN_SIZE * 4)
        assert any(bytes(rig.engine.calls[0][0].hidden_states.data)), "it was copied"
        rig.engine.futures[0].set_result(result_of(3))
        assert not future.result(PATIENCE_S)[0]
        assert bytes(view[50_000:][: 3 * ROW_BYTES]) == b"\xaa" * 3 * ROW_BYTES
        forget(rig.engine)


def test_logits_that_change_to_nan_after_they_were_checked_are_refused(rig: Rig) -> None:
    side = rig.side()
    view = map_taken(side)

    def call() -> RemoteCall:
        made = placed(side, view)
        num_tokens, hidden_states, _, *others = made.request
        shared = view[90_000 : 90_000 + len(logits(num_tokens))]
        return RemoteCall(
            made.layer,
            (num_tokens, hidden_states, (pb.DATA_TYPE_BFLOAT16, shared), *others),  # type: ignore[arg-type]
            made.encode,
            made.place,
        )

    view[90_000 : 90_000 + len(logits(3))] = logits(3)
    view[90_002:90_004] = b"\xff\xff"
    with pytest.raises(InvalidArgumentError, match=r"routing_logits\.slice: holds NaN, expected numbers, which stay"):
        side.remote.submit(call())
    assert not rig.engine.calls
    side.wait_arena_free()
    view[90_000 : 90_000 + len(logits(3))] = logits(3)
    future = side.remote.submit(call())
    rig.engine.wait(1).set_result(result_of(3))
    assert future.result(PATIENCE_S)[0]
    del future
    forget(rig.engine)
    side.wait_arena_free()


class TestRefusals:
    @pytest.mark.parametrize("wrong", [(0, NBYTES - 11, 12), (0, NBYTES + 1, 1), (1, 0, 12), (0, 2**63, 12)])
    @pytest.mark.parametrize("what", ["hidden_states", "place"])
    def test_what_lies_in_no_region_of_the_engine_is_an_error_of_its_request(
        self,
        rig: Rig,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        wrong: tuple[int, int, int],
        what: str,
    ) -> None:
        """Front-ends check what callers say; whatever one sends all the same, the engine touches nothing else."""
        side = rig.side()
        view = map_taken(side)
        good = side.remote.submit(placed(side, view))
        rig.engine.wait(1)
        call = placed(side, view, start=4000, place=60_000)
        aim = address_of(call.request[1][1] if what == "hidden_states" else call.place)

        def misled(data: Any, engine: Any) -> Any:
            where = where_of(data, engine)
            return (where[0] + wrong[0], *wrong[1:]) if where is not None and address_of(data) == aim else where

        monkeypatch.setattr(remote, "where_of", misled)
        with pytest.raises(RelayedError):
            side.remote.submit(call).result(PATIENCE_S)
        assert "not mapped here" in caplog.text
        caplog.clear()  # it has the error, which knows the call
        assert len(rig.engine.calls) == 1
        rig.engine.futures[0].set_result(result_of(3))
        assert good.result(PATIENCE_S)[0]
        del call
        forget(rig.engine)

    def test_an_answer_larger_than_its_place_fails_alone(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        side = rig.side()
        view = map_taken(side)
        future = side.remote.submit(placed(side, view))
        rig.engine.wait(1).set_result(result_of(4))
        with pytest.raises(RelayedError):
            future.result(PATIENCE_S)
        assert bytes(view[50_000:]) == b"\xaa" * (NBYTES - 50_000)
        again = side.remote.submit(placed(side, view))
        rig.engine.wait(2).set_result(result_of(3))
        assert again.result(PATIENCE_S)[0]
        caplog.clear()
        forget(rig.engine)

    def test_an_error_touches_no_region(self, rig: Rig) -> None:
        side = rig.side()
        view = map_taken(side)
        future = side.remote.submit(placed(side, view))
        rig.engine.wait(1).set_exception(RequestTimeoutError("too late"))
        with pytest.raises(RelayedError):
            future.result(PATIENCE_S)
        assert bytes(view[50_000:]) == b"\xaa" * (NBYTES - 50_000)
        forget(rig.engine)


class TestLifetime:
    @pytest.mark.parametrize("what", ["both", "hidden_states", "place"])
    def test_a_region_that_is_given_up_lives_until_its_last_request_is_answered(self, rig: Rig, what: str) -> None:
        side = rig.side()
        view = map_taken(side)
        call = placed(side, view)
        if what == "hidden_states":
            call.place = None
        elif what == "place":
            num_tokens, (dtype, data), *others = call.request
            call.request = num_tokens, (dtype, bytes(data)), *others  # type: ignore[assignment]
            del data
        future = side.remote.submit(call)
        inner = rig.engine.wait(1)
        del view, call
        gc.collect()
        other = side.remote.submit(side.call())  # and whatever was said before was read
        rig.engine.wait(2).set_result(result_of(3))
        other.result(PATIENCE_S)
        assert len(engine_views(rig)) == 1
        assert mappings() == 2
        inner.set_result(result_of(3))
        assert is_same(future.result(PATIENCE_S)[1].output, result_of(3).output)
        del inner, future, other
        forget(rig.engine)
        wait_for(lambda: not engine_views(rig))
        wait_for(lambda: not mappings())

    def test_a_call_that_runs_keeps_its_memory_whoever_leaves(self, rig: Rig) -> None:
        side = rig.side()
        view = map_taken(side)
        future = side.remote.submit(placed(side, view))
        inner = rig.engine.wait(1)
        assert inner.set_running_or_notify_cancel()
        assert future.cancel()
        del view, future
        gc.collect()
        other = side.remote.submit(side.call())
        rig.engine.wait(2).set_result(result_of(3))
        other.result(PATIENCE_S)
        assert mappings() == 2
        inner.set_result(result_of(3))
        del inner, other
        forget(rig.engine)
        wait_for(lambda: not mappings())

    def test_the_next_engine_gets_the_regions_that_live(self, rig: Rig) -> None:
        side = rig.side()
        view, gone = map_taken(side), map_taken(side)
        del gone
        rig.restart()
        side.wait_serving(False)
        rig.publish(a_layer(), timeout_s=0)
        side.wait_serving()
        wait_taken(side, view)
        assert len(engine_views(rig)) == 1
        future = side.remote.submit(placed(side, view))
        rig.engine.wait(1).set_result(result_of(3))
        assert future.result(PATIENCE_S)[0]
        forget(rig.engine)

    def test_a_front_end_that_ends_leaves_its_regions_to_what_runs(self, rig: Rig) -> None:
        dying, living = rig.side(), rig.side()
        views = [map_taken(dying), map_taken(living)]
        runs = dying.remote.submit(placed(dying, views[0]))
        inner = rig.engine.wait(1)
        assert inner.set_running_or_notify_cancel()
        assert dying.remote.stop(PATIENCE_S)
        with pytest.raises(UnavailableError):
            runs.result(PATIENCE_S)
        views.pop(0)
        del runs
        gc.collect()
        wait_for(lambda: mappings() == 3)  # here it is gone, and the engine's stays
        other = living.remote.submit(placed(living, views[0]))
        rig.engine.wait(2).set_result(result_of(3))
        assert other.result(PATIENCE_S)[0]
        inner.set_result(result_of(3))
        del inner, other
        forget(rig.engine)
        wait_for(lambda: mappings() == 2)

    def test_where_an_engine_may_still_write_nobody_is_told_that_it_is_over(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The way to it breaks, and it lives on: a caller that was told would use its memory again."""
        side = rig.side()
        view = map_taken(side)
        runs, waits = side.remote.submit(placed(side, view)), side.remote.submit(placed(side, view, place=60_000))
        carried = side.remote.submit(side.call())
        rig.engine.wait(3)
        inner = rig.engine.futures[0]
        assert inner.set_running_or_notify_cancel()
        (peer,) = set(rig.gate._peers.values())
        rig.gate.soon(lambda: rig.gate._drop(peer))
        with pytest.raises(UnavailableError):
            carried.result(PATIENCE_S)
        side.wait_serving(False)
        wait_for(rig.engine.futures[1].cancelled)
        assert not runs.done()
        assert not waits.done(), "one proof serves all"
        assert not rig.gate._peers, "it does not come back before"
        rig.engine.calls[0][0].place[:2] = b"ok"  # type: ignore[index]
        forget(rig.engine)
        inner.set_result(result_of(3))
        for future in (runs, waits):
            with pytest.raises(UnavailableError):
                future.result(PATIENCE_S)
        del inner
        side.wait_serving()
        wait_taken(side, view)
        again = side.remote.submit(placed(side, view))
        rig.engine.wait(1).set_result(result_of(3))
        assert again.result(PATIENCE_S)[0]
        forget(rig.engine)

    def test_what_fails_or_is_answered_leaves_no_cycle(self, rig: Rig) -> None:
        side = rig.side()
        gc.collect()
        gc.disable()
        try:
            view = map_taken(side)
            answered = side.remote.submit(placed(side, view))
            rig.engine.wait(1).set_result(result_of(3))
            answered.result(PATIENCE_S)
            failed = side.remote.submit(placed(side, view))
            rig.engine.wait(2).set_exception(RequestTimeoutError("too late"))
            with pytest.raises(RelayedError):
                failed.result(PATIENCE_S)
            forget(rig.engine)
            del view, failed, answered
            wait_for(lambda: not mappings())
        finally:
            gc.enable()


def test_coming_and_going_leaves_nothing_open() -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def once() -> None:
        with a_rig() as rig:
            side = rig.side()
            view = map_taken(side)
            side.remote.submit(placed(side, view))
            rig.engine.wait(1)
            rig.restart()
            rig.publish(a_layer(), timeout_s=0)
            wait_taken(side, view)
            for one in rig.sides:
                one.states.clear()

    before = open_files()
    for _ in range(3):
        once()
    look: Callable[[], tuple[int, int]] = lambda: (open_files(), mappings())  # noqa: E731
    wait_for(lambda: look() == (before, 0))
