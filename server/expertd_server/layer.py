"""One layer that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from expertd_server.backend import Backend, MoEOutput, PreparedLayer
from expertd_server.types import LayerSpec

__all__ = ["MoELayer"]


@dataclass(frozen=True, eq=False)
class MoELayer:
    """A name, a version, and the prepared weights on the backend that runs them."""

    name: str
    prepared: PreparedLayer
    backend: Backend
    weights_version: int = 1
    """At least 1: a request's weights_version 0 means the current one."""
    weights_fingerprint: int = 0
    """ExpertWeights.fingerprint() of the weights as they were loaded; 0: not known."""
    spec: LayerSpec = field(init=False)
    """The layer's shape and routing."""
    hidden_states_scale: float | None = field(init=False)
    """Factor by which hidden states are quantised; None: the layer takes FP8 hidden states only."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty, expected a layer name such as 'model.layers.0'")
        if self.weights_version < 1:
            raise ValueError(f"weights_version is {self.weights_version}, expected at least 1")
        # Asked for several times for each request, so they are no properties.
        object.__setattr__(self, "spec", self.prepared.spec)
        object.__setattr__(self, "hidden_states_scale", self.prepared.weights.hidden_states_scale)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds on the backend's device."""
        return self.prepared.nbytes

    @property
    def routing_bias(self) -> torch.Tensor | None:
        """[E] float32 or bfloat16."""
        return self.prepared.weights.routing_bias

    def bias_values(self) -> list[float] | None:
        """The routing bias as float32, which holds every bfloat16."""
        return None if self.routing_bias is None else self.routing_bias.float().tolist()

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> MoEOutput:
        """Run the layer; arguments and answer as in `Backend.forward`."""
        return self.backend.forward(self.prepared, hidden_states, **arguments)
