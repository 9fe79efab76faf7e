"""Memory that others share with this process, pinned so that a GPU copies straight from and to it.

Pinned memory stays where it is and is known to the GPU. To pin takes longer than a thread that serves may be kept, and
takes every page, written to or not. So a thread of its own does it, for the pieces of the memory that requests turn out
to lie in; as long as a piece is not pinned, the processor copies. The memory stays pinned and mapped until the last
view of it is gone; the same thread unpins and unmaps it, which takes as long.
"""

from __future__ import annotations

import logging
import mmap
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np

from expertd_server.message_memory import sharer_of
from expertd_server.native import address_of
from expertd_server.threads import ended

__all__ = ["PIECE_BYTES", "Pinner", "Share", "pinned_address"]

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 4 * 1024 * 1024
"""Memory is pinned from multiple to multiple of this. No copy may reach across: to CUDA these are strangers."""

Share: TypeAlias = Callable[[mmap.mmap], memoryview]
"""Makes the view of shared memory that all others are of: `Pinner.share`, or memoryview itself."""

# Whoever lets go of the last view may still be about to when this is told.
_LET_GO_TRIES: Final = 1000
_LET_GO_WAIT_S: Final = 0.001


# States of a piece: plain numbers, which are asked for several times for each request.
_NEW, _ASKED, _PINNED = range(3)


class _Bytes(np.ndarray[Any, np.dtype[np.uint8]]):
    """All bytes of a mapping: the object of every view of them, which lives as long as any of these."""

    mapping: _Mapping


class _Mapping:
    """Mapped memory, and which of its pieces are pinned; it refers to no view."""

    __slots__ = ("_first_piece", "_pinner", "address", "mapped", "nbytes", "states")

    def __init__(self, pinner: Pinner, mapped: mmap.mmap, address: int) -> None:
        self._pinner = pinner
        self.mapped = mapped
        self.address = address
        self.nbytes = len(mapped)
        self._first_piece = address // PIECE_BYTES
        self.states = bytearray((address + self.nbytes - 1) // PIECE_BYTES - self._first_piece + 1)
        """Of the pieces; csrc/held_memory.h reads them, too."""

    def bounds(self, piece: int) -> tuple[int, int]:
        """Address and bytes of a piece."""
        start = max(self.address, (self._first_piece + piece) * PIECE_BYTES)
        stop = min(self.address + self.nbytes, (self._first_piece + piece + 1) * PIECE_BYTES)
        return start, stop - start

    def pinned_address(self, data: memoryview, nbytes: int) -> int:
        """See below."""
        address = address_of(data)
        first = address // PIECE_BYTES - self._first_piece
        stop = (address + nbytes - 1) // PIECE_BYTES - self._first_piece + 1
        if self.states.count(_PINNED, first, stop) == stop - first:
            return address
        self.ask(address, nbytes)
        return 0

    def ask(self, address: int, nbytes: int) -> None:
        """Have the pieces that these bytes lie in pinned; for whoever has a view of them."""
        first, last = address // PIECE_BYTES, (address + nbytes - 1) // PIECE_BYTES
        self._pinner.ask(self, range(first - self._first_piece, last - self._first_piece + 1))


def pinned_address(data: bytes | memoryview, nbytes: int) -> int:
    """Where the first nbytes, one at least, of these lie, if a GPU can copy from and to there; 0: not (yet).

    Good as long as somebody has a view of them.
    """
    if type(data) is not memoryview:
        return 0
    memory = sharer_of(data)
    return memory.mapping.pinned_address(data, nbytes) if isinstance(memory, _Bytes) else 0


class Pinner:
    """The memory that is shared with a process whose GPU may use it, and the thread that pins it.

    pin, unpin: take an address and bytes, an address; raise RuntimeError. max_bytes: most to have pinned.
    """

    def __init__(self, pin: Callable[[int, int], object], unpin: Callable[[int], object], max_bytes: int) -> None:
        self._pin = pin
        self._unpin = unpin
        self._max_bytes = max_bytes
        self.pinned_bytes = 0
        """Pinned by now; for others to read."""
        self._lock = threading.Lock()
        self._num_shared = 0
        self._due: queue.SimpleQueue[tuple[_Mapping, int] | None] = queue.SimpleQueue()  # no more than there are pieces
        self._is_off = False
        """Whether nothing is to be pinned any more."""
        self._has_said_full = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="expertd-pinner", daemon=True)
        self._thread.start()

    def share(self, mapped: mmap.mmap) -> memoryview:
        """A view of memory that this looks after from now on, until no view of it is left; not when it is closed."""
        with self._lock:
            if self._is_closed:
                return memoryview(mapped)
            self._num_shared += 1
        memory = np.frombuffer(mapped, np.uint8).view(_Bytes)
        mapping = memory.mapping = _Mapping(self, mapped, memory.ctypes.data)
        # NOTE: SimpleQueue alone may be used here: it is told in any thread, between any two instructions.
        weakref.finalize(memory, self._due.put, (mapping, -1)).atexit = False
        return memory.data

    def ask(self, mapping: _Mapping, pieces: range) -> None:
        """Have these pieces pinned, if there is room; for whoever has a view of them."""
        for piece in pieces:
            if mapping.states[piece] != _NEW or self._is_off:
                continue
            if self._has_room(mapping, piece):
                mapping.states[piece] = _ASKED
                self._due.put((mapping, piece))
            elif not self._has_said_full:
                self._has_said_full = True
                log.warning("%d bytes are pinned (max_pinned_bytes): the processor copies the rest", self.pinned_bytes)

    def close(self) -> None:
        """Pin nothing more. What is shared is looked after until nobody has it any more."""
        with self._lock:
            self._is_off = self._is_closed = True
            is_idle = not self._num_shared
        self._due.put(None)
        if is_idle:
            ended(self._thread)

    def _has_room(self, mapping: _Mapping, piece: int) -> bool:
        return self.pinned_bytes + mapping.bounds(piece)[1] <= self._max_bytes

    def _run(self) -> None:
        while self._num_shared or not self._is_closed:
            due = self._due.get()
            if due is None:
                continue
            mapping, piece = due
            try:
                if piece < 0:
                    self._let_go(mapping)
                elif not self._is_off:
                    self._pin_piece(mapping, piece)
            except Exception:  # this thread looks after everybody's memory
                log.exception("a piece of shared memory made trouble")
            del due, mapping  # the wait for the next may be long

    def _pin_piece(self, mapping: _Mapping, piece: int) -> None:
        address, nbytes = mapping.bounds(piece)
        if not self._has_room(mapping, piece):  # others asked at the same time, and were first
            mapping.states[piece] = _NEW
            return
        try:
            self._pin(address, nbytes)
        except Exception as error:
            self._is_off = True
            log.warning("shared memory cannot be pinned, the processor copies: %s", error)
            return
        self.pinned_bytes += nbytes
        mapping.states[piece] = _PINNED

    def _let_go(self, mapping: _Mapping) -> None:
        for piece, state in enumerate(mapping.states):
            if state == _PINNED:
                address, nbytes = mapping.bounds(piece)
                try:
                    self._unpin(address)
                except Exception as error:
                    log.error("cannot unpin shared memory: %s", error)
                self.pinned_bytes -= nbytes
        for _ in range(_LET_GO_TRIES):
            try:
                mapping.mapped.close()
                break
            except BufferError:
                time.sleep(_LET_GO_WAIT_S)
        with self._lock:
            self._num_shared -= 1
