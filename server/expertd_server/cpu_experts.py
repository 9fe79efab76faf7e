"""The experts of a layer on CPUs with AVX-512 BF16, from routed tokens to the output in one compiled call.

The matrix unit (AMX) multiplies where there is one, else the vector unit. Weights stay FP8 in memory, in the order in
which they are read, and become bfloat16, which is exact, on their way into the unit. Every sum over K is taken in the
same order, in float32, so a row's bits depend neither on the rows beside it nor on the number of threads. They may
differ from one unit to the other.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from expertd_server.fp8 import quantize_fp8
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights
from expertd_server.workers import run_all

try:
    # After torch, whose OpenMP library it takes. Not "from", whose error would not say what is missing.
    import expertd_server._cpu_experts as _cpu_experts  # noqa: PLR0402
except ImportError as error:
    _cpu_experts = None  # type: ignore[assignment]
    _import_error = str(error)

__all__ = ["PackedExperts", "Unit", "find_unit", "how", "pack", "run", "why_not"]

_OUTPUT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Unit(enum.IntEnum):
    """What can multiply, the fastest first; _cpu_experts knows them by the same numbers."""

    AMX = 0
    AVX512 = 1


@functools.cache
def why_not(unit: Unit) -> str | None:
    """None where this process can use the unit, else the reason why it cannot."""
    if _cpu_experts is None:
        return f"{_import_error}; install where a C++ compiler knows AVX-512 BF16, AMX and OpenMP"
    return _cpu_experts.why_not(unit)


def find_unit() -> Unit | None:
    """The fastest that this process can use; None: experts run in torch."""
    return next((unit for unit in Unit if why_not(unit) is None), None)


def how(unit: Unit | None) -> str:
    """How experts run with the unit, and what keeps this process from a faster one, for a person to read."""
    match unit:
        case Unit.AMX:
            return "experts run on the matrix unit (AMX)"
        case Unit.AVX512:
            text, reason = "experts run on the vector unit (AVX-512 BF16)", why_not(Unit.AMX)
        case None:
            text, reason = "experts run in torch", why_not(Unit.AVX512)
    return f"{text}: {reason}" if reason else text


@dataclass(frozen=True)
class PackedExperts:
    """FP8 weights of one layer in the order in which the products read them, filled up with zeros to whole tiles."""

    unit: Unit
    """What multiplies with them."""
    gemm1: torch.Tensor
    """[L, bytes] uint8."""
    gemm2: torch.Tensor
    """[L, bytes] uint8."""

    @property
    def nbytes(self) -> int:
        """One byte a weight, and what fills rows and columns up to multiples of 32."""
        return self.gemm1.numel() + self.gemm2.numel()


def pack(unit: Unit, spec: LayerSpec, weights: ExpertWeights, experts: Iterable[int]) -> PackedExperts:
    """The given local experts of a layer; memory of the others is not touched, and must not be read."""
    shape = (spec.hidden_size, spec.intermediate_size, int(spec.activation))
    # All of torch's memory starts at a multiple of 64 bytes, as run needs it.
    gemm1, gemm2 = (
        torch.empty(spec.num_local, nbytes, dtype=torch.uint8) for nbytes in _cpu_experts.packed_sizes(*shape)
    )
    for packed in (gemm1, gemm2):
        _cpu_experts.use_huge_pages(packed.data_ptr(), packed.numel())

    def pack_one(expert: int) -> None:
        tensors = (weights.gemm1_weights, weights.gemm2_weights, gemm1, gemm2)
        _cpu_experts.pack(*shape, *(tensor[expert].data_ptr() for tensor in tensors))

    run_all(pack_one, list(experts), by_workers=True)
    return PackedExperts(unit, gemm1, gemm2)


def run(
    spec: LayerSpec,
    weights: ExpertWeights,
    experts: PackedExperts,
    *,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Steps 2 to 5 of the layer on routed tokens. T tokens, K top_k, H hidden_size, P pairs with a local expert.

    weights: their scales are read. hidden_states: [T, H] fp8, or wider where the weights have hidden_states_scale.
    topk_ids: [T, K] int32, global; expert_weights: [T, K] bfloat16. out: [T, H] bfloat16, float16 or float32, written;
    None: step 5 is left out.
    Returns g [P, H] bfloat16, grouped by local expert in ascending id, then by slot, or None where there is an out; and
    row_of_slot [T * K] int32, -1 where a slot is empty or its expert not local.
    """
    if hidden_states.dtype != torch.float8_e4m3fn:
        assert weights.hidden_states_scale is not None
        hidden_states = quantize_fp8(hidden_states, weights.hidden_states_scale)
    hidden_states, topk_ids = hidden_states.contiguous(), topk_ids.contiguous()
    expert_weights = expert_weights.contiguous()
    num_slots = topk_ids.numel()
    g = torch.empty(num_slots, spec.hidden_size, dtype=torch.bfloat16) if out is None else None
    row_of_slot = torch.empty(num_slots, dtype=torch.int32)
    written = (
        out if out is None or out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    num_rows = _cpu_experts.run(
        experts.unit,
        spec.hidden_size,
        spec.intermediate_size,
        int(spec.activation),
        len(topk_ids),
        spec.top_k,
        spec.local_expert_offset,
        spec.num_local,
        spec.use_routing_scales_on_input,
        hidden_states.data_ptr(),
        topk_ids.data_ptr(),
        expert_weights.data_ptr(),
        experts.gemm1.data_ptr(),
        experts.gemm2.data_ptr(),
        weights.output1_scales_scalar.data_ptr(),
        weights.output1_scales_gate_scalar.data_ptr(),
        weights.output2_scales_scalar.data_ptr(),
        0 if g is None else g.data_ptr(),
        row_of_slot.data_ptr(),
        0 if written is None else written.data_ptr(),
        0 if written is None else _OUTPUT_TYPES[written.dtype],
        torch.get_num_threads(),
    )
    if out is not None and written is not None and written is not out:
        out.copy_(written)
    return None if g is None else g[:num_rows], row_of_slot
