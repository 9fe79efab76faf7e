"""The hand-written reader of requests against protobuf: the same message, or the same refusal, for any bytes."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertd.v1 import expertd_pb2 as pb
from expertd_server import wire_parse
from expertd_server.errors import InvalidArgumentError
from expertd_server.wire_parse import RawRequest, RawSlice, RawTensor, parse_request, parse_stream_request

TENSORS = {2: "hidden_states", 3: "routing_logits", 4: "topk_ids", 5: "topk_weights"}

varints = st.one_of(st.integers(0, 130), st.integers(0, 2**32 + 1), st.integers(0, 2**64 - 1))
blobs = st.one_of(st.binary(max_size=20), st.binary(min_size=120, max_size=300))


def varint(value: int, *, extra: int = 0) -> bytes:
    """extra: needless continuation bytes, which the wire format allows."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(min(extra, 10 - len(out))):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def number(field: int, value: int, extra: int = 0) -> bytes:
    return varint(field << 3, extra=0) + varint(value, extra=extra)


def delimited(field: int, payload: bytes, extra: int = 0) -> bytes:
    return varint(field << 3 | 2) + varint(len(payload), extra=extra) + payload


@st.composite
def unknown_fields(draw: st.DrawFn) -> bytes:
    field = draw(st.sampled_from([9, 15, 16, 2**29 - 1]))
    match draw(st.sampled_from([0, 1, 2, 5])):
        case 0:
            return number(field, draw(varints))
        case 1:
            return varint(field << 3 | 1) + draw(st.binary(min_size=8, max_size=8))
        case 2:
            return delimited(field, draw(blobs))
        case _:
            return varint(field << 3 | 5) + draw(st.binary(min_size=4, max_size=4))


def messages(*fields: st.SearchStrategy[bytes], most: int) -> st.SearchStrategy[bytes]:
    """Bytes of a message: any of the fields, any number of times, in any order; now and then an unknown one."""
    usual = st.one_of(*fields)
    return st.lists(st.one_of(usual, usual, usual, usual, unknown_fields()), max_size=most).map(b"".join)


extras = st.sampled_from([0, 0, 0, 0, 1, 4, 5, 8, 9])
slices = messages(*(st.builds(number, st.just(field), varints, extras) for field in (1, 2, 3)), most=4)
tensors = messages(
    st.builds(number, st.just(1), varints, extras),
    st.builds(delimited, st.just(2), st.lists(varints, max_size=5).map(lambda v: b"".join(map(varint, v))), extras),
    st.builds(number, st.just(2), varints, extras),  # an unpacked shape
    st.builds(delimited, st.just(3), blobs, extras),
    st.builds(delimited, st.just(4), slices, extras),
    most=4,
)
options = messages(
    st.builds(number, st.just(1), varints, extras),
    st.builds(number, st.just(2), varints, extras),
    st.builds(number, st.just(3), varints, extras),
    most=4,
)
names = st.one_of(st.text(max_size=8).map(str.encode), st.binary(max_size=4))
requests = messages(
    st.builds(delimited, st.just(1), names, extras),
    st.builds(delimited, st.sampled_from(sorted(TENSORS)), tensors, extras),
    st.builds(delimited, st.just(6), options, extras),
    st.builds(number, st.just(7), varints, extras),
    st.builds(delimited, st.just(8), slices, extras),
    most=6,
)
regions = messages(*(st.builds(number, st.just(field), varints, extras) for field in (1, 2)), most=3)
stream_requests = messages(
    st.builds(number, st.just(1), varints, extras),
    st.builds(delimited, st.just(2), requests, extras),
    st.builds(delimited, st.just(2), requests, extras),
    st.builds(number, st.just(3), varints, extras),
    st.builds(delimited, st.sampled_from([4, 5]), regions, extras),
    most=4,
)


def same_tensor(raw: RawTensor | None, request: pb.ForwardRequest, field: str) -> None:
    assert (raw is not None) == request.HasField(field), field
    if raw is not None:
        message = getattr(request, field)
        assert raw.dtype == message.dtype, field
        assert raw.rank == len(message.shape), field
        assert list(raw.shape) == list(message.shape[:3]), field
        assert bytes(raw.data) == message.data, field
        same_slice(raw.slice, message)
        assert not raw.is_resolved


def same_slice(raw: RawSlice | None, message: pb.Tensor | pb.ForwardRequest) -> None:
    field = "slice" if isinstance(message, pb.Tensor) else "answer_slice"
    expected = getattr(message, field) if message.HasField(field) else None  # type: ignore[arg-type]
    assert raw == (None if expected is None else RawSlice(expected.region, expected.offset, expected.nbytes))


def same_request(raw: RawRequest, request: pb.ForwardRequest) -> None:
    assert raw.layer == request.layer
    for field in TENSORS.values():
        same_tensor(getattr(raw, field), request, field)
    assert raw.output_dtype == request.options.output_dtype
    assert raw.do_finalize == (request.options.do_finalize if request.options.HasField("do_finalize") else True)
    assert raw.return_routing == request.options.return_routing
    assert raw.weights_version == request.weights_version
    same_slice(raw.answer_slice, request)


def check_request(data: bytes) -> None:
    try:
        message = pb.ForwardRequest.FromString(data)
    except DecodeError:
        with pytest.raises(InvalidArgumentError):
            parse_request(data)
        return
    same_request(parse_request(data), message)


def check_stream_request(data: bytes) -> None:
    try:
        message = pb.ForwardStreamRequest.FromString(data)
    except DecodeError:
        with pytest.raises(InvalidArgumentError):
            parse_stream_request(data)
        return
    raw = parse_stream_request(data)
    assert (raw.id, raw.timeout_ms) == (message.id, message.timeout_ms)
    assert (raw.request is not None) == message.HasField("request")
    if raw.request is not None:
        same_request(raw.request, message.request)
    for field in ("register_region", "unregister_region"):
        assert getattr(raw, field) == (getattr(message, field) if message.HasField(field) else None)  # type: ignore[arg-type]
    assert raw.is_about_regions == (message.HasField("register_region") or message.HasField("unregister_region"))


@given(requests)
@example(b"")
@example(delimited(1, b"\xed\xa0\x80"))  # a surrogate, which is no UTF-8
@example(delimited(2, number(1, 2**64 - 1)))  # dtype -1
@example(delimited(2, number(1, 4)) + delimited(2, number(2, 7)))  # two halves of one tensor, the shape unpacked
@settings(max_examples=600, deadline=None)
def test_a_request_is_what_protobuf_says(data: bytes) -> None:
    check_request(data)


@given(stream_requests)
@example(delimited(2, b"") + number(1, 2**64 - 1))
@example(delimited(2, b"", 4))  # a length of five bytes
@example(delimited(2, b"", 5))  # and one of six, which protobuf refuses
@example(delimited(2, delimited(2, b"", 5)))
@example(delimited(2, delimited(2, delimited(3, b"", 5))))
@example(number(3, 2**32 + 5))  # a uint32 of more than 32 bits
@settings(max_examples=600, deadline=None)
def test_a_stream_request_is_what_protobuf_says(data: bytes) -> None:
    check_stream_request(data)


@given(stream_requests, st.data())
@settings(max_examples=600, deadline=None)
def test_corrupted_bytes_are_refused_where_protobuf_refuses_them(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        if changed:
            changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    check_stream_request(bytes(changed[: draw.draw(st.integers(0, len(changed)))]))


@given(st.binary(max_size=60))
@settings(max_examples=600, deadline=None)
def test_random_bytes(data: bytes) -> None:
    check_request(data)
    check_stream_request(data)


def good_message(seed: int) -> pb.ForwardStreamRequest:
    """What the SDK sends."""
    chance = random.Random(seed)
    request = pb.ForwardRequest(
        layer="model.layers.7",
        hidden_states=pb.Tensor(dtype=4, shape=[3, 200], data=chance.randbytes(600)),
        weights_version=chance.choice([0, 3]),
    )
    if chance.random() < 0.5:
        request.routing_logits.CopyFrom(pb.Tensor(dtype=1, shape=[3, 8], data=chance.randbytes(96)))
    else:
        request.topk_ids.CopyFrom(pb.Tensor(dtype=5, shape=[3, 2], data=chance.randbytes(24)))
        request.topk_weights.CopyFrom(pb.Tensor(dtype=2, shape=[3, 2], data=chance.randbytes(12)))
    if chance.random() < 0.5:
        request.options.output_dtype = pb.DATA_TYPE_FLOAT32
        request.options.do_finalize = chance.random() < 0.5
        request.options.return_routing = chance.random() < 0.5
    return pb.ForwardStreamRequest(id=chance.randrange(2**63), request=request, timeout_ms=chance.randrange(2**32))


@pytest.mark.parametrize("seed", range(20))
def test_what_clients_send_is_read_by_hand_and_not_copied(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: type, data: bytes) -> None:
        pytest.fail(f"seed {seed}: {len(data)} bytes of a {kind.__name__} went to protobuf")

    monkeypatch.setattr(wire_parse, "_decode", refuse)
    data = good_message(seed).SerializeToString()
    raw = parse_stream_request(data).request
    assert raw is not None
    assert raw.hidden_states is not None
    assert isinstance(raw.hidden_states.data, memoryview)
    assert raw.hidden_states.data.obj is data


@pytest.mark.parametrize("cut", [1, 7, 100, 650])
def test_truncated_messages_are_refused(cut: int) -> None:
    data = good_message(3).SerializeToString()[:-cut]
    with pytest.raises(InvalidArgumentError, match=f"{len(data)} bytes are no ForwardStreamRequest"):
        parse_stream_request(data)
