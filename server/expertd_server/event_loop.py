"""The event loop of a process, in a thread of its own: everything that gRPC serves here runs in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, TypeVar

from expertd_server.bell import Bell

__all__ = ["EventLoop", "Inbox"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_START_TIMEOUT_S: Final = 10.0


class EventLoop:
    """An asyncio loop that other threads hand work to. `acquire` gives the one of this process.

    One for all servers of a process: gRPC hands out what happened to whichever loop asks first, and several get in
    each other's way.
    """

    _shared: EventLoop | None = None
    _num_users = 0
    _sharing = threading.Lock()

    def __init__(self) -> None:
        self.loop = _new_loop()
        self._ident = 0
        self._thread = threading.Thread(target=self._run, name="expertd-loop", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> EventLoop:
        """The loop of this process, started by its first user; `release` must follow."""
        with cls._sharing:
            if cls._shared is None:
                cls._shared = cls()
            cls._num_users += 1
            return cls._shared

    def release(self) -> None:
        """Leave it; the last user stops it."""
        with self._sharing:
            type(self)._num_users -= 1
            if self._num_users:
                return
            type(self)._shared = None
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_START_TIMEOUT_S)

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in it."""
        return threading.get_ident() == self._ident

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Have a coroutine run in the loop and wait for it. Not for callers in the loop itself. Raises TimeoutError."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def soon(self, function: Callable[[], object]) -> None:
        """Call a function in the loop, when what it does now is done; from any thread."""
        if self.is_here:
            self.loop.call_soon(function)
        else:
            self.loop.call_soon_threadsafe(function)

    def stay_on(self, core: int) -> None:
        """Run on one core, together with all threads that are started in here from now on, which gRPC's are: on a core
        of their own they wake each other sooner, and find in its caches what one has read for the other."""
        self.soon(partial(os.sched_setaffinity, 0, {core}))

    def told(self) -> None:
        """See `ServingThread`; nothing is put off."""

    def bell(self, function: Callable[[], object]) -> Bell:
        """A bell that has the loop call a function; from any thread."""
        bell = Bell(function, self._silence)
        self.soon(partial(self.loop.add_reader, bell.fd, bell.answer))
        return bell

    def _silence(self, bell: Bell) -> None:
        def leave() -> None:
            self.loop.remove_reader(bell.fd)
            bell.discard()

        try:
            self.soon(leave)
        except RuntimeError:  # the loop is closed, and hears nothing any more
            bell.discard()

    def _run(self) -> None:
        self._ident = threading.get_ident()
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0))
            self.loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: the same for an eighth less of the processor, gRPC's work included."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Inbox:
    """Calls into an event loop, from any thread: however many come, the loop is woken once for all of them."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._is_called = False

    def post(self, function: Callable[[], object]) -> None:
        """Call it in the loop; at once if this is the loop."""
        if self._loop.is_here:
            function()
            return
        self._calls.append(function)
        # In this order, and the other way round in _take: a call that finds the flag set is taken by whoever clears it.
        if not self._is_called:
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody is left to be told
                self._loop.soon(self._take)

    def _take(self) -> None:
        self._is_called = False
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:  # the others must be called, whatever becomes of one
                log.exception("a call into the event loop failed")
