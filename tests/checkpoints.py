"""Small random checkpoints in the layouts that model families use, and FP8 static copies of saved models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expertd_server.calibration import InputScales

E, K, H, I = 4, 2, 32, 16  # noqa: E741

_QWEN = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I, "norm_topk_prob": True}
_DEEPSEEK = {
    "n_routed_experts": E,
    "moe_intermediate_size": I,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Family:
    """How one model family spells things; the tests' own copy of the facts."""

    config: Mapping[str, Any]
    block: str
    gate: str | None
    up: str
    down: str
    layers: str = "model.layers"
    bias: str | None = None


_MLP = {"block": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_SPARSE = {"block": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"}
FAMILIES: dict[str, Family] = {
    "mixtral": Family({"model_type": "mixtral", "num_local_experts": E, "intermediate_size": I}, **_SPARSE),
    "qwen3_moe": Family(_QWEN, **_MLP),
    "qwen2_moe": Family({**_QWEN, "model_type": "qwen2_moe", "norm_topk_prob": False}, **_MLP),
    "deepseek_v3": Family({**_DEEPSEEK, "model_type": "deepseek_v3"}, bias="gate.e_score_correction_bias", **_MLP),
    "glm4_moe": Family({**_DEEPSEEK, "model_type": "glm4_moe"}, bias="gate.e_score_correction_bias", **_MLP),
    "minimax_m2": Family(
        {"model_type": "minimax_m2", "num_local_experts": E, "intermediate_size": I, "scoring_func": "sigmoid"},
        bias="e_score_correction_bias",
        **_SPARSE,
    ),
    "nemotron_h": Family(
        {
            "model_type": "nemotron_h",
            "n_routed_experts": E,
            "moe_intermediate_size": I,
            "mlp_hidden_act": "relu2",
            "hybrid_override_pattern": "EE",
            "routed_scaling_factor": 2.5,
        },
        block="mixer",
        gate=None,
        up="up_proj",
        down="down_proj",
        layers="backbone.layers",
        bias="gate.e_score_correction_bias",
    ),
}


@dataclass
class Draft:
    """A checkpoint before it is written: change `tensors` or `config`, then `write`."""

    family: Family
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def name(self, layer: int, expert: int, projection: str, suffix: str = "weight") -> str:
        """Name of an expert's tensor. projection: gate, up or down."""
        spelt = getattr(self.family, projection)
        return f"{self.layer_name(layer)}.{self.family.block}.experts.{expert}.{spelt}.{suffix}"

    def layer_name(self, layer: int) -> str:
        return f"{self.family.layers}.{layer}"

    def write(self, directory: Path, shards: int = 1) -> Path:
        """Write config.json and the tensors, an index too when there are several shards."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, directory / "model.safetensors")
            return directory
        names = sorted(self.tensors)
        size = -(-len(names) // shards)
        weight_map: dict[str, str] = {}
        for n in range(shards):
            file_name = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: self.tensors[name] for name in names[n * size : (n + 1) * size]}
            save_file(part, directory / file_name)
            weight_map |= dict.fromkeys(part, file_name)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory


def draft(family_name: str = "mixtral", *, fp8: bool = True, num_layers: int = 2, seed: int = 0) -> Draft:
    """A whole checkpoint with unequal scales everywhere, FP8 static or bfloat16."""
    family = FAMILIES[family_name]
    config = {
        "hidden_size": H,
        "num_experts_per_tok": K,
        "num_hidden_layers": num_layers,
        "hidden_act": "silu",
        **family.config,
    }
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    generator = torch.Generator().manual_seed(seed)
    result = Draft(family, config, {})
    for layer in range(num_layers):
        block = f"{result.layer_name(layer)}.{family.block}."
        result.tensors[f"{block}gate.weight"] = torch.randn(E, H, generator=generator).bfloat16()
        if family.bias is not None:
            result.tensors[block + family.bias] = torch.randn(E, generator=generator)
        result.tensors[f"{result.layer_name(layer)}.input_layernorm.weight"] = torch.ones(H).bfloat16()
        for expert in range(E):
            for projection in ("gate", "up", "down"):
                if getattr(family, projection) is None:
                    continue
                shape = (H, I) if projection == "down" else (I, H)
                weight = torch.randn(shape, generator=generator)
                if not fp8:
                    result.tensors[result.name(layer, expert, projection)] = weight.bfloat16()
                    continue
                scales = 0.01 + 0.02 * torch.rand(2, generator=generator)
                quantised = (weight * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
                result.tensors[result.name(layer, expert, projection)] = quantised
                result.tensors[result.name(layer, expert, projection, "weight_scale")] = scales[0].clone()
                result.tensors[result.name(layer, expert, projection, "input_scale")] = scales[1:].clone()
    return result


def save_static_fp8(source: Path, target: Path, input_scales: Mapping[str, InputScales]) -> None:
    """Write the FP8 static copy of a checkpoint that save_pretrained wrote: the scheme of AutoFP8, amax/448 per tensor.

    input_scales: by layer name; the second product's one per expert.
    """
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            layer_name, found, rest = name.rpartition(".experts.")
            if not found:
                tensors[name] = tensor
                continue
            expert, projection, _ = rest.split(".")
            scales = input_scales[layer_name.rpartition(".")[0]]
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            is_down = projection in ("down_proj", "w2")
            value = scales.gemm2[int(expert)] if is_down else scales.gemm1
            tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(value)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")


def save_dequantised(source: Path, target: Path) -> None:
    """Write the plain bfloat16 copy of an FP8 static checkpoint: weight times scale, for the model's own code."""
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    stored = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    tensors = {
        name: (tensor.float() * stored.get(f"{name}_scale", torch.ones(()))).bfloat16()
        for name, tensor in stored.items()
        if not name.endswith("_scale")
    }
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
