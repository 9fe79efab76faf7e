"""Memory that is shared with a server, and who has which piece of it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertd._arena import ALIGNMENT_BYTES, Arena, Piece

NBYTES = 64 * 1024


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
