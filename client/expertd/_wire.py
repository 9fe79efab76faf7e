"""The requests of the data path, encoded by hand.

gRPC takes nothing but bytes, and protobuf would copy every tensor into a message, then the message into bytes. Here the
few fields around the tensors are written by hand and one join copies each tensor once. The bytes are those that
protobuf itself would write; a property test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertd.tensors import WireRows, WireTensor

__all__ = ["Encoded", "encode_forward_request", "encode_stream_request"]

Chunk = bytes | memoryview

_VARINT, _LENGTH = 0, 2  # wire types


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message in pieces: bytes written here and views of the caller's tensors."""

    chunks: tuple[Chunk, ...]
    nbytes: int

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
) -> Encoded:
    """A ForwardRequest. Defaults are left out, as protobuf does: do_finalize is written only when it is False."""
    chunks: list[Chunk] = []
    if layer:
        chunks.append(_delimited(1, layer.encode()))
    for number, tensor in ((2, hidden_states), (3, routing_logits), (4, topk_ids), (5, topk_weights)):
        if tensor is not None:
            chunks += _tensor(number, tensor)
    options = _uint(1, output_dtype) + (b"" if do_finalize else b"\x10\x00") + _uint(3, return_routing)
    if options:
        chunks.append(_delimited(6, options))
    chunks.append(_uint(7, weights_version))
    return Encoded(tuple(chunks), _nbytes(chunks))


def encode_stream_request(request_id: int, request: Encoded, timeout_ms: int) -> bytes:
    """A ForwardStreamRequest around an encoded ForwardRequest."""
    head = _uint(1, request_id) + _key(2, _LENGTH) + _varint(request.nbytes)
    return b"".join((head, *request.chunks, _uint(3, timeout_ms)))


def _tensor(number: int, tensor: WireTensor | WireRows) -> list[Chunk]:
    shape = b"".join(_varint(extent) for extent in tensor.shape)
    head = _uint(1, tensor.dtype) + (_delimited(2, shape) if shape else b"")
    pieces = tensor.pieces
    nbytes = sum(piece.nbytes for piece in pieces)
    if nbytes:
        head += _key(3, _LENGTH) + _varint(nbytes)
    return [_key(number, _LENGTH) + _varint(len(head) + nbytes) + head, *pieces]


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


def _nbytes(chunks: Sequence[Chunk]) -> int:
    return sum(len(chunk) if isinstance(chunk, bytes) else chunk.nbytes for chunk in chunks)
