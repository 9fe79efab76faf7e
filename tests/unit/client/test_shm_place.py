"""A request in shared memory: the bytes of its message, at the places that it names, and nothing else is touched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from expertd._arena import Arena
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
