"""Where callers on this machine hand in memory that they share with the server: a Unix socket, see RegisterRegion.

gRPC carries no file descriptors, so they come beside it. A ticket, told on the caller's stream and good once, says
whose memory a descriptor is. The memory must not be able to shrink: a page that is gone would end this process when it
reads there.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from expertd_server.errors import ConfigError
from expertd_server.pinning import Share
from expertd_server.threads import ended

__all__ = ["PROOF_BYTES", "MapMemory", "RegionDoor", "RegionRefusedError", "map_memory"]

log = logging.getLogger(__name__)

PROOF_BYTES: Final = 16
"""At the start of a region: random, sent back to prove that this memory is mapped."""

_TICKET_BYTES: Final = 16
_TICKET_S: Final = 10.0
# Whoever connects has this long to hand something in; that many may do so at a time, more are turned away.
_VISIT_S: Final = 2.0
_MAX_VISITORS: Final = 64
_LOOK_UP_S: Final = 1.0
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_TAKEN, _REFUSED = b"\0", b"\1"
_SOCKET_PREFIX: Final = "expertd-regions-"


class RegionRefusedError(Exception):
    """The memory is not taken; the message is for the caller."""


@dataclass(frozen=True, slots=True)
class _Expected:
    nbytes: int
    take: Callable[[memoryview], Sequence[int]]
    until_s: float


@dataclass(frozen=True, slots=True)
class _Visit:
    until_s: float
    refusal: str | None
    """Why nothing is taken from this one; None: it may be."""


MapMemory: TypeAlias = Callable[[int, int], memoryview]
"""Makes a view of so many bytes of a file, as `map_memory` does."""


def map_memory(fd: int, nbytes: int, share: Share = memoryview) -> memoryview:
    """The first nbytes of a sealed memfd, mapped for reading and writing as long as any view of them lives.

    share: makes the view that all others are of. Raises RegionRefusedError unless every byte of it can be touched
    safely from now on, whatever its owner does.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise RegionRefusedError("the file is no memfd, expected one of memfd_create(MFD_ALLOW_SEALING)") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise RegionRefusedError("the memfd may shrink, expected it sealed with F_SEAL_SHRINK")
    status = os.fstat(fd)
    # NOTE: a hole in huge pages is a SIGBUS when none is left to fill it; ordinary memory is of one file system.
    if status.st_dev != _memfd_device():
        raise RegionRefusedError("the memfd is not of ordinary pages, expected one without MFD_HUGETLB")
    if status.st_size < nbytes:
        raise RegionRefusedError(f"the memfd has {status.st_size} bytes, expected the {nbytes} that were registered")
    try:
        return share(mmap.mmap(fd, nbytes))
    except (OSError, ValueError) as error:
        raise RegionRefusedError(f"the memfd cannot be mapped for reading and writing: {error}") from None


def _memfd_device() -> int:
    fd = os.memfd_create("expertd-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


class RegionDoor:
    """A Unix socket and its thread.

    directory: where to put the socket, for callers in other network namespaces that have this directory too; None: an
    abstract one, which every process of this network namespace can reach and which leaves no file.
    any_user: take memory of other users than the one that runs this process. map_file: how it is mapped.
    Raises ConfigError when it cannot listen.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        any_user: bool = False,
        map_file: MapMemory = map_memory,
    ) -> None:
        self._any_user = any_user
        self._map_file = map_file
        self._lock = threading.Lock()
        self._expected: dict[bytes, _Expected] = {}
        name = f"{_SOCKET_PREFIX}{secrets.token_hex(8)}"
        self._path = None if directory is None else directory / name
        self.address = f"@{name}" if self._path is None else str(self._path)
        """As a RegionTicket tells it."""
        if directory is not None:
            _sweep(directory)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(f"\0{name}" if self._path is None else self.address)
            if self._path is not None:
                self._path.chmod(0o666 if any_user else 0o600)
            self._socket.listen(socket.SOMAXCONN)
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"cannot listen on the Unix socket {self.address}: {error.strerror or error}") from error
        self._socket.setblocking(False)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._visitors: dict[socket.socket, _Visit] = {}
        self._to_let_go: deque[Callable[[], object]] = deque()  # no more than there are regions
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="expertd-region-door", daemon=True)
        self._thread.start()

    def expect(self, nbytes: int, take: Callable[[memoryview], Sequence[int]]) -> bytes:
        """A ticket for memory of at least nbytes.

        take: called with the mapped bytes, in the door's thread, before the caller is told; whatever it raises as
        RegionRefusedError is told instead. The file descriptors that it returns go to the caller and are closed here.
        """
        ticket = secrets.token_bytes(_TICKET_BYTES)
        with self._lock:
            self._expected[ticket] = _Expected(nbytes, take, time.monotonic() + _TICKET_S)
        return ticket

    def forget(self, ticket: bytes, let_go: Callable[[], object] | None = None) -> None:
        """Nobody shall come with this ticket any more.

        let_go: called in the door's thread, as what was taken there should end there: to unmap 256 MiB whose owner has
        died takes 0.1 s.
        """
        with self._lock:
            self._expected.pop(ticket, None)
            if let_go is not None and not self._is_closed:
                self._to_let_go.append(let_go)
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Take nothing more. What was taken stays mapped as long as somebody has it."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            os.eventfd_write(self._wake_fd, 1)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        ended(self._thread)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            for visitor in self._visitors:
                visitor.close()
            self._socket.close()
            with self._lock:  # who closes the door may have said so and not rung yet
                self._is_closed = True
                os.close(self._wake_fd)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_fd, selectors.EVENT_READ)
            while not self._is_closed:
                # Asleep unless somebody is about.
                for key, _ in selector.select(_LOOK_UP_S if self._visitors else None):
                    try:
                        if key.fileobj is self._socket:
                            self._let_in(selector)
                        elif key.fileobj == self._wake_fd:
                            os.eventfd_read(self._wake_fd)
                            while self._to_let_go:
                                self._to_let_go.popleft()()
                        elif isinstance(key.fileobj, socket.socket):
                            self._receive(key.fileobj)
                            self._let_out(key.fileobj, selector)
                    except Exception:  # this thread serves everybody: one visitor's nonsense must not end it
                        log.exception("a visitor of %s made trouble", self.address)
                now_s = time.monotonic()
                for late in [visitor for visitor, visit in self._visitors.items() if visit.until_s <= now_s]:
                    self._let_out(late, selector)

    def _let_in(self, selector: selectors.BaseSelector) -> None:
        try:
            visitor, _ = self._socket.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.error("cannot let a client in on %s: %s", self.address, error)
                time.sleep(_LOOK_UP_S)  # no file descriptors are left: it stays readable
            return
        if len(self._visitors) >= _MAX_VISITORS:
            visitor.close()
            return
        visitor.setblocking(False)
        _, uid, _ = _PEER_CREDENTIALS.unpack(
            visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        )
        refusal = None
        if uid != os.geteuid() and not self._any_user:
            refusal = f"user {uid} is not the server's, {os.geteuid()}; the server would need --shared-memory-any-user"
        # It is told when it has spoken: to close before would cut its own ears off.
        self._visitors[visitor] = _Visit(time.monotonic() + _VISIT_S, refusal)
        selector.register(visitor, selectors.EVENT_READ)

    def _let_out(self, visitor: socket.socket, selector: selectors.BaseSelector) -> None:
        del self._visitors[visitor]
        selector.unregister(visitor)
        visitor.close()

    def _receive(self, visitor: socket.socket) -> None:
        try:
            ticket, fds, flags, _ = socket.recv_fds(visitor, _TICKET_BYTES + 1, 4, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return  # it left
        try:
            refusal = self._visitors[visitor].refusal
            if refusal is not None:
                raise RegionRefusedError(refusal)
            if len(fds) != 1 or flags & socket.MSG_CTRUNC:
                raise RegionRefusedError(f"{len(fds)} file descriptors came with the ticket, expected 1")
            proof, given = self._take(ticket, fds[0])
            _say(visitor, _TAKEN + proof, given)
            _close_all(given)
        except RegionRefusedError as error:
            _say(visitor, _REFUSED + str(error).encode())
        finally:
            _close_all(fds)

    def _take(self, ticket: bytes, fd: int) -> tuple[bytes, Sequence[int]]:
        """The bytes that prove what is mapped, and file descriptors for the caller."""
        now_s = time.monotonic()
        with self._lock:
            expected = self._expected.pop(ticket, None)
            for old in [old for old, one in self._expected.items() if one.until_s <= now_s]:
                del self._expected[old]
        if expected is None or expected.until_s <= now_s:
            raise RegionRefusedError("the ticket is unknown, used or older than 10 s; register the region again")
        view = self._map_file(fd, expected.nbytes)
        proof = bytes(view[:PROOF_BYTES])
        return proof, expected.take(view)


def _say(visitor: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    with contextlib.suppress(OSError):  # it left
        if fds:
            socket.send_fds(visitor, [message], fds, socket.MSG_NOSIGNAL)
        else:
            visitor.send(message, socket.MSG_NOSIGNAL)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _sweep(directory: Path) -> None:
    """Remove the sockets of servers that were killed: nobody listens there."""
    for path in directory.glob(f"{_SOCKET_PREFIX}*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
