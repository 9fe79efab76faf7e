"""What a group does with every token, compiled by numba. Imported by `expertd._fast` alone.

Each function has a counterpart in numpy and gives the same bits, but for the sign of a NaN: no product is ever added to
something, so no compiler can contract the two, and every sum has a fixed order. The signatures are spelt out, so all
compiling is done when this module is imported; what was compiled is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numba
import numpy as np
from numba import types

__all__ = ["MAX_PARTS", "divide_by_row_sums", "rows_of_parts", "select", "sum_parts"]

AnyArray: TypeAlias = "np.ndarray[Any, Any]"
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

MAX_PARTS = 8
"""Parts that `sum_parts` takes at once."""

_SIXTEEN = np.uint32(16)
_ONE = np.uint32(1)
_HALF = np.uint32(0x7FFF)  # of the last place of a bfloat16, less one
_SIGN = np.uint32(0x8000)
_NAN = np.uint32(0x7FC0)
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set: without compiling, numpy is far faster")


def _reads(dtype: Any, num_dimensions: int) -> Any:
    """The type of a contiguous array that is only read, which answers in received bytes are."""
    return types.Array(dtype, num_dimensions, "C", readonly=True)


def _writes(dtype: Any, num_dimensions: int) -> Any:
    return types.Array(dtype, num_dimensions, "C")


def _compiled(*arguments: Any, returns: Any = types.void) -> Callable[[FunctionT], FunctionT]:
    """Compile for these types of arguments; runs without Python's lock."""

    def compiled(function: FunctionT) -> FunctionT:
        signature = returns(*arguments)
        try:
            result: FunctionT = numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no folder to keep it in can be written to
            result = numba.njit(signature, nogil=True)(function)
        return result

    return compiled


@_compiled(_writes(types.float32, 2))
def divide_by_row_sums(rows: AnyArray) -> None:
    """Divide each row of [T, N] by its sum, which is the tree of `expertd.routing`."""
    num_tokens, num_columns = rows.shape
    sums = np.empty(num_columns, np.float32)
    for token in range(num_tokens):
        row = rows[token]
        sums[:] = row
        left = num_columns
        while left > 1:
            half = left // 2
            rest = left - half
            for column in range(half):
                sums[column] += sums[rest + column]
            left = rest
        total = sums[0]
        for column in range(num_columns):
            row[column] /= total


@_compiled(_reads(types.float32, 2), _writes(types.int32, 2))
def select(scores: AnyArray, ids: AnyArray) -> None:
    """The columns of the greatest scores [T, N] into ids [T, K], greatest first, of equals the smaller column first."""
    num_columns, top_k = scores.shape[1], ids.shape[1]
    best = np.empty(top_k, np.float32)
    for token in range(len(scores)):
        row, chosen = scores[token], ids[token]
        num_chosen = 0
        for column in range(num_columns):
            score = row[column]
            if num_chosen < top_k:
                place = num_chosen
                num_chosen += 1
            elif score > best[top_k - 1]:
                place = top_k - 1
            else:
                continue
            while place > 0 and score > best[place - 1]:
                best[place], chosen[place] = best[place - 1], chosen[place - 1]
                place -= 1
            best[place], chosen[place] = score, column


@_compiled(
    _reads(types.int32, 2),
    _reads(types.uint16, 2),
    _reads(types.int16, 2),
    _reads(types.int64, 1),
    types.boolean,
    _writes(types.int64, 2),
    _writes(types.int64, 2),
    _writes(types.int64, 1),
    _writes(types.int32, 2),
    _writes(types.uint16, 2),
    returns=types.int64,
)
def rows_of_parts(  # noqa: PLR0917  names in a call cost a microsecond each
    topk_ids: AnyArray,
    topk_weights: AnyArray,
    slot_owners: AnyArray,
    max_rows: AnyArray,
    broadcast: bool,
    parts: AnyArray,
    runs: AnyArray,
    tokens: AnyArray,
    ids: AnyArray,
    weights: AnyArray,
) -> int:
    """See `expertd._split`: fills parts, runs, tokens, ids and weights, which have room for the most there can be.

    Returns the number of parts. The line of `parts` after theirs tells where rows and runs end.
    """
    num_tokens, top_k = topk_ids.shape
    part = row = run = 0
    for shard in range(len(max_rows)):
        first_row = row  # of the part that is being filled
        for token in range(num_tokens):
            is_needed = broadcast
            for slot in range(top_k):
                is_owned = slot_owners[token, slot] == shard
                is_needed |= is_owned
                ids[row, slot] = topk_ids[token, slot] if is_owned else -1
            if not is_needed:
                continue
            begins_part = row == first_row or row - first_row == max_rows[shard]
            if begins_part:
                first_row = row
                parts[part] = shard, row, run
                part += 1
            if begins_part or tokens[row - 1] != token - 1:
                runs[run] = token, row - first_row, 0
                run += 1
            runs[run - 1, 2] += 1
            weights[row] = topk_weights[token]
            tokens[row] = token
            row += 1
    parts[part] = -1, row, run
    return part


@_compiled(
    _writes(types.uint16, 2),
    types.int64,
    types.UniTuple(_reads(types.int64, 2), MAX_PARTS),
    types.UniTuple(_reads(types.uint16, 2), MAX_PARTS),
)
def sum_parts(out: AnyArray, first: int, runs: tuple[AnyArray, ...], outputs: tuple[AnyArray, ...]) -> None:
    """Sum the tokens first ... first + n - 1 of all parts into out [n, H], in float32 in the order of the parts.

    runs: those of each part, in ascending order. outputs: [rows, H] of each part. All values are the bits of bfloat16.
    """
    hidden_size = out.shape[1]
    total = np.empty(hidden_size, np.float32)
    total_bits = total.view(np.uint32)
    at = np.zeros(MAX_PARTS, np.int64)  # the run of each part that ends after the token
    for index in range(len(out)):
        token = first + index
        total[:] = 0
        for part in range(MAX_PARTS):
            mine = runs[part]
            run = at[part]
            while run < len(mine) and mine[run, 0] + mine[run, 2] <= token:
                run += 1
            at[part] = run
            if run < len(mine) and mine[run, 0] <= token:
                row = outputs[part][mine[run, 1] + token - mine[run, 0]]
                for column in range(hidden_size):
                    total[column] += np.uint32(np.uint32(row[column]) << _SIXTEEN).view(np.float32)
        # NOTE: numba widens integers in every operation: each is cut back, so that the loop fits vector registers.
        for column in range(hidden_size):
            bits = total_bits[column]
            high = np.uint32(bits >> _SIXTEEN)
            to_even = np.uint32(_HALF + np.uint32(high & _ONE))
            rounded = np.uint32(np.uint32(bits + to_even) >> _SIXTEEN)
            is_number = np.uint32(bits & _MAGNITUDE) <= _INFINITY
            out[index, column] = np.uint16(rounded if is_number else np.uint32(np.uint32(high & _SIGN) | _NAN))
