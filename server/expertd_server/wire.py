"""Requests to calls, and results to bytes, where torch computes: `wire_check` and `wire_answer` with its tensors."""

from __future__ import annotations

from typing import Final

import torch

from expertd.v1 import expertd_pb2 as pb
from expertd_server.forward import ForwardCall, ForwardResult, HostTensor
from expertd_server.layer import MoELayer
from expertd_server.regions import AnswerPlace
from expertd_server.store import LayerStore
from expertd_server.wire_answer import AnswerTensor, join_response, join_stream_response
from expertd_server.wire_check import CheckedRequest, check_request
from expertd_server.wire_parse import RawRequest

__all__ = [
    "TORCH_DTYPES",
    "WIRE_DTYPES",
    "answer_tensors",
    "call_of",
    "encode_response",
    "encode_stream_response",
    "read_call",
]

TORCH_DTYPES: Final[dict[int, torch.dtype]] = {
    pb.DATA_TYPE_FLOAT32: torch.float32,
    pb.DATA_TYPE_BFLOAT16: torch.bfloat16,
    pb.DATA_TYPE_FLOAT16: torch.float16,
    pb.DATA_TYPE_FLOAT8_E4M3FN: torch.float8_e4m3fn,
    pb.DATA_TYPE_INT32: torch.int32,
}
WIRE_DTYPES: Final = {dtype: value for value, dtype in TORCH_DTYPES.items()}


def read_call(
    request: RawRequest, store: LayerStore[MoELayer], *, max_batch_tokens: int, max_message_bytes: int
) -> ForwardCall:
    """Check everything about a request, and type it; see `check_request`."""
    limits = {"max_batch_tokens": max_batch_tokens, "max_message_bytes": max_message_bytes}
    return call_of(*check_request(request, store, **limits))


def call_of(layer: MoELayer, checked: CheckedRequest) -> ForwardCall:
    """What a checked request asks of a layer."""
    num_tokens, hidden_states, logits, ids, weights, output_dtype, do_finalize, return_routing = checked
    spec = layer.spec
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


def encode_response(result: ForwardResult, queue_depth_tokens: int) -> bytes:
    """A serialised ForwardResponse."""
    return join_response(answer_tensors(result), result.timing, queue_depth_tokens, result.weights_version)


def encode_stream_response(
    request_id: int, result: ForwardResult, queue_depth_tokens: int, place: AnswerPlace | None = None
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    tensors, version = answer_tensors(result), result.weights_version
    return join_stream_response(request_id, tensors, result.timing, queue_depth_tokens, version, place)


def answer_tensors(result: ForwardResult) -> tuple[AnswerTensor | None, ...]:
    """The tensors of a result as they are written, in the order of ForwardResponse's fields; views."""
    return (
        _written(result.output),
        _written(result.gemm2_output),
        _written(result.expert_weights),
        _written(result.topk_ids),
        _written(result.expanded_idx_to_permuted_idx),
    )


def _written(tensor: torch.Tensor | None) -> AnswerTensor | None:
    if tensor is None:
        return None
    # torch gives no bytes of a tensor that has none.
    data = tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    return WIRE_DTYPES[tensor.dtype], tuple(tensor.shape), data
