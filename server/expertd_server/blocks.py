"""How a request and its answer lie in a block of shared memory: a header, a directory of tensors, their bytes.

The answer is written over its request, so a block has room for the larger of the two, and for an error.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from expertd_server.config import LARGEST_BLOCK_OVERHEAD_BYTES
from expertd_server.forward import ForwardCall, ForwardResult, ForwardTiming, HostTensor
from expertd_server.layer import MoELayer
from expertd_server.ring import ALIGNMENT_BYTES

__all__ = ["MAX_ERROR_BYTES", "block_bytes", "read_answer", "read_call", "read_error"]
__all__ += ["read_layer_id", "write_answer", "write_call", "write_error"]

# An absent tensor has code 0, the others the place of their dtype here, from 1.
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32)
_CODES: Final = {dtype: code for code, dtype in enumerate(_DTYPES, start=1)}
_ALIGNMENT: Final = 64

# The layer's id, deadline_s (infinite: none), the output's dtype, do_finalize, return_routing.
_CALL: Final = struct.Struct("<Qd3Q")
# weights_version, the six numbers of ForwardTiming, tokens that wait in the engine.
_ANSWER: Final = struct.Struct("<8Q")
# dtype, number of dimensions, their extents (1 where there are fewer), where the bytes start.
_TENSOR: Final = struct.Struct("<5Q")
_MAX_TENSORS: Final = 5
_DIRECTORY_AT: Final = max(_CALL.size, _ANSWER.size)
_DATA_AT: Final = -(-(_DIRECTORY_AT + _MAX_TENSORS * _TENSOR.size) // _ALIGNMENT) * _ALIGNMENT

MAX_ERROR_BYTES: Final = 8192
"""Of an error; a block has room for as many."""

assert _DATA_AT + MAX_ERROR_BYTES + _MAX_TENSORS * _ALIGNMENT + ALIGNMENT_BYTES <= LARGEST_BLOCK_OVERHEAD_BYTES


def block_bytes(call: ForwardCall) -> int:
    """Bytes of a block for a call and its answer."""
    request = sum(_aligned(len(tensor.data)) for tensor in _given(call) if tensor is not None)
    return _DATA_AT + max(request, _answer_bytes(call), MAX_ERROR_BYTES)


def write_call(block: memoryview, call: ForwardCall, layer_id: int, deadline_s: float | None) -> None:
    """Write a call into a block of at least `block_bytes`. layer_id: what stands for call.layer."""
    deadline_s = math.inf if deadline_s is None else deadline_s
    _CALL.pack_into(block, 0, layer_id, deadline_s, _CODES[call.output_dtype], call.do_finalize, call.return_routing)
    at = _DATA_AT
    for index, tensor in enumerate(_given(call)):
        if tensor is None:
            _write_absent(block, index)
        else:
            at = _write_tensor(block, index, tensor, at)


def read_layer_id(block: memoryview) -> int:
    """The layer_id of a call."""
    layer_id: int = _CALL.unpack_from(block)[0]
    return layer_id


def read_call(block: memoryview, layer: MoELayer) -> tuple[ForwardCall, float | None]:
    """A call of this layer, its tensors views of the block, and its deadline."""
    _, deadline_s, output, do_finalize, return_routing = _CALL.unpack_from(block)
    hidden_states, routing_logits, topk_ids, topk_weights = (_host_tensor(block, index) for index in range(4))
    assert hidden_states is not None
    call = ForwardCall(
        layer,
        hidden_states,
        routing_logits=routing_logits,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        output_dtype=_DTYPES[output - 1],
        do_finalize=bool(do_finalize),
        return_routing=bool(return_routing),
    )
    return call, None if deadline_s == math.inf else deadline_s


def write_answer(block: memoryview, result: ForwardResult, queue_tokens: int) -> None:
    """Write an answer over its call."""
    timing = result.timing
    _ANSWER.pack_into(
        block,
        0,
        result.weights_version,
        timing.queue_us,
        timing.copy_in_us,
        timing.compute_us,
        timing.copy_out_us,
        timing.batch_tokens,
        timing.batch_requests,
        queue_tokens,
    )
    at = _DATA_AT
    for index, tensor in enumerate(_answered(result)):
        if tensor is None:
            _write_absent(block, index)
        else:
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            at = _write_tensor(block, index, HostTensor(tensor.dtype, tuple(tensor.shape), data), at)


def read_answer(block: memoryview) -> tuple[ForwardResult, int]:
    """An answer, its tensors views of the block, and the tokens that waited in the engine."""
    version, queue_us, copy_in_us, compute_us, copy_out_us, tokens, requests, queue_tokens = _ANSWER.unpack_from(block)
    timing = ForwardTiming(queue_us, copy_in_us, compute_us, copy_out_us, tokens, requests)
    return ForwardResult(version, timing, *(_torch_tensor(block, index) for index in range(_MAX_TENSORS))), queue_tokens


def write_error(block: memoryview, error: bytes) -> int:
    """Write an error of at most MAX_ERROR_BYTES over its call; returns its size."""
    block[: len(error)] = error
    return len(error)


def read_error(block: memoryview, nbytes: int) -> bytes:
    """What `write_error` wrote."""
    return bytes(block[:nbytes])


def _given(call: ForwardCall) -> Sequence[HostTensor | None]:
    return call.hidden_states, call.routing_logits, call.topk_ids, call.topk_weights


def _answered(result: ForwardResult) -> Sequence[torch.Tensor | None]:
    """In the order of ForwardResult's fields."""
    return (
        result.output,
        result.gemm2_output,
        result.expert_weights,
        result.topk_ids,
        result.expanded_idx_to_permuted_idx,
    )


def _answer_bytes(call: ForwardCall) -> int:
    """Most bytes of an answer's tensors."""
    spec = call.layer.spec
    slots = call.num_tokens * spec.top_k
    if call.do_finalize:
        rows = call.num_tokens * spec.hidden_size * call.output_dtype.itemsize
    else:
        rows = slots * spec.hidden_size * 2
    return sum(map(_aligned, (rows, slots * 2, slots * 4, slots * 4)))


def _write_absent(block: memoryview, index: int) -> None:
    _TENSOR.pack_into(block, _DIRECTORY_AT + index * _TENSOR.size, 0, 0, 0, 0, 0)


def _write_tensor(block: memoryview, index: int, tensor: HostTensor, at: int) -> int:
    """Write one tensor; returns where the next one goes."""
    data = np.frombuffer(tensor.data, np.uint8)
    rows, columns = (*tensor.shape, 1)[:2]
    entry = _DIRECTORY_AT + index * _TENSOR.size
    _TENSOR.pack_into(block, entry, _CODES[tensor.dtype], len(tensor.shape), rows, columns, at)
    np.copyto(np.frombuffer(block, np.uint8, data.size, at), data)  # without the GIL, unlike a memoryview's copy
    return at + _aligned(data.size)


def _read_tensor(block: memoryview, index: int) -> tuple[torch.dtype, tuple[int, ...], int] | None:
    """dtype, shape and place of a tensor; None: it is absent."""
    code, num_dimensions, rows, columns, at = _TENSOR.unpack_from(block, _DIRECTORY_AT + index * _TENSOR.size)
    return (_DTYPES[code - 1], (rows, columns)[:num_dimensions], at) if code else None


def _host_tensor(block: memoryview, index: int) -> HostTensor | None:
    found = _read_tensor(block, index)
    if found is None:
        return None
    dtype, shape, at = found
    return HostTensor(dtype, shape, block[at : at + math.prod(shape) * dtype.itemsize])


def _torch_tensor(block: memoryview, index: int) -> torch.Tensor | None:
    found = _read_tensor(block, index)
    if found is None:
        return None
    dtype, shape, at = found
    if not math.prod(shape):  # torch takes no empty buffer
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype, count=math.prod(shape), offset=at).view(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
