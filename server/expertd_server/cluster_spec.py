"""What a tier on a Ray cluster is: how many shards and replicas, what each server gets, where the topology goes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertd_server.errors import ConfigError

__all__ = [
    "NAMESPACE",
    "SET_BY_THE_CLUSTER",
    "ClusterSpec",
    "controller_name",
    "write_prometheus_targets",
    "write_topology",
]

NAMESPACE = "expertd"
"""Ray namespace of every actor."""

SET_BY_THE_CLUSTER = ("experts", "host", "port", "metrics_port", "admin_port", "ready_file", "expert_token_metrics")
"""Options of `serve` that each server gets from its controller."""


def controller_name(tier: str) -> str:
    """Name of the actor that runs a tier. expertd.ray knows it too."""
    return f"{tier}.controller"


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """A tier as it was asked for. Raises ConfigError naming the option when a value cannot be used."""

    name: str
    """Of the tier: several may run on one Ray cluster."""
    num_experts: int
    """E of every layer."""
    shards: int
    replicas: int
    """Of each shard, at the start."""
    min_replicas: int
    """Fewest replicas that rebalancing leaves a shard."""
    max_replicas: int
    """Most replicas that rebalancing gives a shard in places that are free."""
    cpus_per_shard: float
    """CPUs that Ray sets aside for each server."""
    gpus_per_shard: float
    """GPUs that Ray sets aside for each server, and all that it sees."""
    topology_file: Path | None
    """Where the controller writes the addresses, on its own host; None: only `expertd.ray.RayTier` knows them."""
    prometheus_file: Path | None
    """Where it writes the addresses of the metrics, for Prometheus' file_sd_configs."""
    rebalance: bool
    """Whether a busy shard gets one more replica, in a free place or in one of an idle shard's."""
    serve_flags: tuple[str, ...]
    """Options of `expertd-server serve`, without those in SET_BY_THE_CLUSTER."""
    max_queue_tokens: int
    """Of each server."""
    shutdown_grace_s: float
    """Of each server."""
    start_timeout_s: float = 3600.0
    """A server that is not ready so long after its start is killed and started again."""
    interval_s: float = 1.0
    """Between two looks of the controller at all servers."""
    replace_after_s: float = 60.0
    """A server that the controller cannot reach for so long, and Ray has not brought back, is replaced."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"name is {self.name!r}, expected letters, digits, - and _")
        if not 1 <= self.shards <= self.num_experts:
            raise ConfigError(f"shards is {self.shards}, expected 1 to the {self.num_experts} experts of a layer")
        if self.replicas < 1:
            raise ConfigError(f"replicas is {self.replicas}, expected at least 1")
        if self.min_replicas < 1:
            raise ConfigError(f"min_replicas is {self.min_replicas}, expected at least 1")
        if self.max_replicas < 1:
            raise ConfigError(f"max_replicas is {self.max_replicas}, expected at least 1")
        for field in ("cpus_per_shard", "gpus_per_shard"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(f"{field} is {getattr(self, field)}, expected 0 or more")
        for field in ("start_timeout_s", "interval_s", "replace_after_s"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"{field} is {getattr(self, field)}, expected a positive number of seconds")

    def experts(self, shard: int) -> range:
        """Global ids of one shard's experts: contiguous, and as many as any other's or one fewer."""
        return range(shard * self.num_experts // self.shards, (shard + 1) * self.num_experts // self.shards)

    def server_flags(self, shard: int) -> list[str]:
        """What every server of a shard is started with, its address excepted."""
        experts = self.experts(shard)
        return [*self.serve_flags, "--experts", f"{experts.start}-{experts.stop - 1}", "--expert-token-metrics"]

    @property
    def is_tls(self) -> bool:
        """Whether the servers speak TLS alone."""
        return "--tls-cert-file" in self.serve_flags

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for one server."""
        amounts = {"CPU": self.cpus_per_shard, "GPU": self.gpus_per_shard}
        # A bundle needs something in it: every Ray node has plenty of this.
        return {kind: amount for kind, amount in amounts.items() if amount} or {"memory": 1.0}


def write_topology(path: Path, addresses: Sequence[str]) -> None:
    """Write a topology file for ExpertGroup. Raises OSError."""
    _replace(path, {"expertd_topology": 1, "servers": [{"address": address} for address in addresses]})


def write_prometheus_targets(path: Path, tier: str, targets: Sequence[tuple[str, int]]) -> None:
    """Write a file for Prometheus' file_sd_configs. targets: host:port of the metrics, and shard. Raises OSError."""
    _replace(path, [{"targets": [target], "labels": {"tier": tier, "shard": str(shard)}} for target, shard in targets])


def _replace(path: Path, document: object) -> None:
    """In one step: readers see the old file or the new one, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
