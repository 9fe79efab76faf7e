"""Memory that a front-end process shares with the engine's process: an arena for tensors, two rings of descriptors.

The front-end alone allocates, so no lock crosses a process. It takes a block, writes a request into it and publishes
where the block is; from then on the block is the engine's, until the engine has put the answer into the same block and
published that. Every request gets exactly one answer, and that bounds everything: a ring with room for what the
requests in flight can publish never overflows, however slow its reader.

The memory is an anonymous file (memfd_create): it has no name, nothing in /dev/shm has to be sized or cleaned up, and
the kernel takes it back when the last process that maps it ends. Pages count as shared memory of the processes from
when they are first written to.

csrc/ring.cpp does what the classes here do, where it was built. Both processes are of one installation.
"""

from __future__ import annotations

import bisect
import mmap
import os
import queue
import select
import struct
import threading
from typing import TYPE_CHECKING, Final, TypeAlias

from expertd_server.compiled import BLOCKS

if TYPE_CHECKING:  # whoever starts front-ends imports this, and no numpy
    from expertd_server.pinning import Share

__all__ = ["ALIGNMENT_BYTES", "Arena", "Block", "Channel", "Descriptor", "Ring", "ring_bytes", "shared_bytes"]

ALIGNMENT_BYTES: Final = 4096
"""Of every block: a page, so that blocks that are free share no page with those that are not."""

_DESCRIPTOR: Final = struct.Struct("<4Q")
# A request is published once and cancelled at most once. While the engine reads nothing, no request that it has not
# read is answered; so besides both descriptors of as many requests as may be in flight, at most as many cancellations
# of requests answered before can wait.
_TO_ENGINE_PER_REQUEST: Final = 3


# Before the descriptors: of use to the compiled ring alone. It starts at a multiple of its own size.
_RING_HEAD_BYTES: Final = 128

Descriptor: TypeAlias = tuple[int, int, int, int]
"""What one side tells the other: kind, request_id, and of a block its offset in the arena and its nbytes."""


class PythonRing:
    """Descriptors from one process to another, and an eventfd that counts them.

    The eventfd is all that both sides share besides the descriptors: their number is added to it after they were
    written, and the reader takes as many as it counted. Both are system calls on one kernel
    lock, which orders the accesses to the memory on every architecture. One thread reads; threads of one process write.
    memory: of `ring_bytes` for as many descriptors as are ever published and not taken; all zero. The eventfd becomes
    the ring's.
    """

    def __init__(self, memory: memoryview, eventfd: int) -> None:
        self.eventfd = eventfd
        self._memory = memory[_RING_HEAD_BYTES:]
        self._num_slots = len(self._memory) // _DESCRIPTOR.size
        self._next = 0
        self._num_put = 0
        """Of how many the reader was not told yet."""
        self._lock = threading.Lock()
        self._is_closed = False

    def put(self, kind: int, request_id: int, offset: int = 0, nbytes: int = 0) -> None:
        """Add a descriptor, which the reader sees when it is woken next. Without effect on a closed ring."""
        with self._lock:
            if self._is_closed:
                return
            _DESCRIPTOR.pack_into(self._memory, self._next * _DESCRIPTOR.size, kind, request_id, offset, nbytes)
            self._next = (self._next + 1) % self._num_slots
            self._num_put += 1

    def wake(self) -> None:
        """Wake the reader, if there is something that it was not woken for; never waits for it."""
        with self._lock:
            if self._num_put and not self._is_closed:  # NOTE: the number of the eventfd may be another file's by now
                os.eventfd_write(self.eventfd, self._num_put)
                self._num_put = 0

    def announce(self) -> None:
        """Have the reader come for what is about to be put, if that can be: it wakes while that is made up."""

    def publish(self, kind: int, request_id: int, offset: int = 0, nbytes: int = 0) -> None:
        """Put a descriptor and wake the reader."""
        self.put(kind, request_id, offset, nbytes)
        self.wake()

    def take(self) -> list[Descriptor]:
        """Every descriptor that was published since, oldest first; does not wait.

        Raises ValueError where those are more than there is room for: the other process makes no sense.
        """
        try:
            count = os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        if count > self._num_slots:
            raise ValueError(f"{count} descriptors wait in a ring of {self._num_slots}")
        taken: list[Descriptor] = []
        for _ in range(count):
            taken.append(_DESCRIPTOR.unpack_from(self._memory, self._next * _DESCRIPTOR.size))
            self._next = (self._next + 1) % self._num_slots
        return taken

    def look(self) -> list[Descriptor]:
        """As `take`, for a reader that looks again by itself: its writer need not wake it. `take` must follow."""
        return self.take()

    def take_within(self, seconds: float) -> list[Descriptor]:
        """As `take`, but wait so long for a descriptor, if there is none. Where compiled it looks all the time, which
        is sooner to see it than to be woken, and keeps nobody from the interpreter."""
        select.select([self.eventfd], [], [], seconds)
        return self.take()

    def close(self) -> None:
        """Close this process' end; for the reader's thread to call when it reads no more."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self.eventfd)


class Channel:
    """What a front-end shares with an engine, as file descriptors that can be handed to the other process.

    A front-end makes a new one for each engine process that it meets, so nothing that a dead process left behind is
    ever read. arena_bytes: of the arena; max_requests: most requests in flight.
    """

    def __init__(self, arena_bytes: int, max_requests: int, memory_fd: int, engine_fd: int, frontend_fd: int) -> None:
        self.arena_bytes = arena_bytes
        self.max_requests = max_requests
        self.fds = (memory_fd, engine_fd, frontend_fd)
        """The memory, and the events of the ring to the engine and of the ring to the front-end."""

    @classmethod
    def make(cls, arena_bytes: int, max_requests: int) -> Channel:
        """A new one. Raises OSError where the system has no file descriptors or memory left."""
        fds: list[int] = []
        try:
            fds.append(os.memfd_create("expertd-frontend", os.MFD_CLOEXEC))
            os.ftruncate(fds[0], shared_bytes(arena_bytes, max_requests))
            fds += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
            return cls(arena_bytes, max_requests, *fds)
        except OSError:
            for fd in fds:
                os.close(fd)
            raise

    def open(self, share: Share = memoryview) -> tuple[Ring, Ring, memoryview]:
        """The ring to the engine, the ring to the front-end, and the arena's memory, mapped into this process.

        To be called once in each process, after the file descriptors were handed over: they are the rings' from then
        on. The mapping lives as long as any view of it. share: makes the view that all others are of.
        """
        memory = share(mmap.mmap(self.fds[0], shared_bytes(self.arena_bytes, self.max_requests)))
        os.close(self.fds[0])
        first, second = _ring_bytes(self.max_requests)
        return (
            Ring(memory[:first], self.fds[1]),
            Ring(memory[first : first + second], self.fds[2]),
            memory[len(memory) - self.arena_bytes :],
        )

    def close(self) -> None:
        """Close the file descriptors of a channel that was not opened."""
        for fd in self.fds:
            os.close(fd)


def shared_bytes(arena_bytes: int, max_requests: int) -> int:
    """Most memory that a channel takes."""
    return _round_up(sum(_ring_bytes(max_requests))) + arena_bytes


def ring_bytes(num_slots: int) -> int:
    """Memory of a ring with room for at least as many descriptors."""
    return _round_up(_RING_HEAD_BYTES + num_slots * _DESCRIPTOR.size, _RING_HEAD_BYTES)


def _ring_bytes(max_requests: int) -> tuple[int, int]:
    """Of the ring to the engine, and of the ring to the front-end."""
    return ring_bytes(_TO_ENGINE_PER_REQUEST * max_requests), ring_bytes(max_requests)


class PythonBlock:
    """A piece of an arena; it returns there when the last reference to it goes."""

    __slots__ = ("_freed", "nbytes", "offset", "view")

    def __init__(self, view: memoryview, offset: int, nbytes: int, freed: queue.SimpleQueue[tuple[int, int]]) -> None:
        self.view = view
        """[nbytes] bytes, writable, of unspecified contents."""
        self.offset = offset
        self.nbytes = nbytes
        self._freed = freed

    def __del__(self) -> None:
        # NOTE: SimpleQueue alone may be used here: a destructor runs in any thread, between any two instructions.
        self._freed.put((self.offset, self.nbytes))


class PythonArena:
    """Blocks of a memory, first fit at the lowest address, so that pages that were used before are used again.

    Thread-safe, within the one process that allocates.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._freed: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._starts = [0]
        self._sizes = {0: len(memory)}
        """Bytes of the free pieces by where they start; no two of them touch."""

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks and free pieces together."""
        return len(self._memory)

    def allocate(self, nbytes: int) -> PythonBlock | None:
        """A block of at least nbytes; None when no free piece is large enough."""
        size = _round_up(max(1, nbytes))
        with self._lock:
            self._collect()
            start = self._take(size)
        return None if start is None else PythonBlock(self._memory[start : start + size], start, size, self._freed)

    def free_bytes(self) -> int:
        """Bytes that no block holds."""
        with self._lock:
            self._collect()
            return sum(self._sizes.values())

    def _take(self, size: int) -> int | None:
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
            return start
        return None

    def _collect(self) -> None:
        while not self._freed.empty():
            self._release(*self._freed.get())

    def _release(self, start: int, size: int) -> None:
        at = bisect.bisect(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            size += self._sizes.pop(self._starts.pop(at))
        if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
            self._sizes[self._starts[at - 1]] += size
        else:
            self._starts.insert(at, start)
            self._sizes[start] = size


# One name for whichever is in use; types are checked against the Python.
if TYPE_CHECKING:
    Ring: TypeAlias = PythonRing
    Arena: TypeAlias = PythonArena
    Block: TypeAlias = PythonBlock
else:
    Ring = PythonRing if BLOCKS is None else BLOCKS.Ring
    Arena = PythonArena if BLOCKS is None else BLOCKS.Arena
    Block = PythonBlock if BLOCKS is None else BLOCKS.Block


def _round_up(nbytes: int, multiple: int = ALIGNMENT_BYTES) -> int:
    return -(-nbytes // multiple) * multiple
