"""Many servers as one layer, for asyncio."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from expertd._base import Outcome
from expertd._dispatch import Attempt
from expertd._group_base import GroupBase, Prepared, Probe, is_worth_a_look
from expertd._replicas import Replica
from expertd.aio import AsyncClient
from expertd.errors import ClosedError, ExpertdError, TimeoutError, TopologyError, UnavailableError
from expertd.group_types import GroupConfig, GroupResult
from expertd.topology import Member, Targets
from expertd.types import Array, ArrayT, ForwardRequest, LayerInfo

__all__ = ["AsyncExpertGroup"]

_MIN_REFRESH_GAP_S = 0.05  # however many calls ask for a refresh


class AsyncExpertGroup(GroupBase):
    """ExpertGroup for asyncio: the same methods, the same answers to the bit. Belongs to one event loop.

    async with expertd.AsyncExpertGroup("experts.example:50051") as group:
        result = await group.forward("model.layers.0", hidden_states, routing_logits=router_logits)
    """

    def __init__(self, targets: Targets, config: GroupConfig | None = None) -> None:
        """targets: "host:port", a DNS name that stands for many hosts, the path of a topology file, an object with a
        `resolve` method, or several of them: see `expertd.topology`. Raises ConfigError naming what cannot be used.
        """
        super().__init__(targets, config)
        self._clients: dict[str, AsyncClient] = {}
        self._wanted = asyncio.Event()
        """Set to make the refresher look at once."""
        self._refreshed = asyncio.Event()
        """Set after each refresh, then replaced."""
        self._is_closed = False
        self._refresher: asyncio.Task[None] | None = None

    async def forward(
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
        """Run one layer on the caller's tokens: see ExpertGroup.forward."""
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
            return await self._forward(request, self.config.allow_partial if allow_partial is None else allow_partial)
        except ExpertdError:
            self.stats.count("requests", outcome="error")
            raise

    async def layers(self, *, timeout_s: float | None = None) -> list[LayerInfo]:
        """Every layer, as one server that held all of it would describe it, sorted by name."""
        await self._ensure_ready(self._deadline(timeout_s), allow_partial=self.config.allow_partial)
        with self._lock:
            return [self._merged_info(placement) for placement in self._placements.values()]

    async def layer(self, name: str, *, timeout_s: float | None = None) -> LayerInfo:
        """One layer by name. Raises LayerNotFoundError when no server of the group holds it."""
        await self._ensure_ready(self._deadline(timeout_s), allow_partial=self.config.allow_partial)
        with self._lock:
            return self._merged_info(self._placement(name))

    async def wait_ready(self, *, timeout_s: float | None = None) -> None:
        """Return when the servers cover every expert of every layer that any of them holds.

        Raises TimeoutError, saying what is missing, when they do not in time.
        """
        deadline = self._deadline(timeout_s)
        last = "no answer"
        while True:
            try:
                await self._ensure_ready(deadline, allow_partial=self.config.allow_partial)
                return
            except TimeoutError as error:
                raise TimeoutError(f"the group was not ready in time; last seen: {last}") from error
            except (TopologyError, UnavailableError) as error:
                last = str(error)

    async def refresh(self, *, timeout_s: float | None = None) -> None:
        """Resolve the targets and ask every server what it holds, now instead of at the next refresh_interval_s."""
        await self._await_refresh(self._deadline(timeout_s))

    async def close(self) -> None:
        """Fail what is in flight with ClosedError, stop the group's tasks and close its connections."""
        self._is_closed = True
        self._refreshed.set()
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()

    async def __aenter__(self) -> AsyncExpertGroup:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _deadline(self, timeout_s: float | None) -> float:
        return _now() + self._timeout_s(timeout_s)

    async def _forward(self, request: ForwardRequest[ArrayT], allow_partial: bool) -> GroupResult[ArrayT]:
        deadline = self._deadline(request.timeout_s)
        patience = min(deadline, _now() + self.config.no_replica_timeout_s)
        await self._ensure_ready(deadline, allow_partial=allow_partial)
        sent_bytes = received_bytes = 0
        num_looks = 0
        while True:
            try:
                prepared = self._begin(request, deadline, allow_partial)
            except ExpertdError as error:
                num_looks += 1
                if not is_worth_a_look(error, request, num_looks, _now() < patience):
                    raise
                await self._await_refresh(deadline)
                continue
            prepared.call.sent_bytes, prepared.call.received_bytes = sent_bytes, received_bytes
            await self._drive(prepared)
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
            await self._await_refresh(deadline)

    async def _drive(self, prepared: Prepared) -> None:
        """Send, wait and send again until the call is done, one way or the other."""
        settled: asyncio.Queue[tuple[Attempt, Outcome]] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        dispatch = prepared.dispatch
        try:
            while True:
                with self._lock:
                    attempts = dispatch.poll(_now())
                    is_done, wake_at = dispatch.is_done, dispatch.wake_at()
                if is_done:
                    return
                if self._is_closed:
                    raise ClosedError("the group was closed with the request in flight")
                for attempt in attempts:
                    task = asyncio.create_task(self._send(prepared, attempt, settled))
                    tasks.append(task)
                    attempt.ticket = _TaskTicket(task)
                try:
                    # Not longer than until the next refresh, which may find out that a server is gone.
                    async with asyncio.timeout_at(min(wake_at, _now() + self.config.refresh_interval_s)):
                        attempt, outcome = await settled.get()
                except builtins.TimeoutError:
                    continue
                if isinstance(outcome, UnavailableError):
                    self._wanted.set()
                self._settle(prepared, attempt, outcome, _now())
        finally:
            with self._lock:
                dispatch.abandon()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(
        self, prepared: Prepared, attempt: Attempt, settled: asyncio.Queue[tuple[Attempt, Outcome]]
    ) -> None:
        outcome: Outcome
        try:
            client = self._clients.get(attempt.replica.address)
            if client is None:
                raise ClosedError(f"{attempt.replica.address} has left the group")
            body = prepared.call.encode(attempt.job.index)
            self.stats.count("sent_bytes", body.nbytes)
            outcome = await client._connected().forward(body, attempt.deadline)
        except ExpertdError as error:
            outcome = error.with_traceback(None)  # which knows this frame: leave no cycle
        settled.put_nowait((attempt, outcome))

    async def _ensure_ready(self, deadline: float, *, allow_partial: bool) -> None:
        if not self._is_ready_for(allow_partial=allow_partial):
            await self._await_refresh(deadline)
            self._check_ready(allow_partial=allow_partial)

    async def _await_refresh(self, deadline: float) -> None:
        """Wait for a refresh. Raises TimeoutError when none has ended by the deadline, ClosedError after close()."""
        wanted = self._next_generation()
        if self._refresher is None and not self._is_closed:
            self._refresher = asyncio.create_task(self._keep_fresh(), name="expertd-group-refresher")
        self._wanted.set()
        try:
            async with asyncio.timeout_at(deadline):
                while self._generation < wanted and not self._is_closed:
                    await self._refreshed.wait()
        except builtins.TimeoutError:
            raise TimeoutError("the servers of the group were not asked what they hold before the deadline") from None
        if self._is_closed:
            raise ClosedError("the group is closed")

    async def _keep_fresh(self) -> None:
        """The refresher's task."""
        retired: list[tuple[Replica | None, AsyncClient]] = []
        try:
            while True:
                self._wanted.clear()
                await self._refresh(retired)
                retired = [pair for pair in retired if not await _closed_when_idle(*pair)]
                await asyncio.sleep(_MIN_REFRESH_GAP_S)
                try:
                    async with asyncio.timeout(self.config.refresh_interval_s):
                        await self._wanted.wait()
                except builtins.TimeoutError:
                    pass
        finally:
            for _, client in retired:
                await client.close()

    async def _refresh(self, retired: list[tuple[Replica | None, AsyncClient]]) -> None:
        """Look at everything anew. retired: takes the servers that have left, whose last answers may be under way."""
        self._begin_refresh()
        try:
            addresses = await self._resolved()
            for address in addresses:
                if address not in self._clients:
                    self._clients[address] = AsyncClient(self._client_config(address))
                    self._clients[address].on_unwanted = self._count_unwanted
            left = [address for address in self._clients if address not in addresses]
            retired += [(self._replicas.get(address), self._clients.pop(address)) for address in left]
            self._take_members(addresses, await asyncio.gather(*map(self._ask, addresses)))
        except Exception as error:
            self._refresh_failed(error)
        self._refreshed.set()
        self._refreshed = asyncio.Event()

    async def _resolved(self) -> Sequence[str]:
        asked, patience_s = self._lookup.ask(), self._lookup.patience_s
        if patience_s:
            waiting = asyncio.wrap_future(asked)
            try:
                await asyncio.wait((waiting,), timeout=patience_s)
            finally:
                waiting.cancel()
        return self._lookup.take()

    async def _ask(self, address: str) -> Probe:
        client = self._clients[address]
        try:
            server = await client.server_info(timeout_s=self.config.probe_timeout_s)
            layers = await client.layers(timeout_s=self.config.probe_timeout_s)
        except ExpertdError as error:
            return Probe(address, None, error)
        return Probe(address, Member(address, server, {layer.name: layer for layer in layers}))


class _TaskTicket:
    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def abandon(self) -> None:
        """See Ticket."""
        self._task.cancel()


async def _closed_when_idle(replica: Replica | None, client: AsyncClient) -> bool:
    """Close the connection to a server that has left, unless answers are still under way; whether it is closed."""
    if replica is not None and replica.in_flight_requests:
        return False
    await client.close()
    return True


def _now() -> float:
    return asyncio.get_running_loop().time()
