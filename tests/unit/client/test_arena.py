"""Memory that is shared with a server, and who has which piece of it."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd._arena import ALIGNMENT_BYTES, Arena, Piece
from expertd._pages import SharedPages

NBYTES = 64 * 1024
PAGE = mmap.PAGESIZE


def arena(first: int = 0) -> Arena:
    return Arena(np.zeros(NBYTES, np.uint8), first=first)


@given(steps=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 7)), max_size=60))
def test_pieces_are_disjoint_and_all_comes_back(steps: list[tuple[int, int]]) -> None:
    """Each step takes a piece, and gives one of those before back."""
    memory = arena(first=16)
    held: list[Piece] = []
    for nbytes, number in steps:
        piece = memory.allocate(nbytes)
        if piece is not None:
            assert piece.offset % ALIGNMENT_BYTES == 0
            assert piece.offset >= 16
            assert piece.nbytes >= nbytes
            assert piece.offset + piece.nbytes <= NBYTES
            taken = [range(other.offset, other.offset + other.nbytes) for other in held]
            assert all(piece.offset + piece.nbytes <= other.start or other.stop <= piece.offset for other in taken)
            held.append(piece)
        if len(held) > number:
            del held[number]
        del piece
    held.clear()
    whole = memory.allocate(NBYTES - ALIGNMENT_BYTES)
    assert whole is not None, "what was given back does not join up"
    assert whole.offset == ALIGNMENT_BYTES


def test_there_is_none_where_there_is_no_room_and_nobody_waits() -> None:
    memory = arena()
    first = memory.allocate(NBYTES // 2 + 1)
    assert first is not None
    assert not memory.is_half_free
    assert memory.allocate(NBYTES // 2) is None
    del first
    assert memory.allocate(NBYTES) is not None


def test_an_array_and_every_view_of_it_keep_the_piece() -> None:
    memory = arena()
    piece = memory.allocate(NBYTES)
    assert piece is not None
    view: np.ndarray[Any, Any] | None = np.frombuffer(piece.array(128, 64), np.uint8).view("<f4").reshape(4, 4)[1:]
    del piece
    gc.collect()
    assert memory.allocate(1) is None
    assert view is not None
    view[0, 0] = 1.0
    assert memory.memory[128 + 16 : 128 + 20].tobytes() == np.float32(1.0).tobytes()
    view = None
    assert memory.allocate(NBYTES) is not None


def test_the_memory_lives_as_long_as_an_array_of_it() -> None:
    memory = arena()
    piece = memory.allocate(64)
    assert piece is not None
    array = piece.array(piece.offset, 64)
    array[:] = 7
    del memory, piece
    gc.collect()
    assert (array == 7).all()


class Shared:
    """An arena in memory that is shared with another, who has the whole of it as `theirs`."""

    def __init__(self, first: int = 0) -> None:
        fd = os.memfd_create("test-arena")
        os.ftruncate(fd, NBYTES)
        mine = np.frombuffer(memoryview(mmap.mmap(fd, NBYTES)), np.uint8)
        self.theirs = np.frombuffer(memoryview(mmap.mmap(fd, NBYTES)), np.uint8)
        self.pages = SharedPages(mine.ctypes.data, fd)
        self.arena = Arena(mine, first=first, pages=self.pages)
        os.close(fd)


@pytest.fixture
def shared() -> Shared:
    return Shared(first=100)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


class TestLent:
    """Arrays that the caller keeps."""

    def test_they_lie_on_pages_of_their_own_while_half_is_free(self, shared: Shared) -> None:
        arena = shared.arena
        small = arena.allocate(10)
        arrays = []
        while (array := arena.lend(PAGE + 1)) is not None:
            arrays.append(array)
        starts = [arena.find(array) for array in arrays]
        assert len(arrays) == NBYTES // 2 // (3 * PAGE)
        assert all(start is not None and start % PAGE == 0 for start in starts)
        assert not arena.is_half_free or arena.allocate(NBYTES // 2) is not None
        for number, array in enumerate(arrays):
            array[:] = number + 1
        others = [arena.allocate(ALIGNMENT_BYTES) for _ in range(100)]
        for other in (small, *others):
            if other is not None:
                shared.theirs[other.offset : other.offset + other.nbytes] = 0xFF
        assert [set(array.tolist()) for array in arrays] == [{number + 1} for number in range(len(arrays))]

    def test_their_space_comes_back(self, shared: Shared) -> None:
        arrays = [shared.arena.lend(PAGE), shared.arena.lend(PAGE)]
        assert all(array is not None for array in arrays)
        assert len(shared.arena._lent) == 2
        arrays.clear()
        assert shared.arena.allocate(NBYTES - 128) is not None
        assert not shared.arena._lent

    def test_what_lies_there_is_found_by_its_address(self, shared: Shared) -> None:
        array = shared.arena.lend(100)
        assert array is not None
        start = shared.arena.find(array)
        assert start is not None
        assert shared.arena.find(array[10:20]) == start + 10
        array[10:20] = 9
        assert (shared.theirs[start + 10 : start + 20] == 9).all()
        for other in (np.zeros(100, np.uint8), shared.theirs[start : start + 100], array[:0]):
            assert shared.arena.find(other) is None

    def test_only_what_has_its_pages_for_itself_can_be_detached(self, shared: Shared) -> None:
        arena = shared.arena
        array = arena.lend(3 * PAGE + 100)
        assert array is not None
        start = arena.find(array)
        for inside, expected in (
            (array, start),
            (array[:PAGE], start),
            (array[PAGE : 3 * PAGE], start + PAGE),  # type: ignore[operator]
            (array[: PAGE - 1], None),
            (array[1:PAGE], None),
            (array[3 * PAGE :], None),
        ):
            assert arena.find_detachable(inside) == expected
        without = Arena(arena.memory)
        assert without.find(array) == start
        assert without.find_detachable(array) is None


class TestDetached:
    """Memory that was shared, and is the caller's alone from one moment to the next."""

    def test_what_others_write_does_not_reach_it_until_it_is_given_back(self, shared: Shared) -> None:
        arena = shared.arena
        array, neighbour = arena.lend(PAGE + 1), arena.lend(PAGE)
        assert array is not None
        assert neighbour is not None
        start = arena.find(array)
        assert start is not None
        arena.detach(start, array.nbytes)
        array[:] = 1
        neighbour[:] = 2
        shared.theirs[start : start + 2 * PAGE] = 0xEE
        assert (array == 1).all()
        assert arena.find(array) is None
        assert arena.find_detachable(array[:PAGE]) is None
        assert (shared.theirs[arena.find(neighbour) :][:PAGE] == 2).all()

        del array
        again = arena.lend(PAGE + 1)
        assert again is not None
        assert arena.find(again) == start
        assert (again == 0xEE).all()
        again[:] = 3
        assert (shared.theirs[start : start + again.nbytes] == 3).all()

    def test_a_part_of_an_array(self, shared: Shared) -> None:
        array = shared.arena.lend(3 * PAGE)
        assert array is not None
        start = shared.arena.find(array)
        assert start is not None
        array[:] = 7
        shared.arena.detach(start + PAGE, PAGE)
        assert [shared.arena.find(array[at : at + 1]) for at in (PAGE - 1, PAGE, 2 * PAGE)] == [
            start + PAGE - 1,
            None,
            start + 2 * PAGE,
        ]
        assert (array[:PAGE] == 7).all()
        assert (array[2 * PAGE :] == 7).all()
        assert shared.arena.find(array) is None

    def test_what_cannot_be_shared_again_is_not_used_again(
        self, shared: Shared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: int) -> None:
            raise OSError(errno.ENOMEM, "no more")

        array = shared.arena.lend(PAGE)
        assert array is not None
        start = shared.arena.find(array)
        assert start is not None
        shared.arena.detach(start, PAGE)
        monkeypatch.setattr(shared.pages, "attach", fail)
        del array
        left: list[Piece] = []
        while (piece := shared.arena.allocate(1)) is not None:
            left.append(piece)
        assert len(left) > NBYTES // ALIGNMENT_BYTES // 2
        assert not any(each.offset <= start < each.offset + each.nbytes for each in left)

    def test_its_file_is_closed_with_the_last_array(self) -> None:
        gc.collect()
        before = open_files()
        array = Shared().arena.lend(PAGE)
        assert open_files() != before
        del array
        gc.collect()
        assert open_files() == before

    def test_the_system_s_word_is_passed_on(self, shared: Shared) -> None:
        with pytest.raises(OSError, match="Invalid argument"):
            shared.pages.detach(1, PAGE)
