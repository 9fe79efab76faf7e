"""Routing against the reference: every method, on random and adversarial logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import LOGIT_PATTERNS, every_method, make_logits, make_spec, make_weights, spec_id

from expertd_server import reference, routing
from expertd_server.routing import route
from expertd_server.types import LayerSpec, RoutingMethod

SEEDS = range(3)


@pytest.mark.parametrize("pattern", LOGIT_PATTERNS)
@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_route_agrees_with_the_reference(spec: LayerSpec, pattern: str) -> None:
    for seed in SEEDS:
        case = f"seed {seed}, {pattern}, {spec}"
        logits = make_logits(spec, 9, seed, pattern)
        bias = make_weights(make_spec_of_weights(spec), seed).routing_bias
        ids, weights = route(spec, logits, bias)
        expected_ids, expected_weights = reference.route(spec, logits, bias)
        assert ids.dtype == torch.int32
        assert weights.dtype == torch.bfloat16
        _check_ids(spec, ids, case)
        scores = reference.selection_scores(spec, logits, bias)
        for t in (ids != expected_ids).any(dim=1).nonzero().flatten().tolist():
            chosen, expected = scores[t, ids[t].long()], scores[t, expected_ids[t].long()]
            gap = ((chosen - expected).abs() / expected.abs()).max()
            assert gap <= 1e-6, f"{case}: row {t} chose {ids[t].tolist()}, expected {expected_ids[t].tolist()}"
        same = (ids == expected_ids).all(dim=1)
        torch.testing.assert_close(
            weights[same].float(), expected_weights[same].float(), rtol=2**-8, atol=0.0, equal_nan=True, msg=case
        )
        assert (weights[same] == expected_weights[same]).float().mean() > 0.99 or weights.isnan().any(), case


def make_spec_of_weights(spec: LayerSpec) -> LayerSpec:
    """A layer with the same experts and bias, but tiny matrices."""
    return make_spec(
        hidden_size=1, intermediate_size=1, num_experts=spec.num_experts, top_k=1, routing_method=spec.routing_method
    )


def _check_ids(spec: LayerSpec, ids: torch.Tensor, case: str) -> None:
    assert int(ids.min()) >= 0, case
    assert int(ids.max()) < spec.num_experts, case
    for row in ids.tolist():
        assert len(set(row)) == spec.top_k, f"{case}: {row} are not distinct"


LEVELS = (-1.0, 0.0, 2.0)
EXACT_LEVELS = (-200.0, 0.0, 100.0)
"""Their sigmoids are 0, 0.5 and 1: sums with a bias, and of two experts of a group, are exact and often equal."""
BIASES = (-2.0, 0.0, 0.5)


def tied_inputs(spec: LayerSpec, pattern: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [64, E] float32 of three values, so that experts tie, and a bias [E] for the methods that read one."""
    generator = torch.Generator().manual_seed(64)

    def chosen_from(values: tuple[float, ...], *shape: int) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    num_groups = spec.n_group or 1
    group_size = spec.num_experts // num_groups
    logits = chosen_from(LEVELS, 64, spec.num_experts)
    bias = torch.full((spec.num_experts,), 0.5)
    match pattern:
        case "equal logits and bias":
            logits = torch.full_like(logits, 2.0)
        case "equal logits, some bias":
            logits, bias = torch.full_like(logits, 2.0), chosen_from(BIASES, spec.num_experts)
        case "some bias":
            levels = EXACT_LEVELS if spec.routing_method.reads_bias else LEVELS
            logits, bias = chosen_from(levels, 64, spec.num_experts), chosen_from(BIASES, spec.num_experts)
        case "equal groups":
            logits, bias = logits[:, :group_size].repeat(1, num_groups), bias * -4.0  # every selection score below zero
    return logits, bias if spec.routing_method.reads_bias else None


def ids_by_exact_scores(spec: LayerSpec, logits: list[float], bias: list[float] | None) -> list[int]:
    """What the table of methods says in float64: of equal scores the smaller id."""
    scores = logits  # softmax and sigmoid keep their order as far as they do not saturate
    if bias is not None:
        scores = [1 / (1 + math.exp(-x)) + b for x, b in zip(logits, bias, strict=True)]
    candidates = list(range(spec.num_experts))
    if spec.is_grouped:
        assert spec.n_group is not None
        size = spec.num_experts // spec.n_group
        of_group = [sum(sorted(scores[g * size : (g + 1) * size])[:-3:-1]) for g in range(spec.n_group)]
        kept = sorted(range(spec.n_group), key=lambda g: (-of_group[g], g))[: spec.topk_group]
        candidates = [e for e in candidates if e // size in kept]
    return sorted(candidates, key=lambda e: (-scores[e], e))[: spec.top_k]


@pytest.mark.parametrize(
    "pattern", ["equal logits and bias", "equal logits, some bias", "equal bias", "some bias", "equal groups"]
)
@pytest.mark.parametrize("choose", [route, reference.route], ids=["torch", "reference"])
@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_of_equal_scores_the_smaller_id_wins(
    spec: LayerSpec, choose: Callable[..., tuple[torch.Tensor, torch.Tensor]], pattern: str
) -> None:
    logits, bias = tied_inputs(spec, pattern)
    ids, _ = choose(spec, logits, bias)
    of_experts = None if bias is None else bias.tolist()
    for t, row in enumerate(logits.tolist()):
        assert ids[t].tolist() == ids_by_exact_scores(spec, row, of_experts), f"row {t}: {row}, bias {of_experts}"


@pytest.mark.parametrize("method", [RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2])
def test_sums_of_different_scores_and_biases_tie(method: RoutingMethod) -> None:
    spec = make_spec(routing_method=method, num_experts=6, top_k=4)
    logits = torch.tensor([[0.0, 100.0, -200.0, 100.0, 0.0, -200.0]])  # sigmoids 0.5, 1 and 0
    bias = torch.tensor([0.25, -0.25, 0.75, -0.5, 0.0, 0.5])  # sums 0.75 thrice, then 0.5 thrice
    for choose in (route, reference.route):
        ids, weights = choose(spec, logits, bias)
        assert ids.tolist() == [[0, 1, 2, 3]]
        assert torch.equal(weights, (torch.tensor([[0.5, 1.0, 0.0, 1.0]]) / 2.5).bfloat16())


@pytest.mark.parametrize("method", [RoutingMethod.SIGMOID, RoutingMethod.SIGMOID_RENORM])
def test_saturated_sigmoids_tie_and_the_smaller_id_wins(method: RoutingMethod) -> None:
    high, low = torch.linspace(20.0, 300.0, 16), torch.linspace(-300.0, -120.0, 16)
    ids, _ = route(make_spec(routing_method=method), torch.stack([high, low]), None)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    ids, _ = route(make_spec(routing_method=RoutingMethod.TOPK), torch.stack([high, low]), None)
    assert ids.tolist() == [[15, 14, 13, 12]] * 2  # the logits themselves do not saturate


def test_all_zero_sigmoids_renormalise_to_zero() -> None:
    spec = make_spec(routing_method=RoutingMethod.SIGMOID_RENORM)
    _, weights = route(spec, torch.full((1, 16), -1000.0), None)
    assert weights.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_nan_stays_in_its_row(spec: LayerSpec) -> None:
    for seed in SEEDS:
        clean = make_logits(spec, 16, seed)
        poisoned = clean.clone()
        poisoned[3, 1] = torch.nan
        poisoned[7] = torch.nan
        poisoned[12, -1] = torch.inf
        bias = make_weights(make_spec_of_weights(spec), seed).routing_bias
        ids, weights = route(spec, poisoned, bias)
        _check_ids(spec, ids, f"seed {seed}, {spec}")
        assert weights[3].isnan().any()
        assert weights[7].isnan().any()
        others = [t for t in range(16) if t not in (3, 7, 12)]
        clean_ids, clean_weights = route(spec, clean, bias)
        assert torch.equal(ids[others], clean_ids[others])
        assert torch.equal(weights[others], clean_weights[others])


@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_a_row_has_the_same_bits_in_any_batch(spec: LayerSpec) -> None:
    num_tokens = 1000 if spec.num_experts <= 16 else 150  # more than one thread's share of an element-wise operation
    logits = make_logits(spec, num_tokens, 5)
    bias = make_weights(make_spec_of_weights(spec), 5).routing_bias
    ids, weights = route(spec, logits, bias)
    for t in [*range(40), num_tokens - 2, num_tokens - 1]:
        for rows in (slice(t, t + 1), slice(max(0, t - 3), t + 1), slice(max(0, t - 31), t + 1)):
            alone_ids, alone_weights = route(spec, logits[rows].clone(), bias)
            assert torch.equal(alone_ids[-1], ids[t]), f"row {t} in {rows}, {spec}"
            assert torch.equal(alone_weights[-1].view(torch.int16), weights[t].view(torch.int16)), f"row {t}, {spec}"


@pytest.mark.parametrize("method", RoutingMethod)
def test_scores_have_the_same_bits_in_any_batch(method: RoutingMethod) -> None:
    # Before the rounding to bfloat16, which would hide nearly every difference.
    for num_experts in (13, 64, 100):
        logits = make_logits(make_spec(num_experts=num_experts), 300, 5)
        together = routing._scores(method, logits)
        for t in range(300):
            assert torch.equal(routing._scores(method, logits[t : t + 1].clone())[0], together[t]), (t, num_experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_bias_of_either_type(dtype: torch.dtype) -> None:
    spec = make_spec(routing_method=RoutingMethod.DEEPSEEK_V3)
    logits, bias = make_logits(spec, 8, 2).to(dtype), make_weights(spec, 2).routing_bias
    assert bias is not None
    ids, weights = route(spec, logits, bias.to(dtype))
    same_ids, same_weights = route(spec, logits.float(), bias.to(dtype).float())
    assert torch.equal(ids, same_ids)
    assert torch.equal(weights, same_weights)


@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_no_tokens(spec: LayerSpec) -> None:
    ids, weights = route(spec, torch.empty(0, spec.num_experts), None)
    assert ids.shape == weights.shape == (0, spec.top_k)
