"""The rings of a stream in the event loop: nothing is missed, and nobody gets more than a part of a round."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fake_stream import FakeCalls

from expertd.v1.message_ring import RingReader, RingWriter, ring_nbytes
from expertd_server.errors import InvalidArgumentError
from expertd_server.ring_pair import RingPlace
from expertd_server.stream_rings import StreamRings

SLOTS, SLOT_NBYTES = 64, 128
PATIENCE_S = 30.0


class Caller:
    """The other side, and the memory of both."""

    def __init__(self) -> None:
        nbytes = ring_nbytes(SLOTS, SLOT_NBYTES)
        self.map = mmap.mmap(-1, 64 + 2 * nbytes)
        memory = memoryview(self.map)
        pair, (to_ring, bell) = RingPlace(64, SLOTS, SLOT_NBYTES).open(memory)
        assert pair is not None
        self.pair = pair
        self.calls: Any = FakeCalls()
        self.requests = RingWriter(memory[64 : 64 + nbytes], SLOTS, SLOT_NBYTES, to_ring)
        self.answers = RingReader(memory[64 + nbytes :], SLOTS, SLOT_NBYTES, bell)

    def close(self) -> None:
        self.requests.close()
        self.answers.close()
        self.map.close()  # which fails while the server has it


def in_loop(test: Callable[[Caller], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an event loop of its own."""

    def run() -> None:
        caller = Caller()
        asyncio.run(asyncio.wait_for(test(caller), PATIENCE_S))
        assert caller.calls.unread_rings == 0
        caller.close()

    run.__name__ = test.__name__
    return run


@in_loop
async def test_messages_before_and_after_somebody_listens(caller: Caller) -> None:
    caller.requests.put(b"before")
    rings = StreamRings(caller.pair, caller.calls)
    assert await rings.read() == b"before"
    for number in range(3 * SLOTS):
        asyncio.get_running_loop().call_later(0.001 * (number % 3), caller.requests.put, b"%d" % number)
        assert await rings.read() == b"%d" % number
    rings.close()


@in_loop
async def test_answers_find_their_way_and_no_room(caller: Caller) -> None:
    rings = StreamRings(caller.pair, caller.calls)
    assert [rings.put(b"a") for _ in range(SLOTS + 1)] == [True] * SLOTS + [False]
    assert caller.answers.take() == b"a"
    assert rings.put(b"b")
    assert not rings.put(bytes(SLOT_NBYTES))
    rings.close()
    assert not rings.put(b"c")


@in_loop
async def test_one_bell_for_all_answers_of_a_round(caller: Caller) -> None:
    """Of many in flight. A lone one is told at once."""
    rings = StreamRings(caller.pair, caller.calls)
    for in_flight, at_once in ((1, 1), (5, 0)):
        caller.calls.in_flight = in_flight
        assert caller.answers.may_sleep()
        assert all(rings.put(b"a") for _ in range(in_flight))
        assert bells(caller) == at_once
        await asyncio.sleep(0)
        assert bells(caller) == 1 - at_once
        assert [caller.answers.take() for _ in range(in_flight + 1)] == [b"a"] * in_flight + [None]
    assert caller.answers.may_sleep()
    assert rings.put(b"b")
    rings.close()  # and the round ends after that
    await asyncio.sleep(0)
    assert caller.answers.take() == b"b"


def bells(caller: Caller) -> int:
    """How often it rang since the last look."""
    try:
        return len(os.read(caller.answers.bell_fd, 100))
    except BlockingIOError:
        return 0


@in_loop
async def test_a_full_ring_leaves_others_their_turn(caller: Caller) -> None:
    """The caller refills it as fast as it is read."""
    rings = StreamRings(caller.pair, caller.calls)
    rounds = read = 0

    async def read_all() -> None:
        nonlocal read
        while True:
            while caller.requests.put(b"a"):
                pass
            await rings.read()
            read += 1

    reading = asyncio.create_task(read_all())
    while read < 1000:
        before = read
        await asyncio.sleep(0)
        rounds += 1
        assert read - before <= 16
    assert rounds >= 1000 // 16
    reading.cancel()
    rings.close()


@in_loop
async def test_a_bell_without_end_costs_a_part_of_each_round(caller: Caller) -> None:
    rings = StreamRings(caller.pair, caller.calls)
    reading = asyncio.create_task(rings.read())
    for _ in range(200):
        os.write(caller.requests.bell_fd, bytes(1000))
        await asyncio.sleep(0)
    assert not reading.done()
    caller.requests.put(b"a")
    assert await reading == b"a"
    rings.close()


@in_loop
async def test_a_ring_that_makes_no_sense(caller: Caller) -> None:
    rings = StreamRings(caller.pair, caller.calls)
    reading = asyncio.create_task(rings.read())
    await asyncio.sleep(0.01)
    caller.map[64:72] = struct.pack("<Q", 2**40)
    os.write(caller.requests.bell_fd, b"\0")
    with pytest.raises(InvalidArgumentError) as caught:
        await reading
    assert caught.value.violations[0].field == "register_region.rings"
    rings.close()


@in_loop
async def test_a_message_is_bounded_as_it_is_on_the_stream(caller: Caller) -> None:
    rings = StreamRings(caller.pair, caller.calls)
    caller.calls.max_message_bytes = 100
    for nbytes in (100, 101):
        caller.requests.put(bytes(nbytes))
    assert await rings.read() == bytes(100)
    with pytest.raises(InvalidArgumentError, match=r"101 bytes, expected at most 100 \(max_message_bytes\)"):
        await rings.read()
    rings.close()


@in_loop
async def test_a_caller_that_hangs_up_is_not_asked_again_and_again(caller: Caller) -> None:
    rings = StreamRings(caller.pair, caller.calls)
    reading = asyncio.create_task(rings.read())
    await asyncio.sleep(0.01)
    caller.requests.close()
    await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    assert not loop.remove_reader(caller.pair.requests.bell_fd), "a closed pipe is readable for ever"
    assert not reading.done()
    reading.cancel()
    rings.close()


@in_loop
async def test_it_is_known_who_is_not_alone(caller: Caller) -> None:
    """From when a bell rings until the last message is read."""
    other = Caller()
    other.calls = caller.calls
    both = [(each, StreamRings(each.pair, each.calls)) for each in (caller, other)]
    seen: list[tuple[bytes, int]] = []

    async def read_all(rings: StreamRings) -> None:
        while True:
            message = await rings.read()
            seen.append((message, caller.calls.unread_rings))

    reading = [asyncio.create_task(read_all(rings)) for _, rings in both]
    await asyncio.sleep(0.01)
    for each, names in ((caller, (b"a", b"b")), (other, (b"c",))):
        for name in names:
            each.requests.put(name)
    await asyncio.sleep(0.01)
    assert seen in ([(b"a", 2), (b"b", 1), (b"c", 0)], [(b"c", 1), (b"a", 1), (b"b", 0)])
    for (_, rings), task in zip(both, reading, strict=True):
        task.cancel()
        rings.close()
    other.close()
