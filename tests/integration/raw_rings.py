"""A caller whose messages go through rings, written from the proto alone: none of the code of either side."""

from __future__ import annotations

import contextlib
import os
import select
import struct
from types import TracebackType
from typing import Any

import grpc
from serving import PATIENCE_S
from shared_memory import Memory, RawStream, hand_in_for_bells

from expertd.v1 import expertd_pb2 as pb

WRITTEN, TAKEN, WANTS_BELL, SLOTS = 0, 64, 128, 192
NUM_SLOTS, SLOT_NBYTES, OFFSET = 8, 2048, 64
RING_NBYTES = SLOTS + NUM_SLOTS * SLOT_NBYTES
END = OFFSET + 2 * RING_NBYTES
"""Where the rest of the region starts."""


def wanted(**fields: int) -> pb.MessageRings:
    """What to ask for."""
    return pb.MessageRings(**{"offset": OFFSET, "num_slots": NUM_SLOTS, "slot_nbytes": SLOT_NBYTES} | fields)


class RawRings:
    """A stream with memory of its own, whose region 1 has rings."""

    def __init__(self, channel: grpc.Channel, nbytes: int = 1 << 20) -> None:
        self.stream = RawStream(channel)
        self.memory = Memory(nbytes)
        answer = self.stream.ask(register_region=pb.RegisterRegion(region=1, nbytes=nbytes, rings=wanted()))
        assert answer.WhichOneof("result") == "region_ticket", answer
        said, bells = hand_in_for_bells(answer.region_ticket, self.memory.fd)
        assert said[:1] == b"\0"
        self.to_ring, self.bell = bells
        self._sent = self._taken = 0

    def __enter__(self) -> RawRings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stream.__exit__(kind, error, traceback)
        os.close(self.to_ring)
        os.close(self.bell)
        self.memory.close()

    def word(self, offset: int) -> int:
        """A number of the memory."""
        return int(struct.unpack_from("<Q", self.memory.map, offset)[0])

    def poke(self, offset: int, value: int) -> None:
        """Write one."""
        struct.pack_into("<Q", self.memory.map, offset, value)

    def ring(self) -> None:
        """Ring the server's bell, unless it is full or the server has hung up."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.to_ring, b"\0")

    def put(self, message: bytes) -> None:
        """Put a message into the ring of requests; ring if that is wanted."""
        assert self._sent - self.word(OFFSET + TAKEN) < NUM_SLOTS
        at = OFFSET + SLOTS + self._sent % NUM_SLOTS * SLOT_NBYTES
        struct.pack_into("<I", self.memory.map, at, len(message))
        self.memory.map[at + 8 : at + 8 + len(message)] = message
        self._sent += 1
        self.poke(OFFSET + WRITTEN, self._sent)
        if self.word(OFFSET + WANTS_BELL):
            self.poke(OFFSET + WANTS_BELL, 0)
            self.ring()

    def send(self, **fields: Any) -> int:
        """Put a ForwardStreamRequest; returns its id."""
        self.stream._next_id += 1
        self.put(pb.ForwardStreamRequest(id=self.stream._next_id, **fields).SerializeToString())
        return self.stream._next_id

    def receive(self) -> pb.ForwardStreamResponse:
        """The next answer of the ring."""
        ring = OFFSET + RING_NBYTES
        while self.word(ring + WRITTEN) == self._taken:
            self.poke(ring + WANTS_BELL, 1)
            if self.word(ring + WRITTEN) == self._taken:
                assert select.select([self.bell], [], [], PATIENCE_S)[0], "no answer"
                assert os.read(self.bell, 4096), "the server has hung up"
        at = ring + SLOTS + self._taken % NUM_SLOTS * SLOT_NBYTES
        (nbytes,) = struct.unpack_from("<I", self.memory.map, at)
        answer = pb.ForwardStreamResponse.FromString(self.memory.map[at + 8 : at + 8 + nbytes])
        self._taken += 1
        self.poke(ring + TAKEN, self._taken)
        return answer

    def ask(self, **fields: Any) -> pb.ForwardStreamResponse:
        """Put a message and wait for the next answer, which must be its own."""
        number = self.send(**fields)
        answer = self.receive()
        assert answer.id == number
        return answer

    def placed(self, request: pb.ForwardRequest, start: int = END) -> pb.ForwardRequest:
        """The request with its tensors in the memory, and room for its answer behind them."""
        placed, end = self.memory.placed(request, start)
        placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=40_000))
        return placed
