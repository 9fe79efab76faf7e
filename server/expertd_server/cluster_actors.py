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
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address, list_named_actors
from ray.util.placement_group import get_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expertd_server.cluster_places import ClusterError, Places, number_of
from expertd_server.cluster_policy import Balancer, PolicyConfig
from expertd_server.cluster_replica import Replica, TierReport, shard_loads
from expertd_server.cluster_server import ServerProcess, ServerStatus
from expertd_server.cluster_spec import NAMESPACE, ClusterSpec, write_prometheus_targets, write_topology
from expertd_server.logs import configure_logging

__all__ = ["Controller", "ServerActor"]

log = logging.getLogger(__name__)

_DRAIN_MARGIN_S = 15.0
_TAKE_OVER_S = 10.0
_MAX_NOTES = 20


class ServerActor:
    """Keeps one server process running on whatever node Ray puts it."""

    def __init__(self, spec: ClusterSpec, shard: int) -> None:
        configure_logging("info", "text")
        self._node = ray.get_runtime_context().get_node_id()
        self._ip: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        self._process = ServerProcess(
            spec.server_flags(shard),
            self._ip,
            shutdown_grace_s=spec.shutdown_grace_s,
            start_timeout_s=spec.start_timeout_s,
            is_tls=spec.is_tls,
        )

    def status(self) -> tuple[str, str, ServerStatus]:
        """The node's id, its address, and how the server is."""
        return self._node, self._ip, self._process.status()

    def drain(self) -> bool:
        """Finish what is in flight and stop for good."""
        return self._process.drain()


class Controller:
    """Places the servers of one tier, publishes their addresses, scales and rebalances. One actor for each tier."""

    def __init__(self, spec: ClusterSpec) -> None:
        configure_logging("info", "text")
        self._spec = spec
        self._lock = threading.RLock()
        """Guards the replicas and the notes; held for moments only."""
        self._changing = threading.Lock()
        """Held while replicas are added or retired, one change at a time."""
        self._replicas: dict[str, Replica] = {}
        self._notes: list[str] = []
        self._places = Places(spec, self._note)
        self._publishing = threading.Lock()
        """Held while files are written."""
        self._published: object = None
        self._balancer = Balancer(
            PolicyConfig(
                min_replicas=spec.min_replicas,
                max_replicas=spec.max_replicas,
                full_queue_tokens=spec.max_queue_tokens,
            )
        )
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
                    group = self._places.reserve_shard(shard)
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
            return TierReport(self._spec, tuple(each.report(self._spec) for each in replicas), tuple(self._notes))

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
            self._move(source, target, "asked for")

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
                replica.unheard(time.monotonic())
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
        if move is None:
            return
        if move.source is not None:
            self._move(move.source, move.target, move.reason)
            return
        try:
            self._add_replica(move.target)
        except ClusterError as error:
            log.info("%s; a shard with less to do is asked for one", error)
            self._balancer.no_room()
        else:
            self._goal[move.target] += 1
            self._note(f"one more replica of shard {move.target}, in a free place: {move.reason}")

    def _move(self, source: int, target: int, reason: str) -> None:
        """Hand a place of one shard over to another. Holds _changing."""
        self._note(f"moving a replica of shard {source} to shard {target}: {reason}")
        hosts = {replica.node_id for replica in self._of(target)}
        # A host that has no replica of the target yet is best.
        leaving = min(self._of(source), key=lambda each: (each.node_id in hosts, each.name))
        self._goal[source] -= 1
        self._goal[target] += 1
        self._retire([leaving], keep_place=True)
        self._start_server(target, leaving.place)

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
            self._replicas[name] = Replica(name, ray.get_actor(name, NAMESPACE), int(shard), place)

    def _all(self) -> list[Replica]:
        with self._lock:
            return [replica for replica in self._replicas.values() if not replica.is_retiring]

    def _of(self, shard: int) -> list[Replica]:
        """A shard's replicas, those first that one would part with last."""

        def worth(replica: Replica) -> tuple[bool, bool, int, int]:
            group, index = replica.place
            return not replica.is_reachable, replica.status.state != "serving", number_of(group), index

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
            .remote(spec, shard)
        )
        with self._lock:
            self._replicas[name] = Replica(name, handle, shard, place)

    def _add_replica(self, shard: int) -> None:
        """Start one more server of a shard, on a host that has none where there is room. Holds _changing."""
        hosts = {replica.node_id for replica in self._of(shard) if replica.node_id}
        places = self._places.free({replica.place for replica in self._replicas.values()})
        apart = [place for place, node_id in places.items() if node_id not in hosts]
        if apart:
            self._start_server(shard, apart[0])
            return
        group = self._places.reserve_one(hosts)
        if group is not None:
            self._start_server(shard, (group, 0))
            return
        if places:
            place = next(iter(places))
        else:
            alone = self._places.reserve_one(())
            if alone is None:
                raise ClusterError(f"no node has room for another replica of shard {shard}: {self._places.wanted()}")
            place = (alone, 0)
        self._note(f"two replicas of shard {shard} share a host: no other has room", logging.WARNING)
        self._start_server(shard, place)

    def _retire(self, replicas: Sequence[Replica], *, keep_place: bool = False) -> None:
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

    def _forget(self, replica: Replica, *, keep_place: bool = False) -> None:
        ray.kill(replica.handle, no_restart=True)
        with self._lock:
            self._replicas.pop(replica.name, None)
        group, _ = replica.place
        # The groups of `up` keep what they reserved, so that a shard finds its places again.
        if number_of(group) >= self._spec.shards and not keep_place:
            self._places.release(group)

    def _stop_all(self) -> None:
        with self._lock:
            replicas = list(self._replicas.values())
        self._retire(replicas, keep_place=True)
        for name in self._places.groups():
            self._places.release(name)

    def _note(self, text: str, level: int = logging.INFO) -> None:
        log.log(level, "%s", text)
        with self._lock:
            self._notes = [*self._notes[-_MAX_NOTES + 1 :], text]
