"""Admission and batching: many small requests in, few large batches out. Knows neither torch nor gRPC.

A request joins the queue of its key; requests of one key may share a batch. As soon as there is room in flight, what
waits is taken: the key whose first request is oldest, in order of arrival, up to the token budget. So no key starves,
and a lone request never waits for company unless `max_queue_delay_s` asks for it.

A batch is launched, and finished later: with room for two in flight, one is gathered while another computes.

Who does this: threads of the batcher's own, or the one thread that the requests come from, see `Batcher.start`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NoReturn, Protocol, TypeVar

from expertd_server.errors import ExpertdServerError, OverloadedError, RequestTimeoutError, UnavailableError
from expertd_server.promise import Promise

__all__ = ["Batch", "Batcher", "Entry", "Limits", "Running"]

log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# An idle scheduler looks up this often; nothing depends on it, it only bounds every wait.
_IDLE_WAIT_S = 1.0
# Retry delays that are told to callers: before any batch was measured, and the bounds of the estimate.
_FIRST_RETRY_DELAY_S = 0.1
_MIN_RETRY_DELAY_S = 0.001
_MAX_RETRY_DELAY_S = 10.0
# What `hurry` waits for a batch: longer than a small one takes, shorter than others mind.
_BRIEFLY_S = 0.0005
# Weight of the newest batch in the moving average of the drain rate.
_RATE_SMOOTHING = 0.2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may wait, and what may run together."""

    max_batch_tokens: int
    max_queue_tokens: int
    """Tokens that may wait, over all keys; batches in flight do not count."""
    max_queue_requests: int
    max_queue_delay_s: float = 0.0
    """How long the first request of a batch may wait for company while there is room in flight."""
    max_in_flight: int = 1
    """Batches that are launched and not computed yet."""


class Entry(Promise[R], Generic[P, R]):
    """One admitted request, and the promise of its result.

    Cancelling it takes a waiting request out of the queue; a running one is not stopped.
    """

    __slots__ = (
        "_forget",
        "admitted_s",
        "deadline_s",
        "is_spent",
        "key",
        "num_tokens",
        "payload",
        "queued_s",
        "sequence",
    )

    def __init__(  # noqa: PLR0917 (made for every request, and keywords take time)
        self,
        sequence: int,
        key: Hashable,
        payload: P,
        num_tokens: int,
        admitted_s: float,
        deadline_s: float | None,
        forget: Callable[[Entry[P, R]], None],
        on_done: Callable[[Entry[P, R]], object] | None,
    ) -> None:
        super().__init__(on_done)
        self.sequence = sequence
        self.key = key
        self.payload = payload
        """What is to be computed; None when it is over."""
        self.num_tokens = num_tokens
        self.admitted_s = admitted_s
        self.deadline_s = deadline_s
        self.queued_s = 0.0
        """From admission to the start of its batch; set when the batch is taken."""
        self.is_spent = False
        """Set by who launches: its answer may be on its way over what it is computed from, so it runs once."""
        self._forget = forget

    def _tell(self) -> None:
        # Whoever keeps the promise keeps the result alone, not the request's tensors and its layer.
        self.payload = None  # type: ignore[assignment]
        if self.cancelled():
            self._forget(self)
        super()._tell()


@dataclass(eq=False, slots=True)
class Batch(Generic[P, R]):
    """Requests of one key that run together, in order of arrival; at least one."""

    key: Hashable
    entries: list[Entry[P, R]]
    num_tokens: int
    """Of all members."""
    number: int
    """Of no other batch of its batcher."""


class Running(Protocol[R_co]):
    """A batch that was launched. Its methods are called in this order, by one thread."""

    def wait(self, seconds: float | None = None) -> bool:
        """Return when it is computed, or when so much time has passed; whether it is. Raises what went wrong."""
        ...

    def results(self) -> Sequence[R_co]:
        """One for each entry, in order; an exception among them fails its entry alone. Raises what went wrong."""
        ...

    def close(self) -> None:
        """Called last, in any case, when its waiters have been served: what need not keep them waiting."""
        ...


@dataclass(eq=False, slots=True)
class _Flight(Generic[P, R]):
    batch: Batch[P, R]
    running: Running[R]
    launched_s: float
    error: Exception | None = None
    """What waiting for it raised."""
    is_handed_out: bool = False
    """Or about to be."""

    def wait(self, seconds: float | None = None) -> bool:
        """See `Running.wait`; what it raises is kept."""
        try:
            return self.running.wait(seconds)
        except Exception as error:
            self.error = error
            return True


class Batcher(Generic[P, R]):
    """Queues requests and runs them in batches.

    launch: starts a batch; batches are finished in the order in which they were launched. When launching or finishing
    raises, the members run again one by one, so that only those that fail alone get an error, and those that are spent.
    clock: seconds, monotonic; deadlines are on its scale.
    """

    def __init__(
        self,
        launch: Callable[[Batch[P, R]], Running[R]],
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launch = launch
        self._limits = limits
        self._clock = clock
        # Guards everything below. Who launches waits for _due, who finishes for _launched, who drains for _left: none
        # is woken for another, and nobody is told where nobody can wait.
        self._lock = lock = threading.Lock()
        self._due = threading.Condition(lock)
        self._left = threading.Condition(lock)
        self._launched = threading.Condition(lock)
        # Every key here has at least one entry; the key whose first entry is oldest comes first.
        self._queues: dict[Hashable, OrderedDict[int, Entry[P, R]]] = {}
        self.queue_tokens = 0
        """Tokens that wait; for others to read."""
        self.queue_requests = 0
        """Requests that wait; likewise."""
        # Members of batches that failed, to run again alone.
        self._again: deque[Entry[P, R]] = deque()
        self._flights: deque[_Flight[P, R]] = deque()
        self._unwatched: deque[_Flight[P, R]] = deque()
        """Those of them that the thread that waits has not come to, where there is one."""
        self._num_in_flight = 0
        self._num_taken = 0
        self._taken: dict[int, Batch[P, R]] = {}
        """What was taken from the queue and is not over and done with, by number."""
        # Requests taken from their queue and not served yet.
        self._running_tokens = 0
        self._running_requests = 0
        self._next_sequence = 0
        self._tokens_per_s: float | None = None
        self._finished_s = float("-inf")
        self._draining = False
        self._stopped = False
        self._abandoned = False
        self._threads: list[threading.Thread] = []
        self._soon: Callable[[Callable[[], object]], object] | None = None
        self._is_called = False
        # Whether `soon` calls what launches and what finishes, and a thread waits in between.
        self._is_split = False
        self._caller: threading.Thread | None = None
        self._alone: Batch[P, R] | None = None
        """Taken at once, for `hurry` to run: to queue a lone request would take as long as all else."""

    def submit(  # noqa: PLR0917 (called for every request, and keywords take time)
        self,
        key: Hashable,
        payload: P,
        num_tokens: int,
        deadline_s: float | None = None,
        on_done: Callable[[Entry[P, R]], object] | None = None,
        is_last: bool = False,
    ) -> Entry[P, R]:
        """Admit a request of at most max_batch_tokens tokens, or refuse it at once.

        It fails with RequestTimeoutError when `deadline_s` passes before its batch starts.
        on_done: called with the request when it is over, see `Promise.add_done_callback`.
        is_last: `hurry` is called next, in this thread.
        Raises OverloadedError when the queue is full and UnavailableError when the batcher drains.
        """
        limits = self._limits
        if num_tokens > limits.max_batch_tokens:
            raise ValueError(f"num_tokens is {num_tokens}, expected at most {limits.max_batch_tokens}")
        with self._lock:
            if self._draining:
                raise UnavailableError("the server is draining and takes no new requests; try another server")
            if (
                self.queue_requests >= limits.max_queue_requests
                or self.queue_tokens + num_tokens > limits.max_queue_tokens
            ):
                self._refuse(num_tokens)
            now_s = self._clock()
            entry: Entry[P, R] = Entry(
                self._next_sequence, key, payload, num_tokens, now_s, deadline_s, self._forget, on_done
            )
            self._next_sequence += 1
            if is_last and self._may_run_alone and not (deadline_s is not None and deadline_s <= now_s):
                entry.set_running_or_notify_cancel()
                self._alone = self._take_off(key, [entry], num_tokens)
                self._running_tokens += num_tokens
                self._running_requests += 1
            else:
                self._enqueue(entry)
        return entry

    def _enqueue(self, entry: Entry[P, R]) -> None:
        """Under the lock."""
        queue = self._queues.get(entry.key)
        if queue is None:
            queue = self._queues[entry.key] = OrderedDict()
        queue[entry.sequence] = entry
        self.queue_tokens += entry.num_tokens
        self.queue_requests += 1
        if self._soon is None:
            if self._num_in_flight < self._limits.max_in_flight:
                self._due.notify_all()
        elif not self._is_called:
            self._is_called = True
            self._soon(self._run_due)

    def start(self, soon: Callable[[Callable[[], object]], object] | None = None) -> None:
        """Start the threads: one that launches and finishes, or one for each where there is more than one in flight.

        soon: instead, this is asked to call functions that launch and finish, always in the same thread; by any thread,
        and it must not call them at once. Threads that share an interpreter keep each other waiting. With one batch in
        flight everything is done there, which is for what computes in no time; with more, a thread is left that waits
        for what was launched. Not together with max_queue_delay_s.
        """
        several = self._limits.max_in_flight > 1
        loops: dict[str, Callable[[float], object]]
        if soon is not None:
            if self._limits.max_queue_delay_s:
                raise ValueError("without a thread nobody can wait for company: max_queue_delay_s must be 0")
            self._soon, self._is_split = soon, several
            loops = {"expertd-waiter": self._await_once} if several else {}
        elif several:
            loops = {"expertd-launcher": self.launch_once, "expertd-finisher": self.finish_once}
        else:
            loops = {"expertd-batcher": self.run_once}
        for name, step in loops.items():
            thread = threading.Thread(target=self._loop, args=(step,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    @property
    def _may_run_alone(self) -> bool:
        """Under the lock: whether a request that comes now would be a batch by itself, which no thread would run."""
        return self._soon is not None and not (self._queues or self._again or self._taken)

    def hurry(self) -> None:
        """Nobody else is about to submit: run here and now what waits, where no thread does it.

        For the thread in which `soon` calls. A lone request that takes no time is answered before this returns.
        """
        self._run_alone()
        if self._is_split:
            if self.queue_requests == 1 and not self._num_in_flight:
                self._guarded(self._run_briefly)
            self._run_due()

    def _run_alone(self) -> None:
        batch, self._alone = self._alone, None
        if batch is None:
            return
        try:
            self._finish_briefly(self._start(batch))
        except Exception:  # as in _guarded
            log.exception("the batcher caught an unexpected error and goes on")
        finally:
            del batch  # as in _hand_out

    def _run_briefly(self) -> None:
        self._finish_briefly(self._launch_due(0.0)[0])

    def _finish_briefly(self, flight: _Flight[P, R] | None) -> None:
        """Wait for a batch, but not for long: another thread that waits takes a while to say that it is over."""
        if flight is None:
            return
        if flight.wait(_BRIEFLY_S if self._is_split else None):
            self._hand_out(flight)
        else:
            self._put(flight)

    def _run_due(self) -> None:
        self._is_called = False
        self._caller = self._caller or threading.current_thread()
        self._run_alone()
        while self._has_work and not self._stopped:
            self._guarded(self.launch_once if self._is_split else self.run_once)

    @property
    def threads(self) -> list[threading.Thread]:
        """That launch and finish, as far as they are known by now."""
        return self._threads if self._caller is None else [*self._threads, self._caller]

    def _await_once(self, timeout_s: float) -> bool:
        """Wait for what was launched first, and have it handed out where it was launched."""
        with self._lock:
            if not self._unwatched:
                self._launched.wait_for(lambda: self._unwatched or self._is_over, timeout_s)
            flight = self._unwatched.popleft() if self._unwatched else None
        if flight is None:
            return False
        if not flight.is_handed_out:
            flight.wait()
        if not flight.is_handed_out:
            assert self._soon is not None
            self._soon(self._hand_out_next)
        return True

    def _hand_out_next(self) -> None:
        """Hand out what was launched first, if it is over, and launch what waits."""
        flight = self._flights[0] if self._flights else None
        if flight is not None and flight.wait(0.0):
            self._flights.popleft()
            self._guarded(partial(self._hand_out, flight))
            self._run_due()
            if self._flights and self._flights[0].wait(0.0):
                # The thread that waits would say so too, but not before this one lets it. Others go first.
                assert self._soon is not None
                self._soon(self._hand_out_next)

    def run_once(self, timeout_s: float = 0.0) -> bool:
        """Wait up to timeout_s for a batch to be due, launch it and finish it; False when none was.

        The threads are loops around this and its two halves; tests call them themselves, under a clock of their own.
        """
        flight, has_taken = self._launch_due(timeout_s)
        if flight is not None:
            self._finish(flight)
        del flight  # see _clear_frames
        return has_taken

    def launch_once(self, timeout_s: float = 0.0) -> bool:
        """Wait up to timeout_s for a batch to be due and for room in flight, and launch it; False when none was."""
        flight, has_taken = self._launch_due(timeout_s)
        if flight is not None:
            self._put(flight)
        return has_taken

    def _put(self, flight: _Flight[P, R]) -> None:
        with self._lock:
            self._flights.append(flight)
            if self._is_split:
                self._unwatched.append(flight)
            self._launched.notify()

    def _launch_due(self, timeout_s: float) -> tuple[_Flight[P, R] | None, bool]:
        """What was launched, and whether anything was taken from the queue."""
        batch, expired = self._take(timeout_s)
        for entry in expired:
            _fail(entry, _timeout(entry, self._clock()))
        if batch is None:
            return None, bool(expired)
        try:
            return self._start(batch), True
        finally:
            del batch  # an error knows the frames that called the one that it holds, see _clear_frames

    def _start(self, batch: Batch[P, R]) -> _Flight[P, R] | None:
        """What was launched; None: it failed."""
        launched_s = self._clock()
        try:
            return _Flight(batch, self._launch(batch), launched_s)
        except Exception as error:
            self._leave_flight()
            self._taken.pop(batch.number, None)
            self._fail_batch(batch, error)
            del batch  # the error holds this frame, see _clear_frames
        return None

    def finish_once(self, timeout_s: float = 0.0) -> bool:
        """Wait up to timeout_s for a batch to be launched, finish it and serve its waiters; False when none was."""
        flight = self._next_flight(timeout_s)
        if flight is None:
            return False
        self._finish(flight)
        del flight  # see _clear_frames
        return True

    def _next_flight(self, timeout_s: float) -> _Flight[P, R] | None:
        with self._lock:
            if not self._flights:
                self._launched.wait_for(lambda: self._flights or self._is_over, timeout_s)
            return self._flights.popleft() if self._flights else None

    def _finish(self, flight: _Flight[P, R]) -> None:
        flight.wait()
        self._hand_out(flight)

    def _hand_out(self, flight: _Flight[P, R]) -> None:
        """Serve the waiters of a batch that is over; one that waits is launched before, where nothing is in flight."""
        batch, running = flight.batch, flight.running
        flight.is_handed_out = True
        self._leave_flight()
        if self._is_split and self._has_work and not self._num_in_flight:
            self._guarded(self.launch_once)
        try:
            if flight.error is not None:
                raise flight.error
            results = running.results()
            if len(results) != len(batch.entries):
                raise RuntimeError(f"{len(results)} results came for {len(batch.entries)} requests")
        except Exception as error:
            self._fail_batch(batch, error)
        else:
            for entry, result in zip(batch.entries, results, strict=True):
                if isinstance(result, Exception):
                    _clear_frames(result)
                    _fail(entry, result)
                elif not entry.done():
                    entry.set_result(result)
            self._account_served(batch, flight.launched_s)
        finally:
            try:
                running.close()
            finally:
                self._taken.pop(batch.number, None)
            del flight, batch, running  # an error holds this frame, see _clear_frames

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused, for good."""
        return self._draining

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those admitted; False when some are left after timeout_s."""
        with self._lock:
            self._draining = True
            self._due.notify_all()
            return self._left.wait_for(lambda: not (self.queue_requests or self._running_requests), timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Refuse new requests, fail those that wait with UnavailableError, and end the threads.

        Batches in flight are finished; False when they are not after timeout_s.
        """
        with self._lock:
            left, again = self._empty()
        for entry in again + [entry for entry in left if entry.set_running_or_notify_cancel()]:
            _fail(entry, _stopped())
        until_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def oldest_work(self) -> int | None:
        """Number of the batch that was taken first and is not over; of the next one when none is under way, but
        requests wait; None: there is nothing to do. As long as it is the same, nothing moves. Takes no lock.
        """
        taken = list(self._taken)  # made at once, whatever other threads do to the batches
        if taken:
            return taken[0]
        return self._num_taken + 1 if self.queue_requests or self._again else None

    def in_flight(self, number: int) -> Batch[P, R] | None:
        """The batch of this number, unless it is over."""
        return self._taken.get(number)

    def abandon(self) -> None:
        """Refuse new requests, and fail all that wait or run with UnavailableError: what runs will never end.

        Should it end after all, it is dropped.
        """
        with self._lock:
            self._abandoned = True
            left, again = self._empty()
            running = again + [entry for batch in self._taken.values() for entry in batch.entries]
            self._running_tokens = self._running_requests = 0
            self._left.notify_all()
        for entry in running + [entry for entry in left if entry.set_running_or_notify_cancel()]:
            with contextlib.suppress(RuntimeError):  # it was kept this very moment
                _fail(entry, _hangs())

    @property
    def _has_work(self) -> bool:
        """Whether a thread could launch something, now or when it has waited for company."""
        return bool(self._queues or self._again) and self._num_in_flight < self._limits.max_in_flight

    @property
    def _is_over(self) -> bool:
        return self._stopped and not self._num_in_flight

    def _empty(self) -> tuple[list[Entry[P, R]], list[Entry[P, R]]]:
        """Under the lock: take nothing more, and give up what waits, for the first time and to run again."""
        self._draining = self._stopped = True
        left = [entry for queue in self._queues.values() for entry in queue.values()]
        self._queues.clear()
        self.queue_tokens = self.queue_requests = 0
        again = list(self._again)
        self._again.clear()
        self._account_left_running(len(again), sum(entry.num_tokens for entry in again))
        self._due.notify_all()
        self._launched.notify_all()
        return left, again

    def _loop(self, step: Callable[[float], object]) -> None:
        while not self._is_over:
            self._guarded(partial(step, _IDLE_WAIT_S))

    @staticmethod
    def _guarded(step: Callable[[], object]) -> None:
        try:
            step()
        except Exception:  # the loop outlives whatever one batch does: every later caller depends on it
            log.exception("the batch loop caught an unexpected error and goes on")

    def _refuse(self, num_tokens: int) -> NoReturn:
        limits = self._limits
        if self.queue_requests >= limits.max_queue_requests:
            what = f"{self.queue_requests} requests wait, at most {limits.max_queue_requests} may"
        else:
            what = f"{self.queue_tokens} tokens wait and {num_tokens} come, at most {limits.max_queue_tokens} may"
        delay_s = self._retry_delay_s()
        raise OverloadedError(f"the queue is full: {what}; come back in {delay_s:.3f} s", delay_s)

    def _retry_delay_s(self) -> float:
        """When the queue of now will have drained, by the rate of late."""
        if not self._tokens_per_s:
            return _FIRST_RETRY_DELAY_S
        delay_s = (self.queue_tokens + self._running_tokens) / self._tokens_per_s
        return min(max(delay_s, _MIN_RETRY_DELAY_S), _MAX_RETRY_DELAY_S)

    def _forget(self, entry: Entry[P, R]) -> None:
        """Take a cancelled entry out of its queue, so that its room is free at once."""
        with self._lock:
            queue = self._queues.get(entry.key)
            if queue is not None and queue.pop(entry.sequence, None) is not None:
                self.queue_tokens -= entry.num_tokens
                self.queue_requests -= 1
                self._shrunk(entry.key)
                self._tell_left()

    def _shrunk(self, key: Hashable) -> None:
        """A queue has lost its first entries, or others: keep the keys in order."""
        if not self._queues[key]:
            del self._queues[key]
        elif len(self._queues) > 1:
            self._queues = dict(sorted(self._queues.items(), key=lambda item: next(iter(item[1]))))

    def _take(self, timeout_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        """The batch that is due, if any, and the entries whose deadline passed while they waited."""
        with self._lock:
            give_up_s = time.monotonic() + timeout_s if timeout_s else 0.0
            while not self._stopped:
                now_s, due_s = self._clock(), float("inf")
                if self._num_in_flight < self._limits.max_in_flight:
                    if self._again:
                        return self._pop_again(now_s)
                    key, due_s = self._first_due()
                    if key is not None and due_s <= now_s:
                        return self._pop(key, now_s)
                left_s = min(give_up_s - time.monotonic(), due_s - now_s)
                if left_s <= 0:
                    break
                self._due.wait(left_s)
            if self._stopped:
                self._due.wait_for(lambda: self._is_over, timeout_s)
            return None, []

    def _first_due(self) -> tuple[Hashable | None, float]:
        """The key to run next and when: among those due first, the one whose first entry is oldest."""
        if not self._limits.max_queue_delay_s:
            return (next(iter(self._queues)), float("-inf")) if self._queues else (None, float("inf"))
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
            self.queue_tokens -= entry.num_tokens
            self.queue_requests -= 1
            if not entry.set_running_or_notify_cancel():
                continue
            entry.queued_s = now_s - entry.admitted_s
            if entry.deadline_s is not None and entry.deadline_s <= now_s:
                expired.append(entry)
                continue
            members.append(entry)
            tokens += entry.num_tokens
        self._shrunk(key)
        if members:
            self._running_tokens += tokens
            self._running_requests += len(members)
        self._tell_left()
        return (self._take_off(key, members, tokens) if members else None), expired

    def _pop_again(self, now_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        """A member of a batch that failed, alone."""
        entry = self._again.popleft()
        if entry.deadline_s is not None and entry.deadline_s <= now_s:
            self._account_left_running(1, entry.num_tokens)
            return None, [entry]
        return self._take_off(entry.key, [entry], entry.num_tokens), []

    def _take_off(self, key: Hashable, entries: list[Entry[P, R]], num_tokens: int) -> Batch[P, R]:
        self._num_in_flight += 1
        self._num_taken += 1
        batch = self._taken[self._num_taken] = Batch(key, entries, num_tokens, self._num_taken)
        return batch

    def _tell_left(self) -> None:
        """Under the lock: tell who drains that fewer are left."""
        if self._draining:
            self._left.notify_all()

    def _leave_flight(self) -> None:
        with self._lock:
            self._num_in_flight -= 1
            if self._soon is None and (self._has_work or self._stopped):
                self._due.notify_all()
            if self._stopped and not self._num_in_flight:
                self._launched.notify_all()

    def _fail_batch(self, batch: Batch[P, R], error: Exception) -> None:
        """Fail a lone member and those that are spent; let the others run again one by one, before all others: they
        are the oldest."""
        is_lone = len(batch.entries) == 1
        failed = [entry for entry in batch.entries if is_lone or entry.is_spent]
        others = [entry for entry in batch.entries if not (is_lone or entry.is_spent)]
        with self._lock:
            if others and not self._stopped:
                count = len(batch.entries)
                log.warning("a batch of %d requests failed, %d run again one by one: %s", count, len(others), error)
                self._again.extend(others)
                self._due.notify_all()
                others = []
            over = failed + others
            self._account_left_running(len(over), sum(entry.num_tokens for entry in over))
        _clear_frames(error)
        for entry in failed:
            _fail(entry, error)
        for entry in others:
            _fail(entry, _stopped())

    def _account_left_running(self, num_requests: int, num_tokens: int) -> None:
        if self._abandoned:  # nobody counts any more
            return
        self._running_requests -= num_requests
        self._running_tokens -= num_tokens
        if self._draining:
            self._left.notify_all()

    def _account_served(self, batch: Batch[P, R], launched_s: float) -> None:
        now_s = self._clock()
        with self._lock:
            self._account_left_running(len(batch.entries), batch.num_tokens)
            # Batches overlap: this one has had the backend to itself since the one before was finished.
            alone_s = now_s - max(launched_s, self._finished_s)
            self._finished_s = now_s
            if alone_s > 0 and batch.num_tokens:
                rate = batch.num_tokens / alone_s
                before = rate if self._tokens_per_s is None else self._tokens_per_s
                self._tokens_per_s = before + _RATE_SMOOTHING * (rate - before)


def _stopped() -> ExpertdServerError:
    return UnavailableError("the server stopped before this request ran; try another server")


def _hangs() -> ExpertdServerError:
    return UnavailableError("what computes here hangs, and this request with it; try another server")


def _timeout(entry: Entry[P, R], now_s: float) -> ExpertdServerError:
    return RequestTimeoutError(
        f"the deadline passed after {now_s - entry.admitted_s:.3f} s, before the request was computed; "
        f"allow more time or try another server"
    )


def _clear_frames(error: BaseException) -> None:
    """Let go of what an error's frames hold. Whoever keeps the error would keep the batch: its tensors, its layer."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)  # all but those that still run: they are the batcher's own
        each = each.__cause__ or each.__context__


def _fail(promise: Promise[R], error: Exception) -> None:
    if not promise.done():
        promise.set_exception(error)
