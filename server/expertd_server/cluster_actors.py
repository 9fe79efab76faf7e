"""The actors of a tier on Ray: one for each server, and the controller that places them and publishes where they are.

Ray's own tables are the controller's memory: servers are named actors, their places bundles of named placement groups,
and a controller that was started again finds both. A server's name says which shard it serves, and where:
"TIER.s0.g1.2" serves shard 0 in bundle 2 of placement group "TIER.g1".
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address, list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expertd_server.cluster_policy import Balancer, Move, PolicyConfig, ShardLoad
from expertd_server.cluster_server import ServerProcess, ServerStats, ServerStatus
from expertd_server.cluster_spec import NAMESPACE, ClusterSpec, write_prometheus_targets, write_topology
from expertd_server.errors import ExpertdServerError
from expertd_server.logs import configure_logging

__all__ = ["ClusterError", "Controller", "ReplicaReport", "ServerActor", "TierReport"]

log = logging.getLogger(__name__)

_PLACEMENT_TIMEOUT_S = 5.0
_DRAIN_MARGIN_S = 15.0
_RATE_WINDOW_S = 5.0
_TAKE_OVER_S = 10.0
_MAX_NOTES = 20


class ClusterError(ExpertdServerError):
    """The Ray cluster cannot hold the tier as asked; the message says what is missing."""

    reason = "CLUSTER"


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


class ServerActor:
    """Keeps one server process running on whatever node Ray puts it."""

    def __init__(self, flags: Sequence[str], shutdown_grace_s: float, is_tls: bool) -> None:
        configure_logging("info", "text")
        self._node = ray.get_runtime_context().get_node_id()
        self._ip: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        self._process = ServerProcess(flags, self._ip, shutdown_grace_s=shutdown_grace_s, is_tls=is_tls)

    def status(self) -> tuple[str, str, ServerStatus]:
        """The node's id, its address, and how the server is."""
        return self._node, self._ip, self._process.status()

    def drain(self) -> bool:
        """Finish what is in flight and stop for good."""
        return self._process.drain()


@dataclass
class _Replica:
    """What the controller knows of one server."""

    name: str
    handle: Any
    shard: int
    place: tuple[str, int]
    """Placement group and bundle."""
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


def shard_loads(spec: ClusterSpec, replicas: Iterable[_Replica]) -> list[ShardLoad]:
    """The statistics of every shard's serving replicas."""
    by_shard: dict[int, list[ServerStats]] = {shard: [] for shard in range(spec.shards)}
    for replica in replicas:
        if replica.is_reachable and not replica.is_retiring and replica.status.state == "serving":
            by_shard[replica.shard].append(replica.rates())
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
                busy_servers=sum(each.busy_s for each in rates),
                queue_tokens=sum(each.queue_tokens for each in rates),
                hottest_expert=hottest,
                hottest_share=0.0 if hottest is None else experts[hottest] / total,
            )
        )
    return loads


class Controller:
    """Places the servers of one tier, publishes their addresses, scales and rebalances. One actor for each tier."""

    def __init__(self, spec: ClusterSpec) -> None:
        configure_logging("info", "text")
        self._spec = spec
        self._lock = threading.RLock()
        """Guards the replicas and the notes; held for moments only."""
        self._changing = threading.Lock()
        """Held while replicas are added or retired, one change at a time."""
        self._replicas: dict[str, _Replica] = {}
        self._notes: list[str] = []
        self._publishing = threading.Lock()
        """Held while files are written."""
        self._published: object = None
        self._balancer = Balancer(PolicyConfig(min_replicas=spec.min_replicas, full_queue_tokens=spec.max_queue_tokens))
        self._stopping = threading.Event()
        self._find_replicas()
        self._goal = Counter(replica.shard for replica in self._replicas.values())
        """Replicas that each shard should have."""
        self._mend_at_s = 0.0
        """When to try again to add what is missing."""
        self._settled_at_s = time.monotonic() + _TAKE_OVER_S if self._replicas else 0.0
        """A controller that was started again says nothing before it has heard every server, or this moment."""
        # Two threads: a server that drains for half a minute must not hold up the topology.
        for name, steps in {"publish": (self._poll, self._publish), "tend": (self._tend,)}.items():
            threading.Thread(target=self._repeat, args=steps, name=f"expertd-{name}", daemon=True).start()

    # ---- what the commands ask

    def start(self) -> None:
        """Reserve a place for every replica and start its server; returns before they are ready.

        Raises ClusterError when there is no room; then nothing is left behind.
        """
        with self._changing:
            try:
                for shard in range(self._spec.shards):
                    group = self._reserve_shard(shard)
                    for index in range(self._spec.replicas):
                        self._start_server(shard, (group, index))
                    self._goal[shard] = self._spec.replicas
            except ClusterError:
                self._stop_all()
                raise

    def report(self) -> TierReport:
        """Everything about the tier."""
        with self._lock:
            replicas = sorted(self._replicas.values(), key=lambda each: (each.shard, each.name))
            return TierReport(self._spec, tuple(map(self._report, replicas)), tuple(self._notes))

    def addresses(self) -> list[str]:
        """Where the servers are: what the topology file holds. Raises ClusterError just after a restart."""
        with self._lock:
            if not self._is_settled():
                raise ClusterError("the controller was started again and has not heard from every server yet")
            known = (each.address for each in self._replicas.values() if not each.is_retiring)
            return sorted(address for address in known if address is not None)

    def scale(self, replicas: int, shard: int | None = None) -> None:
        """Give one shard, or each, so many replicas. Those that go finish what they have; new ones are not awaited.

        Raises ClusterError when there is no room for all; those that found some stay, and a shard that had lost some
        still gets them back.
        """
        with self._changing:
            for each in range(self._spec.shards) if shard is None else [shard]:
                try:
                    while len(self._of(each)) < replicas:
                        self._add_replica(each)
                    self._retire(self._of(each)[replicas:])
                except BaseException:
                    self._goal[each] = max(self._goal[each], len(self._of(each)))
                    raise
                self._goal[each] = len(self._of(each))

    def move(self, source: int, target: int) -> None:
        """Hand the place of one replica of `source` over to a new one of `target`, which is not awaited.

        Raises ClusterError when `source` has only one.
        """
        with self._changing:
            if len(self._of(source)) < 2:
                raise ClusterError(f"shard {source} has one replica: without it, its experts would be missing")
            self._move(Move(source=source, target=target, reason="asked for"))

    def down(self) -> None:
        """Drain and stop every server, free what was reserved, remove what was published."""
        self._stopping.set()
        with self._changing:
            self._stop_all()
        with self._publishing:
            for path in (self._spec.topology_file, self._spec.prometheus_file):
                if path is not None:
                    path.unlink(missing_ok=True)

    # ---- the loop

    def _repeat(self, *steps: Callable[[], None]) -> None:
        while not self._stopping.wait(self._spec.interval_s):
            for step in steps:
                try:
                    step()
                except Exception as error:  # whatever it is, the tier is tended again
                    log.exception("%s", step.__name__)
                    self._note(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", logging.ERROR)

    def _tend(self) -> None:
        # A command that changes the tier does not wait for this, nor this for it.
        if self._changing.acquire(blocking=False):
            try:
                self._mend()
                self._rebalance()
            finally:
                self._changing.release()

    def _poll(self) -> None:
        """Ask every server how it is, at most one question at a time, and take the answers that come."""
        with self._lock:
            replicas = list(self._replicas.values())
        for replica in replicas:
            if replica.pending is None:
                replica.pending = replica.handle.status.remote()
        pending = [replica.pending for replica in replicas]
        if not pending:
            return
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=self._spec.interval_s)
        for replica in replicas:
            if replica.pending not in ready:
                # An actor that waits for a place does not answer either.
                replica.is_reachable = replica.is_reachable and time.monotonic() - replica.heard_at_s < _RATE_WINDOW_S
                continue
            reference, replica.pending = replica.pending, None
            try:
                answer = ray.get(reference)
            except RayError:
                replica.is_reachable = False
                continue
            with self._lock:
                replica.take(answer)

    def _is_settled(self) -> bool:
        """Whether silence about a server means that it is not there. Holds the lock."""
        all_heard = all(replica.address is not None for replica in self._replicas.values())
        return all_heard or time.monotonic() > self._settled_at_s

    def _publish(self) -> None:
        spec = self._spec
        with self._publishing:
            with self._lock:
                if self._stopping.is_set() or not self._is_settled():
                    return
                addresses = self.addresses()
                targets = sorted(
                    (each.status.metrics_address, each.shard)
                    for each in self._replicas.values()
                    if each.status.metrics_address is not None and not each.is_retiring
                )
            if not addresses or (addresses, targets) == self._published:
                return
            if spec.topology_file is not None:
                write_topology(spec.topology_file, addresses)
            if spec.prometheus_file is not None:
                write_prometheus_targets(spec.prometheus_file, spec.name, targets)
            self._published = addresses, targets

    def _mend(self) -> None:
        """Replace servers that are gone and that Ray has not brought back in time. Holds _changing."""
        now_s = time.monotonic()
        for replica in self._all():
            silent_s = now_s - replica.heard_at_s
            if silent_s > self._spec.replace_after_s:
                self._note(f"{replica.name} is gone for {silent_s:.0f} s: to be replaced", logging.WARNING)
                self._forget(replica)
            elif replica.is_reachable and replica.status.state == "stopped":  # by a controller before this one
                self._forget(replica)
        if now_s < self._mend_at_s:
            return
        for shard in range(self._spec.shards):
            while len(self._of(shard)) < self._goal[shard]:
                self._mend_at_s = now_s + self._spec.replace_after_s  # unless this works
                self._add_replica(shard)
                self._mend_at_s = 0.0

    def _rebalance(self) -> None:
        if not self._spec.rebalance:
            return
        move = self._balancer.look(shard_loads(self._spec, self._all()))
        if move is not None:
            self._move(move)

    def _move(self, move: Move) -> None:
        """Hand a place of one shard over to another. Holds _changing."""
        self._note(f"moving a replica of shard {move.source} to shard {move.target}: {move.reason}")
        hosts = {replica.node_id for replica in self._of(move.target)}
        # A host that has no replica of the target yet is best.
        leaving = min(self._of(move.source), key=lambda each: (each.node_id in hosts, each.name))
        self._goal[move.source] -= 1
        self._goal[move.target] += 1
        self._retire([leaving], keep_place=True)
        self._start_server(move.target, leaving.place)

    # ---- replicas and places

    def _find_replicas(self) -> None:
        """Take over the servers that a controller before this one has started."""
        prefix = f"{self._spec.name}.s"
        for entry in list_named_actors(all_namespaces=True):
            name: str = entry["name"]
            if entry["namespace"] != NAMESPACE or not name.startswith(prefix):
                continue
            shard, group, index = name.removeprefix(prefix).split(".")
            place = (f"{self._spec.name}.{group}", int(index))
            self._replicas[name] = _Replica(name, ray.get_actor(name, NAMESPACE), int(shard), place)

    def _all(self) -> list[_Replica]:
        with self._lock:
            return [replica for replica in self._replicas.values() if not replica.is_retiring]

    def _of(self, shard: int) -> list[_Replica]:
        """A shard's replicas, those first that one would part with last."""

        def worth(replica: _Replica) -> tuple[bool, bool, int, int]:
            group, index = replica.place
            return not replica.is_reachable, replica.status.state != "serving", _number(group), index

        return sorted((replica for replica in self._all() if replica.shard == shard), key=worth)

    def _start_server(self, shard: int, place: tuple[str, int]) -> None:
        group, index = place
        spec = self._spec
        name = f"{spec.name}.s{shard}.{group.rpartition('.')[2]}.{index}"
        handle = (
            ray.remote(ServerActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=4,
                num_cpus=spec.cpus_per_shard,
                num_gpus=spec.gpus_per_shard,
                scheduling_strategy=PlacementGroupSchedulingStrategy(get_placement_group(group), index),
            )
            .remote(spec.server_flags(shard), spec.shutdown_grace_s, "--tls-cert-file" in spec.serve_flags)
        )
        with self._lock:
            self._replicas[name] = _Replica(name, handle, shard, place)

    def _add_replica(self, shard: int) -> None:
        """Start one more server of a shard, on a host that has none where there is room. Holds _changing."""
        hosts = {replica.node_id for replica in self._of(shard) if replica.node_id}
        places = self._free_places()
        apart = [place for place, node_id in places.items() if node_id not in hosts]
        if apart:
            self._start_server(shard, apart[0])
            return
        group = self._reserve_one(hosts)
        if group is not None:
            self._start_server(shard, (group, 0))
            return
        if places:
            place = next(iter(places))
        else:
            alone = self._reserve_one(())
            if alone is None:
                raise ClusterError(f"no node has room for another replica of shard {shard}: {self._wanted()}")
            place = (alone, 0)
        self._note(f"two replicas of shard {shard} share a host: no other has room", logging.WARNING)
        self._start_server(shard, place)

    def _retire(self, replicas: Sequence[_Replica], *, keep_place: bool = False) -> None:
        """Publish without them, let them finish what they have, stop them. Holds _changing."""
        for replica in replicas:
            replica.is_retiring = True
        self._publish()
        drains = {replica.name: replica.handle.drain.remote() for replica in replicas if replica.is_reachable}
        if drains:
            timeout_s = self._spec.shutdown_grace_s + _DRAIN_MARGIN_S
            ray.wait(list(drains.values()), num_returns=len(drains), timeout=timeout_s)
        for replica in replicas:
            self._forget(replica, keep_place=keep_place)

    def _forget(self, replica: _Replica, *, keep_place: bool = False) -> None:
        ray.kill(replica.handle, no_restart=True)
        with self._lock:
            self._replicas.pop(replica.name, None)
        group, _ = replica.place
        # The groups of `up` keep what they reserved, so that a shard finds its places again.
        if _number(group) >= self._spec.shards and not keep_place:
            remove_placement_group(get_placement_group(group))

    def _stop_all(self) -> None:
        with self._lock:
            replicas = list(self._replicas.values())
        self._retire(replicas, keep_place=True)
        for name in self._groups():
            remove_placement_group(get_placement_group(name))

    def _reserve_shard(self, shard: int) -> str:
        """A placement group with a place for each replica, on hosts of their own where there are enough."""
        spec, name = self._spec, f"{self._spec.name}.g{shard}"
        bundles = [spec.resources] * spec.replicas
        for strategy in ("STRICT_SPREAD", "SPREAD") if _num_nodes() >= spec.replicas else ("SPREAD",):
            group = placement_group(bundles, strategy=strategy, name=name, lifetime="detached")
            if group.wait(_PLACEMENT_TIMEOUT_S):
                if strategy == "SPREAD" and spec.replicas > 1:
                    self._note(
                        f"replicas of shard {shard} share hosts: fewer than {spec.replicas} nodes have room for "
                        f"{self._wanted()}",
                        logging.WARNING,
                    )
                return name
            _remove(group)
        raise ClusterError(f"no room for {spec.replicas} replicas of shard {shard}: {self._wanted()}")

    def _reserve_one(self, excluded: Iterable[str]) -> str | None:
        """A placement group of one place, not on some nodes; None: there is no room."""
        spec = self._spec
        name = f"{spec.name}.g{max([spec.shards - 1, *map(_number, self._groups())]) + 1}"
        selector = [{"ray.io/node-id": f"!in({','.join(sorted(excluded))})"}] if excluded else None
        group = placement_group([spec.resources], name=name, lifetime="detached", bundle_label_selector=selector)
        if group.wait(_PLACEMENT_TIMEOUT_S):
            return name
        _remove(group)
        return None

    def _groups(self) -> dict[str, Mapping[str, Any]]:
        """The tier's placement groups by name, as Ray describes them."""
        table: Mapping[str, Mapping[str, Any]] = placement_group_table()
        prefix = f"{self._spec.name}.g"
        return {
            group["name"]: group
            for group in table.values()
            if group["name"].startswith(prefix) and group["state"] != "REMOVED"
        }

    def _free_places(self) -> dict[tuple[str, int], str]:
        """Places that are reserved and hold no server, and the id of the node of each."""
        taken = {replica.place for replica in self._replicas.values()}
        return {
            (name, int(index)): node_id
            for name, group in self._groups().items()
            for index, node_id in group["bundles_to_node_id"].items()
            if node_id and group["state"] == "CREATED" and (name, int(index)) not in taken
        }

    def _wanted(self) -> str:
        resources = " and ".join(f"{amount:g} {kind}" for kind, amount in self._spec.resources.items())
        return f"each needs {resources}"

    def _report(self, replica: _Replica) -> ReplicaReport:
        experts = self._spec.experts(replica.shard)
        rates = replica.rates()
        return ReplicaReport(
            name=replica.name,
            shard=replica.shard,
            experts=f"{experts.start}-{experts.stop - 1}",
            node=f"{replica.node_ip} {replica.node_id[:8]}".strip(),
            status=replica.status,
            is_reachable=replica.is_reachable,
            tokens_per_s=rates.tokens,
            busy=rates.busy_s,
        )

    def _note(self, text: str, level: int = logging.INFO) -> None:
        log.log(level, "%s", text)
        with self._lock:
            self._notes = [*self._notes[-_MAX_NOTES + 1 :], text]


def _number(group: str) -> int:
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
