"""Shared memory between a front-end process and the engine process: an arena for tensors, two rings of descriptors.

The front-end alone allocates, so no lock crosses a process. It takes a block, writes a request into it and publishes
the block's place; from then on the block is the engine's, until the engine has put the answer into the same block and
published that. Every request gets exactly one answer, and that is what bounds everything: a ring that has room for what
the requests in flight can publish never overflows, however slow its reader.

The memory is an anonymous file (memfd_create): nothing is named, nothing in /dev/shm has to be sized or cleaned up, and
the kernel takes it back when the last process that maps it ends. It counts as the processes' shared memory, page by
page as it is touched.
"""

from __future__ import annotations

import bisect
import mmap
import os
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

__all__ = ["Arena", "Block", "Channel", "Descriptor", "Ring", "Role"]

_DESCRIPTOR: Final = struct.Struct("<4Q")
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What one side tells the other."""

    kind: int
    request_id: int
    offset: int
    """Of the block in the arena."""
    nbytes: int


class Ring:
    """Descriptors from one process to another, with an eventfd that counts them.

    The eventfd is the ring's only counter: each publication adds one to it after the descriptor was written, and the
    reader takes as many descriptors as it counted, so the kernel orders both sides on every architecture. The reader is
    one thread; writers are threads of one process. memory: room for the descriptors; more than were published and not
    taken at any time.
    """

    def __init__(self, memory: memoryview, eventfd: int) -> None:
        self.eventfd = eventfd
        self._memory = memory
        self._num_slots = len(memory) // _DESCRIPTOR.size
        self._next = 0
        self._lock = threading.Lock()

    def publish(self, kind: int, request_id: int, offset: int = 0, nbytes: int = 0) -> None:
        """Hand over a descriptor and wake the reader."""
        with self._lock:
            _DESCRIPTOR.pack_into(self._memory, self._next * _DESCRIPTOR.size, kind, request_id, offset, nbytes)
            self._next = (self._next + 1) % self._num_slots
            os.eventfd_write(self.eventfd, 1)

    def take(self) -> list[Descriptor]:
        """Every descriptor that was published since, oldest first; does not wait."""
        try:
            count = os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        taken = []
        for _ in range(count):
            taken.append(Descriptor(*_DESCRIPTOR.unpack_from(self._memory, self._next * _DESCRIPTOR.size)))
            self._next = (self._next + 1) % self._num_slots
        return taken


class Block:
    """A piece of an arena; it returns there when the last reference to it goes."""

    __slots__ = ("_freed", "nbytes", "offset", "view")

    def __init__(self, view: memoryview, offset: int, nbytes: int, freed: deque[tuple[int, int]]) -> None:
        self.view = view
        """[nbytes] bytes, writable."""
        self.offset = offset
        self.nbytes = nbytes
        self._freed = freed

    def __del__(self) -> None:
        # NOTE: takes no lock: a destructor may run in any thread, between any two instructions.
        self._freed.append((self.offset, self.nbytes))


class Arena:
    """Blocks of a memory, first fit at the lowest address: pages that were touched before are touched again.

    Thread-safe within the one process that allocates.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._freed: deque[tuple[int, int]] = deque()
        self._starts = [0]
        self._sizes = {0: len(memory)}
        """Free pieces by where they start; no two of them touch."""

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks and free pieces together."""
        return len(self._memory)

    def allocate(self, nbytes: int) -> Block | None:
        """A block of at least nbytes, its contents unspecified; None when no free piece is that large."""
        size = max(1, -(-nbytes // _PAGE)) * _PAGE
        with self._lock:
            while self._freed:
                self._free(*self._freed.popleft())
            for at, start in enumerate(self._starts):
                left = self._sizes[start] - size
                if left >= 0:
                    break
            else:
                return None
            del self._sizes[start]
            if left:
                self._starts[at] = start + size
                self._sizes[start + size] = left
            else:
                del self._starts[at]
        return Block(self._memory[start : start + size], start, size, self._freed)

    def free_bytes(self) -> int:
        """Bytes that no block holds."""
        with self._lock:
            while self._freed:
                self._free(*self._freed.popleft())
            return sum(self._sizes.values())

    def _free(self, start: int, size: int) -> None:
        at = bisect.bisect(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            size += self._sizes.pop(self._starts.pop(at))
        if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
            self._sizes[self._starts[at - 1]] += size
        else:
            self._starts.insert(at, start)
            self._sizes[start] = size


class Role:
    """Which end of a channel a process is."""

    FRONTEND: Final = "frontend"
    ENGINE: Final = "engine"


class Channel:
    """One front-end's memory and wake-ups, and a control connection, as file descriptors that can be handed on.

    The supervisor makes one for each pair of a front-end and the engine and hands it to both; a process that is started
    again gets a new one, so nothing that a dead process left behind is ever read.
    """

    NUM_FDS: Final = 4

    def __init__(self, memory_fd: int, to_engine_fd: int, to_frontend_fd: int, control_fd: int) -> None:
        self.memory_fd = memory_fd
        self.to_engine_fd = to_engine_fd
        self.to_frontend_fd = to_frontend_fd
        self.control_fd = control_fd

    @classmethod
    def make(cls, arena_bytes: int, max_requests: int) -> tuple[Channel, Channel]:
        """A new channel: the front-end's end and the engine's. They differ in the control connection alone."""
        memory_fd = os.memfd_create("expertd-ring", os.MFD_CLOEXEC)
        os.ftruncate(memory_fd, _ring_bytes(4 * max_requests) + _ring_bytes(max_requests) + arena_bytes)
        events = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        controls = [end.detach() for end in socket.socketpair()]
        return cls(memory_fd, *events, controls[0]), cls(memory_fd, *events, controls[1])

    @property
    def fds(self) -> list[int]:
        """In the order of the constructor."""
        return [self.memory_fd, self.to_engine_fd, self.to_frontend_fd, self.control_fd]

    def open(self, max_requests: int) -> tuple[Ring, Ring, memoryview]:
        """The ring to the engine, the ring to the front-end, and the arena's memory.

        max_requests: as given to `make`. At most 4 * max_requests descriptors wait in the ring to the engine: of each
        request in flight a submission and a cancellation, and the late cancellations of those that went before.
        """
        memory = memoryview(mmap.mmap(self.memory_fd, 0))
        first = _ring_bytes(4 * max_requests)
        second = first + _ring_bytes(max_requests)
        return Ring(memory[:first], self.to_engine_fd), Ring(memory[first:second], self.to_frontend_fd), memory[second:]


def _ring_bytes(slots: int) -> int:
    return -(-slots * _DESCRIPTOR.size // _PAGE) * _PAGE
