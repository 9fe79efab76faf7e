"""The rings of a stream's messages in shared memory, either end of them; the proto's MessageRings says what lies where.

The other side is another process and may write anything at any time. So what it counts is bounded before it is used, a
message is copied before anybody looks at it, what this side has counted is kept here and never read back, and the bell
is a pipe, of which each side has an end of its own: nobody else can make a write to it or a read from it block.

Why this is right without instructions for it in Python, on x86-64, and so offered there alone:
  * An aligned item of a memoryview is stored and loaded by one instruction, so a count is never half of two.
  * Stores are seen in their order and loads are done in theirs. So whoever sees a count sees the slots that it counts,
    and whoever sees that a slot was taken writes to it when it has been copied. Large tensors may be copied by stores
    that keep no order: a fence comes between what a message speaks of and the count.
  * Only a load may overtake a store before it, and that matters once: the writer stores `written` and loads
    `wants_bell`, the reader stores `wants_bell` and loads `written`. If both loads came early, the reader would sleep
    over a message. Between the two each takes a lock, a locked instruction, which is a full fence. So one of them at
    least sees what the other has stored: the writer rings, or the reader stays.
  * The writer takes `wants_bell` back before it rings. Should the reader set it again in between, it is taken back as
    well, and the bell rings after that: the reader wakes, looks, and sets it once more. No message waits longer.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from typing import Final

__all__ = ["IS_SUPPORTED", "RingBrokenError", "RingReader", "RingWriter", "ring_nbytes"]

IS_SUPPORTED: Final = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")
"""Whether this machine keeps the order of loads and stores as above."""

_HEAD_BYTES: Final = 192
# Of the head as 64-bit numbers.
_WRITTEN, _TAKEN, _WANTS_BELL = 0, 8, 16
_MASK: Final = 2**64 - 1
_MESSAGE_AT: Final = 8
_BELLS_READ: Final = 4096


class RingBrokenError(ValueError):
    """The other side has written what makes no sense."""


def ring_nbytes(num_slots: int, slot_nbytes: int) -> int:
    """Bytes of one ring."""
    return _HEAD_BYTES + num_slots * slot_nbytes


class _Ring:
    """What both ends have. memory: `ring_nbytes` bytes at an address that is a multiple of 8, all zero at first.

    bell_fd: this side's end of the pipe, not blocking; it becomes the ring's. One thread at a time may use it.
    """

    def __init__(self, memory: memoryview, num_slots: int, slot_nbytes: int, bell_fd: int) -> None:
        self.bell_fd = bell_fd
        self._num_slots = num_slots
        self._slot_nbytes = slot_nbytes
        self._head = memory[:_HEAD_BYTES].cast("Q")
        self._slots = memory[_HEAD_BYTES : ring_nbytes(num_slots, slot_nbytes)]
        self._lengths = self._slots.cast("I")
        self._count = 0
        """Messages that this side has put in or taken out."""
        self._fence = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        """Let go of the memory and of the bell; again is of no effect."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self.bell_fd)
            for view in (self._lengths, self._slots, self._head):
                view.release()


class RingWriter(_Ring):
    """The end that messages are put in at."""

    def put(self, message: bytes) -> bool:
        """Add a message, and ring if the reader wants that; False: there is no room for it, or the ring is closed."""
        is_added = self.add(message)
        if is_added:
            self.ring()
        return is_added

    def add(self, message: bytes) -> bool:
        """As `put`, and leave a reader that sleeps asleep until `ring`."""
        nbytes = len(message)
        if self._is_closed or nbytes > self._slot_nbytes - _MESSAGE_AT:
            return False
        head, count = self._head, self._count
        # Taken beyond what was written looks like a full ring. Any other lie spoils the liar's own messages.
        if (count - head[_TAKEN]) & _MASK >= self._num_slots:
            return False
        start = count % self._num_slots * self._slot_nbytes
        self._slots[start + _MESSAGE_AT : start + _MESSAGE_AT + nbytes] = message
        self._lengths[start >> 2] = nbytes
        self._count = count + 1
        with self._fence:
            pass
        head[_WRITTEN] = count + 1
        return True

    def ring(self) -> None:
        """Wake a reader that sleeps, to what was added."""
        if self._is_closed:
            return
        head = self._head
        with self._fence:
            pass
        if head[_WANTS_BELL]:
            head[_WANTS_BELL] = 0
            with contextlib.suppress(OSError):  # full: it has rung; or nobody listens any more
                os.write(self.bell_fd, b"\0")


class RingReader(_Ring):
    """The end that messages are taken out at."""

    def take(self) -> bytes | None:
        """The next message; None: there is none now. Raises RingBrokenError."""
        count = self._count
        waiting = (self._head[_WRITTEN] - count) & _MASK
        if not waiting:
            return None
        start = count % self._num_slots * self._slot_nbytes
        nbytes = self._lengths[start >> 2]
        if waiting > self._num_slots:
            raise RingBrokenError(f"{waiting} messages wait in a ring of {self._num_slots}")
        if nbytes > self._slot_nbytes - _MESSAGE_AT:
            raise RingBrokenError(f"a message of {nbytes} bytes is in a slot of {self._slot_nbytes}")
        message = bytes(self._slots[start + _MESSAGE_AT : start + _MESSAGE_AT + nbytes])
        self._count = count + 1
        self._head[_TAKEN] = count + 1
        return message

    @property
    def has_more(self) -> bool:
        """Whether `take` would return a message, or raise."""
        return self._head[_WRITTEN] != self._count

    def may_sleep(self) -> bool:
        """Have the writer ring from now on; False: a message is there, and it need not."""
        head = self._head
        head[_WANTS_BELL] = 1
        with self._fence:
            pass
        if head[_WRITTEN] == self._count:
            return True
        head[_WANTS_BELL] = 0
        return False

    def silence(self) -> bool:
        """Make the bell stop, if it rings; False: the writer is gone, and it never will."""
        try:
            return bool(os.read(self.bell_fd, _BELLS_READ))
        except BlockingIOError:
            return True
