"""What is asked of the one thread that requests come from: to call functions, also when what is no Python rings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

__all__ = ["Bell", "ServingThread"]


class Bell:
    """A file, an eventfd, to which is written to have a function called; once, however often before that it was.

    function: called by `answer`, which is for the thread that listens. on_close: called by `close`, to listen no more
    and then `discard` the file.
    """

    def __init__(self, function: Callable[[], object], on_close: Callable[[Bell], object]) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._function = function
        self._on_close = on_close

    def ring(self) -> None:
        """Have the function called soon; from any thread."""
        os.eventfd_write(self.fd, 1)

    def answer(self) -> None:
        """It was rung, or so it seemed."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._function()

    def close(self) -> None:
        """Listen no more. Whoever may still ring has a file of its own that is a copy of this one."""
        self._on_close(self)

    def discard(self) -> None:
        """Close the file, which nobody listens to any more."""
        os.close(self.fd)


class ServingThread(Protocol):
    """The thread that requests come from. `soon` and `bell` are for any thread."""

    def soon(self, function: Callable[[], object]) -> None:
        """Have the thread call a function, not at once."""
        ...

    def bell(self, function: Callable[[], object]) -> Bell:
        """A bell that has the thread call a function."""
        ...

    def told(self) -> None:
        """All who wait for a batch have been told, in this thread: what was put off until then is due."""
        ...
