"""The reference against small examples worked out by hand, and its roundings against every value of the format."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_case, make_spec, relative_error

from expertd_server import reference
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

METHOD = RoutingMethod
SIGMOID_2 = 1 / (1 + math.exp(-2.0))
SIGMOID_1 = 1 / (1 + math.exp(-1.0))
LOGITS = [0.0, 2.0, 1.0, 2.0]
"""Of the two equal logits, expert 1 comes before expert 3."""


def test_round_fp8_returns_every_value_of_the_format() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).double()
    assert torch.equal(reference.round_fp8(values).nan_to_num(nan=-1.0), values.nan_to_num(nan=-1.0))


def test_round_fp8_takes_the_even_neighbour_of_a_tie_and_the_nearest_otherwise() -> None:
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 ... 448 ascending
    low, high = finite[:-1], finite[1:]
    middle = (low + high) / 2
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)
    for sign in (1.0, -1.0):
        assert torch.equal(reference.round_fp8(sign * middle), sign * even)
        assert torch.equal(reference.round_fp8(sign * middle * (1 - 1e-12)), sign * low)
        assert torch.equal(reference.round_fp8(sign * middle * (1 + 1e-12)), sign * high)


def test_round_fp8_saturates_and_keeps_nan() -> None:
    x = torch.tensor([448.0, 464.0, 465.0, 1e300, math.inf, -1e300, -math.inf, math.nan], dtype=torch.float64)
    assert reference.round_fp8(x)[:-1].tolist() == [448.0] * 5 + [-448.0] * 2
    assert reference.round_fp8(x)[-1].isnan()


def test_round_bfloat16_rounds_once() -> None:
    x = 1.0 + 2.0**-8 + 2.0**-40  # through float32 it would become a tie and fall to 1.0
    assert float(reference.round_bfloat16(torch.tensor(x, dtype=torch.float64))) == 1.0 + 2.0**-7


@pytest.mark.parametrize(
    ("spec", "ids", "weights"),
    [
        (
            make_spec(num_experts=4, top_k=2, routing_method=METHOD.DEFAULT),
            [1, 3],
            [math.exp(2) / (1 + 2 * math.exp(2) + math.e)] * 2,
        ),
        (make_spec(num_experts=4, top_k=2, routing_method=METHOD.RENORMALIZE), [1, 3], [0.5, 0.5]),
        (
            make_spec(num_experts=4, top_k=3, routing_method=METHOD.RENORMALIZE),
            [1, 3, 2],
            [1 / (2 + math.exp(-1))] * 2 + [math.exp(-1) / (2 + math.exp(-1))],
        ),
        (make_spec(num_experts=4, top_k=1, routing_method=METHOD.LLAMA4), [1], [SIGMOID_2]),
        (make_spec(num_experts=4, top_k=2, routing_method=METHOD.RENORMALIZE_NAIVE), [1, 3], [0.5, 0.5]),
        (make_spec(num_experts=4, top_k=3, routing_method=METHOD.TOPK), [1, 3, 2], [2.0, 2.0, 1.0]),
        (
            make_spec(num_experts=4, top_k=3, routing_method=METHOD.SIGMOID_RENORM),
            [1, 3, 2],
            [s / (2 * SIGMOID_2 + SIGMOID_1) for s in (SIGMOID_2, SIGMOID_2, SIGMOID_1)],
        ),
        (
            make_spec(num_experts=4, top_k=3, routing_method=METHOD.SIGMOID_RENORM, norm_topk_prob=False),
            [1, 3, 2],
            [SIGMOID_2, SIGMOID_2, SIGMOID_1],
        ),
        (make_spec(num_experts=4, top_k=2, routing_method=METHOD.SIGMOID), [1, 3], [SIGMOID_2] * 2),
    ],
    ids=lambda value: value.routing_method.name if isinstance(value, LayerSpec) else "",
)
def test_route_by_hand(spec: LayerSpec, ids: list[int], weights: list[float]) -> None:
    got_ids, got_weights = reference.route(spec, torch.tensor([LOGITS]), None)
    assert got_ids.tolist() == [ids]
    assert torch.equal(got_weights, torch.tensor([weights]).bfloat16())


def test_bias_selects_but_does_not_weigh() -> None:
    bias = torch.tensor([10.0, 0.0, -10.0, 0.0])
    for method in (METHOD.DEEPSEEK_V3, METHOD.MINIMAX2):
        spec = make_spec(num_experts=4, top_k=2, routing_method=method, routed_scaling_factor=2.5)
        ids, weights = reference.route(spec, torch.tensor([LOGITS]), bias)
        assert ids.tolist() == [[0, 1]]
        expected = torch.tensor([[2.5 * s / (0.5 + SIGMOID_2) for s in (0.5, SIGMOID_2)]]).bfloat16()
        assert torch.equal(weights, expected)


def test_groups_are_scored_by_their_two_best_and_excluded_experts_stay_out() -> None:
    spec = make_spec(num_experts=8, top_k=3, routing_method=METHOD.DEEPSEEK_V3, n_group=2, topk_group=1)
    # Group 0 holds the single best expert; group 1 the better pair, and negative selection scores beside it.
    logits = torch.zeros(1, 8)
    bias = torch.tensor([5.0, -9.0, -9.0, -9.0, 1.0, 1.0, -9.0, -8.0])
    ids, _ = reference.route(spec, logits, bias)
    assert ids.tolist() == [[4, 5, 7]]  # expert 7 scores -7.5: below zero, and yet before the excluded expert 0


def test_forward_by_hand() -> None:
    # One expert, hidden [3, 4]: up = 3, gate = 4; halves of both; then silu(2) * 1.5.
    spec = LayerSpec(hidden_size=2, intermediate_size=1, num_experts=1, top_k=1, routing_method=METHOD.RENORMALIZE)
    fp8 = torch.float8_e4m3fn
    half = torch.tensor([0.5])
    weights = ExpertWeights(
        gemm1_weights=torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).to(fp8),
        output1_scales_scalar=half,
        output1_scales_gate_scalar=half,
        gemm2_weights=torch.tensor([[[2.0], [-4.0]]]).to(fp8),
        output2_scales_scalar=torch.tensor([0.25]),
    )
    result = reference.forward(spec, weights, torch.tensor([[3.0, 4.0]]).to(fp8), routing_logits=torch.zeros(1, 1))
    exact = 2.0 * SIGMOID_2 * 1.5  # 2.64..., between the fp8 values 2.5 and 2.75
    assert result.inter.float().tolist() == [[[2.75]]]
    assert result.g.tolist() == [[[2.75 * 2.0 * 0.25, 2.75 * -4.0 * 0.25]]]
    assert result.output.tolist() == [[1.375, -2.75]]
    torch.testing.assert_close(
        result.output_without_roundings, torch.tensor([[exact * 0.5, -exact]], dtype=torch.float64), rtol=1e-7, atol=0.0
    )


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (Activation.GELU, [-0.5 * (1 + math.erf(-(0.5**0.5))), 0.0, 2 * 0.5 * (1 + math.erf(2 * 0.5**0.5))]),
        (Activation.RELU2, [0.0, 0.0, 4.0]),
        (Activation.IDENTITY, [-1.0, 0.0, 2.0]),
    ],
)
def test_activations_that_are_not_gated(activation: Activation, expected: list[float]) -> None:
    spec = LayerSpec(hidden_size=3, intermediate_size=3, num_experts=1, top_k=1, activation=activation)
    one = torch.ones(1)
    eye = torch.eye(3)[None].to(torch.float8_e4m3fn)
    weights = ExpertWeights(eye, one * 3.0, one * 0.5, eye, one)
    x = torch.tensor([[-2.0, 0.0, 4.0]]).to(torch.float8_e4m3fn)
    result = reference.forward(spec, weights, x, routing_logits=torch.zeros(1, 1))
    torch.testing.assert_close(
        result.output_without_roundings, 3.0 * torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=0.0
    )


def test_rounding_of_inter_costs_two_to_three_percent() -> None:
    case = make_case(make_spec(hidden_size=256, intermediate_size=128), 32, seed=1)
    result = reference.forward(case.spec, case.weights, case.hidden_states, routing_logits=case.routing_logits)
    assert 0.015 < relative_error(result.output, result.output_without_roundings) < 0.035, case.name
