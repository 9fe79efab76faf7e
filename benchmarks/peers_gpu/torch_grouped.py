"""torch._scaled_grouped_mm for both products, plain torch around them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

from .skipped import require_swiglu

__all__ = ["prepare"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def prepare(
    spec: LayerSpec, weights: ExpertWeights
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """See `PeerLayer`."""
    require_swiglu(spec)
    num_local, first_expert = spec.num_local, spec.local_expert_offset
    # Scales go by row of the tokens and by column of the weights: the layer's are the same for all of an expert.
    gate_up_scale = torch.cat(
        [
            weights.output1_scales_scalar[:, None].expand(-1, spec.intermediate_size),
            weights.output1_scales_gate_scalar[:, None].expand(-1, spec.intermediate_size),
        ],
        dim=1,
    ).contiguous()
    down_scale = weights.output2_scales_scalar[:, None].expand(-1, spec.hidden_size).contiguous()
    gate_up, down = weights.gemm1_weights.transpose(1, 2), weights.gemm2_weights.transpose(1, 2)

    def product(rows: torch.Tensor, matrices: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(len(rows), device=rows.device)
        return torch._scaled_grouped_mm(
            rows, matrices, ones, scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        num_tokens, top_k = topk_ids.shape
        local = topk_ids.reshape(-1) - first_expert
        is_held = (local >= 0) & (local < num_local)
        # Slots by expert; those of other servers' experts come last and belong to no group.
        order = torch.where(is_held, local, num_local).sort(stable=True)
        ends = torch.searchsorted(
            order.values, torch.arange(num_local, dtype=local.dtype, device=local.device), right=True
        ).int()
        slots = order.indices
        rows = hidden_states.view(torch.uint8)[slots // top_k].view(FP8)
        up, gate = product(rows, gate_up, gate_up_scale, ends).float().chunk(2, dim=1)
        if spec.use_routing_scales_on_input:
            scale = topk_weights.reshape(-1)[slots, None]
            up, gate = up * scale, gate * scale
        inter = (torch.nn.functional.silu(gate) * up).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        outputs = product(inter, down, down_scale, ends).float()
        if not spec.use_routing_scales_on_input:
            outputs = outputs * topk_weights.reshape(-1)[slots, None]
        # NOTE: what the products leave in the rows of no group may be anything, NaN too.
        outputs = torch.where(is_held[slots, None], outputs, 0.0)
        by_slot = torch.empty_like(outputs).index_copy_(0, slots, outputs)
        return by_slot.view(num_tokens, top_k, -1).sum(1).to(torch.bfloat16)

    return forward
