"""What `concurrent.futures.Future` does, for the path of a request: a third of the time, as nobody has to wait.

A future makes a condition variable for every request, and takes its lock for each question. Here callbacks are told,
and whoever waits all the same (tests, tools) makes the one event that it needs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, Generic, TypeVar

__all__ = ["Promise"]

log = logging.getLogger(__name__)

R = TypeVar("R")

# Held for a few instructions, by whoever changes the state of a promise: of any, so that none needs a lock of its own.
_lock = threading.Lock()


# States: plain numbers, which are asked for several times for each request.
_PENDING, _RUNNING, _CANCELLED, _FINISHED = range(4)


class Promise(Generic[R]):
    """A result to come, or an error. Thread-safe; the methods mean what those of `concurrent.futures.Future` mean."""

    __slots__ = ("__weakref__", "_callbacks", "_error", "_result", "_state")

    def __init__(self, on_done: Callable[[Any], object] | None = None) -> None:
        """on_done: see `add_done_callback`."""
        self._state = _PENDING
        self._result: R | None = None
        self._error: BaseException | None = None
        self._callbacks: tuple[Callable[[Any], object], ...] = () if on_done is None else (on_done,)

    def cancel(self) -> bool:
        """Give it up, unless it runs or is over; whether it is given up."""
        with _lock:
            if self._state != _PENDING:
                return self._state == _CANCELLED
            self._state = _CANCELLED
        self._tell()
        return True

    def cancelled(self) -> bool:
        """Whether it was given up."""
        return self._state == _CANCELLED

    def done(self) -> bool:
        """Whether it is over, or was given up."""
        return self._state >= _CANCELLED

    def set_running_or_notify_cancel(self) -> bool:
        """From now on it cannot be given up; False when it was before."""
        with _lock:
            if self._state == _PENDING:
                self._state = _RUNNING
            return self._state == _RUNNING

    def set_result(self, result: R) -> None:
        """It is over. Raises RuntimeError when it was before."""
        with _lock:
            if self._state >= _CANCELLED:
                raise self._kept_before()
            self._result = result
            self._state = _FINISHED
        self._tell()

    def set_exception(self, error: BaseException) -> None:
        """It is over, and went wrong. Raises RuntimeError when it was over before."""
        with _lock:
            if self._state >= _CANCELLED:
                raise self._kept_before()
            self._error = error
            self._state = _FINISHED
        self._tell()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call it with this promise when it is over or given up, in the thread that says so; here, if it is already."""
        with _lock:
            if not self.done():
                self._callbacks = (*self._callbacks, callback)
                return
        self._call((callback,))

    def result(self, timeout: float | None = None) -> R:
        """Wait, up to `timeout` seconds. Raises what went wrong, CancelledError or TimeoutError."""
        if self._state != _FINISHED:
            self._wait(timeout)
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error knows this frame, and the frame would know the error: leave no cycle
        return self._result  # type: ignore[return-value]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, if anything; waits and raises as `result` does."""
        if self._state != _FINISHED:
            self._wait(timeout)
        return self._error

    def _wait(self, timeout: float | None) -> None:
        if not self.done():
            over = threading.Event()
            self.add_done_callback(lambda _: over.set())
            if not over.wait(timeout):
                raise TimeoutError
        if self._state == _CANCELLED:
            raise CancelledError

    def _kept_before(self) -> RuntimeError:
        how = "was given up" if self.cancelled() else "is kept already"
        return RuntimeError(f"a promise is kept once, and this one {how}")

    def _tell(self) -> None:
        callbacks, self._callbacks = self._callbacks, ()
        self._call(callbacks)

    def _call(self, callbacks: tuple[Callable[[Any], object], ...]) -> None:
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # whoever keeps promises must outlive those to whom they were made
                log.exception("a callback of a request failed")
