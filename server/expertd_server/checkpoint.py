"""Reading the experts of a Hugging Face checkpoint into the form that the layer takes.

    checkpoint = open_checkpoint("/models/Mixtral-8x7B-FP8")
    spec, weights = checkpoint.load("model.layers.0", experts=range(0, 4))

Nothing is used that was not expected and nothing expected is made up: `Checkpoint.account` lists both, and `load`
refuses a layer whose account does not balance.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from expertd_server.accounting import LayerAccount, account_layer
from expertd_server.calibration import Calibration, InputScales, check_tokens, measure_input_scales
from expertd_server.compensation import LayerInputs, round_compensated
from expertd_server.dialects import Architecture, Kind, Projection, read_architecture
from expertd_server.errors import CheckpointError
from expertd_server.fp8 import FP8_MAX, from_fp8
from expertd_server.quantization import check_quantization
from expertd_server.tensor_files import TensorFiles, read_json
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["Checkpoint", "LayerAccount", "open_checkpoint"]

log = logging.getLogger(__name__)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory, or one .safetensors file with its config.json beside it; reads no weights.

    Raises CheckpointError when a file is missing or damaged, the model family is not one that is read, or the
    quantisation is not FP8 with one scale per tensor.
    """
    return Checkpoint(Path(path))


class Checkpoint:
    """One checkpoint on disk. See `open_checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected a checkpoint's directory, or one .safetensors file")
        directory = path if path.is_dir() else path.parent
        config_path = directory / "config.json"
        if not config_path.is_file():
            also = (
                " (params.json is the consolidated layout, which is not read)" if _has(directory, "params.json") else ""
            )
            raise CheckpointError(
                f"{config_path} is missing{also}; expected a Hugging Face checkpoint: config.json and safetensors files"
            )
        config = read_json(config_path)
        own = directory / "hf_quant_config.json"
        self.quantization = check_quantization(config, read_json(own) if own.is_file() else None)
        self.architecture: Architecture = read_architecture(config)
        self.files = TensorFiles(path)
        self._names_of_layer = self._group_names()
        self._said_nearest = False

    @property
    def layer_names(self) -> list[str]:
        """The MoE layers, in the order of the model."""
        return [self.architecture.dialect.layer_name(n) for n in self.architecture.moe_layers]

    def stray_layers(self) -> list[str]:
        """Layers that hold experts although config.json has no such MoE layer (multi-token prediction, for one)."""
        dialect = self.architecture.dialect
        known = set(self.layer_names)
        return [
            name
            for name, tensors in self._names_of_layer.items()
            if name not in known and any(t.startswith(dialect.experts_prefix(name)) for t in tensors)
        ]

    def spec(self, layer_name: str, experts: range | None = None) -> LayerSpec:
        """Shape and routing of a layer that holds `experts` (global ids, consecutive; None: all of them).

        Raises CheckpointError naming the layer or the range that there is not.
        """
        if layer_name not in self.layer_names:
            raise CheckpointError(f"layer {layer_name!r} is not in {self.path}; it has {', '.join(self.layer_names)}")
        whole = self.architecture.spec
        if experts is None:
            return whole
        if experts.step != 1 or not len(experts) or experts.start < 0 or experts.stop > whole.num_experts:
            raise CheckpointError(
                f"experts is {experts}, expected consecutive ids inside 0 ... {whole.num_experts - 1} of {layer_name!r}"
            )
        return dataclasses.replace(whole, local_expert_offset=experts.start, local_num_experts=len(experts))

    def nbytes(self, layer_name: str, experts: range | None = None) -> int:
        """Bytes of FP8 weights that `load` of the same arguments returns."""
        return self.spec(layer_name, experts).weights_nbytes

    def account(self, layer_name: str, experts: range | None = None, *, need_input_scales: bool = True) -> LayerAccount:
        """Hold what the layer needs against what the files have; reads headers only.

        need_input_scales: False where they come from a calibration.
        """
        names = self._names_of_layer.get(layer_name, ())
        return account_layer(
            self.architecture.dialect,
            self.files,
            layer_name,
            names,
            self.spec(layer_name, experts),
            need_input_scales=need_input_scales,
        )

    def load(
        self,
        layer_name: str,
        experts: range | None = None,
        calibration: Calibration | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[LayerSpec, ExpertWeights]:
        """Read one layer, or the slice `experts` of it; of the other experts only the input scales are read.

        Those of all experts count because the layer has one input scale, the largest of them: slices on different
        servers then quantise the hidden states alike.
        calibration: input scales to use instead of the checkpoint's own; needed where it has none. Weights that are not
        FP8 yet are rounded with its tokens where it has some, and to the nearest value where it has none.
        progress: called with the number of bytes of FP8 weights after each projection.
        Returns CPU tensors that own their memory. Raises CheckpointError naming the tensor.
        """
        account = self.account(layer_name, experts, need_input_scales=calibration is None)
        account.raise_problems()
        spec = account.spec
        inputs = self.input_scales(account, calibration)
        gemm2_input_scales = inputs.of_experts(spec.num_experts)
        layer_inputs = self._layer_inputs(account, inputs, calibration)
        size, rows = spec.intermediate_size, spec.gemm1_rows
        gemm1 = torch.empty((spec.num_local, rows, spec.hidden_size), dtype=torch.float8_e4m3fn)
        gemm2 = torch.empty((spec.num_local, spec.hidden_size, size), dtype=torch.float8_e4m3fn)
        output1, output1_gate, output2 = (torch.empty(spec.num_local, dtype=torch.float64) for _ in range(3))
        for local in range(spec.num_local):
            expert = spec.local_expert_offset + local
            places = {Projection.UP: gemm1[local, :size], Projection.DOWN: gemm2[local]}
            if spec.activation.is_gated:
                places[Projection.GATE] = gemm1[local, size:]
            scales = self.read_expert(account, expert, places, layer_inputs, progress)
            a1, a2 = inputs.gemm1, gemm2_input_scales[expert]
            if spec.activation.is_gated:
                output1[local] = scales[Projection.UP] * a1 / a2
                output1_gate[local] = scales[Projection.GATE] * a1
            else:
                output1[local] = 1.0 / a2
                output1_gate[local] = scales[Projection.UP] * a1
            output2[local] = scales[Projection.DOWN] * a2
        return spec, ExpertWeights(
            gemm1_weights=gemm1,
            output1_scales_scalar=_to_float32(layer_name, output1),
            output1_scales_gate_scalar=_to_float32(layer_name, output1_gate),
            gemm2_weights=gemm2,
            output2_scales_scalar=_to_float32(layer_name, output2),
            routing_bias=self._read_bias(layer_name) if spec.routing_method.reads_bias else None,
            hidden_states_scale=1.0 / inputs.gemm1,
        )

    def read_expert(
        self,
        account: LayerAccount,
        expert: int,
        places: Mapping[Projection, torch.Tensor],
        layer_inputs: LayerInputs | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[Projection, float]:
        """Copy or quantise one expert's weights into `places` (contiguous float8_e4m3fn); the scale of each.

        layer_inputs: what the weights that are not FP8 yet are rounded for; None: to the nearest value.
        progress: called with the number of bytes after each projection.
        """
        scales: dict[Projection, float] = {}

        def read(projection: Projection, factor: torch.Tensor | None) -> None:
            scales[projection] = self._read_weight(account, expert, projection, places[projection], factor)
            if progress is not None:
                progress(places[projection].numel())

        def real(projection: Projection) -> torch.Tensor:
            return from_fp8(places[projection], torch.float32) * scales[projection]

        gemm1 = [projection for projection in (Projection.GATE, Projection.UP) if projection in places]
        for projection in gemm1:
            read(projection, None if layer_inputs is None else layer_inputs.gemm1_factor)
        factor = None
        if layer_inputs is not None:
            gate = real(Projection.GATE) if Projection.GATE in places else None
            factor = layer_inputs.gemm2_factor(expert, gate, real(Projection.UP))
        read(Projection.DOWN, factor)
        return scales

    def input_scales(self, account: LayerAccount, calibration: Calibration | None = None) -> InputScales:
        """Input scales of a layer, from `calibration` or from the checkpoint: gate and up of all experts share one."""
        name, num_experts = account.layer_name, account.spec.num_experts
        if calibration is not None:
            scales = calibration.of(name)
            try:
                scales.of_experts(num_experts)
            except ValueError as error:
                raise CheckpointError(f"{calibration.source}, layer {name!r}: {error}") from error
            return scales
        found = {
            (expert, projection): self.scale(tensor)
            for (expert, projection, kind), tensor in account.tensors.items()
            if kind is Kind.INPUT_SCALE
        }
        return InputScales(
            gemm1=max(scale for (_, projection), scale in found.items() if projection is not Projection.DOWN),
            gemm2=tuple(found[expert, Projection.DOWN] for expert in range(num_experts)),
        )

    def scale(self, name: str) -> float:
        """One scale whose header is right. Raises CheckpointError unless it is a positive finite number."""
        value = self.scale_value(name)
        if not math.isfinite(value) or value <= 0:
            raise CheckpointError(
                f"{name} is {value}, expected a positive finite number: calibration did not reach this expert, or the "
                f"export is broken. Calibrate again, or give input scales in a calibration file"
            )
        return value

    def scale_value(self, name: str) -> float:
        """The number that a scale tensor of one element holds, whatever it is."""
        return float(self.files.read(name).to(torch.float32).reshape(()))

    def router(self, layer_name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The router of a layer, which is the client's to run: weight [E, H] as stored, and bias [E] float32 or None.

        H is the router's own, `architecture.router_hidden_size`.
        """
        spec = self.spec(layer_name)
        name = self.architecture.dialect.router_name(layer_name)
        weight = self._read_shaped(name, (spec.num_experts, self.architecture.router_hidden_size))
        return weight, self._read_bias(layer_name) if spec.routing_method.reads_bias else None

    def projection(self, layer_name: str, expert: int, projection: Projection) -> torch.Tensor:
        """The real weight of one expert's projection as a float32 copy: gate and up [I, H], down [H, I]."""
        account = self.account(layer_name, range(expert, expert + 1), need_input_scales=False)
        account.raise_problems()
        weight = self.files.read(account.tensors[expert, projection, Kind.WEIGHT]).to(torch.float32, copy=True)
        scale_name = account.tensors.get((expert, projection, Kind.WEIGHT_SCALE))
        return weight if scale_name is None else weight * self.scale(scale_name)

    def measure(self, layer_name: str, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> InputScales:
        """Measure a layer's input scales on real tokens, for `calibration.write_calibration`.

        hidden_states: [T, H] floating point, what the layer gets in the model; topk_ids: [T, K] what the router chose.
        """
        spec = self.spec(layer_name)

        def gemm1_weights_of(expert: int) -> tuple[torch.Tensor | None, torch.Tensor]:
            gate = self.projection(layer_name, expert, Projection.GATE) if spec.activation.is_gated else None
            return gate, self.projection(layer_name, expert, Projection.UP)

        return measure_input_scales(hidden_states, topk_ids, spec.num_experts, spec.activation, gemm1_weights_of)

    def _group_names(self) -> dict[str, list[str]]:
        dialect = self.architecture.dialect
        grouped: dict[str, list[str]] = {}
        for name in self.files.names:
            index = dialect.layer_index(name)
            if index is not None:
                grouped.setdefault(dialect.layer_name(index), []).append(name)
        return grouped

    def _layer_inputs(
        self, account: LayerAccount, inputs: InputScales, calibration: Calibration | None
    ) -> LayerInputs | None:
        """What weights of the layer are to be rounded for; None: nothing is rounded, or there are no tokens."""
        name, spec = account.layer_name, account.spec
        num_weights = spec.num_local * (3 if spec.activation.is_gated else 2)
        if account.num_fp8_weights == num_weights:
            return None
        if calibration is None or name not in calibration.tokens:
            if not self._said_nearest:
                self._said_nearest = True
                log.info(
                    "weights of %s are rounded to the nearest FP8 values: outputs are about a third further from the "
                    "unquantised model's than with a calibration file that holds tokens, see docs/checkpoints.md",
                    self.path,
                )
            return None
        tokens = calibration.tokens[name]
        log.info("rounding the weights of %s for the %d tokens of %s", name, len(tokens[0]), calibration.source)
        try:
            check_tokens(tokens, spec.hidden_size, spec.num_experts)
        except ValueError as error:
            raise CheckpointError(f"{calibration.source}, layer {name!r}: {error}") from error
        return LayerInputs.of(spec, tokens, inputs)

    def _read_weight(
        self,
        account: LayerAccount,
        expert: int,
        projection: Projection,
        place: torch.Tensor,
        factor: torch.Tensor | None,
    ) -> float:
        """Copy or quantise one weight into `place` (float8_e4m3fn) and return its scale.

        factor: see `round_compensated`, for a weight that is not FP8 yet.
        """
        name = account.tensors[expert, projection, Kind.WEIGHT]
        stored = self.files.read(name)
        if stored.dtype is torch.float8_e4m3fn:
            place.copy_(stored)
            largest_code = int((place.view(torch.uint8) & 0x7F).max())
            if largest_code == 0x7F:
                raise CheckpointError(f"{name} holds NaN: a broken export, or E4M3FNUZ data that is marked as E4M3FN")
            if largest_code == 0:
                raise CheckpointError(f"{name} is all zeros: an unfinished download or a broken export")
            return self.scale(account.tensors[expert, projection, Kind.WEIGHT_SCALE])
        real = stored.to(torch.float32)
        amax = float(real.abs().max())
        if not math.isfinite(amax):
            raise CheckpointError(f"{name} holds values that are not finite")
        if amax == 0:
            raise CheckpointError(f"{name} is all zeros: an unfinished download or a broken export")
        scale = amax / FP8_MAX
        place.copy_(round_compensated(real / scale, factor))
        return scale

    def _read_bias(self, layer_name: str) -> torch.Tensor:
        """The routing bias, [E] float32."""
        candidates = self.architecture.dialect.bias_candidates(layer_name)
        present = set(self._names_of_layer.get(layer_name, ()))
        name = next((name for name in candidates if name in present), candidates[0])
        bias = self._read_shaped(name, (self.architecture.spec.num_experts,)).to(torch.float32)
        if not bool(torch.isfinite(bias).all()):
            raise CheckpointError(f"{name} holds values that are not finite")
        return bias

    def _read_shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        info = self.files.info(name)
        if info.shape != shape:
            raise CheckpointError(f"{name} has shape {info.shape}, expected {shape} by config.json")
        return self.files.read(name).clone()


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file()


def _to_float32(layer_name: str, scales: torch.Tensor) -> torch.Tensor:
    """Round products of scales once. Fine one by one, they may leave float32 together, and zeros would go unnoticed."""
    rounded = scales.to(torch.float32)
    if not bool((torch.isfinite(rounded) & (rounded > 0)).all()):
        raise CheckpointError(f"layer {layer_name!r}: products of its scales leave the range of float32")
    return rounded
