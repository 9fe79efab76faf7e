"""Messages between the processes of one server: objects, pickled, over a pair of connected sockets.

Processes of one server trust each other; nothing that a caller sent is ever unpickled.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any, Final

from expertd_server.config import Config

__all__ = ["Collect", "Collected", "Control", "Draining", "Hangs", "Ping", "Pong", "Serving", "Start", "Stop"]

# A peer that takes a message, or the rest of one that it began, no faster than this is as good as gone.
_TIMEOUT_S: Final = 5.0
_LENGTH: Final = struct.Struct("<Q")


# What a supervisor and its processes tell each other.


@dataclass(frozen=True)
class Start:
    """To a process, first of all: what it shall be."""

    config: Config
    port: int
    """Where front-ends listen."""
    instance_id: str
    is_draining: bool
    """Whether the server was told to drain, which outlives every process but the supervisor."""


@dataclass(frozen=True)
class Draining:
    """From the engine: the server was told to drain."""


@dataclass(frozen=True)
class Stop:
    """To a process: drain and end."""


@dataclass(frozen=True)
class Collect:
    """To a process: send your metrics, with this number."""

    number: int


@dataclass(frozen=True)
class Collected:
    """From a process: its metrics, as families of prometheus_client."""

    number: int
    families: list[Any]


@dataclass(frozen=True)
class Ping:
    """To the engine: say that you are there."""


@dataclass(frozen=True)
class Pong:
    """From the engine: it is."""


@dataclass(frozen=True)
class Serving:
    """From a process: whether it answers requests."""

    is_serving: bool
    summary: str = ""
    """For a log line."""
    admin_port: int | None = None
    """Where this process takes orders."""


@dataclass(frozen=True)
class Hangs:
    """From a process: it is of no more use, and should be killed."""

    what: str
    """For a log line."""


class Control:
    """One end of a conversation. Any thread may send, one receives."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(_TIMEOUT_S)
        self._socket = connected
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Readable when a message, or the end, has come."""
        return self._socket.fileno()

    def send(self, message: Any) -> bool:
        """Send a message; False when the other end is gone, or might as well be."""
        data = pickle.dumps(message)
        with self._lock:
            try:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
            except OSError:
                self.hang_up()  # what was sent of the message is no use
                return False
        return True

    def receive(self) -> Any:
        """The next message. Raises EOFError when the other end is gone, or left off within a message."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message, or the end, to come; False when none has."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def hang_up(self) -> None:
        """End the conversation for both sides. The file stays open: a thread may be waiting for it."""
        with contextlib.suppress(OSError):  # it was over
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the conversation, and close the file."""
        self.hang_up()  # whoever is sending would keep this waiting
        with self._lock:
            self._socket.close()

    def _read(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            try:
                part = self._socket.recv(nbytes - len(data))
            except OSError:
                part = b""
            if not part:
                raise EOFError
            data += part
        return bytes(data)
