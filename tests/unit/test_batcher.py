"""The batcher under a clock of its own: who runs with whom, when, and what happens to those who fail or leave."""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest

from expertd_server.batch import Batch, Limits
from expertd_server.batcher import Batcher
from expertd_server.errors import OverloadedError, RequestTimeoutError, UnavailableError
from expertd_server.event_loop import EventLoop

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

    def is_computed(self) -> bool:
        return False

    def ring_when_over(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

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


def test_what_is_left_of_a_key_takes_its_turn_by_age() -> None:
    bench = Bench()
    for key, name, tokens in (("a", "a0", 9), ("b", "b0", 1), ("a", "a1", 9), ("c", "c0", 1), ("b", "b1", 10)):
        bench.submit(name, key=key, tokens=tokens)
    bench.run_all()
    assert bench.batches == [("a", ["a0"]), ("b", ["b0"]), ("a", ["a1"]), ("c", ["c0"]), ("b", ["b1"])]


def test_a_key_whose_oldest_request_is_cancelled_goes_back_to_its_place() -> None:
    bench = Bench()
    oldest = bench.submit("a0", key="a")
    for key, name in (("b", "b0"), ("c", "c0"), ("a", "a1")):
        bench.submit(name, key=key)
    assert oldest.cancel()
    bench.run_all()
    assert bench.batches == [("b", ["b0"]), ("c", ["c0"]), ("a", ["a1"])]


def test_the_order_of_turns_is_that_of_age_whatever_comes_and_goes() -> None:
    bench, chance = Bench(max_queue_requests=400, max_queue_tokens=4000), random.Random(5)
    waiting: dict[str, tuple[int, Future[str]]] = {}
    keys: dict[str, str] = {}
    for turn in range(3000):
        action = chance.random()
        if action < 0.6:
            name = f"r{turn}"
            keys[name] = chance.choice("abcdefgh")
            waiting[name] = turn, bench.submit(name, key=keys[name], tokens=chance.randint(1, 6))
        elif action < 0.75 and waiting:
            name = chance.choice(sorted(waiting))
            assert waiting.pop(name)[1].cancel()
        elif bench.batcher.run_once():
            key, members = bench.batches[-1]
            oldest = min(waiting, key=lambda name: waiting[name][0])
            assert (key, members[0]) == (keys[oldest], oldest)
            for name in members:
                del waiting[name]


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


@pytest.mark.parametrize("stops", [False, True])
def test_what_is_spent_does_not_run_again(stops: bool) -> None:
    """Two of four say at launch that their answers may be written over what they are computed from."""
    launched: list[list[str]] = []

    def launch(batch: Batch[str, str]) -> Done:
        members = [entry.payload for entry in batch.entries]
        launched.append(members)
        for entry in batch.entries:
            entry.is_spent = entry.payload.startswith("spent")
        if len(members) == 1:
            return Done([f"{members[0]} done"])
        if stops:
            batcher.stop(0.0)
        raise RuntimeError("too late")

    limits = Limits(max_batch_tokens=10, max_queue_tokens=10, max_queue_requests=10)
    batcher: Batcher[str, str] = Batcher(launch, limits)
    promises = [batcher.submit("a", name, 1) for name in ("spent 1", "other 1", "spent 2", "other 2")]
    while batcher.run_once():
        pass
    for promise in promises[::2]:
        with pytest.raises(RuntimeError, match="too late"):
            promise.result(0)
    for number, promise in enumerate(promises[1::2], start=1):
        if stops:
            with pytest.raises(UnavailableError, match="stopped"):
                promise.result(0)
        else:
            assert promise.result(0) == f"other {number} done"
    assert launched[1:] == ([] if stops else [["other 1"], ["other 2"]])
    assert batcher.drain(0.0)


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


def test_nobody_joins_in_a_draining_batcher() -> None:
    bench = Bench()
    entry = bench.batcher.submit("a", "x", 1)
    assert bench.batcher.join(entry, lambda _tokens, _requests: (2, 1))
    bench.batcher.drain(0.0)
    assert not bench.batcher.join(entry, lambda _tokens, _requests: pytest.fail("it is not asked"))
    assert (bench.batcher.queue_tokens, bench.batcher.queue_requests) == (3, 2)


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
    batcher.start(loop if here else None)
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

    def is_computed(self) -> bool:
        return False

    def ring_when_over(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

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

    def test_a_third_is_launched_where_a_crowd_waits(self) -> None:
        batcher, launched = self.make(crowd_tokens=20)
        for name in "abcde":
            batcher.submit("a", name, 10)
        assert [batcher.launch_once() for _ in range(4)] == [True, True, True, False]
        assert batcher.queue_tokens == 20, "a crowd still, and no fourth"
        assert batcher.finish_once()
        assert batcher.launch_once(), "20 tokens wait"
        assert batcher.finish_once()
        assert not batcher.launch_once(), "10 tokens wait"
        assert batcher.finish_once()
        assert batcher.launch_once()
        while batcher.finish_once() or batcher.launch_once():
            pass
        assert [batch.members for batch in launched] == [["a"], ["b"], ["c"], ["d"], ["e"]]

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
    batcher.start(loop if here else None)

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

    def is_computed(self) -> bool:
        return False

    def ring_when_over(self, fd: int) -> None:
        """The test does."""


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
