"""How model families spell their experts: config.json to layer shapes, and tensor names to experts and projections."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from expertd_server.errors import CheckpointError
from expertd_server.types import Activation, LayerSpec, RoutingMethod

__all__ = ["FAMILIES", "Architecture", "Dialect", "ExpertTensor", "Kind", "Projection", "read_architecture"]


class Projection(StrEnum):
    """One matrix of an expert. gate and up: [I, H]; down: [H, I]."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Kind(StrEnum):
    """What a tensor is to its projection."""

    WEIGHT = "weight"
    WEIGHT_SCALE = "weight scale"
    """real weight = stored weight * scale."""
    INPUT_SCALE = "input scale"
    """real input = stored input * scale."""


KIND_OF_SUFFIX: Mapping[str, Kind] = {
    "weight": Kind.WEIGHT,
    "weight_scale": Kind.WEIGHT_SCALE,
    "weight_scale_inv": Kind.WEIGHT_SCALE,  # multiplied all the same, whatever "inv" suggests
    "input_scale": Kind.INPUT_SCALE,
    "act_scale": Kind.INPUT_SCALE,  # AutoFP8 before 0.1
}


@dataclass(frozen=True)
class ExpertTensor:
    """What a tensor name stands for."""

    expert: int
    projection: Projection
    kind: Kind


@dataclass(frozen=True)
class Dialect:
    """Per-expert tensor names: `{layers}.{n}.{block}.experts.{expert}.{projection}.{suffix}`."""

    layers: str
    block: str
    projections: Mapping[str, Projection]
    """Name in the checkpoint to projection. Without a gate the layer is not gated."""
    bias_names: tuple[str, ...] = ()
    """Below the block, where the routing bias [E] may lie; the first one present is read."""

    def layer_name(self, index: int) -> str:
        """The name under which a layer is served, and the prefix of all its tensors."""
        return f"{self.layers}.{index}"

    def layer_index(self, tensor_name: str) -> int | None:
        """The layer that a tensor belongs to; None: to none."""
        match = re.match(rf"{re.escape(self.layers)}\.(\d+)\.", tensor_name)
        return int(match[1]) if match else None

    def block_prefix(self, layer_name: str) -> str:
        """What the names of all tensors of the MoE block begin with."""
        return f"{layer_name}.{self.block}."

    def experts_prefix(self, layer_name: str) -> str:
        """What the names of all tensors of the experts begin with."""
        return f"{self.block_prefix(layer_name)}experts."

    def router_name(self, layer_name: str) -> str:
        """The router's weight, [E, H]."""
        return f"{self.block_prefix(layer_name)}gate.weight"

    def bias_candidates(self, layer_name: str) -> list[str]:
        """Where the routing bias may lie."""
        return [self.block_prefix(layer_name) + name for name in self.bias_names]

    def parse(self, layer_name: str, tensor_name: str) -> ExpertTensor | None:
        """What a tensor below `experts_prefix` is; None where the name is not of this dialect."""
        match = re.fullmatch(r"(\d+)\.(\w+)\.(\w+)", tensor_name.removeprefix(self.experts_prefix(layer_name)))
        if match is None or match[2] not in self.projections or match[3] not in KIND_OF_SUFFIX:
            return None
        return ExpertTensor(int(match[1]), self.projections[match[2]], KIND_OF_SUFFIX[match[3]])

    def spell(self, layer_name: str, expert: int, projection: Projection, suffix: str) -> str:
        """The name of an expert's tensor, for messages about one that is missing."""
        spelt = next(name for name, meant in self.projections.items() if meant is projection)
        return f"{self.experts_prefix(layer_name)}{expert}.{spelt}.{suffix}"


@dataclass(frozen=True)
class Architecture:
    """What config.json says about the MoE layers of a model."""

    family: str
    """model_type of config.json."""
    dialect: Dialect
    spec: LayerSpec
    """Of a whole layer, all experts local."""
    moe_layers: tuple[int, ...]
    router_hidden_size: int
    """Columns of the router; differs from spec.hidden_size where experts work on a latent projection."""


class _Config:
    """config.json with errors that name the key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is there: transformers renames some of them when it saves a model again."""
        for key in keys:
            value = self._values.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise CheckpointError(f"config.json: {key} is {value!r}, expected a whole number")
                return value
        if default is None:
            raise CheckpointError(f"config.json: {' or '.join(keys)} is missing")
        return default

    def expect(self, key: str, default: Any, *expected: Any) -> None:
        """Refuse a value that would need arithmetic which the layer does not do."""
        value = self.get(key, default)
        if value not in expected:
            raise CheckpointError(
                f"config.json: {key} is {value!r}, expected {' or '.join(map(repr, expected))}: the layer has no "
                f"such variant"
            )

    def gated_activation(self) -> Activation:
        known = {"silu": Activation.SWIGLU, "swish": Activation.SWIGLU, "gelu": Activation.GEGLU}
        name = self.get("hidden_act", "silu")
        if name not in known:
            raise CheckpointError(f"config.json: hidden_act is {name!r}, expected one of {', '.join(known)}")
        return known[name]

    def all_layers(self) -> range:
        return range(self.integer("num_hidden_layers"))


_W123 = {"w1": Projection.GATE, "w3": Projection.UP, "w2": Projection.DOWN}
_GATE_UP_DOWN = {"gate_proj": Projection.GATE, "up_proj": Projection.UP, "down_proj": Projection.DOWN}
_BIAS = ("gate.e_score_correction_bias", "e_score_correction_bias")

_MIXTRAL = Dialect("model.layers", "block_sparse_moe", _W123)
_MINIMAX = Dialect("model.layers", "block_sparse_moe", _W123, _BIAS)
_QWEN = Dialect("model.layers", "mlp", _GATE_UP_DOWN)
_DEEPSEEK = Dialect("model.layers", "mlp", _GATE_UP_DOWN, _BIAS)
_NEMOTRON = Dialect("backbone.layers", "mixer", {"up_proj": Projection.UP, "down_proj": Projection.DOWN}, _BIAS)


def _mixtral(family: str, config: _Config) -> Architecture:
    spec = LayerSpec(
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_experts=config.integer("num_local_experts", "num_experts"),
        top_k=config.integer("num_experts_per_tok"),
        routing_method=RoutingMethod.RENORMALIZE,
        activation=config.gated_activation(),
    )
    return Architecture(family, _MIXTRAL, spec, tuple(config.all_layers()), spec.hidden_size)


def _minimax_m2(family: str, config: _Config) -> Architecture:
    config.expect("scoring_func", "sigmoid", "sigmoid")
    spec = LayerSpec(
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_experts=config.integer("num_local_experts", "num_experts"),
        top_k=config.integer("num_experts_per_tok"),
        routing_method=RoutingMethod.MINIMAX2,
        activation=config.gated_activation(),
    )
    return Architecture(family, _MINIMAX, spec, tuple(config.all_layers()), spec.hidden_size)


def _qwen_moe(family: str, config: _Config) -> Architecture:
    spec = LayerSpec(
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("moe_intermediate_size"),
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        routing_method=RoutingMethod.RENORMALIZE_NAIVE,
        activation=config.gated_activation(),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
    )
    step = max(1, config.integer("decoder_sparse_step", default=1))
    dense = set(config.get("mlp_only_layers", []))
    layers = tuple(n for n in config.all_layers() if n not in dense and (n + 1) % step == 0)
    return Architecture(family, _QWEN, spec, layers, spec.hidden_size)


def _deepseek_v3(family: str, config: _Config) -> Architecture:
    config.expect("scoring_func", "sigmoid", "sigmoid")
    config.expect("topk_method", "noaux_tc", "noaux_tc")
    config.expect("norm_topk_prob", True, True)
    spec = LayerSpec(
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("moe_intermediate_size"),
        num_experts=config.integer("n_routed_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        routing_method=RoutingMethod.DEEPSEEK_V3,
        activation=config.gated_activation(),
        n_group=config.integer("n_group"),
        topk_group=config.integer("topk_group"),
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
    )
    first = config.integer("first_k_dense_replace", default=0)
    step = max(1, config.integer("moe_layer_freq", default=1))
    layers = tuple(n for n in config.all_layers() if n >= first and n % step == 0)
    return Architecture(family, _DEEPSEEK, spec, layers, spec.hidden_size)


def _nemotron_h(family: str, config: _Config) -> Architecture:
    config.expect("mlp_hidden_act", "relu2", "relu2")
    config.expect("norm_topk_prob", True, True)
    hidden_size = config.integer("hidden_size")
    spec = LayerSpec(
        # With a latent size the experts work between two projections of the block, which stay with the client.
        hidden_size=config.integer("moe_latent_size", default=hidden_size),
        intermediate_size=config.integer("moe_intermediate_size"),
        num_experts=config.integer("n_routed_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        routing_method=RoutingMethod.DEEPSEEK_V3,
        activation=Activation.RELU2,
        n_group=config.integer("n_group", default=1),
        topk_group=config.integer("topk_group", default=1),
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
    )
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if kinds is None:
        raise CheckpointError("config.json: layers_block_type or hybrid_override_pattern is missing")
    layers = tuple(n for n, kind in enumerate(kinds) if kind in ("moe", "E"))
    return Architecture(family, _NEMOTRON, spec, layers, hidden_size)


FAMILIES: Mapping[str, Callable[[str, _Config], Architecture]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "glm4_moe": _deepseek_v3,
    "nemotron_h": _nemotron_h,
    "minimax_m2": _minimax_m2,
}
"""model_type of config.json to its reader."""


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """What a config.json means. Raises CheckpointError naming the key, or listing the families that are read."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type is {family!r}, expected one of {', '.join(sorted(FAMILIES))}. Each is read with "
            f"one tensor per expert and projection; fused, transposed or consolidated experts are not: save the model "
            f"again with transformers' save_pretrained"
        )
    try:
        return FAMILIES[family](family, _Config(config))
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json of model_type {family!r} makes no layer: {error}") from error
