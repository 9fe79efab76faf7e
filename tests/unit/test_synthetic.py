"""Synthetic layers: valid, repeatable, and the same for every way of slicing them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from expertd_server import reference
from expertd_server.errors import ConfigError
from expertd_server.synthetic import PRESETS, synthetic_layers
from expertd_server.weights import ExpertWeights

PER_EXPERT = [
    "gemm1_weights",
    "output1_scales_scalar",
    "output1_scales_gate_scalar",
    "gemm2_weights",
    "output2_scales_scalar",
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def one(preset: str, **arguments: Any) -> ExpertWeights:
    return next(iter(synthetic_layers(preset, **arguments)))[2]


def test_layers_are_named_and_valid() -> None:
    layers = list(synthetic_layers("tiny", num_layers=3))
    assert [name for name, _, _ in layers] == ["synthetic.tiny.0", "synthetic.tiny.1", "synthetic.tiny.2"]
    for _, spec, weights in layers:
        weights.check(spec)
        assert bool(torch.isfinite(weights.gemm1_weights.float()).all())
        assert bool(torch.isfinite(weights.gemm2_weights.float()).all())
    assert not same(layers[0][2].gemm1_weights, layers[1][2].gemm1_weights)


def test_the_same_seed_gives_the_same_bits() -> None:
    for name in PER_EXPERT:
        assert same(getattr(one("tiny"), name), getattr(one("tiny"), name))
    assert not same(one("tiny").gemm1_weights, one("tiny", seed=1).gemm1_weights)


@pytest.mark.parametrize(("offset", "count"), [(0, 3), (3, 5), (7, 1)])
def test_slices_agree_with_the_whole(offset: int, count: int) -> None:
    whole, part = one("tiny"), one("tiny", local_expert_offset=offset, local_num_experts=count)
    for name in PER_EXPERT:
        assert same(getattr(part, name), getattr(whole, name)[offset : offset + count]), name


def test_the_bias_of_slices_is_that_of_the_layer() -> None:
    first, last = (one("nemotron-3-super", local_expert_offset=o, local_num_experts=1) for o in (0, 511))
    assert first.routing_bias is not None
    assert last.routing_bias is not None
    assert first.routing_bias.shape == (512,)
    assert same(first.routing_bias, last.routing_bias)
    assert len(set(first.routing_bias.tolist())) > 500


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("mixtral-8x7b", "llama4-scout")])
def test_outputs_are_of_order_one(preset: str) -> None:
    (_, spec, weights) = next(iter(synthetic_layers(preset, local_num_experts=1)))
    weights.check(spec)
    single = dataclasses.replace(spec, top_k=1)
    hidden = torch.randn(8, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    ids, ones = torch.zeros(8, 1, dtype=torch.int32), torch.ones(8, 1)
    rms = reference.forward(single, weights, hidden, topk_ids=ids, topk_weights=ones).sum.square().mean().sqrt()
    assert 0.3 < float(rms) < 3, f"{preset}: rms {float(rms)}"


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"preset": "gpt-9"}, "'gpt-9' is unknown, expected one of tiny, qwen3-30b-a3b"),
        ({"preset": "tiny", "local_expert_offset": 8}, "tiny.*local_num_experts is 0"),
        ({"preset": "tiny", "local_num_experts": 9}, "tiny.*local_num_experts is 9"),
        ({"preset": "tiny", "num_layers": 0}, "num_layers is 0"),
        ({"preset": "tiny", "seed": -1}, "seed -1"),
    ],
)
def test_bad_choices_are_refused_at_once(arguments: dict[str, object], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        synthetic_layers(**arguments)  # type: ignore[arg-type]
