"""One open ForwardStream: a task reads and admits requests, answers are written as they complete.

What is read but not answered is bounded, in requests, in tokens and in bytes of answers that nobody took, so a caller
who does not read its answers is not read from either: HTTP/2 flow control then holds it back, and the server's memory
stays where it is.

Everything here runs in the event loop but `_Pending.encode`, which is called where the answer is computed.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Coroutine
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
from expertd_server.status import status_of, stream_error_of
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
        "ready_s",
        "request_id",
        "stream",
        "timing",
    )

    def __init__(self, stream: Stream, calls: Calls, request_id: int, arrived_s: float, num_tokens: int) -> None:
        self.stream = stream
        self.calls = calls
        self.request_id = request_id
        self.arrived_s = arrived_s
        self.num_tokens = num_tokens
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
        self._pending: set[_Pending] = set()
        self._pending_tokens = 0
        self._answer_bytes = 0
        self._done: deque[_Pending] = deque()  # holds no more than _pending does
        self._is_reading = True
        self._is_closing = False
        self._is_gone = False
        self._broken: Exception | None = None
        self._write: Coroutine[Any, Any, None] | None = None
        """Of the answer that is being written, if any is."""
        self._over: asyncio.Future[None] = self._loop.create_future()
        """Nothing will be written any more."""
        self._reader: asyncio.Future[None] | None = None
        """What the reading task waits for, if it waits for room."""

    async def run(self) -> None:
        """Answer requests, in completion order, until the caller or the server has had enough.

        Raises InvalidArgumentError, after the answers in flight, when a message was no ForwardStreamRequest at all, and
        UnavailableError when the server drains.
        """
        reading = self._loop.create_task(self._read())
        try:
            await self._over
        finally:
            self._abandon()
            reading.cancel()

    def close(self) -> None:
        """End the call as soon as nothing is in flight."""
        self._is_closing = True
        self._end_if_idle()

    def completed(self, pending: _Pending) -> None:
        """An answer is there, or an error in its place."""
        if self._is_gone:
            pending.promise = None  # whom nobody asks; it may hold much
            return
        self._done.append(pending)
        self._answer_bytes += pending.answer_bytes
        if self._write is None:
            self._write_next()

    # A write begins here and now, and not, as a task would, in the loop's next round: what remains to be done for a
    # batch whose answer is there must not keep its caller waiting.

    def _write_next(self) -> None:
        """Write answers until one must wait for gRPC, or none is left."""
        while self._done and not self._is_gone:
            pending = self._done.popleft()
            self._write = self._context.write(self._answer(pending))
            if not self._advance(pending):
                return
        if not self._pending:
            self._end_if_idle()

    def _advance(self, pending: _Pending) -> bool:
        """Go on with a write as far as it goes; whether it is done."""
        assert self._write is not None
        try:
            waits_for = self._write.send(None)
        except StopIteration:
            self._write = None
            # Not before: gRPC has taken this one, and will not take the next before the caller reads.
            self._leave(pending)
            if pending.timing is not None:
                self._calls.answered("ForwardStream", pending.arrived_s, pending.ready_s, pending.timing)
            return True
        except (asyncio.CancelledError, grpc.aio.InternalError):
            # What gRPC makes of a write to a caller who has just gone, if the call's end is not told yet.
            self._write = None
            if not self._over.done():
                self._over.cancel("the caller left")
        except Exception as error:
            self._write = None
            if not self._over.done():
                self._over.set_exception(error)
        else:
            waits_for.add_done_callback(partial(self._resume, pending))
        return False

    def _resume(self, pending: _Pending, waited_for: asyncio.Future[None]) -> None:
        if self._write is None:  # the call is over; nobody else asks how this write went
            if not waited_for.cancelled():
                waited_for.exception()
        elif self._advance(pending):
            self._write_next()

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

    async def _read(self) -> None:
        try:
            await self._take_all()
        except (InvalidArgumentError, UnavailableError) as error:
            self._broken = error
        except Exception as error:
            # gRPC's ways to say that the call is over; the writer is told in its own way.
            if not (self._is_gone or self._context.done()):
                self._broken = error
        finally:
            self._is_reading = False
            self._end_if_idle()

    async def _take_all(self) -> None:
        calls, read, clock = self._calls, self._context.read, self._calls.clock
        time_remaining_s = self._context.time_remaining()
        until_s = math.inf if time_remaining_s is None else clock() + time_remaining_s
        while True:
            data: Any = await read()
            if data is grpc.aio.EOF:  # type: ignore[attr-defined]
                return
            if self._is_closing:  # the message is lost, which the stream's status says
                raise _closing()
            arrived_s = clock()
            request_id, timeout_ms, num_tokens, request = read_stream_message(data)
            num_tokens = min(num_tokens, self._max_tokens)
            while self._pending and not self._has_room(num_tokens):
                self._reader = self._loop.create_future()
                await self._reader
            pending = _Pending(self, calls, request_id, arrived_s, num_tokens)
            self._pending.add(pending)
            self._pending_tokens += num_tokens
            calls.in_flight += 1
            try:
                if request is None:
                    raise InvalidArgumentError.of("request", "is missing, expected a ForwardRequest")
                if isinstance(request, RawStreamRequest):
                    Promise[bytes](pending.done).set_result(
                        encode_region_reply(request_id, self._regions.obey(request))
                    )
                else:
                    pending.lease = self._regions.lease(request)
                    timeout_s = until_s - arrived_s
                    if timeout_ms:
                        timeout_s = min(timeout_s, timeout_ms / 1e3)
                    pending.promise = calls.admit(request, arrived_s, timeout_s, pending.encode, pending.done)
                    calls.hurry()
            except Exception as error:  # the request fails alone, the stream lives on
                Promise[bytes](pending.done).set_exception(error)
            # The wait for the next message may be long, and this one large; an error knows this frame.
            del data, request, pending

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
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _abandon(self) -> None:
        """The call is over, however it ended: cancel what waits."""
        self._is_gone = True
        write, self._write = self._write, None
        if write is not None:
            write.close()
        for pending in list(self._pending):
            promise, pending.promise = pending.promise, None
            pending.lease = None
            if promise is not None:
                promise.cancel()
            self._leave(pending)
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
