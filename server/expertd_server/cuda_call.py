"""The tensors of one call of the CUDA backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """The tensors of one call, or of a chunk of it."""

    hidden_states: torch.Tensor
    logits: torch.Tensor | None
    in_ids: torch.Tensor | None
    in_weights: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    replay: torch.Tensor | None
    num_valid: torch.Tensor | None
    pdl: bool
    stream: int

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    def chunks(self, out: torch.Tensor, max_num_tokens: int) -> Iterator[tuple[Call, torch.Tensor]]:
        """Parts of at most max_num_tokens tokens. Rows do not depend on one another, so this cannot change bits."""
        if self.num_tokens <= max_num_tokens:
            if self.num_tokens:
                yield self, out
            return
        for start in range(0, self.num_tokens, max_num_tokens):
            part = slice(start, min(start + max_num_tokens, self.num_tokens))
            yield (
                Call(
                    hidden_states=self.hidden_states[part],
                    logits=None if self.logits is None else self.logits[part],
                    in_ids=None if self.in_ids is None else self.in_ids[part],
                    in_weights=None if self.in_weights is None else self.in_weights[part],
                    topk_ids=self.topk_ids[part],
                    topk_weights=self.topk_weights[part],
                    replay=None if self.replay is None else self.replay[part],
                    num_valid=None if self.num_valid is None else self.num_valid - start,
                    pdl=self.pdl,
                    stream=self.stream,
                ),
                out[part],
            )
