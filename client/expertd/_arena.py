"""Memory that is shared with a server, and the pieces of it that are taken: no I/O, no protocol."""

from __future__ import annotations

import bisect
import mmap
import queue
import threading
from typing import Any

import numpy as np

from expertd._pages import SharedPages

__all__ = ["ALIGNMENT_BYTES", "MIN_ARENA_BYTES", "Arena", "Bytes", "Piece", "aligned"]

ALIGNMENT_BYTES = 64
"""Of every piece, and of what lies in one."""

MIN_ARENA_BYTES = 1024 * 1024
"""Less memory is not worth sharing."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT_BYTES."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


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

    def __init__(self, memory: Bytes, *, first: int = 0, pages: SharedPages | None = None) -> None:
        """memory: stays alive as long as the arena, and starts a page. first: offset of the first byte that may be
        taken. pages: those of the memory; without them nothing can be detached.
        """
        self.memory = memory
        self.address: int = memory.ctypes.data
        self.freed: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._starts = [aligned(first)]
        self._sizes = {self._starts[0]: memory.nbytes - self._starts[0]}
        """Bytes of the free stretches by where they start; no two of them touch."""
        self._free = memory.nbytes - self._starts[0]
        self._pages = pages
        self._lent: dict[int, int] = {}
        """Bytes of the arrays that were lent, by where they start."""
        self._detached: tuple[tuple[int, int], ...] = ()
        """Start and stop of what lies in this memory no more, until its piece is free. Read without the lock."""

    @property
    def is_half_free(self) -> bool:
        """Whether no more than half of it is taken, as of the last allocation."""
        return 2 * self._free >= self.memory.nbytes

    @property
    def detached(self) -> tuple[tuple[int, int], ...]:
        """Start and stop of what lies in this memory no more; another object whenever there is a change."""
        return self._detached

    def allocate(self, nbytes: int, *, leave: int = 0) -> Piece | None:
        """At least nbytes, of unspecified contents; None when no free stretch is large enough.

        leave: None as well when fewer bytes were free afterwards.
        """
        size = aligned(max(1, nbytes))
        with self._lock:
            while not self.freed.empty():
                self._release(*self.freed.get())
            if self._free - size < leave:
                return None
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

    def lend(self, nbytes: int) -> Bytes | None:
        """[nbytes] uint8 for the caller to keep, on pages of its own; None unless half of the memory stays free."""
        piece = self.allocate(_whole_pages(nbytes) + mmap.PAGESIZE - ALIGNMENT_BYTES, leave=self.memory.nbytes // 2)
        if piece is None:
            return None
        start = _whole_pages(piece.offset)
        self._lent[start] = nbytes
        return piece.array(start, nbytes)

    def find(self, data: Bytes) -> int | None:
        """Where in this memory contiguous bytes lie; None: elsewhere."""
        if not np.may_share_memory(data, self.memory):  # which is mostly so, and known sooner than the address
            return None
        start: int = data.ctypes.data - self.address
        stop = start + data.nbytes
        if self._detached and any(start < end and begin < stop for begin, end in self._detached):
            return None
        return start

    def find_detachable(self, data: Bytes) -> int | None:
        """As `find`, and None where others have bytes on the same pages."""
        start = self.find(data)
        if start is None or self._pages is None or start % mmap.PAGESIZE:
            return None
        is_alone = (start + data.nbytes) % mmap.PAGESIZE == 0 or self._lent.get(start) == data.nbytes
        return start if is_alone else None

    def detach(self, start: int, nbytes: int) -> None:
        """Take what `find_detachable` has found out of the shared memory: its contents are lost, its address stays.

        Raises OSError; it is shared then as before.
        """
        assert self._pages is not None, "find_detachable"
        size = _whole_pages(nbytes)
        with self._lock:
            self._pages.detach(start, size)
            self._detached = (*self._detached, (start, start + size))

    def _release(self, start: int, size: int) -> None:
        """Under the lock. What cannot be shared again is not used again."""
        first_page = _whole_pages(start)
        if first_page < start + size:  # else it is that of another piece
            self._lent.pop(first_page, None)
        for span in [span for span in self._detached if start <= span[0] < start + size]:
            assert self._pages is not None, "else nothing were detached"
            try:
                self._pages.attach(span[0], span[1] - span[0])
            except OSError:
                return
            self._detached = tuple(other for other in self._detached if other != span)
        self._free += size
        at = bisect.bisect(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            size += self._sizes.pop(self._starts.pop(at))
        if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
            self._sizes[self._starts[at - 1]] += size
        else:
            self._starts.insert(at, start)
            self._sizes[start] = size
