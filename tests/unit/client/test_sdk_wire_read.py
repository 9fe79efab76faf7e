"""Answers read by hand are what protobuf says, and what servers send is read by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertd._base import stream_outcome, unary_outcome
from expertd._wire_read import Answer, KnownAnswer, answer_of, nbytes_of, read_answer, read_stream_answer
from expertd.errors import ProtocolError, UnavailableError
from expertd.tensors import from_message
from expertd.v1 import expertd_pb2 as pb

FIELDS = ("output", "gemm2_output", "expert_weights", "topk_ids", "expanded_idx_to_permuted_idx")

tensors = st.builds(
    pb.Tensor,
    dtype=st.integers(-1, 200),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    data=st.binary(max_size=12),
    slice=st.none() | st.none() | st.builds(pb.RegionSlice, region=st.integers(0, 9), nbytes=st.integers(0, 2**64 - 1)),
)
responses = st.builds(
    pb.ForwardResponse,
    **{name: st.none() | tensors for name in FIELDS},
    timing=st.none() | st.builds(pb.Timing, queue_us=st.integers(0, 2**64 - 1), batch_tokens=st.integers(0, 2**32 - 1)),
    weights_version=st.integers(0, 2**64 - 1),
)
answers = st.builds(pb.ForwardStreamResponse, id=st.integers(0, 2**64 - 1), response=st.none() | responses) | st.builds(
    pb.ForwardStreamResponse,
    id=st.integers(0, 9),
    error=st.none() | st.builds(pb.StreamError, code=st.integers(0, 20)),
    region_ticket=st.none() | st.builds(pb.RegionTicket, socket=st.text(max_size=9), ticket=st.binary(max_size=20)),
    region_unregistered=st.none() | st.just(pb.RegionUnregistered()),
)


def same(answer: Answer, response: pb.ForwardResponse) -> None:
    for each in (answer, answer_of(response)):
        for name in FIELDS:
            mine, theirs = getattr(each, name), getattr(response, name)
            assert (mine.dtype, mine.shape, bytes(mine.data)) == (theirs.dtype, tuple(theirs.shape), theirs.data), name
            where = theirs.slice
            placed = (where.region, where.offset, where.nbytes) if theirs.HasField("slice") else None
            assert mine.slice == placed, name
        assert each.timing == response.timing
        assert each.weights_version == response.weights_version
    assert nbytes_of(answer) >= nbytes_of(response) >= response.ByteSize()  # more where the sender was verbose
    assert nbytes_of(answer_of(response)) == nbytes_of(response)


def check(data: bytes) -> None:
    """By hand the same as by protobuf, or not by hand."""
    answer = read_answer(data)
    if answer is not None:
        same(answer, pb.ForwardResponse.FromString(data))
    found = read_stream_answer(data)
    if found is not None:
        message = pb.ForwardStreamResponse.FromString(data)
        assert message.WhichOneof("result") == "response"
        assert found[0] == message.id
        same(found[1], message.response)
    for read, kind in (
        (unary_outcome, pb.ForwardResponse),
        (lambda d: stream_outcome(d, None), pb.ForwardStreamResponse),
    ):
        try:
            kind.FromString(data)
        except DecodeError:
            with pytest.raises(ProtocolError):
                read(data)
        else:
            read(data)


@given(answers)
@settings(max_examples=300, deadline=None)
def test_any_answer(message: pb.ForwardStreamResponse) -> None:
    check(message.SerializeToString())
    check(message.response.SerializeToString())


@given(answers, st.data())
@settings(max_examples=500, deadline=None)
def test_corrupted_answers(message: pb.ForwardStreamResponse, draw: st.DataObject) -> None:
    data = bytearray(message.SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        if data:
            data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    check(bytes(data[: draw.draw(st.integers(0, len(data)))]))


@given(st.binary(max_size=40))
@example(b"")
@example(b"\x12\x80\x80\x80\x80\x80\x00")  # a length of six bytes, which protobuf refuses
@example(b"\x08\x07\x12\x00\x12\x00")  # a response in two parts
@settings(max_examples=500, deadline=None)
def test_any_bytes(data: bytes) -> None:
    check(data)


def good_answer(number: int, values: np.ndarray) -> bytes:  # type: ignore[type-arg]
    response = pb.ForwardResponse(
        output=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()),
        timing=pb.Timing(compute_us=3),
        weights_version=2,
    )
    return pb.ForwardStreamResponse(id=number, response=response).SerializeToString()


@pytest.mark.parametrize("number", [1, 300, 2**20, 2**40])
def test_what_servers_send_is_not_copied_where_it_lies_well(number: int) -> None:
    values = np.random.default_rng(number).standard_normal((3, 5), np.float32)
    data = good_answer(number, values)
    found = read_stream_answer(data)
    assert found is not None
    assert found[0] == number
    tensor = found[1].output
    assert isinstance(tensor.data, memoryview)
    assert tensor.data.obj is data
    array = from_message("output", tensor).numpy()
    assert (array == values).all()
    assert array.flags.aligned, "elements at odd addresses are moved"


def test_answers_in_shared_memory_are_read_by_hand() -> None:
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_BFLOAT16, shape=(3, 5), slice=pb.RegionSlice(region=1, offset=64, nbytes=30))
    response = pb.ForwardResponse(output=tensor, timing=pb.Timing(compute_us=3), weights_version=2)
    found = read_stream_answer(pb.ForwardStreamResponse(id=4, response=response).SerializeToString())
    assert found is not None
    assert found[1].output.slice == (1, 64, 30)
    assert nbytes_of(found[1]) == response.ByteSize() + 30


def test_errors_go_to_protobuf() -> None:
    data = pb.ForwardStreamResponse(id=4, error=pb.StreamError(code=14, message="drains")).SerializeToString()
    assert read_stream_answer(data) is None
    number, outcome = stream_outcome(data, None)
    assert number == 4
    assert isinstance(outcome, UnavailableError)


def test_tickets_go_to_protobuf() -> None:
    ticket = pb.RegionTicket(socket="@a", ticket=b"b")
    data = pb.ForwardStreamResponse(id=4, region_ticket=ticket).SerializeToString()
    assert read_stream_answer(data) is None
    assert stream_outcome(data, None) == (4, ticket)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_truncated_answers_are_refused(cut: int) -> None:
    data = good_answer(random.Random(cut).randrange(2**30), np.zeros((4, 4), np.float32))[:-cut]
    with pytest.raises(ProtocolError):
        stream_outcome(data, None)


def standing_answer(**timing: int) -> pb.ForwardStreamResponse:
    """As a server answers a request whose output goes to shared memory."""
    output = pb.Tensor(dtype=2, shape=(128, 2048), slice=pb.RegionSlice(region=1, offset=2**28, nbytes=2**19))
    response = pb.ForwardResponse(output=output, timing=pb.Timing(**timing), weights_version=3)
    return pb.ForwardStreamResponse(id=2**49 + 77, response=response)


class TestKnownAnswer:
    def test_only_the_timing_differs(self) -> None:
        known = KnownAnswer(standing_answer(queue_us=5, batch_tokens=128).SerializeToString())
        for timing in ({"queue_us": 2**20}, {"compute_us": 1, "batch_requests": 300}):
            assert known.timing_of(standing_answer(**timing).SerializeToString()) == pb.Timing(**timing)

    def test_anything_else_does(self) -> None:
        message = standing_answer(queue_us=5)
        known = KnownAnswer(message.SerializeToString())
        others = [standing_answer(queue_us=5) for _ in range(6)]
        others[0].id += 1
        others[1].response.weights_version += 1
        others[2].response.output.slice.offset += 1
        others[3].response.topk_ids.dtype = 5
        others[4].response.ClearField("timing")
        others[5].error.code = 14
        for other in others:
            assert known.timing_of(other.SerializeToString()) is None
        assert known.timing_of(b"") is None
        data = message.SerializeToString()
        assert data.count(b"\x08\x05", 12) == 1
        assert known.timing_of(data.replace(b"\x08\x05", b"\x0b\x05")) is None, "no Timing at all"

    @given(answers, answers, st.data())
    @settings(max_examples=500, deadline=None)
    def test_what_it_takes_for_the_same_is_the_same(
        self, first: pb.ForwardStreamResponse, second: pb.ForwardStreamResponse, draw: st.DataObject
    ) -> None:
        """Corrupted or not, and whether or not the first makes any sense."""
        second.response.MergeFrom(first.response) if draw.draw(st.booleans()) else None
        data, other = bytearray(first.SerializeToString()), bytearray(second.SerializeToString())
        for each in (data, other):
            if each and draw.draw(st.booleans()):
                each[draw.draw(st.integers(0, len(each) - 1))] = draw.draw(st.integers(0, 255))
        for one, two in ((data, other), (data, data)):
            timing = KnownAnswer(bytes(one)).timing_of(bytes(two))
            if timing is None:
                continue
            try:
                expected = pb.ForwardStreamResponse.FromString(bytes(one))
            except DecodeError:
                continue  # it was not read, and so is not known
            found = pb.ForwardStreamResponse.FromString(bytes(two))
            expected.response.ClearField("timing")
            assert found.response.timing == timing
            found.response.ClearField("timing")
            assert found == expected
