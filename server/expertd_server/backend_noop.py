"""A backend that computes nothing, to measure what everything around the computation costs.

Its answers are zeros: of use to `benchmarks/bench_service.py` and to nobody else, so `auto` never chooses it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["NoopBackend"]

log = logging.getLogger(__name__)


class NoopBackend:
    """Takes what every backend takes and answers with zeros of the right shapes; every slot is empty (-1)."""

    name = "noop"
    device = torch.device("cpu")

    def __init__(self) -> None:
        log.warning("backend 'noop' computes nothing: every answer is zeros; for benchmarks only")

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        """Keep scales and bias, drop the weights."""
        nothing = torch.empty(0, dtype=torch.float8_e4m3fn)
        kept = dataclasses.replace(weights, gemm1_weights=nothing, gemm2_weights=nothing)
        return PreparedLayer(spec, kept, kept.nbytes, _Answers.of(spec, max_num_tokens))

    def tune(self, layer: PreparedLayer, tune_max_num_tokens: int = 8192) -> dict[int, str]:
        """There is nothing to choose."""
        return {}

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
        """See `Backend.forward`, but out and routing_replay_out are left as they are."""
        answers: _Answers = layer.state
        answer = answers.part(hidden_states.shape[0], output_dtype, do_finalize)
        return answer if out is None else dataclasses.replace(answer, output=out)


@dataclass(frozen=True)
class _Answers:
    """What every answer is a part of; made once, so that a call costs nothing."""

    hidden_size: int
    zeros: torch.Tensor
    topk_ids: torch.Tensor
    expert_weights: torch.Tensor

    @classmethod
    def of(cls, spec: LayerSpec, max_num_tokens: int) -> _Answers:
        return cls(
            hidden_size=spec.hidden_size,
            zeros=torch.zeros(max_num_tokens * spec.hidden_size * 4, dtype=torch.uint8),
            topk_ids=torch.full((max_num_tokens, spec.top_k), -1, dtype=torch.int32),
            expert_weights=torch.zeros(max_num_tokens, spec.top_k, dtype=torch.bfloat16),
        )

    @functools.cached_property
    def part(self) -> Callable[[int, torch.dtype, bool], MoEOutput]:
        """The answer to num_tokens in output_dtype, summed (do_finalize) or not."""
        return functools.lru_cache(maxsize=256)(self._part)

    def _part(self, num_tokens: int, output_dtype: torch.dtype, do_finalize: bool) -> MoEOutput:
        ids, expert_weights = self.topk_ids[:num_tokens], self.expert_weights[:num_tokens]
        size = num_tokens * self.hidden_size
        if do_finalize:
            output = self.zeros.view(output_dtype)[:size].view(num_tokens, self.hidden_size)
            return MoEOutput(ids, expert_weights, output=output)
        return MoEOutput(
            ids,
            expert_weights,
            gemm2_output=torch.empty(0, self.hidden_size, dtype=torch.bfloat16),
            expanded_idx_to_permuted_idx=ids.reshape(-1),
        )
