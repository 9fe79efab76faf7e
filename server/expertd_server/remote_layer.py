"""What a front-end knows of a layer that another process computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.layer import MoELayer
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["RemoteLayer", "layer_id_of"]


@dataclass(frozen=True, kw_only=True)
class RemoteLayer:
    """All of a layer but its weights."""

    layer_id: int
    """Never given to another layer or version, by no engine process."""
    name: str
    weights_version: int
    is_current: bool
    """Whether requests that ask for no version get this one."""
    spec: LayerSpec
    nbytes: int
    hidden_states_scale: float | None
    routing_bias: Sequence[float] | None
    """As float32, which holds every bfloat16."""

    @classmethod
    def of(cls, layer: MoELayer, layer_id: int, *, is_current: bool) -> RemoteLayer:
        """What is to be known of a layer."""
        bias = None if layer.routing_bias is None else layer.routing_bias.float().tolist()
        return cls(
            layer_id=layer_id,
            name=layer.name,
            weights_version=layer.weights_version,
            is_current=is_current,
            spec=layer.spec,
            nbytes=layer.nbytes,
            hidden_states_scale=layer.hidden_states_scale,
            routing_bias=bias,
        )

    def to_layer(self) -> MoELayer:
        """A layer that can be described and asked for, and computed elsewhere."""
        nothing = torch.empty(0)
        weights = ExpertWeights(
            gemm1_weights=nothing,
            output1_scales_scalar=nothing,
            output1_scales_gate_scalar=nothing,
            gemm2_weights=nothing,
            output2_scales_scalar=nothing,
            routing_bias=None if self.routing_bias is None else torch.tensor(self.routing_bias, dtype=torch.float32),
            hidden_states_scale=self.hidden_states_scale,
        )
        prepared = PreparedLayer(self.spec, weights, self.nbytes, state=self.layer_id)
        return MoELayer(self.name, prepared, _Elsewhere(), self.weights_version)


def layer_id_of(layer: MoELayer) -> int:
    """The layer_id of what `RemoteLayer.to_layer` made."""
    layer_id: int = layer.prepared.state
    return layer_id


class _Elsewhere:
    """The backend of a layer that another process computes: nothing here may ask it to compute."""

    name = "elsewhere"
    device = torch.device("cpu")

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        raise AssertionError(_NOT_HERE)

    def tune(self, layer: PreparedLayer, tune_max_num_tokens: int = 8192) -> dict[int, str]:
        raise AssertionError(_NOT_HERE)

    def forward(self, layer: PreparedLayer, hidden_states: torch.Tensor, **arguments: Any) -> MoEOutput:
        raise AssertionError(_NOT_HERE)


_NOT_HERE = "this layer is computed by the engine's process: submit the call to the RemoteEngine"
