"""Large messages of this process in memory that others read and write as well, so that nobody copies their tensors.

gRPC gives and takes bytes objects, which Python allocates. Its allocator can be asked to put large ones into a memory
of our choice (csrc/message_memory.h): memory that a GPU copies from and to, or that the engine's process has mapped,
too. Then hidden states are read where gRPC has left them, and an output is written where gRPC takes it from, into the
bytes of an answer whose other bytes come later. Both go the way of tensors in callers' memory, see `pinning` and
`region_handover`; what finds no room lies where it always did, and is copied.

One memory for a process, for good: nobody knows when the last object in there goes.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Any, Final

from expertd_server.compiled import CODEC
from expertd_server.native import address_of

if TYPE_CHECKING:
    from expertd_server._codec import Answer

__all__ = ["MESSAGE_MEMORY_BYTES", "answer_behind", "make_answer", "make_file", "sharer_of", "use"]

MESSAGE_MEMORY_BYTES: Final = 512 * 1024 * 1024
"""Pages count from when they are first written to, and those at the start are used first."""


class _Memory:
    """Of this process; there is none before `use`."""

    view: memoryview | None = None
    start = stop = 0


def make_file() -> int:
    """A file of MESSAGE_MEMORY_BYTES to map, without a name, which others can trust not to shrink."""
    fd = os.memfd_create("expertd-messages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MESSAGE_MEMORY_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def use(view: memoryview) -> None:
    """Have large bytes objects lie in there from now on, as long as it has room. To be called once, if at all."""
    if CODEC is None:
        return
    CODEC.use_message_memory(view)
    _Memory.view = view
    _Memory.start = address_of(view)
    _Memory.stop = _Memory.start + len(view)


def sharer_of(data: memoryview) -> Any:
    """The object of the view of all memory for messages, where these bytes lie in it; else their own object.

    Whoever shares memory knows it by the object that views of it are of.
    """
    if _Memory.view is not None and _Memory.start <= address_of(data) < _Memory.stop:
        return _Memory.view.obj
    return data.obj


def make_answer(is_stream: bool, request_id: int, dtype: int, num_tokens: int, hidden_size: int) -> memoryview | None:
    """Where the output of an answer may be written before the rest of it is known; None: there is no room."""
    if _Memory.view is None:
        return None
    answer = CODEC.make_answer(is_stream, request_id, dtype, num_tokens, hidden_size)
    return None if answer is None else memoryview(answer)


def answer_behind(place: memoryview | None) -> Answer | None:
    """What `make_answer` has made, by what it gave."""
    if place is None or _Memory.view is None:
        return None
    return place.obj if isinstance(place.obj, CODEC.Answer) else None
