"""How a front-end hands the memory of its callers on to the engine's process, which then reads and writes there itself.

The file goes over a socket that lasts as long as the channel of the two (`ring.Channel`), when a caller has handed it
in, once for each engine. From when the engine says that it has mapped it, requests name a place in it, a Where; until
then, and where it cannot, the front-end copies. The engine is told to forget a region when the last view of it is gone
here; requests that the engine has keep theirs, so none that it reads ever names a region that it does not know.

The engine's end is closed when nothing that this front-end has asked for runs any more, and not before: then nobody
writes to callers' memory any more, whatever has become of the rest of the channel. The kernel says so for an engine
that is dead.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import queue
import resource
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from expertd_server.message_memory import sharer_of
from expertd_server.native import address_of
from expertd_server.pinning import Share
from expertd_server.region_door import RegionRefusedError, map_memory
from expertd_server.threads import ended

__all__ = ["RegionGiver", "RegionTaker", "Where", "is_let_go", "where_of"]

log = logging.getLogger(__name__)

Where: TypeAlias = tuple[int, int, int]
"""Bytes of a region: its number, which no other of the front-end has, above 0, the offset in it, and nbytes."""

# To the engine: a region's number and bytes, and one file; or 0 bytes and none: forget it. Only the first is answered.
_MESSAGE: Final = struct.Struct("<2Q")
_TAKEN, _REFUSED = b"\0", b"\1"


class _Bytes(np.ndarray[Any, np.dtype[np.uint8]]):
    """All bytes of a region: the object of every view of them, which lives as long as any of these."""

    region: _Region


class _Region:
    """Memory that was mapped, and its file; it refers to no view."""

    __slots__ = ("address", "fd", "holder", "mapped", "nbytes", "number")

    def __init__(self, number: int, fd: int, mapped: mmap.mmap, address: int) -> None:
        self.number = number
        self.fd = fd
        self.mapped = mapped
        """Unmapped where this goes, if no view is left."""
        self.nbytes = len(mapped)
        self.address = address
        self.holder: socket.socket | None = None
        """The way to the engine that has mapped it, too."""


def where_of(data: bytes | memoryview, engine: socket.socket) -> Where | None:
    """Where the engine at the other end of a socket finds these bytes; None: nowhere.

    Good as long as somebody has a view of them.
    """
    if type(data) is not memoryview or not len(data) or not isinstance(memory := sharer_of(data), _Bytes):
        return None
    region = memory.region
    return (region.number, address_of(data) - region.address, len(data)) if region.holder is engine else None


def is_let_go(engine: socket.socket, seconds: float) -> bool:
    """Wait so long for the other end to be closed; whether it is."""
    poll = select.poll()
    poll.register(engine, 0)  # of the end it tells in any case
    return bool(poll.poll(seconds * 1000))


class RegionGiver:
    """The front-end's end, for one engine after the other. Its thread gives, and unmaps, which takes time."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._num_mapped = 0
        self._is_closed = False
        # NOTE: SimpleQueue alone may be used here: views go in any thread, between any two instructions.
        self._due: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()  # some for each region and engine
        self._regions: dict[int, _Region] = {}
        """By number; the thread's own."""
        self._engine: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="expertd-region-giver", daemon=True)

    def start(self) -> None:
        """Give what is mapped, from now on."""
        self._thread.start()

    def map_file(self, fd: int, nbytes: int) -> memoryview:
        """As `map_memory`, and hand it on until the last view of it is gone. Raises RegionRefusedError."""
        return map_memory(fd, nbytes, partial(self._share, fd))

    def meet(self, engine: socket.socket) -> None:
        """Give everything to this engine from now on."""
        self._due.put(partial(self._meet, engine))

    def part(self, engine: socket.socket) -> None:
        """Give it nothing more, and close the socket."""
        with self._lock:
            if not self._is_closed:
                self._due.put(partial(self._part, engine))
                return
        self._part(engine)  # the thread may have ended, and gives nothing

    def close(self) -> None:
        """Give nothing more. What is mapped stays so as long as somebody has a view of it."""
        with self._lock:
            self._is_closed = True
            is_idle = not self._num_mapped
            if self._engine is not None:
                with contextlib.suppress(OSError):  # it may hang, and the thread wait for it
                    self._engine.shutdown(socket.SHUT_RDWR)
        self._due.put(lambda: None)
        if is_idle:
            ended(self._thread)

    def _share(self, fd: int, mapped: mmap.mmap) -> memoryview:
        with self._lock:
            if self._is_closed:
                return memoryview(mapped)
            kept = os.dup(fd)
            self._num_mapped += 1
        memory = np.frombuffer(mapped, np.uint8).view(_Bytes)
        region = memory.region = _Region(next(self._numbers), kept, mapped, memory.ctypes.data)
        weakref.finalize(memory, self._due.put, partial(self._forget, region)).atexit = False
        self._due.put(partial(self._give, region))
        return memory.data

    def _run(self) -> None:
        while self._num_mapped or not self._is_closed or not self._due.empty():
            due = self._due.get()
            try:
                due()
            except Exception:  # this thread looks after everybody's memory
                log.exception("a region made trouble")
            del due  # the wait for the next may be long

    def _meet(self, engine: socket.socket) -> None:
        with self._lock:
            self._engine = engine
        for region in self._regions.values():
            self._offer(region)

    def _part(self, engine: socket.socket) -> None:
        with self._lock:
            if self._engine is engine:
                self._engine = None
            engine.close()

    def _give(self, region: _Region) -> None:
        self._regions[region.number] = region
        self._offer(region)

    def _offer(self, region: _Region) -> None:
        engine = self._engine
        if engine is None or self._is_closed:
            return
        with contextlib.suppress(OSError):  # the engine is gone
            socket.send_fds(engine, [_MESSAGE.pack(region.number, region.nbytes)], [region.fd])
            if engine.recv(len(_TAKEN)) == _TAKEN:
                region.holder = engine

    def _forget(self, region: _Region) -> None:
        del self._regions[region.number]
        os.close(region.fd)
        if region.holder is self._engine is not None:
            with contextlib.suppress(OSError):
                self._engine.send(_MESSAGE.pack(region.number, 0))
        with self._lock:
            self._num_mapped -= 1


class RegionTaker:
    """The engine's end, of one front-end. Its thread maps and unmaps, which takes time; `start` it.

    name: of the front-end. connected: becomes the thread's. share: makes the view that all others are of.
    """

    def __init__(self, name: str, connected: socket.socket, share: Share) -> None:
        self.views: dict[int, memoryview] = {}
        """Of what is mapped, by number."""
        self._name = name
        self._socket = connected
        self._share = share
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="expertd-region-taker", daemon=True)

    def start(self) -> None:
        """Take what the front-end gives."""
        self._thread.start()

    def close(self) -> None:
        """Take nothing more, let go of what is mapped, and tell the front-end that nobody writes there any more."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(OSError):  # the front-end is gone
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            while self._take():
                pass
        finally:
            with self._lock:
                self._is_closed = True
                self._socket.close()
            self.views.clear()

    def _take(self) -> bool:
        """Do what the next message says; False: there will be no other."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE.size, 1, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return False
            number, nbytes = _MESSAGE.unpack(data)
            if nbytes:
                self._socket.send(_TAKEN if self._map(number, nbytes, fds) else _REFUSED)
            else:
                self.views.pop(number, None)
        except OSError:
            return False
        return True

    def _map(self, number: int, nbytes: int, fds: list[int]) -> bool:
        try:
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            # The lowest number that is free is given out, so this says how many are in use.
            if not fds or (fds[0] > most // 2 and most != resource.RLIM_INFINITY):
                raise RegionRefusedError(f"half of the {most} files that this process may open are open")
            self.views[number] = map_memory(fds[0], nbytes, self._share)
        except Exception as error:
            log.warning("%s copies from and to memory of a caller's: %s", self._name, error)
            return False
        finally:
            for fd in fds:
                os.close(fd)
        return True
