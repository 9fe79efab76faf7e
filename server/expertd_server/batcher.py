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
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, NoReturn, TypeVar

from expertd_server.batch import Batch, Entry, Flight, Limits, Running
from expertd_server.bell import Bell, ServingThread
from expertd_server.errors import ExpertdServerError, OverloadedError, RequestTimeoutError, UnavailableError
from expertd_server.promise import Promise
from expertd_server.waiting import Waiting

__all__ = ["Batcher"]

log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

# An idle scheduler looks up this often; nothing depends on it, it only bounds every wait.
_IDLE_WAIT_S = 1.0
# Retry delays that are told to callers: before any batch was measured, and the bounds of the estimate.
_FIRST_RETRY_DELAY_S = 0.1
_MIN_RETRY_DELAY_S = 0.001
_MAX_RETRY_DELAY_S = 10.0
# What `hurry` waits for a batch: longer than a small one takes, shorter than others mind.
_BRIEFLY_S = 0.0005
# To wake who asked takes longer than most else that is done for a batch. Where as much waits as so many of its size
# hold, answers are told of together, those of some batches: beside the time that all have waited that is little.
_LONG_QUEUE_BATCHES = 16
_TOLD_TOGETHER = 4
# Weight of the newest batch in the moving average of the drain rate.
_RATE_SMOOTHING = 0.2


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
        self._waiting: Waiting[P, R] = Waiting(limits)
        # Members of batches that failed, to run again alone.
        self._again: deque[Entry[P, R]] = deque()
        self._flights: deque[Flight[P, R]] = deque()
        self._num_in_flight = 0
        self._num_coming_back = 0
        """Of these, that are computed, as far as the serving thread has heard."""
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
        self._here: ServingThread | None = None
        self._bell: Bell | None = None
        """Rung by each batch that is over, where the serving thread launches and hands out and does not wait."""
        self._num_untold = 0
        """Batches that were handed out since the serving thread was last told so."""
        self._is_called = False
        self._caller: threading.Thread | None = None
        self._alone: Batch[P, R] | None = None
        """Taken at once, for `hurry` to run: to queue a lone request would take as long as all else."""

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return self._waiting.num_tokens

    @property
    def queue_requests(self) -> int:
        """Requests that wait."""
        return self._waiting.num_requests

    def submit(  # noqa: PLR0917 (called for every request, and keywords take time)
        self,
        key: Hashable,
        payload: P,
        num_tokens: int,
        deadline_s: float | None = None,
        on_done: Callable[[Entry[P, R]], object] | None = None,
        is_last: bool = False,
        num_requests: int = 1,
    ) -> Entry[P, R]:
        """Admit a request of at most max_batch_tokens tokens, or refuse it at once.

        It fails with RequestTimeoutError when `deadline_s` passes before its batch starts.
        on_done: called with the request when it is over, see `Promise.add_done_callback`.
        is_last: `hurry` is called next, in this thread. num_requests: how many it counts for.
        Raises OverloadedError when the queue is full and UnavailableError when the batcher drains.
        """
        limits = self._limits
        if num_tokens > limits.max_batch_tokens:
            raise ValueError(f"num_tokens is {num_tokens}, expected at most {limits.max_batch_tokens}")
        with self._lock:
            if self._draining:
                raise UnavailableError("the server is draining and takes no new requests; try another server")
            most_tokens, most_requests = self._waiting.room()
            if num_tokens > most_tokens or num_requests > most_requests:
                self._refuse(num_tokens, num_requests)
            now_s = self._clock()
            entry: Entry[P, R] = Entry(
                self._next_sequence, key, payload, num_tokens, now_s, deadline_s, self._forget, on_done, num_requests
            )
            self._next_sequence += 1
            if is_last and self._may_run_alone and not (deadline_s is not None and deadline_s <= now_s):
                entry.set_running_or_notify_cancel()
                self._alone = self._take_off(key, [entry], num_tokens)
                self._running_tokens += num_tokens
                self._running_requests += num_requests
            else:
                self._enqueue(entry)
        return entry

    def join(self, entry: Entry[P, R], join: Callable[[int, int], tuple[int, int]]) -> bool:
        """Admit more requests as part of an entry that stands for several, unless it runs or others came after it, as
        far as they have room in a batch and in the queue; whether any were.

        join: takes how many tokens and requests have room, makes as many part of the entry's payload, and says how many
        tokens and requests those are.
        """
        with self._lock:
            waiting = self._waiting
            if self._draining or not waiting.is_last(entry):
                return False
            queue_tokens, most_requests = waiting.room()
            most_tokens = min(queue_tokens, self._limits.max_batch_tokens - entry.num_tokens)
            num_tokens, num_requests = join(most_tokens, most_requests) if most_requests > 0 else (0, 0)
            waiting.resize(entry, num_tokens, num_requests)
            return num_requests > 0

    def left(self, entry: Entry[P, R], num_tokens: int, num_requests: int) -> None:
        """So many of those that an entry stands for are no part of it any more; without effect where it runs."""
        with self._lock:
            if self._waiting.resize(entry, -num_tokens, -num_requests):
                self._tell_left()

    def _enqueue(self, entry: Entry[P, R]) -> None:
        """Under the lock."""
        self._waiting.add(entry)
        if self._here is None:
            if self._has_room_in_flight:
                self._due.notify_all()
        elif not self._is_called:
            self._is_called = True
            self._here.soon(self._run_due)

    def start(self, here: ServingThread | None = None) -> None:
        """Start the threads: one that launches and finishes, or one for each where there is more than one in flight.

        here: instead, this one launches and finishes. Threads that share an interpreter keep each other waiting. With
        one batch in flight it waits for it, which is for what computes in no time; with more, each rings when it is
        over. Not together with max_queue_delay_s.
        """
        several = self._limits.max_in_flight > 1
        loops: dict[str, Callable[[float], object]] = {}
        if here is not None:
            if self._limits.max_queue_delay_s:
                raise ValueError("without a thread nobody can wait for company: max_queue_delay_s must be 0")
            self._here = here
            self._bell = here.bell(partial(self._guarded, self._hand_out_next)) if several else None
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
        return self._here is not None and not (self._waiting or self._again or self._taken)

    def hurry(self) -> None:
        """Nobody else is about to submit: run here and now what waits, where no thread does it.

        For the serving thread. A lone request that takes no time is answered before this returns.
        """
        self._run_alone()
        if self._bell is not None:
            if self._waiting.num_requests == 1 and not self._num_in_flight:
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

    def _finish_briefly(self, flight: Flight[P, R] | None) -> None:
        """Wait for a batch, but not for long: that it is over is heard a while later where it rings."""
        if flight is None:
            return
        if flight.wait(None if self._bell is None else _BRIEFLY_S):
            self._hand_out(flight)
        else:
            self._put(flight)

    def _run_due(self) -> None:
        self._is_called = False
        self._caller = self._caller or threading.current_thread()
        self._run_alone()
        while self._has_work and not self._stopped:
            self._guarded(self.run_once if self._bell is None else self.launch_once)

    @property
    def threads(self) -> list[threading.Thread]:
        """That launch and finish, as far as they are known by now."""
        return self._threads if self._caller is None else [*self._threads, self._caller]

    def _hand_out_next(self) -> None:
        """Hand out what was launched first, if it is over, and launch what waits, as soon as a batch is computed."""
        assert self._here is not None
        flight = self._flights[0] if self._flights else None
        if flight is None or not flight.wait(0.0):
            if self._note_computed() and self._has_work:
                # Another batch computes now. What callers have sent meanwhile is read first.
                self._here.soon(self._run_due)
        else:
            self._flights.popleft()
            self._guarded(partial(self._hand_out, flight))
            self._run_due()
            if self._flights and self._flights[0].wait(0.0):
                # Its ring was heard together with this one's. Others go first.
                self._here.soon(self._hand_out_next)

    def _note_computed(self) -> bool:
        """Whether any batch was computed since."""
        num_before = self._num_coming_back
        for flight in self._flights:  # in this order they are computed
            if not flight.was_computed:
                if not flight.is_computed():
                    break
                self._num_coming_back += 1
        return self._num_coming_back > num_before

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

    def _put(self, flight: Flight[P, R]) -> None:
        with self._lock:
            self._flights.append(flight)
            self._launched.notify()
        if self._bell is not None:
            self._have_it_ring(flight, self._bell)

    @staticmethod
    def _have_it_ring(flight: Flight[P, R], bell: Bell) -> None:
        try:
            flight.running.ring_when_over(bell.fd)
        except Exception:  # nobody else would say that it is over
            log.exception("a batch cannot ring when it is over; it is waited for")
            flight.wait()
            bell.ring()

    def _launch_due(self, timeout_s: float) -> tuple[Flight[P, R] | None, bool]:
        """What was launched, and whether anything was taken from the queue."""
        batch, expired = self._take(timeout_s)
        for entry in expired:
            _fail(entry, RequestTimeoutError.before_computing(self._clock() - entry.admitted_s))
        if batch is None:
            return None, bool(expired)
        try:
            return self._start(batch), True
        finally:
            del batch  # an error knows the frames that called the one that it holds, see _clear_frames

    def _start(self, batch: Batch[P, R]) -> Flight[P, R] | None:
        """What was launched; None: it failed."""
        launched_s = self._clock()
        try:
            return Flight(batch, self._launch(batch), launched_s)
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

    def _next_flight(self, timeout_s: float) -> Flight[P, R] | None:
        with self._lock:
            if not self._flights:
                self._launched.wait_for(lambda: self._flights or self._is_over, timeout_s)
            return self._flights.popleft() if self._flights else None

    def _finish(self, flight: Flight[P, R]) -> None:
        flight.wait()
        self._hand_out(flight)

    def _hand_out(self, flight: Flight[P, R]) -> None:
        """Serve the waiters of a batch that is over; one that waits is launched before, where nothing is in flight."""
        batch, running = flight.batch, flight.running
        self._leave_flight(was_coming_back=flight.was_computed)
        if self._bell is not None and self._has_work and self._num_in_flight == self._num_coming_back:
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
                self._tell(batch)
                running.close()
            finally:
                self._taken.pop(batch.number, None)
            del flight, batch, running  # an error holds this frame, see _clear_frames

    def _tell(self, batch: Batch[P, R]) -> None:
        """A batch was handed out: tell the serving thread, now or together with those in flight."""
        if self._here is None:
            return
        self._num_untold += 1
        is_long = self._waiting.num_requests >= _LONG_QUEUE_BATCHES * batch.num_requests
        if not (self._flights and is_long and self._num_untold < _TOLD_TOGETHER):
            self._num_untold = 0
            self._here.told()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused, for good."""
        return self._draining

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those admitted; False when some are left after timeout_s."""
        with self._lock:
            self._draining = True
            self._due.notify_all()
            return self._left.wait_for(lambda: not (self._waiting.num_requests or self._running_requests), timeout_s)

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
        if any(thread.is_alive() for thread in self._threads):
            return False
        if self._bell is not None:
            with self._lock:
                self._left.wait_for(lambda: not self._running_requests, until_s - time.monotonic())
                if self._running_requests or (self._abandoned and self._num_in_flight):
                    return False
            bell, self._bell = self._bell, None
            bell.close()
        return True

    def oldest_work(self) -> int | None:
        """Number of the batch that was taken first and is not over; of the next one when none is under way, but
        requests wait; None: there is nothing to do. As long as it is the same, nothing moves. Takes no lock.
        """
        taken = list(self._taken)  # made at once, whatever other threads do to the batches
        if taken:
            return taken[0]
        return self._num_taken + 1 if self._waiting.num_requests or self._again else None

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
            taken = list(self._taken.values())  # at once, as in oldest_work
            running = again + [entry for batch in taken for entry in batch.entries]
            self._running_tokens = self._running_requests = 0
            self._left.notify_all()
        for entry in running + [entry for entry in left if entry.set_running_or_notify_cancel()]:
            with contextlib.suppress(RuntimeError):  # it was kept this very moment
                _fail(entry, _hangs())

    @property
    def _has_work(self) -> bool:
        """Whether a thread could launch something, now or when it has waited for company."""
        return bool(self._waiting or self._again) and self._has_room_in_flight

    @property
    def _has_room_in_flight(self) -> bool:
        """Whether one batch more may be launched now."""
        limits = self._limits
        more = self._num_in_flight - min(self._num_coming_back, limits.max_coming_back) - limits.max_in_flight
        return more < 0 or (
            more == 0 and limits.crowd_tokens is not None and self._waiting.num_tokens >= limits.crowd_tokens
        )

    @property
    def _is_over(self) -> bool:
        return self._stopped and not self._num_in_flight

    def _empty(self) -> tuple[list[Entry[P, R]], list[Entry[P, R]]]:
        """Under the lock: take nothing more, and give up what waits, for the first time and to run again."""
        self._draining = self._stopped = True
        left = self._waiting.clear()
        again = list(self._again)
        self._again.clear()
        self._account_left_running(_count(again), sum(entry.num_tokens for entry in again))
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

    def _refuse(self, num_tokens: int, num_requests: int) -> NoReturn:
        limits, waiting = self._limits, self._waiting
        if waiting.num_requests + num_requests > limits.max_queue_requests:
            what = f"{waiting.num_requests} requests wait, at most {limits.max_queue_requests} may"
        else:
            what = f"{waiting.num_tokens} tokens wait and {num_tokens} come, at most {limits.max_queue_tokens} may"
        delay_s = self._retry_delay_s()
        raise OverloadedError(f"the queue is full: {what}; come back in {delay_s:.3f} s", delay_s)

    def _retry_delay_s(self) -> float:
        """When the queue of now will have drained, by the rate of late."""
        if not self._tokens_per_s:
            return _FIRST_RETRY_DELAY_S
        delay_s = (self._waiting.num_tokens + self._running_tokens) / self._tokens_per_s
        return min(max(delay_s, _MIN_RETRY_DELAY_S), _MAX_RETRY_DELAY_S)

    def _forget(self, entry: Entry[P, R]) -> None:
        """Take a cancelled entry out of its queue, so that its room is free at once."""
        with self._lock:
            if self._waiting.remove(entry):
                self._tell_left()

    def _take(self, timeout_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        """The batch that is due, if any, and the entries whose deadline passed while they waited."""
        with self._lock:
            give_up_s = time.monotonic() + timeout_s if timeout_s else 0.0
            while not self._stopped:
                now_s, due_s = self._clock(), float("inf")
                if self._has_room_in_flight:
                    if self._again:
                        return self._pop_again(now_s)
                    key, due_s = self._waiting.first_due(may_delay=not self._draining)
                    if key is not None and due_s <= now_s:
                        return self._pop(key, now_s)
                left_s = min(give_up_s - time.monotonic(), due_s - now_s)
                if left_s <= 0:
                    break
                self._due.wait(left_s)
            if self._stopped:
                self._due.wait_for(lambda: self._is_over, timeout_s)
            return None, []

    def _pop(self, key: Hashable, now_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        members, expired = self._waiting.pop(key, now_s)
        self._tell_left()
        if not members:
            return None, expired
        num_tokens = sum(entry.num_tokens for entry in members)
        self._running_tokens += num_tokens
        batch = self._take_off(key, members, num_tokens)
        self._running_requests += batch.num_requests
        return batch, expired

    def _pop_again(self, now_s: float) -> tuple[Batch[P, R] | None, list[Entry[P, R]]]:
        """A member of a batch that failed, alone."""
        entry = self._again.popleft()
        if entry.deadline_s is not None and entry.deadline_s <= now_s:
            self._account_left_running(entry.num_requests, entry.num_tokens)
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

    def _leave_flight(self, *, was_coming_back: bool = False) -> None:
        with self._lock:
            self._num_in_flight -= 1
            self._num_coming_back -= was_coming_back
            if self._here is None and (self._has_work or self._stopped):
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
                counts = batch.num_requests, _count(others)
                log.warning("a batch of %d requests failed, %d run again one by one: %s", *counts, error)
                self._again.extend(others)
                self._due.notify_all()
                others = []
            over = failed + others
            self._account_left_running(_count(over), sum(entry.num_tokens for entry in over))
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
            self._account_left_running(batch.num_requests, batch.num_tokens)
            # Batches overlap: this one has had the backend to itself since the one before was finished.
            alone_s = now_s - max(launched_s, self._finished_s)
            self._finished_s = now_s
            if alone_s > 0 and batch.num_tokens:
                rate = batch.num_tokens / alone_s
                before = rate if self._tokens_per_s is None else self._tokens_per_s
                self._tokens_per_s = before + _RATE_SMOOTHING * (rate - before)


def _count(entries: list[Entry[P, R]]) -> int:
    """Requests."""
    return sum([entry.num_requests for entry in entries])


def _stopped() -> ExpertdServerError:
    return UnavailableError("the server stopped before this request ran; try another server")


def _hangs() -> ExpertdServerError:
    return UnavailableError("what computes here hangs, and this request with it; try another server")


def _clear_frames(error: BaseException) -> None:
    """Let go of what an error's frames hold. Whoever keeps the error would keep the batch: its tensors, its layer."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)  # all but those that still run: they are the batcher's own
        each = each.__cause__ or each.__context__


def _fail(promise: Promise[R], error: Exception) -> None:
    if not promise.done():
        promise.set_exception(error)
