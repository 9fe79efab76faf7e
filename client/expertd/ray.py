"""Workers in a Ray cluster find the servers that `expertd-server cluster up` placed there; needs ray.

import expertd
from expertd.ray import RayTier

with expertd.ExpertGroup(RayTier()) as group:
    ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from expertd.errors import TopologyError

__all__ = ["RayTier"]

_NAMESPACE = "expertd"


@dataclass(frozen=True)
class RayTier:
    """The addresses that a tier's controller knows. Use it in a process that is connected to the Ray cluster."""

    name: str = "expertd"
    """Of the tier, as given to `cluster up`."""
    timeout_s: float = 5.0
    """How long to wait for the controller."""

    def resolve(self) -> Sequence[str]:
        """See expertd.topology.Resolver. Raises TopologyError when there is no such tier or no answer."""
        try:
            controller = ray.get_actor(f"{self.name}.controller", _NAMESPACE)
            addresses: list[str] = ray.get(controller.addresses.remote(), timeout=self.timeout_s)
        except (RayError, ValueError) as error:
            raise TopologyError(f"Ray tier {self.name!r}: {str(error).splitlines()[0]}") from error
        return addresses
