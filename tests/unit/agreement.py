"""How a layer on the CPU backend is held to the reference: ids, inter, g given inter, the whole output."""

from __future__ import annotations

import dataclasses

import torch
from cases import Case, relative_error, visible_inter

from expertd_server import reference
from expertd_server.backend import MoEOutput
from expertd_server.backend_cpu import TorchBackend
from expertd_server.fp8 import to_fp8
from expertd_server.types import LayerSpec

__all__ = ["WHOLE_OUTPUT_BOUND", "by_slot", "check_against_reference", "expect", "is_local", "output", "run"]

WHOLE_OUTPUT_BOUND = 4e-3


def run(case: Case, **options: object) -> MoEOutput:
    cpu = TorchBackend()
    arguments = {"routing_logits": case.routing_logits} if "topk_ids" not in options else {}
    return cpu.forward(cpu.prepare(case.spec, case.weights), case.hidden_states, **arguments, **options)  # type: ignore[arg-type]


def output(case: Case, **options: object) -> torch.Tensor:
    result = run(case, **options).output
    assert result is not None
    return result


def expect(case: Case) -> reference.Reference:
    return reference.forward(case.spec, case.weights, case.hidden_states, routing_logits=case.routing_logits)


def check_against_reference(case: Case) -> None:
    """Every bound of the layer's agreement: ids, inter, g given inter, the whole output."""
    expected = expect(case)
    result = run(case)
    assert torch.equal(result.topk_ids, expected.topk_ids), case.name
    assert result.output is not None
    error = relative_error(result.output, expected.output)
    assert error <= WHOLE_OUTPUT_BOUND, f"{case.name}: output off by {error}"

    spec, weights = visible_inter(case.spec, case.weights)
    shown = by_slot(run(dataclasses.replace(case, weights=weights), do_finalize=False))
    inter = shown[..., : spec.intermediate_size]
    steps = (fp8_position(inter) - fp8_position(expected.inter.float())).abs()
    steps = steps[is_local(spec, expected.topk_ids)]
    assert not steps.numel() or int(steps.max()) <= 1, f"{case.name}: inter off by {int(steps.max())} fp8 values"
    assert not steps.numel() or float((steps == 0).float().mean()) >= 0.95, case.name

    g = by_slot(run(case, do_finalize=False))
    given = reference.expert_outputs(case.spec, case.weights, expected.topk_ids, inter)
    error = relative_error(g, given)
    assert error <= WHOLE_OUTPUT_BOUND, f"{case.name}: g off by {error}"


def by_slot(result: MoEOutput) -> torch.Tensor:
    """gemm2_output as [T, K, H] float32, zeros where a slot has no row."""
    g, rows = result.gemm2_output, result.expanded_idx_to_permuted_idx
    assert g is not None
    assert rows is not None
    padded = torch.cat([g.float(), torch.zeros(1, g.shape[1])])
    return padded[torch.where(rows < 0, len(g), rows)].view(*result.topk_ids.shape, -1)


def fp8_position(values: torch.Tensor) -> torch.Tensor:
    """Place of fp8 values among all fp8 values, so that neighbours differ by 1."""
    codes = to_fp8(values).view(torch.uint8).int()
    return torch.where(codes >= 0x80, 0x80 - codes, codes)


def is_local(spec: LayerSpec, ids: torch.Tensor) -> torch.Tensor:
    return (ids >= spec.local_expert_offset) & (ids < spec.local_expert_offset + spec.num_local)
