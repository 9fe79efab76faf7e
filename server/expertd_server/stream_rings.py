"""The rings of one stream in the event loop: whatever the caller does, it gets a bounded part of each round."""

from __future__ import annotations

import asyncio
from typing import Final

from expertd.v1.message_ring import RingBrokenError
from expertd_server.calls import Calls
from expertd_server.errors import InvalidArgumentError
from expertd_server.ring_pair import RingPair

__all__ = ["StreamRings"]

_MESSAGES_A_ROUND: Final = 16


class StreamRings:
    """Messages as they come, one task reads them, and room for answers. `close` must follow.

    It counts itself among `Calls.unread_rings`: an event loop in which a message is handled at once, and its answer not
    written but put, would else take each of many that are there for the only one.
    """

    def __init__(self, pair: RingPair, calls: Calls) -> None:
        self._pair = pair
        self._calls = calls
        self._is_unread = False
        self._loop = asyncio.get_running_loop()
        self._left = _MESSAGES_A_ROUND
        self._is_to_ring = False
        self._bell: asyncio.Future[None] | None = None
        """What the reading task waits for, if it waits for the bell."""
        self._loop.add_reader(pair.requests.bell_fd, self._rung)

    async def read(self) -> bytes:
        """The next message. Raises InvalidArgumentError where the ring makes no sense, or holds too large a one."""
        requests = self._pair.requests
        while True:
            if not self._left:
                await asyncio.sleep(0)
                self._left = _MESSAGES_A_ROUND
            self._left -= 1
            try:
                message = requests.take()
            except RingBrokenError as error:
                raise InvalidArgumentError.of("register_region.rings", f"make no sense: {error}") from None
            if message is not None:
                if len(message) > self._calls.max_message_bytes:
                    raise self._too_large(len(message))
                self._count_unread(requests.has_more)
                return message
            if requests.may_sleep():
                self._count_unread(False)
                self._bell = self._loop.create_future()
                await self._bell
                self._left = _MESSAGES_A_ROUND

    def _too_large(self, nbytes: int) -> InvalidArgumentError:
        most_nbytes = self._calls.max_message_bytes
        return InvalidArgumentError.of(
            "register_region.rings",
            f"hold a message of {nbytes} bytes, expected at most {most_nbytes} (max_message_bytes)",
        )

    def put(self, answer: bytes) -> bool:
        """Have the caller find an answer; False: there is no room for it.

        With others in flight the bell is rung when the loop's round ends: a batch answers many requests of a caller,
        who would else be woken by the first, and take no other.
        """
        answers = self._pair.answers
        if self._calls.in_flight <= 1:
            return answers.put(answer)
        is_added = answers.add(answer)
        if is_added and not self._is_to_ring:
            self._is_to_ring = True
            self._loop.call_soon(self._ring)
        return is_added

    def _ring(self) -> None:
        self._is_to_ring = False
        self._pair.answers.ring()

    def close(self) -> None:
        """Let go of the memory and the bells. Nobody reads any more."""
        self._count_unread(False)
        self._loop.remove_reader(self._pair.requests.bell_fd)
        self._pair.close()

    def _rung(self) -> None:
        if not self._pair.requests.silence():
            # The caller's process has ended, and its stream will, or it has closed the bell and nothing comes this way.
            self._loop.remove_reader(self._pair.requests.bell_fd)
        elif self._bell is not None and not self._bell.done():
            self._count_unread(True)
            self._bell.set_result(None)

    def _count_unread(self, is_unread: bool) -> None:
        self._calls.unread_rings += is_unread - self._is_unread
        self._is_unread = is_unread
