"""The memory that one stream shares with its caller: what its messages say about it, resolved to views and checked.

What is checked must not change between the check and the use, and this memory is its owner's: whatever has values that
matter (ids, logits, weights) is copied before anybody looks at it. Hidden states may hold any bits, so they stay a view
and are read once, into the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from expertd.v1 import expertd_pb2 as pb
from expertd_server.errors import FieldViolation, InvalidArgumentError, RequestCancelledError, SharedMemoryOffError
from expertd_server.native import copy_bytes
from expertd_server.region_door import PROOF_BYTES, RegionDoor, RegionRefusedError
from expertd_server.ring_pair import RingPair, RingPlace
from expertd_server.wire_parse import RawRequest, RawSlice, RawStreamRequest, RawTensor, parse_stream_request

if TYPE_CHECKING:
    from expertd_server._codec import Request

__all__ = ["TENSORS", "AnswerPlace", "Lease", "RegionReply", "StreamRegions"]

Slice: TypeAlias = tuple[int, int, int]
"""Region, offset and nbytes of a RegionSlice."""

RegionReply = pb.RegionTicket | pb.RegionUnregistered
"""What a message about a region is answered with."""

_MAX_REGIONS: Final = 4
"""Of one stream; each holds a file descriptor."""
_ALIGNMENT: Final = 64
_MAX_FOUND: Final = 1024
"""Requests whose slices a stream remembers."""
TENSORS: Final = ("hidden_states", "routing_logits", "topk_ids", "topk_weights")
"""The tensors of a ForwardRequest, in the order of its fields."""

_LOGITS: Final = TENSORS.index("routing_logits")


@dataclass(eq=False, slots=True)
class _Region:
    number: int
    nbytes: int
    ticket: bytes
    rings: RingPlace | None = None
    """Where messages go through it, if they do."""
    view: memoryview | None = None
    """None: the memory was not handed in yet."""

    def let_go(self) -> None:
        """Unmap it, unless requests still need it."""
        self.view = None


@dataclass(eq=False, slots=True)
class _Piece:
    """Bytes of a region that a request holds."""

    field: str
    region: _Region
    start: int
    stop: int

    def overlaps(self, other: _Piece) -> bool:
        return self.region is other.region and self.start < other.stop and other.start < self.stop


@dataclass(eq=False, slots=True)
class _Found:
    """What the slices of a request stand for."""

    pieces: list[_Piece]
    views: list[tuple[int, memoryview]]
    """With the number of the tensor, or of the answer_slice."""
    place: tuple[int, int, memoryview] | None
    """Of the answer_slice: see `AnswerPlace`."""
    start: int
    stop: int


class AnswerPlace:
    """Where the tensors of one answer may be written: the caller's answer_slice."""

    def __init__(self, region: int, offset: int, view: memoryview) -> None:
        self._region = region
        self._offset = offset
        self._view = view
        self._next = 0

    def take(self, nbytes: int) -> tuple[memoryview, int, int, int] | None:
        """Room for the next tensor: memory, where in it, and the region and offset of its RegionSlice; None: none."""
        start = self._next
        if start + nbytes > len(self._view):
            return None
        self._next = -(-(start + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return self._view, start, self._region, self._offset + start

    def put(self, data: memoryview) -> tuple[int, int, int] | None:
        """Write the bytes of the next tensor; the fields of its RegionSlice, or None where it does not fit."""
        taken = self.take(data.nbytes)
        if taken is None:
            return None
        memory, start, region, offset = taken
        copy_bytes(memory, start, data)
        return region, offset, data.nbytes


def _span(pieces: list[_Piece]) -> tuple[int, int]:
    """Where the first begins and the last ends."""
    return min((piece.start for piece in pieces), default=0), max((piece.stop for piece in pieces), default=0)


class Lease:
    """The pieces of memory that a request holds until it is answered."""

    __slots__ = ("_regions", "pieces", "place", "start", "stop")

    def __init__(
        self, regions: StreamRegions, pieces: list[_Piece], start: int, stop: int, place: AnswerPlace | None
    ) -> None:
        """start, stop: before and behind all pieces."""
        self._regions = regions
        self.pieces = pieces
        self.start = start
        self.stop = stop
        self.place = place
        """None: the answer's tensors go into its message."""

    def release(self) -> None:
        """The caller may have its memory back: to be called before the answer is sent."""
        self.place = None
        self._regions.release(self)


class StreamRegions:
    """The regions of one stream. Thread-safe.

    door: where memory is handed in; None: the server takes none. max_bytes: most of all regions together.
    copies_logits: whether what is checked of them must not change any more. Of hidden states any bits will do; ids and
    weights, which are small, are copied in any case. max_copied_bytes: most that any tensor but hidden states may have:
    no more is copied, however much a slice says.
    """

    def __init__(
        self, door: RegionDoor | None, max_bytes: int, *, copies_logits: bool = True, max_copied_bytes: int = 0
    ) -> None:
        self._door = door
        self._max_copied_bytes = max_copied_bytes
        self._first_copied = _LOGITS if copies_logits else _LOGITS + 1
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._regions: dict[int, _Region] = {}
        self._leases: set[Lease] = set()
        self._found: dict[tuple[Slice | None, ...], _Found] = {}
        """What slices were found to stand for: callers use the same memory again and again."""
        self._is_closed = False

    def obey(self, message: RawStreamRequest, on_rings: Callable[[RingPair], object]) -> RegionReply:
        """Do what a message about a region says. Raises InvalidArgumentError and SharedMemoryOffError.

        on_rings: is given the rings that the caller has asked for, in the door's thread, when the memory is handed in.
        """
        if message.request is not None or (message.register_region and message.unregister_region):
            raise InvalidArgumentError.of(
                "register_region", "is not alone, expected one of request, register_region and unregister_region"
            )
        if message.register_region is not None:
            return self._register(message.register_region, on_rings)
        assert message.unregister_region is not None
        return self._unregister(message.unregister_region.region)

    def lease(self, request: RawRequest | Request) -> Lease | None:
        """Turn the slices of a request into data, and hold the pieces until the lease is released; None: it has none.

        Raises InvalidArgumentError, with a violation for every slice that is wrong.
        """
        if isinstance(request, RawRequest):
            tensors = [(name, tensor) for name in TENSORS if (tensor := getattr(request, name)) is not None]
            if request.answer_slice is None and all(tensor.slice is None for _, tensor in tensors):
                return None
            with self._lock:
                return self._lease_raw(request, tensors)
        slices = request.slices
        if slices is None:
            return None
        with self._lock:
            lease = self._lease_good(request, slices)
            if lease is not None:
                return lease
            # Something is wrong: Python reads the request anew, and says what.
            raw = parse_stream_request(request.data).request
            assert raw is not None, "else it were no Request"
            self._lease_raw(raw, [(name, tensor) for name in TENSORS if (tensor := getattr(raw, name)) is not None])
        raise AssertionError("both agree on what is wrong")

    def _lease_good(self, request: Request, slices: tuple[Slice | None, ...]) -> Lease | None:
        """Under the lock; None: something is wrong, and nothing has happened."""
        found = self._found.get(slices) or self._find(slices)
        if found is None:
            return None
        for _ in self._clashes(found.pieces, found.start, found.stop):
            return None
        for number, view in found.views:
            matters = self._first_copied <= number < len(TENSORS)
            request.bind(number, bytes(view) if matters else view)
        place = None if found.place is None else AnswerPlace(*found.place)
        lease = Lease(self, found.pieces, found.start, found.stop, place)
        self._leases.add(lease)
        return lease

    def _find(self, slices: tuple[Slice | None, ...]) -> _Found | None:
        """Under the lock; None: something is wrong."""
        pieces: list[_Piece] = []
        views: list[tuple[int, memoryview]] = []
        place = None
        for number, where in enumerate(slices):
            if where is None:
                continue
            name, offset, nbytes = where
            region, stop = self._regions.get(name), offset + nbytes
            if region is None or region.view is None or stop > region.nbytes:
                return None
            if _LOGITS <= number < len(TENSORS) and nbytes > self._max_copied_bytes:
                return None
            view = region.view[offset:stop]
            if number < len(TENSORS):
                pieces.append(_Piece(f"{TENSORS[number]}.slice", region, offset, stop))
                views.append((number, view))
                continue
            pieces.append(_Piece("answer_slice", region, offset, stop))
            views.append((number, view))
            place = name, offset, view
        if len(self._found) >= _MAX_FOUND:
            self._found.clear()
        found = self._found[slices] = _Found(pieces, views, place, *_span(pieces))
        return found

    def _lease_raw(self, request: RawRequest, tensors: list[tuple[str, RawTensor]]) -> Lease:
        """Under the lock."""
        wrong: list[FieldViolation] = []
        place = None
        pieces: list[_Piece] = []
        for name, tensor in tensors:
            if tensor.slice is None:
                continue
            if len(tensor.data):
                wrong.append(FieldViolation(f"{name}.slice", "is given together with data, expected one of them"))
                continue
            most_nbytes = None if name == "hidden_states" else self._max_copied_bytes
            view = self._piece(f"{name}.slice", tensor.slice, pieces, wrong, most_nbytes)
            if view is not None:
                tensor.data = view if name == "hidden_states" else bytes(view)
                tensor.is_resolved = True
        if request.answer_slice is not None:
            view = self._piece("answer_slice", request.answer_slice, pieces, wrong)
            if view is not None:
                place = AnswerPlace(request.answer_slice.region, request.answer_slice.offset, view)
            request.answer_slice = None
        start, stop = _span(pieces)
        wrong += self._clashes(pieces, start, stop)
        if wrong:
            raise InvalidArgumentError(wrong)
        lease = Lease(self, pieces, start, stop, place)
        self._leases.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """See `Lease.release`."""
        with self._lock:
            self._leases.discard(lease)

    def close(self) -> None:
        """The stream is over. The memory stays mapped until the last batch that reads from it has run."""
        with self._lock:
            self._is_closed = True
            regions = list(self._regions.values())
            self._regions.clear()
            self._leases.clear()
            self._found.clear()
        for region in regions:
            self._forget(region)

    def _register(self, asked: pb.RegisterRegion, on_rings: Callable[[RingPair], object]) -> pb.RegionTicket:
        if self._door is None:
            raise SharedMemoryOffError("this server shares no memory (shared_memory is off); send the tensors' data")
        number, nbytes = asked.region, asked.nbytes
        rings = RingPlace.asked_for(asked)
        with self._lock:
            if self._is_closed:
                raise RequestCancelledError("the caller left")
            taken = sum(region.nbytes for region in self._regions.values())
            if number in self._regions:
                raise InvalidArgumentError.of("register_region.region", f"is {number}, which this stream has already")
            if len(self._regions) >= _MAX_REGIONS:
                raise InvalidArgumentError.of(
                    "register_region", f"is one too many: {_MAX_REGIONS} regions of this stream are registered"
                )
            if not PROOF_BYTES <= nbytes <= self._max_bytes - taken:
                raise InvalidArgumentError.of(
                    "register_region.nbytes",
                    f"is {nbytes} beside {taken} bytes of other regions, expected at least {PROOF_BYTES} and together "
                    f"at most {self._max_bytes} (max_region_bytes)",
                )
            if rings is not None and any(region.rings is not None for region in self._regions.values()):
                raise InvalidArgumentError.of("register_region.rings", "are a second pair, expected one on a stream")
            region = _Region(number, nbytes, b"", rings)
            region.ticket = self._door.expect(nbytes, lambda view: self._handed_in(region, view, on_rings))
            self._regions[number] = region
        return pb.RegionTicket(socket=self._door.address, ticket=region.ticket)

    def _handed_in(self, region: _Region, view: memoryview, on_rings: Callable[[RingPair], object]) -> tuple[int, ...]:
        """In the door's thread; the file descriptors that the caller gets."""
        with self._lock:
            if self._is_closed or self._regions.get(region.number) is not region:
                raise RegionRefusedError("the stream has ended, or gave the region up")
            region.view = view
        if region.rings is None:
            return ()
        pair, fds = region.rings.open(view)
        if pair is not None:
            on_rings(pair)
        return fds

    def _unregister(self, number: int) -> pb.RegionUnregistered:
        with self._lock:
            region = self._regions.get(number)
            if region is None:
                raise InvalidArgumentError.of(
                    "unregister_region.region", f"is {number}, which this stream does not have"
                )
            if region.rings is not None and region.view is not None:
                raise InvalidArgumentError.of(
                    "unregister_region.region", f"is {number}, whose rings last as long as the stream"
                )
            del self._regions[number]
            self._found.clear()
        self._forget(region)
        return pb.RegionUnregistered()

    def _forget(self, region: _Region) -> None:
        assert self._door is not None, "else there were no region"
        self._door.forget(region.ticket, region.let_go)

    def _piece(
        self,
        field: str,
        raw: RawSlice,
        pieces: list[_Piece],
        wrong: list[FieldViolation],
        most_nbytes: int | None = None,
    ) -> memoryview | None:
        region = self._regions.get(raw.region)
        if region is None or region.view is None:
            what = "does not have" if region is None else "has registered but not handed in"
            wrong.append(FieldViolation(f"{field}.region", f"is {raw.region}, which this stream {what}"))
            return None
        stop = raw.offset + raw.nbytes
        if stop > region.nbytes:
            wrong.append(
                FieldViolation(
                    field,
                    f"is bytes {raw.offset} to {stop} of region {raw.region}, which has {region.nbytes}",
                )
            )
            return None
        if most_nbytes is not None and raw.nbytes > most_nbytes:
            wrong.append(FieldViolation(field, f"is {raw.nbytes} bytes, more than {most_nbytes}, which no batch has"))
            return None
        pieces.append(_Piece(field, region, raw.offset, stop))
        return region.view[raw.offset : stop]

    def _clashes(self, pieces: list[_Piece], start: int, stop: int) -> Iterator[FieldViolation]:
        """An answer would be written over what another request still holds, or the other way round.

        start, stop: before and behind all pieces.
        """
        for lease in self._leases:
            if lease.stop <= start or stop <= lease.start:  # almost always, and then this is all there is to do
                continue
            for mine in pieces:
                for theirs in lease.pieces:
                    if "answer_slice" in (mine.field, theirs.field) and mine.overlaps(theirs):
                        yield FieldViolation(
                            mine.field,
                            f"overlaps {theirs.field} of a request that is not answered yet, bytes {theirs.start} to "
                            f"{theirs.stop} of region {theirs.region.number}",
                        )
