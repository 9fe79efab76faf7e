"""The client's ends of the rings that a stream's messages go through, see the proto's MessageRings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from expertd.errors import ProtocolError
from expertd.v1 import expertd_pb2 as pb
from expertd.v1.message_ring import IS_SUPPORTED, RingBrokenError, RingReader, RingWriter, ring_nbytes

__all__ = ["HUNG_UP_S", "StreamRings", "hung_up", "num_slots", "rings_end", "wanted_rings"]

_LEAST_SLOTS: Final = 64
_SHARE: Final = 8  # of a region the most that rings take, as one in so many bytes
_SLOT_NBYTES: Final = 1024  # of a request some 200 are used, of an answer 100; an error that is longer goes over gRPC
_OFFSET: Final = 64  # behind the proof

HUNG_UP_S: Final = 5.0
"""A server hangs up when it ends the stream. One that does not end it within this time is not as it should be."""

_NUM_BELLS: Final = 2


def num_slots(max_in_flight: int, region_nbytes: int) -> int:
    """Messages that each ring has room for: twice as many as may be in flight, as far as the region is large enough.
    What finds no room goes over gRPC."""
    return max(_LEAST_SLOTS, min(2 * max_in_flight, region_nbytes // _SHARE // (2 * _SLOT_NBYTES)))


def rings_end(slots: int) -> int:
    """Where the rest of the region starts behind rings of so many slots."""
    return _OFFSET + 2 * ring_nbytes(slots, _SLOT_NBYTES)


def wanted_rings(slots: int) -> pb.MessageRings | None:
    """What to ask the server for; None: this machine cannot."""
    return pb.MessageRings(offset=_OFFSET, num_slots=slots, slot_nbytes=_SLOT_NBYTES) if IS_SUPPORTED else None


def hung_up() -> ProtocolError:
    """What is wrong HUNG_UP_S after the server has hung up."""
    return ProtocolError("the server has left the rings of a stream that goes on")


class StreamRings:
    """Messages to the server and from it. `put` and `take` are for one thread at a time each; `close` must follow."""

    def __init__(self, region: memoryview, slots: int, bells: Sequence[int]) -> None:
        """region, slots: as `wanted_rings` was asked for them. bells: what the server's socket gave; they are closed in
        any case.

        Raises ValueError where they are not those of rings.
        """
        if len(bells) != _NUM_BELLS:
            for fd in bells:
                os.close(fd)
            raise ValueError(f"{len(bells)} file descriptors came from the server, expected {_NUM_BELLS}")
        for fd in bells:
            os.set_inheritable(fd, False)
            os.set_blocking(fd, False)
        middle = _OFFSET + ring_nbytes(slots, _SLOT_NBYTES)
        self._requests = RingWriter(region[_OFFSET:middle], slots, _SLOT_NBYTES, bells[0])
        self._answers = RingReader(region[middle : rings_end(slots)], slots, _SLOT_NBYTES, bells[1])
        self.put = self._requests.put
        """Send a message; False: it finds no room and has to go over gRPC."""

    @property
    def bell_fd(self) -> int:
        """Readable when there is something to take, once `take` has returned None."""
        return self._answers.bell_fd

    def silence(self) -> bool:
        """Make the bell stop; False: the server has hung up, and the bell is not to be listened to any more."""
        return self._answers.silence()

    def take(self) -> bytes | None:
        """The next answer; None: the bell will ring for it. Raises ProtocolError."""
        answers = self._answers
        try:
            while (answer := answers.take()) is None:
                if answers.may_sleep():
                    return None
        except RingBrokenError as error:
            raise ProtocolError(f"the server's ring makes no sense: {error}") from error
        return answer

    def close(self) -> None:
        """Let go of the memory and the bells; again is of no effect."""
        self._requests.close()
        self._answers.close()
