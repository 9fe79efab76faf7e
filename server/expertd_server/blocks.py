"""Requests and answers as they lie in a shared block: a fixed header, then the tensors.

A request's header says what `ForwardCall` says, with the layer by name and version; an answer's what `ForwardResult`
says, or the error. The answer takes the request's place in the block: it is written when the request was computed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from expertd_server import errors
from expertd_server.engine import ForwardCall, ForwardResult, ForwardTiming, HostTensor
from expertd_server.errors import (
    ExpertdServerError,
    FieldViolation,
    InvalidArgumentError,
    OverloadedError,
    RequestCancelledError,
)
from expertd_server.layer import MoELayer
from expertd_server.store import LayerStore
from expertd_server.types import LayerSpec

__all__ = ["block_bytes", "read_answer", "read_request", "write_answer", "write_error", "write_request"]

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32)
"""A dtype's code is its place here plus one; 0: no tensor."""
_CODES: Final = {dtype: code for code, dtype in enumerate(_DTYPES, start=1)}

_ALIGNMENT: Final = 64
# dtype, rank, two extents, offset in the block.
_TENSOR: Final = struct.Struct("<4IQ")
_MAX_TENSORS: Final = 5
# weights_version, deadline_s (0: none), output dtype, do_finalize, return_routing, bytes of the layer's name.
_REQUEST: Final = struct.Struct("<Qd4I")
# weights_version, the six numbers of ForwardTiming, tokens that wait, whether it is an error.
_ANSWER: Final = struct.Struct("<Q4Q4I")
_DIRECTORY_AT: Final = max(_REQUEST.size, _ANSWER.size)
_NAME_AT: Final = _DIRECTORY_AT + _MAX_TENSORS * _TENSOR.size
_MAX_NAME_BYTES: Final = 1024  # of a name of at most 256 characters
_DATA_AT: Final = -(-(_NAME_AT + _MAX_NAME_BYTES) // _ALIGNMENT) * _ALIGNMENT
# Bytes of an error as JSON; a longer message is cut.
_MAX_ERROR_BYTES: Final = 8192

_KINDS: Final = {
    kind.__name__: kind
    for kind in (getattr(errors, name) for name in errors.__all__)
    if isinstance(kind, type) and issubclass(kind, ExpertdServerError)
}


def block_bytes(call: ForwardCall) -> int:
    """Bytes that a call or its answer, whichever is larger, takes."""
    tensors = (call.hidden_states, call.routing_logits, call.topk_ids, call.topk_weights)
    request = sum(_aligned(len(tensor.data)) for tensor in tensors if tensor is not None)
    return _DATA_AT + max(request, _answer_bytes(call), _MAX_ERROR_BYTES)


def write_request(block: memoryview, call: ForwardCall, deadline_s: float | None) -> None:
    """Write a call into a block of at least `block_bytes`."""
    name = call.layer.name.encode()
    _REQUEST.pack_into(
        block,
        0,
        call.layer.weights_version,
        deadline_s or 0.0,
        _CODES[call.output_dtype],
        call.do_finalize,
        call.return_routing,
        len(name),
    )
    block[_NAME_AT : _NAME_AT + len(name)] = name
    tensors = (call.hidden_states, call.routing_logits, call.topk_ids, call.topk_weights)
    at = _DATA_AT
    for index, tensor in enumerate(tensors):
        data = None if tensor is None else tensor.data
        at = _write_tensor(block, index, None if tensor is None else (tensor.dtype, tensor.shape, data), at)


def read_request(block: memoryview, store: LayerStore) -> tuple[ForwardCall, float | None]:
    """A call whose tensors are views of the block, and its deadline; raises what `LayerStore.get` raises."""
    version, deadline_s, output, do_finalize, return_routing, name_bytes = _REQUEST.unpack_from(block)
    layer = store.get(bytes(block[_NAME_AT : _NAME_AT + name_bytes]).decode(), version)
    hidden_states, logits, ids, weights = (_host_tensor(block, index) for index in range(4))
    assert hidden_states is not None
    call = ForwardCall(
        layer,
        hidden_states,
        routing_logits=logits,
        topk_ids=ids,
        topk_weights=weights,
        output_dtype=_DTYPES[output - 1],
        do_finalize=bool(do_finalize),
        return_routing=bool(return_routing),
    )
    return call, deadline_s or None


def write_answer(block: memoryview, result: ForwardResult, queue_tokens: int) -> None:
    """Write an answer over its request."""
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
        False,
    )
    at = _DATA_AT
    for index, tensor in enumerate(_tensors(result)):
        if tensor is None:
            at = _write_tensor(block, index, None, at)
        else:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            at = _write_tensor(block, index, (tensor.dtype, tuple(tensor.shape), data), at)


def write_error(block: memoryview, error: BaseException, queue_tokens: int) -> None:
    """Write why there is no answer. What is none of this package's errors arrives as ExpertdServerError: INTERNAL."""
    if isinstance(error, CancelledError):
        error = RequestCancelledError("the caller left before the request was computed")
    kind = type(error).__name__ if isinstance(error, ExpertdServerError) else ExpertdServerError.__name__
    text = str(error) if isinstance(error, ExpertdServerError) else f"{type(error).__name__}: {error}"
    facts: dict[str, Any] = {"kind": kind, "message": text[:1024]}
    if isinstance(error, OverloadedError):
        facts["retry_delay_s"] = error.retry_delay_s
    if isinstance(error, InvalidArgumentError):
        facts["violations"] = [[violation.field[:256], violation.description[:512]] for violation in error.violations]
    data = json.dumps(facts).encode()
    if len(data) > _MAX_ERROR_BYTES - 8:
        data = json.dumps({"kind": kind, "message": text[:1024], "violations": []}).encode()
    _ANSWER.pack_into(block, 0, 0, 0, 0, 0, 0, 0, 0, queue_tokens, True)
    block[_DATA_AT : _DATA_AT + 8] = len(data).to_bytes(8, "little")
    block[_DATA_AT + 8 : _DATA_AT + 8 + len(data)] = data


def read_answer(block: memoryview) -> tuple[ForwardResult | ExpertdServerError, int]:
    """An answer whose tensors are views of the block, or the error; and the tokens that wait in the engine."""
    version, queue, copy_in, compute, copy_out, tokens, requests, queue_tokens, is_error = _ANSWER.unpack_from(block)
    if is_error:
        size = int.from_bytes(block[_DATA_AT : _DATA_AT + 8], "little")
        return _error(json.loads(bytes(block[_DATA_AT + 8 : _DATA_AT + 8 + size]))), queue_tokens
    timing = ForwardTiming(queue, copy_in, compute, copy_out, tokens, requests)
    return ForwardResult(version, timing, *(_torch_tensor(block, index) for index in range(_MAX_TENSORS))), queue_tokens


def _error(facts: dict[str, Any]) -> ExpertdServerError:
    kind = _KINDS[facts["kind"]]
    if kind is OverloadedError:
        return OverloadedError(facts["message"], facts["retry_delay_s"])
    if kind is InvalidArgumentError:
        return InvalidArgumentError([FieldViolation(*violation) for violation in facts["violations"]])
    return kind(facts["message"])


def _tensors(result: ForwardResult) -> Sequence[torch.Tensor | None]:
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
    spec: LayerSpec = call.layer.spec
    slots = call.num_tokens * spec.top_k
    if call.do_finalize:
        rows = call.num_tokens * spec.hidden_size * call.output_dtype.itemsize
    else:
        rows = slots * spec.hidden_size * 2
    return sum(map(_aligned, (rows, slots * 2, slots * 4, slots * 4)))


def _write_tensor(block: memoryview, index: int, tensor: Any, at: int) -> int:
    """Write (dtype, shape, bytes), or that there is no tensor; returns where the next one goes."""
    entry = _DIRECTORY_AT + index * _TENSOR.size
    if tensor is None:
        _TENSOR.pack_into(block, entry, 0, 0, 0, 0, 0)
        return at
    dtype, shape, data = tensor
    source = np.frombuffer(data, np.uint8)
    _TENSOR.pack_into(block, entry, _CODES[dtype], len(shape), shape[0], shape[-1], at)
    np.copyto(np.frombuffer(block, np.uint8, source.size, at), source)
    return at + _aligned(source.size)


def _read_tensor(block: memoryview, index: int) -> tuple[torch.dtype, tuple[int, ...], memoryview] | None:
    code, rank, rows, columns, at = _TENSOR.unpack_from(block, _DIRECTORY_AT + index * _TENSOR.size)
    if not code:
        return None
    shape = (rows, columns) if rank == 2 else (rows,)
    dtype = _DTYPES[code - 1]
    return dtype, shape, block[at : at + math.prod(shape) * dtype.itemsize]


def _host_tensor(block: memoryview, index: int) -> HostTensor | None:
    found = _read_tensor(block, index)
    return None if found is None else HostTensor(*found)


def _torch_tensor(block: memoryview, index: int) -> torch.Tensor | None:
    found = _read_tensor(block, index)
    if found is None:
        return None
    dtype, shape, data = found
    if not len(data):  # torch takes no empty buffer
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
