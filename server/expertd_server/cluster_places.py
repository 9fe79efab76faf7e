"""Where the servers of a tier may run: bundles of Ray's placement groups, reserved and given back.

Ray's own table is the only memory: a controller that was started again finds every group by its name, "TIER.g3".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from expertd_server.cluster_replica import Place
from expertd_server.cluster_spec import ClusterSpec
from expertd_server.errors import ExpertdServerError

__all__ = ["ClusterError", "Places", "number_of"]

_PLACEMENT_TIMEOUT_S = 5.0


class ClusterError(ExpertdServerError):
    """The Ray cluster cannot hold the tier as asked; the message says what is missing."""

    reason = "CLUSTER"


class Places:
    """The placement groups of one tier. note: told what people should know."""

    def __init__(self, spec: ClusterSpec, note: Callable[[str, int], None]) -> None:
        self._spec = spec
        self._note = note

    def reserve_shard(self, shard: int) -> str:
        """A placement group with a place for each replica, on hosts of their own where there are enough.

        Raises ClusterError when there is no room; then nothing is left of it.
        """
        spec, name = self._spec, f"{self._spec.name}.g{shard}"
        bundles = [spec.resources] * spec.replicas
        for strategy in ("STRICT_SPREAD", "SPREAD") if _num_nodes() >= spec.replicas else ("SPREAD",):
            group = placement_group(bundles, strategy=strategy, name=name, lifetime="detached")
            if group.wait(_PLACEMENT_TIMEOUT_S):
                if strategy == "SPREAD" and spec.replicas > 1:
                    self._note(
                        f"replicas of shard {shard} share hosts: fewer than {spec.replicas} nodes have room for "
                        f"{self.wanted()}",
                        logging.WARNING,
                    )
                return name
            _remove(group)
        raise ClusterError(f"no room for {spec.replicas} replicas of shard {shard}: {self.wanted()}")

    def reserve_one(self, excluded: Iterable[str]) -> str | None:
        """A placement group of one place, not on some nodes; None: there is no room."""
        spec = self._spec
        name = f"{spec.name}.g{max([spec.shards - 1, *map(number_of, self.groups())]) + 1}"
        selector = [{"ray.io/node-id": f"!in({','.join(sorted(excluded))})"}] if excluded else None
        group = placement_group([spec.resources], name=name, lifetime="detached", bundle_label_selector=selector)
        if group.wait(_PLACEMENT_TIMEOUT_S):
            return name
        _remove(group)
        return None

    def groups(self) -> dict[str, Mapping[str, Any]]:
        """The tier's placement groups by name, as Ray describes them."""
        table: Mapping[str, Mapping[str, Any]] = placement_group_table()
        prefix = f"{self._spec.name}.g"
        return {
            group["name"]: group
            for group in table.values()
            if group["name"].startswith(prefix) and group["state"] != "REMOVED"
        }

    def free(self, taken: Container[Place]) -> dict[Place, str]:
        """Places that are reserved and not taken, and the id of the node of each."""
        return {
            (name, int(index)): node_id
            for name, group in self.groups().items()
            for index, node_id in group["bundles_to_node_id"].items()
            if node_id and group["state"] == "CREATED" and (name, int(index)) not in taken
        }

    def wanted(self) -> str:
        """What a server needs, for messages."""
        resources = " and ".join(f"{amount:g} {kind}" for kind, amount in self._spec.resources.items())
        return f"each needs {resources}"

    def release(self, group: str) -> None:
        """Give back what was reserved, and end what runs there."""
        remove_placement_group(get_placement_group(group))


def number_of(group: str) -> int:
    """12 of "tier.g12"."""
    return int(group.rpartition(".g")[2])


def _num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def _remove(group: PlacementGroup) -> None:
    """Remove a group and wait until its name is free again."""
    remove_placement_group(group)
    until_s = time.monotonic() + _PLACEMENT_TIMEOUT_S
    while placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < until_s:
        time.sleep(0.05)
