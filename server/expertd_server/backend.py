"""What every backend offers, and which one serves a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["Backend", "MoEOutput", "PreparedLayer"]


@dataclass(frozen=True)
class MoEOutput:
    """What a layer returns. T num_tokens, K top_k, H hidden_size."""

    topk_ids: torch.Tensor
    """[T, K] int32 global expert ids in slot order (-1: empty slot of pre-routed input)."""
    expert_weights: torch.Tensor
    """[T, K] bfloat16."""
    output: torch.Tensor | None = None
    """[T, H] in the asked dtype; None when do_finalize is False."""
    gemm2_output: torch.Tensor | None = None
    """[P, H] bfloat16, grouped by local expert in ascending id; only when do_finalize is False."""
    expanded_idx_to_permuted_idx: torch.Tensor | None = None
    """[T * K] int32, -1 where the expert is not local; only when do_finalize is False."""


@dataclass(frozen=True)
class PreparedLayer:
    """A layer in the form that its backend computes with. Opaque to everybody else."""

    spec: LayerSpec
    weights: ExpertWeights
    """Scales, bias and, where the backend reads them as they are, the FP8 weights."""
    nbytes: int
    """Bytes that this layer holds on the backend's device, weights included."""
    state: Any = None
    """The backend's own."""


class Backend(Protocol):
    """Runs layers on one device. Calls may come from any thread, one at a time for each backend object."""

    name: str
    """"cpu", "torch" or "cuda", as in GetServerInfo."""
    device: torch.device

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        """Move, convert and plan a layer for calls of up to max_num_tokens tokens (more are cut into chunks).

        Raises ValueError naming hidden_size or intermediate_size and the multiple it needs where it cannot be tiled.
        """
        ...

    def forward(
        self,
        layer: PreparedLayer,
        hidden_states: torch.Tensor,
        *,
        routing_logits: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        do_finalize: bool = True,
        out: torch.Tensor | None = None,
        routing_replay_out: torch.Tensor | None = None,
        num_valid_tokens: torch.Tensor | None = None,
        enable_pdl: bool | None = None,
    ) -> MoEOutput:
        """Run the layer on checked arguments (see `checks.check_forward_args`).

        hidden_states: [T, H] float8_e4m3fn, or bfloat16, float16, float32 where the weights have hidden_states_scale.
        routing_logits: [T, E] float32 or bfloat16; or topk_ids [T, K] int32 with topk_weights [T, K] float32 or
        bfloat16 (rounded to bfloat16 on entry).
        out: [T, H] in output_dtype, written and returned.
        routing_replay_out: int16 [>= T, K], rows [0, T) get the selected ids.
        num_valid_tokens: int32 scalar tensor on the device, at most T; rows at or past it are neither read nor written.
        """
        ...
