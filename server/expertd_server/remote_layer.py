"""What a front-end knows of a layer that another process computes."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_server.store import HeldLayer
from expertd_server.types import LayerSpec

__all__ = ["RemoteLayer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RemoteLayer:
    """All of a layer but its weights."""

    layer_id: int
    """Never given to another layer or version, by no engine process."""
    name: str
    weights_version: int
    weights_fingerprint: int
    is_current: bool
    """Whether requests that ask for no version get this one."""
    spec: LayerSpec
    nbytes: int
    hidden_states_scale: float | None
    routing_bias: tuple[float, ...] | None
    """As float32, which holds every bfloat16."""

    @classmethod
    def of(cls, layer: HeldLayer, layer_id: int, *, is_current: bool) -> RemoteLayer:
        """What is to be known of a layer."""
        bias = layer.bias_values()
        return cls(
            layer_id=layer_id,
            name=layer.name,
            weights_version=layer.weights_version,
            weights_fingerprint=layer.weights_fingerprint,
            is_current=is_current,
            spec=layer.spec,
            nbytes=layer.nbytes,
            hidden_states_scale=layer.hidden_states_scale,
            routing_bias=None if bias is None else tuple(bias),
        )

    def bias_values(self) -> tuple[float, ...] | None:
        """The routing bias."""
        return self.routing_bias
