"""One request for many servers: which tokens go to which slice of the experts, and the sum of what comes back.

A slice gets the rows of those tokens that chose one of its experts, with every foreign slot emptied (id -1). Partial
sums are added up in float32 in ascending order of the slices, so the bits of the whole depend on the request and on the
slices alone: not on which answer came first, nor on which replica gave it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from expertd.tensors import WireTensor
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Part", "combine", "combine_rows", "owners", "split"]

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.intp]]"
AnyArray: TypeAlias = "np.ndarray[Any, Any]"

NO_SHARD = -1
_NO_EXPERT = np.int32(-1)
_BLOCK_BYTES = 1024 * 1024  # of float32 sums made at a time, so that they stay close to the core


@dataclass(frozen=True, slots=True)
class Part:
    """What one slice of the experts has to do for a request. K top_k, H hidden_size."""

    shard: int
    """Index of the slice, in ascending order of its experts."""
    rows: Rows
    """[n] the request's tokens that this part holds, ascending."""
    hidden_states: WireTensor
    """[n, H]."""
    topk_ids: WireTensor
    """[n, K] int32, -1 in slots of other slices."""
    topk_weights: WireTensor
    """[n, K] bfloat16."""

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.rows)


def owners(topk_ids: Ints, num_experts: int, shards: Sequence[range]) -> AnyArray:
    """[T, K] int16: the index of the shard that holds each slot's expert, NO_SHARD for empty slots and gaps.

    topk_ids: [T, K] int32, -1 ... num_experts - 1. shards: disjoint slices of the experts.
    """
    table = np.full(num_experts + 1, NO_SHARD, dtype=np.int16)  # the last entry is what id -1 finds
    for index, experts in enumerate(shards):
        table[experts.start : experts.stop] = index
    return table[topk_ids]


def split(
    hidden_states: WireTensor,
    topk_ids: Ints,
    topk_weights: AnyArray,
    slot_owners: AnyArray,
    max_rows: Sequence[int],
    *,
    broadcast: bool = False,
) -> list[Part]:
    """The parts of a request, in ascending order of shard and then of token. T num_tokens, K top_k.

    hidden_states: [T, H]. topk_ids: [T, K] int32. topk_weights: [T, K] bfloat16. slot_owners: see `owners`.
    max_rows: for each shard, the most tokens in one part. broadcast: every token goes to every shard.
    """
    num_shards, (num_tokens, top_k) = len(max_rows), topk_ids.shape
    is_owned = slot_owners == np.arange(num_shards, dtype=slot_owners.dtype)[:, None, None]
    is_needed = np.ones((num_shards, num_tokens), np.bool_) if broadcast else is_owned.any(axis=2)
    my_ids = np.where(is_owned, topk_ids, _NO_EXPERT).reshape(num_shards * num_tokens, top_k)
    # Rows of all parts one below the other, so that each tensor is gathered once.
    pairs = np.flatnonzero(is_needed)
    bounds = np.cumsum([0, *np.count_nonzero(is_needed, axis=1).tolist()]).tolist()
    tokens = pairs % num_tokens if num_tokens else pairs
    hidden_rows = hidden_states.data.reshape(num_tokens, hidden_states.row_nbytes)
    weight_rows = topk_weights.view(np.uint16)  # plain integers are copied faster than bfloat16
    gathered_ids, gathered_weights = my_ids.take(pairs, axis=0), weight_rows.take(tokens, axis=0)
    parts = []
    for shard, limit in enumerate(max_rows):
        for start in range(bounds[shard], bounds[shard + 1], limit):
            stop = min(start + limit, bounds[shard + 1])
            rows = tokens[start:stop]
            hidden = hidden_states
            if len(rows) < num_tokens:
                hidden = _wire(hidden_states.dtype, hidden_rows.take(rows, axis=0), hidden_states)
            ids = _wire(pb.DATA_TYPE_INT32, gathered_ids[start:stop])
            parts.append(Part(shard, rows, hidden, ids, _wire(pb.DATA_TYPE_BFLOAT16, gathered_weights[start:stop])))
    return parts


def combine(num_tokens: int, hidden_size: int, parts: Sequence[tuple[Rows, AnyArray]], dtype: Any) -> AnyArray:
    """The sum of the parts' outputs: [num_tokens, hidden_size] in `dtype`, rounded once from float32.

    parts: rows [n] ascending and output [n, hidden_size] of each part, in the order in which they are to be summed. The
    sum starts from zero, so a token without any part is all zeros.
    """
    out = np.empty((num_tokens, hidden_size), dtype=dtype)
    block_tokens = max(1, min(num_tokens, _BLOCK_BYTES // (4 * hidden_size)))
    sums, addends = _scratch.arrays(block_tokens, hidden_size)
    with np.errstate(over="ignore"):  # float16: infinity, as everywhere
        for start in range(0, num_tokens, block_tokens):
            stop = min(start + block_tokens, num_tokens)
            total, addend = sums[: stop - start], addends[: stop - start]
            is_empty = True
            for rows, output in parts:
                low, high = rows.searchsorted((start, stop)).tolist()
                if low == high:
                    continue
                target = total if is_empty else addend
                _lay_out(target, rows[low:high] - start, output[low:high])
                np.add(target, 0.0 if is_empty else total, out=total)
                is_empty = False
            if is_empty:
                total.fill(0)
            out[start:stop] = total
    return out


def _lay_out(target: AnyArray, rows: Rows, values: AnyArray) -> None:
    """Write values [n, H] to rows [n] of target [T, H], and zeros to all others."""
    if len(rows) == len(target):
        target[...] = values
        return
    is_absent = np.ones(len(target), dtype=np.bool_)
    is_absent[rows] = False
    target[rows] = values
    target[is_absent] = 0


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


def _wire(dtype: int, rows: AnyArray, like: WireTensor | None = None) -> WireTensor:
    """Contiguous rows as bytes; their columns are those of `like`, where the bytes do not say."""
    columns = rows.shape[1:] if like is None else like.shape[1:]
    return WireTensor(dtype, (rows.shape[0], *columns), rows.reshape(-1).view(np.uint8))
