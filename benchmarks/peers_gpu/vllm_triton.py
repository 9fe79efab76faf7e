"""vLLM's fused_experts: its Triton kernel with the configurations that it ships.

It takes bfloat16 and makes FP8 of it by itself, a pass that the other columns are spared; bfloat16 holds FP8 exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

from .skipped import installed, one_inter_scale, require_swiglu

__all__ = ["prepare"]


def prepare(
    spec: LayerSpec, weights: ExpertWeights
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """See `PeerLayer`."""
    require_swiglu(spec)
    fused_experts = installed("vllm.model_executor.layers.fused_moe").fused_experts
    config = installed("vllm.model_executor.layers.fused_moe.config")
    # Its first half is the gate.
    up, gate = weights.gemm1_weights.view(torch.uint8).chunk(2, dim=1)
    gate_up = torch.cat([gate, up], dim=1).view(weights.gemm1_weights.dtype)
    inter_scale = one_inter_scale(weights).view(1)
    quantization = config.fp8_w8a8_moe_quant_config(
        w1_scale=weights.output1_scales_gate_scalar,
        w2_scale=weights.output2_scales_scalar / inter_scale,
        a1_scale=torch.ones_like(inter_scale),
        a2_scale=inter_scale,
    )
    expert_map = None
    if spec.num_local != spec.num_experts:
        expert_map = torch.full((spec.num_experts,), -1, dtype=torch.int32, device=gate_up.device)
        first = spec.local_expert_offset
        expert_map[first : first + spec.num_local] = torch.arange(spec.num_local, dtype=torch.int32)

    def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = fused_experts(
            hidden_states.to(torch.bfloat16),
            gate_up,
            weights.gemm2_weights,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input=spec.use_routing_scales_on_input,
            global_num_experts=spec.num_experts,
            expert_map=expert_map,
            quant_config=quantization,
        )
        return output

    return forward
