"""An expert's two matrix products in plain torch, and what may change the bits of their rows.

For CUDA devices without kernels of their own, and on CPUs where the experts do not run in compiled code.

A row's bits may not depend on the rows beside it. Matrix products are the one place where a library could break that,
by summing in another order for another number of rows. So the products are probed once for each size: only numbers of
rows that were tried and gave the same bits are used, and a caller with another number of rows adds some.
"""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from expertd_server.fp8 import from_fp8
from expertd_server.workers import run_all

__all__ = ["MAX_ROWS", "ON_CUDA", "Expert", "Freedom", "pack", "probe"]

_log = logging.getLogger(__name__)
MAX_ROWS = 256
"""Most rows of one product."""
_PROBE_ROWS = (
    *range(1, 13), *range(14, 19), 21, 24, 27, 30, 31, 32, 33, 36, 42, 48, 54, 60, 63, 64, 65, 72, 84, 96, 108, 120,
    127, 128, 144, 156, 168, 180, 192, 216, 240, 255, MAX_ROWS,
)  # fmt: skip
"""Libraries work through rows in groups of 4, 6, 8, 16 or 32 and treat a remainder in their own ways."""
_BLOCK_ROWS = 32  # divides MAX_ROWS
_K_MULTIPLE = 32


class Expert(Protocol):
    """One expert's two products, in a form ready to multiply with."""

    nbytes: int

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, H] float32 holding fp8 values, to a new [rows, M] float32."""
        ...

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        """inter [rows, I] float32 holding fp8 values, to scale * product [rows, H].

        In float32, or in bfloat16 rounded once.
        """
        ...


class SplitExpert:
    """Both products on the CPU's bfloat16 matrix unit: a fallback, where `cpu_experts` was not built.

    fp8 values are exact in bfloat16 and sums are kept in float32, but torch rounds what it returns to bfloat16: too
    coarse for the input of the activation. So a second pass of the first product returns what the first pass rounded
    away. With weights in oneDNN's own order the two passes take as long as one with weights in rows.
    """

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        rows = _padded(from_fp8(gemm1_weights, torch.bfloat16))
        self._gemm1_weights = torch.ops.mkldnn._reorder_linear_weight(rows, _BLOCK_ROWS)
        self._gemm2_weights = _padded(from_fp8(gemm2_weights, torch.bfloat16)).t()
        self.nbytes = 2 * (rows.numel() + self._gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        x = _padded(x.bfloat16())
        high: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._gemm1_weights, None, "none", [], "")
        low = torch.ops.mkldnn._linear_pointwise.binary(x, high, self._gemm1_weights, None, "sub")
        return high.float().add_(low)

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return _scaled_mm(_padded(inter.bfloat16()), self._gemm2_weights, scale)


class HalfExpert:
    """Both products with float32 activations and float16 weights on the CPU's vector unit.

    They read two bytes a weight, as bfloat16 would, and return float32 in one pass.
    """

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        self._gemm1_weights = _prepacked(gemm1_weights)
        self._gemm2_weights = _prepacked(gemm2_weights)
        self.nbytes = 2 * (gemm1_weights.numel() + gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._gemm1_weights)
        return a

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        g: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(inter, self._gemm2_weights)
        return g.mul_(scale)


class MixedExpert:
    """The first product as in HalfExpert, the second with the vector unit's bfloat16 instructions, which are faster.

    A fallback: where `cpu_experts` was not built, or the CPU has no AVX-512 VBMI, as the first with these instructions.
    """

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        self._gemm1_weights = _prepacked(gemm1_weights)
        self._gemm2_weights = _padded(from_fp8(gemm2_weights, torch.bfloat16)).t()
        self.nbytes = 2 * (gemm1_weights.numel() + self._gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._gemm1_weights)
        return a

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return _scaled_mm(_padded(inter.bfloat16()), self._gemm2_weights, scale)


class FloatExpert:
    """Both products in float32, four bytes a weight: for CPUs that torch has none of the above for."""

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        self._gemm1_weights = from_fp8(gemm1_weights, torch.float32).t()
        self._gemm2_weights = from_fp8(gemm2_weights, torch.float32).t()
        self.nbytes = 4 * (gemm1_weights.numel() + gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self._gemm1_weights)

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.mm(inter, self._gemm2_weights).mul_(scale)


class _CudaExpert:
    """Both products in bfloat16 with float32 results, which torch has on CUDA devices only."""

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        self._gemm1_weights = gemm1_weights.bfloat16().t()
        self._gemm2_weights = gemm2_weights.bfloat16().t()
        self.nbytes = 2 * (gemm1_weights.numel() + gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x.bfloat16(), self._gemm1_weights, out_dtype=torch.float32)

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.mm(inter.bfloat16(), self._gemm2_weights, out_dtype=torch.float32).mul_(scale)


def _prepacked(weights: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.quantized.linear_prepack_fp16(from_fp8(weights, torch.float32), None)
    return packed


def _padded(x: torch.Tensor) -> torch.Tensor:
    """x [rows, K] with zeros up to a multiple of _K_MULTIPLE columns."""
    # NOTE: for other K oneDNN's AMX product reads on into the next row and multiplies what it finds there by zero: were
    # that NaN, it would reach this row.
    return functional.pad(x, (0, -x.shape[1] % _K_MULTIPLE)) if x.shape[1] % _K_MULTIPLE else x


def _scaled_mm(x: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """bfloat16(scale * (x @ weights)), scaled before the only rounding."""
    unread = x.new_zeros(1)  # addmm's first operand, which beta = 0 takes out
    return torch.addmm(unread, x, weights, beta=0.0, alpha=scale)


CpuExpertType = type[SplitExpert] | type[HalfExpert] | type[MixedExpert] | type[FloatExpert]


@functools.cache
def cpu_expert_type() -> CpuExpertType:
    """The fastest kind for this CPU. A matter of its features, not of a measurement: bits may not depend on the run."""
    # AMX is several times as fast as the vector unit: there two passes cost less than one of float32 arithmetic.
    if torch.cpu._is_amx_tile_supported():
        return SplitExpert
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return FloatExpert
    return MixedExpert if torch.cpu._is_avx512_bf16_supported() else HalfExpert


def pack(gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> Expert:
    """One expert from its FP8 weights [M, H] and [H, I]."""
    if gemm1_weights.device.type == "cpu":
        return cpu_expert_type()(gemm1_weights, gemm2_weights)
    return _CudaExpert(gemm1_weights, gemm2_weights)


@dataclass(frozen=True)
class Freedom:
    """What cannot change the bits of a row in the products of one size."""

    row_counts: tuple[int, ...]
    """The numbers of rows that a product may have, ascending, the last one MAX_ROWS."""
    in_blocks: bool
    """Rows are multiplied in blocks of _BLOCK_ROWS."""
    any_threads: bool
    """One thread or all of them."""

    def num_rows(self, rows: int) -> int:
        """The number to multiply when there are that many: at least as many."""
        return self.row_counts[bisect.bisect_left(self.row_counts, rows)]

    def multiply(self, product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """product(x), whose rows are `num_rows` of something."""
        return torch.cat([product(rows) for rows in torch.split(x, _BLOCK_ROWS)]) if self.in_blocks else product(x)


BLOCKS = tuple(range(_BLOCK_ROWS, MAX_ROWS + 1, _BLOCK_ROWS))
ON_CUDA = Freedom(BLOCKS, in_blocks=True, any_threads=True)


@functools.cache
def probe(gemm1_rows: int, hidden_size: int, intermediate_size: int, num_threads: int) -> Freedom:
    """The freedom of the CPU's products. Tried, not assumed: it depends on the CPU and the libraries under torch.

    Every exact sum is zero, so that what a product returns is the rounding error of its sum, whose bits tell one order
    of adding from another. Of a sum far from zero, rounded to bfloat16, they would tell in one value of ten thousand.
    """
    generator = torch.Generator().manual_seed(0)

    def random_fp8(*shape: int) -> torch.Tensor:
        # Any byte but the two NaNs, 0x7f and 0xff.
        codes = torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * 0x80
        return (codes + signs).view(torch.float8_e4m3fn)

    def cancelling(num_weights: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 weights [num_weights, size] and float32 inputs [MAX_ROWS, size], whose products add up to zero.

        Each term has its opposite at a random place, so that no part of a sum that a library may set apart is zero.
        For an odd size one term is left over.
        """
        weights, inputs = random_fp8(num_weights, size), random_fp8(MAX_ROWS, size)
        left, right = torch.randperm(size, generator=generator)[: size // 2 * 2].chunk(2)
        inputs.view(torch.uint8)[:, right] = inputs.view(torch.uint8)[:, left]
        weights.view(torch.uint8)[:, right] = weights.view(torch.uint8)[:, left] ^ 0x80  # the sign
        return weights, from_fp8(inputs, torch.float32)

    gemm1_weights, x = cancelling(gemm1_rows, hidden_size)
    gemm2_weights, inter = cancelling(hidden_size, intermediate_size)
    expert = pack(gemm1_weights, gemm2_weights)

    def products(row_counts: Sequence[int], *, by_workers: bool) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Both products of the last rows of x and inter, by their number."""
        results = {}

        def run(rows: int) -> None:
            results[rows] = expert.gemm1(x[-rows:]), expert.gemm2(inter[-rows:], 0.3)

        run_all(run, row_counts, by_workers=by_workers)
        return results

    def equal(some: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return all(torch.equal(left, right) for left, right in zip(some, other, strict=True))

    one = products(_PROBE_ROWS, by_workers=True)
    a, g = one[MAX_ROWS]
    alike = tuple(rows for rows in _PROBE_ROWS if equal(one[rows], (a[-rows:], g[-rows:])))
    in_blocks = alike[0] > _BLOCK_ROWS
    many = products((_BLOCK_ROWS,) if in_blocks else alike, by_workers=False)
    freedom = Freedom(
        row_counts=BLOCKS if in_blocks else alike,
        in_blocks=in_blocks,
        any_threads=all(equal(one[rows], many[rows]) for rows in many),
    )
    if freedom.in_blocks:
        _log.warning(
            "products of %d x %d and %d x %d round differently for different numbers of rows on this CPU: tokens go "
            "through blocks of %d rows, which is slower",
            gemm1_rows, hidden_size, hidden_size, intermediate_size, _BLOCK_ROWS,
        )  # fmt: skip
    return freedom
