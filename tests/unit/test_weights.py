"""Padding of the intermediate size; the checks of shapes and types are tested through the operator (test_ops.py)."""

from __future__ import annotations

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
