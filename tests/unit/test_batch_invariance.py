"""The bits of a token's output depend on that token and the layer alone: not on its company, not on its place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import Case, make_case, make_spec, spec_id

from expertd_server import backend_cpu
from expertd_server.backend import PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.types import Activation, LayerSpec, RoutingMethod

pytestmark = pytest.mark.usefixtures("two_threads")
POOL_TOKENS = 1000
BATCHES = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 250, 500, 999, 1000]


def forward(layer: PreparedLayer, case: Case, rows: torch.Tensor) -> torch.Tensor:
    """float32 output: it shows differences that rounding to bfloat16 would hide."""
    hidden_states = case.hidden_states.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    logits = case.routing_logits[rows]
    result = TorchBackend().forward(layer, hidden_states, routing_logits=logits, output_dtype=torch.float32)
    assert result.output is not None
    return result.output


SPECS = [
    make_spec(),
    make_spec(hidden_size=37, intermediate_size=21, num_experts=5, top_k=3, activation=Activation.GEGLU),
    make_spec(hidden_size=136, intermediate_size=72, routing_method=RoutingMethod.SIGMOID_RENORM),
    make_spec(routing_method=RoutingMethod.DEEPSEEK_V3, n_group=4, topk_group=2, activation=Activation.GELU),
    make_spec(
        routing_method=RoutingMethod.LLAMA4,
        top_k=1,
        use_routing_scales_on_input=True,
        local_expert_offset=4,
        local_num_experts=8,
    ),
    make_spec(hidden_size=2048, intermediate_size=768, num_experts=4, top_k=2),
]


@pytest.mark.usefixtures("experts_run_by_each")
@pytest.mark.parametrize("logits", ["random", "one_expert"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_token_alone_and_in_batches_of_2_to_1000(spec: LayerSpec, logits: str) -> None:
    case = make_case(spec, POOL_TOKENS, seed=7, logits=logits)
    layer = TorchBackend().prepare(spec, case.weights)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randperm(POOL_TOKENS, generator=generator)[:12]
    alone = {int(t): forward(layer, case, t[None])[0] for t in tokens}
    for size in BATCHES:
        company = torch.randperm(POOL_TOKENS, generator=generator)[:size]
        places = torch.randperm(size, generator=generator)[: len(tokens)]
        company[places] = tokens[: len(places)]
        got = forward(layer, case, company)
        for place in places.tolist():
            t = int(company[place])
            assert torch.equal(got[place], alone[t]), f"token {t} at {place} of {size}, {case.name}"


@pytest.mark.usefixtures("experts_run_by_each")
def test_the_same_call_gives_the_same_bits_again() -> None:
    case = make_case(make_spec(), 300, seed=1)
    layer = TorchBackend().prepare(case.spec, case.weights)
    every = torch.arange(300)
    assert torch.equal(forward(layer, case, every), forward(layer, case, every))


@pytest.mark.usefixtures("experts_run_by_each")
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_nan_reaches_no_other_row(spec: LayerSpec) -> None:
    case = make_case(spec, 100, seed=9)
    layer = TorchBackend().prepare(spec, case.weights)
    every = torch.arange(100)
    clean = forward(layer, case, every)
    codes, logits = case.hidden_states.view(torch.uint8).clone(), case.routing_logits.clone()
    codes[10, 3] = 0x7F  # NaN
    codes[50] = 0xFF
    logits[20, 1] = torch.nan
    logits[70] = torch.nan
    logits[90, 0] = torch.inf
    poisoned = dataclasses.replace(case, hidden_states=codes.view(torch.float8_e4m3fn), routing_logits=logits)
    got = forward(layer, poisoned, every)
    others = [t for t in range(100) if t not in (10, 20, 50, 70, 90)]
    assert torch.equal(got[others], clean[others]), case.name
    if spec.num_local == spec.num_experts:
        assert got[[10, 50, 20, 70]].isnan().any(dim=1).all(), case.name


@pytest.mark.parametrize("activation", Activation)
def test_a_row_is_activated_to_the_same_bits_in_any_company(activation: Activation) -> None:
    # Before its rounding to fp8, which would hide nearly every difference.
    for columns in (21, 64, 100):
        a = (
            torch.randn(700, columns * (2 if activation.is_gated else 1), generator=torch.Generator().manual_seed(0))
            * 4
        )
        together = backend_cpu._activate(activation, a.clone(), 0.7, 1.3)
        for t in range(0, 700, 7):
            for rows in (slice(t, t + 1), slice(max(0, t - 2), t + 1)):
                few = backend_cpu._activate(activation, a[rows].clone(), 0.7, 1.3)
                assert torch.equal(few[-1], together[t]), f"row {t} in {rows}, {columns} columns"


@pytest.mark.parametrize("function", [torch.exp, torch.erf], ids=["exp", "erf"])
def test_the_transcendental_functions_in_use_do_not_depend_on_the_place(function: object) -> None:
    # Not true of torch.sigmoid, silu and gelu: the reason why they are not in use.
    assert callable(function)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 4.0
    expected = function(x)
    for length in [*range(1, 70), 1000, 32_767, 32_769, 65_537, 131_071]:
        for start in (0, 1, 7, 16):
            part = slice(start, start + length)
            assert torch.equal(function(x[part]), expected[part]), f"{length} elements at {start}"
            assert torch.equal(function(x[part].clone()), expected[part]), f"{length} elements, copied from {start}"
