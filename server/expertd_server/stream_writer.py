"""Answers of one call on their way to gRPC, one after the other, as it takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

import grpc

__all__ = ["StreamWriter"]

T = TypeVar("T")


class StreamWriter(Generic[T]):
    """on_written: called with what `write` was called with, when gRPC has taken the answer. Not before: it takes no
    further one before the caller reads.

    over: given the exception of a write that fails, or cancelled where the caller has left.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[bytes, bytes],
        on_written: Callable[[T], object],
        over: asyncio.Future[None],
    ) -> None:
        self._context = context
        self._on_written = on_written
        self._over = over
        self._waiting: deque[tuple[T, bytes]] = deque()
        self._writing: Coroutine[Any, Any, None] | None = None
        """The answer that is being written, if any is."""
        self._is_closed = False

    # A write begins here and now, and not, as a task would, in the loop's next round: what remains to be done for a
    # batch whose answer is there must not keep its caller waiting.

    def write(self, what: T, answer: bytes) -> None:
        """Write an answer after those before. The caller bounds how many wait."""
        self._waiting.append((what, answer))
        if self._writing is None:
            self._write_next()

    def close(self) -> None:
        """Write nothing more."""
        self._is_closed = True
        self._waiting.clear()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.close()

    def _write_next(self) -> None:
        """Write answers until one must wait for gRPC, or none is left."""
        while self._waiting and not self._is_closed:
            what, answer = self._waiting.popleft()
            self._writing = self._context.write(answer)
            if not self._advance(what):
                return

    def _advance(self, what: T) -> bool:
        """Go on with a write as far as it goes; whether it is done."""
        assert self._writing is not None
        try:
            waits_for = self._writing.send(None)
        except StopIteration:
            self._writing = None
            self._on_written(what)
            return True
        except (asyncio.CancelledError, grpc.aio.InternalError):
            # What gRPC makes of a write to a caller who has just gone, if the call's end is not told yet.
            self._writing = None
            if not self._over.done():
                self._over.cancel("the caller left")
        except Exception as error:
            self._writing = None
            if not self._over.done():
                self._over.set_exception(error)
        else:
            waits_for.add_done_callback(partial(self._resume, what))
        return False

    def _resume(self, what: T, waited_for: asyncio.Future[None]) -> None:
        if self._writing is None:  # the call is over; nobody else asks how this write went
            if not waited_for.cancelled():
                waited_for.exception()
        elif self._advance(what):
            self._write_next()
