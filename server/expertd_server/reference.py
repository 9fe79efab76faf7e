"""The specification of the layer: float64, plain loops, no tricks. Every backend is judged by this file.

Read it beside the steps of the operator: routing, first product, activation and requantisation, second product, sum.
Routing is float32 arithmetic by definition, because ties in float32 decide which expert is chosen; the exponential
alone is taken in float64 and rounded once. Everything after routing is float64 with the layer's own roundings: fp8
after the activation, bfloat16 after the second product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

__all__ = [
    "Reference",
    "expert_outputs",
    "forward",
    "quantize",
    "round_bfloat16",
    "round_fp8",
    "route",
    "selection_scores",
]

FP8_MAX = 448.0


@dataclass(frozen=True)
class Reference:
    """What the layer returns, and everything on the way. T num_tokens, K top_k, H hidden_size, I intermediate_size.

    Slots whose expert is not local hold zeros in `inter` and `g`.
    """

    topk_ids: torch.Tensor
    """[T, K] int32 global expert ids in slot order."""
    expert_weights: torch.Tensor
    """[T, K] bfloat16."""
    inter: torch.Tensor
    """[T, K, I] float8_e4m3fn, the input of the second product."""
    g: torch.Tensor
    """[T, K, H] bfloat16, the output of the second product."""
    sum: torch.Tensor
    """[T, H] float64, the output before its last rounding."""
    output: torch.Tensor
    """[T, H] bfloat16."""
    output_without_roundings: torch.Tensor
    """[T, H] float64 from an `inter` and a `g` that were never rounded."""


def forward(
    spec: LayerSpec,
    weights: ExpertWeights,
    hidden_states: torch.Tensor,
    *,
    routing_logits: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> Reference:
    """Evaluate the layer; arguments as `Backend.forward` takes them, on any device. Everything returned is on the CPU.

    hidden_states: [T, H] float8_e4m3fn, or a wider float type where the weights have hidden_states_scale.
    routing_logits: [T, E] float32 or bfloat16; or topk_ids [T, K] int32 and topk_weights [T, K] float32 or bfloat16.
    """
    weights = weights.to("cpu")
    hidden_states = hidden_states.cpu()
    if hidden_states.dtype != torch.float8_e4m3fn:
        assert weights.hidden_states_scale is not None
        hidden_states = quantize(hidden_states, weights.hidden_states_scale)
    x = hidden_states.double()
    if routing_logits is not None:
        topk_ids, expert_weights = route(spec, routing_logits.cpu(), weights.routing_bias)
    else:
        assert topk_ids is not None
        assert topk_weights is not None
        topk_ids, expert_weights = topk_ids.cpu(), topk_weights.cpu().to(torch.bfloat16)

    num_tokens = x.shape[0]
    w = expert_weights.double()
    inter = torch.zeros(num_tokens, spec.top_k, spec.intermediate_size, dtype=torch.float64)
    unrounded = torch.zeros(num_tokens, spec.hidden_size, dtype=torch.float64)
    for local in range(spec.num_local):
        slots = (topk_ids == spec.local_expert_offset + local).nonzero().tolist()
        if not slots:
            continue
        gemm1, gemm2 = weights.gemm1_weights[local].double(), weights.gemm2_weights[local].double()
        up_scale = weights.output1_scales_scalar[local].double()
        gate_scale = weights.output1_scales_gate_scalar[local].double()
        for t, k in slots:
            a = gemm1 @ x[t]
            output_weight = w[t, k]
            if spec.use_routing_scales_on_input:
                a, output_weight = a * w[t, k], torch.ones((), dtype=torch.float64)
            activated = _activate(spec.activation, a, up_scale, gate_scale)
            inter[t, k] = round_fp8(activated)
            unrounded[t] += output_weight * (weights.output2_scales_scalar[local].double() * (gemm2 @ activated))

    g = expert_outputs(spec, weights, topk_ids, inter)
    total = torch.zeros(num_tokens, spec.hidden_size, dtype=torch.float64)
    for t in range(num_tokens):
        for k in range(spec.top_k):
            if _is_local(spec, int(topk_ids[t, k])):
                total[t] += g[t, k] if spec.use_routing_scales_on_input else w[t, k] * g[t, k]
    return Reference(
        topk_ids=topk_ids,
        expert_weights=expert_weights,
        inter=inter.to(torch.float8_e4m3fn),
        g=g.to(torch.bfloat16),
        sum=total,
        output=round_bfloat16(total).to(torch.bfloat16),
        output_without_roundings=unrounded,
    )


def expert_outputs(
    spec: LayerSpec, weights: ExpertWeights, topk_ids: torch.Tensor, inter: torch.Tensor
) -> torch.Tensor:
    """The second product of a given `inter` [T, K, I]: g [T, K, H] float64, rounded to bfloat16 values."""
    g = torch.zeros(*topk_ids.shape, spec.hidden_size, dtype=torch.float64)
    for local in range(spec.num_local):
        slots = (topk_ids == spec.local_expert_offset + local).nonzero().tolist()
        gemm2 = weights.gemm2_weights[local].double()
        for t, k in slots:
            g[t, k] = round_bfloat16(weights.output2_scales_scalar[local].double() * (gemm2 @ inter[t, k].double()))
    return g


def route(
    spec: LayerSpec, routing_logits: torch.Tensor, routing_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts: topk_ids [T, K] int32 and expert_weights [T, K] bfloat16."""
    num_tokens = routing_logits.shape[0]
    ids = torch.empty(num_tokens, spec.top_k, dtype=torch.int32)
    weights = torch.empty(num_tokens, spec.top_k, dtype=torch.float32)
    for t in range(num_tokens):
        logits = routing_logits[t].float()
        chosen = _select(spec, _selection_scores(spec, logits, routing_bias))
        ids[t] = torch.tensor(chosen)
        weights[t] = _routing_weights(spec, logits, chosen)
    return ids, weights.to(torch.bfloat16)


def selection_scores(spec: LayerSpec, routing_logits: torch.Tensor, routing_bias: torch.Tensor | None) -> torch.Tensor:
    """The scores that experts are chosen by, in float64 [T, E]: close ones may be chosen in either order."""
    return torch.stack([_selection_scores(spec, row.double(), routing_bias) for row in routing_logits.cpu()])


def _selection_scores(spec: LayerSpec, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    match spec.routing_method:
        case RoutingMethod.DEFAULT | RoutingMethod.RENORMALIZE_NAIVE:
            return _softmax(logits)
        case RoutingMethod.RENORMALIZE | RoutingMethod.LLAMA4 | RoutingMethod.TOPK:
            return logits
        case RoutingMethod.SIGMOID_RENORM | RoutingMethod.SIGMOID:
            return _sigmoid(logits)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            return _sigmoid(logits) if bias is None else _sigmoid(logits) + bias.cpu().to(logits.dtype)


def _select(spec: LayerSpec, scores: torch.Tensor) -> list[int]:
    """The K best experts, best first; of equals the smaller id; NaN counts as the greatest."""

    def rank(score: float) -> tuple[bool, float]:
        return (False, 0.0) if math.isnan(score) else (True, -score)

    values: list[float] = scores.tolist()
    candidates = list(range(spec.num_experts))
    if spec.is_grouped:
        assert spec.n_group is not None
        size = spec.num_experts // spec.n_group
        group_scores = []
        for group in range(spec.n_group):
            best, second = sorted(range(group * size, (group + 1) * size), key=lambda e: rank(values[e]))[:2]
            group_scores.append(float(scores[best] + scores[second]))  # summed in the scores' own precision
        kept = sorted(range(spec.n_group), key=lambda group: (rank(group_scores[group]), group))[: spec.topk_group]
        candidates = [e for e in candidates if e // size in kept]
    return sorted(candidates, key=lambda e: (rank(values[e]), e))[: spec.top_k]


def _routing_weights(spec: LayerSpec, logits: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Routing weights of the chosen experts, [K] float32."""
    factor = 1.0 if spec.routed_scaling_factor is None else spec.routed_scaling_factor
    match spec.routing_method:
        case RoutingMethod.DEFAULT:
            w = _softmax(logits)[chosen]
        case RoutingMethod.RENORMALIZE:
            w = _softmax(logits[chosen])
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            s = _sigmoid(logits)[chosen]
            w = s / (s.sum() + 1e-20) * factor
        case RoutingMethod.RENORMALIZE_NAIVE:
            s = _softmax(logits)[chosen]
            w = s / s.sum() if spec.norm_topk_prob else s
        case RoutingMethod.TOPK:
            w = logits[chosen]
        case RoutingMethod.SIGMOID_RENORM:
            s = _sigmoid(logits)[chosen]
            w = s / (s.sum() + 1e-20) if spec.norm_topk_prob else s
        case RoutingMethod.LLAMA4 | RoutingMethod.SIGMOID:
            w = _sigmoid(logits)[chosen]
    return w


def _softmax(x: torch.Tensor) -> torch.Tensor:
    e = _exp(x - x.max())
    return e / e.sum()


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + _exp(-x))


def _exp(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x.double()).to(x.dtype)


def _activate(
    activation: Activation, a: torch.Tensor, up_scale: torch.Tensor, gate_scale: torch.Tensor
) -> torch.Tensor:
    """Step 3 before its rounding: a [M] to [I]."""
    if activation.is_gated:
        up, gate = a.chunk(2)
        return _act(activation, gate * gate_scale) * (up * up_scale)
    return _act(activation, a * gate_scale) * up_scale


def _act(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    match activation:
        case Activation.GELU | Activation.GEGLU:
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        case Activation.SWIGLU:
            return x * _sigmoid(x)
        case Activation.RELU2:
            return x.clamp(min=0) ** 2
        case Activation.IDENTITY:
            return x


def _is_local(spec: LayerSpec, expert: int) -> bool:
    return spec.local_expert_offset <= expert < spec.local_expert_offset + spec.num_local


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """fp8(x * scale), the product in float32: float8_e4m3fn of x's shape."""
    product = x.float() * torch.tensor(scale, dtype=torch.float32)
    return round_fp8(product.double()).to(torch.float8_e4m3fn)


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """float64 to the nearest float8_e4m3fn value, ties to even, saturating at +-448; NaN stays NaN."""
    return _round(x, mantissa_bits=3, min_exponent=-6).clamp(-FP8_MAX, FP8_MAX)


def round_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """float64 to the nearest bfloat16 value, ties to even, in one rounding (a cast goes through float32)."""
    return _round(x, mantissa_bits=7, min_exponent=-126)


def _round(x: torch.Tensor, mantissa_bits: int, min_exponent: int) -> torch.Tensor:
    exponent = torch.frexp(x).exponent.double() - 1  # frexp's mantissa lies in [0.5, 1)
    step = torch.exp2(exponent.clamp(min=min_exponent) - mantissa_bits)
    return torch.where(torch.isfinite(x), torch.round(x / step) * step, x)
