"""Forward requests between arrival and answer, unary or from a stream: checked, given a deadline, queued, counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from expertd_server.engine import ForwardCall, ForwardResult, ForwardTiming
from expertd_server.metrics import Metrics
from expertd_server.store import LayerStore
from expertd_server.wire import read_call
from expertd_server.wire_parse import RawRequest

__all__ = ["CallEngine", "Calls"]


class CallEngine(Protocol):
    """What computes calls: an `Engine` in this process, or a `RemoteEngine` that stands for one in another."""

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        ...

    def submit(self, call: ForwardCall, deadline_s: float | None = None) -> Future[ForwardResult]:
        """Queue a call, see `Engine.submit`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Calls:
    """clock: seconds, monotonic, the engine's."""

    store: LayerStore
    engine: CallEngine
    metrics: Metrics
    max_batch_tokens: int
    max_message_bytes: int
    request_timeout_s: float
    clock: Callable[[], float] = time.monotonic

    @property
    def queue_depth_tokens(self) -> int:
        """Tokens that wait."""
        return self.engine.queue_tokens

    def admit(self, request: RawRequest, arrived_s: float, timeout_s: float) -> Future[ForwardResult]:
        """Check a request and queue it; raises what is wrong with it, see `read_call` and `Engine.submit`.

        timeout_s: what the caller allows from arrival to start; infinite where it says nothing.
        """
        call = read_call(
            request, self.store, max_batch_tokens=self.max_batch_tokens, max_message_bytes=self.max_message_bytes
        )
        return self.engine.submit(call, arrived_s + min(timeout_s, self.request_timeout_s))

    def arrived(self) -> None:
        """Count a request in flight; `left` must follow."""
        self.metrics.in_flight_requests.inc()

    def left(self) -> None:
        """The request was answered, or its caller left."""
        self.metrics.in_flight_requests.dec()

    def answered(self, method: str, arrived_s: float, ready_s: float, timing: ForwardTiming) -> None:
        """Count an answer that was just sent, and where its time went. ready_s: when there was something to send."""
        now_s = self.clock()
        self.metrics.requests.labels(method, "OK").inc()
        self.metrics.observe_phases(
            queue=timing.queue_us / 1e6,
            copy_in=timing.copy_in_us / 1e6,
            compute=timing.compute_us / 1e6,
            copy_out=timing.copy_out_us / 1e6,
            send=now_s - ready_s,
            total=now_s - arrived_s,
        )

    def failed(self, method: str, code: str) -> None:
        """Count a request that got an error. code: name of a google.rpc.Code."""
        self.metrics.requests.labels(method, code).inc()
