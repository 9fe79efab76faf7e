"""Which of a server's processes gets a connection to the port that all of them listen on.

The kernel draws lots (SO_REUSEPORT): of 32 connections to six processes one gets ten easily, whose callers wait while
others idle. So each process says in memory of all how many streams it has open, and has the kernel draw lots by how
many each is short of. Who counts wrong, after processes have died say, spoils the balance and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

__all__ = ["PortShare", "make_port_file"]

log = logging.getLogger(__name__)

# Of linux/filter.h and asm-generic/socket.h, which Python has no names for.
_SO_ATTACH_REUSEPORT_CBPF: Final = 51
_LOAD, _AND, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x35, 0x06
_RANDOM: Final = 0xFFFF_F000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM
_INSTRUCTION: Final = struct.Struct("HBBI")
_LOTS: Final = 1 << 16


def make_port_file(num_processes: int) -> int:
    """The file of the memory; for `PortShare` in each of them."""
    fd = os.memfd_create("expertd-port", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * (1 + 2 * num_processes))
    return fd


class PortShare:
    """For the event loop of the process with this number. fd: see `make_port_file`; stays open."""

    def __init__(self, fd: int, number: int, num_processes: int) -> None:
        self._fd = fd
        self._number = number
        memory = memoryview(mmap.mmap(fd, 4 * (1 + 2 * num_processes))).cast("I")
        self._num_listening = memory[:1]
        self._order = memory[1 : 1 + num_processes]
        """Numbers of those that listen, as the kernel has them."""
        self._streams = memory[1 + num_processes :]
        """Streams of each, by its number."""
        self._listening: list[int] = []
        """Files of this process' sockets."""

    def listen(self, bind: Callable[[], int]) -> int:
        """Call `bind`, which has gRPC listen and returns the port, as this does."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)  # let go of when the process ends, in any case
        try:
            port = bind()
            order = list(self._order[: self._num_listening[0]])
            if self._number in order:  # that of a process that has died; the kernel put the last in its place
                last = order.pop()
                if last != self._number:
                    order[order.index(self._number)] = last
            order.append(self._number)
            self._streams[self._number] = 0
            for at, number in enumerate(order):
                self._order[at] = number
            self._num_listening[0] = len(order)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        self._listening = list(_listening(port))
        return port

    def has(self, num_streams: int) -> None:
        """This process has so many streams open by now."""
        self._streams[self._number] = num_streams
        program = lots(wanted([self._streams[number] for number in self._order[: self._num_listening[0]]]))
        for fd in self._listening:
            try:
                _attach(fd, program)
            except OSError as error:
                log.info("connections cannot be spread over processes by how many each has: %s", error)
                self._listening = []
                return

    def close(self) -> None:
        """Before gRPC stops listening, after which its files are others'."""
        self._listening = []


def wanted(streams: Sequence[int]) -> list[int]:
    """How much of what comes next each should get, to have as many as the others once as many more have come as there
    are processes."""
    fair = sum(streams) + len(streams)
    return [max(0, fair - len(streams) * each) for each in streams]


def lots(weights: Sequence[int]) -> bytes:
    """A program of the kernel's packet filter that draws an index into the weights."""
    instructions = [(_LOAD, 0, 0, _RANDOM), (_AND, 0, 0, _LOTS - 1)]
    for index in range(len(weights) - 1):
        instructions += [
            (_JUMP_IF_AT_LEAST, 1, 0, _LOTS * sum(weights[: index + 1]) // sum(weights)),
            (_RETURN, 0, 0, index),
        ]
    instructions.append((_RETURN, 0, 0, len(weights) - 1))
    return b"".join(_INSTRUCTION.pack(*each) for each in instructions)


def _attach(fd: int, program: bytes) -> None:
    memory = ctypes.create_string_buffer(program, len(program))
    option = struct.pack("HP", len(program) // _INSTRUCTION.size, ctypes.addressof(memory))
    with _borrowed(fd) as one:
        one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, option)


def _listening(port: int) -> Iterator[int]:
    """Files of this process that listen on a port; gRPC does not say which are its own."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), _borrowed(fd) as one:  # most are no sockets
            if (
                one.family in (socket.AF_INET, socket.AF_INET6)
                and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and one.getsockname()[1] == port
            ):
                yield fd


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket that somebody else closes."""
    one = socket.socket(fileno=fd)
    try:
        yield one
    finally:
        one.detach()
