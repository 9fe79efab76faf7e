"""Pages of shared memory that become the process's own, and shared again, at the same addresses."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

__all__ = ["SharedPages"]

_MAP_FIXED: Final = 0x10
"""On every processor that Linux is used on for this; the mmap module does not say it, nor can it say where."""


class SharedPages:
    """The pages of a file that is mapped, shared and writable, from `address` on.

    Whoever shares the file cannot reach those that were detached, whatever it still does to the file. Offsets and sizes
    are multiples of mmap.PAGESIZE. Both methods raise OSError, and then nothing has changed.
    """

    def __init__(self, address: int, fd: int) -> None:
        """fd: of the file; duplicated. The mapping is to live longer than this."""
        self._address = address
        self._mmap = ctypes.CDLL(None, use_errno=True).mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        )
        self._fd = os.dup(fd)

    def detach(self, offset: int, nbytes: int) -> None:
        """Put empty pages of this process alone in the place of the file's."""
        self._map(offset, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)

    def attach(self, offset: int, nbytes: int) -> None:
        """Put the file's pages back, with what is in them by now."""
        self._map(offset, nbytes, mmap.MAP_SHARED, self._fd, offset)

    def __del__(self) -> None:
        os.close(self._fd)

    def _map(self, offset: int, nbytes: int, flags: int, fd: int, fd_offset: int) -> None:
        address = self._address + offset
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if self._mmap(address, nbytes, protection, flags | _MAP_FIXED, fd, fd_offset) != address:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
