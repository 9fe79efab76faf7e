"""One ForwardStream whose messages come from gRPC and through rings: one set of bounds, one end, an answer each."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fake_stream import FakeCalls, FakeContext, a_stream, answer, message, nothing_happens

from expertd.v1 import expertd_pb2 as pb
from expertd.v1.message_ring import RingReader, RingWriter, ring_nbytes
from expertd_server.errors import InvalidArgumentError, OverloadedError, UnavailableError
from expertd_server.ring_pair import RingPlace
from expertd_server.stream import Stream

PATIENCE_S = 30.0
SLOTS, SLOT_NBYTES = 8, 128


class TwoWays:
    """A stream that runs, and its caller's ends."""

    def __init__(self, calls: FakeCalls | None = None, **bounds: int) -> None:
        self.calls = FakeCalls() if calls is None else calls
        self.context = FakeContext()
        self.stream: Stream = a_stream(self.calls, self.context, **bounds)
        nbytes = ring_nbytes(SLOTS, SLOT_NBYTES)
        self.map = mmap.mmap(-1, 64 + 2 * nbytes)
        memory = memoryview(self.map)
        pair, (to_ring, bell) = RingPlace(64, SLOTS, SLOT_NBYTES).open(memory)
        assert pair is not None
        self.requests = RingWriter(memory[64 : 64 + nbytes], SLOTS, SLOT_NBYTES, to_ring)
        self.answers = RingReader(memory[64 + nbytes :], SLOTS, SLOT_NBYTES, bell)
        self.running = asyncio.create_task(self.stream.run())
        self.stream._rings_came(pair)

    async def put(self, *numbers: int) -> None:
        """Send requests through the ring."""
        for number in numbers:
            assert self.requests.put(message(number))
        await nothing_happens()
        await asyncio.sleep(0.005)  # the bell is outside of the loop

    def taken(self) -> list[int]:
        """Ids of the answers in the ring."""
        taken = []
        while (data := self.answers.take()) is not None:
            taken.append(pb.ForwardStreamResponse.FromString(data).id)
        return taken

    async def end(self) -> None:
        self.context.end()
        await self.running

    def close(self) -> None:
        self.requests.close()
        self.answers.close()
        self.map.close()  # which fails while the stream has it


def in_loop(test: Callable[[], Coroutine[Any, Any, TwoWays]]) -> Callable[[], None]:
    """Run a test in an event loop of its own; nothing of what it returns is left."""

    def run() -> None:
        before = len(os.listdir("/proc/self/fd"))
        ways = asyncio.run(asyncio.wait_for(test(), PATIENCE_S))
        assert ways.running.done()
        assert ways.calls.in_flight == 0
        ways.close()
        assert len(os.listdir("/proc/self/fd")) <= before

    run.__name__ = test.__name__
    return run


@in_loop
async def test_each_answer_goes_the_way_of_its_request() -> TwoWays:
    ways = TwoWays()
    await ways.put(1)
    ways.context.send(2)
    await nothing_happens()
    await ways.put(3)
    for number, promise in enumerate(ways.calls.promises, start=1):
        promise.set_result(answer(number))
    assert ways.taken() == [1, 3], "at once, and not in the next round of the loop"
    await nothing_happens()
    assert ways.context.ids == [2]
    await ways.end()
    return ways


@in_loop
async def test_an_error_that_is_longer_than_a_slot_goes_over_grpc() -> TwoWays:
    ways = TwoWays(FakeCalls(refuses=True))
    await ways.put(5)
    assert ways.taken() == []
    assert pb.ForwardStreamResponse.FromString(ways.context.answers[0]).error.message == "full"
    assert ways.context.ids == [5]
    await ways.end()
    return ways


@in_loop
async def test_what_finds_no_room_goes_over_grpc() -> TwoWays:
    ways = TwoWays(max_requests=100)
    await ways.put(*range(SLOTS))
    await ways.put(*range(SLOTS, 2 * SLOTS))
    for number, promise in enumerate(ways.calls.promises):
        promise.set_result(answer(number))
    assert ways.taken() == list(range(SLOTS))
    await nothing_happens()
    assert ways.context.ids == list(range(SLOTS, 2 * SLOTS))
    await ways.end()
    return ways


@in_loop
async def test_both_ways_have_one_bound() -> TwoWays:
    ways = TwoWays(max_requests=2)
    await ways.put(1, 2, 3)
    ways.context.send(4)
    await nothing_happens()
    assert len(ways.calls.promises) == 2
    ways.calls.promises[0].set_result(answer(1))
    await nothing_happens()
    assert len(ways.calls.promises) == 3
    ways.calls.promises[1].set_result(answer(2))
    await nothing_happens()
    assert len(ways.calls.promises) == 4
    for promise in ways.calls.promises[2:]:
        promise.set_result(answer(9))
    await ways.end()
    assert len(ways.taken()) == 3
    assert len(ways.context.ids) == 1
    return ways


@in_loop
async def test_answers_that_wait_for_grpc_hold_up_the_ring_too() -> TwoWays:
    ways = TwoWays(max_requests=2)
    ways.context.may_write.clear()
    ways.context.send(1, 2)
    await nothing_happens()
    for promise in ways.calls.promises:
        promise.set_result(answer(1))
    await ways.put(3)
    assert len(ways.calls.promises) == 2
    ways.context.may_write.set()
    await nothing_happens()
    assert len(ways.calls.promises) == 3
    ways.calls.promises[2].set_result(answer(3))
    await ways.end()
    return ways


@in_loop
async def test_a_ring_that_makes_no_sense_ends_the_stream_after_the_answers_in_flight() -> TwoWays:
    ways = TwoWays()
    await ways.put(1)
    ways.context.send(2)
    await nothing_happens()
    ways.map[64:72] = struct.pack("<Q", 2**40)
    os.write(ways.requests.bell_fd, b"\0")
    await asyncio.sleep(0.01)
    ways.context.send(3)  # nothing further is read
    await nothing_happens()
    assert len(ways.calls.promises) == 2
    assert not ways.running.done()
    for number, promise in enumerate(ways.calls.promises, start=1):
        promise.set_result(answer(number))
    with pytest.raises(InvalidArgumentError):
        await ways.running
    assert (ways.taken(), ways.context.ids) == ([1], [2])
    return ways


@in_loop
async def test_a_message_that_is_none_ends_the_stream_as_one_of_grpc_does() -> TwoWays:
    ways = TwoWays()
    assert ways.requests.put(b"\xff")
    with pytest.raises(InvalidArgumentError):
        await ways.running
    return ways


@in_loop
async def test_a_closed_stream_ends_when_it_is_idle_and_takes_nothing_new() -> TwoWays:
    ways = TwoWays()
    await ways.put(1)
    ways.stream.close()
    await ways.put(2)
    assert len(ways.calls.promises) == 1
    ways.calls.promises[0].set_result(answer(1))
    with pytest.raises(UnavailableError):
        await ways.running
    assert ways.taken() == [1]
    return ways


@in_loop
async def test_who_leaves_gives_up_what_waits_and_an_answer_for_nobody_goes_nowhere() -> TwoWays:
    ways = TwoWays(max_requests=2)
    await ways.put(1, 2, 3)
    (runs, waits) = ways.calls.promises
    assert runs.set_running_or_notify_cancel()
    ways.running.cancel()  # as gRPC does
    with pytest.raises(asyncio.CancelledError):
        await ways.running
    assert waits.cancelled()
    runs.set_result(answer(1))
    assert ways.taken() == []
    assert len(ways.calls.promises) == 2
    return ways


@in_loop
async def test_rings_that_come_after_the_end_are_closed() -> TwoWays:
    ways = TwoWays()
    ways.context.send(1)
    await nothing_happens()
    ways.calls.promises[0].set_exception(OverloadedError("full", 1.0))
    await ways.end()
    pair, bells = RingPlace(64, SLOTS, SLOT_NBYTES).open(memoryview(bytearray(len(ways.map))))
    assert pair is not None
    ways.stream._rings_came(pair)
    assert not pair.answers.put(b"a"), "closed"
    for fd in bells:
        os.close(fd)
    return ways
