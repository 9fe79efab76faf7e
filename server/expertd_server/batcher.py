"""Admission and batching: many small requests in, few large batches out. Knows neither torch nor gRPC.

A request joins the queue of its key; requests of one key may share a batch. One thread takes what waits as soon as it
is free: the key whose first request is oldest, in order of arrival, up to the token budget. So no key starves, and a
lone request never waits for company unless `max_queue_delay_s` asks for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from expertd_server.errors import ExpertdServerError, OverloadedError, RequestTimeoutError, UnavailableError

__all__ = ["Batch", "Batcher", "Entry", "Limits"]

log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

# An idle scheduler looks up this often; nothing depends on it, it only bounds every wait.
_IDLE_WAIT_S = 1.0
# Retry delays that are told to callers: before any batch was measured, and the bounds of the estimate.
_FIRST_RETRY_DELAY_S = 0.1
_MIN_RETRY_DELAY_S = 0.001
_MAX_RETRY_DELAY_S = 10.0
# Weight of the newest batch in the moving average of the drain rate.
_RATE_SMOOTHING = 0.2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may wait, and what may run together."""

    max_batch_tokens: int
    max_queue_tokens: int
    """Tokens that may wait, over all keys; the running batch does not count."""
    max_queue_requests: int
    max_queue_delay_s: float = 0.0
    """How long the first request of a batch may wait for company while the backend is free."""


@dataclass(eq=False, slots=True)
class Entry(Generic[P, R]):
    """One admitted request."""

    sequence: int
    key: Hashable
    payload: P
    num_tokens: int
    admitted_s: float
    deadline_s: float | None
    queued_s: float = 0.0
    """From admission to the start of its batch; set when the batch is taken."""
    future: Future[R] = field(default_factory=Future)


@dataclass(frozen=True)
class Batch(Generic[P, R]):
    """Requests of one key that run together, in order of arrival; at least one."""

    key: Hashable
    entries: list[Entry[P, R]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all members."""
        return sum(entry.num_tokens for entry in self.entries)


class Batcher(Generic[P, R]):
    """Queues requests and runs them in batches, on one thread.

    run: computes a batch and returns one result for each entry, in order. When it raises, the members run again one by
    one, so that only those that fail alone get an error.
    on_batch: called after a batch's waiters have been served, with the batch and the seconds it ran; for metrics.
    clock: seconds, monotonic; deadlines are on its scale.
    """

    def __init__(
        self,
        run: Callable[[Batch[P, R]], Sequence[R]],
        limits: Limits,
        *,
        on_batch: Callable[[Batch[P, R], float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._limits = limits
        self._on_batch = on_batch
        self._clock = clock
        self._changed = threading.Condition()
        # Every key here has at least one entry.
        self._queues: dict[Hashable, OrderedDict[int, Entry[P, R]]] = {}
        self._queue_tokens = 0
        self._queue_requests = 0
        self._running_tokens = 0
        self._running_requests = 0
        self._next_sequence = 0
        self._tokens_per_s: float | None = None
        self._draining = False
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return self._queue_tokens

    @property
    def queue_requests(self) -> int:
        """Requests that wait."""
        return self._queue_requests

    def submit(self, key: Hashable, payload: P, num_tokens: int, *, deadline_s: float | None = None) -> Future[R]:
        """Admit a request of at most max_batch_tokens tokens, or refuse it at once.

        Cancelling the future takes a waiting request out of the queue; a running one is not stopped. The future fails
        with RequestTimeoutError when `deadline_s` passes before its batch starts.
        Raises OverloadedError when the queue is full and UnavailableError when the batcher drains.
        """
        if num_tokens > self._limits.max_batch_tokens:
            raise ValueError(f"num_tokens is {num_tokens}, expected at most {self._limits.max_batch_tokens}")
        with self._changed:
            if self._draining:
                raise UnavailableError("the server is draining and takes no new requests; try another server")
            self._check_room(num_tokens)
            entry: Entry[P, R] = Entry(self._next_sequence, key, payload, num_tokens, self._clock(), deadline_s)
            self._next_sequence += 1
            self._queues.setdefault(key, OrderedDict())[entry.sequence] = entry
            self._queue_tokens += num_tokens
            self._queue_requests += 1
            self._changed.notify_all()
        entry.future.add_done_callback(lambda future: self._forget(entry) if future.cancelled() else None)
        return entry.future

    def start(self) -> None:
        """Start the scheduler thread."""
        self._thread = threading.Thread(target=self._loop, name="expertd-batcher", daemon=True)
        self._thread.start()

    def run_once(self, timeout_s: float = 0.0) -> bool:
        """Wait up to timeout_s for a batch to be due and run it here; False when none was.

        The scheduler thread is a loop around this; tests call it themselves, under a clock of their own.
        """
        batch, expired = self._take(timeout_s)
        for entry in expired:
            _fail(entry.future, _timeout(entry, self._clock()))
        if batch is None:
            return False
        started_s = self._clock()
        try:
            self._execute(batch)
        finally:
            self._finish(batch, self._clock() - started_s)
        return True

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those admitted; False when some are left after timeout_s."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._queue_requests or self._running_requests), timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Refuse new requests, fail those that wait with UnavailableError, and end the thread.

        A running batch is not interrupted; False when it still runs after timeout_s.
        """
        with self._changed:
            self._draining = self._stopped = True
            left = [entry for queue in self._queues.values() for entry in queue.values()]
            self._queues.clear()
            self._queue_tokens = self._queue_requests = 0
            self._changed.notify_all()
        for entry in left:
            if entry.future.set_running_or_notify_cancel():
                _fail(entry.future, UnavailableError("the server stopped before this request ran; try another server"))
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        while not self._stopped:
            try:
                self.run_once(_IDLE_WAIT_S)
            except Exception:  # the loop outlives whatever one batch does: every later caller depends on it
                log.exception("the batch loop caught an unexpected error and goes on")

    def _check_room(self, num_tokens: int) -> None:
        limits = self._limits
        if self._queue_requests >= limits.max_queue_requests:
            what = f"{self._queue_requests} requests wait, at most {limits.max_queue_requests} may"
        elif self._queue_tokens + num_tokens > limits.max_queue_tokens:
            what = f"{self._queue_tokens} tokens wait and {num_tokens} come, at most {limits.max_queue_tokens} may"
        else:
            return
        delay_s = self._retry_delay_s()
        raise OverloadedError(f"the queue is full: {what}; come back in {delay_s:.3f} s", delay_s)

    def _retry_delay_s(self) -> float:
        """When the queue of now will have drained, by the rate of late."""
        if not self._tokens_per_s:
            return _FIRST_RETRY_DELAY_S
        delay_s = (self._queue_tokens + self._running_tokens) / self._tokens_per_s
        return min(max(delay_s, _MIN_RETRY_DELAY_S), _MAX_RETRY_DELAY_S)

    def _forget(self, entry: Entry[P, R]) -> None:
        """Take a cancelled entry out of its queue, so that its room is free at once."""
        with self._changed:
            queue = self._queues.get(entry.key)
            if queue is not None and queue.pop(entry.sequence, None) is not None:
                self._account_left(entry)
                self._changed.notify_all()

    def _account_left(self, entry: Entry[P, R]) -> None:
        self._queue_tokens -= entry.num_tokens
        self._queue_requests -= 1
        if not self._queues[entry.key]:
            del self._queues[entry.key]

    def _take(self, timeout_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        """The batch that is due, if any, and the entries whose deadline passed while they waited."""
        with self._changed:
            give_up_s = time.monotonic() + timeout_s
            while True:
                now_s = self._clock()
                key, due_s = self._first_due()
                if key is not None and due_s <= now_s:
                    return self._pop(key, now_s)
                left_s = min(give_up_s - time.monotonic(), due_s - now_s)
                if left_s <= 0 or self._stopped:
                    return None, []
                self._changed.wait(left_s)

    def _first_due(self) -> tuple[Hashable | None, float]:
        """The key to run next and when: among those due first, the one whose first entry is oldest."""
        best: tuple[float, int, Hashable] | None = None
        for key, queue in self._queues.items():
            head = next(iter(queue.values()))
            due_s = head.admitted_s + (self._limits.max_queue_delay_s if self._may_wait(queue) else 0.0)
            if best is None or (due_s, head.sequence) < best[:2]:
                best = (due_s, head.sequence, key)
        return (None, float("inf")) if best is None else (best[2], best[0])

    def _may_wait(self, queue: OrderedDict[int, Entry[P, R]]) -> bool:
        """Whether this queue gains by waiting for company: not when it is full, nor when a deadline is that near."""
        delay_s = self._limits.max_queue_delay_s
        if not delay_s or self._draining:
            return False
        until_s = next(iter(queue.values())).admitted_s + delay_s
        return sum(e.num_tokens for e in queue.values()) < self._limits.max_batch_tokens and not any(
            e.deadline_s is not None and e.deadline_s <= until_s for e in queue.values()
        )

    def _pop(self, key: Hashable, now_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        queue = self._queues[key]
        members: list[Entry[P, R]] = []
        expired: list[Entry[P, R]] = []
        tokens = 0
        while queue:
            entry = next(iter(queue.values()))
            if tokens + entry.num_tokens > self._limits.max_batch_tokens:
                break  # no later, smaller request passes this one: order of arrival is what bounds its wait
            del queue[entry.sequence]
            self._queue_tokens -= entry.num_tokens
            self._queue_requests -= 1
            if not entry.future.set_running_or_notify_cancel():
                continue
            entry.queued_s = now_s - entry.admitted_s
            if entry.deadline_s is not None and entry.deadline_s <= now_s:
                expired.append(entry)
                continue
            members.append(entry)
            tokens += entry.num_tokens
        if not queue:
            del self._queues[key]
        self._running_tokens = tokens
        self._running_requests = len(members)
        self._changed.notify_all()
        return (Batch(key, members) if members else None), expired

    def _execute(self, batch: Batch[P, R]) -> None:
        try:
            results = self._results(batch)
        except Exception as error:
            if len(batch.entries) == 1:
                _fail(batch.entries[0].future, error)
                return
            log.warning("a batch of %d requests failed, they run again one by one: %s", len(batch.entries), error)
        else:
            for entry, result in zip(batch.entries, results, strict=True):
                if not entry.future.done():
                    entry.future.set_result(result)
            return
        for entry in batch.entries:
            now_s = self._clock()
            if entry.deadline_s is not None and entry.deadline_s <= now_s:
                _fail(entry.future, _timeout(entry, now_s))
            else:
                self._execute(Batch(batch.key, [entry]))

    def _results(self, batch: Batch[P, R]) -> Sequence[R]:
        results = self._run(batch)
        if len(results) != len(batch.entries):
            raise RuntimeError(f"run returned {len(results)} results for {len(batch.entries)} requests")
        return results

    def _finish(self, batch: Batch[P, R], ran_s: float) -> None:
        with self._changed:
            self._running_tokens = self._running_requests = 0
            if ran_s > 0 and batch.num_tokens:
                rate = batch.num_tokens / ran_s
                before = rate if self._tokens_per_s is None else self._tokens_per_s
                self._tokens_per_s = before + _RATE_SMOOTHING * (rate - before)
            self._changed.notify_all()
        if self._on_batch is not None:
            self._on_batch(batch, ran_s)


def _timeout(entry: Entry[P, R], now_s: float) -> ExpertdServerError:
    return RequestTimeoutError(
        f"the deadline passed after {now_s - entry.admitted_s:.3f} s, before the request was computed; "
        f"allow more time or try another server"
    )


def _fail(future: Future[R], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
