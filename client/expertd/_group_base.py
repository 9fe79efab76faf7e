"""Everything that the synchronous and the asynchronous group share: who is a member, who holds what. No I/O."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertd import _fast
from expertd._base import Outcome
from expertd._call import Call
from expertd._dispatch import Attempt, Dispatch, Job, Shared
from expertd._lookup import Lookup
from expertd._plan import PreparedRequest, prepare
from expertd._replicas import BreakerState, HedgeBudget, Latencies, Replica
from expertd._seconds import checked_timeout_s
from expertd._stats import GroupStats
from expertd._wire_read import nbytes_of
from expertd.config import ClientConfig, RetryPolicy
from expertd.errors import (
    ConfigError,
    ExpertdError,
    LayerNotFoundError,
    NoReplicaError,
    ProtocolError,
    TopologyError,
    UnavailableError,
    VersionNotHeldError,
)
from expertd.group_types import GroupConfig, GroupResult
from expertd.topology import (
    LayerPlacement,
    Member,
    NamedAddress,
    Targets,
    distinct,
    place_layer,
    resolver_for,
    still_held,
)
from expertd.types import ForwardRequest, LayerInfo, LayerState, RoutingMethod

__all__ = ["GroupBase", "Prepared", "Probe", "is_worth_a_look"]

logger = logging.getLogger("expertd.group")

_READS_BIAS = (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)


@dataclass(frozen=True)
class Probe:
    """What asking one server has shown."""

    address: str
    member: Member | None
    """None: it did not answer."""
    error: ExpertdError | None = None


class GroupBase:
    """Configuration, members and placements of a group, and every decision without I/O."""

    def __init__(self, targets: Targets, config: GroupConfig | None = None) -> None:
        """targets: see `expertd.topology.resolver_for`. Raises ConfigError naming what cannot be used."""
        _fast.warm_up()
        self.config = config or GroupConfig()
        self.stats = GroupStats()
        self._lookup = Lookup(
            resolver_for(targets), first_patience_s=self.config.timeout_s, patience_s=self.config.probe_timeout_s
        )
        percentile = self.config.hedge_percentile
        self._shared = Shared(
            config=self.config,
            stats=self.stats,
            latencies=None if percentile is None else Latencies(percentile, self.config.min_hedge_delay_s),
            budget=HedgeBudget(self.config.hedge_share, self.config.hedge_burst),
        )
        self._lock = threading.Lock()
        """Guards everything below, and every Dispatch."""
        self._configs: dict[str, ClientConfig] = {}
        self._replicas: dict[str, Replica] = {}
        self._members: dict[str, Member] = {}
        self._placements: dict[str, LayerPlacement] = {}
        self._generation = 0
        """Refreshes that have ended."""
        self._is_refreshing = False
        self._refresh_error: ExpertdError | None = None
        """Why the last refresh found nobody."""
        self._disagreements: list[str] = []
        """Layers whose servers do not agree on what they are."""
        self._is_ready = False
        """Whether the members have once covered every layer."""
        self._is_partly_ready = False
        """Whether they have once held any layer, which is enough for a call that takes partial answers."""

    def metrics_text(self) -> str:
        """Counters and the state of each server, in Prometheus' text format, named expertd_client_…."""
        with self._lock:
            gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for replica in self._replicas.values():
                labels = (("replica", replica.address),)
                is_up = replica.breaker.state is BreakerState.CLOSED and not replica.draining
                gauges["expertd_client_replica_up", labels] = int(is_up)
                gauges["expertd_client_replica_in_flight_tokens", labels] = replica.in_flight_tokens
            if self._shared.latencies is not None:
                for max_tokens, delay_s in self._shared.latencies.hedge_delays_s().items():
                    gauges["expertd_client_hedge_delay_seconds", (("max_tokens", str(max_tokens)),)] = delay_s
        return self.stats.prometheus_text(gauges)

    def placement(self, layer: str) -> LayerPlacement:
        """Which servers hold which experts of a layer, as of the last refresh. Raises LayerNotFoundError."""
        with self._lock:
            return self._placement(layer)

    def _count_unwanted(self, nbytes: int) -> None:
        """An answer came that nobody waited for any more, as the slower one of a hedged part does."""
        self.stats.count("received_bytes", nbytes)

    def _client_config(self, address: str) -> ClientConfig:
        config = self._configs.get(address)
        if config is None:
            # A group tries another server instead of the same one again.
            no_retries = RetryPolicy(max_attempts=1)
            config = dataclasses.replace(self.config.client(address), target=address, retry=no_retries)
            if config.uses_tls and config.server_name is None and isinstance(address, NamedAddress):
                config = dataclasses.replace(config, server_name=address.server_name)
            self._configs[address] = config
        return config

    def _take_members(self, addresses: Sequence[str], probes: Sequence[Probe]) -> None:
        """Take what a refresh has shown, for all addresses that the targets stand for: place every layer anew.

        A server that does not answer stays what it was until the targets no longer name it; its breaker keeps requests
        away from it.
        """
        with self._lock:
            members = {address: self._members[address] for address in addresses if address in self._members}
            errors = [f"the targets cannot be resolved: {self._lookup.trouble}"] if self._lookup.trouble else []
            for probe in probes:
                if probe.member is None:
                    errors.append(f"{probe.address}: {probe.error}")
                else:
                    members[probe.address] = probe.member
            answered = {probe.address for probe in probes if probe.member is not None}
            self._members = {member.address: member for member in distinct(members.values(), answered)}
            self._replicas = {address: self._replica(address) for address in self._members}
            self._configs = {address: self._configs[address] for address in addresses if address in self._configs}
            for probe in probes:
                self._take_health(probe)
            self._place()
            self._end_refresh()
            self._refresh_error = None
            if not self._members:
                tried = "; ".join(errors) or "the targets stand for no address"
                self._refresh_error = UnavailableError(f"no server of the group answered: {tried}")

    def _refresh_failed(self, error: Exception) -> None:
        """The targets stand for nothing, or the look failed: go on with the members that there are."""
        if not isinstance(error, OSError | TopologyError):
            # A resolver of the caller's own, or a mistake of ours: the group must go on looking.
            logger.error("refresh failed: %s", error, exc_info=None if isinstance(error, ConfigError) else error)
        with self._lock:
            self._end_refresh()
            text = str(error) or repr(error)
            seen = error if isinstance(error, TopologyError | ConfigError) else UnavailableError(text)
            self._refresh_error = None if self._members else seen

    def _begin_refresh(self) -> None:
        with self._lock:
            self._is_refreshing = True

    def _end_refresh(self) -> None:
        """Holds the lock."""
        self._is_refreshing = False
        self._generation += 1

    def _next_generation(self) -> int:
        """What _generation will be when a refresh has ended that has not begun yet. Holds the lock."""
        return self._generation + 1 + self._is_refreshing

    def _take_health(self, probe: Probe) -> None:
        """Take one server's sign of life, or the lack of it. Holds the lock."""
        replica = self._replicas.get(probe.address)
        if replica is None:
            return
        if probe.member is not None:
            replica.draining = probe.member.server.draining
            replica.breaker.probe_succeeded()
        elif isinstance(probe.error, UnavailableError):
            replica.breaker.trip()
        else:
            replica.breaker.failed()

    def _replica(self, address: str) -> Replica:
        replica = self._replicas.get(address)
        if replica is None:
            max_in_flight = self._client_config(address).max_in_flight
            replica = Replica(address, max_in_flight=max_in_flight, max_failures=self.config.max_failures)
        return replica

    def _place(self) -> None:
        placements: dict[str, LayerPlacement] = {}
        self._disagreements = []
        for name in sorted({name for member in self._members.values() for name in member.layers}):
            previous = self._placements.get(name)
            try:
                placement = place_layer(name, self._members.values(), previous)
            except TopologyError as error:
                logger.error("refresh: %s", error)
                self._disagreements.append(str(error))
                placement = None if previous is None else still_held(previous, self._members)
            if placement is not None:
                placements[name] = placement
        self._placements = placements

    def _is_ready_for(self, *, allow_partial: bool) -> bool:
        """Whether such calls need not ask first what the servers hold."""
        return self._is_ready or (allow_partial and self._is_partly_ready)

    def _check_ready(self, *, allow_partial: bool) -> None:
        """Raise unless the members cover every layer, as they must have done once before the first call.

        allow_partial: any layer, and any experts of it, are enough.
        """
        with self._lock:
            if self._refresh_error is not None:
                raise copy.copy(self._refresh_error)
            problems = list(self._disagreements)
            if not self._placements:
                # They listen before they have loaded anything.
                problems.append(f"no layer is held by {', '.join(sorted(self._members))} yet")
            missing = [each.describe_missing() for each in self._placements.values() if each.missing]
            if not allow_partial:
                problems += missing
            if problems:
                raise TopologyError("; ".join(problems))
            self._is_partly_ready = True
            self._is_ready = self._is_ready or not missing

    def _placement(self, layer: str) -> LayerPlacement:
        placement = self._placements.get(layer)
        if placement is None:
            held = ", ".join(sorted(self._placements)) or "none"
            raise LayerNotFoundError(f"no server of the group holds layer {layer!r}; it holds {held}")
        return placement

    def _merged_info(self, placement: LayerPlacement) -> LayerInfo:
        """The layer as one server that held all of it would describe it. Holds the lock."""
        version = self._best_version(placement)
        info = placement.infos[version]
        held = [frozenset().union(*shard.versions.values()) for shard in placement.shards]
        versions = frozenset.intersection(*held) if held else frozenset()
        total = sum(
            max(self._members[address].layers[placement.name].weights_bytes for address in shard.versions)
            for shard in placement.shards
        )
        return dataclasses.replace(
            info,
            local_expert_offset=0,
            local_num_experts=info.num_experts,
            weights_version=version,
            weights_versions=tuple(sorted(versions)),
            weights_bytes=total,
            weights_fingerprint=0,  # of a slice, and they have one each
            state=LayerState.LOADING if placement.missing else LayerState.READY,
        )

    def _begin(self, request: ForwardRequest[Any], deadline: float, allow_partial: bool) -> Prepared:
        """Choose a version, route, split: everything up to the first byte on the wire. Takes the lock for short."""
        prepared = prepare(request)
        with self._lock:
            placement = self._placement(prepared.layer)
            if placement.missing and not allow_partial:
                error = NoReplicaError(placement.describe_missing())
                error.layer, error.experts = placement.name, tuple(placement.missing)
                raise error
            version = prepared.weights_version or self._best_version(placement)
            info = self._info(placement, version, prepared)
            holders = [self._holders(shard.versions, version) for shard in placement.shards]
            if not all(holders) and not allow_partial:
                raise VersionNotHeldError(_describe_versions(placement, prepared.weights_version))
            limits = [self._limits(shard.versions) for shard in placement.shards]
        call = Call(
            prepared,
            info,
            [shard.experts for shard in placement.shards],
            weights_version=version,
            limits=limits,
            partial_dtype=self.config.partial_dtype,
            broadcast=self.config.mode == "broadcast",
        )
        jobs = []
        for index, part in enumerate(call.parts):
            experts = placement.shards[part.shard].experts
            look_again = functools.partial(self._current_holders, prepared.layer, experts, version)
            jobs.append(Job(index, experts, part.num_tokens, holders[part.shard], look_again))
        dispatch = Dispatch(jobs, self._shared, layer=prepared.layer, deadline=deadline, allow_partial=allow_partial)
        return Prepared(call, dispatch)

    def _best_version(self, placement: LayerPlacement) -> int:
        """The version that most shards can answer in, healthy servers first; of those the one that most servers call
        current, and of those the newest."""

        def rank(version: int) -> tuple[int, int, int, int]:
            holders = [self._holders(shard.versions, version) for shard in placement.shards]
            healthy = sum(any(r.breaker.admits and not r.draining for r in replicas) for replicas in holders)
            return sum(map(bool, holders)), healthy, placement.num_current.get(version, 0), version

        return max(placement.infos, key=rank)

    def _holders(self, versions: Mapping[str, frozenset[int]], version: int) -> list[Replica]:
        return [
            self._replicas[address]
            for address, held in versions.items()
            if version in held and address in self._replicas
        ]

    def _current_holders(self, layer: str, experts: range, version: int) -> list[Replica]:
        """Holders of one slice as of the last refresh; none when the layer is cut otherwise now. Holds the lock."""
        placement = self._placements.get(layer)
        shards = () if placement is None else placement.shards
        return [r for shard in shards if shard.experts == experts for r in self._holders(shard.versions, version)]

    def _info(self, placement: LayerPlacement, version: int, request: PreparedRequest) -> LayerInfo:
        info = placement.infos.get(version)
        if info is not None:
            return info
        newest = placement.infos[max(placement.infos)]
        if request.routing_logits is not None and newest.routing_method in _READS_BIAS:
            raise VersionNotHeldError(
                f"weights_version {version} of layer {placement.name!r}: its routing bias is not known, because it is "
                f"current on no server; pass topk_ids and topk_weights, or ask for {sorted(placement.infos)}"
            )
        return newest

    def _limits(self, addresses: Iterable[str]) -> tuple[int, int]:
        """Most tokens and most bytes in one message that all replicas of a shard take."""
        tokens, sizes = [], []
        for address in addresses:
            config, server = self._client_config(address), self._members[address].server
            tokens.append(server.max_batch_tokens)
            sizes += [config.max_message_bytes, server.max_message_bytes or config.max_message_bytes]
        return min(tokens), min(sizes)

    def _settle(self, prepared: Prepared, attempt: Attempt, outcome: Outcome, now: float) -> None:
        """Take what came back for an attempt."""
        if not isinstance(outcome, ExpertdError):
            nbytes = nbytes_of(outcome)
            prepared.call.received_bytes += nbytes
            self.stats.count("received_bytes", nbytes)
            try:
                prepared.call.accept(attempt.job.index, outcome)
            except ProtocolError as error:
                outcome = error
        with self._lock:
            if isinstance(outcome, ExpertdError):
                prepared.dispatch.failed(attempt, outcome, now)
            else:
                prepared.dispatch.answered(attempt, outcome.timing.queue_depth_tokens, now)

    def _finish(self, prepared: Prepared) -> GroupResult[Any]:
        """The caller's result of a call that is done."""
        result = prepared.call.result(prepared.dispatch)
        self.stats.count("requests", outcome="partial" if result.is_partial else "ok")
        self.stats.count("tokens", prepared.call.request.num_tokens)
        return result

    def _timeout_s(self, timeout_s: float | None) -> float:
        return self.config.timeout_s if timeout_s is None else checked_timeout_s(timeout_s)


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to go."""

    call: Call
    dispatch: Dispatch


def is_worth_a_look(error: ExpertdError, request: ForwardRequest[Any], num_looks: int, is_patient: bool) -> bool:
    """Whether to ask the servers again what they hold before a call fails with `error`.

    num_looks: errors so far, this one included. is_patient: whether waiting for servers to come back is still allowed.
    """
    if isinstance(error, LayerNotFoundError) or (
        isinstance(error, VersionNotHeldError) and request.weights_version is not None
    ):
        return num_looks == 1  # what is known may be old, but what was asked for may well not exist
    return isinstance(error, NoReplicaError | VersionNotHeldError) and is_patient


def _describe_versions(placement: LayerPlacement, asked: int) -> str:
    held = "; ".join(
        f"experts {shard.experts.start}-{shard.experts.stop - 1}: {sorted(frozenset().union(*shard.versions.values()))}"
        for shard in placement.shards
    )
    wanted = f"weights_version {asked}" if asked else "any one version of the weights"
    return f"layer {placement.name!r}: {wanted} is not held for all experts ({held})"
