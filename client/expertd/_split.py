"""One request for many servers: which tokens go to which slice of the experts.

A slice gets the rows of those tokens that chose one of its experts, with every foreign slot emptied (id -1). The rows
are not gathered: they stay where the caller has them until the message is made.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from expertd import _fast
from expertd.tensors import WireRows, WireTensor
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Part", "Runs", "owners", "split"]

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
AnyArray: TypeAlias = "np.ndarray[Any, Any]"
Runs: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
"""[R, 3] neighbouring tokens that are neighbouring rows of a part too, ascending: the first one's row in the request
and in the part, and how many they are."""

NO_SHARD = -1
_NO_EXPERT = np.int32(-1)


@dataclass(frozen=True, slots=True)
class Part:
    """What one slice of the experts has to do for a request. K top_k, H hidden_size."""

    shard: int
    """Index of the slice, in ascending order of its experts."""
    rows: Rows
    """[n] the request's tokens that this part holds, ascending."""
    runs: Runs
    """The same, as runs of neighbours."""
    hidden_states: WireRows
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
    return table.take(topk_ids, mode="wrap")


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
    weights_bits = topk_weights.view(np.uint16)  # plain integers are copied faster than bfloat16
    rows_of = functools.partial(_rows_compiled, kernels) if (kernels := _fast.kernels()) else _rows
    table, runs, tokens, ids, weights = rows_of(topk_ids, weights_bits, slot_owners, max_rows, broadcast=broadcast)
    hidden, row_nbytes = hidden_states.data.data, hidden_states.row_nbytes
    top_k = topk_ids.shape[1]
    id_bytes, weight_bytes = _bytes(ids), _bytes(weights)
    parts = []
    for (shard, row, run), (_, end, end_run) in itertools.pairwise(table):
        part_runs = runs[run:end_run]
        pieces = [hidden[token * row_nbytes : (token + length) * row_nbytes] for token, _, length in part_runs.tolist()]
        parts.append(
            Part(
                shard,
                tokens[row:end],
                part_runs,
                WireRows(hidden_states.dtype, (end - row, *hidden_states.shape[1:]), tuple(pieces)),
                WireTensor(pb.DATA_TYPE_INT32, (end - row, top_k), id_bytes[4 * row * top_k : 4 * end * top_k]),
                WireTensor(pb.DATA_TYPE_BFLOAT16, (end - row, top_k), weight_bytes[2 * row * top_k : 2 * end * top_k]),
            )
        )
    return parts


_PartRows: TypeAlias = tuple[list[list[int]], Runs, Rows, AnyArray, AnyArray]
"""What all parts hold, one below the other: for each part its shard, first row and first run, and a last line where
rows and runs end; the runs; and of each row the token, the ids [K] and the bits of the weights [K]."""


def _rows(
    topk_ids: Ints, topk_weights: AnyArray, slot_owners: AnyArray, max_rows: Sequence[int], *, broadcast: bool
) -> _PartRows:
    """By numpy."""
    num_shards, (num_tokens, top_k) = len(max_rows), topk_ids.shape
    is_owned = slot_owners == np.arange(num_shards, dtype=slot_owners.dtype)[:, None, None]
    is_needed = np.ones((num_shards, num_tokens), np.bool_) if broadcast else is_owned.any(axis=2)
    my_ids = np.where(is_owned, topk_ids, _NO_EXPERT).reshape(num_shards * num_tokens, top_k)
    shards, tokens = is_needed.nonzero()
    num_rows = len(tokens)
    bounds: list[int] = shards.searchsorted(np.arange(num_shards + 1)).tolist()
    first_row = [(s, row) for s, limit in enumerate(max_rows) for row in range(bounds[s], bounds[s + 1], limit)]
    # A run begins with its part, and where a row is not the next token.
    begins_run = np.ones(num_rows, np.bool_)
    np.not_equal(tokens[1:], tokens[:-1] + 1, out=begins_run[1:])
    for _, row in first_row:
        begins_run[row] = True
    begins = begins_run.nonzero()[0]
    runs = np.empty((len(begins), 3), np.int64)
    runs[:, 0] = tokens[begins]
    runs[:-1, 2] = begins[1:] - begins[:-1]
    runs[-1:, 2] = num_rows - begins[-1:]
    first_run: list[int] = begins.searchsorted([row for _, row in first_row]).tolist()
    table = [[shard, row, run] for (shard, row), run in zip(first_row, first_run, strict=True)]
    table.append([NO_SHARD, num_rows, len(runs)])
    for (_, row, run), (_, _, end_run) in itertools.pairwise(table):
        np.subtract(begins[run:end_run], row, out=runs[run:end_run, 1])
    return table, runs, tokens, my_ids.take(shards * num_tokens + tokens, axis=0), topk_weights.take(tokens, axis=0)


def _rows_compiled(
    kernels: ModuleType,
    topk_ids: Ints,
    topk_weights: AnyArray,
    slot_owners: AnyArray,
    max_rows: Sequence[int],
    *,
    broadcast: bool,
) -> _PartRows:
    """The same by the compiled kernel."""
    num_tokens, top_k = topk_ids.shape
    most_rows = len(max_rows) * num_tokens
    most_parts = sum(-(-num_tokens // limit) for limit in max_rows)
    table, runs = np.empty((most_parts + 1, 3), np.int64), np.empty((most_rows, 3), np.int64)
    tokens = np.empty(most_rows, np.int64)
    ids, weights = np.empty((most_rows, top_k), np.int32), np.empty((most_rows, top_k), np.uint16)
    limits = np.array(max_rows, np.int64)
    given = (_fast.aligned(topk_ids), _fast.aligned(topk_weights), slot_owners)
    num_parts = kernels.rows_of_parts(*given, limits, broadcast, table, runs, tokens, ids, weights)
    return table[: num_parts + 1].tolist(), runs, tokens, ids, weights


def _bytes(rows: AnyArray) -> AnyArray:
    """A contiguous array as its bytes."""
    return rows.reshape(-1).view(np.uint8)
