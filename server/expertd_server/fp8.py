"""Conversion to and from float8_e4m3fn: round to nearest even, saturating at +-448."""

from __future__ import annotations

import functools

import torch

__all__ = ["FP8_MAX", "from_fp8", "quantize_fp8", "round_to_fp8", "to_fp8"]

FP8_MAX = 448.0


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Float tensor of any shape to float8_e4m3fn. Beyond +-448, infinities included, saturates; NaN stays NaN."""
    # NOTE: whether torch's own cast saturates or gives NaN above 448 depends on its version, so clamp first.
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """fp8(x * scale): bfloat16, float16 or float32 of any shape to float8_e4m3fn, the product in float32."""
    return to_fp8(x.float() * scale)


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """The value of to_fp8(x) in float32. x: float32 of any shape, contiguous, which is overwritten and returned.

    But for the sign of zeros, which may get lost. Three times as fast on the CPU as the way there and back.
    """
    x = x.clamp_(-FP8_MAX, FP8_MAX)
    # The power of two below |x|, at least that of the smallest normal number 2^-6: times 2^-3 it is the distance of
    # two fp8 values there. A float32 sum with 1.5 * 2^23 distances rounds to whole ones, to even where it is a tie.
    power = torch.bitwise_and(x.view(torch.int32), 0x7F800000).view(torch.float32)
    magic = power.clamp_(min=2.0**-6).mul_(1.5 * 2.0 ** (23 - 3))
    return x.add_(magic).sub_(magic)


def from_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn of any shape to bfloat16, float16 or float32: always exact."""
    if x.device.type != "cpu":
        return x.to(dtype)
    # On the CPU a table of the 256 values is three to seven times as fast as the cast.
    codes = x.contiguous().view(torch.uint8).flatten().long()
    return _values(dtype).index_select(0, codes).view(x.shape)


@functools.cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
