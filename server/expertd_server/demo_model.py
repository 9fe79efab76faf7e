"""A small random language model of the Mixtral kind, its text, and its FP8 checkpoint: what the demo serves.

Real in all that matters to a server: the Hugging Face layout, static scales calibrated on the hidden states of real
text, and hidden states that come out of attention and norms, not out of a random number generator.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from expertd_server.calibration import InputScales, measure_input_scales
from expertd_server.fp8 import FP8_MAX, to_fp8
from expertd_server.types import Activation

__all__ = ["TEXT", "Activity", "DemoModel"]

# Charles Darwin, On the Origin of Species (1859), from its last chapter; in the public domain.
TEXT = (
    b"It is interesting to contemplate an entangled bank, clothed with many plants of many kinds, with birds singing "
    b"on the bushes, with various insects flitting about, and with worms crawling through the damp earth, and to "
    b"reflect that these elaborately constructed forms, so different from each other, and dependent on each other in "
    b"so complex a manner, have all been produced by laws acting around us. These laws, taken in the largest sense, "
    b"being Growth with Reproduction; Inheritance which is almost implied by reproduction; Variability from the "
    b"indirect and direct action of the external conditions of life, and from use and disuse; a Ratio of Increase so "
    b"high as to lead to a Struggle for Life, and as a consequence to Natural Selection, entailing Divergence of "
    b"Character and the Extinction of less-improved forms. Thus, from the war of nature, from famine and death, the "
    b"most exalted object which we are capable of conceiving, namely, the production of the higher animals, directly "
    b"follows. There is grandeur in this view of life, with its several powers, having been originally breathed into "
    b"a few forms or into one; and that, whilst this planet has gone cycling on according to the fixed law of gravity, "
    b"from so simple a beginning endless forms most beautiful and most wonderful have been, and are being, evolved."
)

VOCABULARY = 256
HIDDEN_SIZE = 512
INTERMEDIATE_SIZE = 1024
NUM_EXPERTS = 8
TOP_K = 2
NUM_LAYERS = 4
SEED = 1859


@dataclass(frozen=True)
class Activity:
    """One MoE block at work on a text. T num_tokens, H hidden_size, E num_experts, K top_k."""

    layer_name: str
    hidden_states: torch.Tensor
    """[T, H] float32, what the block gets."""
    logits: torch.Tensor
    """[T, E] float32, its router's."""
    topk_ids: torch.Tensor
    """[T, K] its router's choice."""
    output: torch.Tensor
    """[T, H] float32, what it gives."""


@dataclass(frozen=True)
class _Matrix:
    """An FP8 weight with its scale: the model is made of such weights, there is no finer original."""

    stored: torch.Tensor
    """[rows, columns] float8_e4m3fn."""
    scale: torch.Tensor
    """[] float32."""
    real: torch.Tensor
    """stored * scale, float32."""

    @classmethod
    def random(cls, generator: torch.Generator, rows: int, columns: int) -> _Matrix:
        drawn = torch.randn(rows, columns, generator=generator) / columns**0.5
        scale = drawn.abs().max() / FP8_MAX
        stored = to_fp8(drawn / scale)
        return cls(stored, scale, stored.float() * scale)


class _Layer:
    """Attention with one head, then the MoE block, each on normalised inputs and added to the stream."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        self.name = name
        self.qkv = torch.randn(3, HIDDEN_SIZE, HIDDEN_SIZE, generator=generator) / HIDDEN_SIZE**0.5
        self.router = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=generator) / HIDDEN_SIZE**0.5
        shapes = {
            "w1": (INTERMEDIATE_SIZE, HIDDEN_SIZE),  # gate
            "w3": (INTERMEDIATE_SIZE, HIDDEN_SIZE),  # up
            "w2": (HIDDEN_SIZE, INTERMEDIATE_SIZE),  # down
        }
        self.experts = [
            {name: _Matrix.random(generator, *shape) for name, shape in shapes.items()} for _ in range(NUM_EXPERTS)
        ]

    def attend(self, stream: torch.Tensor) -> torch.Tensor:
        query, key, value = (_normalised(stream) @ matrix.T for matrix in self.qkv)
        return functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]

    def moe(self, hidden_states: torch.Tensor) -> Activity:
        """The MoE block as Mixtral defines it, in float32."""
        logits = hidden_states @ self.router.T
        weights, ids = logits.softmax(dim=-1).topk(TOP_K, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            token, slot = (ids == index).nonzero(as_tuple=True)
            gate, up = (hidden_states[token] @ expert[name].real.T for name in ("w1", "w3"))
            output[token] += weights[token, slot, None] * ((functional.silu(gate) * up) @ expert["w2"].real.T)
        return Activity(self.name, hidden_states, logits, ids, output)


class DemoModel:
    """The model. Bytes are its tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self._embedding = torch.randn(VOCABULARY, HIDDEN_SIZE, generator=generator)
        self._layers = [_Layer(f"model.layers.{n}", generator) for n in range(NUM_LAYERS)]

    def run(self, text: bytes) -> list[Activity]:
        """Every MoE block at work on the text, one token a byte."""
        stream = self._embedding[torch.tensor(list(text))]
        activities = []
        for layer in self._layers:
            stream = stream + layer.attend(stream)
            activities.append(layer.moe(_normalised(stream)))
            stream = stream + activities[-1].output
        return activities

    def save(self, directory: Path, calibration_text: bytes) -> None:
        """Write a Hugging Face checkpoint, one file a layer, with input scales measured on the text."""
        config = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": INTERMEDIATE_SIZE,
            "num_hidden_layers": NUM_LAYERS,
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "hidden_act": "silu",
            "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"},
        }
        weight_map: dict[str, str] = {}
        for number, (layer, activity) in enumerate(zip(self._layers, self.run(calibration_text), strict=True), start=1):
            file_name = f"model-{number:05d}-of-{NUM_LAYERS:05d}.safetensors"
            tensors = dict(_tensors(layer, _measure(layer, activity)))
            save_file(tensors, directory / file_name)
            weight_map |= dict.fromkeys(tensors, file_name)
        _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        _write_json(directory / "config.json", config)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (HIDDEN_SIZE,), eps=1e-5)


def _measure(layer: _Layer, activity: Activity) -> InputScales:
    def gemm1_weights_of(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.experts[expert]["w1"].real, layer.experts[expert]["w3"].real

    return measure_input_scales(
        activity.hidden_states, activity.topk_ids, NUM_EXPERTS, Activation.SWIGLU, gemm1_weights_of
    )


def _tensors(layer: _Layer, scales: InputScales) -> Iterator[tuple[str, torch.Tensor]]:
    block = f"{layer.name}.block_sparse_moe"
    yield f"{block}.gate.weight", layer.router
    for index, expert in enumerate(layer.experts):
        for name, matrix in expert.items():
            projection = f"{block}.experts.{index}.{name}"
            yield f"{projection}.weight", matrix.stored
            yield f"{projection}.weight_scale", matrix.scale
            yield f"{projection}.input_scale", torch.tensor(scales.gemm2[index] if name == "w2" else scales.gemm1)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
