"""Input scales: the static scales by which a layer's activations become FP8, from a file, from flags or measured.

And the tokens that they were measured on, which say where the rounding of weights is felt least (compensation.py).

A scale is what the FP8 value is multiplied by: stored = fp8(real / scale), so scale = amax / 448 uses the whole range.
Each layer has one scale for the input of the first product (its hidden states) and one per expert for the input of
the second (what the activation yields).

As JSON:

    {"layers": {"model.layers.0": {"gemm1_input_scale": 0.0117, "gemm2_input_scale": [0.0021, 0.0019]}}}

As safetensors: float32 tensors `model.layers.0.gemm1_input_scale` [] and `model.layers.0.gemm2_input_scale` [] or [E].
gemm2_input_scale is one number for all experts, or E numbers in the order of the global expert ids. A safetensors file
may hold tokens of the layer too: `model.layers.0.hidden_states` [T, H], floating point, what it gets in the model, and
`model.layers.0.topk_ids` [T, K], integers, the experts that the router chooses (-1: none).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from expertd_server.errors import CheckpointError
from expertd_server.fp8 import FP8_MAX
from expertd_server.tensor_files import read_json
from expertd_server.types import Activation

__all__ = [
    "Calibration",
    "InputScales",
    "Tokens",
    "activate",
    "check_tokens",
    "measure_input_scales",
    "read_calibration",
    "write_calibration",
]

_HEADROOM = 2.0
"""How many times as large as any that was measured a value may be before it is clipped. FP8 is a floating-point format
with 15 binades of full precision, so that one binade above the measured ones costs nothing."""
_KEYS = ("gemm1_input_scale", "gemm2_input_scale")
_TOKEN_KEYS = ("hidden_states", "topk_ids")

Tokens: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""What a layer gets and chooses: hidden_states [T, H] floating point, and topk_ids [T, K] integers, global ids."""


@dataclass(frozen=True)
class InputScales:
    """Of one layer. Raises ValueError unless every scale is positive and finite."""

    gemm1: float
    """Scale of the hidden states."""
    gemm2: tuple[float, ...]
    """Scale of the input of the second product: one for all experts, or one per global expert."""

    def __post_init__(self) -> None:
        if not self.gemm2:
            raise ValueError("gemm2_input_scale is empty, expected one number or one per expert")
        named = [("gemm1_input_scale", self.gemm1), *((f"gemm2_input_scale[{e}]", s) for e, s in enumerate(self.gemm2))]
        for name, scale in named:
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"{name} is {scale}, expected a positive finite number")

    def of_experts(self, num_experts: int) -> tuple[float, ...]:
        """gemm2 as num_experts numbers. Raises ValueError when it has another number of them."""
        if len(self.gemm2) == 1:
            return self.gemm2 * num_experts
        if len(self.gemm2) != num_experts:
            raise ValueError(f"gemm2_input_scale has {len(self.gemm2)} numbers, expected 1 or {num_experts}")
        return self.gemm2


@dataclass(frozen=True)
class Calibration:
    """Input scales by layer name, and tokens."""

    layers: Mapping[str, InputScales] = field(default_factory=dict)
    default: InputScales | None = None
    """For layers that `layers` does not name; None: such a layer is an error."""
    source: str = "calibration"
    """Where the numbers come from, for messages."""
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    """For some layers or none. From a file they are memory that is mapped, and read when they are used."""

    @classmethod
    def uniform(cls, gemm1_input_scale: float, gemm2_input_scale: float) -> Calibration:
        """The same two scales for every layer and expert."""
        return cls(default=InputScales(gemm1_input_scale, (gemm2_input_scale,)), source="the given input scales")

    def of(self, layer_name: str) -> InputScales:
        """Scales of one layer. Raises CheckpointError naming the layers that there are."""
        scales = self.layers.get(layer_name, self.default)
        if scales is None:
            raise CheckpointError(
                f"{self.source} has no input scales for layer {layer_name!r}; it has {', '.join(self.layers) or 'none'}"
            )
        return scales


def read_calibration(path: str | Path) -> Calibration:
    """Read a .json or .safetensors file (see the module). Raises CheckpointError naming the file and the entry."""
    path = Path(path)
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_layers(path)
    tokens = {}
    for name, values in raw.items():
        if isinstance(values, dict) and values.keys() & set(_TOKEN_KEYS):
            tokens[name] = _take_tokens(path, name, values)
    layers = {name: _parse_layer(path, name, values) for name, values in raw.items()}
    return Calibration(layers=layers, source=str(path), tokens=tokens)


def write_calibration(
    path: str | Path, layers: Mapping[str, InputScales], tokens: Mapping[str, Tokens] | None = None
) -> None:
    """Write the JSON form, or that of safetensors where the path ends so, to be read back to the same numbers.

    tokens: by layer name, for some of the layers. Raises ValueError when they are given to JSON, or without scales.
    """
    path, tokens = Path(path), tokens or {}
    if path.suffix == ".safetensors":
        if strange := tokens.keys() - layers.keys():
            raise ValueError(f"tokens has {', '.join(sorted(strange))}, expected layers that have input scales")
        _write_safetensors(path, layers, tokens)
        return
    if tokens:
        raise ValueError(f"tokens are given for {path.name}, expected a file name that ends in .safetensors")
    values = {
        name: dict(zip(_KEYS, (scales.gemm1, list(scales.gemm2)), strict=True)) for name, scales in layers.items()
    }
    path.write_text(json.dumps({"layers": values}, indent=1) + "\n", encoding="utf-8")


def check_tokens(tokens: Tokens, hidden_size: int, num_experts: int) -> None:
    """Raise ValueError unless there are tokens, finite, and of a layer of this size."""
    hidden_states, topk_ids = tokens
    if not len(hidden_states) or hidden_states.shape[1] != hidden_size:
        raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}, expected [T, {hidden_size}]")
    if not bool(torch.isfinite(hidden_states).all()):
        raise ValueError("hidden_states holds values that are not finite")
    low, high = int(topk_ids.min()), int(topk_ids.max())
    if low < -1 or high >= num_experts:
        raise ValueError(f"topk_ids holds {low} ... {high}, expected -1 ... {num_experts - 1}")


def measure_input_scales(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    activation: Activation,
    gemm1_weights_of: Callable[[int], tuple[torch.Tensor | None, torch.Tensor]],
) -> InputScales:
    """Input scales under which the given tokens fill the FP8 range up to a headroom of a factor of 2.

    hidden_states: [T, H] floating point, real inputs of the layer; topk_ids: [T, K] global expert ids.
    gemm1_weights_of: expert id to its gate [I, H] (None where not gated) and up [I, H] matrices, real values.
    An expert that no token reaches gets the largest scale of those that were reached.
    Raises ValueError when no token is given, or the tokens are zero or not finite.
    """
    hidden = hidden_states.to(torch.float32)
    gemm1_amax = float(hidden.abs().max()) if hidden.numel() else 0.0
    if not (math.isfinite(gemm1_amax) and gemm1_amax > 0):
        raise ValueError(f"hidden_states has an absolute maximum of {gemm1_amax}, expected positive and finite")
    gemm2_amax = [0.0] * num_experts
    for expert in torch.unique(topk_ids[topk_ids >= 0]).tolist():
        tokens = hidden[(topk_ids == expert).any(dim=1)]
        gate, up = gemm1_weights_of(expert)
        inter = activate(activation, None if gate is None else tokens @ gate.T, tokens @ up.T)
        gemm2_amax[expert] = float(inter.abs().max())
    largest = max(gemm2_amax)
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(f"the input of the second product has an absolute maximum of {largest}, expected positive")
    unit = _HEADROOM / FP8_MAX
    return InputScales(gemm1_amax * unit, tuple((amax or largest) * unit for amax in gemm2_amax))


def activate(activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What the second product takes in, before it is quantised."""
    if gate is None:
        match activation:
            case Activation.GELU:
                return torch.nn.functional.gelu(up)
            case Activation.RELU2:
                return torch.relu(up).square()
            case _:
                return up
    return (torch.nn.functional.gelu(gate) if activation is Activation.GEGLU else torch.nn.functional.silu(gate)) * up


def _read_layers(path: Path) -> dict[str, Any]:
    content = read_json(path)
    layers = content.get("layers")
    if set(content) != {"layers"} or not isinstance(layers, dict):
        raise CheckpointError(f"{path} has the keys {sorted(content)}, expected one key 'layers' with an object")
    return layers


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    layers: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layer_name, _, key = name.rpartition(".")
        layers.setdefault(layer_name, {})[key] = tensor if key in _TOKEN_KEYS else tensor.tolist()
    return layers


def _write_safetensors(path: Path, layers: Mapping[str, InputScales], tokens: Mapping[str, Tokens]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, scales in layers.items():
        # float64, so that the numbers come back as they were.
        values = [torch.tensor(value, dtype=torch.float64) for value in (scales.gemm1, scales.gemm2)]
        tensors |= {f"{name}.{key}": value for key, value in zip(_KEYS, values, strict=True)}
    for name, pair in tokens.items():
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in zip(_TOKEN_KEYS, pair, strict=True)}
    save_file(tensors, path)


def _take_tokens(path: Path, name: str, values: dict[str, Any]) -> Tokens:
    """Take a layer's tokens out of its values. Types and shapes are checked, as far as they go without the layer."""
    hidden_states, topk_ids = (values.pop(key, None) for key in _TOKEN_KEYS)
    for key, tensor, is_right, kind in (
        ("hidden_states", hidden_states, lambda t: t.is_floating_point(), "floating point [T, H]"),
        ("topk_ids", topk_ids, lambda t: not (t.is_floating_point() or t.is_complex()), "integers [T, K]"),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: layer {name!r} has no tensor {key}, expected both of {', '.join(_TOKEN_KEYS)}"
            )
        if tensor.ndim != 2 or not is_right(tensor):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{path}: layer {name!r}: {key} is {found}, expected {kind}")
    if len(hidden_states) != len(topk_ids):
        raise CheckpointError(
            f"{path}: layer {name!r} has {len(hidden_states)} rows of hidden_states and {len(topk_ids)} of topk_ids"
        )
    return hidden_states, topk_ids


def _parse_layer(path: Path, name: str, values: Any) -> InputScales:
    if not isinstance(values, dict) or set(values) != set(_KEYS):
        found = sorted(values) if isinstance(values, dict) else values
        raise CheckpointError(f"{path}: layer {name!r} has {found}, expected {' and '.join(_KEYS)}")
    try:
        gemm1, gemm2 = (_numbers(key, values[key]) for key in _KEYS)
        if len(gemm1) != 1:
            raise ValueError(f"gemm1_input_scale has {len(gemm1)} numbers, expected one for the layer")
        return InputScales(gemm1[0], gemm2)
    except ValueError as error:
        raise CheckpointError(f"{path}: layer {name!r}: {error}") from error


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    numbers: Sequence[Any] = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{key} holds {number!r}, expected a number")
    return tuple(float(number) for number in numbers)
