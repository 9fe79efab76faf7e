"""The client's ends of the rings that a stream's messages go through, see the proto's MessageRings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from expertd.errors import ProtocolError
from expertd.v1 import expertd_pb2 as pb
from expertd.v1.message_ring import IS_SUPPORTED, RingBrokenError, RingReader, RingWriter, ring_nbytes

__all__ = ["END", "HUNG_UP_S", "StreamRings", "hung_up", "wanted_rings"]

_NUM_SLOTS: Final = 64  # as many as max_in_flight by default, twice
_SLOT_NBYTES: Final = 1024  # of a request some 200 are used, of an answer 100; an error that is longer goes over gRPC
_RING_NBYTES: Final = ring_nbytes(_NUM_SLOTS, _SLOT_NBYTES)
_OFFSET: Final = 64  # behind the proof
END: Final = _OFFSET + 2 * _RING_NBYTES
"""Where the rest of the region starts."""

HUNG_UP_S: Final = 5.0
"""A server hangs up when it ends the stream. One that does not end it within this time is not as it should be."""

_NUM_BELLS: Final = 2


def wanted_rings() -> pb.MessageRings | None:
    """What to ask the server for; None: this machine cannot."""
    return pb.MessageRings(offset=_OFFSET, num_slots=_NUM_SLOTS, slot_nbytes=_SLOT_NBYTES) if IS_SUPPORTED else None


def hung_up() -> ProtocolError:
    """What is wrong HUNG_UP_S after the server has hung up."""
    return ProtocolError("the server has left the rings of a stream that goes on")


class StreamRings:
    """Messages to the server and from it. `put` and `take` are for one thread at a time each; `close` must follow."""

    def __init__(self, region: memoryview, bells: Sequence[int]) -> None:
        """region: that asked for `wanted_rings`. bells: what the server's socket gave; they are closed in any case.

        Raises ValueError where they are not those of rings.
        """
        if len(bells) != _NUM_BELLS:
            for fd in bells:
                os.close(fd)
            raise ValueError(f"{len(bells)} file descriptors came from the server, expected {_NUM_BELLS}")
        for fd in bells:
            os.set_inheritable(fd, False)
            os.set_blocking(fd, False)
        middle = _OFFSET + _RING_NBYTES
        self._requests = RingWriter(region[_OFFSET:middle], _NUM_SLOTS, _SLOT_NBYTES, bells[0])
        self._answers = RingReader(region[middle:END], _NUM_SLOTS, _SLOT_NBYTES, bells[1])
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
