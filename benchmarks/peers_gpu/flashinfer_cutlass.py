"""FlashInfer's CUTLASS fused MoE for FP8 with per-tensor scales, tuned for the layer on its first call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

from .skipped import PeerSkippedError, installed, one_inter_scale, require_swiglu

__all__ = ["prepare"]


def prepare(
    spec: LayerSpec, weights: ExpertWeights
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """See `PeerLayer`."""
    require_swiglu(spec)
    if spec.use_routing_scales_on_input:
        raise PeerSkippedError("the layer scales the input by the routing weight, which this peer cannot")
    slices, rest = divmod(spec.num_experts, spec.num_local)
    if rest or spec.local_expert_offset % spec.num_local:
        raise PeerSkippedError(
            f"experts {spec.local_expert_offset} to {spec.local_expert_offset + spec.num_local - 1} of "
            f"{spec.num_experts} are not one of equal slices, which is what this peer takes"
        )
    fused_moe = installed("flashinfer.fused_moe").cutlass_fused_moe
    autotune = installed("flashinfer.autotuner").autotune
    inter_scale = one_inter_scale(weights)
    scales = [
        weights.output1_scales_gate_scalar,
        1 / inter_scale,
        weights.output2_scales_scalar,
        torch.ones_like(inter_scale),
    ]
    tuned: set[int] = set()

    def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        num_tokens = len(hidden_states)
        output = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
        with autotune(num_tokens not in tuned):
            fused_moe(
                hidden_states,
                topk_ids,
                topk_weights,
                weights.gemm1_weights,
                weights.gemm2_weights,
                torch.bfloat16,
                quant_scales=scales,
                output=output,
                ep_size=slices,
                ep_rank=spec.local_expert_offset // spec.num_local,
            )
        tuned.add(num_tokens)
        return output

    return forward
