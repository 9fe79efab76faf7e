"""The event loop of the process, and what other threads post into it."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from expertd_server.compiled import CODEC
from expertd_server.event_loop import EventLoop, Inbox
from expertd_server.threads import core_of

PATIENCE_S = 30.0


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop.acquire()
    yield loop
    loop.release()


async def nothing() -> None: ...


async def cores() -> tuple[set[int], set[int]]:
    """Of the loop, and of a thread that it has started."""
    seen: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    threading.Thread(target=lambda: seen.put(os.sched_getaffinity(0))).start()
    return os.sched_getaffinity(0), seen.get(timeout=PATIENCE_S)


def test_it_stays_on_a_core_with_what_it_starts_and_nobody_else_does(loop: EventLoop) -> None:
    everywhere = os.sched_getaffinity(0)
    assert loop.run(cores(), PATIENCE_S) == (everywhere, everywhere)
    for number in range(len(everywhere) + 1):
        core = core_of(number)
        loop.stay_on(core)
        assert loop.run(cores(), PATIENCE_S) == ({core}, {core})
    assert {core_of(number) for number in range(len(everywhere))} == everywhere
    assert core_of(0) == max(everywhere)
    assert os.sched_getaffinity(0) == everywhere


COPIES = """
import os, threading
from expertd_server.compiled import CODEC
everywhere, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
CODEC.set_copy_helpers(2)
def copy():
    os.sched_setaffinity(0, {min(everywhere)})
    data = bytes([7]) * (4 << 20)
    copied = bytearray(len(data))
    CODEC.copy(copied, 0, data)
    assert copied == data
thread = threading.Thread(target=copy)
thread.start()
thread.join()
left = []
for _ in range(1000):  # until those that have just been started have begun
    left = [os.sched_getaffinity(int(task)) for task in set(os.listdir("/proc/self/task")) - before]
    if left == [everywhere] * 2:
        break
    threading.Event().wait(0.01)
assert left == [everywhere] * 2, left
"""


@pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built")
def test_threads_that_copy_go_where_they_want() -> None:
    subprocess.run([sys.executable, "-c", COPIES], check=True, timeout=PATIENCE_S)


def test_its_users_share_it_and_the_last_one_stops_it() -> None:
    first, second = EventLoop.acquire(), EventLoop.acquire()
    assert first is second
    first.release()
    second.run(nothing(), PATIENCE_S)
    second.release()
    assert second.loop.is_closed()
    third = EventLoop.acquire()
    assert third is not first
    third.release()


def test_a_coroutine_runs_in_it(loop: EventLoop) -> None:
    async def here() -> bool:
        return loop.is_here

    assert loop.run(here(), PATIENCE_S)
    assert not loop.is_here
    with pytest.raises(TimeoutError):
        loop.run(asyncio.sleep(PATIENCE_S), 0.01)


def test_everything_that_is_posted_is_called_in_the_loop(loop: EventLoop) -> None:
    inbox, called, over = Inbox(loop), [0] * 4, threading.Semaphore(0)

    def post(thread: int) -> None:
        for _ in range(500):
            inbox.post(lambda: called.__setitem__(thread, called[thread] + loop.is_here))
        inbox.post(over.release)

    threads = [threading.Thread(target=post, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert over.acquire(timeout=PATIENCE_S)
    assert called == [500] * 4


def test_a_burst_wakes_the_loop_once(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, wakes, may_go, over = Inbox(loop), [], threading.Event(), threading.Event()
    loop.soon(lambda: may_go.wait(PATIENCE_S))
    soon = loop.soon
    monkeypatch.setattr(loop, "soon", lambda function: (wakes.append(function), soon(function)))
    for _ in range(100):
        inbox.post(lambda: None)
    inbox.post(over.set)
    may_go.set()
    assert over.wait(PATIENCE_S)
    assert len(wakes) == 1


def test_one_that_fails_takes_no_other_along(loop: EventLoop) -> None:
    inbox, over = Inbox(loop), threading.Event()
    inbox.post(lambda: 1 / 0)
    inbox.post(over.set)
    assert over.wait(PATIENCE_S)


def test_in_the_loop_itself_nothing_waits(loop: EventLoop) -> None:
    async def post() -> list[int]:
        called: list[int] = []
        Inbox(loop).post(lambda: called.append(1))
        return called

    assert loop.run(post(), PATIENCE_S) == [1]


def test_what_comes_after_the_end_is_dropped() -> None:
    loop = EventLoop.acquire()
    inbox = Inbox(loop)
    loop.release()
    inbox.post(lambda: None)


class TestBell:
    def test_whoever_rings_it_has_the_loop_call(self, loop: EventLoop) -> None:
        called: queue.SimpleQueue[bool] = queue.SimpleQueue()
        bell = loop.bell(lambda: called.put(loop.is_here))
        for _ in range(3):
            bell.ring()
            assert called.get(timeout=PATIENCE_S)
        bell.close()

    def test_a_closed_one_leaves_no_file(self, loop: EventLoop) -> None:
        bell = loop.bell(lambda: None)
        loop.run(nothing(), PATIENCE_S)
        copy = os.dup(bell.fd)
        try:
            bell.close()
            loop.run(nothing(), PATIENCE_S)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(bell.fd)
            os.eventfd_write(copy, 1)  # by who has not heard of it; nobody is told
            loop.run(nothing(), PATIENCE_S)
        finally:
            os.close(copy)

    def test_it_can_be_closed_after_the_loop(self) -> None:
        loop = EventLoop.acquire()
        bell = loop.bell(lambda: None)
        loop.release()
        bell.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(bell.fd)
