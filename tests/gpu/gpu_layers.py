"""Random layers and the comparison with the reference, for the GPU tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expertd_server import reference
from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.backend_cuda import FAMILIES, CudaBackend
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

FP8 = torch.float8_e4m3fn


def make_spec(**fields: Any) -> LayerSpec:
    """A small layer; fields override."""
    defaults: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 112, "num_experts": 16, "top_k": 4}
    spec = {**defaults, **fields}
    if spec.get("routing_method") == RoutingMethod.LLAMA4:
        spec["top_k"] = 1
    return LayerSpec(**spec)


def make_weights(spec: LayerSpec, seed: int, *, hidden_states_scale: float | None = None) -> ExpertWeights:
    """Random weights on the GPU whose activations and outputs are of order 1 and use much of the range of fp8."""
    g = torch.Generator("cuda").manual_seed(seed)

    def fp8(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, device="cuda") * 4).to(FP8)

    def scales(size: float) -> torch.Tensor:
        return (torch.rand(spec.num_local, generator=g, device="cuda") + 0.5) * size

    # Sums of n products of deviation 4 * 1; the activation's output is scaled to a deviation of about 16.
    inner, outer = spec.hidden_size**0.5 * 4, spec.intermediate_size**0.5 * 64
    scale = 16.0 if not spec.activation.is_gated else 16.0 / inner
    bias = None
    if spec.routing_method.reads_bias:
        bias = torch.randn(spec.num_experts, generator=g, device="cuda")
        bias = bias.to(torch.bfloat16) if seed % 2 else bias
    return ExpertWeights(
        gemm1_weights=fp8(spec.num_local, spec.gemm1_rows, spec.hidden_size),
        output1_scales_scalar=scales(scale),
        output1_scales_gate_scalar=scales(1 / inner),
        gemm2_weights=fp8(spec.num_local, spec.hidden_size, spec.intermediate_size),
        output2_scales_scalar=scales(1 / outer),
        routing_bias=bias,
        hidden_states_scale=hidden_states_scale,
    )


def make_inputs(spec: LayerSpec, num_tokens: int, seed: int, *, skew: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states [T, H] fp8 and routing_logits [T, E]; skew > 0 favours the first experts."""
    g = torch.Generator("cuda").manual_seed(seed + 1)
    hidden_states = torch.randn(num_tokens, spec.hidden_size, generator=g, device="cuda").to(FP8)
    logits = torch.randn(num_tokens, spec.num_experts, generator=g, device="cuda") * 2
    logits -= skew * torch.arange(spec.num_experts, device="cuda").log1p()
    return hidden_states, logits.to(torch.bfloat16) if seed % 2 else logits


def prepared(backend: CudaBackend, seed: int, *, max_num_tokens: int = 256, **fields: Any) -> PreparedLayer:
    """A random layer, ready to run."""
    spec = make_spec(**fields)
    return backend.prepare(spec, make_weights(spec, seed), max_num_tokens=max_num_tokens)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bytes, so that NaN equals NaN and -0 differs from +0."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def fp8_ordinal(x: torch.Tensor) -> torch.Tensor:
    """Position of fp8 values on the number line, so that neighbours differ by 1; both zeros are 0."""
    bits = x.view(torch.uint8).short()
    return torch.where(bits >= 128, -(bits - 128), bits)


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN never passes a comparison with it."""
    expected = expected.double()
    norm = float(expected.norm())
    return float((value.double() - expected).norm()) / norm if norm else float(value.double().norm())


@dataclass
class Agreement:
    """How a call compares with the reference."""

    inter_exact: int
    inter_total: int
    g_error: float
    output_error: float


def inter_rows(backend: CudaBackend, layer: PreparedLayer, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first product's rows [R, I] fp8 of the last call on this stream, and the row of each slot [T * K]."""
    spec, state = layer.spec, layer.state
    scratch = state.scratch(max(num_tokens, state.max_num_tokens))
    slab = backend._workspaces.current()
    rows = num_tokens * min(spec.top_k, spec.num_local)
    start = scratch.offsets["inter"]
    inter = slab[start : start + rows * spec.intermediate_size].view(FP8).view(rows, -1).cpu()
    start = scratch.offsets["expanded_to_row"]
    slots = slab[start : start + num_tokens * spec.top_k * 4].view(torch.int32).cpu()
    return inter, slots


def check_routing(spec: LayerSpec, weights: ExpertWeights, logits: torch.Tensor, result: MoEOutput, where: str) -> None:
    """Ids equal wherever the float64 scores are apart; weights within a bfloat16 step of the reference's."""
    cpu = weights.to("cpu")
    ids, expected = reference.route(spec, logits.cpu(), cpu.routing_bias)
    got = result.topk_ids.cpu()
    scores = reference.selection_scores(spec, logits, cpu.routing_bias)
    a, b = scores.gather(1, ids.long()), scores.gather(1, got.long())
    apart = (a - b).abs() > 1e-6 * torch.maximum(a.abs(), b.abs()) + 1e-30
    if spec.is_grouped:  # near-equal group scores may let another group in
        apart &= ids != got
        assert int(apart.any(1).sum()) <= max(1, len(ids) // 100), f"{where}: ids differ\n{ids}\n{got}"
    else:
        assert not apart.any(), f"{where}: ids differ\n{ids[apart.any(1)]}\n{got[apart.any(1)]}"
    same = ids == got
    torch.testing.assert_close(
        result.expert_weights.cpu()[same], expected[same], rtol=2**-7, atol=1e-30, msg=lambda m: f"{where}: {m}"
    )


def check_call(
    backend: CudaBackend, layer: PreparedLayer, num_tokens: int, seed: int, *, skew: float = 0.0, where: str = ""
) -> Agreement:
    """Run one call and compare every stage with the reference."""
    spec, weights = layer.spec, layer.weights
    hidden_states, logits = make_inputs(spec, num_tokens, seed, skew=skew)
    where = f"{where} seed {seed}, T {num_tokens}, {spec}"
    result = backend.forward(layer, hidden_states, routing_logits=logits)
    inter, slots = inter_rows(backend, layer, num_tokens)
    check_routing(spec, weights, logits, result, where)
    ids, cpu = result.topk_ids.cpu(), weights.to("cpu")
    expected = reference.forward(spec, cpu, hidden_states.cpu(), topk_ids=ids, topk_weights=result.expert_weights.cpu())
    local = ((ids >= spec.local_expert_offset) & (ids < spec.local_expert_offset + spec.num_local)).flatten()
    assert torch.equal(slots >= 0, local), f"{where}: rows of slots that are not local, or none of those that are"
    assert len(set(slots[local].tolist())) == int(local.sum()), f"{where}: two slots share a row"
    mine = torch.zeros(num_tokens * spec.top_k, spec.intermediate_size, dtype=FP8)
    mine[local] = inter[slots[local].long()]
    theirs = expected.inter.flatten(0, 1)
    steps = (fp8_ordinal(mine) - fp8_ordinal(theirs))[local].abs()
    # Near zero the steps of fp8 get finer than the tensor core's sums: 2^-13 of the largest partial sum.
    off = (mine.double() - theirs.double())[local].abs()
    sums_error = 4e-3 * theirs.double()[local].square().mean().sqrt() if steps.numel() else 0.0
    wrong = (steps > 1) & (off > sums_error)
    assert not wrong.any(), f"{where}: inter off by {int(steps[wrong].max())} fp8 steps, {float(off[wrong].max())}"
    given = reference.expert_outputs(spec, cpu, ids, mine.view(num_tokens, spec.top_k, -1))
    scale = 1.0 if spec.use_routing_scales_on_input else result.expert_weights.cpu().double()[..., None]
    assert result.output is not None
    g_error = error(result.output.cpu(), (given * scale).sum(1))
    output_error = error(result.output.cpu(), expected.output)
    assert g_error < 4e-3, f"{where}: {g_error:.1e} from the output that its own inter gives"
    # One neighbour among few values weighs more than the contract's bound, which is about whole layers.
    assert output_error < (2e-2 if steps.numel() >= 4096 else 6e-2), f"{where}: output error {output_error:.1e}"
    return Agreement(int((steps == 0).sum()), steps.numel(), g_error, output_error)


ACTIVATIONS = list(Activation)
TILE_FAMILIES = tuple(FAMILIES)
METHODS = list(RoutingMethod)
