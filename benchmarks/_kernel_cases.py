"""The layers that the kernels are measured on: shapes of known models, random weights, inputs, and what they cost.

Random, but the same in every run, whatever else it measures: a case's weights and routing bias follow from its name,
inputs from that, the number of tokens and the kind of routing. Otherwise a slice of the experts would have a tenth more
rows in one run than in another, by the bias alone.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from expertd_server.backend import PreparedLayer
from expertd_server.cuda_call import Call
from expertd_server.routing import route
from expertd_server.synthetic import PRESETS
from expertd_server.tuning import skewed_logits
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend

__all__ = ["CASES", "make_call", "make_layer", "relative_error", "seed_of", "work"]

FP8 = torch.float8_e4m3fn
CASES = {
    "mixtral": PRESETS["mixtral-8x7b"],
    "qwen3": PRESETS["qwen3-30b-a3b"],
    "deepseek": replace(PRESETS["deepseek-v3"], local_num_experts=32),
    "scout": PRESETS["llama4-scout"],
    "nemotron": replace(PRESETS["nemotron-3-super"], n_group=None, topk_group=None),
}


def seed_of(*what: object) -> int:
    """A seed that is the same in every run for the same names and numbers."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def random_fp8(*shape: int, device: torch.device, size: float = 1.0) -> torch.Tensor:
    """Normal values, expert by expert so that the float copy stays small."""
    out = torch.empty(*shape, dtype=FP8, device=device)
    for part in out if len(shape) == 3 else (out,):
        part.copy_((torch.randn(part.shape, device=device, dtype=torch.bfloat16) * size).to(FP8))
    return out


def make_layer(backend: CudaBackend, spec: LayerSpec, max_num_tokens: int, seed: int) -> PreparedLayer:
    """A layer whose activations and outputs are of order 1. Seeds torch's generators."""
    torch.manual_seed(seed)
    experts, hidden, inter = spec.num_local, spec.hidden_size, spec.intermediate_size
    device = backend.device
    ones = torch.ones(experts, device=device)
    up = 16.0 if not spec.activation.is_gated else 16.0 / hidden**0.5
    weights = ExpertWeights(
        gemm1_weights=random_fp8(experts, spec.gemm1_rows, hidden, device=device),
        output1_scales_scalar=ones * up,
        output1_scales_gate_scalar=ones / hidden**0.5,
        gemm2_weights=random_fp8(experts, hidden, inter, device=device),
        output2_scales_scalar=ones / (16 * inter**0.5),
        routing_bias=torch.randn(spec.num_experts, device=device) * 0.01 if spec.routing_method.reads_bias else None,
    )
    return backend.prepare(spec, weights, max_num_tokens=max_num_tokens)


def make_call(layer: PreparedLayer, num_tokens: int, zipf: bool, touched: int | None, seed: int) -> Call:
    """Random inputs; touched: drawn until that many local experts are chosen, as many as the peers' runs had. Seeds
    torch's generators.
    """
    spec, device = layer.spec, layer.weights.device
    torch.manual_seed(seed)
    for _ in range(100):
        if zipf:
            logits = skewed_logits(spec, num_tokens, device)
        else:
            logits = torch.randn(num_tokens, spec.num_experts, device=device)
        if touched is None or zipf:
            break
        ids, _ = route(spec, logits, layer.weights.routing_bias)
        local = ids[(ids >= spec.local_expert_offset) & (ids < spec.local_expert_offset + spec.num_local)]
        if int(local.unique().numel()) == touched:  # type: ignore[no-untyped-call]
            break
    return Call(
        hidden_states=random_fp8(num_tokens, spec.hidden_size, device=device),
        logits=logits,
        in_ids=None,
        in_weights=None,
        topk_ids=torch.empty(num_tokens, spec.top_k, dtype=torch.int32, device=device),
        topk_weights=torch.empty(num_tokens, spec.top_k, dtype=torch.bfloat16, device=device),
        replay=None,
        num_valid=None,
        pdl=True,
        stream=0,
    )


def work(spec: LayerSpec, ids: torch.Tensor) -> dict[str, float]:
    """Bytes and FLOPs that a call cannot do without."""
    local = ids[(ids >= spec.local_expert_offset) & (ids < spec.local_expert_offset + spec.num_local)]
    touched = int(local.unique().numel())  # type: ignore[no-untyped-call]
    per_expert = (spec.gemm1_rows + spec.intermediate_size) * spec.hidden_size
    return {
        "rows": int(local.numel()),
        "experts": touched,
        "max_rows": int(local.bincount().max()) if local.numel() else 0,
        "bytes": touched * per_expert + 3 * ids.shape[0] * spec.hidden_size,
        "flops": 2 * local.numel() * per_expert,
    }


def relative_error(layer: PreparedLayer, call: Call, output: torch.Tensor, rows: int) -> float:
    """Of some rows, against float64 with the same routing and no rounding of the intermediate."""
    spec, w = layer.spec, layer.weights
    picked = torch.linspace(0, call.num_tokens - 1, min(rows, call.num_tokens), device=output.device).long()
    x = call.hidden_states.view(torch.uint8)[picked].view(FP8).double()
    expected = torch.zeros(len(picked), spec.hidden_size, dtype=torch.float64, device=output.device)
    for i, t in enumerate(picked.tolist()):
        for k in range(spec.top_k):
            e = int(call.topk_ids[t, k]) - spec.local_expert_offset
            if not 0 <= e < spec.num_local:
                continue
            weight = call.topk_weights[t, k].double()
            a = w.gemm1_weights[e].to(torch.float32).double() @ x[i]
            if spec.use_routing_scales_on_input:
                a, weight = a * weight, torch.ones_like(weight)
            gate_scale, scale = w.output1_scales_gate_scalar[e].double(), w.output1_scales_scalar[e].double()
            if spec.activation.is_gated:
                up, gate = a.chunk(2)
                inter = torch.nn.functional.silu(gate * gate_scale) * (up * scale)
            else:
                inter = (a * gate_scale).clamp(min=0) ** 2 * scale
            g = w.output2_scales_scalar[e].double() * (w.gemm2_weights[e].to(torch.float32).double() @ inter)
            expected[i] += weight * g
    return float((output[picked].double() - expected).norm() / expected.norm()) if float(expected.norm()) else 0.0
