"""One open ForwardStream: a reader admits requests, the call's own thread writes answers as they complete.

What is read but not answered is bounded, so a caller who does not read its answers is not read from either: HTTP/2
flow control then holds it back, and the server's memory stays where it is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import code_pb2

from expertd_server.calls import Calls
from expertd_server.engine import ForwardTiming
from expertd_server.errors import InvalidArgumentError, RequestCancelledError, UnavailableError
from expertd_server.regions import Lease, RegionReply, StreamRegions
from expertd_server.status import status_of, stream_error_of
from expertd_server.wire import encode_region_reply, encode_stream_error, encode_stream_response
from expertd_server.wire_parse import parse_stream_request

__all__ = ["Stream"]

# Both threads look up this often whether the call is still there; nothing else depends on it.
_LOOK_UP_S = 1.0


@dataclass(eq=False, slots=True)
class _Pending:
    request_id: int
    arrived_s: float
    num_tokens: int
    future: Future[Any] | None = None
    """None: not admitted yet, or answered; its result need not wait for the answer to be written."""
    ready_s: float = 0.0
    """When its answer was ready to be sent."""
    timing: ForwardTiming | None = None
    """Of an answer that is no error."""
    lease: Lease | None = None
    """Of the memory that the request holds."""


class Stream:
    """One call. `answers` is its life: from the first message to the last answer.

    requests: serialised ForwardStreamRequests, as gRPC yields them.
    regions: memory that the caller shares; the stream closes it.
    max_requests, max_tokens: bounds of what is read but not answered; a lone request may exceed max_tokens.
    log_id: names the call in log lines.
    """

    def __init__(
        self,
        calls: Calls,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        *,
        regions: StreamRegions,
        max_requests: int,
        max_tokens: int,
        log_id: str,
    ) -> None:
        self._calls = calls
        self._requests = requests
        self._context = context
        self._regions = regions
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._log_id = log_id
        self._changed = threading.Condition()
        self._pending: set[_Pending] = set()
        self._pending_tokens = 0
        self._done: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()  # holds no more than _pending does
        self._is_reading = True
        self._is_closing = False
        self._is_gone = False
        self._broken: Exception | None = None

    def answers(self) -> Iterator[bytes]:
        """Serialised ForwardStreamResponses, in completion order.

        Raises InvalidArgumentError, after the answers in flight, when a message was no ForwardStreamRequest at all, and
        UnavailableError when the server drains.
        """
        if not self._context.add_callback(self._abandon):
            return
        threading.Thread(target=self._read, name="expertd-stream-reader", daemon=True).start()
        while not self._is_gone:
            # In this order: the reader leaves its last request, then its error, and then says that it has ended.
            is_closing, is_reading, broken = self._is_closing, self._is_reading, self._broken
            if not self._pending:
                if broken is not None:
                    raise broken
                if not is_reading:
                    return
                if is_closing:
                    raise _closing()
            try:
                pending = self._done.get(timeout=_LOOK_UP_S)
            except queue.Empty:
                continue
            if pending is not None:
                yield self._answer(pending)
                # Not before: gRPC comes back for more when it has written this one.
                self._leave(pending)
                if pending.timing is not None:
                    self._calls.answered("ForwardStream", pending.arrived_s, pending.ready_s, pending.timing)

    def close(self) -> None:
        """End the call as soon as nothing is in flight."""
        self._is_closing = True
        self._done.put(None)

    def _abandon(self) -> None:
        """The call is over, however it ended: cancel what waits, let both threads go."""
        with self._changed:
            self._is_gone = True
            left = list(self._pending)
            self._changed.notify_all()
        for pending in left:
            self._give_up(pending)
            self._leave(pending)
        self._regions.close()
        self._done.put(None)

    def _read(self) -> None:
        try:
            for data in self._requests:
                if self._is_closing:  # the message is lost, which the stream's status says
                    raise _closing()
                if not self._take(data):
                    return
                del data  # the wait for the next message may be long, and this one large
        except (InvalidArgumentError, UnavailableError) as error:
            self._broken = error
        except grpc.RpcError:
            pass  # how gRPC says that the call is over
        finally:
            self._is_reading = False
            self._done.put(None)

    def _take(self, data: bytes) -> bool:
        """Admit one message as soon as there is room; False when the call ended meanwhile."""
        arrived_s = self._calls.clock()
        message = parse_stream_request(data)
        num_tokens = min(message.num_tokens, self._max_tokens)
        pending = _Pending(message.id, arrived_s, num_tokens)
        if not self._enter(pending):
            return False
        future: Future[Any]
        try:
            if message.is_about_regions:
                future = Future()
                future.set_result(self._regions.obey(message))
            elif message.request is None:
                raise InvalidArgumentError.of("request", "is missing, expected a ForwardRequest")
            else:
                pending.lease = self._regions.lease(message.request)
                timeout_s = message.timeout_ms / 1e3 if message.timeout_ms else float("inf")
                timeout_s = min(timeout_s, self._context.time_remaining())
                future = self._calls.admit(message.request, arrived_s, timeout_s)
        except Exception as error:  # the request fails alone, the stream lives on
            future = Future()
            future.set_exception(error)
        pending.future = future
        future.add_done_callback(lambda _: self._ready(pending))
        del future  # an error that was caught here knows this frame: leave no cycle
        if self._is_gone:
            self._give_up(pending)
        return True

    def _ready(self, pending: _Pending) -> None:
        pending.ready_s = self._calls.clock()
        self._done.put(pending)

    @staticmethod
    def _give_up(pending: _Pending) -> None:
        future, pending.future = pending.future, None  # the future's callback knows pending: leave no cycle
        pending.lease = None
        if future is not None:
            future.cancel()

    def _enter(self, pending: _Pending) -> bool:
        with self._changed:
            while not (self._is_gone or self._has_room(pending.num_tokens)):
                self._changed.wait(_LOOK_UP_S)
            if self._is_gone:
                return False
            self._pending.add(pending)
            self._pending_tokens += pending.num_tokens
        self._calls.arrived()
        return True

    def _has_room(self, num_tokens: int) -> bool:
        return not self._pending or (
            len(self._pending) < self._max_requests and self._pending_tokens + num_tokens <= self._max_tokens
        )

    def _leave(self, pending: _Pending) -> None:
        with self._changed:
            if pending not in self._pending:
                return
            self._pending.remove(pending)
            self._pending_tokens -= pending.num_tokens
            self._changed.notify_all()
        self._calls.left()

    def _answer(self, pending: _Pending) -> bytes:
        future, pending.future = pending.future, None
        lease, pending.lease = pending.lease, None
        try:
            if future is None:
                raise RequestCancelledError("the caller left")
            result = future.result(timeout=0)
            if isinstance(result, RegionReply):
                return encode_region_reply(pending.request_id, result)
            place = None if lease is None else lease.place
            data = encode_stream_response(pending.request_id, result, self._calls.queue_depth_tokens, place)
            pending.timing = result.timing
            return data
        except Exception as error:
            status = status_of(error, self._log_id)
            self._calls.failed("ForwardStream", code_pb2.Code.Name(status.code))
            return encode_stream_error(pending.request_id, stream_error_of(status))
        finally:
            del future  # its error knows this frame: leave no cycle
            if lease is not None:  # before the caller reads the answer, and sends into the same memory again
                lease.release()


def _closing() -> UnavailableError:
    return UnavailableError("the server is draining and closes this stream; open one to another server")
