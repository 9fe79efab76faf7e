"""Padding of the intermediate size, and fingerprints; shapes and types are tested through the operator (test_ops)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import make_case, make_spec

from expertd_server import reference
from expertd_server.backend_cpu import TorchBackend
from expertd_server.types import Activation
from expertd_server.weights import pad_intermediate


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("intermediate_size", [1, 21, 40])
def test_padding_the_intermediate_size_changes_no_output(intermediate_size: int, activation: Activation) -> None:
    case = make_case(make_spec(intermediate_size=intermediate_size, activation=activation), 9, seed=3)
    spec, weights = pad_intermediate(case.spec, case.weights, 16)
    weights.check(spec)
    assert spec.intermediate_size == -(-intermediate_size // 16) * 16
    outputs, padded = (
        reference.forward(*layer, case.hidden_states, routing_logits=case.routing_logits)
        for layer in ((case.spec, case.weights), (spec, weights))
    )
    assert torch.equal(outputs.output, padded.output), case.name
    inter, filled = outputs.inter.float(), padded.inter.float()
    assert torch.equal(filled[..., :intermediate_size], inter), case.name
    assert not filled[..., intermediate_size:].any(), case.name
    cpu = TorchBackend()
    served = cpu.forward(cpu.prepare(spec, weights), case.hidden_states, routing_logits=case.routing_logits).output
    assert served is not None
    assert float((served.double() - padded.output.double()).norm()) <= 4e-3 * float(padded.output.double().norm())


def test_what_is_a_multiple_stays_as_it_is() -> None:
    case = make_case(make_spec(), 1, seed=3)
    spec, weights = pad_intermediate(case.spec, case.weights, 16)
    assert spec is case.spec
    assert weights is case.weights


def test_a_fingerprint_is_the_same_for_the_same_weights_alone() -> None:
    case = make_case(make_spec(hidden_size=128, intermediate_size=96), 1, seed=3)
    weights = case.weights
    scales = weights.output2_scales_scalar.clone()
    scales[-1] *= 2
    others = [
        make_case(case.spec, 1, seed=4).weights,
        case.slice(0, 2).weights,
        case.slice(2, 2).weights,
        dataclasses.replace(weights, output2_scales_scalar=scales),
        dataclasses.replace(weights, hidden_states_scale=3.5),
        dataclasses.replace(weights, routing_bias=torch.zeros(case.spec.num_experts)),
    ]
    for name in ("gemm1_weights", "gemm2_weights"):
        changed = getattr(weights, name).clone()
        changed[1] = changed[0]  # one expert, larger than what is read of it
        assert changed[1].numel() > 2 * 4096
        others.append(dataclasses.replace(weights, **{name: changed}))
    copied = dataclasses.replace(weights, gemm1_weights=weights.gemm1_weights.clone())
    assert copied.fingerprint() == weights.fingerprint()
    prints = {each.fingerprint() for each in (weights, *others)}
    assert len(prints) == 1 + len(others)
    assert all(0 < each < 2**64 for each in prints)
