"""One open ForwardStream: tasks read and admit requests, answers are sent as they complete.

Messages come from gRPC and, where the caller has asked for it, through rings in its memory; an answer goes the way its
request came, as long as there is room. What is read but not answered is bounded, in requests, in tokens and in bytes of
answers that nobody took, so a caller who does not read its answers is not read from either: HTTP/2 flow control then
holds it back, and the server's memory stays where it is.

Everything here runs in the event loop but `_Pending.encode`, which is called where the answer is computed, and
`Stream._rings_came`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import grpc
from google.rpc import code_pb2

from expertd_server.calls import Calls
from expertd_server.errors import InvalidArgumentError, RequestCancelledError, UnavailableError
from expertd_server.event_loop import Inbox
from expertd_server.messages import read_stream_message
from expertd_server.promise import Promise
from expertd_server.regions import Lease, StreamRegions
from expertd_server.ring_pair import RingPair
from expertd_server.status import status_of, stream_error_of
from expertd_server.stream_rings import StreamRings
from expertd_server.stream_writer import StreamWriter
from expertd_server.timing import ForwardTiming
from expertd_server.wire_answer import encode_region_reply, encode_stream_error
from expertd_server.wire_parse import RawStreamRequest

__all__ = ["Stream"]


class _Pending:
    """A request that was read and is not answered."""

    __slots__ = (
        "answer_bytes",
        "arrived_s",
        "calls",
        "lease",
        "num_tokens",
        "promise",
        "put",
        "ready_s",
        "request_id",
        "stream",
        "timing",
    )

    def __init__(  # noqa: PLR0917 (called for every request, and keywords take time)
        self,
        stream: Stream,
        calls: Calls,
        request_id: int,
        arrived_s: float,
        num_tokens: int,
        put: Callable[[bytes], bool] | None,
    ) -> None:
        self.stream = stream
        self.calls = calls
        self.request_id = request_id
        self.arrived_s = arrived_s
        self.num_tokens = num_tokens
        self.put = put
        """Sends the answer the way that the request came, if it can; None: that is gRPC's."""
        self.promise: Promise[bytes] | None = None
        """None: not admitted yet, or answered; its result need not wait for the answer to be written."""
        self.lease: Lease | None = None
        """Of the memory that the request holds."""
        self.ready_s = 0.0
        """When there was an answer to send."""
        self.timing: ForwardTiming | None = None
        """Of an answer that is no error."""
        self.answer_bytes = 0
        """Of the same, as it goes out."""

    def encode(self, result: Any) -> bytes:
        """The answer as it goes out; in any thread."""
        self.ready_s, self.timing = self.calls.clock(), result.timing
        lease = self.lease  # the stream lets go of it when it ends, at any time
        place = None if lease is None else lease.place
        answer = self.calls.codec.write_stream_answer(self.request_id, result, self.calls.queue_depth_tokens, place)
        self.answer_bytes = len(answer)
        return answer

    def done(self, promise: Promise[bytes]) -> None:
        """The promise is kept or given up; in any thread."""
        self.promise = promise
        self.stream.inbox.post(self.answer)

    def answer(self) -> None:
        """Have it written."""
        self.stream.completed(self)


class Stream:
    """One call. `run` is its life: from the first message to the last answer.

    regions: memory that the caller shares; the stream closes it.
    max_requests, max_tokens: bounds of what is read but not answered; a lone request may exceed max_tokens.
    max_answer_bytes: of answers that the caller has not taken; when there are more, nothing further is read.
    log_id: names the call in log lines.
    """

    def __init__(
        self,
        calls: Calls,
        context: grpc.aio.ServicerContext[bytes, bytes],
        inbox: Inbox,
        *,
        regions: StreamRegions,
        max_requests: int,
        max_tokens: int,
        max_answer_bytes: int,
        log_id: str,
    ) -> None:
        self.inbox = inbox
        self._calls = calls
        self._context = context
        self._regions = regions
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_answer_bytes = max_answer_bytes
        self._log_id = log_id
        self._loop = asyncio.get_running_loop()
        time_remaining_s = context.time_remaining()
        self._until_s = math.inf if time_remaining_s is None else calls.clock() + time_remaining_s
        self._pending: set[_Pending] = set()
        self._pending_tokens = 0
        self._answer_bytes = 0
        self._is_reading = True
        self._is_closing = False
        self._is_gone = False
        self._broken: Exception | None = None
        self._over: asyncio.Future[None] = self._loop.create_future()
        """Nothing will be written any more."""
        self._writer: StreamWriter[_Pending] = StreamWriter(context, self._answered, self._over)
        self._readers: list[asyncio.Task[None]] = []
        self._room: asyncio.Future[None] | None = None
        """What reading tasks wait for, if they wait for room."""
        self._rings: StreamRings | None = None

    async def run(self) -> None:
        """Answer requests, in completion order, until the caller or the server has had enough.

        Raises InvalidArgumentError, after the answers in flight, when a message was no ForwardStreamRequest at all, and
        UnavailableError when the server drains.
        """
        self._readers.append(self._loop.create_task(self._read(self._context.read)))
        try:
            await self._over
        finally:
            self._abandon()

    def close(self) -> None:
        """End the call as soon as nothing is in flight."""
        self._is_closing = True
        self._end_if_idle()

    def completed(self, pending: _Pending) -> None:
        """An answer is there, or an error in its place."""
        if self._is_gone:
            pending.promise = None  # whom nobody asks; it may hold much
            return
        answer = self._answer(pending)
        self._answer_bytes += pending.answer_bytes
        if pending.put is not None and pending.put(answer):
            self._answered(pending)
        else:
            self._writer.write(pending, answer)

    def _answered(self, pending: _Pending) -> None:
        """The answer is on its way."""
        self._leave(pending)
        if pending.timing is not None:
            self._calls.answered("ForwardStream", pending.arrived_s, pending.ready_s, pending.timing)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        """End the call when nothing is in flight and nothing more comes."""
        if self._pending or self._over.done():
            return
        if self._broken is not None:
            self._over.set_exception(self._broken)
        elif not self._is_reading:
            self._over.set_result(None)
        elif self._is_closing:
            self._over.set_exception(_closing())

    async def _read(self, read: Callable[[], Awaitable[Any]], put: Callable[[bytes], bool] | None = None) -> None:
        """The life of a reading task. put: see `_Pending`."""
        try:
            await self._take_all(read, put)
        except (InvalidArgumentError, UnavailableError) as error:
            self._broken = error
        except Exception as error:
            # gRPC's ways to say that the call is over; the writer is told in its own way.
            if not (self._is_gone or self._context.done()):
                self._broken = error
        finally:
            self._is_reading = False
            self._end_if_idle()

    async def _take_all(self, read: Callable[[], Awaitable[Any]], put: Callable[[bytes], bool] | None) -> None:
        calls, clock = self._calls, self._calls.clock
        while True:
            data: Any = await read()
            if data is grpc.aio.EOF or not self._is_reading:  # type: ignore[attr-defined]
                return
            if self._is_closing:  # the message is lost, which the stream's status says
                raise _closing()
            arrived_s = clock()
            calls.announce()
            request_id, timeout_ms, num_tokens, request = read_stream_message(data)
            num_tokens = min(num_tokens, self._max_tokens)
            while self._pending and not self._has_room(num_tokens):
                if self._room is None or self._room.done():
                    self._room = self._loop.create_future()
                await self._room
            pending = _Pending(self, calls, request_id, arrived_s, num_tokens, put)
            self._pending.add(pending)
            self._pending_tokens += num_tokens
            calls.in_flight += 1
            try:
                if request is None:
                    raise InvalidArgumentError.of("request", "is missing, expected a ForwardRequest")
                if isinstance(request, RawStreamRequest):
                    Promise[bytes](pending.done).set_result(
                        encode_region_reply(request_id, self._regions.obey(request, self._rings_came))
                    )
                else:
                    pending.lease = self._regions.lease(request)
                    timeout_s = self._until_s - arrived_s
                    if timeout_ms:
                        timeout_s = min(timeout_s, timeout_ms / 1e3)
                    pending.promise = calls.admit(request, arrived_s, timeout_s, pending.encode, pending.done)
                    calls.hurry()
            except Exception as error:  # the request fails alone, the stream lives on
                Promise[bytes](pending.done).set_exception(error)
            # The wait for the next message may be long, and this one large; an error knows this frame.
            del data, request, pending

    def _rings_came(self, pair: RingPair) -> None:
        """In the door's thread."""
        self.inbox.post(partial(self._open_rings, pair))

    def _open_rings(self, pair: RingPair) -> None:
        if self._is_gone:
            pair.close()
            return
        self._rings = StreamRings(pair, self._calls)
        self._readers.append(self._loop.create_task(self._read(self._rings.read, self._rings.put)))

    def _has_room(self, num_tokens: int) -> bool:
        """Where something is pending; without, there always is."""
        return (
            len(self._pending) < self._max_requests
            and self._pending_tokens + num_tokens <= self._max_tokens
            and self._answer_bytes < self._max_answer_bytes
        )

    def _leave(self, pending: _Pending) -> None:
        if pending not in self._pending:
            return
        self._pending.remove(pending)
        self._pending_tokens -= pending.num_tokens
        self._answer_bytes -= pending.answer_bytes
        self._calls.in_flight -= 1
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _abandon(self) -> None:
        """The call is over, however it ended: cancel what waits."""
        self._is_gone = True
        while self._readers:
            self._readers.pop().cancel()
        self._writer.close()
        for pending in list(self._pending):
            promise, pending.promise = pending.promise, None
            pending.lease = None
            if promise is not None:
                promise.cancel()
            self._leave(pending)
        if self._rings is not None:
            self._rings.close()
        self._regions.close()

    def _answer(self, pending: _Pending) -> bytes:
        promise, pending.promise = pending.promise, None
        lease, pending.lease = pending.lease, None
        try:
            # An error is asked for and not raised: it would know who called this, and they know the promise.
            error = _gone() if promise is None else promise.exception(timeout=0)
            if promise is not None and error is None:
                return promise.result(timeout=0)
        except CancelledError:
            error = _gone()
        finally:
            if lease is not None:  # before the caller reads the answer, and sends into the same memory again
                lease.release()
        assert isinstance(error, Exception)
        status = status_of(error, self._log_id)
        self._calls.failed("ForwardStream", code_pb2.Code.Name(status.code))
        return encode_stream_error(pending.request_id, stream_error_of(status))


def _gone() -> RequestCancelledError:
    return RequestCancelledError("the caller left")


def _closing() -> UnavailableError:
    return UnavailableError("the server is draining and closes this stream; open one to another server")
