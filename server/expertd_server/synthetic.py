"""Layers of well-known shapes with random weights, for benchmarks and load tests.

Their bytes depend on (seed, layer, global expert id) alone: servers with different slices hold slices of one layer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from expertd_server.errors import ConfigError
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

__all__ = ["PRESETS", "synthetic_layers", "synthetic_spec", "synthetic_weights"]

PRESETS: Mapping[str, LayerSpec] = {
    "tiny": LayerSpec(
        hidden_size=256,
        intermediate_size=128,
        num_experts=8,
        top_k=2,
        routing_method=RoutingMethod.RENORMALIZE,
    ),
    "qwen3-30b-a3b": LayerSpec(
        hidden_size=2048,
        intermediate_size=768,
        num_experts=128,
        top_k=8,
        routing_method=RoutingMethod.RENORMALIZE_NAIVE,
    ),
    "mixtral-8x7b": LayerSpec(
        hidden_size=4096,
        intermediate_size=14336,
        num_experts=8,
        top_k=2,
        routing_method=RoutingMethod.RENORMALIZE,
    ),
    "deepseek-v3": LayerSpec(
        hidden_size=7168,
        intermediate_size=2048,
        num_experts=256,
        top_k=8,
        routing_method=RoutingMethod.DEEPSEEK_V3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    "llama4-scout": LayerSpec(
        hidden_size=5120,
        intermediate_size=8192,
        num_experts=16,
        top_k=1,
        routing_method=RoutingMethod.LLAMA4,
        use_routing_scales_on_input=True,
    ),
    "nemotron-3-super": LayerSpec(
        hidden_size=4096,
        intermediate_size=2688,
        num_experts=512,
        top_k=22,
        routing_method=RoutingMethod.DEEPSEEK_V3,
        activation=Activation.RELU2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=5.0,
    ),
    "mistral-small-4": LayerSpec(
        hidden_size=4096,
        intermediate_size=2048,
        num_experts=128,
        top_k=4,
        routing_method=RoutingMethod.RENORMALIZE_NAIVE,
    ),
}
"""Named layer shapes, all experts local."""

GEMM1_INPUT_SCALE = 2.0**-6
"""Hidden states of unit variance reach +-7 before they saturate."""
GEMM2_INPUT_SCALE = 2.0**-4
"""Likewise the activation's output reaches +-28."""
# Clearing the top exponent bit of a random byte leaves every finite value below 2 and no NaN.
FINITE_MASK = np.uint64(0xBFBF_BFBF_BFBF_BFBF)
# Root mean square of those bytes as float8_e4m3fn values.
WEIGHT_RMS = float(
    torch.tensor([b for b in range(256) if not b & 0x40], dtype=torch.uint8)
    .view(torch.float8_e4m3fn)
    .float()
    .square()
    .mean()
    .sqrt()
)
# Root mean square of the activation's output for inputs of unit variance, roughly.
INTER_RMS: Mapping[bool, float] = {True: 0.6, False: 1.2}
BIAS_STREAM = 2**32 - 1
"""Stands in for an expert id where the random numbers are those of the whole layer."""


def synthetic_spec(preset: str, local_expert_offset: int = 0, local_num_experts: int | None = None) -> LayerSpec:
    """Shape of a preset's layers that hold a slice of the experts; None: all from the offset on.

    Raises ConfigError for an unknown preset, naming those that there are, and for a slice outside the layer.
    """
    if preset not in PRESETS:
        raise ConfigError(f"synthetic preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}")
    try:
        return dataclasses.replace(
            PRESETS[preset], local_expert_offset=local_expert_offset, local_num_experts=local_num_experts
        )
    except ValueError as error:
        raise ConfigError(f"synthetic preset {preset!r}: {error}") from error


def synthetic_layers(
    preset: str,
    num_layers: int = 1,
    *,
    local_expert_offset: int = 0,
    local_num_experts: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, LayerSpec, ExpertWeights]]:
    """Yield (name, spec, weights) of each layer; hidden states of unit variance give outputs of order 1.

    local_num_experts: None: all from the offset on. seed: at least 0.
    Raises ConfigError, before the first layer, for an unknown preset or a slice outside the layer.
    """
    spec = synthetic_spec(preset, local_expert_offset, local_num_experts)
    if num_layers < 1 or seed < 0:
        raise ConfigError(f"num_layers is {num_layers} and seed {seed}, expected at least 1 and at least 0")
    return (
        (f"synthetic.{preset}.{layer}", spec, synthetic_weights(spec, seed, layer).to(device))
        for layer in range(num_layers)
    )


def synthetic_weights(
    spec: LayerSpec, seed: int, layer: int, progress: Callable[[int], None] | None = None
) -> ExpertWeights:
    """Weights of layer number `layer` of a seed. progress: called with the number of bytes after each expert."""
    gemm1 = torch.empty(spec.num_local, spec.gemm1_rows, spec.hidden_size, dtype=torch.float8_e4m3fn)
    gemm2 = torch.empty(spec.num_local, spec.hidden_size, spec.intermediate_size, dtype=torch.float8_e4m3fn)
    output1, output1_gate, output2 = (torch.empty(spec.num_local) for _ in range(3))
    # Scales under which each product keeps unit variance.
    gemm1_scale = 1 / (WEIGHT_RMS * spec.hidden_size**0.5)
    gemm2_scale = 1 / (WEIGHT_RMS * spec.intermediate_size**0.5 * INTER_RMS[spec.activation.is_gated])

    def fill(local: int) -> int:
        random = np.random.SFC64(np.random.SeedSequence([seed, layer, spec.local_expert_offset + local]))
        # Scales differ by expert and projection, as those of real checkpoints do.
        up, gate, down = 0.75 + 0.5 * (random.random_raw(3) / 2.0**64)
        if spec.activation.is_gated:
            output1[local] = gemm1_scale * up * GEMM1_INPUT_SCALE / GEMM2_INPUT_SCALE
        else:
            output1[local] = 1 / GEMM2_INPUT_SCALE
        output1_gate[local] = gemm1_scale * gate * GEMM1_INPUT_SCALE
        output2[local] = gemm2_scale * down * GEMM2_INPUT_SCALE
        _fill(gemm1[local], random)
        _fill(gemm2[local], random)
        return gemm1[local].numel() + gemm2[local].numel()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # drawing does not need the interpreter
        for num_bytes in pool.map(fill, range(spec.num_local)):
            if progress is not None:
                progress(num_bytes)
    return ExpertWeights(
        gemm1_weights=gemm1,
        output1_scales_scalar=output1,
        output1_scales_gate_scalar=output1_gate,
        gemm2_weights=gemm2,
        output2_scales_scalar=output2,
        routing_bias=_bias(spec, seed, layer) if spec.routing_method.reads_bias else None,
        hidden_states_scale=1 / GEMM1_INPUT_SCALE,
    )


def _fill(weights: torch.Tensor, random: np.random.SFC64) -> None:
    """Random finite values into a contiguous float8_e4m3fn matrix, log-uniform in magnitude below 2."""
    words = random.random_raw(-(-weights.numel() // 8))
    words &= FINITE_MASK
    weights.view(torch.uint8).view(-1).numpy()[:] = words.view(np.uint8)[: weights.numel()]


def _bias(spec: LayerSpec, seed: int, layer: int) -> torch.Tensor:
    random = np.random.SFC64(np.random.SeedSequence([seed, layer, BIAS_STREAM]))
    uniform = random.random_raw(spec.num_experts) / 2.0**64
    return torch.from_numpy((0.1 * (uniform - 0.5)).astype(np.float32))
