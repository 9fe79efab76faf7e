"""What a checkpoint's configuration says about its quantisation, and why some kinds cannot be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertd_server.errors import CheckpointError

__all__ = ["HOW_TO_CONVERT", "check_quantization"]

HOW_TO_CONVERT = (
    "To convert: dequantise the weights to bfloat16, save them with save_pretrained, and either quantise the model to "
    "FP8 with static per-tensor scales (llm-compressor scheme FP8, ModelOpt quant_algo FP8) or serve the bfloat16 "
    "weights as they are with a calibration file, which quantises them at load"
)


def check_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None) -> str:
    """One line about the quantisation that the configuration declares; tensors are checked one by one at load.

    config: config.json; hf_quant_config: ModelOpt's own file, or None.
    Raises CheckpointError for what is not FP8 E4M3 with one scale per tensor.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if hf_quant_config is not None:
        declared = {"quant_method": "modelopt", **dict(hf_quant_config.get("quantization") or {})}
    if declared is None:
        return "not quantised: quantised to FP8 at load"
    if not isinstance(declared, Mapping):
        raise CheckpointError(f"config.json: quantization_config is {declared!r}, expected an object")
    if "fnuz" in str(declared).lower() or "e5m2" in str(declared).lower():
        raise _refusal("declares FP8 E4M3FNUZ or E5M2 data, expected E4M3FN")
    method = declared.get("quant_method")
    match method:
        case "fp8":
            return _check_fp8(declared)
        case "modelopt":
            return _check_modelopt(declared)
        case "compressed-tensors":
            return _check_compressed_tensors(declared)
        case _:
            raise _refusal(f"quant_method is {method!r}, expected fp8, modelopt or compressed-tensors")


def _check_fp8(declared: Mapping[str, Any]) -> str:
    block = declared.get("weight_block_size")
    if block is not None:
        raise _refusal(f"weight_block_size is {block}: one scale per block of the weight, expected one per tensor")
    scheme = declared.get("activation_scheme")
    if scheme not in ("static", "dynamic"):
        raise _refusal(f"activation_scheme is {scheme!r}, expected 'static' or 'dynamic'")
    return f"fp8, activation_scheme {scheme}"


def _check_modelopt(declared: Mapping[str, Any]) -> str:
    if declared.get("quant_algo") != "FP8":
        raise _refusal(f"quant_algo is {declared.get('quant_algo')!r}, expected 'FP8'")
    return "modelopt, quant_algo FP8"


def _check_compressed_tensors(declared: Mapping[str, Any]) -> str:
    groups = declared.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refusal("config_groups is missing")
    is_static = True
    for name, group in groups.items():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        form = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
        if form != (8, "float", "tensor"):
            raise _refusal(f"config_groups.{name}.weights is {form}, expected (8, 'float', 'tensor')")
        if inputs is not None and not inputs.get("dynamic") and inputs.get("strategy") != "tensor":
            raise _refusal(
                f"config_groups.{name}.input_activations.strategy is {inputs.get('strategy')!r}, expected 'tensor'"
            )
        is_static &= inputs is not None and not inputs.get("dynamic")
    return f"compressed-tensors, {'static' if is_static else 'dynamic'} input scales"


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(f"quantisation: {what}. {HOW_TO_CONVERT}")
