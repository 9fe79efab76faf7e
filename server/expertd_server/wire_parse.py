"""Requests of the data path, read from the wire format without copying their tensors.

protobuf's own parser copies every tensor into a message and then out of it again. Here the few fields of a request are
read by hand and tensors are views of the received bytes. The hand-written path takes what clients send: each field at
most once, in any order, no field that is unknown here. Whatever else there is to the wire format (merging of repeated
messages, unknown fields, unpacked shapes, wrong wire types, truncation) goes to protobuf, which alone decides whether
bytes are a message: a property test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from expertd.v1 import expertd_pb2 as pb
from expertd_server.errors import InvalidArgumentError

__all__ = ["RawRequest", "RawSlice", "RawStreamRequest", "RawTensor", "parse_request", "parse_stream_request"]

_Message = TypeVar("_Message", pb.ForwardRequest, pb.ForwardStreamRequest)

_SHAPE_KEPT: Final = 3
"""Extents that are kept of a shape: one more than any tensor of the contract has."""


@dataclass(frozen=True, slots=True)
class RawSlice:
    """A RegionSlice message, unchecked."""

    region: int
    offset: int
    nbytes: int


@dataclass(slots=True)
class RawTensor:
    """A Tensor message, unchecked."""

    dtype: int = 0
    """A pb.DataType, or any other number that was sent."""
    rank: int = 0
    shape: tuple[int, ...] = ()
    """The first extents, at most three."""
    data: bytes | memoryview = b""
    slice: RawSlice | None = None
    """Where the data lies instead; see regions."""
    is_resolved: bool = False
    """Whether data is what lies in the slice."""


@dataclass(slots=True)
class RawRequest:
    """A ForwardRequest message, unchecked; a tensor that was not sent is None."""

    layer: str = ""
    hidden_states: RawTensor | None = None
    routing_logits: RawTensor | None = None
    topk_ids: RawTensor | None = None
    topk_weights: RawTensor | None = None
    output_dtype: int = 0
    do_finalize: bool = True
    return_routing: bool = False
    weights_version: int = 0
    answer_slice: RawSlice | None = None
    """None also once it is resolved."""


@dataclass(slots=True)
class RawStreamRequest:
    """A ForwardStreamRequest message, unchecked."""

    id: int = 0
    request: RawRequest | None = None
    timeout_ms: int = 0
    register_region: pb.RegisterRegion | None = None
    unregister_region: pb.UnregisterRegion | None = None

    @property
    def is_about_regions(self) -> bool:
        """Whether it says something about memory, instead of a request."""
        return self.register_region is not None or self.unregister_region is not None

    @property
    def num_tokens(self) -> int:
        """Rows of hidden_states as the request itself says; 0 where it does not."""
        hidden_states = None if self.request is None else self.request.hidden_states
        return hidden_states.shape[0] if hidden_states is not None and hidden_states.shape else 0


def parse_request(data: bytes) -> RawRequest:
    """Parse a ForwardRequest. Raises InvalidArgumentError on bytes that are none."""
    try:
        return _request(data, memoryview(data), 0, len(data))
    except _UnusualError:
        return _from_message(_decode(pb.ForwardRequest, data))


def parse_stream_request(data: bytes) -> RawStreamRequest:
    """Parse a ForwardStreamRequest. Raises InvalidArgumentError on bytes that are none."""
    try:
        return _stream_request(data)
    except _UnusualError:
        message = _decode(pb.ForwardStreamRequest, data)
        request = _from_message(message.request) if message.HasField("request") else None
        return RawStreamRequest(
            message.id,
            request,
            message.timeout_ms,
            message.register_region if message.HasField("register_region") else None,
            message.unregister_region if message.HasField("unregister_region") else None,
        )


class _UnusualError(Exception):
    """Not the hand-written path's business."""


_MAX_LENGTH_BYTES: Final = 5
"""Of a length: protobuf refuses one that has more, whatever its value."""

# Keys (field number << 3 | wire type); each below 128, and so one byte.
_STREAM_ID, _STREAM_REQUEST, _STREAM_TIMEOUT = 0x08, 0x12, 0x18
_LAYER, _OPTIONS, _VERSION = 0x0A, 0x32, 0x38
_TENSORS = {0x12: "hidden_states", 0x1A: "routing_logits", 0x22: "topk_ids", 0x2A: "topk_weights"}
_DTYPE, _SHAPE, _DATA = 0x08, 0x12, 0x1A
_OUTPUT_DTYPE, _DO_FINALIZE, _RETURN_ROUTING = 0x08, 0x10, 0x18


def _stream_request(data: bytes) -> RawStreamRequest:
    result = RawStreamRequest()
    seen = 0
    pos, end = 0, len(data)
    while pos < end:
        key = data[pos]
        if seen >> (key >> 3) & 1:
            raise _UnusualError
        seen |= 1 << (key >> 3)
        start = pos + 1
        value, pos = _varint(data, start, end)
        if key == _STREAM_REQUEST:
            stop = _stop(start, pos, value, end)
            result.request = _request(data, memoryview(data), pos, stop)
            pos = stop
        elif key == _STREAM_ID:
            result.id = value
        elif key == _STREAM_TIMEOUT and value < 2**32:
            result.timeout_ms = value
        else:
            raise _UnusualError
    return result


def _request(data: bytes, view: memoryview, pos: int, end: int) -> RawRequest:
    result = RawRequest()
    seen = 0
    while pos < end:
        key = data[pos]
        if seen >> (key >> 3) & 1:
            raise _UnusualError
        seen |= 1 << (key >> 3)
        start = pos + 1
        value, pos = _varint(data, start, end)
        if key == _VERSION:
            result.weights_version = value
            continue
        stop = _stop(start, pos, value, end)
        if key in _TENSORS:
            setattr(result, _TENSORS[key], _tensor(data, view, pos, stop))
        elif key == _LAYER:
            try:
                result.layer = data[pos:stop].decode()
            except UnicodeDecodeError:
                raise _UnusualError from None
        elif key == _OPTIONS:
            _options(result, data, pos, stop)
        else:
            raise _UnusualError
        pos = stop
    return result


def _tensor(data: bytes, view: memoryview, pos: int, end: int) -> RawTensor:
    result = RawTensor()
    seen = 0
    while pos < end:
        key = data[pos]
        if seen >> (key >> 3) & 1:
            raise _UnusualError
        seen |= 1 << (key >> 3)
        start = pos + 1
        value, pos = _varint(data, start, end)
        if key == _DTYPE and value < 2**7:  # greater ones wrap around, as C's int32 does
            result.dtype = value
            continue
        stop = _stop(start, pos, value, end)
        if key == _DATA:
            result.data = view[pos:stop]
        elif key == _SHAPE:
            result.shape = _extents(data, pos, stop)
            result.rank = len(result.shape)
        else:
            raise _UnusualError
        pos = stop
    return result


def _extents(data: bytes, pos: int, end: int) -> tuple[int, ...]:
    extents: list[int] = []
    while pos < end:
        value, pos = _varint(data, pos, end)
        if value >= 2**32 or len(extents) == _SHAPE_KEPT:
            raise _UnusualError
        extents.append(value)
    return tuple(extents)


def _options(result: RawRequest, data: bytes, pos: int, end: int) -> None:
    seen = 0
    while pos < end:
        key = data[pos]
        if seen >> (key >> 3) & 1:
            raise _UnusualError
        seen |= 1 << (key >> 3)
        value, pos = _varint(data, pos + 1, end)
        if key == _OUTPUT_DTYPE and value < 2**7:
            result.output_dtype = value
        elif key == _DO_FINALIZE:
            result.do_finalize = value != 0
        elif key == _RETURN_ROUTING:
            result.return_routing = value != 0
        else:
            raise _UnusualError


def _varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    """A varint below 2**63, and where it ends."""
    if pos >= end:
        raise _UnusualError
    value = data[pos]
    pos += 1
    if value < 0x80:
        return value, pos
    value &= 0x7F
    for shift in range(7, 63, 7):
        if pos >= end:
            raise _UnusualError
        byte = data[pos]
        pos += 1
        if byte < 0x80:
            return value | byte << shift, pos
        value |= (byte & 0x7F) << shift
    raise _UnusualError


def _stop(start: int, pos: int, length: int, end: int) -> int:
    """Where something of this length ends that begins at pos; start: where its length began."""
    if pos - start > _MAX_LENGTH_BYTES or pos + length > end:
        raise _UnusualError
    return pos + length


def _decode(kind: type[_Message], data: bytes) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidArgumentError.of("request", f"{len(data)} bytes are no {kind.__name__}: {error}") from None


def _from_message(message: pb.ForwardRequest) -> RawRequest:
    options = message.options
    return RawRequest(
        layer=message.layer,
        hidden_states=_tensor_of(message, "hidden_states"),
        routing_logits=_tensor_of(message, "routing_logits"),
        topk_ids=_tensor_of(message, "topk_ids"),
        topk_weights=_tensor_of(message, "topk_weights"),
        output_dtype=options.output_dtype,
        do_finalize=options.do_finalize if options.HasField("do_finalize") else True,
        return_routing=options.return_routing,
        weights_version=message.weights_version,
        answer_slice=_slice_of(message.answer_slice) if message.HasField("answer_slice") else None,
    )


def _tensor_of(request: pb.ForwardRequest, field: str) -> RawTensor | None:
    if not request.HasField(field):
        return None
    message: pb.Tensor = getattr(request, field)
    return RawTensor(
        message.dtype,
        len(message.shape),
        tuple(message.shape[:_SHAPE_KEPT]),
        message.data,
        _slice_of(message.slice) if message.HasField("slice") else None,
    )


def _slice_of(message: pb.RegionSlice) -> RawSlice:
    return RawSlice(message.region, message.offset, message.nbytes)
