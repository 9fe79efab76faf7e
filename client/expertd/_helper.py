"""A second pair of hands for work on large arrays, which numpy does without Python's lock.

One thread for the whole process, started when first needed. It is offered work only while it is idle, and a caller does
at once whatever the helper has not begun: nobody waits for a helper that is busy or that gets no processor.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

__all__ = ["share"]

_PATIENCE_S = 60.0  # for one item that the helper has begun: a fraction of a millisecond of work


def share(work: Callable[[int], None], items: Sequence[int]) -> None:
    """Call `work` once with each item, from this thread and the helper's; return when all calls have.

    Raises what a call raised.
    """
    job = _Job(work, iter(items))
    is_offered = len(items) > 1 and _helper.offer(job)
    try:
        job.run()
    finally:
        if is_offered:
            job.finish()


class _Job:
    """Items that two threads take one by one."""

    def __init__(self, work: Callable[[int], None], items: Iterator[int]) -> None:
        self._work = work
        self._items = items  # next() on it is atomic
        self._begun = threading.Lock()
        """Held from when the helper begins, or may no longer."""
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Work on items until none is left."""
        for item in self._items:
            self._work(item)

    def help(self) -> None:
        """Do the helper's share, if it is still wanted."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self.run()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def finish(self) -> None:
        """Wait for the helper to end what it has begun. Raises what it raised."""
        if self._begun.acquire(blocking=False):
            return
        if not self._ended.wait(_PATIENCE_S):
            raise RuntimeError(f"the helper thread did not end its share within {_PATIENCE_S:.0f} s")
        if self._error is not None:
            raise self._error


class _Helper:
    """The thread. Thread-safe."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, without a thread."""
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._is_free = threading.Lock()
        """Held while a job is waiting or being worked on."""
        self._has_started = False

    def offer(self, job: _Job) -> bool:
        """Give the job to the thread, unless it has one or there is no processor for it."""
        if not self._is_free.acquire(blocking=False):
            return False
        if not self._has_started:
            if _num_processors() < 2:
                return False  # and stays taken: nobody need ask again
            threading.Thread(target=self._work, name="expertd-helper", daemon=True).start()
            self._has_started = True
        self._jobs.put(job)
        return True

    def _work(self) -> None:
        while True:
            self._jobs.get().help()
            self._is_free.release()


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_helper = _Helper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helper.forget)  # a forked process has no threads but its own
