"""A promise behaves as `concurrent.futures.Future` does: the same script, run with both."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from expertd_server.promise import Promise

PATIENCE_S = 30.0


class GoneError(Exception): ...


both = pytest.mark.parametrize("kind", [Promise, Future])


@both
def test_a_result(kind: Any) -> None:
    promise, told = kind(), []
    promise.add_done_callback(told.append)
    assert (promise.done(), promise.cancelled(), told) == (False, False, [])
    assert promise.set_running_or_notify_cancel()
    assert not promise.cancel()
    promise.set_result(3)
    assert (promise.done(), promise.cancelled(), told) == (True, False, [promise])
    assert (promise.result(), promise.exception()) == (3, None)
    promise.add_done_callback(told.append)
    assert told == [promise, promise]
    assert not promise.cancel()


@both
def test_an_error(kind: Any) -> None:
    promise, error = kind(), ValueError("bad")
    promise.set_exception(error)
    assert promise.exception() is error
    with pytest.raises(ValueError, match="bad"):
        promise.result()


@both
def test_given_up(kind: Any) -> None:
    promise, told = kind(), []
    promise.add_done_callback(told.append)
    assert promise.cancel()
    assert promise.cancel()
    assert (promise.done(), promise.cancelled(), told) == (True, True, [promise])
    assert not promise.set_running_or_notify_cancel()
    for question in (promise.result, promise.exception):
        with pytest.raises(CancelledError):
            question(timeout=0)


@both
def test_who_waits_too_little_is_told(kind: Any) -> None:
    with pytest.raises(TimeoutError):
        kind().result(timeout=0)


@both
def test_who_waits_is_woken(kind: Any) -> None:
    promise, got = kind(), []
    waiting = threading.Thread(target=lambda: got.append(promise.result(PATIENCE_S)))
    waiting.start()
    promise.set_result("a")
    waiting.join(PATIENCE_S)
    assert got == ["a"]


@both
def test_a_callback_that_fails_is_logged_and_the_others_are_called(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    promise, told = kind(), []
    promise.add_done_callback(lambda _: 1 / 0)
    promise.add_done_callback(told.append)
    with caplog.at_level(logging.ERROR):
        promise.set_result(1)
    assert told == [promise]
    assert len(caplog.records) == 1


def test_who_is_named_at_the_start_is_told_first() -> None:
    told: list[str] = []
    promise = Promise[int](lambda _: told.append("first"))
    promise.add_done_callback(lambda _: told.append("second"))
    assert told == []
    promise.set_result(3)
    assert told == ["first", "second"]


def test_it_is_kept_once() -> None:
    for end in (lambda p: p.set_result(1), lambda p: p.set_exception(ValueError()), lambda p: p.cancel()):
        promise: Promise[int] = Promise()
        end(promise)
        with pytest.raises(RuntimeError, match="kept once"):
            promise.set_result(2)


def test_exactly_one_of_cancelling_and_running_wins() -> None:
    for _ in range(200):
        promise: Promise[int] = Promise()
        won: list[bool] = []
        ready = threading.Barrier(2)

        def race(step: Any, won: list[bool] = won, ready: threading.Barrier = ready) -> None:
            ready.wait(PATIENCE_S)
            won.append(step())

        racers = [
            threading.Thread(target=race, args=(step,))
            for step in (promise.cancel, promise.set_running_or_notify_cancel)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(PATIENCE_S)
        assert sorted(won) == [False, True]


def test_an_error_that_was_raised_leaves_no_cycle() -> None:
    gc.collect()
    gc.disable()
    try:
        try:
            promise: Promise[int] = Promise()
            error = GoneError("gone")
            known = weakref.ref(error)
            promise.set_exception(error)
            promise.result()
        except GoneError:
            pass
        del promise, error
        assert known() is None
    finally:
        gc.enable()
