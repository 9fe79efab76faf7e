"""Choosing experts: from logits to global expert ids and bfloat16 weights.

A token's bits must not depend on the tokens beside it. So nothing here lets the shape of the batch choose an order of
summation: sums over experts are a fixed tree of element-wise additions, and the chosen experts come from integer keys
without ties. What remains is element-wise float32 arithmetic, correctly rounded wherever a row lies, and `torch.exp`
(`torch.sigmoid` computes the last elements of a buffer with another exponential than the first).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from expertd_server.types import MAX_NUM_EXPERTS, LayerSpec, RoutingMethod

__all__ = ["route"]

_EXCLUDED = torch.iinfo(torch.int64).min
_EPSILON = 1e-20  # keeps the renormalisation of all-zero sigmoids finite


def route(
    spec: LayerSpec, routing_logits: torch.Tensor, routing_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select top_k experts for each token. T num_tokens, E num_experts, K top_k.

    routing_logits: [T, E] float32 or bfloat16; routing_bias: [E] float32 or bfloat16 for the methods that read one.
    Returns topk_ids [T, K] int32, slots by descending selection score and of equal scores the smaller id first, and
    topk_weights [T, K] bfloat16. NaN counts as the greatest score: a row that holds NaN still gets distinct ids in
    range, and at least one weight of that row is NaN.
    """
    logits = routing_logits.float()
    scores = _scores(spec.routing_method, logits)
    selection = scores if routing_bias is None else scores + routing_bias.float()
    ids = _top_k(_masked_to_best_groups(spec, selection), spec.top_k)
    return ids.to(torch.int32), _weights(spec, logits, scores, ids).to(torch.bfloat16)


def _scores(method: RoutingMethod, logits: torch.Tensor) -> torch.Tensor:
    match method:
        case RoutingMethod.DEFAULT | RoutingMethod.RENORMALIZE_NAIVE:
            return _softmax(logits)
        case RoutingMethod.RENORMALIZE | RoutingMethod.LLAMA4 | RoutingMethod.TOPK:
            return logits
        case _:
            return _sigmoid(logits)


def _weights(spec: LayerSpec, logits: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    chosen = scores.gather(1, ids)
    match spec.routing_method:
        case RoutingMethod.RENORMALIZE:
            return _softmax(chosen)
        case RoutingMethod.LLAMA4:
            return _sigmoid(chosen)
        case RoutingMethod.RENORMALIZE_NAIVE if spec.norm_topk_prob:
            return chosen / _row_sum(chosen)
        case RoutingMethod.SIGMOID_RENORM if spec.norm_topk_prob:
            return chosen / (_row_sum(chosen) + _EPSILON)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            factor = 1.0 if spec.routed_scaling_factor is None else spec.routed_scaling_factor
            return chosen / (_row_sum(chosen) + _EPSILON) * factor
        case _:
            return chosen


def _masked_to_best_groups(spec: LayerSpec, selection: torch.Tensor) -> torch.Tensor:
    """Keys of all experts [T, E] int64, those outside the topk_group best groups below every other."""
    keys = _keys(selection)
    if not spec.is_grouped:
        return keys
    assert spec.n_group is not None
    assert spec.topk_group is not None
    num_tokens, group_size = selection.shape[0], spec.num_experts // spec.n_group
    best_two = selection.view(num_tokens, spec.n_group, group_size).topk(2).values
    kept_groups = _top_k(_keys(best_two[..., 0] + best_two[..., 1]), spec.topk_group)
    is_kept = torch.zeros(num_tokens, spec.n_group, dtype=torch.bool, device=selection.device)
    is_kept.scatter_(1, kept_groups, True)
    return keys.masked_fill(~is_kept.repeat_interleave(group_size, dim=1), _EXCLUDED)


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Distinct int64 for float32 [T, N], N <= MAX_NUM_EXPERTS: ordered by score, then by descending column."""
    # -0.0 + 0.0 is 0.0: zeros tie whatever their sign.
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)  # IEEE bits of negatives run the other way
    columns = torch.arange(scores.shape[1], device=scores.device)
    return ordered * MAX_NUM_EXPERTS + (MAX_NUM_EXPERTS - 1 - columns)


def _top_k(keys: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [T, k] int64 of the k greatest keys, greatest first."""
    return MAX_NUM_EXPERTS - 1 - (keys.topk(k).values & (MAX_NUM_EXPERTS - 1))


def _softmax(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x - x.amax(dim=1, keepdim=True))
    return e / _row_sum(e)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    """[T, N] to [T, 1], as a binary tree of element-wise additions."""
    while x.shape[1] > 1:
        x = functional.pad(x, (0, x.shape[1] % 2))
        left, right = x.chunk(2, dim=1)
        x = left + right
    return x
