"""Requests and answers in blocks of shared memory: what goes in comes out, and the compiled module writes the same."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import results

from expertd.v1 import expertd_pb2 as pb
from expertd_server import blocks, remote_codec, result_blocks
from expertd_server.blocks import MAX_ERROR_BYTES, read_answer, read_timing, write_answer
from expertd_server.compiled import BLOCKS
from expertd_server.engine import ForwardResult, ForwardTiming
from expertd_server.forward import Matrix
from expertd_server.native import address_of
from expertd_server.region_handover import Where
from expertd_server.regions import AnswerPlace
from expertd_server.remote_codec import RemoteAnswer
from expertd_server.result_blocks import write_result
from expertd_server.ring import ALIGNMENT_BYTES, PythonArena
from expertd_server.wire import TORCH_DTYPES, answer_tensors, encode_response, encode_stream_response
from expertd_server.wire_answer import AnswerTensor
from expertd_server.wire_check import ITEM_BYTES, CheckedRequest

HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 64, 8, 2
GUARD = 64
REGION, REGION_BYTES = 2**40, 8192
TIMING = ForwardTiming(1, 2, 3, 4, 5, 6)
HIDDEN_DTYPES = (pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_FLOAT8_E4M3FN)
OUTPUT_DTYPES = HIDDEN_DTYPES[:3]

needs_compiled = pytest.mark.skipif(BLOCKS is None, reason="the compiled module was not built here")


@st.composite
def checked_requests(draw: st.DrawFn) -> CheckedRequest:
    """Any kind of request, of any bits."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_tokens = draw(st.integers(0, 9))

    def part(dtype: int, columns: int) -> tuple[int, bytes | memoryview]:
        data = chance.bytes(num_tokens * columns * ITEM_BYTES[dtype])
        return dtype, data if draw(st.booleans()) else memoryview(data)

    logits = ids = weights = None
    real = draw(st.sampled_from(OUTPUT_DTYPES[:2]))
    if draw(st.booleans()):
        ids, weights = part(pb.DATA_TYPE_INT32, TOP_K), part(real, TOP_K)
    else:
        logits = part(real, NUM_EXPERTS)
    hidden_states = part(draw(st.sampled_from(HIDDEN_DTYPES)), HIDDEN_SIZE)
    output, flags = draw(st.sampled_from(OUTPUT_DTYPES)), (draw(st.booleans()), draw(st.booleans()))
    return num_tokens, hidden_states, logits, ids, weights, output, *flags


@dataclass
class Shared:
    """A request, and what of it and of its answer lies in a region."""

    request: CheckedRequest
    region: memoryview
    hidden_states: Where | None
    place: Where | None

    def regions(self) -> dict[int, memoryview]:
        return {REGION: self.region}

    def room(self) -> memoryview | None:
        """The answer's place."""
        return None if self.place is None else self.region[self.place[1] : self.place[1] + self.place[2]]


@st.composite
def shared_requests(draw: st.DrawFn) -> Shared:
    """Any kind of request; its hidden states, the place of its answer, both or neither in a region."""
    request = draw(checked_requests())
    num_tokens, (dtype, data), *others, output, do_finalize, return_routing = request
    region, hidden_states, place = memoryview(bytearray(REGION_BYTES)), None, None
    if num_tokens and draw(st.booleans()):
        start = draw(st.integers(0, REGION_BYTES - len(data)))
        region[start : start + len(data)] = data
        hidden_states, data = (REGION, start, len(data)), region[start : start + len(data)]
    if num_tokens and draw(st.booleans()):
        nbytes = num_tokens * HIDDEN_SIZE * ITEM_BYTES[output]
        place = REGION, draw(st.integers(0, REGION_BYTES - nbytes)), nbytes
        do_finalize, return_routing = True, False
    request = num_tokens, (dtype, data), *others, output, do_finalize, return_routing
    return Shared(request, region, hidden_states, place)


def largest_answer(request: CheckedRequest, seed: int, *, is_matrix: bool = False) -> ForwardResult:
    """An answer to it that takes as much room as one may. is_matrix: which is of the output alone."""
    num_tokens, *_, output, do_finalize, _return_routing = request
    chance = np.random.default_rng(seed)

    def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if not size:  # torch gives no other type to what is empty
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(chance.integers(0, 256, size * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    if is_matrix:
        return ForwardResult(2**40, TIMING, output=some(TORCH_DTYPES[output], num_tokens, HIDDEN_SIZE))
    num_rows = num_tokens * TOP_K
    return ForwardResult(
        2**40,
        TIMING,
        output=some(TORCH_DTYPES[output], num_tokens, HIDDEN_SIZE) if do_finalize else None,
        gemm2_output=None if do_finalize else some(torch.bfloat16, num_rows, HIDDEN_SIZE),
        expert_weights=some(torch.bfloat16, num_tokens, TOP_K),
        topk_ids=some(torch.int32, num_tokens, TOP_K),
        expanded_idx_to_permuted_idx=None if do_finalize else some(torch.int32, num_rows),
    )


def plain(tensor: AnswerTensor | None) -> tuple[int, tuple[int, ...], bytes] | None:
    """To be compared."""
    return None if tensor is None else (*tensor[:2], bytes(tensor[2]))


def guarded(num_bytes: int) -> memoryview:
    """A block, and behind it bytes that must stay."""
    return memoryview(bytearray(b"\xaa" * (num_bytes + GUARD)))


deadlines = st.none() | st.floats(0, 1e9)


@settings(max_examples=200, deadline=None)
@given(shared_requests(), deadlines, st.integers(0, 2**32 - 1))
def test_what_goes_in_comes_out(shared: Shared, deadline_s: float | None, seed: int) -> None:
    size = blocks.block_bytes(shared.request, HIDDEN_SIZE, TOP_K, shared.hidden_states, shared.place)
    memory = guarded(size)
    block = memory[:-GUARD]
    blocks.write_call(block, shared.request, 2**63, deadline_s, shared.hidden_states, shared.place)
    read = blocks.read_call(block, shared.regions())
    assert read == (2**63, deadline_s, shared.request, shared.room())
    _, hidden_states = read[2][1]
    assert (hidden_states.obj is shared.region.obj) == (shared.hidden_states is not None)  # type: ignore[union-attr]
    place = read[3]
    answer = largest_answer(shared.request, seed, is_matrix=place is not None)
    before = bytes(shared.region)
    write_answer(block, answer_tensors(answer), TIMING, 2**40, 12345, place)
    assert read_timing(block) == (TIMING, 2**40, 12345)
    found = read_answer(block, shared.room())
    assert [plain(tensor) for tensor in found] == [plain(tensor) for tensor in answer_tensors(answer)]
    assert bytes(memory[-GUARD:]) == b"\xaa" * GUARD, "beyond the block"
    if shared.place is None:
        assert bytes(shared.region) == before
    else:
        _, start, nbytes = shared.place
        assert bytes(shared.region[:start]) == before[:start], "before the place"
        assert bytes(shared.region[start + nbytes :]) == before[start + nbytes :], "beyond the place"
    assert size >= MAX_ERROR_BYTES


@pytest.mark.parametrize("block_bytes", [blocks.block_bytes, blocks._block_bytes], ids=["as-built", "python"])
def test_what_lies_in_a_region_takes_no_room_in_the_block(block_bytes: Any) -> None:
    num_tokens = 512
    hidden, logits = num_tokens * HIDDEN_SIZE * 4, num_tokens * NUM_EXPERTS * 4
    answer = num_tokens * HIDDEN_SIZE * 4 + num_tokens * TOP_K * (2 + 4 + 4)
    request = num_tokens, (1, bytes(hidden)), (1, bytes(logits)), None, None, 1, True, False
    head = block_bytes((0, (1, b""), (1, b""), None, None, 1, True, False), HIDDEN_SIZE, TOP_K) - MAX_ERROR_BYTES
    in_region, place = (1, 0, hidden), (1, 0, num_tokens * HIDDEN_SIZE * 4)
    assert block_bytes(request, HIDDEN_SIZE, TOP_K) == head + hidden + logits
    assert block_bytes(request, HIDDEN_SIZE, TOP_K, in_region) == head + answer
    assert block_bytes(request, HIDDEN_SIZE, TOP_K, None, place) == head + hidden + logits
    assert block_bytes(request, HIDDEN_SIZE, TOP_K, in_region, place) == head + logits


@pytest.mark.parametrize("dtype", [pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_BFLOAT16])
@pytest.mark.parametrize(
    "write_call",
    [blocks._write_call, pytest.param(blocks.write_call, marks=needs_compiled)],
    ids=["python", "as-built"],
)
def test_logits_are_numbers_or_it_says_so(write_call: Any, dtype: int) -> None:
    torch_dtype = TORCH_DTYPES[dtype]
    for bad in (None, 0, 7, 2 * NUM_EXPERTS - 1):
        logits = torch.full((2 * NUM_EXPERTS,), torch.inf, dtype=torch_dtype)
        if bad is not None:
            logits[bad] = torch.nan
        data = logits.view(torch.uint8).numpy().tobytes()
        request = 2, (pb.DATA_TYPE_FLOAT8_E4M3FN, b"\x7f" * 2 * HIDDEN_SIZE), (dtype, data), None, None, 1, True, False
        block = guarded(blocks.block_bytes(request, HIDDEN_SIZE, TOP_K))[:-GUARD]
        assert write_call(block, request, 1, None) is (bad is None)


@needs_compiled
@settings(max_examples=300, deadline=None)
@given(shared_requests(), deadlines, st.integers(0, 2**64 - 1))
def test_the_compiled_module_writes_the_same_requests(shared: Shared, deadline_s: float | None, layer_id: int) -> None:
    request_, elsewhere = shared.request, (shared.hidden_states, shared.place)
    size = blocks._block_bytes(request_, HIDDEN_SIZE, TOP_K, *elsewhere)
    assert BLOCKS.block_bytes(request_, HIDDEN_SIZE, TOP_K, *elsewhere) == size
    mine, theirs = guarded(size), guarded(size)
    has_numbers = BLOCKS.write_call(mine[:-GUARD], request_, layer_id, deadline_s, *elsewhere)
    assert has_numbers is blocks._write_call(theirs[:-GUARD], request_, layer_id, deadline_s, *elsewhere)
    assert bytes(mine) == bytes(theirs)
    regions = shared.regions()
    read = BLOCKS.read_call(mine, regions)
    assert read == blocks._read_call(mine, regions) == (layer_id, deadline_s, request_, shared.room())
    if shared.hidden_states is not None:
        data = read[2][1][1]
        assert address_of(data) == address_of(shared.region) + shared.hidden_states[1], "a view, no copy"
    if read[3] is not None:
        assert not read[3].readonly


def block_of(num_bytes: int) -> RemoteAnswer:
    """A block that holds no answer yet, as one that is to be read."""
    arena = PythonArena(memoryview(bytearray(-(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)))
    block = arena.allocate(num_bytes)
    assert block is not None
    return RemoteAnswer(block)


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The way of both modules; their functions look at it whenever they are called."""
    if not request.param:
        for module in (remote_codec, result_blocks):
            monkeypatch.setattr(module, "BLOCKS", None)
    elif BLOCKS is None:
        pytest.skip("the compiled module was not built here")
    return bool(request.param)


def test_any_answer_reaches_the_wire_as_if_one_process_had_written_it(is_compiled: bool) -> None:
    chance = random.Random(20261126)

    @settings(max_examples=200, deadline=None)
    @given(results(), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
    def check(result: ForwardResult, depth: int, number: int) -> None:
        nbytes = sum(tensor[2].nbytes for tensor in answer_tensors(result) if tensor is not None)
        answer = block_of(nbytes + 1024)
        write_result(answer.block.view, result, chance.randrange(2**64))
        answer = RemoteAnswer(answer.block)
        assert (answer.timing, answer.weights_version) == (result.timing, result.weights_version)
        assert remote_codec.write_answer(answer, depth) == encode_response(result, depth)
        written = remote_codec.write_stream_answer(number, answer, depth)
        assert written == encode_stream_response(number, result, depth)

    check()


def test_any_answer_in_its_place_is_named_as_if_one_process_had_written_it(is_compiled: bool) -> None:
    @settings(max_examples=200, deadline=None)
    @given(shared_requests(), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1))
    def check(shared: Shared, seed: int, number: int, region: int) -> None:
        place = shared.room()
        if place is None or shared.place is None:
            return
        result = largest_answer(shared.request, seed, is_matrix=True)
        answer = block_of(MAX_ERROR_BYTES)
        write_result(answer.block.view, result, 5, place)
        answer = RemoteAnswer(answer.block, place)
        assert (answer.timing, answer.weights_version, answer.queue_tokens) == (TIMING, 2**40, 5)
        written = bytes(shared.region)
        # The caller's own word for it, and room to spare.
        offset, room = shared.place[1], memoryview(bytearray(len(place) + 100))
        named = remote_codec.write_stream_answer(number, answer, seed, AnswerPlace(region, offset, place))
        assert named == encode_stream_response(number, result, seed, AnswerPlace(region, offset, room))
        assert bytes(place) == bytes(room[: len(place)])
        # Whose stream is gone, or never was.
        assert remote_codec.write_stream_answer(number, answer, seed) == encode_stream_response(number, result, seed)
        assert remote_codec.write_answer(answer, seed) == encode_response(result, seed)
        assert bytes(shared.region) == written, "reading it writes nothing"

    check()


def test_an_answer_that_is_in_its_place_is_not_copied(is_compiled: bool) -> None:
    """A device has put it there."""
    place = memoryview(bytearray(range(64)) * HIDDEN_SIZE)
    result = ForwardResult(3, TIMING)
    result.lies_at(Matrix(torch.bfloat16, 32, HIDDEN_SIZE, address_of(place)), place)
    answer = block_of(MAX_ERROR_BYTES)
    write_result(answer.block.view, result, 0, place)
    assert bytes(place) == bytes(range(64)) * HIDDEN_SIZE
    assert remote_codec.write_stream_answer(1, RemoteAnswer(answer.block, place), 7) == encode_stream_response(
        1, ForwardResult(3, TIMING, output=torch.frombuffer(place, dtype=torch.bfloat16).view(32, HIDDEN_SIZE)), 7
    )


def test_an_answer_beyond_its_place_is_refused(is_compiled: bool) -> None:
    memory, block = guarded(4096), guarded(MAX_ERROR_BYTES)
    result = ForwardResult(3, TIMING, output=torch.zeros(64, 33, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"fit|broadcast"):
        write_result(block, result, 0, memory[:-GUARD])
    assert bytes(memory) == b"\xaa" * len(memory)


def test_large_answers(is_compiled: bool) -> None:
    """Of more bytes than are copied without the interpreter, and parts of a batch."""
    wide = torch.arange(2**19, dtype=torch.int32).to(torch.bfloat16).view(512, 1024)
    for output in (wide, wide[5:300], wide[7:8]):
        result = ForwardResult(3, TIMING, output=output)
        answer = block_of(output.nbytes + 1024)
        write_result(answer.block.view, result, 9)
        answer = RemoteAnswer(answer.block)
        assert answer.queue_tokens == 9
        assert remote_codec.write_stream_answer(1, answer, 7) == encode_stream_response(1, result, 7)


def test_an_answer_beyond_its_block_is_refused(is_compiled: bool) -> None:
    memory = guarded(4096)
    with pytest.raises(ValueError, match=r"fit|buffer|size"):
        write_result(memory[:-GUARD], ForwardResult(3, TIMING, output=torch.zeros(64, 64)), 0)
    assert bytes(memory[-GUARD:]) == b"\xaa" * GUARD


@pytest.mark.parametrize("read_call", [blocks.read_call, blocks._read_call], ids=["as-built", "python"])
@pytest.mark.parametrize("where", [(REGION, 4000, 97), (REGION, 4097, 0), (REGION, 2**64 - 1, 2), (REGION + 1, 0, 1)])
@pytest.mark.parametrize("what", ["hidden_states", "place"])
def test_what_is_not_mapped_is_not_read(read_call: Any, where: Where, what: str) -> None:
    request = (1, (4, bytes(64)), (1, bytes(32)), None, None, 2, True, False)
    block = guarded(16384)
    elsewhere = (where, None) if what == "hidden_states" else (None, where)
    blocks.write_call(block, request, 1, None, *elsewhere)
    with pytest.raises(ValueError, match="not mapped here"):
        read_call(block, {REGION: memoryview(bytearray(4096))})


@needs_compiled
class TestNonsense:
    """The compiled module touches no memory that is not the block's, whatever it is told."""

    def test_blocks_without_room(self) -> None:
        request = (1, (4, bytes(64)), (1, bytes(32)), None, None, 2, True, False)
        for size in (0, 319, 320, 400):
            memory = guarded(size)
            with pytest.raises(ValueError, match="block of"):
                BLOCKS.write_call(memory[:-GUARD], request, 1, None)
            assert bytes(memory[-GUARD:]) == b"\xaa" * GUARD

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.integers(0, 700) | st.integers(0, 2**64 - 1), min_size=40, max_size=40),
        st.booleans(),
        st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
        st.integers(0, 3),
    )
    def test_any_header(self, header: list[int], is_stream: bool, place: tuple[int, int] | None, region: int) -> None:
        header[6] = header[9] = region
        block = memoryview(struct.pack("<40Q", *header) + bytes(200))
        regions = {1: memoryview(bytearray(100)), 2: memoryview(bytearray(700))}
        for read in (
            lambda block: BLOCKS.read_call(block, regions),
            lambda block: BLOCKS.encode_answer(block, is_stream, 1, 2, place),
        ):
            refusal = None
            try:
                read(block)
            except ValueError as error:
                refusal = str(error)
            assert refusal is None or "does not lie in its block" in refusal or "are not mapped here" in refusal

    @pytest.mark.parametrize(
        "request_", [None, (), (1, 2, 3, 4, 5, 6, 7, 8), (1, (1,), None, None, None, 2, True, False), (1.5,) * 8]
    )
    def test_no_request(self, request_: object) -> None:
        with pytest.raises(TypeError):
            BLOCKS.write_call(memoryview(bytearray(4096)), request_, 1, None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("where", [(1, 2), 5, (1, 2, "3"), [1, 2, 3]])
    def test_nowhere(self, where: Any) -> None:
        request = (1, (4, bytes(64)), (1, bytes(32)), None, None, 2, True, False)
        for elsewhere in ((where, None), (None, where)):
            with pytest.raises(TypeError):
                BLOCKS.write_call(guarded(16384), request, 1, None, *elsewhere)

    @pytest.mark.parametrize("regions", [None, [], 5])
    def test_no_regions(self, regions: Any) -> None:
        with pytest.raises(TypeError):
            BLOCKS.read_call(guarded(16384), regions)
