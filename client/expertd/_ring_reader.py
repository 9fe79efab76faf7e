"""The thread of the synchronous client that takes a stream's answers from its ring."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Final

from expertd._rings import StreamRings
from expertd.errors import ProtocolError

__all__ = ["RingReader"]

_JOIN_TIMEOUT_S: Final = 5.0
# A server hangs up when it ends the stream. One that does not end it within this time is not as it should be.
_HUNG_UP_S: Final = 5.0


class RingReader:
    """Reads from when it is made until `finish`, which must follow.

    deliver: called with each answer, in the thread; may raise ProtocolError. on_broken: called with the ProtocolError
    after which nothing more is read.
    """

    def __init__(
        self, rings: StreamRings, deliver: Callable[[bytes], None], on_broken: Callable[[ProtocolError], None]
    ) -> None:
        self._rings = rings
        self._deliver = deliver
        self._on_broken = on_broken
        self._finish_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._finish_fd, select.POLLIN)
        self._poll.register(rings.bell_fd, select.POLLIN)
        self._patience_ms: float | None = None
        self.put = rings.put
        """See `StreamRings.put`; not to be called once `finish` is."""
        self._thread = threading.Thread(target=self._run, name="expertd-ring-reader", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The stream is over: deliver what is there, and end."""
        os.eventfd_write(self._finish_fd, 1)
        self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._read()
        except ProtocolError as error:
            self._on_broken(error)
            os.eventfd_read(self._finish_fd)  # the stream's end, which follows, closes what is in use until then
        finally:
            self._rings.close()
            os.close(self._finish_fd)

    def _read(self) -> None:
        is_over = False
        while True:
            answer = self._rings.take()
            if answer is not None:
                self._deliver(answer)
            elif is_over:
                return
            else:
                is_over = self._wait()

    def _wait(self) -> bool:
        """For the bell, or the end; whether it is the end."""
        ready = {fd for fd, _ in self._poll.poll(self._patience_ms)}
        if not ready:
            raise ProtocolError("the server has left a ring of a stream that goes on")
        if self._rings.bell_fd in ready and not self._rings.silence():
            self._poll.unregister(self._rings.bell_fd)
            self._patience_ms = _HUNG_UP_S * 1e3
        return self._finish_fd in ready
