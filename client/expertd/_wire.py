"""The requests of the data path, encoded by hand.

gRPC takes nothing but bytes, and protobuf would copy every tensor into a message, then the message into bytes. Here the
few fields around the tensors are written by hand and one join copies each tensor once. The bytes are those that
protobuf itself would write; a property test holds the two together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertd.tensors import WireRows, WireTensor

__all__ = ["Encoded", "encode_forward_request", "encode_placed_request", "encode_stream_request"]

Chunk = bytes | memoryview

_VARINT, _LENGTH = 0, 2  # wire types
_FLOAT32 = 1  # DATA_TYPE_FLOAT32
_CACHED = 4096  # results kept of each function below: some hundred kilobytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message in pieces: bytes written here and views of the caller's tensors."""

    chunks: tuple[Chunk, ...]
    nbytes: int
    head: bytes
    """The fields before the tensors."""
    tensors: tuple[tuple[int, WireTensor | WireRows], ...]
    """The tensors with their field numbers."""
    tail: bytes
    """The fields after them."""
    answer_nbytes: int
    """Bytes of the answer's output; 0 where the sum is not asked for, and nobody knows how much there will be."""
    out: WireTensor | None = None
    """Where the caller wants the output."""

    def to_bytes(self) -> bytes:
        """The message, with one copy of each piece."""
        return b"".join(self.chunks)


def encode_forward_request(
    layer: str,
    hidden_states: WireTensor | WireRows,
    *,
    routing_logits: WireTensor | None = None,
    topk_ids: WireTensor | None = None,
    topk_weights: WireTensor | None = None,
    output_dtype: int = 0,
    do_finalize: bool = True,
    return_routing: bool = False,
    weights_version: int = 0,
    out: WireTensor | None = None,
) -> Encoded:
    """A ForwardRequest. Defaults are left out, as protobuf does: do_finalize is written only when it is False."""
    head = _layer(layer)
    fields = ((2, hidden_states), (3, routing_logits), (4, topk_ids), (5, topk_weights))
    tensors = tuple([(number, tensor) for number, tensor in fields if tensor is not None])
    tail = _options(output_dtype, do_finalize, return_routing, weights_version)
    chunks: list[Chunk] = [head]
    nbytes = len(head) + len(tail)
    for number, tensor in tensors:
        tensor_nbytes = tensor.nbytes
        tensor_head = _tensor_head(number, tensor.dtype, tensor.shape, tensor_nbytes)
        chunks.append(tensor_head)
        chunks += tensor.pieces
        nbytes += len(tensor_head) + tensor_nbytes
    chunks.append(tail)
    itemsize = 4 if output_dtype == _FLOAT32 else 2
    answer_nbytes = math.prod(hidden_states.shape) * itemsize if do_finalize else 0
    return Encoded(tuple(chunks), nbytes, head, tensors, tail, answer_nbytes, out)


def encode_stream_request(request_id: int, request: Encoded, timeout_ms: int) -> bytes:
    """A ForwardStreamRequest around an encoded ForwardRequest."""
    head = _uint(1, request_id) + _key(2, _LENGTH) + _varint(request.nbytes)
    return b"".join((head, *request.chunks, _uint(3, timeout_ms)))


def encode_placed_request(
    request_id: int,
    request: Encoded,
    slices: Sequence[tuple[int, int, int]],
    answer_slice: tuple[int, int, int],
    timeout_ms: int,
) -> bytes:
    """A ForwardStreamRequest whose tensors lie in a region. slices, answer_slice: the fields of each RegionSlice."""
    parts = [request.head]
    for (number, tensor), where in zip(request.tensors, slices, strict=True):
        parts.append(_placed_tensor(number, tensor.dtype, tensor.shape, where))
    parts += (request.tail, _slice(8, answer_slice))
    return _uint(1, request_id) + _delimited(2, b"".join(parts)) + _uint(3, timeout_ms)


# What lies between the tensors is the same for many requests, and memory that is taken first is taken again and again.


@functools.lru_cache(_CACHED)
def _layer(layer: str) -> bytes:
    return _delimited(1, layer.encode()) if layer else b""


@functools.lru_cache(_CACHED)
def _options(output_dtype: int, do_finalize: bool, return_routing: bool, weights_version: int) -> bytes:
    options = _uint(1, output_dtype) + (b"" if do_finalize else b"\x10\x00") + _uint(3, return_routing)
    return (_delimited(6, options) if options else b"") + _uint(7, weights_version)


@functools.lru_cache(_CACHED)
def _tensor_head(number: int, dtype: int, shape: tuple[int, ...], nbytes: int) -> bytes:
    """Everything of a tensor but its bytes."""
    extents = b"".join(map(_varint, shape))
    head = _uint(1, dtype) + (_delimited(2, extents) if extents else b"")
    if nbytes:
        head += _key(3, _LENGTH) + _varint(nbytes)
    return _key(number, _LENGTH) + _varint(len(head) + nbytes) + head


@functools.lru_cache(_CACHED)
def _placed_tensor(number: int, dtype: int, shape: tuple[int, ...], where: tuple[int, int, int]) -> bytes:
    extents = b"".join(map(_varint, shape))
    return _delimited(number, _uint(1, dtype) + _delimited(2, extents) + _slice(4, where))


@functools.lru_cache(_CACHED)
def _slice(number: int, where: tuple[int, int, int]) -> bytes:
    """A RegionSlice as field `number`."""
    return _delimited(number, b"".join(_uint(field, value) for field, value in enumerate(where, start=1)))


def _delimited(number: int, payload: bytes) -> bytes:
    return _key(number, _LENGTH) + _varint(len(payload)) + payload


def _uint(number: int, value: int) -> bytes:
    """A varint field; nothing when the value is 0, the default."""
    return _key(number, _VARINT) + _varint(value) if value else b""


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
