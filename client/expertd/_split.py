"""One request for many servers: which tokens go to which slice of the experts.

A slice gets the rows of those tokens that chose one of its experts, with every foreign slot emptied (id -1). The rows
are not gathered: they stay where the caller has them until the message is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from expertd.tensors import WireRows, WireTensor
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Part", "Run", "owners", "split"]

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.intp]]"
AnyArray: TypeAlias = "np.ndarray[Any, Any]"
Run: TypeAlias = tuple[int, int, int]
"""Neighbouring tokens that are neighbouring rows of a part too: the first one's row in the request and in the part, and
how many they are."""

NO_SHARD = -1
_NO_EXPERT = np.int32(-1)


@dataclass(frozen=True, slots=True)
class Part:
    """What one slice of the experts has to do for a request. K top_k, H hidden_size."""

    shard: int
    """Index of the slice, in ascending order of its experts."""
    rows: Rows
    """[n] the request's tokens that this part holds, ascending."""
    runs: Sequence[Run]
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
    num_shards, (num_tokens, top_k) = len(max_rows), topk_ids.shape
    is_owned = slot_owners == np.arange(num_shards, dtype=slot_owners.dtype)[:, None, None]
    is_needed = np.ones((num_shards, num_tokens), np.bool_) if broadcast else is_owned.any(axis=2)
    my_ids = np.where(is_owned, topk_ids, _NO_EXPERT).reshape(num_shards * num_tokens, top_k)
    # Rows of all parts one below the other, so that ids and weights are gathered once.
    shards, tokens = is_needed.nonzero()
    bounds: list[int] = shards.searchsorted(np.arange(num_shards + 1)).tolist()
    ids = my_ids.take(shards * num_tokens + tokens, axis=0)
    weights = topk_weights.view(np.uint16).take(tokens, axis=0)  # plain integers are copied faster than bfloat16
    # A run ends where the next row is not the next token. One that goes on into the next shard is cut below.
    run_starts = np.flatnonzero(np.append(True, tokens[1:] != tokens[:-1] + 1))[: len(tokens)]
    first_tokens: list[int] = tokens[run_starts].tolist()
    run_bounds: list[int] = [*run_starts.tolist(), len(tokens)]
    run = 0
    hidden, row_nbytes = hidden_states.data.data, hidden_states.row_nbytes
    parts = []
    for shard, limit in enumerate(max_rows):
        for start in range(bounds[shard], bounds[shard + 1], limit):
            row, stop = start, min(start + limit, bounds[shard + 1])
            runs, pieces = [], []
            while row < stop:
                end = min(run_bounds[run + 1], stop)
                token = first_tokens[run] + row - run_bounds[run]
                runs.append((token, row - start, end - row))
                pieces.append(hidden[token * row_nbytes : (token + end - row) * row_nbytes])
                run += end == run_bounds[run + 1]
                row = end
            parts.append(
                Part(
                    shard,
                    tokens[start:stop],
                    runs,
                    WireRows(hidden_states.dtype, (stop - start, *hidden_states.shape[1:]), tuple(pieces)),
                    _wire(pb.DATA_TYPE_INT32, ids[start:stop]),
                    _wire(pb.DATA_TYPE_BFLOAT16, weights[start:stop]),
                )
            )
    return parts


def _wire(dtype: int, rows: AnyArray) -> WireTensor:
    """Contiguous rows as bytes."""
    return WireTensor(dtype, rows.shape, rows.reshape(-1).view(np.uint8))
