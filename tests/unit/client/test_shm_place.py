"""A request in shared memory: the bytes of its message, at the places that it names, and nothing else is touched."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from expertd._arena import MIN_ARENA_BYTES, Arena, Bytes
from expertd._pages import SharedPages
from expertd._rings import num_slots, rings_end
from expertd._shm import StreamMemory, WantedMemory
from expertd._split import owners, split
from expertd._wire import Encoded, encode_forward_request, encode_stream_request
from expertd.tensors import WireRows, WireTensor, to_wire
from expertd.v1 import expertd_pb2 as pb

HIDDEN_SIZE = 33
TENSORS = ("hidden_states", "topk_ids", "topk_weights")


def a_memory(nbytes: int) -> tuple[StreamMemory, Arena]:
    memory = StreamMemory(WantedMemory("here", 1 << 20, is_required=True, limit=1 << 20), 1)
    arena = memory._arena = Arena(np.full(nbytes, 0xA5, np.uint8), first=16)
    return memory, arena


def a_shared_memory(nbytes: int) -> tuple[StreamMemory, Arena]:
    """Whose pages can be detached."""
    memory, _ = a_memory(0)
    fd = os.memfd_create("test-region")
    os.ftruncate(fd, nbytes)
    mapped = np.frombuffer(memoryview(mmap.mmap(fd, nbytes)), np.uint8)
    arena = memory._arena = Arena(mapped, first=16, pages=SharedPages(mapped.ctypes.data, fd))
    os.close(fd)
    return memory, arena


def encoded(seed: int, hidden_states: WireTensor | WireRows | None = None) -> Encoded:
    chance = np.random.default_rng(seed)
    tokens = int(chance.integers(0, 9)) if hidden_states is None else hidden_states.shape[0]
    if hidden_states is None:
        values = chance.standard_normal((tokens, HIDDEN_SIZE)).astype(ml_dtypes.bfloat16)
        hidden_states = to_wire("hidden_states", values)[0]
    ids = to_wire("topk_ids", chance.integers(-1, 8, (tokens, 3), np.int32))[0]
    weights = to_wire("topk_weights", chance.standard_normal((tokens, 3), np.float32))[0]
    return encode_forward_request("x", hidden_states, topk_ids=ids, topk_weights=weights)


def check(body: Encoded) -> None:
    memory, arena = a_memory(1 << 16)
    placed = memory.place(7, body, 5)
    assert placed is not None
    message, piece = placed
    seen = pb.ForwardStreamRequest.FromString(message)
    where = seen.request.answer_slice
    assert (where.region, where.offset, where.nbytes) == (1, piece.offset, piece.nbytes)
    assert not piece.is_out
    seen.request.ClearField("answer_slice")
    taken = np.zeros(arena.memory.nbytes, bool)
    for name in TENSORS:
        tensor = getattr(seen.request, name)
        start, stop = tensor.slice.offset, tensor.slice.offset + tensor.slice.nbytes
        assert piece.offset <= start <= stop <= piece.offset + piece.nbytes
        assert start % 64 == 0
        assert not taken[start:stop].any()
        taken[start:stop] = True
        tensor.data = arena.memory[start:stop].tobytes()
        tensor.ClearField("slice")
    assert seen == pb.ForwardStreamRequest.FromString(encode_stream_request(7, body, 5))
    assert (arena.memory[~taken] == 0xA5).all()


@pytest.mark.parametrize("seed", range(10))
def test_tensors_lie_where_the_message_says(seed: int) -> None:
    check(encoded(seed))


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_a_group_s_part_are_gathered_there(seed: int) -> None:
    """They come in pieces, and odd ones: 33 FP8 elements a row."""
    chance = np.random.default_rng(seed)
    hidden = to_wire("hidden_states", chance.standard_normal((20, HIDDEN_SIZE)).astype(ml_dtypes.float8_e4m3fn))[0]
    ids = chance.integers(0, 8, (20, 3), np.int32)
    weights = np.ones((20, 3), ml_dtypes.bfloat16)
    parts = split(hidden, ids, weights, owners(ids, 8, [range(4), range(4, 8)]), [100, 7])
    assert any(len(part.hidden_states.pieces) > 1 for part in parts)
    for part in parts:
        check(encoded(seed, part.hidden_states))


class TestInPlace:
    """Tensors that lie in the memory already, and outputs that the caller wants there."""

    TOKENS = 8

    def lent(self, memory: StreamMemory, columns: int, dtype: Any) -> WireTensor:
        data: Bytes | None = memory.lend(self.TOKENS * columns * np.dtype(dtype).itemsize)
        assert data is not None
        return to_wire("x", data.view(dtype).reshape(self.TOKENS, columns))[0]

    def encoded(self, hidden: WireTensor, weights: WireTensor, out: WireTensor | None) -> Encoded:
        ids = to_wire("topk_ids", np.zeros((self.TOKENS, 3), np.int32))[0]
        return encode_forward_request("x", hidden, topk_ids=ids, topk_weights=weights, out=out)

    def test_each_stays_where_it_is_and_the_others_are_copied(self) -> None:
        memory, arena = a_shared_memory(1 << 18)
        hidden, weights = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16), self.lent(memory, 3, np.float32)
        out = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16)
        there = memory.place(7, self.encoded(hidden, weights, out), 5)
        assert there is not None
        message, placed = there
        seen = pb.ForwardStreamRequest.FromString(message).request
        slices = [seen.hidden_states.slice, seen.topk_weights.slice, seen.answer_slice]
        for where, tensor in zip(slices, (hidden, weights, out), strict=True):
            assert (where.region, where.offset, where.nbytes) == (1, arena.find(tensor.data), tensor.nbytes)
            assert placed.holds(where.offset, 1)
            assert not placed.holds(where.offset - 1, 1)
        copied = seen.topk_ids.slice
        assert not any(placed.holds(at, 1) for at in (copied.offset, copied.offset + copied.nbytes - 1))
        assert placed.is_out

    def test_nothing_is_taken_where_all_is_there(self) -> None:
        memory, arena = a_shared_memory(1 << 18)
        hidden, weights = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16), self.lent(memory, 3, np.float32)
        out = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16)
        free = arena._free
        body = encode_forward_request("x", hidden, routing_logits=weights, out=out)
        assert memory.place(7, body, 5) is not None
        assert arena._free == free

    def test_an_answer_is_not_written_over_tensors_in_place(self) -> None:
        memory, arena = a_shared_memory(1 << 18)
        hidden, weights = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16), self.lent(memory, 3, np.float32)
        there = memory.place(7, encode_forward_request("x", hidden, routing_logits=weights), 5)
        assert there is not None
        _, placed = there
        assert not placed.is_out
        for tensor in (hidden, weights):
            start = arena.find(tensor.data)
            assert start is not None
            assert start + tensor.nbytes <= placed.offset or placed.offset + placed.nbytes <= start

    @pytest.mark.parametrize("how", ["read", "written", "elsewhere"])
    def test_an_output_never_goes_where_another_request_still_reads_or_writes(self, how: str) -> None:
        memory, _ = a_shared_memory(1 << 18)
        first, second, weights = (self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16) for _ in range(3))
        if how == "elsewhere":
            before = self.encoded(second, weights, None)
        else:
            before = self.encoded(first if how == "read" else second, weights, first if how == "written" else None)
        earlier = memory.place(7, before, 5)
        assert earlier is not None
        later = memory.place(8, self.encoded(second, weights, first), 5, [earlier[1]])
        assert later is not None
        assert later[1].is_out == (how == "elsewhere")

    def test_what_was_given_up_is_out_of_the_server_s_reach_once_and_for_all(self) -> None:
        memory, arena = a_shared_memory(1 << 18)
        hidden, weights = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16), self.lent(memory, 3, np.float32)
        out = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16)
        there = memory.place(7, self.encoded(hidden, weights, out), 5)
        assert there is not None
        there[1].give_up()
        assert arena.find(out.data) is None
        assert arena.find(hidden.data) is not None
        out.data[:] = 3
        there[1].give_up()
        assert (out.data == 3).all()
        again = memory.place(8, self.encoded(hidden, weights, out), 5)
        assert again is not None
        assert not again[1].is_out

    def test_its_space_is_not_used_again_before_the_request_is_answered(self) -> None:
        memory, arena = a_shared_memory(1 << 18)
        hidden, weights = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16), self.lent(memory, 3, np.float32)
        there = memory.place(7, self.encoded(hidden, weights, self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16)), 5)
        assert there is not None
        start = there[1].offset
        there[1].give_up()
        assert start not in self.starts(arena)
        del there
        assert start in self.starts(arena)

    def test_where_it_cannot_be_taken_away_the_log_says_so(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: int) -> None:
            raise OSError(errno.ENOMEM, "no more")

        memory, arena = a_shared_memory(1 << 18)
        hidden, weights = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16), self.lent(memory, 3, np.float32)
        out = self.lent(memory, HIDDEN_SIZE, ml_dtypes.bfloat16)
        there = memory.place(7, self.encoded(hidden, weights, out), 5)
        assert there is not None
        monkeypatch.setattr(arena._pages, "detach", fail)
        there[1].give_up()
        assert "drop the array" in caplog.text
        again = memory.place(8, self.encoded(hidden, weights, out), 5, [there[1]])
        assert again is not None
        assert not again[1].is_out

    def starts(self, arena: Arena) -> list[int | None]:
        held = []
        while (array := arena.lend(64)) is not None:
            held.append(array)
        return [arena.find(array) for array in held]


def test_rings_have_room_for_twice_what_is_in_flight_where_the_region_is_large_enough() -> None:
    assert num_slots(32, 1 << 28) == 64
    assert num_slots(100, 1 << 28) == 200
    assert num_slots(1, 1 << 28) == 64
    assert num_slots(10**6, 1 << 28) == 1 << 14
    for nbytes in (MIN_ARENA_BYTES, 1 << 28):
        assert rings_end(num_slots(10**6, nbytes)) < nbytes / 7
