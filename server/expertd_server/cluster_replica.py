"""What the controller of a tier knows of its servers, and what it tells people. No Ray in here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from expertd_server.cluster_policy import ShardLoad
from expertd_server.cluster_server import ServerStats, ServerStatus
from expertd_server.cluster_spec import ClusterSpec

__all__ = ["Place", "Replica", "ReplicaReport", "TierReport", "shard_loads"]

_RATE_WINDOW_S = 5.0

Place: TypeAlias = tuple[str, int]
"""Placement group and bundle."""


@dataclass(frozen=True)
class ReplicaReport:
    """One server, for people."""

    name: str
    shard: int
    experts: str
    node: str
    """Its host's address and the beginning of Ray's id of the node."""
    status: ServerStatus
    is_reachable: bool
    """Whether its actor answered the last time it was asked."""
    tokens_per_s: float
    busy: float
    """Share of time that its device computes, 0 to 1."""


@dataclass(frozen=True)
class TierReport:
    """A tier, for people."""

    spec: ClusterSpec
    replicas: tuple[ReplicaReport, ...]
    notes: tuple[str, ...]
    """What the controller did and warns of, oldest first."""


@dataclass
class Replica:
    """What the controller knows of one server."""

    name: str
    handle: Any
    shard: int
    place: Place
    pending: Any = None
    """The question that is under way."""
    node_id: str = ""
    node_ip: str = ""
    status: ServerStatus = field(default_factory=lambda: ServerStatus(state="starting"))
    address: str | None = None
    """The last one known: a server that cannot be reached from here may well answer its callers."""
    heard_at_s: float = field(default_factory=time.monotonic)
    is_reachable: bool = False
    is_retiring: bool = False
    history: list[ServerStatus] = field(default_factory=list)
    """Of one instance, over the last few seconds, oldest first."""

    def take(self, answer: tuple[str, str, ServerStatus]) -> None:
        """Take an answer to `status`."""
        self.node_id, self.node_ip, self.status = answer
        self.address = self.status.address or self.address
        self.heard_at_s, self.is_reachable = time.monotonic(), True
        if self.history and self.history[-1].instance_id != self.status.instance_id:
            self.history.clear()
        self.history.append(self.status)
        while len(self.history) > 2 and self.status.at_s - self.history[1].at_s > _RATE_WINDOW_S:
            self.history.pop(0)

    def unheard(self, now_s: float) -> None:
        """No answer came: after a while the server counts as one that cannot be reached."""
        # An actor that waits for a place does not answer either.
        self.is_reachable = self.is_reachable and now_s - self.heard_at_s < _RATE_WINDOW_S

    def rates(self) -> ServerStats:
        """Tokens, busy seconds and expert tokens per second of late; the queue as it is."""
        first, last = (self.history[0], self.history[-1]) if self.history else (self.status, self.status)
        elapsed_s = last.at_s - first.at_s
        if elapsed_s <= 0:
            return ServerStats(queue_tokens=last.stats.queue_tokens)
        before, after = first.stats, last.stats
        experts = {e: (n - before.expert_tokens.get(e, 0)) / elapsed_s for e, n in after.expert_tokens.items()}
        return ServerStats(
            max(0.0, (after.tokens - before.tokens) / elapsed_s),
            min(1.0, max(0.0, (after.busy_s - before.busy_s) / elapsed_s)),
            after.queue_tokens,
            experts,
        )

    def report(self, spec: ClusterSpec) -> ReplicaReport:
        """For people."""
        experts = spec.experts(self.shard)
        rates = self.rates()
        return ReplicaReport(
            name=self.name,
            shard=self.shard,
            experts=f"{experts.start}-{experts.stop - 1}",
            node=f"{self.node_ip} {self.node_id[:8]}".strip(),
            status=self.status,
            is_reachable=self.is_reachable,
            tokens_per_s=rates.tokens,
            busy=rates.busy_s,
        )


def shard_loads(spec: ClusterSpec, replicas: Iterable[Replica]) -> list[ShardLoad]:
    """The statistics of every shard's serving replicas, and how many others it has."""
    by_shard: dict[int, list[ServerStats]] = {shard: [] for shard in range(spec.shards)}
    starting: Counter[int] = Counter()
    for replica in replicas:
        if replica.is_retiring:
            continue
        if replica.is_reachable and replica.status.state == "serving":
            by_shard[replica.shard].append(replica.rates())
        else:
            starting[replica.shard] += 1
    loads = []
    for shard, rates in by_shard.items():
        experts: Counter[int] = Counter()  # of rates
        for each in rates:
            experts.update(each.expert_tokens)
        total = sum(experts.values())
        hottest = max(experts, key=lambda expert: (experts[expert], -expert)) if total > 0 else None
        loads.append(
            ShardLoad(
                shard=shard,
                num_replicas=len(rates),
                num_starting=starting[shard],
                busy_servers=sum(each.busy_s for each in rates),
                queue_tokens=sum(each.queue_tokens for each in rates),
                hottest_expert=hottest,
                hottest_share=0.0 if hottest is None else experts[hottest] / total,
            )
        )
    return loads
