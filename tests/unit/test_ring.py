"""Shared memory of a front-end and the engine: blocks never overlap and come back, descriptors arrive in order."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertd_server.ring import ALIGNMENT_BYTES, Arena, Block, Channel, Ring, shared_bytes

PAGES = 16
PATIENCE_S = 30.0


class ArenaMachine(RuleBasedStateMachine):
    """An arena against a list of pages, each free or not."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(memoryview(bytearray(PAGES * ALIGNMENT_BYTES)))
        self.blocks: list[Block] = []

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
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class TestWaitingForRoom:
    def test_whoever_waits_gets_what_another_frees(self) -> None:
        arena = Arena(memoryview(bytearray(4 * ALIGNMENT_BYTES)))
        held: list[Any] = [arena.allocate(ALIGNMENT_BYTES) for _ in range(4)]
        got: list[Block | None] = []
        waiter = threading.Thread(target=lambda: got.append(arena.allocate(2 * ALIGNMENT_BYTES, PATIENCE_S)))
        waiter.start()
        del held[2]
        assert arena.allocate(ALIGNMENT_BYTES, 0.0) is None or not waiter.is_alive(), "nobody passes by who waits"
        del held[1]
        waiter.join(PATIENCE_S)
        assert got[0] is not None
        assert got[0].offset == ALIGNMENT_BYTES

    def test_waiting_ends(self) -> None:
        arena = Arena(memoryview(bytearray(ALIGNMENT_BYTES)))
        held = arena.allocate(1)
        assert arena.allocate(1, 0.01) is None
        assert arena.allocate(1, -1.0) is None, "a deadline that has passed"
        del held
        assert arena.allocate(1) is not None

    def test_what_can_never_fit_does_not_wait(self) -> None:
        assert Arena(memoryview(bytearray(ALIGNMENT_BYTES))).allocate(ALIGNMENT_BYTES + 1, PATIENCE_S) is None


def both_ends(num_slots: int) -> tuple[Ring, Ring]:
    """A writer and a reader of one memory."""
    memory, fd = memoryview(bytearray(num_slots * 32)), os.eventfd(0, os.EFD_NONBLOCK)
    return Ring(memory, fd), Ring(memory, os.dup(fd))


class TestRing:
    @settings(max_examples=50, deadline=None)
    @given(batches=st.lists(st.integers(0, 5), max_size=20))
    def test_what_is_published_is_taken_once_and_in_order(self, batches: list[int]) -> None:
        ring, reader = both_ends(5)
        number = 0
        for count in batches:
            published = []
            for _ in range(count):
                number += 1
                ring.publish(1, number, number * 4096, number + 7)
                published.append((1, number, number * 4096, number + 7))
            taken = reader.take()
            assert [(d.kind, d.request_id, d.offset, d.nbytes) for d in taken] == published
        assert reader.take() == []
        ring.close()
        reader.close()

    def test_many_threads_publish(self) -> None:
        writer, reader = both_ends(4000)

        def publish(kind: int) -> None:
            for number in range(1000):
                writer.publish(kind, number)

        threads = [threading.Thread(target=publish, args=(kind,)) for kind in range(4)]
        for thread in threads:
            thread.start()
        taken: dict[int, list[int]] = {kind: [] for kind in range(4)}
        while sum(map(len, taken.values())) < 4000:
            for descriptor in reader.take():
                taken[descriptor.kind].append(descriptor.request_id)
        for thread in threads:
            thread.join(PATIENCE_S)
        assert taken == {kind: list(range(1000)) for kind in range(4)}
        writer.close()
        reader.close()

    def test_a_closed_ring_writes_into_no_other_file(self) -> None:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        ring = Ring(memoryview(bytearray(32)), fd)
        ring.close()
        ring.close()
        reused = os.eventfd(0, os.EFD_NONBLOCK)
        assert reused == fd, "the test needs the same number"
        ring.publish(1, 1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(reused)
        os.close(reused)


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
    assert [(d.request_id, d.offset) for d in from_frontend.take()] == [(n, 3 * n) for n in range(21)]
    assert [(d.kind, d.request_id) for d in to_frontend.take()] == [(2, n) for n in range(7)]
    assert bytes(memory) == b"\xff" * len(memory)
    for ring in (to_engine, to_frontend, from_frontend, from_engine):
        ring.close()
    del arena, memory, to_engine, to_frontend, from_frontend, from_engine, ring
    assert os.listdir("/proc/self/fd") == before
