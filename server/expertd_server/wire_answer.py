"""Answers to bytes: a hand-made header joined with the tensors; through protobuf every tensor would be copied twice.

Published routing and activation ids are shifted by one on the wire (see the proto).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import numpy as np

from expertd.v1 import expertd_pb2 as pb
from expertd_server.regions import AnswerPlace, RegionReply
from expertd_server.store import HeldLayer
from expertd_server.timing import ForwardTiming
from expertd_server.wire_check import ITEM_BYTES

__all__ = [
    "AnswerTensor",
    "encode_region_reply",
    "encode_stream_error",
    "join_response",
    "join_stream_response",
    "layer_info",
]

AnswerTensor: TypeAlias = tuple[int, tuple[int, ...], memoryview]
"""A pb.DataType, the extents, and the elements."""


def join_response(
    tensors: Sequence[AnswerTensor | None], timing: ForwardTiming, queue_depth_tokens: int, weights_version: int
) -> bytes:
    """A serialised ForwardResponse. tensors: in the order of its fields."""
    parts, _ = _response(tensors, timing, queue_depth_tokens, weights_version)
    return b"".join(parts)


def join_stream_response(  # noqa: PLR0917
    request_id: int,
    tensors: Sequence[AnswerTensor | None],
    timing: ForwardTiming,
    queue_depth_tokens: int,
    weights_version: int,
    place: AnswerPlace | None = None,
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    parts, num_bytes = _response(tensors, timing, queue_depth_tokens, weights_version, place)
    return b"".join((_number(1, request_id) + _key(2) + _varint(num_bytes), *parts))


def encode_stream_error(request_id: int, error: pb.StreamError) -> bytes:
    """A serialised ForwardStreamResponse that holds an error."""
    return pb.ForwardStreamResponse(id=request_id, error=error).SerializeToString()


def encode_region_reply(request_id: int, reply: RegionReply) -> bytes:
    """A serialised ForwardStreamResponse to a message about a region."""
    if isinstance(reply, pb.RegionTicket):
        return pb.ForwardStreamResponse(id=request_id, region_ticket=reply).SerializeToString()
    return pb.ForwardStreamResponse(id=request_id, region_unregistered=reply).SerializeToString()


def layer_info(layer: HeldLayer, versions: Iterable[int], *, is_loading: bool = False) -> pb.LayerInfo:
    """What ListLayers and GetLayer say about a layer. is_loading: whether requests to it are still refused."""
    spec = layer.spec
    info = pb.LayerInfo(
        name=layer.name,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_experts=spec.num_experts,
        local_expert_offset=spec.local_expert_offset,
        local_num_experts=spec.num_local,
        top_k=spec.top_k,
        routing_method=pb.RoutingMethod.Name(spec.routing_method + 1),
        activation=pb.Activation.Name(spec.activation + 1),
        n_group=spec.n_group or 0,
        topk_group=spec.topk_group or 0,
        routed_scaling_factor=spec.routed_scaling_factor,
        norm_topk_prob=spec.norm_topk_prob,
        use_routing_scales_on_input=spec.use_routing_scales_on_input,
        hidden_states_scale=layer.hidden_states_scale,
        weights_version=layer.weights_version,
        weights_bytes=layer.nbytes,
        state=pb.LAYER_STATE_LOADING if is_loading else pb.LAYER_STATE_READY,
        weights_versions=versions,
        weights_fingerprint=layer.weights_fingerprint,
    )
    bias = layer.bias_values()
    if bias is not None:
        info.routing_bias.CopyFrom(
            pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=(len(bias),), data=np.array(bias, "<f4").tobytes())
        )
    return info


# The writer. Parts are bytes written here and the tensors themselves; nothing is copied before the one join.

_Parts = list[bytes | memoryview]


def _response(
    tensors: Sequence[AnswerTensor | None],
    timing: ForwardTiming,
    queue_depth_tokens: int,
    weights_version: int,
    place: AnswerPlace | None = None,
) -> tuple[_Parts, int]:
    """The pieces of a ForwardResponse, and their bytes together."""
    parts: _Parts = []
    num_bytes = 0
    for field, tensor in enumerate(tensors, start=1):
        if tensor is None:
            continue
        dtype, shape, data = tensor
        where = None if place is None or not data.nbytes else place.put(data)
        if where is not None:
            head = _placed_tensor(field, dtype, shape, where)
            parts.append(head)
            num_bytes += len(head)
        else:
            head, data_bytes = _tensor_head(field, dtype, shape)
            parts.append(head)
            num_bytes += len(head) + data_bytes
            if data_bytes:
                parts.append(data)
    encoded = _timing(timing, queue_depth_tokens)
    tail = _key(6) + _varint(len(encoded)) + encoded + _number(7, weights_version)
    parts.append(tail)
    return parts, num_bytes + len(tail)


@functools.lru_cache(maxsize=4096)
def _tensor_head(field: int, dtype: int, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """A field's Tensor up to its elements, and how many bytes of those must follow."""
    extents = b"".join(map(_varint, shape))
    data_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    head = _number(1, dtype) + _key(2) + _varint(len(extents)) + extents
    if data_bytes:  # an empty field is left out
        head += _key(3) + _varint(data_bytes)
    return _key(field) + _varint(len(head) + data_bytes) + head, data_bytes


def _placed_tensor(field: int, dtype: int, shape: tuple[int, ...], where: tuple[int, int, int]) -> bytes:
    """A field's Tensor whose elements lie in a region. where: the fields of RegionSlice."""
    extents = b"".join(map(_varint, shape))
    piece = b"".join(_number(number, value) for number, value in enumerate(where, start=1))
    body = _number(1, dtype) + _key(2) + _varint(len(extents)) + extents
    body += _key(4) + _varint(len(piece)) + piece
    return _key(field) + _varint(len(body)) + body


def _timing(timing: ForwardTiming, queue_depth_tokens: int) -> bytes:
    numbers = (*timing.numbers, queue_depth_tokens)
    return b"".join(_number(field, value) for field, value in enumerate(numbers, start=1))


def _key(field: int) -> bytes:
    """What starts a length-delimited field."""
    return _BYTES[field << 3 | 2]


def _number(field: int, value: int) -> bytes:
    """A varint field, left out when zero."""
    return _BYTES[field << 3] + _varint(value) if value else b""


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTES[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_BYTES: Final = tuple(bytes((value,)) for value in range(0x80))
