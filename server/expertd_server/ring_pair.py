"""The server's ends of the two rings of messages that a caller has asked for in its memory, see MessageRings."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Final

from expertd.v1 import expertd_pb2 as pb
from expertd.v1.message_ring import IS_SUPPORTED, RingReader, RingWriter, ring_nbytes
from expertd_server.errors import InvalidArgumentError
from expertd_server.region_door import PROOF_BYTES

__all__ = ["RingPair", "RingPlace"]

log = logging.getLogger(__name__)

_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class RingPair:
    """Where messages come from, and where answers go."""

    requests: RingReader
    answers: RingWriter

    def close(self) -> None:
        """Let go of the memory and the bells."""
        self.requests.close()
        self.answers.close()


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Where the rings lie in a region, checked."""

    offset: int
    num_slots: int
    slot_nbytes: int

    @classmethod
    def asked_for(cls, message: pb.RegisterRegion) -> RingPlace | None:
        """What a RegisterRegion says; None: nothing of rings. Raises InvalidArgumentError."""
        if not message.HasField("rings"):
            return None
        field = "register_region.rings"
        rings = message.rings
        if rings.num_slots < 1:
            raise InvalidArgumentError.of(f"{field}.num_slots", "is 0, expected at least 1")
        if not rings.slot_nbytes or rings.slot_nbytes % _ALIGNMENT:
            raise InvalidArgumentError.of(
                f"{field}.slot_nbytes", f"is {rings.slot_nbytes}, expected a multiple of {_ALIGNMENT} above 0"
            )
        if rings.offset < PROOF_BYTES or rings.offset % _ALIGNMENT:
            raise InvalidArgumentError.of(
                f"{field}.offset", f"is {rings.offset}, expected a multiple of {_ALIGNMENT} above 0"
            )
        stop = rings.offset + 2 * ring_nbytes(rings.num_slots, rings.slot_nbytes)
        if stop > message.nbytes:
            raise InvalidArgumentError.of(
                field, f"are bytes {rings.offset} to {stop} of region {message.region}, which has {message.nbytes}"
            )
        return cls(rings.offset, rings.num_slots, rings.slot_nbytes)

    def open(self, region: memoryview) -> tuple[RingPair | None, tuple[int, ...]]:
        """The server's ends, and the file descriptors of the bells' other ends; neither where there are to be none."""
        if not IS_SUPPORTED:
            return None, ()
        fds: list[int] = []
        try:
            for _ in range(2):
                fds += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            log.warning("messages of a stream go over gRPC, not through its memory: %s", error)
            for fd in fds:
                os.close(fd)
            return None, ()
        requests_bell, to_ring, answers_bell, to_answer = fds[0], fds[1], fds[2], fds[3]
        middle = self.offset + ring_nbytes(self.num_slots, self.slot_nbytes)
        shape = (self.num_slots, self.slot_nbytes)
        pair = RingPair(
            RingReader(region[self.offset : middle], *shape, requests_bell),
            RingWriter(region[middle:], *shape, to_answer),
        )
        return pair, (to_ring, answers_bell)
