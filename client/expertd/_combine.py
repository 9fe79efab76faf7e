"""What servers answered, as one answer.

Partial sums are added up in float32 in ascending order of the slices, so the bits of the whole depend on the request
and on the slices alone: not on which answer came first, nor on which replica gave it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import ModuleType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from expertd import _fast, _helper
from expertd._split import AnyArray, Ints, Rows, Runs

__all__ = ["combine", "combine_rows"]

Run: TypeAlias = list[int]
"""A line of Runs."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TOKEN = itemgetter(0)  # of a Run
_BLOCK_BYTES = 1024 * 1024  # of float32 sums made at a time, so that they stay close to the core


def combine(num_tokens: int, hidden_size: int, parts: Sequence[tuple[Runs, AnyArray]], dtype: Any) -> AnyArray:
    """The sum of the parts' outputs: [num_tokens, hidden_size] in `dtype`, rounded once from float32.

    parts: runs of tokens, ascending, and output [n, hidden_size] of each part, in the order in which they are to be
    summed. The sum starts from zero, so a token without any part is all zeros.
    """
    out = np.empty((num_tokens, hidden_size), dtype=dtype)
    block_tokens = max(1, min(num_tokens, _BLOCK_BYTES // (4 * hidden_size)))
    kernels = _fast.kernels()
    if (
        kernels
        and len(parts) <= kernels.MAX_PARTS
        and {out.dtype, *(output.dtype for _, output in parts)} == {_BFLOAT16}
    ):
        sum_block = _compiled_sum(kernels, out, block_tokens, parts)
    else:
        sum_block = _numpy_sum(out, block_tokens, [(runs.tolist(), output) for runs, output in parts])
    _helper.share(sum_block, range(0, num_tokens, block_tokens))
    return out


def _compiled_sum(
    kernels: ModuleType, out: AnyArray, block_tokens: int, parts: Sequence[tuple[Runs, AnyArray]]
) -> Callable[[int], None]:
    """What sums the block of tokens that begins with a token into `out`, all of bfloat16."""
    no_part = (np.empty((0, 3), np.int64), np.empty((0, out.shape[1]), np.uint16))
    bits = [(runs, output.view(np.uint16)) for runs, output in parts]
    runs, outputs = zip(*bits, *[no_part] * (kernels.MAX_PARTS - len(parts)), strict=True)
    words = out.view(np.uint16)
    return lambda start: kernels.sum_parts(words[start : start + block_tokens], start, runs, outputs)


def _numpy_sum(
    out: AnyArray, block_tokens: int, parts: Sequence[tuple[Sequence[Run], AnyArray]]
) -> Callable[[int], None]:
    """The same, of any type."""
    hidden_size = out.shape[1]

    def sum_block(start: int) -> None:
        block = out[start : start + block_tokens]
        sums, addends = _scratch.arrays(block_tokens, hidden_size)
        total = sums[: len(block)]
        with np.errstate(over="ignore"):  # infinity, as everywhere
            _sum_block(total, addends, start, parts)
            block[...] = total

    return sum_block


def _sum_block(total: AnyArray, addends: AnyArray, first: int, parts: Sequence[tuple[Sequence[Run], AnyArray]]) -> None:
    """Sum the tokens first ... first + len(total) - 1 of all parts into `total`. addends: scratch of its shape."""
    is_empty = True
    for all_runs, output in parts:
        runs = _within(all_runs, first, first + len(total))
        if not runs:
            continue
        if is_empty:
            _begin(total, first, runs, output)
            is_empty = False
            continue
        start, stop = runs[0][1], runs[-1][1] + runs[-1][2]
        values = addends[: stop - start]
        values[...] = output[start:stop]  # to float32 in one go, then added run by run
        for token, row, length in runs:
            target = total[token - first : token - first + length]
            np.add(target, values[row - start : row - start + length], out=target)
    if is_empty:
        total.fill(0)


def _begin(total: AnyArray, first: int, runs: Sequence[Run], output: AnyArray) -> None:
    """The sum of one part: its rows, and zeros for the tokens between the runs."""
    end = 0
    for token, row, length in runs:
        total[end : token - first] = 0
        end = token - first + length
        total[token - first : end] = output[row : row + length]
    total[end:] = 0
    np.add(total, 0.0, out=total)  # -0.0 becomes 0.0, as in any sum that starts from zero


def _within(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """What of the runs lies within the tokens start ... stop - 1."""
    inside = []
    first = max(0, bisect_right(runs, start, key=_TOKEN) - 1)
    for token, row, length in runs[first : bisect_left(runs, stop, key=_TOKEN)]:
        skipped = max(0, start - token)
        kept = min(length, stop - token) - skipped
        if kept > 0:
            inside.append([token + skipped, row + skipped, kept])
    return inside


class _Scratch(threading.local):
    """Memory of one thread for sums and addends, kept: fresh pages for every call would cost more than the sums."""

    def __init__(self) -> None:
        self._values: AnyArray = np.empty((2, 0), dtype=np.float32)

    def arrays(self, num_tokens: int, hidden_size: int) -> tuple[AnyArray, AnyArray]:
        """Two float32 arrays [num_tokens, hidden_size] with anything in them."""
        size = num_tokens * hidden_size
        if self._values.shape[1] < size:
            self._values = np.empty((2, size), dtype=np.float32)
        sums, addends = self._values[:, :size].reshape(2, num_tokens, hidden_size)
        return sums, addends


_scratch = _Scratch()


def combine_rows(
    topk_ids: Ints, parts: Sequence[tuple[Rows, AnyArray, Ints]], hidden_size: int
) -> tuple[AnyArray, Ints]:
    """gemm2_output [P, H] bfloat16 and expanded_idx_to_permuted_idx [T * K] int32 of the whole request.

    topk_ids: [T, K]. parts: rows [n], gemm2_output [p, H] and expanded_idx_to_permuted_idx [n * K] of each part. The
    rows are grouped by expert in ascending id and then by token, without padding; a slot that no part holds is -1.
    """
    top_k = topk_ids.shape[1]
    found = np.full(topk_ids.shape, -1, dtype=np.int64)  # row in all parts' outputs, one below the other
    first_row = 0
    for rows, output, index in parts:
        mine = index.reshape(len(rows), top_k)
        found[rows] = np.where(mine >= 0, mine + first_row, found[rows])
        first_row += len(output)
    flat, experts = found.reshape(-1), topk_ids.reshape(-1)
    slots = np.flatnonzero(flat >= 0)
    slots = slots[np.argsort(experts[slots], kind="stable")]
    permuted = np.full(flat.size, -1, dtype=np.int32)
    permuted[slots] = np.arange(slots.size, dtype=np.int32)
    if not parts:
        return np.empty((0, hidden_size), dtype=ml_dtypes.bfloat16), permuted
    return np.concatenate([output for _, output, _ in parts])[flat[slots]], permuted
