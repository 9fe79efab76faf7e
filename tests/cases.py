"""Seeded layers and inputs that every test of the layer draws from, on any device.

A case is a pure function of its arguments, so a failure message with the case's `name` is enough to see it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertd_server.fp8 import to_fp8
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

__all__ = [
    "LOGIT_PATTERNS",
    "Case",
    "make_case",
    "make_hidden_states",
    "make_logits",
    "make_spec",
    "make_weights",
    "relative_error",
    "visible_inter",
]

SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 16, "top_k": 4}


@dataclass(frozen=True)
class Case:
    """A layer with inputs for it. T num_tokens."""

    name: str
    spec: LayerSpec
    weights: ExpertWeights
    hidden_states: torch.Tensor
    """[T, H] float8_e4m3fn."""
    routing_logits: torch.Tensor
    """[T, E] float32."""

    def slice(self, offset: int, num_local: int) -> Case:
        """The same case on a server that holds only experts offset ... offset + num_local - 1."""
        spec = dataclasses.replace(self.spec, local_expert_offset=offset, local_num_experts=num_local)
        names = [
            f.name for f in dataclasses.fields(self.weights) if f.name not in ("routing_bias", "hidden_states_scale")
        ]
        held = {name: getattr(self.weights, name)[offset : offset + num_local].contiguous() for name in names}
        weights = dataclasses.replace(self.weights, **held)
        name = f"{self.name} experts {offset}+{num_local}"
        return dataclasses.replace(self, name=name, spec=spec, weights=weights)

    def to(self, device: torch.device | str) -> Case:
        """The same case with every tensor on a device."""
        moved = {n: getattr(self, n).to(device) for n in ("weights", "hidden_states", "routing_logits")}
        return dataclasses.replace(self, **moved)


def make_case(spec: LayerSpec, num_tokens: int, seed: int, *, logits: str = "random") -> Case:
    """A layer and num_tokens tokens for it; logits: a key of LOGIT_PATTERNS."""
    name = f"seed {seed}, T {num_tokens}, logits {logits}, {spec}"
    return Case(
        name,
        spec,
        make_weights(spec, seed),
        to_fp8(make_hidden_states(spec, num_tokens, seed) * 16.0),
        make_logits(spec, num_tokens, seed, logits),
    )


def make_spec(**overrides: object) -> LayerSpec:
    """A small layer: 16 experts of 128 x 64, 4 a token, where overrides do not say otherwise."""
    return LayerSpec(**{**SMALL, **overrides})  # type: ignore[arg-type]


def make_weights(spec: LayerSpec, seed: int) -> ExpertWeights:
    """Random weights with scales, different for each expert, that keep every stage inside the range of fp8."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    num_local, hidden_size, intermediate_size = spec.num_local, spec.hidden_size, spec.intermediate_size

    def spread(center: float) -> torch.Tensor:
        return center * (0.5 + torch.rand(num_local, generator=generator))

    gemm1 = torch.randn(num_local, spec.gemm1_rows, hidden_size, generator=generator) * 32.0
    gemm2 = torch.randn(num_local, hidden_size, intermediate_size, generator=generator) * 32.0
    # Hidden states have a deviation of 16, weights one of 32: the first product is then about 512 * sqrt(H).
    gate_scale = 1.0 / (512.0 * hidden_size**0.5)
    up_scale = gate_scale * 32.0 if spec.activation.is_gated else 32.0
    bias = None
    if spec.routing_method.reads_bias:
        bias = torch.randn(spec.num_experts, generator=generator) * 0.5  # of both signs
    return ExpertWeights(
        gemm1_weights=to_fp8(gemm1),
        output1_scales_scalar=spread(up_scale),
        output1_scales_gate_scalar=spread(gate_scale),
        gemm2_weights=to_fp8(gemm2),
        output2_scales_scalar=spread(1.0 / (512.0 * intermediate_size**0.5)),
        routing_bias=bias,
    )


def make_hidden_states(spec: LayerSpec, num_tokens: int, seed: int) -> torch.Tensor:
    """[T, H] float32 of deviation 1, a row depending on its number and the seed alone."""
    return _rows(num_tokens, spec.hidden_size, 2_000_000 + seed)


def make_logits(spec: LayerSpec, num_tokens: int, seed: int, pattern: str = "random") -> torch.Tensor:
    """[T, E] float32 by a key of LOGIT_PATTERNS."""
    return LOGIT_PATTERNS[pattern](_rows(num_tokens, spec.num_experts, 3_000_000 + seed))


def _rows(num_rows: int, num_columns: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def _one_expert(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, x.shape[1] // 2] = 20.0
    return x


def _some_nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[::3, 1] = torch.nan
    x[1::5] = torch.nan
    return x


LOGIT_PATTERNS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda x: x * 2.0,
    "bfloat16": lambda x: (x * 2.0).bfloat16().float(),  # many ties
    "all_equal": torch.zeros_like,
    "signed_zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
    "two_values": lambda x: (x > 0.5).float(),
    "saturated_high": lambda x: 40.0 + x * 10.0,  # sigmoid is 1.0 in float32
    "saturated_low": lambda x: -200.0 + x * 10.0,  # sigmoid is 0.0 in float32
    "one_dominates": lambda x: torch.where(x == x.amax(1, keepdim=True), 500.0, x),  # softmax is 1.0 and zeros
    "large": lambda x: x * 1e30,
    "masked": lambda x: torch.where(x < -1.0, -torch.inf, x),
    "one_expert": _one_expert,
    "some_nan": _some_nan,
}


def visible_inter(spec: LayerSpec, weights: ExpertWeights) -> tuple[LayerSpec, ExpertWeights]:
    """The same layer with a second product that copies `inter`: do_finalize=False then shows it, exact in bfloat16.

    hidden_size must be at least intermediate_size; columns beyond intermediate_size are zero.
    """
    assert spec.hidden_size >= spec.intermediate_size
    copy = torch.eye(spec.hidden_size, spec.intermediate_size, device=weights.device).to(torch.float8_e4m3fn)
    return spec, dataclasses.replace(
        weights,
        gemm2_weights=copy.repeat(spec.num_local, 1, 1),
        output2_scales_scalar=torch.ones_like(weights.output2_scales_scalar),
    )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of expected; 0 for two zeros."""
    got, expected = got.cpu().double(), expected.cpu().double()
    difference = float((got - expected).norm())
    return difference / float(expected.norm()) if difference else 0.0


def every_method() -> list[LayerSpec]:
    """One small layer for each row of the routing table, and for each of its variants."""
    method = RoutingMethod
    return [
        make_spec(routing_method=method.DEFAULT),
        make_spec(routing_method=method.RENORMALIZE),
        make_spec(routing_method=method.DEEPSEEK_V3, routed_scaling_factor=2.5),
        make_spec(routing_method=method.DEEPSEEK_V3, n_group=4, topk_group=2, routed_scaling_factor=2.5),
        make_spec(routing_method=method.DEEPSEEK_V3, n_group=8, topk_group=2),
        make_spec(routing_method=method.DEEPSEEK_V3, n_group=1, topk_group=1),
        make_spec(routing_method=method.LLAMA4, top_k=1),
        make_spec(routing_method=method.LLAMA4, top_k=1, use_routing_scales_on_input=True),
        make_spec(routing_method=method.RENORMALIZE_NAIVE),
        make_spec(routing_method=method.RENORMALIZE_NAIVE, norm_topk_prob=False),
        make_spec(routing_method=method.TOPK),
        make_spec(routing_method=method.SIGMOID_RENORM),
        make_spec(routing_method=method.SIGMOID_RENORM, norm_topk_prob=False),
        make_spec(routing_method=method.MINIMAX2, routed_scaling_factor=1.5),
        make_spec(routing_method=method.SIGMOID, top_k=16),
        make_spec(routing_method=method.RENORMALIZE, num_experts=3, top_k=3),
        make_spec(routing_method=method.DEFAULT, num_experts=1000, top_k=32, hidden_size=32, intermediate_size=16),
    ]


def spec_id(spec: LayerSpec) -> str:
    """A short name for pytest: what differs from the small layer."""
    default = make_spec()
    changed = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(default, f.name)]
    values = [f"{name}={getattr(spec, name)}" for name in changed if name not in ("routing_method", "activation")]
    return "-".join([spec.routing_method.name.lower(), Activation(spec.activation).name.lower(), *values])
