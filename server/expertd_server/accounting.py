"""Holding what a layer needs against what a checkpoint has: every tensor is expected and found, or named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from expertd_server.dialects import Dialect, Kind, Projection
from expertd_server.errors import CheckpointError
from expertd_server.quantization import HOW_TO_CONVERT
from expertd_server.tensor_files import TensorFiles
from expertd_server.types import LayerSpec

__all__ = ["LayerAccount", "account_layer", "scale_problem"]

FP8 = "F8_E4M3"
UNQUANTISED = ("BF16", "F16", "F32")
SCALE_DTYPES = ("F32", "BF16", "F16")
MAX_PROBLEMS_SHOWN = 8
NO_INPUT_SCALES = (
    "the checkpoint has no static input scales (it is not quantised, or its activations are quantised dynamically, "
    "which would make an answer depend on its batch): give a calibration file"
)

Tensors: TypeAlias = dict[tuple[int, Projection, Kind], str]


@dataclass(frozen=True)
class LayerAccount:
    """Every tensor of one layer: what the chosen experts need, and what else there is."""

    layer_name: str
    spec: LayerSpec
    tensors: Tensors
    """Of every expert of the layer, local or not: (global expert id, projection, kind) to tensor name."""
    num_fp8_weights: int
    """How many weights of the local experts are FP8 in the file; the others are quantised at load."""
    has_input_scales: bool
    """Whether the checkpoint brings static input scales for this layer."""
    problems: tuple[str, ...]
    """Why the layer cannot be loaded, one sentence per tensor: missing, not expected, of a wrong shape or type."""
    left_to_client: tuple[str, ...]
    """Tensors of the block that are outside the layer: router, shared experts, latent projections."""

    def raise_problems(self) -> None:
        """Raise CheckpointError with the first few problems, if there is one."""
        if self.problems:
            shown = list(self.problems[:MAX_PROBLEMS_SHOWN])
            if len(self.problems) > len(shown):
                shown.append(f"and {len(self.problems) - len(shown)} more")
            raise CheckpointError(f"layer {self.layer_name!r}: " + "; ".join(shown))


def account_layer(
    dialect: Dialect,
    files: TensorFiles,
    layer_name: str,
    names: Sequence[str],
    spec: LayerSpec,
    *,
    need_input_scales: bool,
) -> LayerAccount:
    """The account of one layer, from file headers alone.

    names: every tensor of the layer, experts or not; spec: what is to be loaded, with its slice of the experts.
    need_input_scales: False where they come from elsewhere.
    """
    experts_prefix, block_prefix = dialect.experts_prefix(layer_name), dialect.block_prefix(layer_name)
    tensors, problems = _by_meaning(dialect, layer_name, [n for n in names if n.startswith(experts_prefix)], spec)
    experts = _Experts(dialect, files, layer_name, spec, tensors)
    num_fp8_weights = 0
    for expert in range(spec.local_expert_offset, spec.local_expert_offset + spec.num_local):
        for projection in dialect.projections.values():
            is_fp8, found = experts.check_weight(expert, projection)
            num_fp8_weights += is_fp8
            problems += found
    if need_input_scales:
        problems += experts.check_input_scales()
    candidates = dialect.bias_candidates(layer_name)
    if spec.routing_method.reads_bias and not set(candidates) & set(names):
        problems.append(f"{' or '.join(candidates)} is missing: the routing reads a bias")
    return LayerAccount(
        layer_name=layer_name,
        spec=spec,
        tensors=tensors,
        num_fp8_weights=num_fp8_weights,
        has_input_scales=any(kind is Kind.INPUT_SCALE for _, _, kind in tensors),
        problems=tuple(problems),
        left_to_client=tuple(n for n in names if n.startswith(block_prefix) and not n.startswith(experts_prefix)),
    )


def scale_problem(files: TensorFiles, name: str) -> str | None:
    """Why a tensor cannot be one scale, by its header; None: it can."""
    info = files.info(name)
    if info.dtype not in SCALE_DTYPES:
        return f"{name} is {info.dtype}, expected {', '.join(SCALE_DTYPES)}"
    if info.shape not in ((), (1,)):
        return (
            f"{name} has shape {info.shape}, expected one scale per tensor: these are scales per row or per block. "
            f"{HOW_TO_CONVERT}"
        )
    return None


def _by_meaning(dialect: Dialect, layer_name: str, names: Sequence[str], spec: LayerSpec) -> tuple[Tensors, list[str]]:
    """Tensors of a layer's experts by meaning, and a sentence about each that has none."""
    tensors: Tensors = {}
    problems: list[str] = []
    for name in names:
        meaning = dialect.parse(layer_name, name)
        if meaning is None:
            example = dialect.spell(layer_name, 0, Projection.UP, "{weight,weight_scale,input_scale}")
            problems.append(f"{name} is not expected: experts are spelt {example}")
        elif meaning.expert >= spec.num_experts:
            problems.append(f"{name} is not expected: config.json has {spec.num_experts} experts")
        elif (key := (meaning.expert, meaning.projection, meaning.kind)) in tensors:
            problems.append(f"{name} is not expected: {tensors[key]} is the {meaning.kind} already")
        else:
            tensors[key] = name
    return tensors, problems


@dataclass(frozen=True)
class _Experts:
    """The tensors of one layer's experts, to be checked. Every check returns one sentence per problem."""

    dialect: Dialect
    files: TensorFiles
    layer_name: str
    spec: LayerSpec
    tensors: Tensors

    def check_weight(self, expert: int, projection: Projection) -> tuple[bool, list[str]]:
        """Whether a weight is FP8, and what is wrong with it and its scale."""
        name = self.tensors.get((expert, projection, Kind.WEIGHT))
        scale_name = self.tensors.get((expert, projection, Kind.WEIGHT_SCALE))
        if name is None:
            return False, [f"{self._spell(expert, projection, 'weight')} is missing"]
        info, problems = self.files.info(name), []
        shape = (self.spec.intermediate_size, self.spec.hidden_size)
        if projection is Projection.DOWN:
            shape = shape[::-1]
        if info.shape != shape:
            problems.append(f"{name} has shape {info.shape}, expected {shape} by config.json")
        if info.dtype not in (FP8, *UNQUANTISED):
            problems.append(f"{name} is {info.dtype}, expected {FP8} or {', '.join(UNQUANTISED)}. {HOW_TO_CONVERT}")
        if info.dtype == FP8 and scale_name is None:
            problems.append(f"{self._spell(expert, projection, 'weight_scale')} is missing")
        if info.dtype in UNQUANTISED and scale_name is not None:
            problems.append(f"{scale_name} is not expected: {name} is {info.dtype}, not FP8")
        if scale_name is not None and (problem := scale_problem(self.files, scale_name)) is not None:
            problems.append(problem)
        return info.dtype == FP8, problems

    def check_input_scales(self) -> list[str]:
        """What is wrong with the input scales of all experts, local or not: the layer's is the largest of them."""
        present = [name for (_, _, kind), name in self.tensors.items() if kind is Kind.INPUT_SCALE]
        if not present:
            return [NO_INPUT_SCALES]
        missing = [
            f"{self._spell(expert, projection, 'input_scale')} is missing"
            for expert in range(self.spec.num_experts)
            for projection in self.dialect.projections.values()
            if (expert, projection, Kind.INPUT_SCALE) not in self.tensors
        ]
        return missing + [problem for name in present if (problem := scale_problem(self.files, name)) is not None]

    def _spell(self, expert: int, projection: Projection, suffix: str) -> str:
        return self.dialect.spell(self.layer_name, expert, projection, suffix)
