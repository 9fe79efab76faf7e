"""The answers of the data path, read from the wire format without copying their tensors.

protobuf copies every tensor into a message, and out of it again. Here the few fields of an answer are read by hand and
tensors are views of the received bytes. What servers of this project send is read so; whatever else there is to the
wire format (a field twice, unknown fields, wrong wire types, truncation, errors) goes to protobuf, which alone decides
whether bytes are a message: a property test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from google.protobuf.message import DecodeError

from expertd.v1 import expertd_pb2 as pb

__all__ = [
    "TENSOR_FIELDS",
    "Answer",
    "AnswerTensor",
    "KnownAnswer",
    "Response",
    "answer_of",
    "nbytes_of",
    "read_answer",
    "read_stream_answer",
]


@dataclass(slots=True, eq=False)
class AnswerTensor:
    """A Tensor message, unchecked; without elements where it was not sent."""

    dtype: int = 0
    shape: tuple[int, ...] = ()
    data: Any = b""
    """The elements: bytes, or a view of the message or of shared memory."""
    slice: tuple[int, int, int] | None = None
    """Where they lie instead, until somebody looks there: region, offset and nbytes of a RegionSlice."""


_NONE: Final = AnswerTensor()


@dataclass(slots=True, eq=False)
class Answer:
    """A ForwardResponse message, unchecked; its attributes are the message's."""

    output: AnswerTensor = _NONE
    gemm2_output: AnswerTensor = _NONE
    expert_weights: AnswerTensor = _NONE
    topk_ids: AnswerTensor = _NONE
    expanded_idx_to_permuted_idx: AnswerTensor = _NONE
    timing: pb.Timing = field(default_factory=pb.Timing)
    weights_version: int = 0
    nbytes: int = 0
    """Of the message, and of its tensors that lie in shared memory."""


Response: TypeAlias = pb.ForwardResponse | Answer
"""A ForwardResponse, as it was read."""


def nbytes_of(response: Response) -> int:
    """Bytes of a ForwardResponse; its tensors that lie in shared memory count as if they were in the message."""
    if isinstance(response, Answer):
        return response.nbytes
    placed = sum(int(getattr(response, name).slice.nbytes) for name in TENSOR_FIELDS)
    return response.ByteSize() + placed


def answer_of(response: Response) -> Answer:
    """The same, however it was read."""
    if isinstance(response, Answer):
        return response
    answer = Answer(timing=response.timing, weights_version=response.weights_version, nbytes=nbytes_of(response))
    for name in TENSOR_FIELDS:
        tensor: pb.Tensor = getattr(response, name)
        where = tensor.slice
        placed = (where.region, where.offset, where.nbytes) if tensor.HasField("slice") else None
        setattr(answer, name, AnswerTensor(tensor.dtype, tuple(tensor.shape), tensor.data, placed))
    return answer


def read_answer(data: bytes) -> Answer | None:
    """A ForwardResponse; None where protobuf has to read it."""
    try:
        return _answer(data, memoryview(data), 0, len(data))
    except _UnusualError:
        return None


def read_stream_answer(data: bytes) -> tuple[int, Answer] | None:
    """The id and the answer of a ForwardStreamResponse; None where protobuf has to read it, errors among them."""
    try:
        number, pos, end = 0, 0, len(data)
        if data[:1] == b"\x08":
            number, pos = _varint(data, 1, end)
        if data[pos : pos + 1] != b"\x12":
            return None
        start, stop = _span(data, pos + 1, end)
        return (number, _answer(data, memoryview(data), start, stop)) if stop == end else None
    except _UnusualError:
        return None


class KnownAnswer:
    """A ForwardStreamResponse that was read and checked, so that the next one that says the same need not be."""

    __slots__ = ("_after", "_before", "_head", "_start", "_timing_at")

    def __init__(self, data: bytes) -> None:
        """Any answer; none is like one that is long, or unusual."""
        self._head, self._start, self._before, self._timing_at, self._after = b"", 0, b"", 0, b""
        end = len(data)
        try:
            pos = _varint(data, 1, end)[1] if data[:1] == b"\x08" else 0
            start = at = pos + 2
            while data[at] != _TIMING:
                _, at = _span(data, at + 1, end)
            _, stop = _span(data, at + 1, end)
        except (_UnusualError, IndexError):
            return
        if data[pos] == 0x12 and data[pos + 1] == end - start < _ONE_BYTE:
            self._head, self._start, self._timing_at = data[: pos + 1], start, at
            self._before, self._after = data[start : at + 1], data[stop:]

    def timing_of(self, data: bytes) -> pb.Timing | None:
        """The timing of an answer that says the same but for that; None: it says something else, or has to be read."""
        start, at = self._start, self._timing_at + 1
        if len(data) <= at or not self._head or not data.startswith(self._head):
            return None
        nbytes = data[at]
        if (
            nbytes < _ONE_BYTE
            and data[start:at] == self._before
            and data[at + 1 + nbytes :] == self._after
            and data[start - 1] == len(data) - start < _ONE_BYTE
        ):
            try:
                return pb.Timing.FromString(data[at + 1 : at + 1 + nbytes])
            except DecodeError:
                return None
        return None


class _UnusualError(Exception):
    """Not the hand-written path's business."""


_TENSORS: Final = {
    0x0A: "output",
    0x12: "gemm2_output",
    0x1A: "expert_weights",
    0x22: "topk_ids",
    0x2A: "expanded_idx_to_permuted_idx",
}
TENSOR_FIELDS: Final = tuple(_TENSORS.values())
_TIMING, _VERSION = 0x32, 0x38
_DTYPE, _SHAPE, _DATA, _SLICE = 0x08, 0x12, 0x1A, 0x22
_REGION, _OFFSET, _NBYTES = 0x08, 0x10, 0x18
_ONE_BYTE: Final = 0x80
"""Lengths below have one byte."""
_MAX_LENGTH_BYTES: Final = 5
"""Of a length: protobuf refuses one that has more, whatever its value."""


def _answer(data: bytes, view: memoryview, pos: int, end: int) -> Answer:
    result = Answer(nbytes=end - pos)
    last = 0
    while pos < end:
        key = data[pos]
        if key <= last:  # fields come in order, and each once
            raise _UnusualError
        last = key
        if key == _VERSION:
            result.weights_version, pos = _varint(data, pos + 1, end)
            continue
        start, pos = _span(data, pos + 1, end)
        if key in _TENSORS:
            tensor = _tensor(data, view, start, pos)
            setattr(result, _TENSORS[key], tensor)
            if tensor.slice is not None:
                result.nbytes += tensor.slice[2]
        elif key == _TIMING:
            try:
                result.timing = pb.Timing.FromString(data[start:pos])
            except DecodeError:
                raise _UnusualError from None
        else:
            raise _UnusualError
    return result


def _tensor(data: bytes, view: memoryview, pos: int, end: int) -> AnswerTensor:
    result = AnswerTensor()
    last = 0
    while pos < end:
        key = data[pos]
        if key <= last:
            raise _UnusualError
        last = key
        if key == _DTYPE:
            result.dtype, pos = _varint(data, pos + 1, end)
            if result.dtype >= 2**7:  # greater ones wrap around, as C's int32 does
                raise _UnusualError
            continue
        start, pos = _span(data, pos + 1, end)
        if key == _DATA:
            result.data = view[start:pos]
        elif key == _SHAPE:
            extents = []
            while start < pos:
                extent, start = _varint(data, start, pos)
                if extent >= 2**32:
                    raise _UnusualError
                extents.append(extent)
            result.shape = tuple(extents)
        elif key == _SLICE:
            result.slice = _slice(data, start, pos)
        else:
            raise _UnusualError
    return result


def _slice(data: bytes, pos: int, end: int) -> tuple[int, int, int]:
    region = offset = nbytes = last = 0
    while pos < end:
        key = data[pos]
        if key <= last:
            raise _UnusualError
        last = key
        value, pos = _varint(data, pos + 1, end)
        if key == _REGION and value < 2**32:
            region = value
        elif key == _OFFSET:
            offset = value
        elif key == _NBYTES:
            nbytes = value
        else:
            raise _UnusualError
    return region, offset, nbytes


def _varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    """A varint below 2**63, and where it ends."""
    value = 0
    for shift in range(0, 63, 7):
        if pos >= end:
            raise _UnusualError
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
    raise _UnusualError


def _span(data: bytes, pos: int, end: int) -> tuple[int, int]:
    """Where something begins and ends whose length is at pos."""
    length, start = _varint(data, pos, end)
    if start - pos > _MAX_LENGTH_BYTES or start + length > end:
        raise _UnusualError
    return start, start + length
