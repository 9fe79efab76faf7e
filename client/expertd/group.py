"""Many servers as one layer, for threads."""

from __future__ import annotations

import functools
import queue
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from expertd._base import Outcome
from expertd._dispatch import Attempt
from expertd._group_base import GroupBase, Prepared, Probe, is_worth_a_look
from expertd._replicas import Replica
from expertd.client import Client
from expertd.errors import ClosedError, ExpertdError, TimeoutError, TopologyError, UnavailableError
from expertd.group_types import GroupConfig, GroupResult
from expertd.topology import Member, Targets
from expertd.types import Array, ArrayT, ForwardRequest, LayerInfo

__all__ = ["ExpertGroup"]

_MAX_PROBES = 8  # servers asked at the same time
_MIN_REFRESH_GAP_S = 0.05  # however many calls ask for a refresh
_JOIN_TIMEOUT_S = 10.0


class ExpertGroup(GroupBase):
    """A tier of servers that hold slices of each layer's experts, used like one server. Thread-safe.

        with expertd.ExpertGroup(["experts-0:50051", "experts-1:50051"]) as group:
            result = group.forward("model.layers.0", hidden_states, routing_logits=router_logits)

    Routes on the client, sends each token only to the servers that hold experts it chose, and sums their parts in a
    fixed order: the same input gives the same bits, whichever replicas answer and in whatever order. Looks for its
    servers when it is first used. Close it, or use it as a context manager.
    """

    def __init__(self, targets: Targets, config: GroupConfig | None = None) -> None:
        """targets: "host:port", a DNS name that stands for many hosts, the path of a topology file, an object with a
        `resolve` method, or several of them: see `expertd.topology`. Raises ConfigError naming what cannot be used.
        """
        super().__init__(targets, config)
        self._refreshed = threading.Condition(self._lock)
        self._clients: dict[str, Client] = {}
        self._wanted = threading.Event()
        """Set to make the refresher look at once."""
        self._closed = threading.Event()
        self._end: Future[None] = Future()
        """Done after close(), for whoever waits for a future as well."""
        self._refresher: threading.Thread | None = None

    def forward(
        self,
        layer: str,
        hidden_states: ArrayT,
        *,
        routing_logits: Array | None = None,
        topk_ids: Array | None = None,
        topk_weights: Array | None = None,
        output_dtype: Any = None,
        do_finalize: bool = True,
        return_routing: bool = False,
        weights_version: int | None = None,
        timeout_s: float | None = None,
        allow_partial: bool | None = None,
    ) -> GroupResult[ArrayT]:
        """Run one layer on the caller's tokens. The arguments are those of Client.forward, without `out`.

        allow_partial: answer without the experts that no server answered for, and say which; None: as configured.
        Raises NoReplicaError naming the experts that no server is left for, TopologyError when the servers do not make
        up the layer, VersionNotHeldError when no version of the weights is held for all experts, and everything that
        Client.forward raises.
        """
        request = ForwardRequest(
            layer=layer,
            hidden_states=hidden_states,
            routing_logits=routing_logits,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            output_dtype=output_dtype,
            do_finalize=do_finalize,
            return_routing=return_routing,
            weights_version=weights_version,
            timeout_s=timeout_s,
        )
        try:
            return self._forward(request, self.config.allow_partial if allow_partial is None else allow_partial)
        except ExpertdError:
            self.stats.count("requests", outcome="error")
            raise

    def layers(self, *, timeout_s: float | None = None) -> list[LayerInfo]:
        """Every layer, as one server that held all of it would describe it, sorted by name."""
        self._ensure_ready(self._deadline(timeout_s), allow_partial=self.config.allow_partial)
        with self._lock:
            return [self._merged_info(placement) for placement in self._placements.values()]

    def layer(self, name: str, *, timeout_s: float | None = None) -> LayerInfo:
        """One layer by name. Raises LayerNotFoundError when no server of the group holds it."""
        self._ensure_ready(self._deadline(timeout_s), allow_partial=self.config.allow_partial)
        with self._lock:
            return self._merged_info(self._placement(name))

    def wait_ready(self, *, timeout_s: float | None = None) -> None:
        """Return when the servers cover every expert of every layer that any of them holds.

        Raises TimeoutError, saying what is missing, when they do not in time.
        """
        deadline = self._deadline(timeout_s)
        last = "no answer"
        while True:
            try:
                self._ensure_ready(deadline, allow_partial=self.config.allow_partial)
                return
            except TimeoutError as error:
                raise TimeoutError(f"the group was not ready in time; last seen: {last}") from error
            except (TopologyError, UnavailableError) as error:
                last = str(error)

    def refresh(self, *, timeout_s: float | None = None) -> None:
        """Resolve the targets and ask every server what it holds, now instead of at the next refresh_interval_s."""
        self._await_refresh(self._deadline(timeout_s))

    def close(self) -> None:
        """Fail what is in flight with ClosedError, stop the group's threads and close its connections."""
        self._closed.set()
        self._wanted.set()
        with self._refreshed:
            if not self._end.done():
                self._end.set_result(None)
            refresher = self._refresher
            clients, self._clients = list(self._clients.values()), {}
            self._refreshed.notify_all()
        for client in clients:
            client.close()
        if refresher is not None:
            refresher.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> ExpertGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + self._timeout_s(timeout_s)

    def _forward(self, request: ForwardRequest[ArrayT], allow_partial: bool) -> GroupResult[ArrayT]:
        deadline = self._deadline(request.timeout_s)
        patience = min(deadline, time.monotonic() + self.config.no_replica_timeout_s)
        self._ensure_ready(deadline, allow_partial=allow_partial)
        sent_bytes = received_bytes = 0
        num_looks = 0
        while True:
            try:
                prepared = self._begin(request, deadline, allow_partial)
            except ExpertdError as error:
                num_looks += 1
                if not is_worth_a_look(error, request, num_looks, time.monotonic() < patience):
                    raise
                self._await_refresh(deadline)
                continue
            prepared.call.sent_bytes, prepared.call.received_bytes = sent_bytes, received_bytes
            self._drive(prepared)
            failure = prepared.dispatch.failure
            if failure is not None:
                try:
                    raise failure
                finally:
                    del prepared, failure  # they know the error, which knows this frame: leave no cycle
            if not prepared.dispatch.is_stale:
                return self._finish(prepared)
            self.stats.count("version_restarts")
            sent_bytes, received_bytes = prepared.call.sent_bytes, prepared.call.received_bytes
            self._await_refresh(deadline)

    def _drive(self, prepared: Prepared) -> None:
        """Send, wait and send again until the call is done, one way or the other."""
        settled: queue.SimpleQueue[tuple[Attempt, Outcome]] = queue.SimpleQueue()
        dispatch = prepared.dispatch
        try:
            while True:
                with self._lock:
                    attempts = dispatch.poll(time.monotonic())
                    is_done, wake_at = dispatch.is_done, dispatch.wake_at()
                if is_done:
                    return
                if self._closed.is_set():
                    raise ClosedError("the group was closed with the request in flight")
                for attempt in attempts:
                    self._submit(prepared, attempt, settled)
                try:
                    # Not longer than until the next refresh, which may find out that a server is gone.
                    patience_s = min(wake_at - time.monotonic(), self.config.refresh_interval_s)
                    attempt, outcome = settled.get(timeout=max(0.0, patience_s))
                except queue.Empty:
                    continue
                if isinstance(outcome, UnavailableError):
                    self._wanted.set()
                self._settle(prepared, attempt, outcome, time.monotonic())
        finally:
            with self._lock:
                dispatch.abandon()

    def _submit(
        self, prepared: Prepared, attempt: Attempt, settled: queue.SimpleQueue[tuple[Attempt, Outcome]]
    ) -> None:
        with self._lock:
            client = self._clients.get(attempt.replica.address)
        try:
            if client is None:
                raise ClosedError(f"{attempt.replica.address} has left the group")
            body = prepared.call.encode(attempt.job.index)
            self.stats.count("sent_bytes", body.nbytes)
            attempt.ticket = client._transport.submit(body, attempt.deadline, functools.partial(_put, settled, attempt))
        except ExpertdError as error:
            settled.put((attempt, error.with_traceback(None)))  # which knows this frame: leave no cycle

    def _ensure_ready(self, deadline: float, *, allow_partial: bool) -> None:
        if not self._is_ready_for(allow_partial=allow_partial):
            self._await_refresh(deadline)
            self._check_ready(allow_partial=allow_partial)

    def _await_refresh(self, deadline: float) -> None:
        """Wait for a refresh. Raises TimeoutError when none has ended by the deadline, ClosedError after close()."""
        with self._refreshed:
            wanted = self._next_generation()
            self._wanted.set()  # before the thread starts, which would otherwise look twice
            if self._refresher is None and not self._closed.is_set():
                self._refresher = threading.Thread(target=self._keep_fresh, name="expertd-group-refresher", daemon=True)
                self._refresher.start()
            self._refreshed.wait_for(
                lambda: self._generation >= wanted or self._closed.is_set(), deadline - time.monotonic()
            )
            if self._closed.is_set():
                raise ClosedError("the group is closed")
            if self._generation < wanted:
                raise TimeoutError("the servers of the group were not asked what they hold before the deadline")

    def _keep_fresh(self) -> None:
        """The refresher's thread."""
        retired: list[tuple[Replica | None, Client]] = []
        with ThreadPoolExecutor(_MAX_PROBES, thread_name_prefix="expertd-group-probe") as executor:
            while not self._closed.is_set():
                self._wanted.clear()
                retired += self._refresh(executor)
                retired = [pair for pair in retired if not _closed_when_idle(*pair)]
                if self._closed.wait(_MIN_REFRESH_GAP_S):  # and not `_wanted` alone, which is cleared above
                    break
                self._wanted.wait(self.config.refresh_interval_s)
        for _, client in retired:
            client.close()

    def _refresh(self, executor: ThreadPoolExecutor) -> list[tuple[Replica | None, Client]]:
        """Look at everything anew. Returns the servers that have left, whose last answers may still be under way."""
        gone: list[tuple[Replica | None, Client]] = []
        self._begin_refresh()
        try:
            wait((self._lookup.ask(), self._end), self._lookup.patience_s, FIRST_COMPLETED)
            addresses = self._lookup.take()
            with self._lock:
                for address in addresses:
                    if address not in self._clients and not self._closed.is_set():
                        self._clients[address] = Client(self._client_config(address))
                        self._clients[address].on_unwanted = self._count_unwanted
                clients = [(address, self._clients[address]) for address in addresses if address in self._clients]
                left = [address for address in self._clients if address not in addresses]
                gone = [(self._replicas.get(address), self._clients.pop(address)) for address in left]
            self._take_members(addresses, list(executor.map(self._ask, clients)))
        except Exception as error:
            self._refresh_failed(error)
        with self._refreshed:
            self._refreshed.notify_all()
        return gone

    def _ask(self, pair: tuple[str, Client]) -> Probe:
        address, client = pair
        try:
            server = client.server_info(timeout_s=self.config.probe_timeout_s)
            layers = client.layers(timeout_s=self.config.probe_timeout_s)
        except ExpertdError as error:
            return Probe(address, None, error)
        return Probe(address, Member(address, server, {layer.name: layer for layer in layers}))


def _put(settled: queue.SimpleQueue[tuple[Attempt, Outcome]], attempt: Attempt, outcome: Outcome) -> None:
    settled.put((attempt, outcome))


def _closed_when_idle(replica: Replica | None, client: Client) -> bool:
    """Close the connection to a server that has left, unless answers are still under way; whether it is closed."""
    if replica is not None and replica.in_flight_requests:
        return False
    client.close()
    return True
