"""Choosing experts on the client: from logits to global expert ids and bfloat16 weights, in numpy.

A group of servers must agree on which experts a token goes to, so the choice is made once, here, and sent along. The
rules are the server's: float32 arithmetic, of equal scores the smaller id wins. A token's bits do not depend on the
tokens beside it: sums over experts are a fixed tree of element-wise additions.

Where something is summed or compared over the experts, the tokens lie side by side in memory: numpy then works on all
of them at once instead of on one short row after the other.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from expertd import _fast
from expertd.errors import InvalidRequestError
from expertd.types import LayerInfo, RoutingMethod

__all__ = ["route"]

_Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
_Keys: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
_Columns: TypeAlias = "np.ndarray[Any, np.dtype[np.intp | np.int32]]"
_Flags: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

_COLUMN_BITS = 10  # the layer has at most 1024 experts
_COLUMN_MASK = (1 << _COLUMN_BITS) - 1
_EXCLUDED = np.iinfo(np.int64).min
_MAX_ROUNDS = 16  # slots up to which one maximum after the other is faster than sorting
_EPSILON = np.float32(1e-20)  # keeps the renormalisation of all-zero sigmoids finite
_ZERO = np.float32(0)
_ONE = np.float32(1)


def route(
    layer: LayerInfo, routing_logits: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, Any]]:
    """Select top_k experts for each token. T num_tokens, E num_experts, K top_k.

    routing_logits: [T, E] float32 or bfloat16. Method, bias and groups are those of `layer`.
    Returns topk_ids [T, K] int32, slots by descending selection score and of equal scores the smaller id first, and
    topk_weights [T, K] bfloat16.
    Raises InvalidRequestError naming the first row that holds NaN, or whose infinities leave no weights.
    """
    expected = (routing_logits.shape[0] if routing_logits.ndim else 0, layer.num_experts)
    if routing_logits.shape != expected:
        raise InvalidRequestError.of(
            "routing_logits.shape", f"is {routing_logits.shape}, layer {layer.name!r} expects [T, {layer.num_experts}]"
        )
    logits: _Floats = routing_logits.astype(np.float32, copy=False)
    _refuse_nan(logits, "holds NaN")
    # Infinite logits overflow on purpose (sigmoid is then 0) or end as NaN weights, which are refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        scores = _scores(layer.routing_method, logits)
        selection = scores if layer.routing_bias is None else scores + layer.routing_bias.astype(np.float32, copy=False)
        ids = _select(layer, selection)
        # The tokens side by side, as sums over the slots want them.
        weights = _weights(layer, scores.T[ids.T, np.arange(len(ids))].T)
    _refuse_nan(weights, "has infinities that leave no finite routing weights")
    return ids.astype(np.int32, order="C"), weights.astype(ml_dtypes.bfloat16, order="C")


def _refuse_nan(rows: _Floats, problem: str) -> None:
    if np.isnan(rows.max(initial=_ZERO)):  # a NaN among them is the maximum
        row = int(np.isnan(rows).any(axis=1).argmax())
        raise InvalidRequestError.of("routing_logits", f"row {row} {problem}; expected numbers")


def _scores(method: RoutingMethod, logits: _Floats) -> _Floats:
    match method:
        case RoutingMethod.DEFAULT | RoutingMethod.RENORMALIZE_NAIVE:
            return _softmax(logits)
        case RoutingMethod.RENORMALIZE | RoutingMethod.LLAMA4 | RoutingMethod.TOPK:
            return logits
        case _:
            return _sigmoid(logits)


def _weights(layer: LayerInfo, chosen: _Floats) -> _Floats:
    """Routing weights [T, K] of the chosen experts from their scores [T, K]."""
    match layer.routing_method:
        case RoutingMethod.RENORMALIZE:
            return _softmax(chosen)
        case RoutingMethod.LLAMA4:
            return _sigmoid(chosen)
        case RoutingMethod.RENORMALIZE_NAIVE if layer.norm_topk_prob:
            return chosen / _row_sum(chosen)
        case RoutingMethod.SIGMOID_RENORM if layer.norm_topk_prob:
            return chosen / (_row_sum(chosen) + _EPSILON)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            factor = 1.0 if layer.routed_scaling_factor is None else layer.routed_scaling_factor
            return chosen / (_row_sum(chosen) + _EPSILON) * np.float32(factor)
        case _:
            return chosen


def _select(layer: LayerInfo, selection: _Floats) -> _Columns:
    """The chosen experts [T, K] by their selection scores [T, E], greatest first."""
    excluded = _outside_best_groups(layer, selection)
    kernels = _fast.kernels()
    if kernels and excluded is None:
        return _top_k_compiled(kernels, selection, layer.top_k)
    if layer.top_k <= _MAX_ROUNDS and selection.min(initial=_ZERO) > -np.inf:
        left = np.array(selection, order="C")
        if excluded is not None:
            left[excluded] = -np.inf
        return _top_k_compiled(kernels, left, layer.top_k) if kernels else _top_k_by_rounds(left, layer.top_k)
    keys = _keys(selection)
    if excluded is not None:
        keys[excluded] = _EXCLUDED
    return _top_k_by_keys(keys, layer.top_k)


def _outside_best_groups(layer: LayerInfo, selection: _Floats) -> _Flags | None:
    """Which experts [T, E] are in none of the topk_group best groups; None: they all count."""
    if layer.routing_method is not RoutingMethod.DEEPSEEK_V3 or layer.n_group <= 1:
        return None
    num_tokens, group_size = selection.shape[0], layer.num_experts // layer.n_group
    left = np.array(selection, order="C").reshape(num_tokens * layer.n_group, group_size)
    two_best = left.max(axis=1)
    _top_k_by_rounds(left, 1)  # takes the best out
    two_best += left.max(axis=1)
    kept = _top_k_by_keys(_keys(two_best.reshape(num_tokens, layer.n_group)), layer.topk_group)
    excluded = np.ones((num_tokens, layer.n_group), dtype=np.bool_)
    np.put_along_axis(excluded, kept, False, axis=1)
    return np.repeat(excluded, group_size, axis=1)


def _top_k_by_rounds(left: _Floats, k: int) -> _Columns:
    """Columns [T, k] of the k greatest of [T, N], greatest first, of equals the smaller column first.

    Takes them out of `left`, which is contiguous, as -inf; at least k of each row must be more than that.
    """
    columns = np.empty((k, left.shape[0]), dtype=np.intp)
    starts, flat = np.arange(0, left.size, left.shape[1]), left.reshape(-1)
    for chosen in columns:
        left.argmax(axis=1, out=chosen)  # the first of equals
        flat[starts + chosen] = -np.inf
    return columns.T


def _top_k_compiled(kernels: ModuleType, scores: _Floats, k: int) -> _Columns:
    """Columns [T, k] of the k greatest of [T, N], greatest first, of equals the smaller column first."""
    columns = np.empty((len(scores), k), dtype=np.int32)
    kernels.select(_fast.aligned(scores), columns)
    return columns


def _keys(scores: _Floats) -> _Keys:
    """Distinct int64 for [T, N] float32: ordered by score, then by descending column."""
    # -0.0 + 0.0 is 0.0: zeros tie whatever their sign.
    bits = np.add(scores, _ZERO, order="C").view(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFF_FFFF)  # IEEE bits of negatives run the other way
    keys: _Keys = ordered.astype(np.int64) << _COLUMN_BITS
    keys |= _COLUMN_MASK - np.arange(scores.shape[1], dtype=np.int64)
    return keys


def _top_k_by_keys(keys: _Keys, k: int) -> _Columns:
    """Columns [T, k] of the k greatest keys, greatest first."""
    ascending = np.sort(np.partition(keys, -k, axis=1)[:, -k:], axis=1)
    columns: _Columns = _COLUMN_MASK - (ascending[:, ::-1] & _COLUMN_MASK)
    return columns


def _softmax(x: _Floats) -> _Floats:
    if kernels := _fast.kernels():
        rows: _Floats = np.subtract(x, x.max(axis=1, keepdims=True), order="C")
        np.exp(rows, out=rows)
        kernels.divide_by_row_sums(rows)
        return rows
    e: _Floats = np.array(x.T, order="C")
    e -= e.max(axis=0)
    np.exp(e, out=e)
    e /= _sum(e)
    return e.T


def _sigmoid(x: _Floats) -> _Floats:
    sigmoid: _Floats = _ONE / (_ONE + np.exp(-x))
    return sigmoid


def _row_sum(x: _Floats) -> _Floats:
    """[T, N] to [T, 1]."""
    return _sum(x.T)[:, None]


def _sum(x: _Floats) -> _Floats:
    """[N, T] to [T], as a binary tree of element-wise additions."""
    while len(x) > 1:
        half, odd = divmod(len(x), 2)
        halves: _Floats = x[:half] + x[half + odd :]
        x = np.concatenate([halves, x[half : half + odd]]) if odd else halves
    total: _Floats = x[0]
    return total
