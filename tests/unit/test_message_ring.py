"""One ring of messages, both ends: order, bounds, the bell, and a side that writes nonsense."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import select
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from expertd.v1.message_ring import RingBrokenError, RingReader, RingWriter, ring_nbytes

NUM_SLOTS, SLOT_NBYTES = 8, 128
ROOM = SLOT_NBYTES - 8
WRITTEN, TAKEN, WANTS_BELL, SLOTS = 0, 64, 128, 192
MILLIONS = float(os.environ.get("EXPERTD_RING_MILLIONS", "0.2"))
"""Messages that the two processes exchange."""
PATIENCE_S = 60.0


class Ring:
    """A ring of one process."""

    def __init__(self, num_slots: int = NUM_SLOTS, slot_nbytes: int = SLOT_NBYTES) -> None:
        self.map = mmap.mmap(-1, ring_nbytes(num_slots, slot_nbytes))
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.reader = RingReader(memoryview(self.map), num_slots, slot_nbytes, read_fd)
        self.writer = RingWriter(memoryview(self.map), num_slots, slot_nbytes, write_fd)

    def poke(self, offset: int, value: int) -> None:
        self.map[offset : offset + 8] = struct.pack("<Q", value)

    def peek(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.map, offset)[0])

    def rings(self) -> int:
        """How often the bell rang since the last look."""
        try:
            return len(os.read(self.reader.bell_fd, 4096))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.reader.close()
        self.writer.close()
        self.map.close()  # which fails while there are views of it


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring()
    yield made
    made.close()


def open_files() -> Iterator[os.stat_result]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            yield os.stat(f"/proc/self/fd/{name}")


def test_messages_come_out_as_they_went_in_however_often_the_ring_goes_round(ring: Ring) -> None:
    chance = random.Random(1)
    sent: list[bytes] = []
    number = 0
    for _ in range(2000):
        if chance.random() < 0.5:
            message = chance.randbytes(chance.choice([0, 1, ROOM - 1, ROOM, chance.randrange(ROOM)]))
            assert ring.writer.put(message) == (len(sent) < NUM_SLOTS)
            if len(sent) < NUM_SLOTS:
                sent.append(message)
        else:
            assert ring.reader.take() == (sent.pop(0) if sent else None)
            number += 1
    assert number > 10 * NUM_SLOTS


def test_the_layout_is_that_of_the_proto(ring: Ring) -> None:
    ring.writer.put(b"first")
    ring.writer.put(b"second")
    assert ring.peek(WRITTEN) == 2
    for number, message in enumerate((b"first", b"second")):
        at = SLOTS + number * SLOT_NBYTES
        assert struct.unpack_from("<I", ring.map, at) == (len(message),)
        assert ring.map[at + 8 : at + 8 + len(message)] == message
    assert ring.peek(TAKEN) == 0
    ring.reader.take()
    assert ring.peek(TAKEN) == 1
    assert not ring.reader.may_sleep()
    ring.reader.take()
    assert ring.reader.may_sleep()
    assert ring.peek(WANTS_BELL) == 1


def test_what_is_too_long_or_finds_no_room_is_left_to_the_stream(ring: Ring) -> None:
    assert not ring.writer.put(bytes(ROOM + 1))
    assert ring.peek(WRITTEN) == 0
    assert [ring.writer.put(b"a") for _ in range(NUM_SLOTS + 1)] == [True] * NUM_SLOTS + [False]
    ring.reader.take()
    assert ring.writer.put(b"b")


def test_what_is_added_wakes_nobody_until_the_bell_is_rung(ring: Ring) -> None:
    assert ring.reader.may_sleep()
    assert [ring.writer.add(b"a") for _ in range(NUM_SLOTS + 1)] == [True] * NUM_SLOTS + [False]
    assert ring.rings() == 0
    ring.writer.ring()
    assert ring.rings() == 1
    ring.writer.ring()
    assert ring.rings() == 0, "nobody has asked again"
    assert [ring.reader.take() for _ in range(NUM_SLOTS + 1)] == [b"a"] * NUM_SLOTS + [None]
    ring.writer.close()
    ring.writer.ring()
    assert not ring.writer.add(b"a")


def test_the_bell_rings_once_for_whoever_waits_and_not_for_the_busy(ring: Ring) -> None:
    ring.writer.put(b"a")
    assert ring.rings() == 0, "nobody has asked for it"
    ring.reader.take()
    assert ring.reader.may_sleep()
    for _ in range(3):
        ring.writer.put(b"b")
    assert ring.rings() == 1
    for _ in range(3):
        assert not ring.reader.may_sleep()
        ring.reader.take()
    ring.writer.put(b"c")
    assert ring.rings() == 0, "the reader has not gone back to sleep"


def test_a_bell_that_nobody_hears_holds_nobody_up(ring: Ring) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(ring.writer.bell_fd, bytes(4096))
    ring.poke(WANTS_BELL, 1)
    assert ring.writer.put(b"a")
    while ring.rings():
        pass
    assert ring.reader.silence()
    assert ring.reader.take() == b"a"


@pytest.mark.parametrize("written", [NUM_SLOTS + 1, 2**63, 2**64 - 1])
def test_a_count_that_cannot_be_is_told(ring: Ring, written: int) -> None:
    ring.poke(WRITTEN, written)
    for _ in range(3):
        with pytest.raises(RingBrokenError, match=f"{written} messages"):
            ring.reader.take()
    assert not ring.reader.may_sleep()


@pytest.mark.parametrize("nbytes", [ROOM + 1, 2**31, 2**32 - 1])
def test_a_length_that_cannot_be_is_told(ring: Ring, nbytes: int) -> None:
    ring.writer.put(b"a")
    ring.map[SLOTS : SLOTS + 4] = struct.pack("<I", nbytes)
    with pytest.raises(RingBrokenError, match=f"{nbytes} bytes"):
        ring.reader.take()


def test_what_the_reader_says_to_have_taken_never_leads_the_writer_astray(ring: Ring) -> None:
    chance = random.Random(2)
    for _ in range(2000):
        ring.poke(TAKEN, chance.choice([0, 1, 2**63, 2**64 - 1, chance.randrange(2**64), ring.peek(WRITTEN)]))
        ring.writer.put(chance.randbytes(chance.randrange(ROOM)))
    assert ring.peek(WRITTEN) > 100


def test_counts_of_this_side_are_not_read_back(ring: Ring) -> None:
    ring.writer.put(b"a")
    ring.poke(WRITTEN, 700)
    ring.poke(TAKEN, 0)
    assert ring.writer.put(b"b")
    assert ring.peek(WRITTEN) == 2
    ring.poke(TAKEN, 90)
    assert [ring.reader.take(), ring.reader.take(), ring.reader.take()] == [b"a", b"b", None]


def test_garbage_everywhere_raises_nothing_else(ring: Ring) -> None:
    chance = random.Random(3)
    broken = taken = 0
    for _ in range(5000):
        at = chance.randrange(len(ring.map) // 8) * 8 if chance.random() < 0.5 else chance.choice([WRITTEN, SLOTS])
        ring.poke(at, chance.choice([chance.randrange(2 * NUM_SLOTS), chance.randrange(2**64)]))
        try:
            taken += ring.reader.take() is not None
        except RingBrokenError:
            broken += 1
            ring.map[:] = bytes(len(ring.map))
            ring.writer._count = ring.reader._count
            ring.poke(WRITTEN, ring.reader._count)
            ring.poke(TAKEN, ring.reader._count)
        ring.reader.may_sleep()
        ring.writer.put(b"a")
        ring.reader.silence()
    assert broken > 100
    assert taken > 100


def test_a_closed_ring_takes_nothing_and_keeps_nothing() -> None:
    ring = Ring()
    pipe = os.stat(ring.reader.bell_fd)
    ring.close()
    assert not ring.writer.put(b"a")
    ring.writer.close()
    assert not any(os.path.samestat(pipe, status) for status in open_files())


def test_each_side_notices_that_the_other_is_gone(ring: Ring) -> None:
    assert ring.reader.silence()
    ring.reader.may_sleep()
    ring.writer.close()
    assert not ring.reader.silence()
    other = Ring()
    other.reader.may_sleep()
    other.reader.close()
    assert other.writer.put(b"a"), "who is gone does not hold the writer up"
    other.writer.close()


def message_of(number: int) -> bytes:
    """Of any length, and different from every other."""
    body = struct.pack("<Q", number) * (1 + number * 2654435761 % (ROOM // 8 - 1))
    return struct.pack("<I", zlib.crc32(body)) + body


def write_all(map_: mmap.mmap, bell: Any, count: int) -> None:
    """In a process of its own. A full ring is left alone for as long as another process takes to get at it."""
    writer = RingWriter(memoryview(map_), NUM_SLOTS, SLOT_NBYTES, os.dup(bell.fileno()))
    chance = random.Random(4)
    for number in range(count):
        message = message_of(number)
        while not writer.put(message):
            os.sched_yield()
        if chance.random() < 0.001:
            select.select([], [], [], chance.random() * 2e-4)  # the reader falls asleep


def test_two_processes_lose_nothing_and_nobody_oversleeps() -> None:
    count = int(MILLIONS * 1e6)
    context = multiprocessing.get_context("fork")
    map_ = mmap.mmap(-1, ring_nbytes(NUM_SLOTS, SLOT_NBYTES))
    receive, send = context.Pipe(duplex=False)
    os.set_blocking(receive.fileno(), False)
    os.set_blocking(send.fileno(), False)
    process = context.Process(target=write_all, args=(map_, send, count), daemon=True)
    process.start()
    reader = RingReader(memoryview(map_), NUM_SLOTS, SLOT_NBYTES, os.dup(receive.fileno()))
    slept = 0
    try:
        for number in range(count):
            while (message := reader.take()) is None:
                if reader.may_sleep():
                    slept += 1
                    assert select.select([reader.bell_fd], [], [], PATIENCE_S)[0], f"overslept message {number}"
                    assert reader.silence()
            assert message == message_of(number)
        assert reader.take() is None
    finally:
        process.kill()
        process.join()
        reader.close()
        receive.close()
        send.close()
    assert slept > count // 10000
