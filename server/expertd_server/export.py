"""Writing an unquantised checkpoint anew in FP8, with weights that are rounded where it hurts least (compensation.py).

Loading does the same with the tokens of a calibration file. Done once, into a checkpoint that all servers read, it
costs no time at start, and the servers hold the same bytes whatever CPUs they have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expertd_server.calibration import InputScales, Tokens
from expertd_server.checkpoint import Checkpoint, LayerAccount
from expertd_server.compensation import LayerInputs
from expertd_server.dialects import Kind, Projection
from expertd_server.errors import CheckpointError
from expertd_server.tensor_files import INDEX_NAME, PICKLE_PATTERNS, read_json

__all__ = ["export_fp8"]


def export_fp8(source: Checkpoint, target: Path, samples: Mapping[str, Tokens]) -> dict[str, InputScales]:
    """Write the static FP8 form of a bfloat16, float16 or float32 checkpoint to a new directory.

    samples: for each layer name, what its MoE block gets and chooses on text that is like what it will see:
    hidden_states [T, H] floating point and topk_ids [T, K]. Some thousands of tokens; more experts need more.
    Input scales are measured on them as `Checkpoint.measure` does, and are returned. Tensors that are no expert's, and
    files that are neither weights nor configuration, are copied. Takes minutes for each layer of a large model.
    Raises CheckpointError when target exists, a layer has no sample, or the checkpoint is quantised already.
    """
    missing = [name for name in source.layer_names if name not in samples]
    if missing:
        raise CheckpointError(f"samples has no tokens for {', '.join(missing)}; it has {', '.join(samples) or 'none'}")
    accounts = [source.account(name, need_input_scales=False) for name in source.layer_names]
    for account in accounts:
        account.raise_problems()
        if account.num_fp8_weights:
            raise CheckpointError(f"{account.layer_name!r} of {source.path} is in FP8 already, expected wider weights")
    try:
        target.mkdir(parents=True)
    except FileExistsError as error:
        raise CheckpointError(f"{target} exists, expected the name of a new directory") from error
    num_files = len(accounts) + 1
    scales: dict[str, InputScales] = {}
    weight_map: dict[str, str] = {}
    written: set[str] = set()

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file_name = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        save_file(tensors, target / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))

    for number, account in enumerate(accounts, start=1):
        name = account.layer_name
        scales[name], tensors = _quantize_layer(source, account, samples[name])
        written |= tensors.keys()
        write(number, tensors)
    others = {name: source.files.read(name).clone() for name in source.files.names if name not in written}
    write(num_files, others)
    _write_json(target / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    config = read_json(source.files.directory / "config.json")
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    _write_json(target / "config.json", {**config, "quantization_config": quantization})
    _copy_other_files(source.files.directory, target)
    return scales


def _quantize_layer(
    source: Checkpoint, account: LayerAccount, tokens: Tokens
) -> tuple[InputScales, dict[str, torch.Tensor]]:
    """Input scales of a layer, and its experts' tensors under the names of the checkpoint's dialect."""
    spec, layer_name = account.spec, account.layer_name
    inputs = source.measure(layer_name, *tokens)
    layer_inputs = LayerInputs.of(spec, tokens, inputs)
    tensors: dict[str, torch.Tensor] = {}
    gemm1, gemm2 = (spec.intermediate_size, spec.hidden_size), (spec.hidden_size, spec.intermediate_size)
    shapes = {Projection.UP: gemm1, Projection.DOWN: gemm2}
    if spec.activation.is_gated:
        shapes[Projection.GATE] = gemm1
    for expert, gemm2_input_scale in enumerate(inputs.of_experts(spec.num_experts)):
        places = {projection: torch.empty(shape, dtype=torch.float8_e4m3fn) for projection, shape in shapes.items()}
        scales = source.read_expert(account, expert, places, layer_inputs)
        for projection, codes in places.items():
            name = account.tensors[expert, projection, Kind.WEIGHT]
            input_scale = gemm2_input_scale if projection is Projection.DOWN else inputs.gemm1
            tensors[name] = codes
            tensors[f"{name}_scale"] = torch.tensor(scales[projection])
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(input_scale)
    return inputs, tensors


def _copy_other_files(source: Path, target: Path) -> None:
    weights = ("*.safetensors", "*.safetensors.index.json", *PICKLE_PATTERNS)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not any(path.match(pattern) for pattern in weights):
            shutil.copy2(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
