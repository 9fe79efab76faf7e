"""Requests that are made once and sent many times on one stream, in whose memory all of them lies. No I/O."""

from __future__ import annotations

import queue
from typing import Final, Protocol, TypeAlias

from expertd._base import Outcome
from expertd._shm import Placed, StreamMemory
from expertd._wire import Encoded
from expertd._wire_read import KnownAnswer

__all__ = ["FIRST_STANDING_ID", "STANDING_KEY", "STOP_STANDING_ID", "Settled", "Standing", "StandingStream", "key_of"]

FIRST_STANDING_ID: Final = 2**49
"""The ids of standing requests; no stream sends as many others. Their varints have eight bytes, all of them."""

STOP_STANDING_ID: Final = 2**56

STANDING_KEY: Final = slice(0, 9)
"""Where an answer says whose it is, if it is that of a standing request: the key of its id, and the id."""

Settled: TypeAlias = "queue.SimpleQueue[bytes | Outcome]"


def key_of(request_id: int) -> bytes:
    """The bytes at STANDING_KEY of the answer to a standing request."""
    return bytes((0x08, *(request_id >> shift & 0x7F | 0x80 for shift in range(0, 49, 7)), request_id >> 49))


class StandingStream(Protocol):
    """A stream, to who sends standing requests on it."""

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""

    def send_standing(self, standing: Standing) -> bool:
        """Send it; False: it has to go another way, now or for good. One that is on the wire must not be sent."""

    def settle_standing(self, standing: Standing, until_s: float) -> bytes | Outcome | None:
        """What has come of one that was sent: waits for it, and takes answers as they come. None: until_s, on
        time.monotonic(), has come before."""

    def outcome_of(self, standing: Standing, answer: bytes | Outcome) -> Outcome:
        """What an answer says."""

    def abandon_standing(self, standing: Standing) -> None:
        """Forget that it was sent; it cannot be sent again. Of no effect when its answer is there."""


class Standing:
    """One of them. Its answer, or what came in its place, is put into `settled`: bytes as they came, mostly."""

    __slots__ = ("body", "detached", "key", "known", "memory", "message", "placed", "request_id", "settled", "stream")

    def __init__(  # noqa: PLR0917 (all of it is known at once)
        self,
        stream: StandingStream,
        request_id: int,
        body: Encoded,
        memory: StreamMemory,
        message: bytes,
        placed: Placed,
        settled: Settled,
    ) -> None:
        self.stream = stream
        self.request_id = request_id
        self.key = key_of(request_id)
        self.body = body
        self.memory = memory
        self.message = message
        self.placed = placed
        self.settled = settled
        self.detached = memory.detached
        """What was not in the memory any more when this was placed: it may be sent as long as that is all."""
        self.known: KnownAnswer | None = None
        """The answer that was read and checked last."""
