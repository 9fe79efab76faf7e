"""A request for a layer's output and its answer, as everything between the wire and the batch knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertd_server.layer import MoELayer
from expertd_server.native import Copies
from expertd_server.timing import ForwardTiming

__all__ = ["ForwardCall", "ForwardResult", "HostTensor"]


@dataclass(slots=True)  # not frozen, which makes making one take three times as long; likewise below
class HostTensor:
    """Somebody else's bytes as a tensor: dense, row-major, little-endian, read-only."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | memoryview

    def copy_to(self, destination: torch.Tensor) -> None:
        """Write the elements into a contiguous host tensor of the same dtype and shape."""
        np.copyto(destination.reshape(-1).view(torch.uint8).numpy(), np.frombuffer(self.data, np.uint8))

    def to_tensor(self) -> torch.Tensor:
        """A torch tensor of its own memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(tensor)
        return tensor


@dataclass(slots=True)
class ForwardCall:
    """One checked request. T num_tokens, H hidden_size, E num_experts, K top_k."""

    layer: MoELayer
    hidden_states: HostTensor
    """[T, H] float8_e4m3fn, or bfloat16, float16, float32 where the layer has a hidden_states_scale."""
    routing_logits: HostTensor | None = None
    """[T, E] float32 or bfloat16; or topk_ids and topk_weights."""
    topk_ids: HostTensor | None = None
    """[T, K] int32."""
    topk_weights: HostTensor | None = None
    """[T, K] float32 or bfloat16."""
    output_dtype: torch.dtype = torch.bfloat16
    do_finalize: bool = True
    return_routing: bool = False
    encode: Callable[[ForwardResult], Any] | None = None
    """What to make of the answer where it lies, in whichever thread finishes the batch. The promise is then kept with
    what this returns, when the copies that this noted are done; the tensors it is given are valid until then. None:
    with the ForwardResult."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]


@dataclass(slots=True)
class ForwardResult:
    """The answer to one call, in host memory of its own, but see `ForwardCall.encode`; the tensors that were not asked
    for are None."""

    weights_version: int
    timing: ForwardTiming
    output: torch.Tensor | None = None
    """[T, H] in the asked dtype."""
    gemm2_output: torch.Tensor | None = None
    """[P, H] bfloat16: the rows of this request alone, by local expert, then by slot; no padding."""
    expert_weights: torch.Tensor | None = None
    """[T, K] bfloat16."""
    topk_ids: torch.Tensor | None = None
    """[T, K] int32."""
    expanded_idx_to_permuted_idx: torch.Tensor | None = None
    """[T * K] int32."""
    copies: Copies | None = None
    """Where `ForwardCall.encode` notes what is to be copied out of these tensors; None: it copies at once."""
