"""How the asynchronous client puts requests on the wire: on long-lived streams, or as one call each."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc

from expertd._arena import Bytes
from expertd._base import (
    CLOSED_IN_FLIGHT,
    FORWARD,
    FORWARD_STREAM,
    Metadata,
    NewMetadata,
    Outcome,
    stream_outcome,
    timeout_ms,
    unary_outcome,
    unasked_ticket,
)
from expertd._rings import HUNG_UP_S, StreamRings, hung_up
from expertd._shm import Placed, StreamMemory, WantedMemory
from expertd._wire import Encoded, encode_stream_request
from expertd._wire_read import Response
from expertd.errors import (
    ClosedError,
    ExpertdError,
    ProtocolError,
    UnavailableError,
    error_from_trailers,
    stream_broken,
)
from expertd.v1 import expertd_pb2 as pb

__all__ = ["AsyncStreamTransport", "AsyncTransport", "AsyncUnaryTransport", "caller_is_cancelled", "error_from_aio"]


class AsyncTransport(Protocol):
    """Puts encoded requests on the wire. Cancelling a call of forward abandons the request."""

    async def forward(self, body: Encoded, deadline: float) -> Outcome:
        """Send one request and wait for its answer. deadline: on the loop's clock, for the server; the caller's own
        waiting is bounded by the caller. Raises ClosedError after close()."""

    async def lend(self, nbytes: int) -> Bytes | None:
        """[nbytes] uint8 of memory that is shared with the server, for the caller to keep; None: there is none, or none
        to spare. Waits until that is known.

        Raises SharedMemoryError, ClosedError, and what ended the stream meanwhile.
        """

    async def close(self) -> None:
        """Fail what is in flight with ClosedError, end all tasks."""


class AsyncStreamTransport:
    """One ForwardStream on each channel, opened when needed and again when it broke.

    on_unwanted: takes answers to requests that were abandoned. wanted_memory: to share on each stream; None: none.
    """

    def __init__(
        self,
        channels: Sequence[grpc.aio.Channel],
        new_metadata: NewMetadata,
        on_unwanted: Callable[[Response], None],
        wanted_memory: WantedMemory | None = None,
    ) -> None:
        self._methods = [channel.stream_stream(FORWARD_STREAM, None, None) for channel in channels]
        self._new_metadata = new_metadata
        self._on_unwanted = on_unwanted
        self._wanted_memory = wanted_memory
        self._streams: list[_Stream | None] = [None] * len(channels)
        self._retiring: list[_Stream] = []
        self._closed = False

    async def forward(self, body: Encoded, deadline: float) -> Outcome:
        """See AsyncTransport."""
        return await self._least_loaded().forward(body, deadline)

    async def lend(self, nbytes: int) -> Bytes | None:
        """See AsyncTransport."""
        return await self._least_loaded().lend(nbytes)

    async def close(self) -> None:
        """See AsyncTransport."""
        self._closed = True
        for stream in (*self._retiring, *self._streams):
            if stream is not None:
                await stream.close()

    def _least_loaded(self) -> _Stream:
        if self._closed:
            raise ClosedError("the client is closed")
        loads = [0 if stream is None or not stream.is_open else stream.in_flight for stream in self._streams]
        index = loads.index(min(loads))
        stream = self._streams[index]
        if stream is None or not stream.is_open:
            # A retiring stream still has answers to deliver; a finished one may be forgotten.
            self._retiring = [old for old in (*self._retiring, stream) if old is not None and old.is_alive]
            stream = self._streams[index] = _Stream(
                self._methods[index], self._new_metadata(), self._on_unwanted, self._wanted_memory
            )
        return stream


class _Stream:
    """One open ForwardStream with a task that sends and a task that reads.

    Sending has its own task because gRPC cancels the whole stream when a task is cancelled inside write().
    """

    def __init__(
        self,
        method: Any,
        metadata: tuple[Metadata, str | None],
        on_unwanted: Callable[[Response], None],
        wanted_memory: WantedMemory | None,
    ) -> None:
        headers, self._request_id = metadata
        self._on_unwanted = on_unwanted
        self._to_send: dict[int, bytes] = {}
        self._wake_sender = asyncio.Event()
        self._pending: dict[int, asyncio.Future[Outcome]] = {}
        self._ids = itertools.count(1)
        self._memory: StreamMemory | None = None
        self._memory_settled = asyncio.Event()
        self._sharing: asyncio.Task[None] | None = None
        self._placed: dict[int, Placed] = {}
        """Memory of requests that were sent and not answered, abandoned ones too: the server may be at it."""
        self._rings: StreamRings | None = None
        self._ring_failure: ProtocolError | None = None
        self._end: ExpertdError | None = None
        if wanted_memory is not None:
            self._memory = StreamMemory(wanted_memory, next(self._ids))
            if self._memory.is_settled:
                self._memory_settled.set()
            else:
                self._to_send[self._memory.request_id] = self._memory.opening()
                self._wake_sender.set()
        self._open = True
        self._closing = False
        self._call = method(metadata=headers)
        self._sender = asyncio.create_task(self._send(), name="expertd-stream-sender")
        self._reader = asyncio.create_task(self._read(), name="expertd-stream-reader")

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._open

    @property
    def is_alive(self) -> bool:
        """Whether answers may still come."""
        return not self._reader.done()

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    async def forward(self, body: Encoded, deadline: float) -> Outcome:
        """Send a request and wait for its answer. What waits to be sent is bounded by the places of the client."""
        loop = asyncio.get_running_loop()
        failure = await self._await_memory()
        if failure is not None:
            return failure
        request_id = next(self._ids)
        answer: asyncio.Future[Outcome] = loop.create_future()
        left_ms = timeout_ms(deadline - loop.time())
        there = None
        if self._memory is not None:
            there = self._memory.place(request_id, body, left_ms, self._placed.values())
        if there is None:
            message = encode_stream_request(request_id, body, left_ms)
        else:
            message, self._placed[request_id] = there
            del there
        self._pending[request_id] = answer
        if self._rings is None or not self._rings.put(message):
            self._to_send[request_id] = message
            self._wake_sender.set()
        del message  # the wait may be long, and the message large
        try:
            return await answer
        finally:
            self._pending.pop(request_id, None)
            if self._to_send.pop(request_id, None) is not None:
                self._placed.pop(request_id, None)
            elif (placed := self._placed.get(request_id)) is not None:  # the caller has left
                placed.give_up()
            if not self._open and not self._pending:
                self._wake_sender.set()  # nothing is left to send: it ends the call's sending side

    async def lend(self, nbytes: int) -> Bytes | None:
        """See AsyncTransport."""
        failure = await self._await_memory(in_any_case=True)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it knows this frame: leave no cycle
        return None if self._memory is None else self._memory.lend(nbytes)

    async def close(self) -> None:
        """Take no more requests, end the call and both tasks; what is in flight fails with ClosedError."""
        self._open = False
        self._closing = True
        self._call.cancel()
        self._wake_sender.set()
        tasks = [task for task in (self._reader, self._sender, self._sharing) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _await_memory(self, *, in_any_case: bool = False) -> ExpertdError | None:
        """Return when requests may be sent: at once, unless they may go through shared memory alone.

        in_any_case: when it is known whether there is memory. Returns what has ended the stream, if anything. Raises
        SharedMemoryError where there has to be memory and is none.
        """
        memory = self._memory
        if memory is not None and (memory.is_required or in_any_case):
            await self._memory_settled.wait()
        if self._end is not None:
            return copy.copy(self._end)
        if memory is not None and memory.is_required:
            memory.check()
        return None

    async def _send(self) -> None:
        try:
            while True:
                while self._to_send:
                    await self._call.write(self._to_send.pop(next(iter(self._to_send))))
                if not self._open and not self._pending:
                    await self._call.done_writing()
                    return
                self._wake_sender.clear()
                await self._wake_sender.wait()
        except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            # The call is over. The reader sees how it ended; a cancelled call shows in write() as CancelledError.
            return

    async def _read(self) -> None:
        end: ExpertdError = UnavailableError("the server ended the stream")
        try:
            while isinstance(data := await self._call.read(), bytes):  # and not grpc.aio.EOF
                self._deliver(*stream_outcome(data, self._request_id))
            if await self._call.code() is not grpc.StatusCode.OK:
                end = await error_from_aio(self._call, self._request_id)
        except grpc.RpcError:
            end = await error_from_aio(self._call, self._request_id)
        except asyncio.CancelledError:
            end = UnavailableError("the stream was cancelled")
        except ProtocolError as error:
            end = error
            self._call.cancel()
        finally:
            self._open = False
            self._close_rings()
            self._to_send.clear()
            for placed in self._placed.values():
                placed.give_up()  # the server may go on for a while, and never says when it is done
            self._placed.clear()
            self._memory = None
            end = self._ring_failure or end
            failure = ClosedError(CLOSED_IN_FLIGHT) if self._closing else stream_broken(end)
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_result(copy.copy(failure))
            self._pending.clear()
            self._end = failure
            self._memory_settled.set()
            self._wake_sender.set()

    def _deliver(self, number: int, outcome: Outcome | pb.RegionTicket) -> None:
        memory = self._memory
        if memory is not None and number == memory.request_id:
            self._sharing = asyncio.create_task(self._share(memory, outcome), name="expertd-region")
            return
        if isinstance(outcome, pb.RegionTicket):
            outcome = unasked_ticket()
        placed = self._placed.pop(number, None)
        if isinstance(outcome, UnavailableError):
            # This server starts or drains: new requests go on a new stream, which may reach another one.
            self._open = False
        answer = self._pending.get(number)
        if answer is not None and not answer.done():  # otherwise the caller has left
            if memory is not None and placed is not None and not isinstance(outcome, ExpertdError):
                outcome = memory.response(outcome, placed)
            answer.set_result(outcome)
        elif not isinstance(outcome, ExpertdError):
            self._on_unwanted(outcome)

    async def _share(self, memory: StreamMemory, answer: Outcome | pb.RegionTicket) -> None:
        await asyncio.to_thread(memory.take, answer)
        if memory.rings is not None:
            if self._end is None:
                self._rings = memory.rings
                asyncio.get_running_loop().add_reader(self._rings.bell_fd, self._rung)
                self._take_from_rings()  # which has the bell ring from then on
            else:
                memory.rings.close()
        self._memory_settled.set()

    def _rung(self) -> None:
        if self._rings is None:
            return
        if not self._rings.silence():  # the server ends the stream, and gRPC will say how
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._rings.bell_fd)
            loop.call_later(HUNG_UP_S, self._break, hung_up())
        self._take_from_rings()

    def _take_from_rings(self) -> None:
        """Every answer that is there."""
        try:
            while self._rings is not None and (data := self._rings.take()) is not None:
                self._deliver(*stream_outcome(data, self._request_id))
        except ProtocolError as error:
            self._break(error)

    def _break(self, failure: ProtocolError) -> None:
        """Have the stream end, unless it has."""
        if self._end is None and self._ring_failure is None:
            self._ring_failure = failure
            self._call.cancel()

    def _close_rings(self) -> None:
        """The stream is over: take what the server has answered before."""
        if self._rings is not None:
            if self._ring_failure is None:
                self._take_from_rings()
            asyncio.get_running_loop().remove_reader(self._rings.bell_fd)
            self._rings.close()
            self._rings = None


class AsyncUnaryTransport:
    """One Forward call for each request."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], new_metadata: NewMetadata) -> None:
        self._methods = itertools.cycle([channel.unary_unary(FORWARD, None, None) for channel in channels])
        self._new_metadata = new_metadata
        self._calls: set[Any] = set()
        self._closed = False

    async def forward(self, body: Encoded, deadline: float) -> Outcome:
        """See AsyncTransport."""
        if self._closed:
            raise ClosedError("the client is closed")
        metadata, request_id = self._new_metadata()
        timeout_s = deadline - asyncio.get_running_loop().time()
        call: Any = next(self._methods)(body.to_bytes(), timeout=timeout_s, metadata=metadata)
        self._calls.add(call)
        try:
            return unary_outcome(await call)
        except grpc.RpcError:
            return await error_from_aio(call, request_id)
        except ProtocolError as error:
            return error
        except asyncio.CancelledError:
            # gRPC raises this both when the caller's task is cancelled and when the call is, as close() does.
            if self._closed and not caller_is_cancelled():
                return ClosedError(CLOSED_IN_FLIGHT)
            raise
        finally:
            self._calls.discard(call)

    async def lend(self, nbytes: int) -> Bytes | None:
        """See AsyncTransport."""
        return None

    async def close(self) -> None:
        """See AsyncTransport."""
        self._closed = True
        for call in list(self._calls):
            call.cancel()


async def error_from_aio(call: Any, request_id: str | None) -> ExpertdError:
    """The error for a finished call of the asynchronous gRPC API."""
    code, message, trailers = await call.code(), await call.details(), await call.trailing_metadata()
    return error_from_trailers(code, message or "", tuple(trailers or ()), request_id=request_id)


def caller_is_cancelled() -> bool:
    """Whether the running task is being cancelled; otherwise a CancelledError came from a cancelled gRPC call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
