"""The compiled codec against the Python that specifies it: the same calls, the same refusals, the same bytes."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_wire import layers, results
from test_wire_parse import good_message, requests, stream_requests

from expertd.v1 import expertd_pb2 as pb
from expertd_server import codec, messages, native
from expertd_server.compiled import CODEC
from expertd_server.engine import ForwardCall, ForwardResult, ForwardTiming, HostTensor
from expertd_server.errors import ExpertdServerError, InvalidArgumentError
from expertd_server.forward import Matrix
from expertd_server.native import (
    Copies,
    _Copies,
    _copy_bytes,
    _count_ids,
    copy_bytes,
    count_ids,
    count_tensor_ids,
)
from expertd_server.regions import TENSORS, AnswerPlace
from expertd_server.store import LayerStore
from expertd_server.wire import encode_response, encode_stream_response, read_call
from expertd_server.wire_parse import RawRequest, RawSlice, RawStreamRequest, parse_request, parse_stream_request

pytestmark = pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built here")

LIMITS = {"max_batch_tokens": 64, "max_message_bytes": 2**20}
STORE: LayerStore = layers()
SPEC = STORE.get("x").spec


def outcome(call: ForwardCall) -> tuple[object, ...]:
    """Everything of a call, to be compared."""

    def tensor(value: HostTensor | None) -> object:
        return None if value is None else (value.dtype, tuple(value.shape), bytes(value.data))

    return (
        call.layer,
        *map(tensor, (call.hidden_states, call.routing_logits, call.topk_ids, call.topk_weights)),
        call.output_dtype,
        call.do_finalize,
        call.return_routing,
    )


def same_as_python(data: bytes, *, is_stream: bool) -> bool:
    """Both read the same from these bytes, or refuse them with the same words; whether the compiled codec knew them."""

    def by_codec() -> tuple[object, ...]:
        if not is_stream:
            return outcome(codec.typed_call(codec.read_message(data), STORE, **LIMITS))
        number, timeout_ms, num_tokens, request = codec.read_stream_message(data)
        if request is None or isinstance(request, RawStreamRequest):
            return number, timeout_ms, num_tokens, request
        return number, timeout_ms, num_tokens, *outcome(codec.typed_call(request, STORE, **LIMITS))

    def by_python() -> tuple[object, ...]:
        if not is_stream:
            return outcome(read_call(parse_request(data), STORE, **LIMITS))
        raw = parse_stream_request(data)
        if raw.request is None or raw.is_about_regions:
            return raw.id, raw.timeout_ms, raw.num_tokens, raw if raw.is_about_regions else None
        return raw.id, raw.timeout_ms, raw.num_tokens, *outcome(read_call(raw.request, STORE, **LIMITS))

    said = []
    for way in (by_codec, by_python):
        try:
            said.append(way())
        except ExpertdServerError as error:
            said.append((type(error), str(error)))
    assert said[0] == said[1], data.hex()
    return (CODEC.parse_stream_request if is_stream else CODEC.parse_request)(data) is not None


@given(requests)
@settings(max_examples=600, deadline=None)
def test_any_request(data: bytes) -> None:
    same_as_python(data, is_stream=False)


@given(stream_requests)
@example(b"\x12\x80\x80\x80\x80\x10" + b"\x0a\x01x")  # a length of 2^32
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f")  # and of 2^63 - 1
@settings(max_examples=600, deadline=None)
def test_any_stream_request(data: bytes) -> None:
    same_as_python(data, is_stream=True)


def a_request(chance: random.Random) -> pb.ForwardRequest:
    """A good request of any kind for layer "x"."""
    rows = chance.choice([0, 1, 3])
    request = pb.ForwardRequest(layer="x", weights_version=chance.choice([0, 0, 1]))

    def tensor(dtype: int, columns: int, data: np.ndarray) -> pb.Tensor:  # type: ignore[type-arg]
        return pb.Tensor(dtype=dtype, shape=[rows, columns], data=data.tobytes())

    real = np.random.default_rng(chance.randrange(2**32)).standard_normal((rows, SPEC.hidden_size), np.float32)
    bfloat16 = (real.view(np.uint32) >> 16).astype(np.uint16)
    hidden = {
        pb.DATA_TYPE_FLOAT32: real,
        pb.DATA_TYPE_BFLOAT16: bfloat16,
        pb.DATA_TYPE_FLOAT16: real.astype(np.float16),
        pb.DATA_TYPE_FLOAT8_E4M3FN: bfloat16.astype(np.uint8) & 0x77,
    }
    dtype = chance.choice(list(hidden))
    request.hidden_states.CopyFrom(tensor(dtype, SPEC.hidden_size, hidden[dtype]))
    columns = SPEC.num_experts if chance.random() < 0.5 else SPEC.top_k
    narrow = {pb.DATA_TYPE_FLOAT32: real[:, :columns], pb.DATA_TYPE_BFLOAT16: bfloat16[:, :columns]}
    dtype = chance.choice(list(narrow))
    if columns == SPEC.num_experts:
        request.routing_logits.CopyFrom(tensor(dtype, columns, narrow[dtype]))
    else:
        ids = np.array(
            [[chance.randrange(-1, SPEC.num_experts) for _ in range(columns)] for _ in range(rows)], np.int32
        )
        request.topk_ids.CopyFrom(tensor(pb.DATA_TYPE_INT32, columns, ids))
        request.topk_weights.CopyFrom(tensor(dtype, columns, narrow[dtype]))
    if chance.random() < 0.7:
        request.options.output_dtype = chance.randrange(4)
        request.options.do_finalize = chance.random() < 0.5
        request.options.return_routing = chance.random() < 0.5
    return request


def spoil(chance: random.Random, request: pb.ForwardRequest) -> None:
    """Change one thing about it, most of which it must not bear."""
    names = [name for name in ("hidden_states", "routing_logits", "topk_ids", "topk_weights") if request.HasField(name)]
    name = chance.choice(names)
    tensor: pb.Tensor = getattr(request, name)
    data = bytearray(tensor.data)
    match chance.randrange(9):
        case 0:
            tensor.dtype = chance.randrange(-1, 8)  # type: ignore[assignment]
        case 1:
            tensor.shape[chance.randrange(2)] = chance.choice([0, 1, 2, 3, 65, 2**31, 2**32 - 1])
        case 2:
            tensor.data = bytes(data[:-1])
        case 3:
            request.ClearField(name)
        case 4:
            request.layer = chance.choice(["", "y", "ü", "x" * 257])
        case 5:
            request.weights_version = chance.choice([1, 2, 2**64 - 1])
        case 6:
            request.options.output_dtype = chance.randrange(-1, 8)  # type: ignore[assignment]
        case 7 if len(data) >= 4:  # NaN of every kind, an id out of range, or one of -1
            at = chance.randrange(0, len(data) - 3, 4)
            patterns = ("ffffffff", "0000c07f", "000080ff", "010080ff", "0000807f", "08000000", "feffffff", "c07fc0ff")
            data[at : at + 4] = bytes.fromhex(chance.choice(patterns))
            tensor.data = bytes(data)
        case _:
            tensor.shape.append(1)


@pytest.mark.parametrize("seed", range(40))
def test_good_requests_are_known_to_the_compiled_codec(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        request = a_request(chance)
        assert same_as_python(request.SerializeToString(), is_stream=False), seed
        message = pb.ForwardStreamRequest(
            id=chance.randrange(2**63), request=request, timeout_ms=chance.randrange(2**32)
        )
        assert same_as_python(message.SerializeToString(), is_stream=True), seed


@pytest.mark.parametrize("seed", range(40))
def test_spoiled_requests_are_refused_with_the_same_words(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        request = a_request(chance)
        spoil(chance, request)
        same_as_python(request.SerializeToString(), is_stream=False)
        message = pb.ForwardStreamRequest(id=7, request=request)
        same_as_python(message.SerializeToString(), is_stream=True)


@given(st.integers(0, 19), st.data())
@settings(max_examples=300, deadline=None)
def test_corrupted_bytes(seed: int, draw: st.DataObject) -> None:
    data = bytearray(good_message(seed).SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, min(60, len(data) - 1)))] = draw.draw(st.integers(0, 255))
    same_as_python(bytes(data[: draw.draw(st.integers(0, len(data)))]), is_stream=True)


NAMING_REGIONS = [
    *((name, "slice") for name in ("hidden_states", "routing_logits", "topk_ids", "topk_weights")),
    ("", "answer_slice"),
]


@pytest.mark.parametrize("path", NAMING_REGIONS, ids=lambda path: path[0] or path[1])
@pytest.mark.parametrize("where", [pb.RegionSlice(), pb.RegionSlice(region=1, offset=64, nbytes=2**40)], ids=str)
def test_whatever_names_a_region_is_refused_until_that_is_resolved(
    path: tuple[str, str], where: pb.RegionSlice
) -> None:
    """As only the stream knows its regions; else good requests with and without data beside it."""
    name, field = path
    requests = [(seed, a_request(random.Random(seed))) for seed in range(20)]
    having = [(seed, request) for seed, request in requests if not name or request.HasField(name)]
    assert having
    for seed, request in having:
        of: pb.Tensor | pb.ForwardRequest = getattr(request, name) if name else request
        for clears_data in (False, True):
            getattr(of, field).CopyFrom(where)
            if name and clears_data:
                of.ClearField("data")
            data = request.SerializeToString()
            assert not same_as_python(data, is_stream=False), seed
            stream_data = pb.ForwardStreamRequest(id=seed, request=request).SerializeToString()
            has_both = isinstance(of, pb.Tensor) and bool(of.data)
            assert same_as_python(stream_data, is_stream=True) is not has_both, seed
            slice_ = where.region, where.offset, where.nbytes
            raw = codec.read_message(data)
            assert isinstance(raw, RawRequest)
            assert (getattr(raw, name).slice if name else raw.answer_slice) == RawSlice(*slice_)
            read = codec.read_stream_message(stream_data)[3]
            assert read is not None
            assert not isinstance(read, RawStreamRequest)
            if not isinstance(read, RawRequest):
                assert read.slices is not None
                assert [each for each in read.slices if each is not None] == [slice_]
                assert read.slices[NAMING_REGIONS.index(path)] == slice_
            for each in (raw, read):
                with pytest.raises(InvalidArgumentError, match="names a region"):
                    codec.typed_call(each, STORE, **LIMITS)


@pytest.mark.parametrize("seed", range(40))
def test_what_was_found_in_slices_is_as_good_as_data(seed: int) -> None:
    """Spoiled requests, too, whose data lies elsewhere: the same call, or the same words but for where the data is."""
    chance = random.Random(seed)
    for number in range(20):
        request = a_request(chance)
        if number % 2:
            spoil(chance, request)
        expected = said_of(codec.read_message(request.SerializeToString()))
        found = {}
        for at, name in enumerate(TENSORS):
            tensor: pb.Tensor = getattr(request, name)
            if request.HasField(name) and chance.random() < 0.8:  # type: ignore[arg-type]
                found[at] = tensor.data
                tensor.ClearField("data")
                tensor.slice.CopyFrom(pb.RegionSlice(region=at, offset=at * 1000, nbytes=len(found[at])))
        request.answer_slice.nbytes = number
        read = codec.read_stream_message(pb.ForwardStreamRequest(id=1, request=request).SerializeToString())[3]
        assert not isinstance(read, RawStreamRequest)
        if isinstance(read, RawRequest) or read is None:
            continue  # what is spoiled may be for Python alone
        for at, data in found.items():
            read.bind(at, memoryview(data) if at == 0 else data)
        read.bind(len(TENSORS), b"")
        said = said_of(read)
        if isinstance(said, str):
            assert isinstance(expected, str)
            said = said.replace(".slice: ", ".data: ")
        assert said == expected


def said_of(message: codec.Message) -> tuple[object, ...] | str:
    try:
        return outcome(codec.typed_call(message, STORE, **LIMITS))
    except ExpertdServerError as error:
        return str(error)


def test_only_slices_can_be_bound() -> None:
    request = pb.ForwardRequest(layer="x", hidden_states=pb.Tensor(slice=pb.RegionSlice(region=1)))
    read = CODEC.parse_stream_request(pb.ForwardStreamRequest(id=1, request=request).SerializeToString())
    assert read is not None
    for number in (-1, 1, 4, 5, 2**40):
        with pytest.raises(ValueError, match="expected that of a slice"):
            read.bind(number, b"")
        assert read.bound(number) is None
    with pytest.raises(TypeError):
        read.bind(0, "text")  # type: ignore[arg-type]
    assert read.bound(0) is None
    read.bind(0, b"abc")
    assert read.bound(0) == b"abc"


@pytest.mark.parametrize("has_request", [False, True])
@pytest.mark.parametrize("field", ["register_region", "unregister_region"])
def test_what_says_something_about_regions_is_handed_over_whole(field: str, has_request: bool) -> None:
    message = pb.ForwardStreamRequest(id=3, request=a_request(random.Random(1)) if has_request else None)
    getattr(message, field).region = 5
    data = message.SerializeToString()
    assert CODEC.parse_stream_request(data) is None
    number, _, _, read = codec.read_stream_message(data)
    assert number == 3
    assert read == parse_stream_request(data)
    assert isinstance(read, RawStreamRequest)
    assert read.is_about_regions


@settings(deadline=None, max_examples=200)
@given(results(), st.integers(0, 2**31), st.integers(0, 400), st.integers(0, 2**64 - 1))
def test_an_answer_goes_where_it_was_asked_to_and_nowhere_else(
    result: ForwardResult, offset: int, room: int, number: int
) -> None:
    """With what does not fit in the message, and protobuf's bytes around it."""
    memory = bytearray(b"\xa5" * (room + 64))
    place = AnswerPlace(7, offset, memoryview(memory)[:room])
    placed = pb.ForwardStreamResponse.FromString(codec.write_stream_answer(number, result, 9, place))
    whole = pb.ForwardStreamResponse.FromString(codec.write_stream_answer(number, result, 9))
    taken = bytearray(len(memory))
    for name in ("output", "gemm2_output", "expert_weights", "topk_ids", "expanded_idx_to_permuted_idx"):
        if not placed.response.HasField(name):
            continue
        tensor: pb.Tensor = getattr(placed.response, name)
        if tensor.HasField("slice"):
            assert not tensor.data
            assert tensor.slice.region == 7
            start = tensor.slice.offset - offset
            stop = start + tensor.slice.nbytes
            assert start % 64 == 0
            assert 0 <= start < stop <= room
            assert not any(taken[start:stop])
            taken[start:stop] = b"\1" * (stop - start)
            tensor.data = bytes(memory[start:stop])
            tensor.ClearField("slice")
    assert placed == whole
    assert all(byte == 0xA5 for byte, is_taken in zip(memory, taken, strict=True) if not is_taken)


def test_an_answer_in_shared_memory_is_written_by_the_compiled_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ForwardResult(3, ForwardTiming(1, 2, 3, 4, 5, 6), output=torch.ones(3, 4))
    expected = encode_stream_response(1, result, 7, AnswerPlace(7, 64, memoryview(bytearray(64))))
    monkeypatch.setattr(codec, "encode_stream_response", None)
    memory = bytearray(64)
    assert codec.write_stream_answer(1, result, 7, AnswerPlace(7, 64, memoryview(memory))) == expected
    assert memory[:48] == np.ones(12, np.float32).tobytes()


def test_where_it_was_not_built_python_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    request = a_request(random.Random(1))
    data = pb.ForwardStreamRequest(id=5, request=request, timeout_ms=6).SerializeToString()
    with_it = codec.read_stream_message(data)
    result = ForwardResult(3, ForwardTiming(1, 2, 3, 4, 5, 6), output=torch.ones(3, 4))
    answers = codec.write_answer(result, 7), codec.write_stream_answer(5, result, 7)
    monkeypatch.setattr(codec, "CODEC", None)
    monkeypatch.setattr(messages, "CODEC", None)
    without = codec.read_stream_message(data)
    assert with_it[:3] == without[:3] == (5, 6, request.hidden_states.shape[0])
    assert isinstance(without[3], RawRequest)
    calls = [codec.typed_call(message, STORE, **LIMITS) for message in (with_it[3], without[3])]
    assert outcome(calls[0]) == outcome(calls[1])
    assert (codec.write_answer(result, 7), codec.write_stream_answer(5, result, 7)) == answers


def test_a_request_keeps_its_bytes_and_its_tensors_are_views_of_them() -> None:
    data = a_request(random.Random(3)).SerializeToString()
    call = codec.typed_call(codec.read_message(data), STORE, **LIMITS)
    assert isinstance(call.hidden_states.data, memoryview)
    assert call.hidden_states.data.obj is data
    assert call.hidden_states.data.readonly


@settings(deadline=None, max_examples=200)
@given(results(), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_any_answer(result: ForwardResult, depth: int, number: int) -> None:
    assert codec.write_answer(result, depth) == encode_response(result, depth)
    assert codec.write_stream_answer(number, result, depth) == encode_stream_response(number, result, depth)


def test_large_answers_and_parts_of_a_batch() -> None:
    wide = torch.arange(2**19, dtype=torch.int32).to(torch.bfloat16).view(512, 1024)
    for output in (wide, wide[5:300], wide[7:8]):
        result = ForwardResult(3, ForwardTiming(1, 2, 3, 4, 5, 6), output=output)
        assert codec.write_stream_answer(1, result, 7) == encode_stream_response(1, result, 7)


class TestCopyBytes:
    @pytest.mark.parametrize("copy", [copy_bytes, _copy_bytes])
    def test_bytes_lie_where_they_were_put(self, copy: Callable[..., None]) -> None:
        memory = np.zeros(10, np.uint8)
        copy(memory, 3, b"abc")
        copy(memory, 10, b"")
        assert memory.tobytes() == b"\0\0\0abc\0\0\0\0"

    @pytest.mark.parametrize("copy", [copy_bytes, _copy_bytes])
    @pytest.mark.parametrize("offset", [8, 10, 2**40])
    def test_what_does_not_fit_is_refused(self, copy: Callable[..., None], offset: int) -> None:
        memory = np.zeros(10, np.uint8)
        with pytest.raises(ValueError, match=r"fit|broadcast"):
            copy(memory, offset, b"abc")
        assert not memory.any()

    def test_nothing_is_written_to_what_is_read_only(self) -> None:
        with pytest.raises((TypeError, BufferError, ValueError)):
            copy_bytes(b"0123456789", 0, b"abc")


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_ids_are_counted_alike(dtype: type) -> None:
    ids = np.random.default_rng(0).integers(-1, 40, 500).astype(dtype)
    ours, theirs = np.full(16, 3), np.full(16, 3)
    count_ids(ids, 8, ours)
    _count_ids(ids, 8, theirs)
    assert (ours == theirs).all()
    assert ours.sum() == 48 + ((ids >= 8) & (ids < 24)).sum()


@pytest.mark.parametrize("address_of", [native._address_of, native.address_of], ids=["Python", "in use"])
def test_an_address_is_that_of_the_first_byte(address_of: Callable[[Any], int]) -> None:
    array = np.arange(100, dtype=np.uint8)
    assert address_of(array) == address_of(memoryview(array)) == array.ctypes.data
    assert address_of(memoryview(array)[10:20][5:]) == array.ctypes.data + 15


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_ids_of_a_tensor_are_counted_as_those_of_an_array(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-1, 40, (50, 10), dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected, ours = np.zeros(16, np.int64), np.zeros(16, np.int64)
    for each in (ids, ids[:, 3:5]):  # the second has gaps
        count_tensor_ids(each, 8, ours)
        _count_ids(each.numpy().ravel(), 8, expected)
        assert (ours == expected).all()
    monkeypatch.setattr(native, "CODEC", None)
    count_tensor_ids(ids, 8, ours)
    _count_ids(ids.numpy().ravel(), 8, expected)
    assert (ours == expected).all()
    assert expected.sum() > 0


@pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built")
def test_ids_of_a_strange_size_are_refused() -> None:
    counts = np.zeros(4, np.int64)
    with pytest.raises(TypeError, match="ids of 1 bytes and counts of 8"):
        CODEC.count_ids_at(counts.ctypes.data, 4, 1, 0, counts)
    with pytest.raises(TypeError, match="ids of 8 bytes and counts of 4"):
        CODEC.count_ids_at(counts.ctypes.data, 4, 8, 0, counts.view(np.int32))
    with pytest.raises(TypeError, match="5"):
        CODEC.count_ids_at(counts.ctypes.data, 4, 8, 0)  # type: ignore[call-arg]


@pytest.mark.parametrize("num_tokens", [0, 3, 300])
def test_an_answer_is_copied_at_once_or_with_others(num_tokens: int) -> None:
    output = torch.randn(num_tokens, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    timing = ForwardTiming(1, 2, 3, 4, 5, 6)
    several = Copies()
    later = codec.write_stream_answer(7, ForwardResult(3, timing, output=output, copies=several), 8)
    several.run()
    assert codec.write_stream_answer(7, ForwardResult(3, timing, output=output), 8) == later
    assert later == encode_stream_response(7, ForwardResult(3, timing, output=output), 8)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_rows_of_a_batch_are_written_as_a_tensor_of_their_own(first: int) -> None:
    whole = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    timing = ForwardTiming(1, 2, 3, 4, 5, 6)
    expected = encode_response(ForwardResult(3, timing, output=whole[first : first + 3].clone()), 9)
    for where in (Matrix.of(whole), None):
        result = ForwardResult(3, timing)
        result.lies_in(whole, where, first, 3)
        assert codec.write_answer(result, 9) == expected
        assert result.output is not None
        assert torch.equal(result.output, whole[first : first + 3])
        assert result.output is result.output
    assert Matrix.of(whole[:, 1:]) is None, "it has gaps"
    result = ForwardResult(3, timing, topk_ids=torch.ones(3, 2, dtype=torch.int32))
    result.lies_in(whole, Matrix.of(whole), first, 3)
    assert result.matrix is None, "there is more to write"
    assert codec.write_answer(result, 9) == encode_response(result, 9)
    result.output = whole
    result.topk_ids = None
    assert codec.write_answer(result, 9) == encode_response(ForwardResult(3, timing, output=whole), 9)


@pytest.fixture
def default_helpers() -> Iterator[None]:
    """Puts back what this machine would use."""
    yield
    CODEC.set_copy_helpers(min(3, len(os.sched_getaffinity(0)) // 4))


class TestCopies:
    @pytest.mark.parametrize("copies", [Copies, _Copies])
    def test_what_was_noted_is_there_when_they_have_run(self, copies: Callable[[], Copies]) -> None:
        destination, several = bytearray(12), copies()
        several.add(destination, 2, b"abc")
        several.add(destination, 7, memoryview(b"__xyz__")[2:5])
        several.run()
        assert destination == b"\0\0abc\0\0xyz\0\0"
        several.run()
        assert destination == b"\0\0abc\0\0xyz\0\0", "once is enough"

    @pytest.mark.parametrize("copies", [Copies, _Copies])
    def test_large_ones_too(self, copies: Callable[[], Copies]) -> None:
        source = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8)
        destination, several = np.zeros(2**21, np.uint8), copies()
        several.add(destination, 0, source.data)
        several.add(destination, 2**20, source.tobytes())
        several.run()
        assert (destination.reshape(2, -1) == source).all()

    @pytest.mark.usefixtures("default_helpers")
    @pytest.mark.parametrize("helpers", [0, 1, 3])
    def test_however_many_threads_help(self, helpers: int) -> None:
        """Several callers at once too, of whom one has help."""
        CODEC.set_copy_helpers(helpers)
        source = np.random.default_rng(helpers).integers(0, 256, 3 * 2**20 + 77, np.uint8)
        cuts = [0, 1, 5000, 2**17, 2**17 + 1, 2**21, len(source)]

        def copy_all(_: int) -> bool:
            destination, several = np.zeros_like(source), Copies()
            for start, end in itertools.pairwise(cuts):
                several.add(destination, start, source[start:end].data)
            several.run()
            return bool((destination == source).all())

        with ThreadPoolExecutor(4) as callers:
            assert all(callers.map(copy_all, range(40)))

    def test_where_no_thread_can_be_started_the_caller_copies(self) -> None:
        program = """
import resource
from expertd_server.compiled import CODEC

source, destination = bytearray(b"x" * 2**22), bytearray(2**22)
CODEC.set_copy_helpers(2)
with open("/proc/self/statm") as statm:
    mapped = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**20, resource.RLIM_INFINITY))  # no room for a thread's stack
CODEC.copy(destination, 0, source)
assert destination == source
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def test_memory_by_its_address(self) -> None:
        source, destination, several = np.arange(100, dtype=np.uint8), bytearray(120), Copies()
        several.add_memory(destination, 20, source.ctypes.data, 100)
        several.run()
        assert destination == bytes(20) + source.tobytes()
        with pytest.raises(ValueError, match="do not fit"):
            several.add_memory(destination, 21, source.ctypes.data, 100)
        with pytest.raises(ValueError, match="do not fit"):
            several.add_memory(destination, 0, source.ctypes.data, -1)
        with pytest.raises(TypeError, match="expected 4"):
            several.add_memory(destination, 0, source.ctypes.data)  # type: ignore[call-arg]

    @pytest.mark.parametrize("copies", [Copies, _Copies])
    @pytest.mark.parametrize("offset", [-1, 8, 2**62])
    def test_what_does_not_fit_is_refused(self, copies: Callable[[], Copies], offset: int) -> None:
        with pytest.raises(ValueError, match=r"fit|broadcast"):
            copies().add(bytearray(10), offset, b"abc")

    @pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built")
    def test_both_ends_are_kept_until_then_and_let_go_of(self) -> None:
        several, destination = Copies(), bytearray(4)
        several.add(destination, 0, bytearray(b"abcd"))
        with pytest.raises(BufferError):
            destination.clear()
        several.run()
        assert destination == b"abcd"
        destination.clear()
        several.add(destination := bytearray(4), 0, b"abcd")
        del several  # and what never ran
        destination.clear()
