"""What of a batch is copied between host and device, in as few copies as there can be.

Most of it lies in the slot's own host memory; what lies in pinned memory of others is copied from or to where it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, TypeAlias

from expertd_server.pinning import PIECE_BYTES, pinned_address

__all__ = ["MIN_DIRECT_BYTES", "PackedSpans", "Span", "Spans", "direct_address", "each_of", "whole"]

Span: TypeAlias = tuple[int, int, int]
"""What one copy moves: where in the slot, how many bytes, and the address of the host's end; 0: at the same place of
the slot's host memory."""

PackedSpans: TypeAlias = bytes
"""Spans as csrc/spans.h makes them and csrc/slot.cpp takes them: three numbers of eight bytes each."""

_PACKED: Final = struct.Struct("<qqQ")

MIN_DIRECT_BYTES: Final = 32 * 1024
"""What a device copies from where it lies, at least. To have it copy a tensor takes two microseconds of the thread that
serves, in which the processor, with help, copies as much as this."""

# A copy takes as long to start as these bytes take on their way.
_MAX_GAP_BYTES: Final = 64 * 1024


def whole(nbytes: int) -> list[Span]:
    """The first nbytes of a slot's memory."""
    return [(0, nbytes, 0)]


def each_of(spans: list[Span] | PackedSpans) -> Iterable[Span]:
    """The spans one by one."""
    return _PACKED.iter_unpack(spans) if isinstance(spans, bytes) else spans


def direct_address(data: bytes | memoryview, nbytes: int) -> int:
    """Where the first nbytes of these lie, if a device is to copy them from or to there; 0: the processor does."""
    return pinned_address(data, nbytes) if nbytes >= MIN_DIRECT_BYTES else 0


class Spans:
    """The copies of one direction, made up from front to back; at first the first nbytes."""

    def __init__(self, nbytes: int) -> None:
        self.copies = whole(nbytes)

    def add(self, start: int, nbytes: int) -> None:
        """Bytes of the slot's own memory, not before any that were added."""
        if not nbytes:
            return
        first, num_bytes, address = self.copies[-1]
        if address == 0 and start - (first + num_bytes) <= _MAX_GAP_BYTES:
            self.copies[-1] = first, start + nbytes - first, 0
        else:
            self.copies.append((start, nbytes, 0))

    def add_direct(self, start: int, nbytes: int, address: int) -> None:
        """Bytes that lie in pinned memory of others."""
        while nbytes > (left := PIECE_BYTES - address % PIECE_BYTES):
            self.copies.append((start, left, address))
            start, nbytes, address = start + left, nbytes - left, address + left
        self.copies.append((start, nbytes, address))
