"""What the engine answers, written into blocks of shared memory: `blocks` in torch's terms."""

from __future__ import annotations

from expertd_server.blocks import write_answer
from expertd_server.compiled import BLOCKS, CODEC
from expertd_server.engine import ForwardResult
from expertd_server.wire import WIRE_DTYPES, answer_tensors

__all__ = ["write_result"]


def write_result(block: memoryview, result: ForwardResult, queue_tokens: int, place: memoryview | None = None) -> None:
    """Write a result over its request; its tensors at once, or when `result.copies` run.

    place: where its output goes, instead of the block. Raises ValueError when there is no room for it.
    """
    timing, version = result.timing, result.weights_version
    matrix = result.matrix
    if BLOCKS is None or CODEC is None or matrix is None:
        write_answer(block, answer_tensors(result), timing, version, queue_tokens, place)
        return
    dtype, num_tokens, hidden_size, address = matrix
    at = BLOCKS.write_matrix_head(
        block,
        WIRE_DTYPES[dtype],
        num_tokens,
        hidden_size,
        *timing.numbers,
        version,
        queue_tokens,
        place is not None,
    )
    copies = result.copies or CODEC.Copies()
    copies.add_memory(block if place is None else place, at, address, num_tokens * hidden_size * dtype.itemsize)
    if result.copies is None:
        copies.run()
