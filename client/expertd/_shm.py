"""Tensors through memory that a stream shares with a server on the same machine; the proto's RegisterRegion says how.

A stream asks for it with its first message and goes on with bytes until it is granted, so nobody waits for it unless
transport="shm" says so. A request whose tensors find no room in the memory goes by bytes too.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from expertd._arena import MIN_ARENA_BYTES, Arena, Bytes, Piece, aligned
from expertd._pages import SharedPages
from expertd._rings import StreamRings, num_slots, rings_end, wanted_rings
from expertd._wire import Encoded, encode_placed_request
from expertd._wire_read import TENSOR_FIELDS, Answer, AnswerTensor, Response, answer_of
from expertd.errors import ExpertdError, ProtocolError, SharedMemoryError
from expertd.tensors import WireTensor
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Placed", "StreamMemory", "WantedMemory"]

log = logging.getLogger("expertd.client")

_REGION: Final = 1  # the number of a stream's only region
_PROOF_BYTES: Final = 16
_HAND_IN_S: Final = 5.0
_MAX_REASON_BYTES: Final = 1024
_MAX_FDS: Final = 2
_SOCKET_PREFIX: Final = "expertd-regions-"


@dataclass(slots=True)
class WantedMemory:
    """What a client wants of its streams; says once what becomes of it."""

    target: str
    nbytes: int
    """Most bytes to share on each stream."""
    is_required: bool
    """Whether to fail without it (transport="shm")."""
    max_in_flight: int = 1
    """Of its requests."""
    limit: int = 0
    """Most bytes that the server takes, as it last said; 0: none, or it did not say yet."""
    _said: set[str] = field(default_factory=set)

    def say(self, what: str) -> None:
        """Log a line, unless it is that of before."""
        if what not in self._said:
            self._said.add(what)
            log.info("%s: %s", self.target, what)


class Placed:
    """The memory of one request, which is the server's until the request is answered or the stream has ended."""

    def __init__(
        self, arena: Arena, piece: Piece | None, out: tuple[int, Bytes] | None, inputs: list[tuple[int, Bytes]]
    ) -> None:
        """piece: what was taken for tensors that do not lie in the arena already; None: all do. out, inputs: offset and
        bytes of those that do: where the answer's output goes (None: into the piece), and what is read.
        """
        self._arena = arena
        self._piece = piece
        self._out = out
        self._inputs = inputs
        self._is_given_up = False
        if out is not None:
            self.offset, self.nbytes = out[0], out[1].nbytes
        else:
            assert piece is not None, "the answer has to go somewhere"
            self.offset, self.nbytes = piece.offset, piece.nbytes

    @property
    def is_out(self) -> bool:
        """Whether the answer goes where the caller wants it."""
        return self._out is not None

    @property
    def is_in_place(self) -> bool:
        """Whether there is nothing else."""
        return self._piece is None

    def bytes_at(self, offset: int, nbytes: int) -> Bytes:
        """[nbytes] uint8 of the memory that the answer goes to; offset: in the arena."""
        if self._out is not None:
            data = self._out[1]
            return data if nbytes == data.nbytes else data[offset - self.offset :][:nbytes]
        assert self._piece is not None, "the answer has gone somewhere"
        return self._piece.array(offset, nbytes)

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether the server may read or write any of these bytes, and they are the caller's."""
        held = self._inputs if self._out is None else [self._out, *self._inputs]
        return any(start < offset + nbytes and offset < start + data.nbytes for start, data in held)

    def give_up(self) -> None:
        """Nobody waits for the answer any more, which may still be written: let it not reach the caller's array."""
        if self._out is None or self._is_given_up:
            return
        self._is_given_up = True
        offset, data = self._out
        try:
            self._arena.detach(offset, data.nbytes)
        except OSError as error:
            log.error("the server may still write to the `out` of a request that has failed, drop the array: %s", error)


class StreamMemory:
    """The memory of one stream: asked for, handed in, used. `request_id` is that of its one message.

    Not thread-safe but for `place` and `lend`. Its memory is free when this and every array that lies in it are gone.
    """

    def __init__(self, wanted: WantedMemory, request_id: int) -> None:
        self.request_id = request_id
        self._wanted = wanted
        self._arena: Arena | None = None
        self.rings: StreamRings | None = None
        """For messages, once there is memory, where the server has rings; whoever takes them closes them."""
        self.failure: str | None = None
        """Why there is none, once that is known."""
        self._nbytes = min(wanted.nbytes, wanted.limit)
        self._num_slots = num_slots(wanted.max_in_flight, self._nbytes)
        if not wanted.limit:
            self.fail("the server takes no shared memory (it is off there, or the server is an older one)")
        elif self._nbytes < MIN_ARENA_BYTES:
            self.fail(f"the server takes {wanted.limit} bytes, less than the {MIN_ARENA_BYTES} that make sense")
        elif not hasattr(os, "memfd_create"):
            self.fail("this operating system has no memfd_create")

    @property
    def is_required(self) -> bool:
        """Whether requests fail without it."""
        return self._wanted.is_required

    @property
    def is_settled(self) -> bool:
        """Whether it is known if they ever can."""
        return self._arena is not None or self.failure is not None

    @property
    def detached(self) -> object:
        """What was taken out of it; another object whenever there is a change."""
        return None if self._arena is None else self._arena.detached

    def check(self) -> None:
        """Raise SharedMemoryError when there is none."""
        if self._arena is None:
            raise SharedMemoryError(
                f"no memory is shared with {self._wanted.target}: {self.failure}; with transport='auto' tensors go "
                f"over gRPC instead"
            )

    def fail(self, why: str) -> None:
        """There is none, and why."""
        self.failure = why
        self._wanted.say(f"tensors go over gRPC, no memory is shared: {why}")

    def opening(self) -> bytes:
        """The message that asks for it."""
        register = pb.RegisterRegion(region=_REGION, nbytes=self._nbytes, rings=wanted_rings(self._num_slots))
        return pb.ForwardStreamRequest(id=self.request_id, register_region=register).SerializeToString()

    def take(self, answer: pb.RegionTicket | Response | ExpertdError) -> None:
        """The answer to `opening`: hand the memory in, or fail. Takes a few system calls, and seconds at worst."""
        if not isinstance(answer, pb.RegionTicket):
            self.fail(str(answer) if isinstance(answer, ExpertdError) else "the server answers with something else")
            return
        try:
            self._arena, self.rings = _shared(answer, self._nbytes, self._num_slots)
            what = "tensors" if self.rings is None else "requests and answers"
            self._wanted.say(f"{what} go through shared memory, {self._nbytes} bytes on each stream")
        except (OSError, ValueError) as error:
            self.fail(f"{error}; it may run on another machine or in another container")

    def lend(self, nbytes: int) -> Bytes | None:
        """[nbytes] uint8 of it for the caller to keep; None: there is none, or more than half of it is taken."""
        return self._arena.lend(nbytes) if self._arena is not None and nbytes else None

    def holds(self, body: Encoded) -> bool:
        """Whether all of a request lies in it, and its answer can: there is nothing to copy."""
        arena = self._arena
        return (
            arena is not None
            and body.out is not None
            and arena.find_detachable(body.out.data) is not None
            and all(
                isinstance(tensor, WireTensor) and arena.find(tensor.data) is not None for _, tensor in body.tensors
            )
        )

    def place(
        self, request_id: int, body: Encoded, timeout_ms: int, unanswered: Iterable[Placed] = ()
    ) -> tuple[bytes, Placed] | None:
        """A ForwardStreamRequest whose tensors lie in the memory, and what is the server's until it is answered.

        Those that lie there already stay where they are, the others are copied in. None when there is no memory or no
        room in it. unanswered: what other requests of this stream were given.
        """
        arena = self._arena
        if arena is None:
            return None
        found = [arena.find(tensor.data) if isinstance(tensor, WireTensor) else None for _, tensor in body.tensors]
        out = self._out_of(body, arena, unanswered)
        room = sum(aligned(tensor.nbytes) for (_, tensor), at in zip(body.tensors, found, strict=True) if at is None)
        piece = None
        if out is None or None in found:
            # The answer is written when the request has been read, over what was copied.
            piece = arena.allocate(max(room, body.answer_nbytes) if out is None else room)
            if piece is None:
                return None
        slices: list[tuple[int, int, int]] = []
        inputs: list[tuple[int, Bytes]] = []
        at = 0 if piece is None else piece.offset
        for (_, tensor), where in zip(body.tensors, found, strict=True):
            if where is not None:
                assert isinstance(tensor, WireTensor), "else it were not found"
                inputs.append((where, tensor.data))
                slices.append((_REGION, where, tensor.nbytes))
                continue
            slices.append((_REGION, at, tensor.nbytes))
            start = at
            for each in tensor.pieces:
                np.copyto(arena.memory[start : start + each.nbytes], np.frombuffer(each, np.uint8))
                start += each.nbytes
            at += aligned(tensor.nbytes)
        placed = Placed(arena, piece, out, inputs)
        answer = (_REGION, placed.offset, placed.nbytes)
        return encode_placed_request(request_id, body, slices, answer, timeout_ms), placed

    def response(self, response: Response, placed: Placed) -> Answer | ProtocolError:
        """An answer to a request that was placed; an error when it names memory of others.

        Its tensors stay where they are while there is plenty of room, else they are copied: answers that are kept for
        long never leave the next requests without. What went where the caller wants it stays there.
        """
        answer = answer_of(response)
        for name in TENSOR_FIELDS:
            tensor: AnswerTensor = getattr(answer, name)
            if tensor.slice is None:
                continue
            region, offset, nbytes = tensor.slice
            if region != _REGION or not placed.offset <= offset <= offset + nbytes <= placed.offset + placed.nbytes:
                return ProtocolError(f"{name}.slice of the answer is outside of the request's answer_slice")
            data = placed.bytes_at(offset, nbytes)
            stays = placed.is_out or (self._arena is not None and self._arena.is_half_free)
            setattr(answer, name, AnswerTensor(tensor.dtype, tensor.shape, data if stays else data.copy()))
        return answer

    @staticmethod
    def _out_of(body: Encoded, arena: Arena, unanswered: Iterable[Placed]) -> tuple[int, Bytes] | None:
        """Where the caller wants the output, and may have it at once; None: the answer has to be copied there, if so.

        What another request still holds the server would refuse: somebody who has given up had it read, say.
        """
        if body.out is None:
            return None
        offset = arena.find_detachable(body.out.data)
        if offset is None or any(other.holds(offset, body.out.nbytes) for other in unanswered):
            return None
        return offset, body.out.data


def _shared(ticket: pb.RegionTicket, nbytes: int, slots: int) -> tuple[Arena, StreamRings | None]:
    """Memory that the server has mapped too, and the rings in it, if it has them; slots: of each.

    Raises OSError, or ValueError with the server's reason.
    """
    import fcntl  # noqa: PLC0415 (there is none on Windows, nor anything else of this)

    fd = os.memfd_create("expertd-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        region = memoryview(mmap.mmap(fd, nbytes))
        memory = np.frombuffer(region, np.uint8)
        pages = SharedPages(memory.ctypes.data, fd)
        proof = secrets.token_bytes(_PROOF_BYTES)
        region[:_PROOF_BYTES] = proof
        answer, bells = _hand_in(ticket, fd)
    finally:
        os.close(fd)
    if answer == b"\0" + proof:
        rings = StreamRings(region, slots, bells) if bells else None
        return Arena(memory, first=_PROOF_BYTES if rings is None else rings_end(slots), pages=pages), rings
    for bell in bells:
        os.close(bell)
    if answer[:1] == b"\0":
        raise ValueError("the server has mapped other memory than it was given")
    raise ValueError(answer[1:].decode(errors="replace") or "the server does not say why")


def _hand_in(ticket: pb.RegionTicket, fd: int) -> tuple[bytes, list[int]]:
    """What the server says to it, and the file descriptors that it gives."""
    address = ticket.socket
    # NOTE: whatever is not a server's door gets nothing from here, however a server calls it.
    if not os.path.basename(address.removeprefix("@")).startswith(_SOCKET_PREFIX):
        raise ValueError(f"the server names {address!r}, which is not a place to hand memory in")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.settimeout(_HAND_IN_S)
        door.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(door, [ticket.ticket], [fd], socket.MSG_NOSIGNAL)
        answer, fds, _, _ = socket.recv_fds(door, _MAX_REASON_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        return answer, fds
