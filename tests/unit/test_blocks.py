"""Requests and answers in blocks of shared memory: what goes in comes out, and the compiled module writes the same."""

from __future__ import annotations

import random
import struct

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
from expertd_server.remote_codec import RemoteAnswer
from expertd_server.result_blocks import write_result
from expertd_server.ring import ALIGNMENT_BYTES, PythonArena
from expertd_server.wire import TORCH_DTYPES, answer_tensors, encode_response, encode_stream_response
from expertd_server.wire_answer import AnswerTensor
from expertd_server.wire_check import ITEM_BYTES, CheckedRequest

HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 64, 8, 2
GUARD = 64
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


def largest_answer(request: CheckedRequest, seed: int) -> ForwardResult:
    """An answer to it that takes as much room as one may."""
    num_tokens, *_, output, do_finalize, _return_routing = request
    chance = np.random.default_rng(seed)

    def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if not size:  # torch gives no other type to what is empty
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(chance.integers(0, 256, size * dtype.itemsize, np.uint8)).view(dtype).view(shape)

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


@settings(max_examples=100, deadline=None)
@given(checked_requests(), deadlines, st.integers(0, 2**32 - 1))
def test_what_goes_in_comes_out(request_: CheckedRequest, deadline_s: float | None, seed: int) -> None:
    size = blocks.block_bytes(request_, HIDDEN_SIZE, TOP_K)
    memory = guarded(size)
    block = memory[:-GUARD]
    blocks.write_call(block, request_, 2**63, deadline_s)
    assert blocks.read_call(block) == (2**63, deadline_s, request_)
    answer = largest_answer(request_, seed)
    write_answer(block, answer_tensors(answer), TIMING, 2**40, 12345)
    assert read_timing(block) == (TIMING, 2**40, 12345)
    assert [plain(tensor) for tensor in read_answer(block)] == [plain(tensor) for tensor in answer_tensors(answer)]
    assert bytes(memory[-GUARD:]) == b"\xaa" * GUARD, "beyond the block"
    assert size >= MAX_ERROR_BYTES


@needs_compiled
@settings(max_examples=200, deadline=None)
@given(checked_requests(), deadlines, st.integers(0, 2**64 - 1))
def test_the_compiled_module_writes_the_same_requests(
    request_: CheckedRequest, deadline_s: float | None, layer_id: int
) -> None:
    size = blocks._block_bytes(request_, HIDDEN_SIZE, TOP_K)
    assert BLOCKS.block_bytes(request_, HIDDEN_SIZE, TOP_K) == size
    mine, theirs = guarded(size), guarded(size)
    BLOCKS.write_call(mine[:-GUARD], request_, layer_id, deadline_s)
    blocks._write_call(theirs[:-GUARD], request_, layer_id, deadline_s)
    assert bytes(mine) == bytes(theirs)
    assert BLOCKS.read_call(mine) == blocks._read_call(mine) == (layer_id, deadline_s, request_)


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
    @given(st.lists(st.integers(0, 700) | st.integers(0, 2**64 - 1), min_size=40, max_size=40), st.booleans())
    def test_any_header(self, header: list[int], is_stream: bool) -> None:
        block = memoryview(struct.pack("<40Q", *header) + bytes(200))
        for read in (BLOCKS.read_call, lambda block: BLOCKS.encode_answer(block, is_stream, 1, 2)):
            refusal = None
            try:
                read(block)
            except ValueError as error:
                refusal = str(error)
            assert refusal is None or "does not lie in its block" in refusal

    @pytest.mark.parametrize(
        "request_", [None, (), (1, 2, 3, 4, 5, 6, 7, 8), (1, (1,), None, None, None, 2, True, False), (1.5,) * 8]
    )
    def test_no_request(self, request_: object) -> None:
        with pytest.raises(TypeError):
            BLOCKS.write_call(memoryview(bytearray(4096)), request_, 1, None)  # type: ignore[arg-type]
