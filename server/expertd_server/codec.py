"""Bytes to checked calls, and answers to bytes: the fast way where there is one.

The compiled module knows requests that are as they should be, and answers that are one matrix, both with their tensors
in the message. Whatever else comes, every request with something wrong to be told and all that names shared memory
included, goes the way of `wire_parse` and `wire`, which are the specification: tests hold the two equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from expertd_server.forward import ForwardCall, ForwardResult, HostTensor
from expertd_server.native import CODEC
from expertd_server.regions import AnswerPlace
from expertd_server.store import LayerStore
from expertd_server.wire import (
    TORCH_DTYPES,
    WIRE_DTYPES,
    encode_response,
    encode_stream_response,
    read_call,
)
from expertd_server.wire_parse import RawRequest, RawStreamRequest, parse_request, parse_stream_request

if TYPE_CHECKING:
    from expertd_server._codec import Request


Message: TypeAlias = "RawRequest | Request"
"""A ForwardRequest, unchecked."""

__all__ = ["Message", "read_message", "read_stream_message", "typed_call", "write_answer", "write_stream_answer"]


def read_message(data: bytes) -> Message:
    """Parse a ForwardRequest. Raises InvalidArgumentError on bytes that are none."""
    if CODEC is not None and (request := CODEC.parse_request(data)) is not None:
        return request
    return parse_request(data)


def read_stream_message(data: bytes) -> tuple[int, int, int, Message | RawStreamRequest | None]:
    """The id, timeout_ms, rows of hidden_states and request of a ForwardStreamRequest.

    In place of the request, the whole of a message that says something about regions. Raises InvalidArgumentError on
    bytes that are none.
    """
    if CODEC is not None and (request := CODEC.parse_stream_request(data)) is not None:
        return request.id, request.timeout_ms, request.num_tokens, request
    raw = parse_stream_request(data)
    return raw.id, raw.timeout_ms, raw.num_tokens, raw if raw.is_about_regions else raw.request


def typed_call(message: Message, store: LayerStore, *, max_batch_tokens: int, max_message_bytes: int) -> ForwardCall:
    """Check everything about a request, and type it; see `read_call`."""
    if not isinstance(message, RawRequest):
        call = _good_call(message, store, max_batch_tokens, max_message_bytes)
        if call is not None:
            return call
        message = _reread(message)
    return read_call(message, store, max_batch_tokens=max_batch_tokens, max_message_bytes=max_message_bytes)


def _reread(message: Request) -> RawRequest:
    if not message.is_stream:
        return parse_request(message.data)
    request = parse_stream_request(message.data).request
    assert request is not None, "else it were no Request"
    return request


def _good_call(
    message: Request, store: LayerStore, max_batch_tokens: int, max_message_bytes: int
) -> ForwardCall | None:
    layer = store.get(message.layer, message.weights_version or None)
    spec = layer.spec
    takes_wide = layer.hidden_states_scale is not None
    good = message.check(
        spec.hidden_size, spec.num_experts, spec.top_k, takes_wide, max_batch_tokens, max_message_bytes
    )
    if good is None:
        return None
    num_tokens, hidden_states, logits, ids, weights, output_dtype, do_finalize, return_routing = good
    selected = (num_tokens, spec.top_k)
    return ForwardCall(
        layer,
        HostTensor(TORCH_DTYPES[hidden_states[0]], (num_tokens, spec.hidden_size), hidden_states[1]),
        None if logits is None else HostTensor(TORCH_DTYPES[logits[0]], (num_tokens, spec.num_experts), logits[1]),
        None if ids is None else HostTensor(torch.int32, selected, ids[1]),
        None if weights is None else HostTensor(TORCH_DTYPES[weights[0]], selected, weights[1]),
        TORCH_DTYPES[output_dtype],
        do_finalize,
        return_routing,
    )


def write_answer(result: ForwardResult, queue_depth_tokens: int) -> bytes:
    """A serialised ForwardResponse."""
    if CODEC is None or not _is_one_matrix(result):
        return encode_response(result, queue_depth_tokens)
    return _write(False, 0, result, queue_depth_tokens)


def write_stream_answer(
    request_id: int, result: ForwardResult, queue_depth_tokens: int, place: AnswerPlace | None = None
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    if CODEC is None or place is not None or not _is_one_matrix(result):
        return encode_stream_response(request_id, result, queue_depth_tokens, place)
    return _write(True, request_id, result, queue_depth_tokens)


def _is_one_matrix(result: ForwardResult) -> bool:
    output = result.output
    return (
        output is not None
        and result.expert_weights is None
        and result.topk_ids is None
        and result.gemm2_output is None
        and result.expanded_idx_to_permuted_idx is None
        and output.is_contiguous()
    )


def _write(is_stream: bool, request_id: int, result: ForwardResult, queue_depth_tokens: int) -> bytes:
    output, timing = result.output, result.timing
    assert output is not None
    num_tokens, hidden_size = output.shape
    return CODEC.encode_response(
        is_stream,
        request_id,
        WIRE_DTYPES[output.dtype],
        num_tokens,
        hidden_size,
        output.data_ptr(),
        timing.queue_us,
        timing.copy_in_us,
        timing.compute_us,
        timing.copy_out_us,
        timing.batch_tokens,
        timing.batch_requests,
        queue_depth_tokens,
        result.weights_version,
    )
