"""How the synchronous client puts requests on the wire: on long-lived streams, or as one call each.

A transport takes an encoded request and a callback. The callback comes exactly once, from a thread of the transport,
unless the request is abandoned first.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

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
from expertd._ring_reader import RingReader
from expertd._rings import StreamRings
from expertd._shm import Placed, StreamMemory, WantedMemory
from expertd._standing import FIRST_STANDING_ID, STANDING_KEY, STOP_STANDING_ID, Standing, key_of
from expertd._wire import Encoded, encode_stream_request
from expertd._wire_read import Response
from expertd.errors import (
    ClosedError,
    ExpertdError,
    ProtocolError,
    TimeoutError,
    UnavailableError,
    error_from_rpc,
    stream_broken,
)
from expertd.v1 import expertd_pb2 as pb

__all__ = ["OnDone", "QueuedStanding", "Settled", "Slots", "StreamTransport", "Ticket", "Transport", "UnaryTransport"]

OnDone: TypeAlias = Callable[[Outcome], None]
Settled: TypeAlias = "queue.SimpleQueue[bytes | Outcome]"

_JOIN_TIMEOUT_S = 5.0


class Ticket(Protocol):
    """A request on the wire."""

    def abandon(self) -> None:
        """Forget the request: its place is free at once and its answer, should it still come, is dropped."""

    def read_for(self, settled: queue.SimpleQueue[Any], until_s: float) -> None:
        """Do in this thread what makes its answer come, if there is such a thing: see `RingReader.read_for`."""


class Transport(Protocol):
    """Puts encoded requests on the wire. Thread-safe."""

    def submit(self, body: Encoded, deadline: float, on_done: OnDone, *, reads: bool = False) -> Ticket:
        """Send one request. deadline: on time.monotonic(). Waits for a place among max_in_flight.

        reads: whether the caller will wait for nothing else before its ticket's `read_for`.
        Raises TimeoutError when no place was free by the deadline, ClosedError after close().
        """

    def stand(self, part: Part, timeout_ms: int, settled: Settled) -> QueuedStanding | None:
        """A request to send over and over, whose answers come in `settled`; None: not all of it lies where it could be
        sent without a copy. Never waits.
        """

    def lend(self, nbytes: int, deadline: float) -> Bytes | None:
        """[nbytes] uint8 of memory that is shared with the server, for the caller to keep; None: there is none, or none
        to spare. Waits until that is known.

        Raises TimeoutError, SharedMemoryError, ClosedError, and what ended the stream meanwhile.
        """

    def close(self) -> None:
        """Fail what is in flight with ClosedError, stop all threads."""


class QueuedStanding(Standing[Settled]):
    """A standing request whose answer comes in a queue, and the stream that it is sent on."""

    __slots__ = ("on",)

    def __init__(self, stream: _Stream, *what: Any) -> None:
        super().__init__(stream, *what)
        self.on = stream


class Slots:
    """The places on the wire. What bounds the memory of a client, however slow its reader."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = count
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0

    def acquire(self, deadline: float, before_waiting: Callable[[], object] | None = None) -> None:
        """Take a place. Raises TimeoutError when none was free by the deadline, ClosedError after close()."""
        with self._lock:
            if not self._free and not self._closed:
                if before_waiting is not None:
                    before_waiting()
                self._num_waiting += 1
                try:
                    self._changed.wait_for(lambda: self._closed or self._free > 0, deadline - time.monotonic())
                finally:
                    self._num_waiting -= 1
            if self._closed:
                raise ClosedError("the client is closed")
            if self._free == 0:
                raise TimeoutError(
                    f"all {self._count} places were taken until the deadline; raise max_in_flight or send less"
                )
            self._free -= 1

    def acquire_now(self) -> bool:
        """Take a place, if one is free and nobody waits for it."""
        with self._lock:
            if self._closed or self._free <= self._num_waiting:
                return False
            self._free -= 1
            return True

    def release(self) -> None:
        """Give a place back."""
        with self._lock:
            self._free += 1
            if self._num_waiting:
                self._changed.notify()

    def close(self) -> None:
        """Wake everyone who waits."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()


class StreamTransport:
    """One ForwardStream on each channel, opened when needed and again when it broke.

    on_unwanted: takes answers to requests that were abandoned. wanted_memory: to share on each stream; None: none.
    """

    def __init__(
        self,
        channels: list[grpc.Channel],
        slots: Slots,
        new_metadata: NewMetadata,
        on_unwanted: Callable[[Response], None],
        wanted_memory: WantedMemory | None = None,
    ) -> None:
        self._methods = [channel.stream_stream(FORWARD_STREAM, None, None) for channel in channels]
        self._slots = slots
        self._new_metadata = new_metadata
        self._on_unwanted = on_unwanted
        self._wanted_memory = wanted_memory
        self._lock = threading.Lock()
        self._streams: list[_Stream | None] = [None] * len(channels)
        self._retiring: list[_Stream] = []
        self._closed = False

    def submit(self, body: Encoded, deadline: float, on_done: OnDone, *, reads: bool = False) -> Ticket:
        """See Transport."""
        self._slots.acquire(deadline, self._have_read)
        try:
            while True:
                stream = self._least_loaded()
                failure = stream.await_memory(deadline)
                if failure is not None:
                    self._slots.release()
                    on_done(failure)
                    return _OverTicket()
                ticket = stream.send(body, timeout_ms(deadline - time.monotonic()), on_done, reads)
                if ticket is not None:
                    return ticket
                if stream.end is not None:  # the next one may end as soon: when to try again is the caller's to say
                    self._slots.release()
                    on_done(copy.copy(stream.end))
                    return _OverTicket()
        except BaseException:
            self._slots.release()
            raise

    def stand(self, part: Part, timeout_ms: int, settled: Settled) -> QueuedStanding | None:
        """See Transport."""
        with self._lock:
            streams = [stream for stream in self._streams if stream is not None]
        return next((each for stream in streams if (each := stream.stand(part, timeout_ms, settled))), None)

    def lend(self, nbytes: int, deadline: float) -> Bytes | None:
        """See Transport."""
        return self._least_loaded().lend(nbytes, deadline)

    def close(self) -> None:
        """See Transport."""
        with self._lock:
            self._closed = True
            streams = [*self._retiring, *(stream for stream in self._streams if stream is not None)]
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join()

    def _have_read(self) -> None:
        """Places become free when answers are taken, and whoever has promised to take some may not be at it yet."""
        with self._lock:
            streams = [*self._retiring, *(stream for stream in self._streams if stream is not None)]
        for stream in streams:
            stream.have_read(everything=True)

    def _least_loaded(self) -> _Stream:
        with self._lock:
            if self._closed:
                raise ClosedError("the client is closed")
            loads = [0 if stream is None or not stream.is_open else stream.in_flight for stream in self._streams]
            index = loads.index(min(loads))
            stream = self._streams[index]
            if stream is None or not stream.is_open:
                # A retiring stream still has answers to deliver; a finished one may be forgotten.
                self._retiring = [old for old in (*self._retiring, stream) if old is not None and old.is_alive]
                stream = self._streams[index] = _Stream(
                    self._methods[index],
                    self._slots,
                    self._new_metadata(),
                    self._on_unwanted,
                    self._wanted_memory,
                )
            return stream


class _Stream:
    """One open ForwardStream: a sender (gRPC's own thread, through _requests) and a reader thread.

    With rings whoever sends a request puts it in, and a thread takes answers out. gRPC says when the stream is over.
    """

    def __init__(
        self,
        method: grpc.StreamStreamMultiCallable[bytes, bytes],
        slots: Slots,
        metadata: tuple[Metadata, str | None],
        on_unwanted: Callable[[Response], None],
        wanted_memory: WantedMemory | None,
    ) -> None:
        self._acquire_now = slots.acquire_now
        self._release = slots.release
        headers, self.request_id = metadata
        self._on_unwanted = on_unwanted
        self._lock = threading.Lock()
        self._sendable = threading.Condition(self._lock)
        self._to_send: dict[int, bytes] = {}
        self._pending: dict[int, OnDone] = {}
        self._ids = itertools.count(1)
        self._standing: dict[bytes, QueuedStanding] = {}
        """Those that are on the wire, by their keys. What takes one out needs no lock."""
        self._standing_ids = itertools.count(FIRST_STANDING_ID)
        self._awaited: set[QueuedStanding] = set()
        """Those whose callers wait, and do not read."""
        self._memory: StreamMemory | None = None
        self._memory_settled = threading.Event()
        self._placed: dict[int, Placed] = {}
        """Memory of requests that were sent and not answered, abandoned ones too: the server may be at it."""
        self._given_up: set[int] = set()
        """The abandoned ones among them."""
        self._rings: RingReader | None = None
        self._ring_failure: ExpertdError | None = None
        self._is_over = False
        """gRPC has said how the stream has ended; no rings are opened any more."""
        self._end: ExpertdError | None = None
        if wanted_memory is not None:
            self._memory = StreamMemory(wanted_memory, next(self._ids))
            if self._memory.is_settled:
                self._memory_settled.set()
            else:
                self._to_send[self._memory.request_id] = self._memory.opening()
        self._open = True
        self._closing = False
        self._call: Any = method(self._requests(), metadata=headers)
        self._reader = threading.Thread(target=self._read, name="expertd-stream-reader", daemon=True)
        self._reader.start()

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._open

    @property
    def is_alive(self) -> bool:
        """Whether answers may still come."""
        return self._reader.is_alive()

    @property
    def end(self) -> ExpertdError | None:
        """What ended it; None: answers may still come."""
        return self._end

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._pending) + len(self._standing)

    def await_memory(self, deadline: float, *, in_any_case: bool = False) -> ExpertdError | None:
        """Return when requests may be sent: at once, unless they may go through shared memory alone.

        in_any_case: when it is known whether there is memory. Returns what ended the stream meanwhile, if anything.
        Raises SharedMemoryError where there has to be memory and is none, and TimeoutError.
        """
        memory = self._memory
        if memory is None or not (memory.is_required or in_any_case):
            return None
        if not self._memory_settled.wait(deadline - time.monotonic()):
            raise TimeoutError("the server had not taken the shared memory by the deadline")
        if self._end is not None:
            return copy.copy(self._end)
        if memory.is_required:
            memory.check()
        return None

    def lend(self, nbytes: int, deadline: float) -> Bytes | None:
        """See Transport."""
        memory = self._memory
        failure = self.await_memory(deadline, in_any_case=True)
        if memory is None:  # it goes with the stream
            failure = copy.copy(self._end)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it knows this frame: leave no cycle
        return None if memory is None else memory.lend(nbytes)

    def send(self, body: Encoded, timeout_ms: int, on_done: OnDone, reads: bool) -> Ticket | None:
        """Queue a request; None when the stream takes no more. The queue is bounded by the places (Slots)."""
        request_id = next(self._ids)
        # Encoding copies the tensors: not under the lock, where it would hold up the reader.
        memory, placed = self._memory, None
        there = None if memory is None else memory.place(request_id, body, timeout_ms, self._held())
        if there is None:
            message = encode_stream_request(request_id, body, timeout_ms)
        else:
            message, placed = there
        with self._lock:
            if not self._open:
                return None
            if placed is not None:
                self._placed[request_id] = placed
            self._pending[request_id] = on_done
            if self._rings is None or not self._rings.put(message):
                self._to_send[request_id] = message
                self._sendable.notify()
        if not reads:
            self.have_read()
        return _StreamTicket(self, request_id)

    def stand(self, part: Part, timeout_ms: int, settled: Settled) -> QueuedStanding | None:
        """As Transport's, in this stream's memory."""
        memory = self._memory
        if memory is None or self._rings is None or not self._open or not memory.holds(body := part.encode()):
            return None
        request_id = next(self._standing_ids)
        there = memory.place(request_id, body, timeout_ms, self._held())
        if there is None or not there[1].is_in_place:  # others are at it just now
            return None
        return QueuedStanding(self, request_id, part, memory, *there, settled)

    def send_standing(self, standing: QueuedStanding) -> bool:
        """Send it; False: it has to go another way, now or for good. One that is on the wire must not be sent."""
        if self._given_up or not standing.may_be_sent or not self._acquire_now():
            return False
        with self._lock:
            if self._open and (rings := self._rings) is not None:
                self._standing[standing.key] = standing
                if rings.put(standing.message):
                    return True
                del self._standing[standing.key]
        self._release()
        return False

    def settle_standing(self, standing: QueuedStanding, until_s: float) -> bytes | Outcome | None:
        """What has come of one that was sent: waits for it, and takes answers as they come. None: until_s, on
        time.monotonic(), has come before."""
        settled = standing.settled
        rings = self._rings
        if settled.empty() and rings is not None:
            rings.read_for(settled, until_s)
        if not settled.empty():
            return settled.get_nowait()
        self._awaited.add(standing)
        try:
            if rings is not None:
                rings.need()
            return settled.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            return None
        finally:
            self._awaited.discard(standing)

    def abandon_standing(self, standing: QueuedStanding) -> None:
        """Forget that it was sent; it cannot be sent again. Of no effect when its answer is there."""
        with self._lock:
            if self._standing.pop(standing.key, None) is None:
                return
            self._awaited.discard(standing)
            self._placed[standing.request_id] = standing.placed
            self._give_up(standing.request_id)
            self._end_if_idle()
        self._release()
        self.have_read()

    def abandon(self, request_id: int) -> None:
        """See Ticket. A request that still waits to be sent is not sent at all."""
        with self._lock:
            if self._pending.pop(request_id, None) is None:
                return
            if self._to_send.pop(request_id, None) is not None:
                self._placed.pop(request_id, None)
            else:
                self._give_up(request_id)
            self._end_if_idle()
        self._release()
        self.have_read()  # the memory is free again when its answer was taken

    def have_read(self, *, everything: bool = False) -> None:
        """Answers are awaited, and not by who takes them itself. everything: those, too, whose callers will."""
        rings = self._rings
        if rings is not None:
            if everything:
                self._awaited.update(list(self._standing.values()))
            rings.need()

    def _held(self) -> list[Placed]:
        """The memory of all that was sent and not answered."""
        return [*list(self._placed.values()), *(standing.placed for standing in list(self._standing.values()))]

    def _give_up(self, request_id: int) -> None:
        """Under the lock."""
        if (placed := self._placed.get(request_id)) is not None:
            self._given_up.add(request_id)
            placed.give_up()

    def retire(self) -> None:
        """See StandingStream."""
        with self._lock:
            self._open = False
            self._end_if_idle()

    def read_for(self, settled: queue.SimpleQueue[Any], until_s: float) -> None:
        """See Ticket."""
        rings = self._rings
        if rings is not None:
            rings.read_for(settled, until_s)

    def close(self) -> None:
        """Take no more requests and end the call; the reader then fails what is in flight."""
        with self._lock:
            self._open = False
            self._closing = True
            self._sendable.notify()
        call = self._call
        if call is not None:
            call.cancel()

    def join(self) -> None:
        """Wait for the reader to end, and let go of the call.

        A call that is let go of only when the interpreter ends takes a lock then, which a thread of gRPC's may have
        held when the interpreter stopped it: the process would never end.
        """
        self._reader.join(_JOIN_TIMEOUT_S)
        if not self._reader.is_alive():
            self._call = None

    def _requests(self) -> Iterator[bytes]:
        while True:
            with self._lock:
                # Ends the call's sending side when the stream is retired and every answer is there, or broken.
                self._sendable.wait_for(lambda: self._to_send or (not self._open and not self.in_flight))
                if not self._to_send:
                    return
                message = self._to_send.pop(next(iter(self._to_send)))
            yield message
            del message  # the next wait may be long, and the message large

    def _end_if_idle(self) -> None:
        """Under the lock. Wakes the sender for nothing else: with the stream open that would cost every answer."""
        if not self._open and not self.in_flight:
            self._sendable.notify()

    def _read(self) -> None:
        end: ExpertdError = UnavailableError("the server ended the stream")
        try:
            for data in self._call:
                self._deliver_bytes(data)
                if self._rings is not None:
                    self._rings.look()
        except grpc.RpcError as error:
            end = error_from_rpc(self._call, request_id=self.request_id)
            error.with_traceback(None)  # it is the call itself, whose frames know it: leave no cycle, see join
        except ProtocolError as error:
            end = error
            self._call.cancel()
        finally:
            self._finish_rings()
            end = self._ring_failure or end
            self._fail_all(ClosedError(CLOSED_IN_FLIGHT) if self._closing else stream_broken(end))

    def _fail_all(self, failure: ExpertdError) -> None:
        with self._lock:
            self._open = False
            pending, self._pending = self._pending, {}
            self._to_send.clear()
            for placed in self._placed.values():
                placed.give_up()  # the server may go on for a while, and never says when it is done
            self._placed.clear()
            self._given_up.clear()
            standing = []
            self._awaited.clear()
            while self._standing:
                standing.append(self._standing.popitem()[1])
            for each in standing:
                each.placed.give_up()
            self._end = failure
            self._memory = None
            self._memory_settled.set()
            self._sendable.notify()
        for on_done in pending.values():
            self._release()
            on_done(copy.copy(failure))  # an exception carries the traceback of the one caller that raises it
        for each in standing:
            self._release()
            each.settled.put(copy.copy(failure))

    def _deliver_bytes(self, data: bytes) -> None:
        standing = self._standing.pop(data[STANDING_KEY], None)
        if standing is None:
            self._deliver(*stream_outcome(data, self.request_id))
        else:
            self._deliver_standing(standing, data)

    def _deliver_standing(self, standing: QueuedStanding, answer: bytes | Outcome) -> None:
        self._awaited.discard(standing)
        if not self._open:
            with self._lock:
                self._end_if_idle()
        self._release()
        standing.settled.put(answer)

    def _deliver(self, number: int, outcome: Outcome | pb.RegionTicket) -> None:
        memory = self._memory
        if memory is not None and number == memory.request_id:
            # Not here: it may take its time, and answers must not wait for it.
            threading.Thread(target=self._share, args=(memory, outcome), name="expertd-region", daemon=True).start()
            return
        if isinstance(outcome, pb.RegionTicket):
            outcome = unasked_ticket()
        if isinstance(outcome, UnavailableError):
            self.retire()
        if (
            FIRST_STANDING_ID <= number < STOP_STANDING_ID
            and (standing := self._standing.pop(key_of(number), None)) is not None
        ):
            self._deliver_standing(standing, outcome)  # in words that no server of this project chooses
            return
        with self._lock:
            placed = self._placed.pop(number, None)
            self._given_up.discard(number)
            on_done = self._pending.pop(number, None)
            self._end_if_idle()
        if on_done is not None:  # None: abandoned
            if memory is not None and placed is not None and not isinstance(outcome, ExpertdError):
                outcome = memory.response(outcome, placed)
            self._release()
            on_done(outcome)
        elif not isinstance(outcome, ExpertdError):
            self._on_unwanted(outcome)

    def _share(self, memory: StreamMemory, answer: Outcome | pb.RegionTicket) -> None:
        memory.take(answer)
        if memory.rings is not None:
            self._open_rings(memory.rings)
        self._memory_settled.set()

    def _open_rings(self, rings: StreamRings) -> None:
        with self._lock:
            if not self._is_over:
                with contextlib.suppress(OSError):  # no file descriptor is left: messages go on over gRPC
                    self._rings = RingReader(rings, self._deliver_bytes, self._is_awaited, self.break_off)
                    return
        rings.close()

    def _is_awaited(self) -> bool:
        return bool(self._pending or self._placed or self._awaited)

    def _finish_rings(self) -> None:
        """The stream is over: take what the server has answered before, and nothing from then on."""
        with self._lock:
            self._is_over = True
            rings, self._rings = self._rings, None
        if rings is not None:
            rings.finish()

    def break_off(self, failure: ExpertdError) -> None:
        """See StandingStream."""
        self._ring_failure = failure
        self._call.cancel()


class _OverTicket:
    __slots__ = ()

    def abandon(self) -> None:
        """See Ticket."""

    def read_for(self, settled: queue.SimpleQueue[Any], until_s: float) -> None:
        """See Ticket."""


class _StreamTicket:
    __slots__ = ("_request_id", "_stream")

    def __init__(self, stream: _Stream, request_id: int) -> None:
        self._stream = stream
        self._request_id = request_id

    def abandon(self) -> None:
        """See Ticket."""
        self._stream.abandon(self._request_id)

    def read_for(self, settled: queue.SimpleQueue[Any], until_s: float) -> None:
        """See Ticket."""
        self._stream.read_for(settled, until_s)


class UnaryTransport:
    """One Forward call for each request."""

    def __init__(self, channels: list[grpc.Channel], slots: Slots, new_metadata: NewMetadata) -> None:
        self._methods = [channel.unary_unary(FORWARD, None, None) for channel in channels]
        self._slots = slots
        self._new_metadata = new_metadata
        self._lock = threading.Lock()
        self._turn = 0
        self._closed = False
        self._calls: set[Any] = set()

    def submit(self, body: Encoded, deadline: float, on_done: OnDone, *, reads: bool = False) -> Ticket:
        """See Transport."""
        self._slots.acquire(deadline)
        try:
            metadata, request_id = self._new_metadata()
            message = body.to_bytes()
            with self._lock:
                if self._closed:
                    raise ClosedError("the client is closed")
                self._turn += 1
                method = self._methods[self._turn % len(self._methods)]
                call: Any = method.future(message, timeout=deadline - time.monotonic(), metadata=metadata)
                self._calls.add(call)
        except BaseException:
            self._slots.release()
            raise
        call.add_done_callback(lambda done: self._finish(done, request_id, on_done))
        return _UnaryTicket(call)

    def stand(self, part: Part, timeout_ms: int, settled: Settled) -> QueuedStanding | None:
        """See Transport."""
        return None

    def lend(self, nbytes: int, deadline: float) -> Bytes | None:
        """See Transport."""
        return None

    def close(self) -> None:
        """See Transport."""
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _finish(self, call: Any, request_id: str | None, on_done: OnDone) -> None:
        with self._lock:
            self._calls.discard(call)
        self._slots.release()
        on_done(self._outcome(call, request_id))

    def _outcome(self, call: Any, request_id: str | None) -> Outcome:
        if call.code() is grpc.StatusCode.OK:
            try:
                return unary_outcome(call.result())
            except ProtocolError as error:
                return error
        if self._closed:
            return ClosedError(CLOSED_IN_FLIGHT)
        return error_from_rpc(call, request_id=request_id)


class _UnaryTicket:
    __slots__ = ("_call",)

    def __init__(self, call: Any) -> None:
        self._call = call

    def abandon(self) -> None:
        """See Ticket."""
        self._call.cancel()

    def read_for(self, settled: queue.SimpleQueue[Any], until_s: float) -> None:
        """See Ticket."""
