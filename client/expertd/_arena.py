"""Memory that is shared with a server, and the pieces of it that are taken: no I/O, no protocol."""

from __future__ import annotations

import bisect
import queue
import threading
from typing import Any

import numpy as np

__all__ = ["ALIGNMENT_BYTES", "MIN_ARENA_BYTES", "Arena", "Piece", "aligned"]

ALIGNMENT_BYTES = 64
"""Of every piece, and of what lies in one."""

MIN_ARENA_BYTES = 1024 * 1024
"""Less memory is not worth sharing."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT_BYTES."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Piece:
    """Bytes of an arena; they are free again when the last reference to this, and to arrays made by it, is gone."""

    __slots__ = ("_arena", "nbytes", "offset")

    def __init__(self, arena: Arena, offset: int, nbytes: int) -> None:
        self._arena = arena
        self.offset = offset
        self.nbytes = nbytes

    def array(self, offset: int, nbytes: int) -> Bytes:
        """[nbytes] uint8, writable, from a place of the arena, which must lie in this piece; it keeps the piece."""
        array: Bytes = np.asarray(_View(self, self._arena.address + offset, nbytes))
        return array

    def __del__(self) -> None:
        # NOTE: SimpleQueue alone may be used here: a destructor runs in any thread, between any two instructions.
        self._arena.freed.put((self.offset, self.nbytes))


class _View:
    """What numpy makes an array of, and keeps as long as any view of that array lives."""

    __slots__ = ("__array_interface__", "_piece")

    def __init__(self, piece: Piece, address: int, nbytes: int) -> None:
        self._piece = piece
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False)}


class Arena:
    """Pieces of a memory, first fit at the lowest address, so that pages that were used before are used again.

    Thread-safe. Never waits: who finds no room does without.
    """

    def __init__(self, memory: Bytes, *, first: int = 0) -> None:
        """memory: stays alive as long as the arena. first: offset of the first byte that may be taken."""
        self.memory = memory
        self.address: int = memory.ctypes.data
        self.freed: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._starts = [aligned(first)]
        self._sizes = {self._starts[0]: memory.nbytes - self._starts[0]}
        """Bytes of the free stretches by where they start; no two of them touch."""
        self._free = memory.nbytes - self._starts[0]

    @property
    def is_half_free(self) -> bool:
        """Whether no more than half of it is taken, as of the last allocation."""
        return 2 * self._free >= self.memory.nbytes

    def allocate(self, nbytes: int) -> Piece | None:
        """At least nbytes, of unspecified contents; None when no free stretch is large enough."""
        size = aligned(max(1, nbytes))
        with self._lock:
            while not self.freed.empty():
                self._release(*self.freed.get())
            for at, start in enumerate(self._starts):
                left = self._sizes[start] - size
                if left < 0:
                    continue
                del self._sizes[start]
                if left:
                    self._starts[at] = start + size
                    self._sizes[start + size] = left
                else:
                    del self._starts[at]
                self._free -= size
                return Piece(self, start, size)
        return None

    def _release(self, start: int, size: int) -> None:
        self._free += size
        at = bisect.bisect(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            size += self._sizes.pop(self._starts.pop(at))
        if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
            self._sizes[self._starts[at - 1]] += size
        else:
            self._starts.insert(at, start)
            self._sizes[start] = size
