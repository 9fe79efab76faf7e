"""One ForwardStream without gRPC: tasks that meet at the worst moment, bounds, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import torch
from fake_stream import FakeCalls, FakeContext, a_stream, answer, in_loop, message, nothing_happens

from expertd.v1 import expertd_pb2 as pb
from expertd_server.engine import ForwardResult, ForwardTiming
from expertd_server.errors import InvalidArgumentError, OverloadedError, UnavailableError
from expertd_server.regions import Lease, StreamRegions
from expertd_server.wire_parse import RawRequest


@in_loop
async def test_an_answer_is_written_at_once_and_not_in_the_next_round_of_the_loop() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context).run())
    context.send(1)
    context.end()
    await nothing_happens()
    calls.promises[0].set_result(answer(1))
    assert context.ids == [1]
    await running


@in_loop
async def test_an_answer_that_grpc_has_taken_is_not_kept_here() -> None:
    calls, context = FakeCalls(), FakeContext()
    context.may_write.clear()
    running = asyncio.create_task(a_stream(calls, context).run())
    context.send(1)
    await nothing_happens()
    promise = calls.promises.pop()
    alive = weakref.ref(promise)
    promise.set_result(answer(1))
    del promise
    assert alive() is None, "it is not sent yet"
    assert calls.in_flight == 1
    context.may_write.set()
    context.end()
    await running
    assert context.ids == [1]
    assert calls.in_flight == 0


@in_loop
async def test_an_answer_for_nobody_is_not_kept() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context).run())
    context.send(1)
    await nothing_happens()
    (promise,) = calls.promises
    assert promise.set_running_or_notify_cancel()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gc.disable()
    try:
        alive = weakref.ref(promise)
        calls.promises.clear()
        promise.set_result(answer(1))
        del promise
        assert alive() is None
    finally:
        gc.enable()
    assert context.answers == []


@in_loop
async def test_answers_come_in_completion_order_and_the_last_is_not_lost() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context).run())
    context.send(1, 2, 3)
    context.end()
    await nothing_happens()
    assert calls.in_flight == 3
    for number in (2, 3, 1):
        calls.promises[number - 1].set_result(answer(number))
        await nothing_happens()
        assert running.done() == (number == 1)
    await running
    assert context.ids == [2, 3, 1]
    assert calls.in_flight == 0


@in_loop
async def test_no_more_is_read_than_may_be_unanswered() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context, max_requests=2).run())
    context.send(1, 2, 3, 4)
    context.end()
    await nothing_happens()
    assert len(calls.promises) == 2
    # An answer that the caller does not take makes no room.
    context.may_write.clear()
    calls.promises[0].set_result(answer(1))
    await nothing_happens()
    assert len(calls.promises) == 2
    context.may_write.set()
    await nothing_happens()
    assert len(calls.promises) == 3
    for promise in calls.promises[1:]:
        promise.set_result(answer(9))
    await nothing_happens()
    calls.promises[3].set_result(answer(9))
    await running


@in_loop
async def test_tokens_are_bounded_and_a_lone_request_may_exceed_the_bound() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context, max_tokens=10).run())
    for number, num_tokens in ((1, 6), (2, 5), (3, 1000)):
        context.messages.put_nowait(message(number, num_tokens))
    context.end()
    for number in (1, 2, 3):
        await nothing_happens()
        assert len(calls.promises) == number
        calls.promises[-1].set_result(answer(number))
    await running
    assert context.ids == [1, 2, 3]


@in_loop
async def test_answers_that_nobody_takes_are_bounded_in_bytes() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context, max_requests=9, max_answer_bytes=2000).run())
    context.may_write.clear()
    context.send(1, 2)
    await nothing_happens()
    large = ForwardResult(1, ForwardTiming(0, 0, 0, 0, 1, 1), output=torch.zeros(1, 500, dtype=torch.bfloat16))
    for promise, encode in zip(calls.promises, list(calls.encodes), strict=True):
        promise.set_result(encode(large))
    await nothing_happens()
    context.send(3, 4)
    context.end()
    await nothing_happens()
    assert len(calls.promises) == 2, "2000 bytes and more lie here: nothing further is admitted"
    context.may_write.set()
    await nothing_happens()
    assert len(calls.promises) == 4
    for promise in calls.promises[2:]:
        promise.set_exception(OverloadedError("full", 1.0))
    await running
    assert context.ids == [1, 2, 3, 4]


@in_loop
async def test_a_message_that_is_none_ends_the_stream_after_the_answers_in_flight() -> None:
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context).run())
    context.send(1)
    context.messages.put_nowait(b"\xff")
    await nothing_happens()
    assert not running.done()
    calls.promises[0].set_result(answer(1))
    with pytest.raises(InvalidArgumentError):
        await running
    assert context.ids == [1]


@in_loop
async def test_a_closed_stream_ends_when_it_is_idle() -> None:
    calls, context = FakeCalls(), FakeContext()
    stream = a_stream(calls, context)
    running = asyncio.create_task(stream.run())
    context.send(1)
    await nothing_happens()
    stream.close()
    await nothing_happens()
    assert not running.done()
    calls.promises[0].set_result(answer(1))
    with pytest.raises(UnavailableError):
        await running
    assert context.ids == [1]


@in_loop
async def test_who_leaves_gives_up_what_waits() -> None:
    before = asyncio.all_tasks()
    calls, context = FakeCalls(), FakeContext()
    running = asyncio.create_task(a_stream(calls, context).run())
    context.send(1, 2)
    await nothing_happens()
    running.cancel()  # as gRPC does
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [promise.cancelled() for promise in calls.promises] == [True, True]
    assert calls.in_flight == 0
    await nothing_happens()
    assert asyncio.all_tasks() <= before


@in_loop
async def test_a_request_that_is_refused_leaves_no_cycle() -> None:
    calls, context = FakeCalls(refuses=True), FakeContext()
    gc.collect()
    gc.disable()
    try:
        context.send(1, 2)
        context.end()
        await a_stream(calls, context).run()
        await nothing_happens()
        assert sorted(context.ids) == [1, 2]
        assert [error() for error in calls.errors] == [None, None]
    finally:
        gc.enable()


@in_loop
async def test_shared_memory_is_given_back_before_the_answer_is_written() -> None:
    """Its caller may send into it again as soon as the answer is there, and would be refused for overlap."""
    calls, context = FakeCalls(), FakeContext()
    events: list[str] = []

    class Regions(StreamRegions):
        def release(self, lease: Lease) -> None:
            events.append("given back")

        def lease(self, request: RawRequest) -> Lease:
            return Lease(self, [], 0, 0, None)

    async def write(_: bytes) -> None:
        events.append("written")

    context.write = write  # type: ignore[method-assign]
    stream = a_stream(calls, context)
    stream._regions = Regions(None, 0)
    running = asyncio.create_task(stream.run())
    request = pb.ForwardRequest(layer="a", answer_slice=pb.RegionSlice(region=1))
    for fails in (False, True):
        context.messages.put_nowait(pb.ForwardStreamRequest(id=1, request=request).SerializeToString())
        await nothing_happens()
        promise = calls.promises[-1]
        if fails:
            promise.set_exception(OverloadedError("a", 1.0))
        else:
            promise.set_result(answer(1))
        await nothing_happens()
    context.end()
    await running
    assert events == ["given back", "written"] * 2


@in_loop
async def test_a_write_to_a_caller_who_has_gone_ends_the_call_and_is_no_error_of_the_server() -> None:
    calls, context = FakeCalls(), FakeContext()
    context.is_broken = True
    stream = a_stream(calls, context)
    running = asyncio.create_task(stream.run())
    context.send(1, 2)
    while len(calls.promises) < 2:
        await asyncio.sleep(0)
    calls.promises[0].set_result(answer(1))
    with pytest.raises(asyncio.CancelledError):
        await running
    assert calls.in_flight == 0
    assert calls.promises[1].cancelled()
