"""Forward requests between arrival and answer, unary or from a stream: checked, given a deadline, queued, counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from expertd_server.messages import Message
from expertd_server.metrics import Metrics
from expertd_server.promise import Promise
from expertd_server.regions import AnswerPlace
from expertd_server.store import LayerStore
from expertd_server.timing import ForwardTiming

__all__ = ["CallEngine", "Calls", "Codec"]


class Codec(Protocol):
    """Between messages and what an engine takes and gives: `codec` for one in this process, `remote_codec` for one in
    another."""

    CHECKS_LOGITS_AGAIN: bool
    """Whether it looks for NaN in logits that lie in callers' memory once more, after which nobody changes them."""

    def typed_call(
        self, message: Message, store: LayerStore[Any], *, max_batch_tokens: int, max_message_bytes: int
    ) -> Any:
        """Check everything about a request; the call to submit, which has an attribute `encode`, see
        `ForwardCall.encode`. Raises what `check_message` does."""
        ...

    def write_answer(self, result: Any, queue_depth_tokens: int, /) -> bytes:
        """A serialised ForwardResponse."""
        ...

    def write_stream_answer(
        self, request_id: int, result: Any, queue_depth_tokens: int, place: AnswerPlace | None = None, /
    ) -> bytes:
        """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
        ...


class CallEngine(Protocol):
    """What computes calls: an `Engine` in this process, or a `RemoteEngine` that stands for one in another."""

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        ...

    def submit(
        self,
        call: Any,
        deadline_s: float | None = None,
        on_done: Callable[[Promise[Any]], object] | None = None,
        is_last: bool = False,
    ) -> Promise[Any]:
        """Queue a call, see `Engine.submit`.

        is_last: `hurry` is called next.
        """
        ...

    def announce(self) -> None:
        """A request is about to be submitted, and nothing else is in flight: be ready, if that takes time."""
        ...

    def hurry(self) -> None:
        """Nobody else is about to submit anything: run what waits now, if it runs in this thread at all."""
        ...


class Calls:
    """clock: seconds, monotonic, the engine's."""

    def __init__(
        self,
        *,
        store: LayerStore[Any],
        engine: CallEngine,
        codec: Codec,
        metrics: Metrics,
        max_batch_tokens: int,
        max_message_bytes: int,
        request_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.engine = engine
        self.codec = codec
        self.metrics = metrics
        self.max_batch_tokens = max_batch_tokens
        self.max_message_bytes = max_message_bytes
        self.request_timeout_s = request_timeout_s
        self.clock = clock
        self.in_flight = 0
        """Requests that have arrived and are not answered; changed in the event loop alone."""
        self.unread_rings = 0
        """Rings with messages in them that will arrive next; likewise."""

    @property
    def _is_alone(self) -> bool:
        """Whether the request that has just arrived is the only one, and no other is about to."""
        return self.in_flight == 1 and not self.unread_rings

    @property
    def queue_depth_tokens(self) -> int:
        """Tokens that wait."""
        return self.engine.queue_tokens

    def admit(
        self,
        request: Message,
        arrived_s: float,
        timeout_s: float,
        encode: Callable[[Any], bytes],
        on_done: Callable[[Promise[bytes]], object] | None = None,
    ) -> Promise[bytes]:
        """Check a request and queue it; raises what is wrong with it, see `Codec.typed_call` and `Engine.submit`.

        timeout_s: what the caller allows from arrival to start; infinite where it says nothing.
        encode: see `ForwardCall.encode`. on_done: see `Promise.add_done_callback`. `hurry` must follow.
        """
        call = self.codec.typed_call(
            request, self.store, max_batch_tokens=self.max_batch_tokens, max_message_bytes=self.max_message_bytes
        )
        call.encode = encode
        deadline_s = arrived_s + min(timeout_s, self.request_timeout_s)
        return self.engine.submit(call, deadline_s, on_done, self._is_alone)

    def announce(self) -> None:
        """To be called when a request has come and nothing was made of it yet."""
        if not (self.in_flight or self.unread_rings):
            self.engine.announce()

    def hurry(self) -> None:
        """To be called when a request was admitted and its promise is known: see `CallEngine.hurry`."""
        if self._is_alone:
            self.engine.hurry()

    def answered(self, method: str, arrived_s: float, ready_s: float, timing: ForwardTiming) -> None:
        """Count an answer that was just sent, and where its time went. ready_s: when there was something to send."""
        now_s = self.clock()
        self.metrics.count_answer(method, timing, now_s - ready_s, now_s - arrived_s)

    def failed(self, method: str, code: str) -> None:
        """Count a request that got an error. code: name of a google.rpc.Code."""
        self.metrics.requests.labels(method, code).inc()
