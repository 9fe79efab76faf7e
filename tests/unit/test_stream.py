"""One ForwardStream without gRPC: threads that meet at the worst moment, and what they leave behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from expertd.v1 import expertd_pb2 as pb
from expertd_server.engine import ForwardResult
from expertd_server.errors import OverloadedError
from expertd_server.regions import StreamRegions
from expertd_server.stream import Stream

PATIENCE_S = 30.0


class FakeCalls:
    """Refuses every request."""

    queue_depth_tokens = 0

    def __init__(self) -> None:
        self.errors: list[weakref.ref[Exception]] = []

    def clock(self) -> float:
        return 0.0

    def admit(self, *_: Any) -> Future[ForwardResult]:
        raise self._refusal()

    def _refusal(self) -> Exception:
        error = OverloadedError("full", 1.0)
        self.errors.append(weakref.ref(error))
        return error

    def arrived(self) -> None: ...

    def left(self) -> None: ...

    def failed(self, *_: str) -> None: ...


class FakeContext:
    def add_callback(self, _: Callable[[], None]) -> bool:
        return True

    def time_remaining(self) -> float:
        return 1.0


class HeldUp(set[Any]):
    """What is pending, where whoever finds it empty loses the processor before it goes on."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def __bool__(self) -> bool:
        is_empty = not len(self)
        if is_empty:
            self._meanwhile()
        return not is_empty


def a_stream(calls: FakeCalls, requests: Iterator[bytes]) -> Stream:
    bounds = {"regions": StreamRegions(None, 0), "max_requests": 4, "max_tokens": 100}
    return Stream(calls, requests, FakeContext(), **bounds, log_id="a")  # type: ignore[arg-type]


def message(number: int) -> bytes:
    return pb.ForwardStreamRequest(id=number, request=pb.ForwardRequest(layer="a")).SerializeToString()


def ids(stream: Stream) -> list[int]:
    return [pb.ForwardStreamResponse.FromString(answer).id for answer in stream.answers()]


def test_a_last_request_that_comes_while_the_writer_looks_is_answered() -> None:
    may_come = threading.Event()

    def requests() -> Iterator[bytes]:
        assert may_come.wait(PATIENCE_S)
        yield message(7)

    stream = a_stream(FakeCalls(), requests())

    def meanwhile() -> None:
        if threading.current_thread().name != "expertd-stream-reader" and not may_come.is_set():
            may_come.set()
            wait_for(lambda: not stream._is_reading)

    stream._pending = HeldUp(meanwhile)
    assert ids(stream) == [7]


def test_a_request_that_is_refused_leaves_no_cycle() -> None:
    calls = FakeCalls()
    gc.collect()
    gc.disable()
    try:
        assert sorted(ids(a_stream(calls, iter([message(1), message(2)])))) == [1, 2]
        wait_for(lambda: [error() for error in calls.errors] == [None, None])
    finally:
        gc.enable()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError(f"not so within {PATIENCE_S} s")
