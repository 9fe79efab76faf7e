"""Who takes a stream's answers from its ring, in the synchronous client: the caller that waits for one, or a thread.

To hand an answer from thread to thread takes as long as all else that is done for it. So whoever waits for one answer
alone takes answers itself, its own and those of others, and the thread reads when nobody does who has promised to, as
long as answers are awaited.
"""

from __future__ import annotations

import math
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from expertd._rings import HUNG_UP_S, StreamRings, hung_up
from expertd.errors import ExpertdError, ProtocolError, UnavailableError

__all__ = ["RingReader"]

_JOIN_TIMEOUT_S: Final = 5.0
_LOOK_AGAIN_S: Final = 3600.0  # poll counts to 24 days, callers may wait longer


class RingReader:
    """Reads from when it is made until `finish`, which must follow. Thread-safe.

    deliver: called with each answer; may raise ProtocolError. is_awaited: whether others still are. on_broken: called
    with the error after which nothing more is read.
    """

    def __init__(
        self,
        rings: StreamRings,
        deliver: Callable[[bytes], None],
        is_awaited: Callable[[], bool],
        on_broken: Callable[[ExpertdError], None],
    ) -> None:
        self.put = rings.put
        """See `StreamRings.put`; not to be called once `finish` is."""
        self._rings = rings
        self._deliver = deliver
        self._is_awaited = is_awaited
        self._on_broken = on_broken
        self._turn = threading.Lock()
        """Of whoever reads."""
        self._needed = threading.Event()
        """The thread is to read, when it is its turn."""
        self._look_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Has whoever reads look around."""
        self._is_look_fd_open = True
        self._look_lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._look_fd, select.POLLIN)
        self._poll.register(rings.bell_fd, select.POLLIN)
        self._hung_up_until_s = math.inf
        self._is_over = False
        self._is_broken = False
        self._thread = threading.Thread(target=self._run, name="expertd-ring-reader", daemon=True)
        self._thread.start()

    def need(self) -> None:
        """Have somebody read: an answer is awaited by who does not call `read_for`."""
        if not self._needed.is_set():
            self._needed.set()

    def read_for(self, settled: queue.SimpleQueue[Any], until_s: float) -> None:
        """Take answers in this thread until something is in a queue that `deliver` fills.

        Returns without when somebody else reads, when the stream is over, and at until_s, on time.monotonic().
        """
        if not self._turn.acquire(False):
            self.need()  # whoever reads may have seen that nothing is awaited, just before this was
            return
        try:
            if not self._is_over:
                self._read(lambda: not settled.empty() or time.monotonic() >= until_s, until_s)
        finally:
            self._turn.release()
            if self._is_awaited():
                self.need()

    def look(self) -> None:
        """Something came another way: whoever reads for it must see that it is there."""
        with self._look_lock:
            if self._is_look_fd_open:
                os.eventfd_write(self._look_fd, 1)

    def finish(self) -> None:
        """The stream is over: deliver what is there, and end."""
        self._is_over = True
        self.look()
        self._needed.set()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._needed.wait()
                self._needed.clear()
                with self._turn:
                    self._read(lambda: not self._is_awaited(), math.inf)
            with self._turn:
                self._read(lambda: True, 0.0)
        finally:
            self._is_over = True
            with self._turn, self._look_lock:
                self._rings.close()
                self._is_look_fd_open = False
                os.close(self._look_fd)

    def _read(self, is_done: Callable[[], bool], until_s: float) -> None:
        """Whose turn it is: deliver what is there and what comes, until it is done."""
        is_whole = True
        try:
            while not self._is_broken:
                is_whole = False
                while (answer := self._rings.take()) is not None:
                    self._deliver(answer)
                is_whole = True
                if is_done() or self._is_over:
                    return
                self._wait(until_s)
        except ProtocolError as error:
            self._break(error)
        except BaseException:  # KeyboardInterrupt, most likely, which comes to the main thread anywhere
            if not is_whole:
                self._break(UnavailableError("whoever took answers was interrupted, and one may be lost"))
            raise

    def _break(self, failure: ExpertdError) -> None:
        self._is_broken = True
        self._on_broken(failure)

    def _wait(self, until_s: float) -> None:
        until_s = min(until_s, self._hung_up_until_s)
        left_s = min(max(0.0, until_s - time.monotonic()), _LOOK_AGAIN_S)
        patience_ms = None if until_s == math.inf else left_s * 1e3
        for fd, _ in self._poll.poll(patience_ms):
            if fd == self._look_fd:
                os.eventfd_read(fd)
            elif not self._rings.silence():
                self._poll.unregister(fd)
                self._hung_up_until_s = time.monotonic() + HUNG_UP_S
        if time.monotonic() >= self._hung_up_until_s:
            raise hung_up()
