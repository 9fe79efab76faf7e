"""A caller that shares memory with a server step by step, as the proto says, so that tests can get each step wrong."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
import queue
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from serving import PATIENCE_S

from expertd.v1 import expertd_pb2 as pb

PROOF_BYTES = 16
TENSORS = ("hidden_states", "routing_logits", "topk_ids", "topk_weights")
ANSWERED = ("output", "gemm2_output", "expert_weights", "topk_ids", "expanded_idx_to_permuted_idx")


class RawStream:
    """One ForwardStream; what is sent and received is protobuf."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = channel.stream_stream("/expertd.v1.ExpertService/ForwardStream")
        self.call: Any = method(iter(self._requests.get, None), timeout=PATIENCE_S * 2)
        self._next_id = 0

    def __enter__(self) -> RawStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._requests.put(None)
        self.call.cancel()

    def send(self, **fields: Any) -> int:
        """Send a message; returns its id."""
        self._next_id += 1
        self._requests.put(pb.ForwardStreamRequest(id=self._next_id, **fields).SerializeToString())
        return self._next_id

    def receive(self) -> pb.ForwardStreamResponse:
        """The next answer."""
        return pb.ForwardStreamResponse.FromString(next(self.call))

    def ask(self, **fields: Any) -> pb.ForwardStreamResponse:
        """Send a message and wait for the next answer, which must be its own."""
        number = self.send(**fields)
        answer = self.receive()
        assert answer.id == number
        return answer


class Memory:
    """A sealed memfd, mapped."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("test-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, nbytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, nbytes)
        self.map[:PROOF_BYTES] = secrets.token_bytes(PROOF_BYTES)

    def close(self) -> None:
        """Leave it to the server, if that has it."""
        os.close(self.fd)
        self.map.close()

    def register(self, stream: RawStream, region: int = 1, nbytes: int | None = None) -> None:
        """Share it on a stream, as region number `region`."""
        nbytes = len(self.map) if nbytes is None else nbytes
        answer = stream.ask(register_region=pb.RegisterRegion(region=region, nbytes=nbytes))
        assert answer.WhichOneof("result") == "region_ticket", answer
        assert hand_in(answer.region_ticket, self.fd) == b"\0" + self.map[:PROOF_BYTES]

    def place(self, region: int, offset: int, data: bytes) -> pb.RegionSlice:
        """Write bytes, and say where."""
        self.map[offset : offset + len(data)] = data
        return pb.RegionSlice(region=region, offset=offset, nbytes=len(data))

    def placed(self, request: pb.ForwardRequest, offset: int, region: int = 1) -> tuple[pb.ForwardRequest, int]:
        """The request with its tensors in this memory from `offset` on, one after the other, and where they end."""
        result = pb.ForwardRequest()
        result.CopyFrom(request)
        for name in TENSORS:
            if request.HasField(name):
                tensor = getattr(result, name)
                data = tensor.data
                tensor.ClearField("data")
                tensor.slice.CopyFrom(self.place(region, offset, data))
                offset += len(data)
        return result, offset

    def read(self, response: pb.ForwardResponse) -> tuple[pb.ForwardResponse, int]:
        """An answer with the data in its message, and how many of its tensors lay in the memory."""
        result = pb.ForwardResponse()
        result.CopyFrom(response)
        count = 0
        for name in ANSWERED:
            tensor = getattr(result, name)
            if tensor.HasField("slice"):
                where = tensor.slice
                tensor.data = self.map[where.offset : where.offset + where.nbytes]
                assert len(tensor.data) == where.nbytes
                tensor.ClearField("slice")
                count += 1
        return result, count


def hand_in(ticket: pb.RegionTicket, fd: int) -> bytes:
    """Show the ticket; what the door says."""
    said, bells = hand_in_for_bells(ticket, fd)
    assert not bells
    return said


def hand_in_for_bells(ticket: pb.RegionTicket, fd: int) -> tuple[bytes, list[int]]:
    """Show the ticket; what the door says and gives."""
    assert ticket.socket.startswith("@")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.settimeout(PATIENCE_S)
        door.connect("\0" + ticket.socket[1:])
        socket.send_fds(door, [ticket.ticket], [fd])
        said, bells, _, _ = socket.recv_fds(door, 4096, 8)
        return said, bells


def mapped_regions(pid: int | str = "self") -> int:
    """Mappings of shared regions in a process; callers and servers of these tests may be in the same one."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:expertd-region" in line or "memfd:test-region" in line for line in lines)


def forget_tests_before() -> None:
    """Let go of what only errors that know their own frames still hold, before mappings are counted."""
    gc.collect()


def shared_fds() -> int:
    """Open files of this process that have to do with shared memory: memfds, Unix sockets and pipes."""
    unix = {f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            name = os.readlink(f"/proc/self/fd/{fd}")
            count += name.startswith(("/memfd:", "pipe:")) or name in unix
    return count


def eventually(look: Callable[[], Any], expected: Any) -> None:
    """Wait until a look shows what is expected."""
    until_s = time.monotonic() + PATIENCE_S
    while (seen := look()) != expected:
        assert time.monotonic() < until_s, f"saw {seen!r}, expected {expected!r}"
        time.sleep(0.01)


def each_name(request: pb.ForwardRequest) -> Iterator[str]:
    """The tensors of a request."""
    return (name for name in TENSORS if request.HasField(name))
