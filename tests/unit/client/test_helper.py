"""The thread that helps with large arrays: every item once, whoever does it, and nobody waits for help that is busy."""

from __future__ import annotations

import os
import threading

import pytest

from expertd import _helper
from expertd._helper import _Helper, share

PATIENCE_S = 30


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were two, which is what the helper is for; and it has ended what it was last offered."""
    monkeypatch.setattr(_helper, "_num_processors", lambda: 2)
    assert _helper._helper._is_free.acquire(timeout=PATIENCE_S)
    _helper._helper._is_free.release()


def test_every_item_is_done_once() -> None:
    for num_items in (0, 1, 2, 50):
        done: list[int] = []
        share(done.append, range(num_items))
        assert sorted(done) == list(range(num_items))


def test_two_threads_work_at_the_same_time() -> None:
    both_work = threading.Barrier(2)
    share(lambda _: both_work.wait(PATIENCE_S) and None, range(2))


def test_a_caller_does_everything_itself_while_the_helper_is_busy() -> None:
    begun, go_on = threading.Event(), threading.Event()
    main = threading.current_thread()

    def hold_helper(_: int) -> None:
        if threading.current_thread() is first:
            assert begun.wait(PATIENCE_S)
        else:
            begun.set()
            assert go_on.wait(PATIENCE_S)

    first = threading.Thread(target=share, args=(hold_helper, range(2)))
    first.start()
    try:
        assert begun.wait(PATIENCE_S)
        workers: list[threading.Thread] = []
        share(lambda _: workers.append(threading.current_thread()), range(20))
        assert workers == [main] * 20
    finally:
        go_on.set()
        first.join(PATIENCE_S)


@pytest.mark.parametrize("who_fails", ["caller", "helper"])
def test_what_a_call_raises_reaches_the_caller(who_fails: str) -> None:
    main, both_work = threading.current_thread(), threading.Barrier(2)

    def work(_: int) -> None:
        both_work.wait(PATIENCE_S)
        if (threading.current_thread() is main) == (who_fails == "caller"):
            raise MemoryError(who_fails)

    with pytest.raises(MemoryError, match=who_fails):
        share(work, range(2))
    done: list[int] = []
    share(done.append, range(9))  # and the helper lives on
    assert sorted(done) == list(range(9))


def test_one_processor_gets_no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_helper, "_num_processors", lambda: 1)
    helper = _Helper()
    assert not helper.offer(None)  # type: ignore[arg-type]
    assert not helper._has_started


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_its_own() -> None:
    share(lambda _: None, range(2))  # the helper's thread runs, here
    child = os.fork()
    if child == 0:
        both_work = threading.Barrier(2)
        try:
            share(lambda _: both_work.wait(PATIENCE_S) and None, range(2))
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
