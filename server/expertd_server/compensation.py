"""Rounding the weights of a layer to FP8 where the tokens that it sees feel it least.

To round each weight to the nearest value is the best that can be done without knowing the inputs. With real tokens at
hand more is possible: round the weights of a row one after the other, and let those that are left make up for the
error so far, as far as the tokens cannot tell the difference (the method known as GPTQ or optimal brain quantisation).

Each expert is rounded by itself, so a slice of a layer holds what the whole layer holds for its experts. But the
roundings follow from floating-point sums: two kinds of CPU may round a few weights in a billion differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expertd_server.calibration import InputScales, Tokens, activate
from expertd_server.fp8 import from_fp8, quantize_fp8, to_fp8
from expertd_server.types import Activation, LayerSpec

__all__ = ["LayerInputs", "compensation_factor", "round_compensated"]

_BLOCK_COLUMNS = 64
_DAMPING = 0.01
"""Of the mean square of an input, added to each: directions that no token took are not free to use."""


@dataclass(frozen=True)
class LayerInputs:
    """What the two products of a layer's experts take in when given tokens pass through, all of it FP8 values."""

    activation: Activation
    hidden_states: torch.Tensor
    """[T, H] float32."""
    topk_ids: torch.Tensor
    """[T, K] global expert ids."""
    gemm1_factor: torch.Tensor | None
    """For the weights of the first product, see `compensation_factor`: one for all experts of the layer."""
    gemm2_input_scales: tuple[float, ...]
    """Of every global expert."""

    @classmethod
    def of(cls, spec: LayerSpec, tokens: Tokens, inputs: InputScales) -> LayerInputs:
        """tokens: hidden_states [T, H] floating point and topk_ids [T, K]; inputs: the layer's input scales."""
        hidden_states, topk_ids = tokens
        x = _rounded(hidden_states, inputs.gemm1)
        return cls(
            activation=spec.activation,
            hidden_states=x,
            topk_ids=topk_ids,
            gemm1_factor=compensation_factor(x.T @ x / len(x)),
            gemm2_input_scales=inputs.of_experts(spec.num_experts),
        )

    def gemm2_factor(self, expert: int, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor | None:
        """For the weights of an expert's second product, from the tokens that chose it.

        gate [I, H] (None where not gated), up [I, H]: real values of the weights as they were rounded.
        """
        x = self.hidden_states[(self.topk_ids == expert).any(dim=1)]
        inter = activate(self.activation, None if gate is None else x @ gate.T, x @ up.T)
        inter = _rounded(inter, self.gemm2_input_scales[expert])
        return compensation_factor(inter.T @ inter / max(1, len(inter)))


def compensation_factor(second_moment: torch.Tensor) -> torch.Tensor | None:
    """How rounding errors are made up for, for inputs of a kind.

    second_moment: [K, K], the mean of x x^T over inputs x. Returns [K, K] float32, upper triangular: row k over its
    diagonal is how the weights from k on make up for an error of 1 in weight k. None where all inputs are zeros.
    """
    mean_square = second_moment.diagonal().double().mean()
    if not mean_square > 0:
        return None
    damped = second_moment.double() + _DAMPING * mean_square * torch.eye(len(second_moment), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def round_compensated(weight: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """weight [M, K] to float8_e4m3fn so that products with inputs like those of the factor change little.

    factor: see `compensation_factor`; None: every weight is rounded to the nearest value.
    """
    if factor is None:
        return to_fp8(weight.float())
    rest = weight.float().t().clone(memory_format=torch.contiguous_format)  # [K, M]
    rounded = torch.empty(rest.shape, dtype=torch.float8_e4m3fn)
    for start in range(0, len(rest), _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, len(rest))
        block, errors = rest[start:stop], torch.empty(stop - start, rest.shape[1])
        for k in range(stop - start):
            own = factor[start + k, start:stop]
            rounded[start + k] = to_fp8(block[k])
            errors[k] = (block[k] - rounded[start + k].float()) / own[k]
            block[k + 1 :].addr_(own[k + 1 :], errors[k], alpha=-1.0)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    return rounded.t().contiguous()


def _rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    return from_fp8(quantize_fp8(x, 1.0 / scale), torch.float32) * scale
