"""How a request and its answer lie in a block of shared memory: a header, a directory of tensors, their bytes.

The answer is written over its request, so a block has room for the larger of the two, and for an error. Hidden states
may lie elsewhere, in a region that both processes have mapped (`region_handover`), and an answer that is one matrix may
have its place there; then the block says where. Both processes are of one installation, and only they write here.
csrc/blocks.cpp does the same where it was built, see `compiled`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np

from expertd.v1 import expertd_pb2 as pb
from expertd_server.compiled import BLOCKS
from expertd_server.config import LARGEST_BLOCK_OVERHEAD_BYTES
from expertd_server.native import copy_bytes
from expertd_server.region_handover import Where
from expertd_server.ring import ALIGNMENT_BYTES
from expertd_server.timing import ForwardTiming
from expertd_server.wire_answer import AnswerTensor
from expertd_server.wire_check import ITEM_BYTES, CheckedRequest, Part, is_nan

__all__ = ["MAX_ERROR_BYTES", "answer_place", "block_bytes", "read_answer", "read_call", "read_error", "read_timing"]
__all__ += ["write_answer", "write_call", "write_error"]

_ALIGNMENT: Final = 64

# The layer's id, deadline_s (infinite: none), num_tokens, the output's dtype, do_finalize, return_routing; the Where of
# the hidden states and that of the output's place, as far as there is one.
_CALL: Final = struct.Struct("<Qd10Q")
_NOWHERE: Final = (0, 0, 0)
# The six numbers of ForwardTiming, weights_version, tokens that wait in the engine.
_ANSWER: Final = struct.Struct("<8Q")
# pb.DataType (0: the tensor is absent), number of dimensions, their extents (1 where there are fewer), where the bytes
# start, or _ELSEWHERE. Of a request's tensors the layer says the shape: here they have one dimension.
_TENSOR: Final = struct.Struct("<5Q")
_ELSEWHERE: Final = 0
_MAX_TENSORS: Final = 5
_NUM_PARTS: Final = 4
_LOGITS: Final = 1
_DIRECTORY_AT: Final = max(_CALL.size, _ANSWER.size)
_DATA_AT: Final = -(-(_DIRECTORY_AT + _MAX_TENSORS * _TENSOR.size) // _ALIGNMENT) * _ALIGNMENT

MAX_ERROR_BYTES: Final = 8192
"""Of an error; a block has room for as many."""

assert _DATA_AT + MAX_ERROR_BYTES + _MAX_TENSORS * _ALIGNMENT + ALIGNMENT_BYTES <= LARGEST_BLOCK_OVERHEAD_BYTES


def _block_bytes(
    request: CheckedRequest,
    hidden_size: int,
    top_k: int,
    hidden_states: Where | None = None,
    place: Where | None = None,
) -> int:
    """Bytes of a block for a request to a layer of that shape, and for its answer; see `_write_call`."""
    num_tokens, *parts, output_dtype, do_finalize, _ = request
    here = parts if hidden_states is None else parts[1:]
    given = sum(_aligned(len(part[1])) for part in here if part is not None)
    answer = 0
    if place is None:
        slots = num_tokens * top_k
        rows = num_tokens * ITEM_BYTES[output_dtype] if do_finalize else slots * 2
        answer = sum(map(_aligned, (rows * hidden_size, slots * 2, slots * 4, slots * 4)))
    return _DATA_AT + max(given, answer, MAX_ERROR_BYTES)


def _write_call(  # noqa: PLR0917 (the compiled one takes no keywords)
    block: memoryview,
    request: CheckedRequest,
    layer_id: int,
    deadline_s: float | None,
    hidden_states: Where | None = None,
    place: Where | None = None,
) -> bool:
    """Write a request into a block of at least `block_bytes`. layer_id: what stands for the layer that it asks. Whether
    the logits are numbers as they lie there: who shares them with a caller has not seen them change since the check.

    hidden_states: where the reader finds those, instead of the block. place: where it is to put the answer, which must
    be one matrix of as many bytes, instead of the block.
    """
    num_tokens, *parts, output_dtype, do_finalize, return_routing = request
    deadline_s = math.inf if deadline_s is None else deadline_s
    elsewhere = *(hidden_states or _NOWHERE), *(place or _NOWHERE)
    _CALL.pack_into(block, 0, layer_id, deadline_s, num_tokens, output_dtype, do_finalize, return_routing, *elsewhere)
    at, has_numbers = _DATA_AT, True
    for index, part in enumerate(parts):
        if part is None:
            _write_absent(block, index)
        elif not index and hidden_states is not None:
            _write_entry(block, index, part[0], (hidden_states[2] // ITEM_BYTES[part[0]],), _ELSEWHERE)
        else:
            dtype, data = part
            first, at = at, _write_tensor(block, index, dtype, (len(data) // ITEM_BYTES[dtype],), data, at)
            if index == _LOGITS and dtype in {pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_BFLOAT16}:
                has_numbers = not is_nan(dtype, block[first : first + len(data)]).any()
    return has_numbers


def _read_call(
    block: memoryview, regions: dict[int, memoryview]
) -> tuple[int, float | None, CheckedRequest, memoryview | None]:
    """The layer_id, the deadline, the request, its tensors views of the block or a region, and the answer's place.

    regions: what is mapped here, by the region's number. Raises ValueError where a view would not lie in it.
    """
    layer_id, deadline_s, num_tokens, output_dtype, do_finalize, return_routing, *elsewhere = _CALL.unpack_from(block)
    hidden_states, *others = (_read_part(block, index) for index in range(_NUM_PARTS))
    assert hidden_states is not None
    where, place = elsewhere[:3], elsewhere[3:]
    if where[0]:
        hidden_states = hidden_states[0], _view_of(regions, *where)
    request = num_tokens, hidden_states, *others, output_dtype, bool(do_finalize), bool(return_routing)
    deadline_s = None if deadline_s == math.inf else deadline_s
    return layer_id, deadline_s, request, _view_of(regions, *place) if place[0] else None


def write_answer(  # noqa: PLR0917
    block: memoryview,
    tensors: Sequence[AnswerTensor | None],
    timing: ForwardTiming,
    weights_version: int,
    queue_tokens: int,
    place: memoryview | None = None,
) -> None:
    """Write an answer over its request. tensors: in the order of ForwardResponse's fields, five.

    place: where the first goes, instead of the block. Raises ValueError when there is no room for it.
    """
    _ANSWER.pack_into(
        block,
        0,
        *timing.numbers,
        weights_version,
        queue_tokens,
    )
    at = _DATA_AT
    for index, tensor in enumerate(tensors):
        if tensor is None:
            _write_absent(block, index)
        elif not index and place is not None:
            dtype, shape, data = tensor
            _write_entry(block, index, dtype, shape, _ELSEWHERE)
            copy_bytes(place, 0, data)
        else:
            at = _write_tensor(block, index, *tensor, at)


def answer_place(block: memoryview) -> memoryview:
    """Where the elements of an answer's first tensor go, and what follows."""
    return block[_DATA_AT:]


def read_timing(block: memoryview) -> tuple[ForwardTiming, int, int]:
    """Of an answer: where its time went, weights_version, and the tokens that waited in the engine."""
    *timing, weights_version, queue_tokens = _ANSWER.unpack_from(block)
    return ForwardTiming(*timing), weights_version, queue_tokens


def read_answer(block: memoryview, place: memoryview | None = None) -> tuple[AnswerTensor | None, ...]:
    """The tensors of an answer, views of the block, in the order of ForwardResponse's fields.

    place: the first is a view of this, if the request had it for a place.
    """
    first, *others = (_read_tensor(block, index) for index in range(_MAX_TENSORS))
    if first is not None and place is not None:
        first = *first[:2], place
    return first, *others


block_bytes = _block_bytes if BLOCKS is None else BLOCKS.block_bytes
write_call = _write_call if BLOCKS is None else BLOCKS.write_call
read_call = _read_call if BLOCKS is None else BLOCKS.read_call


def write_error(block: memoryview, error: bytes) -> int:
    """Write an error of at most MAX_ERROR_BYTES over its request; returns its size."""
    block[: len(error)] = error
    return len(error)


def read_error(block: memoryview, nbytes: int) -> bytes:
    """What `write_error` wrote."""
    return bytes(block[:nbytes])


def _write_absent(block: memoryview, index: int) -> None:
    _TENSOR.pack_into(block, _DIRECTORY_AT + index * _TENSOR.size, 0, 0, 0, 0, 0)


def _write_entry(block: memoryview, index: int, dtype: int, shape: tuple[int, ...], at: int) -> None:
    rows, columns = (*shape, 1)[:2]
    _TENSOR.pack_into(block, _DIRECTORY_AT + index * _TENSOR.size, dtype, len(shape), rows, columns, at)


def _write_tensor(  # noqa: PLR0917
    block: memoryview, index: int, dtype: int, shape: tuple[int, ...], data: bytes | memoryview, at: int
) -> int:
    """Write one tensor; returns where the next one goes."""
    flat = np.frombuffer(data, np.uint8)
    _write_entry(block, index, dtype, shape, at)
    np.copyto(np.frombuffer(block, np.uint8, flat.size, at), flat)  # without the GIL, unlike a memoryview's copy
    return at + _aligned(flat.size)


def _read_tensor(block: memoryview, index: int) -> AnswerTensor | None:
    """Of one that is elsewhere, the data is of no use."""
    dtype, rank, rows, columns, at = _TENSOR.unpack_from(block, _DIRECTORY_AT + index * _TENSOR.size)
    if not dtype:
        return None
    return dtype, (rows, columns)[:rank], block[at : at + rows * columns * ITEM_BYTES[dtype]]


def _read_part(block: memoryview, index: int) -> Part | None:
    tensor = _read_tensor(block, index)
    return None if tensor is None else (tensor[0], tensor[2])


def _view_of(regions: dict[int, memoryview], number: int, offset: int, nbytes: int) -> memoryview:
    region = regions.get(number, memoryview(b""))
    if offset + nbytes > len(region):
        raise ValueError(
            f"{nbytes} bytes at {offset} of region {number} are not mapped here: {len(region)} bytes of it are"
        )
    return region[offset : offset + nbytes]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
