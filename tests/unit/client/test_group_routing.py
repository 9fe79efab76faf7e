"""Routing on the client agrees with routing on the server, and a token's bits are its own."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import LOGIT_PATTERNS, every_method, make_logits, make_spec, make_weights, spec_id

from expertd import routing
from expertd.errors import InvalidRequestError
from expertd.routing import route
from expertd.types import Activation, LayerInfo, LayerState, RoutingMethod
from expertd_server import reference
from expertd_server import routing as server_routing
from expertd_server.types import LayerSpec

pytestmark = pytest.mark.usefixtures("kernels")

PATTERNS = [name for name in LOGIT_PATTERNS if name != "some_nan"]
SEEDS = range(2)
NUM_TOKENS = 17


def layer_info(spec: LayerSpec, bias: torch.Tensor | None) -> LayerInfo:
    """The layer as a server describes it to the client."""
    return LayerInfo(
        name="layer",
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_experts=spec.num_experts,
        local_expert_offset=0,
        local_num_experts=spec.num_experts,
        top_k=spec.top_k,
        routing_method=RoutingMethod(int(spec.routing_method)),
        activation=Activation(int(spec.activation)),
        n_group=spec.n_group or 0,
        topk_group=spec.topk_group or 0,
        routed_scaling_factor=spec.routed_scaling_factor,
        norm_topk_prob=spec.norm_topk_prob,
        use_routing_scales_on_input=spec.use_routing_scales_on_input,
        hidden_states_scale=None,
        routing_bias=None if bias is None else bias.float().numpy(),
        weights_version=1,
        weights_versions=(1,),
        weights_bytes=0,
        state=LayerState.READY,
    )


def bias_of(spec: LayerSpec, seed: int) -> torch.Tensor | None:
    tiny = make_spec(
        hidden_size=1, intermediate_size=1, num_experts=spec.num_experts, top_k=1, routing_method=spec.routing_method
    )
    return make_weights(tiny, seed).routing_bias


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_ids_and_weights_agree_with_the_server(spec: LayerSpec, pattern: str) -> None:
    for seed in SEEDS:
        case = f"seed {seed}, {pattern}, T {NUM_TOKENS}, {spec}"
        logits, bias = make_logits(spec, NUM_TOKENS, seed, pattern), bias_of(spec, seed)
        ids, weights = route(layer_info(spec, bias), logits.numpy())
        assert ids.dtype == np.int32, case
        assert weights.dtype == ml_dtypes.bfloat16, case
        expected_ids, expected_weights = server_routing.route(spec, logits, bias)
        scores = reference.selection_scores(spec, logits, bias).numpy()
        same = (ids == expected_ids.numpy()).all(axis=1)
        for t in np.flatnonzero(~same):
            chosen, expected = scores[t, ids[t]], scores[t, expected_ids[t].numpy()]
            assert np.all(np.abs(chosen - expected) <= 1e-6 * np.abs(expected)), f"{case}: row {t} chose {ids[t]}"
        got, want = weights.astype(np.float32)[same], expected_weights.float().numpy()[same]
        np.testing.assert_allclose(got, want, rtol=2**-8, atol=0, err_msg=case)
        assert (got == want).mean() > 0.98, case


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_a_row_does_not_depend_on_its_neighbours(spec: LayerSpec, dtype: type) -> None:
    layer = layer_info(spec, bias_of(spec, 5))
    logits = make_logits(spec, 65, 5).numpy().astype(dtype)
    ids, weights = route(layer, logits)
    for start, stop in ((0, 1), (7, 9), (3, 20), (40, 65)):
        some_ids, some_weights = route(layer, logits[start:stop])
        case = f"seed 5, rows {start}-{stop} of 65, {spec}"
        assert np.array_equal(some_ids, ids[start:stop]), case
        assert np.array_equal(some_weights.view(np.uint16), weights[start:stop].view(np.uint16)), case


def test_bfloat16_logits_are_the_same_numbers_as_float32() -> None:
    layer = layer_info(make_spec(routing_method=RoutingMethod.RENORMALIZE_NAIVE), None)
    logits = make_logits(make_spec(), 33, 1).numpy().astype(ml_dtypes.bfloat16)
    for got, want in zip(route(layer, logits), route(layer, logits.astype(np.float32)), strict=True):
        assert np.array_equal(got, want)


def test_no_tokens_is_no_routing() -> None:
    for spec in every_method():
        ids, weights = route(layer_info(spec, bias_of(spec, 0)), np.empty((0, spec.num_experts), np.float32))
        assert ids.shape == weights.shape == (0, spec.top_k), spec


def test_an_excluded_group_loses_to_a_negative_score_in_a_kept_one() -> None:
    spec = make_spec(routing_method=RoutingMethod.DEEPSEEK_V3, n_group=4, topk_group=1, top_k=4)
    bias = torch.full((16,), -3.0)
    bias[5] = bias[6] = 1.0  # group 1 has the two best; its other two are as negative as everybody else
    ids, _ = route(layer_info(spec, bias), np.zeros((1, 16), np.float32))
    assert ids.tolist() == [[5, 6, 4, 7]]


def test_nan_is_an_error_that_names_the_first_row() -> None:
    logits = make_logits(make_spec(), 8, 0).numpy()
    logits[6, 3] = logits[4, 15] = np.nan
    with pytest.raises(InvalidRequestError, match=r"routing_logits: row 4 holds NaN") as caught:
        route(layer_info(make_spec(), None), logits)
    assert caught.value.violations[0].field == "routing_logits"


def test_infinities_that_leave_no_weights_are_an_error_that_names_the_row() -> None:
    logits = make_logits(make_spec(), 4, 0).numpy()
    logits[2] = -np.inf
    with pytest.raises(InvalidRequestError, match="row 2 has infinities"):
        route(layer_info(make_spec(), None), logits)


def test_logits_of_another_width_are_an_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"is \(3, 15\), layer 'layer' expects \[T, 16\]"):
        route(layer_info(make_spec(), None), np.zeros((3, 15), np.float32))


@pytest.mark.parametrize("method", [RoutingMethod.TOPK, RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2])
def test_few_slots_and_many_are_chosen_by_the_same_rules(
    monkeypatch: pytest.MonkeyPatch, method: RoutingMethod
) -> None:
    # One maximum after the other, or by sorting: ties of equal scores, zeros of both signs and infinities included.
    grouped = {"n_group": 4, "topk_group": 2} if method is RoutingMethod.DEEPSEEK_V3 else {}
    spec = make_spec(routing_method=method, top_k=6, **grouped)
    layer = layer_info(spec, bias_of(spec, 3))
    logits = np.round(make_logits(spec, 200, 3).numpy() * 2) / 2 * np.random.default_rng(3).choice([-1, 1], (200, 1))
    by_rounds = route(layer, logits.astype(np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(routing, "_MAX_ROUNDS", 0)
        by_keys = route(layer, logits.astype(np.float32))
    assert np.array_equal(by_rounds[0], by_keys[0])
    assert np.array_equal(by_rounds[1].view(np.uint16), by_keys[1].view(np.uint16))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_compiled_kernels_give_the_bits_of_numpy(spec: LayerSpec, pattern: str, both_ways: Any) -> None:
    for num_tokens in (0, 1, NUM_TOKENS):
        logits = make_logits(spec, num_tokens, num_tokens, pattern).numpy()
        layer = layer_info(spec, bias_of(spec, num_tokens))
        by_numpy, compiled = both_ways(functools.partial(route, layer, logits))
        case = f"seed {num_tokens}, {pattern}, T {num_tokens}, {spec}"
        assert np.array_equal(by_numpy[0], compiled[0]), case
        assert np.array_equal(by_numpy[1].view(np.uint16), compiled[1].view(np.uint16)), case


def test_logits_may_lie_at_any_address(odd: Any) -> None:
    spec = make_spec(routing_method=RoutingMethod.TOPK)
    logits = make_logits(spec, 9, 0).numpy()
    ids, weights = route(layer_info(spec, None), logits)
    again = route(layer_info(spec, None), odd(logits))
    assert np.array_equal(again[0], ids)
    assert np.array_equal(again[1].view(np.uint16), weights.view(np.uint16))
