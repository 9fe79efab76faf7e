"""The weights and scales of one layer, as the operator takes them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from expertd_server.types import LayerSpec

__all__ = ["ExpertWeights", "pad_intermediate"]

_SAMPLE_BYTES = 4096  # of each expert's weights, in a fingerprint


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of the local experts of one layer. L local_num_experts, M gemm1_rows, H hidden_size, I intermediate_size.

    Weight rows are K-major and plain (not shuffled). Of a gated layer, rows 0 ... I-1 of gemm1_weights are the linear
    ("up") half and rows I ... 2I-1 the gate half.
    """

    gemm1_weights: torch.Tensor
    """[L, M, H] float8_e4m3fn."""
    output1_scales_scalar: torch.Tensor
    """[L] float32."""
    output1_scales_gate_scalar: torch.Tensor
    """[L] float32."""
    gemm2_weights: torch.Tensor
    """[L, H, I] float8_e4m3fn."""
    output2_scales_scalar: torch.Tensor
    """[L] float32."""
    routing_bias: torch.Tensor | None = None
    """[E] float32 or bfloat16, for routing methods 2 and 7."""
    hidden_states_scale: float | None = None
    """Hidden states that are not FP8 yet are quantised as fp8(x * hidden_states_scale); None: they are refused."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.gemm1_weights.device

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **moved)

    def fingerprint(self) -> int:
        """64 bits, never 0, that differ where weights do, but for a chance of 2**-64 and changes of few bytes.

        Of the shapes, all scales, the bias, and some bytes from all over the weights of each expert.
        """
        digest = hashlib.blake2b(repr(self.hidden_states_scale).encode(), digest_size=8)
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            rows = tensor.view(torch.uint8).reshape(tensor.shape[0], -1)
            # Odd, so that it meets every column of a matrix whose rows are a power of two.
            stride = rows.shape[1] // _SAMPLE_BYTES | 1
            digest.update(rows[:, ::stride].cpu().numpy().tobytes())
        return int.from_bytes(digest.digest(), "little") or 1

    def check(self, spec: LayerSpec) -> None:
        """Raise TypeError or ValueError, naming the tensor, unless every tensor is what `spec` needs."""
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "gemm1_weights": ((spec.num_local, spec.gemm1_rows, spec.hidden_size), (torch.float8_e4m3fn,)),
            "output1_scales_scalar": ((spec.num_local,), (torch.float32,)),
            "output1_scales_gate_scalar": ((spec.num_local,), (torch.float32,)),
            "gemm2_weights": ((spec.num_local, spec.hidden_size, spec.intermediate_size), (torch.float8_e4m3fn,)),
            "output2_scales_scalar": ((spec.num_local,), (torch.float32,)),
            "routing_bias": ((spec.num_experts,), (torch.float32, torch.bfloat16)),
        }
        for name, tensor in self._tensors().items():
            shape, dtypes = expected[name]
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, expected {self.device} as gemm1_weights")
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
            if tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).nonzero()[0])
                raise ValueError(f"{name}[{bad}] is {float(tensor[bad])}, expected a finite number")
        if self.routing_bias is not None and not spec.routing_method.reads_bias:
            raise ValueError(
                f"routing_bias is given, but routing method {spec.routing_method.value} ({spec.routing_method.name}) "
                f"does not read one; pass None"
            )
        scale = self.hidden_states_scale
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"hidden_states_scale is {scale}, expected a positive finite number")

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def pad_intermediate(spec: LayerSpec, weights: ExpertWeights, multiple: int) -> tuple[LayerSpec, ExpertWeights]:
    """The same layer with its intermediate_size filled up to a multiple by zeros; as it is where it is one already.

    Outputs keep their bits: every activation is 0 at 0, and a sum does not change when zeros are added to its end.
    """
    size = spec.intermediate_size
    padded = dataclasses.replace(spec, intermediate_size=size + -size % multiple)
    if padded == spec:
        return spec, weights
    gemm1_weights = weights.gemm1_weights.new_zeros(spec.num_local, padded.gemm1_rows, spec.hidden_size)
    halves = padded.gemm1_rows // padded.intermediate_size  # of a gated layer each half is padded at its own end
    gemm1_weights.view(spec.num_local, halves, -1, spec.hidden_size)[:, :, :size] = weights.gemm1_weights.view(
        spec.num_local, halves, size, spec.hidden_size
    )
    gemm2_weights = weights.gemm2_weights.new_zeros(spec.num_local, spec.hidden_size, padded.intermediate_size)
    gemm2_weights[:, :, :size] = weights.gemm2_weights
    return padded, dataclasses.replace(weights, gemm1_weights=gemm1_weights, gemm2_weights=gemm2_weights)
