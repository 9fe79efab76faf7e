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
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from expertd._arena import MIN_ARENA_BYTES, Arena, Piece, aligned
from expertd._rings import END, StreamRings, wanted_rings
from expertd._wire import Encoded, encode_placed_request
from expertd._wire_read import TENSOR_FIELDS, Answer, AnswerTensor, Response, answer_of
from expertd.errors import ExpertdError, ProtocolError, SharedMemoryError
from expertd.v1 import expertd_pb2 as pb

__all__ = ["StreamMemory", "WantedMemory"]

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
    limit: int = 0
    """Most bytes that the server takes, as it last said; 0: none, or it did not say yet."""
    _said: set[str] = field(default_factory=set)

    def say(self, what: str) -> None:
        """Log a line, unless it is that of before."""
        if what not in self._said:
            self._said.add(what)
            log.info("%s: %s", self.target, what)


class StreamMemory:
    """The memory of one stream: asked for, handed in, used. `request_id` is that of its one message.

    Not thread-safe but for `place`. Its memory is free when this and every array of an answer that lies in it are gone.
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
        register = pb.RegisterRegion(region=_REGION, nbytes=self._nbytes, rings=wanted_rings())
        return pb.ForwardStreamRequest(id=self.request_id, register_region=register).SerializeToString()

    def take(self, answer: pb.RegionTicket | Response | ExpertdError) -> None:
        """The answer to `opening`: hand the memory in, or fail. Takes a few system calls, and seconds at worst."""
        if not isinstance(answer, pb.RegionTicket):
            self.fail(str(answer) if isinstance(answer, ExpertdError) else "the server answers with something else")
            return
        try:
            self._arena, self.rings = _shared(answer, self._nbytes)
            what = "tensors" if self.rings is None else "requests and answers"
            self._wanted.say(f"{what} go through shared memory, {self._nbytes} bytes on each stream")
        except (OSError, ValueError) as error:
            self.fail(f"{error}; it may run on another machine or in another container")

    def place(self, request_id: int, body: Encoded, timeout_ms: int) -> tuple[bytes, Piece] | None:
        """A ForwardStreamRequest whose tensors were copied into the memory, and the piece that holds them.

        None when there is no memory or no room in it. The piece is the server's until the request is answered.
        """
        arena = self._arena
        if arena is None:
            return None
        sizes = [sum(each.nbytes for each in tensor.pieces) for _, tensor in body.tensors]
        piece = arena.allocate(max(sum(map(aligned, sizes)), body.answer_nbytes))
        if piece is None:
            return None
        # The answer is written when the request has been read, over it.
        slices, at = [], piece.offset
        for (_, tensor), nbytes in zip(body.tensors, sizes, strict=True):
            start = at
            for each in tensor.pieces:
                np.copyto(arena.memory[at : at + each.nbytes], np.frombuffer(each, np.uint8))
                at += each.nbytes
            slices.append((_REGION, start, nbytes))
            at = start + aligned(nbytes)
        answer = (_REGION, piece.offset, piece.nbytes)
        return encode_placed_request(request_id, body, slices, answer, timeout_ms), piece

    def response(self, response: Response, piece: Piece) -> Answer | ProtocolError:
        """An answer to a request that was placed; an error when it names memory of others.

        Its tensors stay where they are while there is plenty of room, else they are copied: answers that are kept for
        long never leave the next requests without.
        """
        answer = answer_of(response)
        for name in TENSOR_FIELDS:
            tensor: AnswerTensor = getattr(answer, name)
            if tensor.slice is None:
                continue
            region, offset, nbytes = tensor.slice
            if region != _REGION or not piece.offset <= offset <= offset + nbytes <= piece.offset + piece.nbytes:
                return ProtocolError(f"{name}.slice of the answer is outside of the request's answer_slice")
            data = piece.array(offset, nbytes)
            is_roomy = self._arena is not None and self._arena.is_half_free
            setattr(answer, name, AnswerTensor(tensor.dtype, tensor.shape, data if is_roomy else data.copy()))
        return answer


def _shared(ticket: pb.RegionTicket, nbytes: int) -> tuple[Arena, StreamRings | None]:
    """Memory that the server has mapped too, and the rings in it, if it has them.

    Raises OSError, or ValueError with the server's reason.
    """
    import fcntl  # noqa: PLC0415 (there is none on Windows, nor anything else of this)

    fd = os.memfd_create("expertd-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        region = memoryview(mmap.mmap(fd, nbytes))
        proof = secrets.token_bytes(_PROOF_BYTES)
        region[:_PROOF_BYTES] = proof
        answer, bells = _hand_in(ticket, fd)
    finally:
        os.close(fd)
    if answer == b"\0" + proof:
        rings = StreamRings(region, bells) if bells else None
        return Arena(np.frombuffer(region, np.uint8), first=_PROOF_BYTES if rings is None else END), rings
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
