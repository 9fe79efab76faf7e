"""Shared memory of a front-end and the engine: blocks never overlap and come back, descriptors arrive in order."""

from __future__ import annotations

import mmap
import os
import select
import struct
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertd_server.compiled import BLOCKS
from expertd_server.ring import (
    ALIGNMENT_BYTES,
    Block,
    Channel,
    PythonArena,
    PythonRing,
    Ring,
    ring_bytes,
    shared_bytes,
)

PAGES = 16
PATIENCE_S = 30.0
# Both kinds of each, where the compiled ones were built.
ARENAS: list[Any] = [PythonArena] + ([] if BLOCKS is None else [BLOCKS.Arena])
RINGS: list[Any] = [PythonRing] + ([] if BLOCKS is None else [BLOCKS.Ring])


class ArenaMachine(RuleBasedStateMachine):
    """An arena against a list of pages, each free or not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []

    @initialize(kind=st.sampled_from(ARENAS))
    def make(self, kind: Any) -> None:
        self.arena = kind(memoryview(bytearray(PAGES * ALIGNMENT_BYTES)))
        assert self.arena.nbytes == PAGES * ALIGNMENT_BYTES

    def is_free(self) -> list[bool]:
        free = [True] * PAGES
        for block in self.blocks:
            for page in range(block.offset // ALIGNMENT_BYTES, (block.offset + block.nbytes) // ALIGNMENT_BYTES):
                assert free[page], "two blocks overlap"
                free[page] = False
        return free

    @rule(nbytes=st.integers(0, (PAGES + 1) * ALIGNMENT_BYTES))
    def allocate(self, nbytes: int) -> None:
        pages = max(1, -(-nbytes // ALIGNMENT_BYTES))
        free = self.is_free()
        fitting = [start for start in range(PAGES - pages + 1) if all(free[start : start + pages])]
        block = self.arena.allocate(nbytes)
        if not fitting:
            assert block is None
            return
        assert block is not None
        assert (block.offset, block.nbytes) == (fitting[0] * ALIGNMENT_BYTES, pages * ALIGNMENT_BYTES), "lowest first"
        assert len(block.view) == block.nbytes
        self.blocks.append(block)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))

    @invariant()
    def every_byte_is_in_a_block_or_free(self) -> None:
        assert self.arena.free_bytes() == sum(self.is_free()) * ALIGNMENT_BYTES


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("kind", ARENAS)
def test_a_block_outlives_its_arena_and_a_view_its_block(kind: Any) -> None:
    arena = kind(memoryview(bytearray(ALIGNMENT_BYTES)))
    block = arena.allocate(1)
    del arena
    view = block.view
    view[:3] = b"abc"
    del block
    assert bytes(view[:3]) == b"abc"


def both_ends(kind: Any, num_slots: int) -> tuple[Ring, Ring]:
    """A writer and a reader of one memory."""
    memory, fd = memoryview(mmap.mmap(-1, ring_bytes(num_slots))), os.eventfd(0, os.EFD_NONBLOCK)
    return kind(memory, fd), kind(memory, os.dup(fd))


@pytest.mark.parametrize("kind", RINGS)
class TestRing:
    @settings(max_examples=50, deadline=None)
    @given(batches=st.lists(st.integers(0, 5), max_size=20))
    def test_what_is_published_is_taken_once_and_in_order(self, kind: Any, batches: list[int]) -> None:
        ring, reader = both_ends(kind, 5)
        number = 0
        for count in batches:
            published = []
            for _ in range(count):
                number += 1
                ring.publish(1, number, number * 4096, number + 7)
                published.append((1, number, number * 4096, number + 7))
            assert bool(select.select([reader.eventfd], [], [], 0)[0]) == bool(count), "it is woken for something"
            assert reader.take() == published
        assert reader.take() == []
        ring.close()
        reader.close()

    def test_the_reader_is_woken_once_for_all_that_was_put(self, kind: Any) -> None:
        writer, reader = both_ends(kind, 5)

        def is_woken() -> bool:
            return bool(select.select([reader.eventfd], [], [], 0)[0])

        for _ in range(3):
            for number in range(4):
                writer.put(1, number)
            assert not is_woken()
            writer.wake()
            assert is_woken()
            assert [number for _, number, _, _ in reader.take()] == [0, 1, 2, 3]
            writer.wake()
            assert not is_woken(), "for nothing"
        writer.close()
        reader.close()

    def test_who_looks_sees_what_was_put_and_takes_the_rest(self, kind: Any) -> None:
        writer, reader = both_ends(kind, 5)
        seen = [reader.look()]
        for number in range(4):
            writer.publish(1, number)
            seen.append(reader.look())
        assert seen == [[], *([(1, number, 0, 0)] for number in range(4))]
        assert reader.take() == []
        writer.publish(1, 4)
        assert select.select([reader.eventfd], [], [], 0)[0], "who has looked and does so no more is woken"
        assert reader.take() == [(1, 4, 0, 0)]
        reader.close()
        writer.close()

    def test_who_was_announced_is_waited_for(self, kind: Any) -> None:
        writer, reader = both_ends(kind, 5)

        def is_woken() -> bool:
            return bool(select.select([reader.eventfd], [], [], 0)[0])

        writer.announce()
        assert is_woken() == (kind is not PythonRing), "Python's reader is woken for descriptors alone"
        assert reader.take() == []
        publisher = threading.Timer(0.05, writer.publish, (1, 7))
        publisher.start()
        assert reader.take_within(PATIENCE_S) == [(1, 7, 0, 0)]
        publisher.join()
        assert not is_woken() or reader.take() == []
        writer.announce()
        reader.take()
        assert reader.take_within(0.001) == [], "it did not come"
        writer.publish(1, 8)
        assert is_woken()
        assert reader.take_within(0.0) == [(1, 8, 0, 0)]
        writer.close()
        writer.announce()
        reader.close()

    def test_many_threads_publish_and_none_is_overslept(self, kind: Any) -> None:
        writer, reader = both_ends(kind, 4000)

        def publish(kind: int) -> None:
            for number in range(1000):
                writer.publish(kind, number)

        threads = [threading.Thread(target=publish, args=(kind,)) for kind in range(4)]
        for thread in threads:
            thread.start()
        taken: dict[int, list[int]] = {kind: [] for kind in range(4)}
        while sum(map(len, taken.values())) < 4000:
            assert select.select([reader.eventfd], [], [], PATIENCE_S)[0], "nobody wakes the reader"
            for of, number, _, _ in reader.take():
                taken[of].append(number)
        for thread in threads:
            thread.join(PATIENCE_S)
        assert taken == {kind: list(range(1000)) for kind in range(4)}
        writer.close()
        reader.close()

    def test_a_closed_ring_writes_into_no_other_file(self, kind: Any) -> None:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        ring = kind(memoryview(mmap.mmap(-1, ring_bytes(1))), fd)
        ring.close()
        ring.close()
        reused = os.eventfd(0, os.EFD_NONBLOCK)
        assert reused == fd, "the test needs the same number"
        ring.publish(1, 1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(reused)
        os.close(reused)

    def test_more_than_there_is_room_for_is_refused(self, kind: Any) -> None:
        """Whoever has gone mad must not have the other side read for hours."""
        memory, fd = memoryview(mmap.mmap(-1, ring_bytes(2))), os.eventfd(0, os.EFD_NONBLOCK)
        num_slots = (len(memory) - 128) // 32
        ring = kind(memory, fd)
        struct.pack_into("<Q", memory, 0, num_slots + 1)  # what a compiled writer has put
        os.eventfd_write(fd, num_slots + 1)  # and one in Python
        with pytest.raises(ValueError, match=f"{num_slots + 1} descriptors wait in a ring of {num_slots}"):
            ring.take()
        ring.close()


def test_a_channel_is_one_memory_in_both_processes() -> None:
    """Here: in one, mapped twice. Its rings and arena do not overlap, and nothing of it stays open."""
    before = os.listdir("/proc/self/fd")
    channel = Channel.make(8 * ALIGNMENT_BYTES, 7)
    theirs = Channel(8 * ALIGNMENT_BYTES, 7, *(os.dup(fd) for fd in channel.fds))
    assert os.fstat(channel.fds[0]).st_size == shared_bytes(8 * ALIGNMENT_BYTES, 7)
    to_engine, to_frontend, arena = channel.open()
    from_frontend, from_engine, memory = theirs.open()
    assert len(arena) == len(memory) == 8 * ALIGNMENT_BYTES
    arena[:] = b"\xff" * len(arena)
    for number in range(21):  # as many as 7 requests can make wait
        to_engine.publish(1, number, 3 * number)
    for number in range(7):
        from_engine.publish(2, number)
    assert from_frontend.take() == [(1, n, 3 * n, 0) for n in range(21)]
    assert to_frontend.take() == [(2, n, 0, 0) for n in range(7)]
    assert bytes(memory) == b"\xff" * len(memory)
    for ring in (to_engine, to_frontend, from_frontend, from_engine):
        ring.close()
    del arena, memory, to_engine, to_frontend, from_frontend, from_engine, ring
    assert os.listdir("/proc/self/fd") == before


PUBLISHER = """
import mmap, sys
from expertd_server.ring import Ring
memory, number = memoryview(mmap.mmap(int(sys.argv[1]), 0)), 0
ring = Ring(memory, int(sys.argv[2]))
while number < int(sys.argv[3]):
    for _ in range(1 + number % 7):
        number += 1
        ring.publish(1, number)
"""


@pytest.mark.parametrize("looks", [0, 1, 3])
def test_another_process_publishes_and_none_is_overslept(looks: int) -> None:
    """The reader sleeps whenever it has taken all, so a wake-up that is lost leaves it asleep.

    looks: how often it looks by itself before.
    """
    count = 20_000
    fd, event = os.memfd_create("ring"), os.eventfd(0, os.EFD_NONBLOCK)
    os.ftruncate(fd, ring_bytes(count + 7))
    reader = Ring(memoryview(mmap.mmap(fd, ring_bytes(count + 7))), os.dup(event))
    command = [sys.executable, "-c", PUBLISHER, str(fd), str(event), str(count)]
    taken: list[int] = []
    with subprocess.Popen(command, pass_fds=[fd, event]) as publisher:
        while len(taken) < count:
            assert select.select([reader.eventfd], [], [], PATIENCE_S)[0], f"asleep after {len(taken)}"
            for _ in range(looks):
                taken += [number for _, number, _, _ in reader.look()]
            taken += [number for _, number, _, _ in reader.take()]
    assert publisher.returncode == 0
    assert taken == list(range(1, len(taken) + 1))
    reader.close()
    os.close(fd)
    os.close(event)
