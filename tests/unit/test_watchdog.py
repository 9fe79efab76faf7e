"""The watchdog under a clock of its own."""

from __future__ import annotations

import threading

import pytest

from expertd_server.watchdog import Watchdog, stacks_of

PATIENCE_S = 30.0
TIMEOUT_S = 30.0


class Bench:
    """A watchdog, the work that it looks at, and what it told."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.oldest: int | None = None
        self.told: list[tuple[int, float]] = []
        self.watchdog = Watchdog(
            lambda: self.oldest, TIMEOUT_S, lambda number, s: self.told.append((number, s)), clock=lambda: self.now_s
        )

    def look(self, seconds: float, times: int = 1) -> bool:
        """Look `times` more, each after so many seconds; whether the last look found something."""
        for _ in range(times):
            self.now_s += seconds
            found = self.watchdog.look()
        return found


def test_work_that_is_the_oldest_for_too_long_hangs() -> None:
    bench = Bench()
    bench.oldest = 7
    assert not bench.look(1.0, 30)
    assert bench.told == []
    assert bench.look(1.0)
    assert bench.told == [(7, 30.0)]


def test_work_that_changes_does_not_however_long_there_is_some() -> None:
    bench = Bench()
    for bench.oldest in range(50):
        assert not bench.look(1.0, 20)
    bench.oldest = None
    assert not bench.look(1.0, 100)
    bench.oldest = 50
    assert not bench.look(1.0, 30), "time without work does not count"


@pytest.mark.parametrize("stood_still_s", [29.0, 3600.0])
def test_a_process_that_stood_still_has_not_hung(stood_still_s: float) -> None:
    bench = Bench()
    bench.oldest = 7
    bench.look(1.0, 10)
    assert not bench.look(stood_still_s)
    assert not bench.look(1.0, 18), "it counts as two looks"
    assert bench.look(1.0)


def test_its_thread_tells_once_and_ends() -> None:
    told: list[int] = []
    has_told = threading.Event()

    def on_hang(number: int, _: float) -> None:
        told.append(number)
        watchdog.stop()  # as a server does that ends
        has_told.set()

    watchdog = Watchdog(lambda: 7, 0.05, on_hang)
    watchdog.start()
    assert has_told.wait(PATIENCE_S)
    watchdog.stop()
    assert not watchdog._thread.is_alive()
    assert told == [7]


def test_stacks_say_where_threads_are_innermost_first() -> None:
    waits, go_on = threading.Event(), threading.Event()

    def inner() -> None:
        waits.set()
        go_on.wait(PATIENCE_S)

    def outer() -> None:
        inner()

    thread = threading.Thread(target=outer, name="a-thread")
    assert stacks_of([thread]) == ""
    thread.start()
    assert waits.wait(PATIENCE_S)
    try:
        line = stacks_of([thread])
    finally:
        go_on.set()
        thread.join(PATIENCE_S)
    assert line.startswith("a-thread: ")
    assert line.index("inner (test_watchdog.py:") < line.index("outer (test_watchdog.py:")
