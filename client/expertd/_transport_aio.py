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
from expertd._plan import Part
from expertd._rings import HUNG_UP_S, StreamRings, hung_up
from expertd._shm import Placed, StreamMemory, WantedMemory
from expertd._standing import FIRST_STANDING_ID, STANDING_KEY, STOP_STANDING_ID, Standing, key_of
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

__all__ = [
    "AsyncStreamTransport",
    "AsyncTransport",
    "AsyncUnaryTransport",
    "AwaitedStanding",
    "caller_is_cancelled",
    "error_from_aio",
]


class AsyncTransport(Protocol):
    """Puts encoded requests on the wire. Cancelling a call of forward abandons the request."""

    async def forward(self, body: Encoded, deadline: float) -> Outcome:
        """Send one request and wait for its answer. deadline: on the loop's clock, for the server; the caller's own
        waiting is bounded by the caller. Raises ClosedError after close()."""

    def stand(self, part: Part, timeout_ms: int) -> AwaitedStanding | None:
        """A request to send over and over; None: not all of it lies where it could be sent without a copy."""

    async def lend(self, nbytes: int) -> Bytes | None:
        """[nbytes] uint8 of memory that is shared with the server, for the caller to keep; None: there is none, or none
        to spare. Waits until that is known.

        Raises SharedMemoryError, ClosedError, and what ended the stream meanwhile.
        """

    async def close(self) -> None:
        """Fail what is in flight with ClosedError, end all tasks."""


class AwaitedStanding(Standing["asyncio.Future[bytes | Outcome] | None"]):
    """A standing request whose answer is awaited, and the stream that it is sent on. settled: None while it is not."""

    __slots__ = ("on",)

    def __init__(  # noqa: PLR0917 (see Standing)
        self, stream: _Stream, request_id: int, part: Part, memory: StreamMemory, message: bytes, placed: Placed
    ) -> None:
        super().__init__(stream, request_id, part, memory, message, placed, None)
        self.on = stream


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

    def stand(self, part: Part, timeout_ms: int) -> AwaitedStanding | None:
        """See AsyncTransport."""
        streams = [stream for stream in self._streams if stream is not None]
        return next((each for stream in streams if (each := stream.stand(part, timeout_ms))), None)

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
        headers, self.request_id = metadata
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
        self._given_up: set[int] = set()
        """The abandoned ones among them."""
        self._standing: dict[bytes, AwaitedStanding] = {}
        """Those that are on the wire, by their keys."""
        self._standing_ids = itertools.count(FIRST_STANDING_ID)
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
        return len(self._pending) + len(self._standing)

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
            there = self._memory.place(request_id, body, left_ms, self._held())
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
            elif request_id in self._placed:  # the caller has left
                self._give_up(request_id)
            self._end_if_idle()

    def stand(self, part: Part, timeout_ms: int) -> AwaitedStanding | None:
        """As AsyncTransport's, in this stream's memory."""
        memory = self._memory
        if memory is None or self._rings is None or not self._open or not memory.holds(body := part.encode()):
            return None
        request_id = next(self._standing_ids)
        there = memory.place(request_id, body, timeout_ms, self._held())
        if there is None or not there[1].is_in_place:  # others are at it just now
            return None
        return AwaitedStanding(self, request_id, part, memory, *there)

    def send_standing(self, standing: AwaitedStanding) -> bool:
        """Send it; False: it has to go another way, now or for good. `settle_standing` must follow."""
        if not self._open or self._rings is None or self._given_up or standing.settled or not standing.may_be_sent:
            return False
        if not self._rings.put(standing.message):
            return False
        standing.settled = asyncio.get_running_loop().create_future()
        self._standing[standing.key] = standing
        return True

    async def settle_standing(self, standing: AwaitedStanding) -> bytes | Outcome:
        """What has come of one that was sent. Whoever cancels this cannot send it again."""
        assert standing.settled is not None, "send_standing"
        try:
            return await standing.settled
        finally:
            if self._standing.pop(standing.key, None) is not None:  # the caller has left
                self._placed[standing.request_id] = standing.placed
                self._give_up(standing.request_id)
                self._end_if_idle()
            else:
                standing.settled = None

    def retire(self) -> None:
        """See StandingStream."""
        self._open = False
        self._end_if_idle()

    def _held(self) -> list[Placed]:
        """The memory of all that was sent and not answered."""
        return [*self._placed.values(), *(standing.placed for standing in self._standing.values())]

    def _give_up(self, request_id: int) -> None:
        self._given_up.add(request_id)
        self._placed[request_id].give_up()

    def _end_if_idle(self) -> None:
        if not self._open and not self.in_flight:
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
                if not self._open and not self.in_flight:
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
                self._deliver_bytes(data)
            if await self._call.code() is not grpc.StatusCode.OK:
                end = await error_from_aio(self._call, self.request_id)
        except grpc.RpcError:
            end = await error_from_aio(self._call, self.request_id)
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
            self._given_up.clear()
            for standing in self._standing.values():
                standing.placed.give_up()
            self._memory = None
            end = self._ring_failure or end
            failure = ClosedError(CLOSED_IN_FLIGHT) if self._closing else stream_broken(end)
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_result(copy.copy(failure))
            self._pending.clear()
            while self._standing:
                self._settle(self._standing.popitem()[1], copy.copy(failure))
            self._end = failure
            self._memory_settled.set()
            self._wake_sender.set()

    def _deliver_bytes(self, data: bytes) -> None:
        standing = self._standing.pop(data[STANDING_KEY], None)
        if standing is None:
            self._deliver(*stream_outcome(data, self.request_id))
        else:
            self._settle(standing, data)

    def _settle(self, standing: AwaitedStanding, answer: bytes | Outcome) -> None:
        self._end_if_idle()
        if standing.settled is not None and not standing.settled.done():  # otherwise the caller has left
            standing.settled.set_result(answer)

    def _deliver(self, number: int, outcome: Outcome | pb.RegionTicket) -> None:
        memory = self._memory
        if memory is not None and number == memory.request_id:
            self._sharing = asyncio.create_task(self._share(memory, outcome), name="expertd-region")
            return
        if isinstance(outcome, pb.RegionTicket):
            outcome = unasked_ticket()
        if isinstance(outcome, UnavailableError):
            self.retire()
        if (
            FIRST_STANDING_ID <= number < STOP_STANDING_ID
            and (standing := self._standing.pop(key_of(number), None)) is not None
        ):
            self._settle(standing, outcome)  # in words that no server of this project chooses
            return
        placed = self._placed.pop(number, None)
        self._given_up.discard(number)
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
            loop.call_later(HUNG_UP_S, self.break_off, hung_up())
        self._take_from_rings()

    def _take_from_rings(self) -> None:
        """Every answer that is there."""
        try:
            while self._rings is not None and (data := self._rings.take()) is not None:
                self._deliver_bytes(data)
        except ProtocolError as error:
            self.break_off(error)

    def break_off(self, failure: ProtocolError) -> None:
        """See StandingStream."""
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

    def stand(self, part: Part, timeout_ms: int) -> AwaitedStanding | None:
        """See AsyncTransport."""
        return None

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
