"""Writing an unquantised checkpoint anew in FP8, with weights that are rounded where it hurts least.

Rounding each weight to the nearest value is what loading does. With real tokens at hand more is possible: round the
weights of a row one after the other, and let those that are left make up for the error so far, as far as the tokens
cannot tell the difference (the method known as GPTQ or optimal brain quantisation). This is done once, into a
checkpoint that all servers read, because the roundings follow from floating-point sums: made by each server for itself,
they would differ from one kind of CPU to another, and so would answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expertd_server.calibration import InputScales, activate
from expertd_server.checkpoint import Checkpoint, LayerAccount
from expertd_server.dialects import Kind, Projection
from expertd_server.errors import CheckpointError
from expertd_server.fp8 import FP8_MAX, from_fp8, quantize_fp8, to_fp8
from expertd_server.tensor_files import INDEX_NAME, PICKLE_PATTERNS, read_json

__all__ = ["export_fp8", "round_compensated"]

_BLOCK_COLUMNS = 64
_DAMPING = 0.01
"""Of the mean square of an input, added to each: directions that no token took are not free to use."""


def export_fp8(
    source: Checkpoint, target: Path, samples: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, InputScales]:
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
        scales[name], tensors = _quantize_layer(source, account, *samples[name])
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


def round_compensated(weight: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """weight [M, K] to float8_e4m3fn so that products with inputs like those measured change little.

    second_moment: [K, K], the mean of x x^T over inputs x. All zeros: every weight is rounded to the nearest value.
    """
    rest = weight.float().t().clone(memory_format=torch.contiguous_format)  # [K, M]
    mean_square = second_moment.diagonal().double().mean()
    if not mean_square > 0:
        return to_fp8(weight.float())
    damped = second_moment.double() + _DAMPING * mean_square * torch.eye(len(second_moment), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    # Row k: how the weights from k on make up for an error of 1 in weight k, times factor[k, k].
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    rounded = torch.empty(rest.shape, dtype=torch.float8_e4m3fn)
    for start in range(0, len(rest), _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, len(rest))
        block, errors = rest[start:stop], torch.empty(stop - start, rest.shape[1])
        for k in range(stop - start):
            own = factor[start + k, start:stop]
            rounded[start + k] = to_fp8(block[k])
            errors[k] = (block[k] - rounded[start + k].float()) / own[k]
            block[k + 1 :].addr_(own[k + 1 :], errors[k], alpha=-1.0)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    return rounded.t().contiguous()


def _quantize_layer(
    source: Checkpoint, account: LayerAccount, hidden_states: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[InputScales, dict[str, torch.Tensor]]:
    """Input scales of a layer, and its experts' tensors under the names of the checkpoint's dialect."""
    spec, layer_name = account.spec, account.layer_name
    inputs = source.measure(layer_name, hidden_states, topk_ids)
    tensors: dict[str, torch.Tensor] = {}

    def quantize(
        second_moment: torch.Tensor, input_scales: dict[tuple[int, Projection], float]
    ) -> dict[tuple[int, Projection], torch.Tensor]:
        """Keep the rounded weights of these experts' projections, and return their real values."""
        real = {key: source.projection(layer_name, *key) for key in input_scales}
        scales = {key: weight.abs().max() / FP8_MAX for key, weight in real.items()}
        scaled = torch.cat([weight / scales[key] for key, weight in real.items()])
        rounded = round_compensated(scaled, second_moment).split([len(weight) for weight in real.values()])  # type: ignore[no-untyped-call]
        for (key, input_scale), codes in zip(input_scales.items(), rounded, strict=True):
            name = account.tensors[*key, Kind.WEIGHT]
            tensors[name] = codes.clone()
            tensors[f"{name}_scale"] = scales[key]
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(input_scale)
            real[key] = from_fp8(codes, torch.float32) * scales[key]
        return real

    x = _rounded(hidden_states, inputs.gemm1)
    projections = (Projection.GATE, Projection.UP) if spec.activation.is_gated else (Projection.UP,)
    keys = [(expert, projection) for expert in range(spec.num_experts) for projection in projections]
    first = quantize(x.T @ x / len(x), dict.fromkeys(keys, inputs.gemm1))
    for expert, input_scale in enumerate(inputs.of_experts(spec.num_experts)):
        tokens = x[(topk_ids == expert).any(dim=1)]
        gate = tokens @ first[expert, Projection.GATE].T if spec.activation.is_gated else None
        inter = _rounded(activate(spec.activation, gate, tokens @ first[expert, Projection.UP].T), input_scale)
        quantize(inter.T @ inter / max(1, len(inter)), {(expert, Projection.DOWN): input_scale})
    return inputs, tensors


def _rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    return from_fp8(quantize_fp8(x, 1.0 / scale), torch.float32) * scale


def _copy_other_files(source: Path, target: Path) -> None:
    weights = ("*.safetensors", "*.safetensors.index.json", *PICKLE_PATTERNS)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not any(path.match(pattern) for pattern in weights):
            shutil.copy2(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
