"""The batcher under a clock of its own: who runs with whom, when, and what happens to those who fail or leave."""

from __future__ import annotations

import gc
import queue
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest

from expertd_server.batcher import Batch, Batcher, Limits
from expertd_server.errors import OverloadedError, RequestTimeoutError, UnavailableError
from expertd_server.event_loop import EventLoop
from expertd_server.promise import Promise

PATIENCE_S = 30.0

R = TypeVar("R")


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Done(Generic[R]):
    """A batch that was computed when it was launched."""

    answers: list[R]
    closed: Callable[[], None] = lambda: None

    def wait(self, seconds: float | None = None) -> bool:
        return True

    def results(self) -> list[R]:
        return self.answers

    def close(self) -> None:
        self.closed()


class Bench:
    """A batcher that records its batches; a payload that is an exception is raised."""

    def __init__(self, *, batch_s: float = 0.0, **limits: float) -> None:
        self.clock = Clock()
        self.batches: list[tuple[object, list[str]]] = []
        self.finished: list[int] = []
        self._batch_s = batch_s
        defaults = {"max_batch_tokens": 10, "max_queue_tokens": 100, "max_queue_requests": 50}
        self.batcher: Batcher[str | Exception, str] = Batcher(
            self._launch,
            Limits(**{**defaults, **limits}),  # type: ignore[arg-type]
            clock=self.clock,
        )

    def _launch(self, batch: Batch[str | Exception, str]) -> Done[str]:
        self.batches.append((batch.key, [str(entry.payload) for entry in batch.entries]))
        self.clock.now_s += self._batch_s
        for entry in batch.entries:
            if isinstance(entry.payload, Exception):
                raise entry.payload
        answers = [f"{entry.payload} done" for entry in batch.entries]
        return Done(answers, lambda: self.finished.append(batch.num_tokens))

    def submit(
        self, payload: str | Exception, key: str = "a", tokens: int = 1, deadline_s: float | None = None
    ) -> Future[str]:
        return self.batcher.submit(key, payload, tokens, deadline_s=deadline_s)

    def run_all(self) -> None:
        while self.batcher.run_once():
            pass


def test_what_waits_for_one_key_runs_together_in_order_of_arrival() -> None:
    bench = Bench()
    futures = [bench.submit(name, tokens=3) for name in "wxyz"]
    bench.run_all()
    assert bench.batches == [("a", ["w", "x", "y"]), ("a", ["z"])]
    assert [future.result(0) for future in futures] == ["w done", "x done", "y done", "z done"]
    assert bench.finished == [9, 3]


def test_a_large_request_is_not_passed_by_small_ones_behind_it() -> None:
    bench = Bench()
    for name, tokens in (("small", 4), ("large", 10), ("tiny", 1)):
        bench.submit(name, tokens=tokens)
    bench.run_all()
    assert [members for _, members in bench.batches] == [["small"], ["large"], ["tiny"]]


def test_the_key_whose_first_request_is_oldest_runs_first() -> None:
    bench = Bench()
    for key, name in (("b", "b0"), ("a", "a0"), ("b", "b1"), ("c", "c0"), ("a", "a1")):
        bench.submit(name, key=key)
    bench.run_all()
    assert bench.batches == [("b", ["b0", "b1"]), ("a", ["a0", "a1"]), ("c", ["c0"])]


def test_a_busy_key_starves_no_other() -> None:
    bench = Bench()
    for n in range(10):
        bench.submit(f"busy{n}", key="busy", tokens=5)
    bench.submit("lone", key="lone")
    for n in range(20):  # two more busy ones for every batch of two that ran
        bench.submit(f"more{n}", key="busy", tokens=5)
        if n % 2:
            bench.batcher.run_once()
    keys = [key for key, _ in bench.batches]
    assert len(keys) == 10
    assert keys.index("lone") == 5, f"after the 5 batches that were older, no later: {keys}"


def test_an_empty_request_runs_too() -> None:
    bench = Bench()
    future = bench.submit("empty", tokens=0)
    bench.run_all()
    assert future.result(0) == "empty done"


def test_nothing_due_is_no_batch() -> None:
    assert Bench().batcher.run_once() is False


@pytest.mark.parametrize(("tokens", "requests"), [(101, 1000), (1000, 5)])
def test_a_full_queue_refuses_and_says_when_to_come_back(tokens: int, requests: int) -> None:
    bench = Bench(max_queue_tokens=tokens, max_queue_requests=requests, batch_s=2.0)
    bench.submit("first", tokens=10)
    bench.run_all()  # 10 tokens in 2 s
    room = min(tokens // 10, requests)
    admitted = [bench.submit("x", tokens=10) for _ in range(room)]
    with pytest.raises(OverloadedError, match="queue is full") as caught:
        bench.submit("one too many", tokens=10)
    assert caught.value.retry_delay_s == pytest.approx(min(10.0, 2.0 * room))
    bench.run_all()
    assert all(future.result(0) == "x done" for future in admitted), "those admitted are served"
    bench.submit("there is room again", tokens=10)


def test_a_request_beyond_a_batch_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="num_tokens is 11, expected at most 10"):
        Bench().submit("x", tokens=11)


def test_a_deadline_that_passed_is_honoured_before_compute() -> None:
    bench = Bench()
    late, fine = bench.submit("late", deadline_s=101.0), bench.submit("fine", deadline_s=103.0)
    bench.clock.now_s = 102.0
    bench.run_all()
    assert bench.batches == [("a", ["fine"])]
    assert fine.result(0) == "fine done"
    with pytest.raises(RequestTimeoutError, match=r"2\.000 s"):
        late.result(0)
    assert bench.batcher.queue_tokens == 0


def test_expired_members_leave_room_for_others() -> None:
    bench = Bench()
    for n in range(3):
        bench.submit(f"late{n}", tokens=10, deadline_s=101.0)
    bench.submit("fine", tokens=10)
    bench.clock.now_s = 102.0
    bench.batcher.run_once()
    assert bench.batches == [("a", ["fine"])]


def test_a_cancelled_caller_is_skipped_and_frees_its_room_at_once() -> None:
    bench = Bench(max_queue_tokens=10)
    gone, stays = bench.submit("gone", tokens=6), bench.submit("stays", tokens=4)
    assert gone.cancel()
    assert (bench.batcher.queue_tokens, bench.batcher.queue_requests) == (4, 1)
    bench.submit("new", tokens=6)
    bench.run_all()
    assert bench.batches == [("a", ["stays", "new"])]
    assert stays.result(0) == "stays done"


def test_a_caller_who_leaves_while_its_batch_runs_kills_nothing() -> None:
    bench = Bench()
    neighbours: list[Future[str]] = []

    def run(batch: Batch[str, str]) -> Done[str]:
        assert not neighbours[0].cancel(), "a running request is not cancelled"
        neighbours[0].set_result("completed by somebody else")  # the rudest caller there can be
        return Done(["done"] * len(batch.entries))

    batcher: Batcher[str, str] = Batcher(
        run, Limits(max_batch_tokens=10, max_queue_tokens=10, max_queue_requests=10), clock=bench.clock
    )
    neighbours += [batcher.submit("a", "x", 1), batcher.submit("a", "y", 1)]
    batcher.run_once()
    assert neighbours[1].result(0) == "done"


def test_a_poisoned_request_fails_alone() -> None:
    bench = Bench()
    before, poison, after = bench.submit("before"), bench.submit(ValueError("poison")), bench.submit("after")
    other = bench.submit("other", key="b")
    bench.run_all()
    assert before.result(0) == "before done"
    assert after.result(0) == "after done"
    assert other.result(0) == "other done"
    with pytest.raises(ValueError, match="poison"):
        poison.result(0)
    assert [members for _, members in bench.batches] == [
        ["before", "poison", "after"],
        ["before"],
        ["poison"],
        ["after"],
        ["other"],
    ], "the members of a failed batch are the oldest"
    assert bench.finished == [1, 1, 1], "those that were computed"


def test_a_batch_that_fails_whole_reaches_each_of_its_waiters_and_no_other() -> None:
    bench = Bench()
    failing = [bench.submit(RuntimeError(f"device {n}")) for n in range(4)]
    fine = bench.submit("fine", key="b")
    bench.run_all()
    for n, future in enumerate(failing):
        with pytest.raises(RuntimeError, match=f"device {n}"):
            future.result(0)
    assert fine.result(0) == "fine done"


def test_members_whose_deadline_passes_in_the_failed_batch_do_not_run_again() -> None:
    bench = Bench(batch_s=5.0)
    bench.submit(RuntimeError("poison"))
    late = bench.submit("late", deadline_s=103.0)
    bench.run_all()
    with pytest.raises(RequestTimeoutError):
        late.result(0)


def test_a_run_that_returns_too_few_results_fails_its_waiters() -> None:
    batcher: Batcher[str, str] = Batcher(
        lambda batch: Done([]), Limits(max_batch_tokens=10, max_queue_tokens=10, max_queue_requests=10)
    )
    future = batcher.submit("a", "x", 1)
    batcher.run_once()
    with pytest.raises(RuntimeError, match="0 results came for 1 requests"):
        future.result(0)


def test_queued_seconds_run_from_admission_to_the_start_of_the_batch() -> None:
    seen: list[float] = []
    clock = Clock()

    def run(batch: Batch[str, str]) -> Done[str]:
        seen.extend(entry.queued_s for entry in batch.entries)
        return Done(["done"] * len(batch.entries))

    batcher: Batcher[str, str] = Batcher(
        run, Limits(max_batch_tokens=10, max_queue_tokens=10, max_queue_requests=10), clock=clock
    )
    batcher.submit("a", "x", 1)
    clock.now_s += 1.5
    batcher.submit("a", "y", 1)
    clock.now_s += 0.25
    batcher.run_once()
    assert seen == [1.75, 0.25]


class TestQueueDelay:
    """max_queue_delay_s = 1."""

    def test_a_batch_waits_for_company_until_the_delay_is_over(self) -> None:
        bench = Bench(max_queue_delay_s=1.0)
        bench.submit("x")
        bench.clock.now_s += 0.9
        assert not bench.batcher.run_once()
        bench.submit("y")
        bench.clock.now_s += 0.1
        bench.run_all()
        assert bench.batches == [("a", ["x", "y"])]

    def test_a_full_batch_does_not_wait(self) -> None:
        bench = Bench(max_queue_delay_s=1.0)
        bench.submit("x", tokens=10)
        bench.run_all()
        assert bench.batches == [("a", ["x"])]

    def test_a_near_deadline_does_not_wait(self) -> None:
        bench = Bench(max_queue_delay_s=1.0)
        bench.submit("x")
        future = bench.submit("y", deadline_s=bench.clock.now_s + 0.5)
        bench.run_all()
        assert future.result(0) == "y done"

    def test_a_draining_batcher_does_not_wait(self) -> None:
        bench = Bench(max_queue_delay_s=1.0)
        future = bench.submit("x")
        assert not bench.batcher.drain(0.0)
        bench.run_all()
        assert future.result(0) == "x done"
        assert bench.batcher.drain(0.0)


def test_a_draining_batcher_refuses_and_finishes() -> None:
    bench = Bench()
    admitted = bench.submit("x")
    assert not bench.batcher.drain(0.0), "one request is left"
    with pytest.raises(UnavailableError, match="draining"):
        bench.submit("y")
    bench.run_all()
    assert admitted.result(0) == "x done"
    assert bench.batcher.drain(0.0)


def test_stop_fails_those_that_still_wait() -> None:
    bench = Bench()
    waiting = [bench.submit("x"), bench.submit("y", key="b")]
    assert bench.batcher.stop(0.0)
    for future in waiting:
        with pytest.raises(UnavailableError, match="stopped"):
            future.result(0)
    assert (bench.batcher.queue_tokens, bench.batcher.queue_requests) == (0, 0)


def test_a_backend_that_hangs_fails_what_waits_and_what_runs_and_what_it_gives_after_all_is_dropped() -> None:
    enters, go_on = threading.Event(), threading.Event()

    def launch(batch: Batch[str, str]) -> Done[str]:
        enters.set()
        assert go_on.wait(PATIENCE_S)
        return Done([f"{entry.payload} done" for entry in batch.entries])

    limits = Limits(max_batch_tokens=2, max_queue_tokens=100, max_queue_requests=50)
    batcher: Batcher[str, str] = Batcher(launch, limits)
    batcher.start()
    futures = [batcher.submit("a", "x", 2)]
    assert enters.wait(PATIENCE_S)
    futures += [batcher.submit("a", "y", 1), batcher.submit("b", "z", 2)]
    futures[1].cancel()
    assert batcher.oldest_work() is not None
    batcher.abandon()
    for future in (futures[0], futures[2]):
        with pytest.raises(UnavailableError, match="hangs"):
            future.result(0)
    with pytest.raises(UnavailableError):
        batcher.submit("a", "w", 1)
    assert (batcher.queue_tokens, batcher.queue_requests) == (0, 0)
    assert batcher.drain(0.0), "nobody is waited for"
    assert not batcher.stop(0.0), "its thread is still there"
    go_on.set()
    assert batcher.stop(PATIENCE_S)
    assert batcher.drain(0.0)
    with pytest.raises(UnavailableError, match="hangs"):
        futures[0].result(0)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """A thread that serves requests."""
    loop = EventLoop.acquire()
    yield loop
    loop.release()


WAYS = pytest.mark.parametrize(("max_in_flight", "here"), [(1, False), (2, False), (1, True), (2, True)])
"""How many batches, and whether all is done in one thread as far as possible."""


@WAYS
def test_the_threads_outlive_a_hook_that_raises(max_in_flight: int, here: bool, loop: EventLoop) -> None:
    def hook() -> None:
        raise RuntimeError("hook")

    batcher: Batcher[str, str] = Batcher(
        lambda batch: Done(["done"] * len(batch.entries), hook),
        Limits(max_batch_tokens=10, max_queue_tokens=10, max_queue_requests=10, max_in_flight=max_in_flight),
    )
    batcher.start(loop.soon if here else None)
    try:
        for _ in range(3):
            assert batcher.submit("a", "x", 1).result(PATIENCE_S) == "done"
    finally:
        assert batcher.stop(PATIENCE_S)


class OnDevice:
    """A batch whose computation a test steps through."""

    def __init__(self, batch: Batch[str | Exception, str]) -> None:
        self.members = [str(entry.payload) for entry in batch.entries]
        self.steps: list[str] = []
        self._payloads = [entry.payload for entry in batch.entries]

    def wait(self, seconds: float | None = None) -> bool:
        self.steps.append("wait")
        for payload in self._payloads:
            if isinstance(payload, Exception):
                raise payload
        return True

    def results(self) -> list[str]:
        self.steps.append("results")
        return [f"{name} done" for name in self.members]

    def close(self) -> None:
        self.steps.append("close")


class TestInFlight:
    """Two batches may be launched and not computed; a third may be handing out its answers."""

    def make(self, **limits: int) -> tuple[Batcher[str | Exception, str], list[OnDevice]]:
        launched: list[OnDevice] = []

        def launch(batch: Batch[str | Exception, str]) -> OnDevice:
            if any(isinstance(entry.payload, MemoryError) for entry in batch.entries):
                raise next(e.payload for e in batch.entries if isinstance(e.payload, MemoryError))
            launched.append(OnDevice(batch))
            return launched[-1]

        defaults = {"max_batch_tokens": 10, "max_queue_tokens": 100, "max_queue_requests": 50, "max_in_flight": 2}
        return Batcher(launch, Limits(**{**defaults, **limits}), clock=Clock()), launched

    def test_the_next_batch_is_launched_while_one_computes_and_no_third(self) -> None:
        batcher, launched = self.make()
        futures = [batcher.submit("a", name, 10) for name in "wxyz"]
        assert [batcher.launch_once() for _ in range(3)] == [True, True, False]
        assert [batch.members for batch in launched] == [["w"], ["x"]]
        assert batcher.queue_requests == 2
        assert batcher.finish_once()
        assert futures[0].result(0) == "w done"
        assert launched[0].steps == ["wait", "results", "close"]
        assert launched[1].steps == []
        assert [batcher.launch_once() for _ in range(2)] == [True, False]
        while batcher.finish_once() or batcher.launch_once():
            pass
        assert [future.result(0) for future in futures] == ["w done", "x done", "y done", "z done"]

    def test_what_arrives_while_the_device_is_full_runs_together(self) -> None:
        batcher, launched = self.make()
        for name in "abcd":
            batcher.submit("a", name, 1)
            batcher.launch_once()
        batcher.finish_once()
        batcher.launch_once()
        assert [batch.members for batch in launched] == [["a"], ["b"], ["c", "d"]]

    def test_a_batch_leaves_its_room_before_its_answers_are_made(self) -> None:
        batcher, launched = self.make(max_in_flight=1)
        batcher.submit("a", "x", 10)
        batcher.submit("a", "y", 10)
        assert batcher.launch_once()
        seen: list[bool] = []

        def results() -> list[str]:
            seen.append(batcher.launch_once())
            return ["x done"]

        launched[0].results = results  # type: ignore[method-assign]
        assert batcher.finish_once()
        assert seen == [True]

    @pytest.mark.parametrize("kind", [ValueError, MemoryError], ids=["while it computes", "while it is launched"])
    def test_a_batch_that_fails_runs_again_one_by_one_and_before_what_waits(self, kind: type[Exception]) -> None:
        batcher, launched = self.make()
        good, bad, other = batcher.submit("a", "good", 1), batcher.submit("a", kind("bad"), 1), Future[str]()
        batcher.launch_once()
        other = batcher.submit("b", "other", 1)
        while batcher.finish_once() or batcher.launch_once():
            pass
        assert good.result(0) == "good done"
        assert other.result(0) == "other done"
        with pytest.raises(kind, match="bad"):
            bad.result(0)
        assert all(batch.steps[-1] == "close" for batch in launched), "every slot is given back"
        assert launched[-1].members == ["other"]
        assert batcher.drain(0.0)

    def test_a_batch_that_waits_to_run_again_fails_when_the_batcher_stops(self) -> None:
        batcher, _ = self.make()
        futures = [batcher.submit("a", payload, 1) for payload in ("x", ValueError("bad"))]
        batcher.launch_once()
        batcher.finish_once()
        assert not batcher.drain(0.0), "they are admitted, and not served"
        assert batcher.stop(0.0)
        for future in futures:
            with pytest.raises(UnavailableError, match="stopped"):
                future.result(0)
        assert batcher.drain(0.0)

    def test_the_oldest_work_is_known_until_it_is_over(self) -> None:
        batcher, launched = self.make()
        assert batcher.oldest_work() is None
        for name in ("w", "x"):
            batcher.submit("a", name, 10)
            batcher.launch_once()
        first = batcher.oldest_work()
        assert first is not None
        batch = batcher.in_flight(first)
        assert batch is not None
        assert [entry.payload for entry in batch.entries] == ["w"]
        del batch
        at_close: list[int | None] = []
        launched[0].close = lambda: at_close.append(batcher.oldest_work())  # type: ignore[method-assign]
        batcher.finish_once()
        assert at_close == [first], "until the last of it is done"
        second = batcher.oldest_work()
        assert second not in (None, first)
        assert batcher.in_flight(first) is None
        batcher.finish_once()
        assert batcher.oldest_work() is None

    def test_what_waits_and_is_not_taken_is_work_too(self) -> None:
        batcher, _ = self.make()
        future = batcher.submit("a", "w", 10)
        waiting = batcher.oldest_work()
        assert waiting is not None
        assert batcher.in_flight(waiting) is None
        batcher.launch_once()
        assert batcher.oldest_work() == waiting, "from arrival to the end it has one number"
        assert batcher.in_flight(waiting) is not None
        batcher.submit("a", "x", 10)
        batcher.finish_once()
        assert future.result(0) == "w done"
        assert batcher.oldest_work() not in (None, waiting)

    @pytest.mark.parametrize("fails", ["launch", "wait", "close"])
    def test_a_batch_that_fails_is_not_in_flight_for_ever(self, fails: str) -> None:
        batcher, launched = self.make()
        payload = {"launch": MemoryError("no"), "wait": ValueError("no"), "close": "x"}[fails]
        batcher.submit("a", payload, 1)  # type: ignore[arg-type]
        batcher.launch_once()

        def close() -> None:
            raise RuntimeError("no")

        if fails == "close":
            launched[0].close = close  # type: ignore[method-assign]
            with pytest.raises(RuntimeError, match="no"):
                batcher.finish_once()
        else:
            batcher.finish_once()
        assert batcher.oldest_work() is None

    def test_stop_finishes_what_is_in_flight(self) -> None:
        batcher, _ = self.make()
        entered, gate = threading.Event(), threading.Event()

        def launch(batch: Batch[str | Exception, str]) -> OnDevice:
            entered.set()
            assert gate.wait(PATIENCE_S)
            return OnDevice(batch)

        batcher._launch = launch
        batcher.start()
        future = batcher.submit("a", "x", 1)
        assert entered.wait(PATIENCE_S)
        assert not batcher.stop(0.0), "a batch is being launched"
        gate.set()
        assert batcher.stop(PATIENCE_S)
        assert future.result(0) == "x done"


class InTime(OnDevice):
    """A batch that is over when a test says so."""

    def __init__(self, batch: Batch[str | Exception, str]) -> None:
        super().__init__(batch)
        self.over = threading.Event()
        self.threads: set[str] = set()

    def wait(self, seconds: float | None = None) -> bool:
        self.threads.add(threading.current_thread().name)
        is_over = self.over.wait(PATIENCE_S if seconds is None else 0.0)
        return is_over and super().wait()


class Here:
    """The thread that serves requests: the test's own, which does what it was asked for one by one."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def soon(self, function: Callable[[], object]) -> None:
        self._asked.put(function)

    def step(self) -> None:
        self._asked.get(timeout=PATIENCE_S)()

    def step_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self.step()

    @property
    def is_idle(self) -> bool:
        return self._asked.empty()


class TestInOneThread:
    """Batches are launched and handed out where requests are submitted; a thread waits in between, and nothing else."""

    @pytest.fixture
    def bench(self) -> Iterator[tuple[Batcher[str | Exception, str], Here, list[InTime]]]:
        launched: list[InTime] = []

        def launch(batch: Batch[str | Exception, str]) -> InTime:
            launched.append(InTime(batch))
            return launched[-1]

        limits = Limits(max_batch_tokens=10, max_queue_tokens=100, max_queue_requests=50, max_in_flight=2)
        batcher: Batcher[str | Exception, str] = Batcher(launch, limits)
        here = Here()
        batcher.start(here.soon)
        yield batcher, here, launched
        for batch in launched:
            batch.over.set()
        stopping = threading.Thread(target=batcher.stop, args=(PATIENCE_S,))
        stopping.start()
        while stopping.is_alive():
            if here.is_idle:
                stopping.join(0.001)
            else:
                here.step()
        assert not any(thread.is_alive() for thread in batcher.threads if thread is not threading.current_thread())

    def test_two_are_in_flight_and_the_third_follows_the_first(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        promises = [batcher.submit("a", name, 10) for name in "xyz"]
        assert not launched, "not before the thread is asked"
        here.step()
        assert [batch.members for batch in launched] == [["x"], ["y"]]
        assert here.is_idle
        launched[1].over.set()
        launched[0].over.set()
        here.step_until(promises[0].done)
        assert promises[0].result(0) == "x done"
        assert launched[0].steps[-2:] == ["results", "close"]
        assert "expertd-waiter" in launched[0].threads
        assert [batch.members for batch in launched] == [["x"], ["y"], ["z"]]
        assert not promises[1].done(), "other things of the thread come in between"
        here.step_until(promises[1].done)
        assert promises[1].result(0) == "y done"
        launched[2].over.set()
        here.step_until(promises[2].done)
        assert promises[2].result(0) == "z done"
        assert batcher.drain(0.0)

    def test_an_idle_device_gets_the_next_batch_before_answers_are_made(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        batcher.submit("a", "x", 10)
        here.step()
        batcher.submit("a", "y", 10)
        seen: list[int] = []
        make = launched[0].results

        def results() -> list[str]:
            seen.append(len(launched))
            return make()

        launched[0].results = results  # type: ignore[method-assign]
        launched[0].over.set()
        here.step_until(lambda: bool(seen))
        assert seen == [2]

    @pytest.mark.parametrize("is_short", [True, False])
    def test_a_lone_request_is_waited_for_briefly(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]], is_short: bool
    ) -> None:
        batcher, here, launched = bench
        launch = batcher._launch

        def launch_short(batch: Batch[str | Exception, str]) -> InTime:
            running = launch(batch)
            assert isinstance(running, InTime)
            if is_short:
                running.over.set()
            return running

        batcher._launch = launch_short
        promise = batcher.submit("a", "x", 1)
        batcher.hurry()
        assert promise.done() == is_short
        assert launched[0].threads >= {threading.current_thread().name}
        launched[0].over.set()
        here.step_until(promise.done)
        assert promise.result(0) == "x done"
        assert launched[0].steps[-2:] == ["results", "close"], "once"

    def test_one_of_several_is_not(self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]) -> None:
        batcher, _, launched = bench
        for name in "xy":
            batcher.submit("a", name, 10)
        batcher.hurry()
        assert len(launched) == 2
        assert threading.current_thread().name not in launched[0].threads | launched[1].threads

    @pytest.mark.parametrize("is_alone", [True, False])
    def test_what_goes_wrong_on_the_device_is_told(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]], is_alone: bool
    ) -> None:
        batcher, here, launched = bench
        bad = batcher.submit("a", ValueError("bad"), 1)
        good = None if is_alone else batcher.submit("a", "good", 1)
        batcher.hurry()
        while not bad.done() or not (good is None or good.done()):
            for batch in launched:
                batch.over.set()
            here.step()
        with pytest.raises(ValueError, match="bad"):
            bad.result(0)
        if good is not None:
            assert good.result(0) == "good done"
        assert all(batch.steps[-1] == "close" for batch in launched)

    def test_it_is_not_for_batches_that_wait_for_company(self) -> None:
        limits = Limits(max_batch_tokens=1, max_queue_tokens=1, max_queue_requests=1, max_queue_delay_s=1.0)
        batcher: Batcher[str, str] = Batcher(lambda _: Done(["x"]), limits)
        with pytest.raises(ValueError, match="max_queue_delay_s"):
            batcher.start(Here().soon)


@WAYS
def test_accounts_balance_under_eight_threads_that_submit_cancel_and_expire(
    max_in_flight: int, here: bool, loop: EventLoop
) -> None:
    seed = 20261123
    results = {"done": 0, "cancelled": 0, "timeout": 0, "overloaded": 0}
    lock = threading.Lock()
    biggest = 0

    def launch(batch: Batch[int, int]) -> Done[int]:
        nonlocal biggest
        biggest = max(biggest, batch.num_tokens)
        assert len({entry.key for entry in batch.entries} | {batch.key}) == 1
        return Done([entry.payload for entry in batch.entries])

    limits = Limits(max_batch_tokens=16, max_queue_tokens=200, max_queue_requests=40, max_in_flight=max_in_flight)
    batcher: Batcher[int, int] = Batcher(launch, limits)
    batcher.start(loop.soon if here else None)

    def work(thread: int) -> None:
        chance = random.Random(seed + thread)
        for n in range(300):
            outcome = "done"
            try:
                deadline_s = 0.0 if chance.random() < 0.1 else None
                future = batcher.submit(chance.randrange(3), n, chance.randrange(17), deadline_s=deadline_s)
                if chance.random() < 0.2 and future.cancel():
                    outcome = "cancelled"
                else:
                    assert future.result(PATIENCE_S) == n, f"seed {seed} thread {thread} request {n}"
            except RequestTimeoutError:
                outcome = "timeout"
            except OverloadedError:
                outcome = "overloaded"
            with lock:
                results[outcome] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sum(results.values()) == 2400, f"seed {seed}: a caller hangs or failed, {results}"
    assert results["done"] > 1000, results
    assert biggest <= 16
    assert batcher.drain(PATIENCE_S)
    assert (batcher.queue_tokens, batcher.queue_requests) == (0, 0)
    assert batcher.stop(PATIENCE_S)


class Payload:
    """Something that can be watched."""


class FailsLate(Done[str]):
    """A batch that fails while it computes, and has it in its frame."""

    is_over = True

    def wait(self, seconds: float | None = None) -> bool:
        if seconds is not None and not self.is_over:
            return False
        raise RuntimeError("bad")


@pytest.mark.parametrize("fails", ["never", "at launch", "while it computes", "cancelled"])
def test_an_answered_request_is_let_go_whoever_keeps_its_future(fails: str) -> None:
    """Its tensors and its layer live no longer, without the help of the garbage collector."""

    def launch(batch: Batch[Payload, str]) -> Done[str]:
        if fails == "at launch":
            raise RuntimeError(f"bad: {batch.num_tokens}")
        return FailsLate(["done"]) if fails == "while it computes" else Done(["done"])

    batcher = Batcher(launch, Limits(max_batch_tokens=1, max_queue_tokens=10, max_queue_requests=10))
    payload = Payload()
    alive = weakref.ref(payload)
    gc.disable()
    try:
        future = batcher.submit("a", payload, 1)
        del payload
        if fails == "cancelled":
            assert future.cancel()
        assert batcher.run_once() == (fails != "cancelled")
        assert future.done()
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["at once", "briefly", "by the waiting thread"])
def test_nor_does_one_that_fails_where_requests_are_served_live_on(how: str) -> None:
    launched: list[FailsLate] = []

    def launch(batch: Batch[Payload, str]) -> FailsLate:
        launched.append(FailsLate(["done"]))
        launched[-1].is_over = how != "by the waiting thread"
        return launched[-1]

    in_flight = 1 if how == "at once" else 2
    limits = Limits(max_batch_tokens=1, max_queue_tokens=10, max_queue_requests=10, max_in_flight=in_flight)
    batcher, here = Batcher(launch, limits), Here()
    batcher.start(here.soon)
    payload = Payload()
    alive = weakref.ref(payload)
    gc.disable()
    try:
        promise = batcher.submit("a", payload, 1)
        del payload
        if how == "at once":
            here.step()
        else:
            batcher.hurry()
        assert promise.done() == (how != "by the waiting thread")
        launched[0].is_over = True
        here.step_until(promise.done)
        with pytest.raises(RuntimeError, match="bad"):
            promise.result(0)
        assert batcher.stop(PATIENCE_S)
        assert alive() is None
    finally:
        gc.enable()


class Loop:
    """What `Batcher.start` is given where no thread runs what waits: calls wait until `turn`."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def __call__(self, function: Callable[[], object]) -> None:
        self.calls.append(function)

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class AloneBench(Bench):
    """A batcher without threads."""

    def __init__(self, **limits: float) -> None:
        super().__init__(**limits)
        self.loop = Loop()
        self.batcher.start(self.loop)
        self.told: list[str] = []

    def submit_last(self, payload: str | Exception, tokens: int = 1, deadline_s: float | None = None) -> Promise[str]:
        promise = self.batcher.submit("a", payload, tokens, deadline_s, self._tell, is_last=True)
        self.batcher.hurry()
        return promise

    def _tell(self, promise: Promise[str]) -> None:
        self.told.append(str(promise.exception(0) or promise.result(0)))


class TestWithoutAThread:
    def test_the_last_to_come_runs_here_and_now(self) -> None:
        bench = AloneBench()
        assert bench.submit_last("x", tokens=3).result(0) == "x done"
        assert (bench.batches, bench.told, bench.finished) == ([("a", ["x"])], ["x done"], [3])
        assert bench.loop.calls == [], "nothing is left to do"
        assert bench.batcher.oldest_work() is None

    def test_who_is_not_the_last_waits_for_company(self) -> None:
        bench = AloneBench()
        promises = [bench.batcher.submit("a", name, 1) for name in "xy"]
        assert len(bench.loop.calls) == 1
        assert bench.batches == []
        bench.loop.turn()
        assert bench.batches == [("a", ["x", "y"])]
        assert [promise.result(0) for promise in promises] == ["x done", "y done"]

    def test_nobody_who_waits_is_passed(self) -> None:
        bench = AloneBench()
        bench.submit("first", key="b")
        last = bench.submit_last("last")
        assert not last.done()
        bench.loop.turn()
        assert bench.batches == [("b", ["first"]), ("a", ["last"])]
        assert bench.told == ["last done"]

    def test_a_deadline_that_passed_is_honoured_before_compute(self) -> None:
        bench = AloneBench()
        late = bench.submit_last("late", deadline_s=bench.clock.now_s)
        bench.loop.turn()
        with pytest.raises(RequestTimeoutError):
            late.result(0)
        assert bench.submit_last("in time", deadline_s=bench.clock.now_s + 1e-3).result(0) == "in time done"
        assert bench.batches == [("a", ["in time"])]
        assert bench.batcher.drain(0.0)

    def test_what_the_queue_would_not_take_is_refused(self) -> None:
        bench = AloneBench(max_queue_tokens=5)
        with pytest.raises(OverloadedError, match="queue is full"):
            bench.submit_last("large", tokens=6)
        with pytest.raises(ValueError, match="at most 10"):
            bench.submit_last("larger", tokens=11)
        bench.submit("waits", tokens=5)
        with pytest.raises(OverloadedError, match="queue is full"):
            bench.submit_last("one too many", tokens=1)
        bench.batcher.drain(0.0)
        with pytest.raises(UnavailableError, match="draining"):
            bench.submit_last("late")
        assert bench.told == []

    def test_an_error_is_its_own_alone(self) -> None:
        bench = AloneBench()
        with pytest.raises(ZeroDivisionError):
            bench.submit_last(ZeroDivisionError("bad")).result(0)
        assert bench.told == ["bad"]
        assert bench.submit_last("next").result(0) == "next done"
        assert bench.batcher.oldest_work() is None
        assert bench.batcher.drain(0.0), "none is left"

    def test_one_that_nobody_hurries_runs_with_the_next(self) -> None:
        bench = AloneBench()
        first = bench.batcher.submit("a", "x", 1, is_last=True)
        second = bench.submit("y")
        bench.loop.turn()
        assert [first.result(0), second.result(0)] == ["x done", "y done"]
        assert bench.batches == [("a", ["x"]), ("a", ["y"])]

    def test_its_caller_is_told_before_what_need_not_keep_it_waiting(self) -> None:
        bench = AloneBench()
        seen: list[list[int]] = []
        bench.batcher.submit("a", "x", 1, None, lambda _: seen.append(list(bench.finished)), is_last=True)
        bench.batcher.hurry()
        assert (seen, bench.finished) == ([[]], [1])

    def test_who_comes_before_it_is_over_and_done_with_waits(self) -> None:
        """Else two batches would want what one has: the engine has one staging slot for the CPU."""
        bench = AloneBench()
        inner: list[Promise[str]] = []
        bench.batcher.submit("a", "x", 1, None, lambda _: inner.append(bench.submit_last("y")), is_last=True)
        bench.batcher.hurry()
        assert not inner[0].done()
        bench.loop.turn()
        assert bench.batches == [("a", ["x"]), ("a", ["y"])]
        assert inner[0].result(0) == "y done"

    def test_it_counts_as_running_and_can_be_given_up_from_another_thread(self) -> None:
        started, gate = threading.Event(), threading.Event()

        def launch(batch: Batch[str, str]) -> Done[str]:
            started.set()
            assert gate.wait(PATIENCE_S)
            return Done([f"{entry.payload} done" for entry in batch.entries])

        limits = Limits(max_batch_tokens=10, max_queue_tokens=10, max_queue_requests=10)
        batcher: Batcher[str, str] = Batcher(launch, limits)
        batcher.start(Loop())
        promise = batcher.submit("a", "x", 4, is_last=True)
        thread = threading.Thread(target=batcher.hurry)
        thread.start()
        assert started.wait(PATIENCE_S)
        assert batcher.oldest_work() == 1
        batch = batcher.in_flight(1)
        assert batch is not None
        assert (batch.num_tokens, [entry.payload for entry in batch.entries]) == (4, ["x"])
        assert not batcher.drain(0.0), "one is running"
        batcher.abandon()
        gate.set()
        thread.join(PATIENCE_S)
        with pytest.raises(UnavailableError, match="hangs"):
            promise.result(0)
        assert batcher.drain(PATIENCE_S)

    @pytest.mark.parametrize("fails", ["never", "at launch", "while it computes"])
    def test_it_is_let_go_whoever_keeps_its_promise(self, fails: str) -> None:
        def launch(batch: Batch[Payload, str]) -> Done[str]:
            if fails == "at launch":
                raise RuntimeError(f"bad: {batch.num_tokens}")
            return FailsLate(["done"]) if fails == "while it computes" else Done(["done"])

        batcher = Batcher(launch, Limits(max_batch_tokens=1, max_queue_tokens=10, max_queue_requests=10))
        batcher.start(Loop())
        payload = Payload()
        alive = weakref.ref(payload)
        gc.disable()
        try:
            promise = batcher.submit("a", payload, 1, is_last=True)
            del payload
            batcher.hurry()
            assert promise.done()
            assert alive() is None
        finally:
            gc.enable()
