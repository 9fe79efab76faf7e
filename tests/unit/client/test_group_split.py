"""Splitting a request over shards and summing what comes back."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from expertd import _combine
from expertd._combine import combine, combine_rows
from expertd._split import NO_SHARD, Part, owners, split
from expertd.tensors import to_wire

pytestmark = pytest.mark.usefixtures("kernels")

E, K, H = 12, 3, 40
SHARDS = [range(5), range(5, 6), range(6, 12)]
BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum 64 tokens at a time, so that requests of a few tokens more take several blocks."""
    monkeypatch.setattr(_combine, "_BLOCK_BYTES", 64 * H * 4)


def bits(array: np.ndarray[Any, Any]) -> bytes:
    return array.tobytes()


def draw(seed: int, num_tokens: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """hidden_states [T, H] bfloat16, topk_ids [T, K] with empty slots, topk_weights [T, K] bfloat16."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((num_tokens, H), np.float32).astype(BFLOAT16)
    ids = random.permuted(np.tile(np.arange(-1, E, dtype=np.int32), (num_tokens, 1)), axis=1)[:, :K]
    return hidden, np.ascontiguousarray(ids), random.random((num_tokens, K), np.float32).astype(BFLOAT16)


def runs_of(*runs: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return np.array(runs)


def parts_of(seed: int, num_tokens: int, max_rows: int = 1000, *, broadcast: bool = False) -> list[Part]:
    hidden, ids, weights = draw(seed, num_tokens)
    wire, _ = to_wire("hidden_states", hidden)
    return split(wire, ids, weights, owners(ids, E, SHARDS), [max_rows] * len(SHARDS), broadcast=broadcast)


def test_owners_names_the_shard_of_every_slot() -> None:
    ids = np.array([[0, 4, 5], [6, 11, -1]], np.int32)
    assert owners(ids, E, SHARDS).tolist() == [[0, 0, 1], [2, 2, NO_SHARD]]
    assert owners(ids, E, SHARDS[1:]).tolist() == [[NO_SHARD, NO_SHARD, 0], [1, 1, NO_SHARD]]


@pytest.mark.parametrize("num_tokens", [1, 7, 130])
def test_every_slot_goes_to_its_owner_and_nowhere_else(num_tokens: int) -> None:
    hidden, ids, weights = draw(num_tokens, num_tokens)
    seen = np.full_like(ids, -1)
    for part in parts_of(num_tokens, num_tokens, max_rows=20):
        case = f"seed {num_tokens}, T {num_tokens}, shard {part.shard}"
        assert 0 < part.num_tokens <= 20, case
        assert part.topk_ids.shape == part.topk_weights.shape == (part.num_tokens, K), case
        assert bits(part.hidden_states.numpy()) == bits(hidden[part.rows]), case
        assert [row for _, row, _ in part.runs] == [0, *itertools.accumulate(n for _, _, n in part.runs)][:-1], case
        assert [token + i for token, _, n in part.runs for i in range(n)] == part.rows.tolist(), case
        assert all(a[0] + a[2] < b[0] for a, b in itertools.pairwise(part.runs)), f"{case}: neighbours in two runs"
        assert bits(part.topk_weights.numpy()) == bits(weights[part.rows]), case
        mine = part.topk_ids.numpy()
        assert (mine >= 0).any(axis=1).all(), f"{case}: a token without any expert of the shard was sent"
        experts = SHARDS[part.shard]
        assert all(expert in experts for expert in mine[mine >= 0].tolist()), case
        assert (seen[part.rows][mine >= 0] == -1).all(), f"{case}: a slot was sent twice"
        seen[part.rows] = np.where(mine >= 0, mine, seen[part.rows])
    assert np.array_equal(seen, ids)


def test_broadcast_sends_all_rows_to_all_shards() -> None:
    hidden, ids, _ = draw(3, 9)
    parts = parts_of(3, 9, broadcast=True)
    assert [part.shard for part in parts] == [0, 1, 2]
    for part in parts:
        assert bits(part.hidden_states.numpy()) == bits(hidden)
        assert np.array_equal(part.topk_ids.numpy() >= 0, owners(ids, E, SHARDS) == part.shard)


def test_empty_slots_and_no_tokens_send_nothing() -> None:
    wire, _ = to_wire("hidden_states", np.zeros((2, H), np.float32))
    ids = np.full((2, K), -1, np.int32)
    assert split(wire, ids, np.zeros((2, K), BFLOAT16), owners(ids, E, SHARDS), [8] * 3) == []
    assert parts_of(0, 0) == []


def test_ids_and_weights_may_lie_at_any_address(odd: Any) -> None:
    hidden, ids, weights = draw(5, 9)
    wire, _ = to_wire("hidden_states", hidden)
    for part, again in zip(
        parts_of(5, 9), split(wire, odd(ids), odd(weights), owners(ids, E, SHARDS), [9] * len(SHARDS)), strict=True
    ):
        assert bits(again.topk_ids.numpy()) == bits(part.topk_ids.numpy())
        assert bits(again.topk_weights.numpy()) == bits(part.topk_weights.numpy())


def outputs_for(parts: list[Part], seed: int, dtype: Any) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(1000 + seed)
    return [random.standard_normal((part.num_tokens, H), np.float32).astype(dtype) for part in parts]


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("partial", [BFLOAT16, np.float32])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32, np.float16])
def test_combine_sums_in_the_order_of_the_parts(num_tokens: int, partial: Any, dtype: Any) -> None:
    parts = parts_of(num_tokens, num_tokens, max_rows=50)
    outputs = outputs_for(parts, num_tokens, partial)
    expected = np.zeros((num_tokens, H), np.float32)
    for part, output in zip(parts, outputs, strict=True):
        for row, values in zip(part.rows, output, strict=True):
            expected[row] += values.astype(np.float32)
    got = combine(num_tokens, H, [(part.runs, out) for part, out in zip(parts, outputs, strict=True)], dtype)
    assert got.dtype == dtype
    assert bits(got) == bits(expected.astype(dtype)), f"seed {num_tokens}, T {num_tokens}"


def test_combine_does_not_depend_on_the_parts_sizes_nor_on_the_tokens_beside() -> None:
    # Batch invariance on the client: cut differently, or with fewer tokens, the bits of a token stay.
    random = np.random.default_rng(7)
    values = random.standard_normal((3, 150, H), np.float32).astype(BFLOAT16)
    whole = combine(150, H, [(runs_of((0, 0, 150)), values[s]) for s in range(3)], BFLOAT16)
    cuts = [0, 1, 70, 150]
    parts = [(runs_of((a, 0, b - a)), values[s, a:b]) for s in range(3) for a, b in itertools.pairwise(cuts)]
    assert bits(combine(150, H, parts, BFLOAT16)) == bits(whole)
    alone = combine(1, H, [(runs_of((0, 0, 1)), values[s, 77:78]) for s in range(3)], BFLOAT16)
    assert bits(alone) == bits(whole[77:78])


def test_a_token_without_parts_is_zero_and_zero_has_one_sign() -> None:
    got = combine(3, 4, [(runs_of((1, 0, 1)), np.full((1, 4), -0.0, BFLOAT16))], BFLOAT16)
    assert not got.view(np.uint16).any()


def test_nan_of_one_row_stays_in_its_row() -> None:
    output = np.ones((3, 4), BFLOAT16)
    output[1] = np.nan
    got = combine(
        5,
        4,
        [(runs_of((0, 0, 1), (2, 1, 1), (4, 2, 1)), output), (runs_of((0, 0, 5)), np.ones((5, 4), BFLOAT16))],
        BFLOAT16,
    )
    assert np.isnan(got.astype(np.float32)).any(axis=1).tolist() == [False, False, True, False, False]


def test_an_overflow_to_float16_is_infinity_without_a_warning() -> None:
    got = combine(1, 2, [(runs_of((0, 0, 1)), np.array([[1e6, 1.0]], np.float32))], np.float16)
    assert got.tolist() == [[np.inf, 1.0]]


def test_combine_rows_groups_by_expert_then_token_without_padding() -> None:
    ids = np.array([[7, 0, -1], [0, 5, 7]], np.int32)
    parts = []
    for part in split(
        to_wire("h", np.zeros((2, H), np.float32))[0],
        ids,
        np.ones(ids.shape, BFLOAT16),
        owners(ids, E, SHARDS),
        [9] * 3,
    ):
        mine = part.topk_ids.numpy().reshape(-1)
        slots = sorted(np.flatnonzero(mine >= 0), key=lambda slot: (mine[slot], slot))
        index = np.full(mine.size, -1, np.int32)
        index[slots] = 2 * np.arange(len(slots))  # every other row is padding
        output = np.full((2 * len(slots), H), 99, BFLOAT16)
        output[index[slots]] = (10 * mine[slots] + part.rows[np.array(slots) // K])[:, None]
        parts.append((part.rows, output, index))
    rows, index = combine_rows(ids, parts, H)
    assert rows[:, 0].astype(int).tolist() == [0, 1, 51, 70, 71]
    assert index.tolist() == [3, 0, -1, 1, 2, 4]


def test_combine_rows_of_nothing() -> None:
    rows, index = combine_rows(np.full((2, K), -1, np.int32), [], H)
    assert rows.shape == (0, H)
    assert index.tolist() == [-1] * (2 * K)
