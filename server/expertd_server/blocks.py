"""How a request and its answer lie in a block of shared memory: a header, a directory of tensors, their bytes.

The answer is written over its request, so a block has room for the larger of the two, and for an error. Both processes
are of one installation, and only they write here. csrc/blocks.cpp does the same where it was built, see `compiled`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np

from expertd_server.compiled import BLOCKS
from expertd_server.config import LARGEST_BLOCK_OVERHEAD_BYTES
from expertd_server.ring import ALIGNMENT_BYTES
from expertd_server.timing import ForwardTiming
from expertd_server.wire_answer import AnswerTensor
from expertd_server.wire_check import ITEM_BYTES, CheckedRequest, Part

__all__ = ["MAX_ERROR_BYTES", "answer_place", "block_bytes", "read_answer", "read_call", "read_error", "read_timing"]
__all__ += ["write_answer", "write_call", "write_error"]

_ALIGNMENT: Final = 64

# The layer's id, deadline_s (infinite: none), num_tokens, the output's dtype, do_finalize, return_routing.
_CALL: Final = struct.Struct("<Qd4Q")
# The six numbers of ForwardTiming, weights_version, tokens that wait in the engine.
_ANSWER: Final = struct.Struct("<8Q")
# pb.DataType (0: the tensor is absent), number of dimensions, their extents (1 where there are fewer), where the bytes
# start. Of a request's tensors the layer says the shape: here they have one dimension.
_TENSOR: Final = struct.Struct("<5Q")
_MAX_TENSORS: Final = 5
_NUM_PARTS: Final = 4
_DIRECTORY_AT: Final = max(_CALL.size, _ANSWER.size)
_DATA_AT: Final = -(-(_DIRECTORY_AT + _MAX_TENSORS * _TENSOR.size) // _ALIGNMENT) * _ALIGNMENT

MAX_ERROR_BYTES: Final = 8192
"""Of an error; a block has room for as many."""

assert _DATA_AT + MAX_ERROR_BYTES + _MAX_TENSORS * _ALIGNMENT + ALIGNMENT_BYTES <= LARGEST_BLOCK_OVERHEAD_BYTES


def _block_bytes(request: CheckedRequest, hidden_size: int, top_k: int) -> int:
    """Bytes of a block for a request to a layer of that shape, and for its answer."""
    num_tokens, *parts, output_dtype, do_finalize, _ = request
    given = sum(_aligned(len(part[1])) for part in parts if part is not None)
    slots = num_tokens * top_k
    rows = num_tokens * ITEM_BYTES[output_dtype] if do_finalize else slots * 2
    answer = sum(map(_aligned, (rows * hidden_size, slots * 2, slots * 4, slots * 4)))
    return _DATA_AT + max(given, answer, MAX_ERROR_BYTES)


def _write_call(block: memoryview, request: CheckedRequest, layer_id: int, deadline_s: float | None) -> None:
    """Write a request into a block of at least `block_bytes`. layer_id: what stands for the layer that it asks."""
    num_tokens, *parts, output_dtype, do_finalize, return_routing = request
    deadline_s = math.inf if deadline_s is None else deadline_s
    _CALL.pack_into(block, 0, layer_id, deadline_s, num_tokens, output_dtype, do_finalize, return_routing)
    at = _DATA_AT
    for index, part in enumerate(parts):
        if part is None:
            _write_absent(block, index)
        else:
            dtype, data = part
            at = _write_tensor(block, index, dtype, (len(data) // ITEM_BYTES[dtype],), data, at)


def _read_call(block: memoryview) -> tuple[int, float | None, CheckedRequest]:
    """The layer_id, the deadline and the request, its tensors views of the block."""
    layer_id, deadline_s, num_tokens, output_dtype, do_finalize, return_routing = _CALL.unpack_from(block)
    hidden_states, *others = (_read_part(block, index) for index in range(_NUM_PARTS))
    assert hidden_states is not None
    request = num_tokens, hidden_states, *others, output_dtype, bool(do_finalize), bool(return_routing)
    return layer_id, None if deadline_s == math.inf else deadline_s, request


def write_answer(
    block: memoryview,
    tensors: Sequence[AnswerTensor | None],
    timing: ForwardTiming,
    weights_version: int,
    queue_tokens: int,
) -> None:
    """Write an answer over its request. tensors: in the order of ForwardResponse's fields, five.

    Raises ValueError when the block has no room for it.
    """
    _ANSWER.pack_into(
        block,
        0,
        timing.queue_us,
        timing.copy_in_us,
        timing.compute_us,
        timing.copy_out_us,
        timing.batch_tokens,
        timing.batch_requests,
        weights_version,
        queue_tokens,
    )
    at = _DATA_AT
    for index, tensor in enumerate(tensors):
        if tensor is None:
            _write_absent(block, index)
        else:
            at = _write_tensor(block, index, *tensor, at)


def answer_place(block: memoryview) -> memoryview:
    """Where the elements of an answer's first tensor go, and what follows."""
    return block[_DATA_AT:]


def read_timing(block: memoryview) -> tuple[ForwardTiming, int, int]:
    """Of an answer: where its time went, weights_version, and the tokens that waited in the engine."""
    *timing, weights_version, queue_tokens = _ANSWER.unpack_from(block)
    return ForwardTiming(*timing), weights_version, queue_tokens


def read_answer(block: memoryview) -> tuple[AnswerTensor | None, ...]:
    """The tensors of an answer, views of the block, in the order of ForwardResponse's fields."""
    return tuple(_read_tensor(block, index) for index in range(_MAX_TENSORS))


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


def _write_tensor(  # noqa: PLR0917
    block: memoryview, index: int, dtype: int, shape: tuple[int, ...], data: bytes | memoryview, at: int
) -> int:
    """Write one tensor; returns where the next one goes."""
    flat = np.frombuffer(data, np.uint8)
    rows, columns = (*shape, 1)[:2]
    _TENSOR.pack_into(block, _DIRECTORY_AT + index * _TENSOR.size, dtype, len(shape), rows, columns, at)
    np.copyto(np.frombuffer(block, np.uint8, flat.size, at), flat)  # without the GIL, unlike a memoryview's copy
    return at + _aligned(flat.size)


def _read_tensor(block: memoryview, index: int) -> AnswerTensor | None:
    dtype, rank, rows, columns, at = _TENSOR.unpack_from(block, _DIRECTORY_AT + index * _TENSOR.size)
    if not dtype:
        return None
    return dtype, (rows, columns)[:rank], block[at : at + rows * columns * ITEM_BYTES[dtype]]


def _read_part(block: memoryview, index: int) -> Part | None:
    tensor = _read_tensor(block, index)
    return None if tensor is None else (tensor[0], tensor[2])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
