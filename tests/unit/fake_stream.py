"""A ForwardStream without gRPC: calls for the test to answer, messages for it to send, answers for it to take."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from expertd.v1 import expertd_pb2 as pb
from expertd_server import codec
from expertd_server.engine import ForwardResult
from expertd_server.errors import OverloadedError
from expertd_server.promise import Promise
from expertd_server.regions import StreamRegions
from expertd_server.stream import Stream

PATIENCE_S = 30.0
NOTHING_HAPPENS = 20
"""Rounds of the event loop in which everything that can happen has happened."""


class FakeCalls:
    """Admits requests for the test to answer, or refuses them."""

    queue_depth_tokens = 0
    max_message_bytes = 2**20
    codec = codec

    def __init__(self, *, refuses: bool = False) -> None:
        self.in_flight = self.unread_rings = 0
        self.promises: list[Promise[bytes]] = []
        self.encodes: list[Callable[[ForwardResult], bytes]] = []
        """What makes an answer out of a result, by promise."""
        self.errors: list[weakref.ref[Exception]] = []
        self._refuses = refuses

    def clock(self) -> float:
        return 0.0

    def admit(self, *arguments: Any) -> Promise[bytes]:
        if self._refuses:
            raise self._refusal()
        encode, on_done = arguments[-2:]
        self.encodes.append(encode)
        self.promises.append(Promise(on_done))
        return self.promises[-1]

    def announce(self) -> None: ...

    def hurry(self) -> None: ...

    def _refusal(self) -> Exception:
        error = OverloadedError("full", 1.0)
        self.errors.append(weakref.ref(error))
        return error

    def failed(self, *_: str) -> None: ...

    def answered(self, *_: Any) -> None: ...


class FakeContext:
    """gRPC's side: messages that the test sends, and answers that it takes."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.answers: list[bytes] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.is_broken = False

    def time_remaining(self) -> None: ...

    def done(self) -> bool:
        return False

    async def read(self) -> Any:
        return await self.messages.get()

    async def write(self, answer: bytes) -> None:
        await self.may_write.wait()
        if self.is_broken:
            raise grpc.aio.InternalError('Failed "execute_batch"')  # type: ignore[attr-defined]
        self.answers.append(answer)

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.messages.put_nowait(message(number))

    def end(self) -> None:
        self.messages.put_nowait(grpc.aio.EOF)  # type: ignore[attr-defined]

    @property
    def ids(self) -> list[int]:
        return [pb.ForwardStreamResponse.FromString(answer).id for answer in self.answers]


class Inbox:
    def post(self, function: Callable[[], object]) -> None:
        function()


def a_stream(calls: FakeCalls, context: FakeContext, **bounds: int) -> Stream:
    bounds = {"max_requests": 4, "max_tokens": 100, "max_answer_bytes": 2**20} | bounds
    return Stream(calls, context, Inbox(), regions=StreamRegions(None, 0), **bounds, log_id="a")  # type: ignore[arg-type]


def message(number: int, num_tokens: int = 1) -> bytes:
    request = pb.ForwardRequest(layer="a", hidden_states=pb.Tensor(shape=[num_tokens, 1]))
    return pb.ForwardStreamRequest(id=number, request=request).SerializeToString()


def answer(number: int) -> bytes:
    return pb.ForwardStreamResponse(id=number).SerializeToString()


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an event loop of its own."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), PATIENCE_S))

    run.__name__ = test.__name__
    return run


async def nothing_happens() -> None:
    for _ in range(NOTHING_HAPPENS):
        await asyncio.sleep(0)
