"""The batcher in the one thread that requests come from: what it launches there, hands out there, and waits for."""

from __future__ import annotations

import gc
import os
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from test_batcher import PATIENCE_S, Bench, Done, FailsLate, OnDevice, Payload

from expertd_server.batch import Batch, Limits
from expertd_server.batcher import Batcher
from expertd_server.bell import Bell
from expertd_server.errors import OverloadedError, RequestTimeoutError, UnavailableError
from expertd_server.promise import Promise


class InTime(OnDevice):
    """A batch that is over when a test says so."""

    def __init__(self, batch: Batch[str | Exception, str]) -> None:
        super().__init__(batch)
        self.is_over = False
        self.waited_s: list[float | None] = []
        self.bells: list[int] = []
        self.cannot_ring = False
        self.has_computed = False
        self.cannot_say = False

    def wait(self, seconds: float | None = None) -> bool:
        self.waited_s.append(seconds)
        return (self.is_over or seconds is None) and super().wait()

    def is_computed(self) -> bool:
        if self.cannot_say:
            raise RuntimeError("the device is lost")
        return self.has_computed or self.is_over

    def compute(self) -> None:
        """All but the answers."""
        self.has_computed = True
        for fd in self.bells:
            os.eventfd_write(fd, 1)

    def ring_when_over(self, fd: int) -> None:
        if self.cannot_ring:
            raise OSError("too many open files")
        self.bells.append(fd)
        if self.is_over:
            os.eventfd_write(fd, 1)

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            for fd in self.bells:
                os.eventfd_write(fd, 1)


def at_launch(batcher: Batcher[str | Exception, str], change: Callable[[InTime], object]) -> None:
    """Have every batch changed as soon as it is launched."""
    launch = batcher._launch

    def launch_changed(batch: Batch[str | Exception, str]) -> InTime:
        running = launch(batch)
        assert isinstance(running, InTime)
        change(running)
        return running

    batcher._launch = launch_changed


class Here:
    """The thread that serves requests: the test's own, which does what it was asked for one by one."""

    def __init__(self) -> None:
        self._asked: deque[Callable[[], object]] = deque()
        self.bells: list[Bell] = []
        self.num_told = 0

    def soon(self, function: Callable[[], object]) -> None:
        self._asked.append(function)

    def told(self) -> None:
        """Nothing is put off."""
        self.num_told += 1

    def bell(self, function: Callable[[], object]) -> Bell:
        self.bells.append(Bell(function, self._silence))
        return self.bells[-1]

    def _silence(self, bell: Bell) -> None:
        """In any thread, while this one may be listening."""

        def leave() -> None:
            self.bells.remove(bell)
            bell.discard()

        self.soon(leave)

    def step(self) -> None:
        if not self._asked:
            for bell in self._rung(PATIENCE_S):
                bell.answer()
                return
            raise TimeoutError("nothing was asked for, and nobody rang")
        self._asked.popleft()()

    def step_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self.step()

    @property
    def is_idle(self) -> bool:
        return not (self._asked or self._rung(0.0))

    def _rung(self, timeout_s: float) -> list[Bell]:
        files, _, _ = select.select([bell.fd for bell in self.bells], [], [], timeout_s)
        return [bell for bell in self.bells if bell.fd in files]


class TestInOneThread:
    """Batches are launched and handed out where requests are submitted, and ring in between."""

    @pytest.fixture
    def bench(self) -> Iterator[tuple[Batcher[str | Exception, str], Here, list[InTime]]]:
        launched: list[InTime] = []

        def launch(batch: Batch[str | Exception, str]) -> InTime:
            launched.append(InTime(batch))
            return launched[-1]

        limits = Limits(
            max_batch_tokens=10, max_queue_tokens=100, max_queue_requests=50, max_in_flight=2, max_coming_back=1
        )
        batcher: Batcher[str | Exception, str] = Batcher(launch, limits)
        here = Here()
        batcher.start(here)
        yield batcher, here, launched
        for batch in launched:
            batch.end()
        stopping = threading.Thread(target=batcher.stop, args=(PATIENCE_S,))
        stopping.start()
        while stopping.is_alive():
            if here.is_idle:
                stopping.join(0.001)
            else:
                here.step()
        assert batcher.stop(0.0)
        while here.bells:
            here.step()
        assert set(batcher.threads) <= {threading.current_thread()}, "it has none of its own"

    def test_two_are_in_flight_and_the_third_follows_the_first(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        promises = [batcher.submit("a", name, 10) for name in "xyz"]
        assert not launched, "not before the thread is asked"
        here.step()
        assert [batch.members for batch in launched] == [["x"], ["y"]]
        assert here.is_idle
        launched[1].end()
        launched[0].end()
        here.step_until(promises[0].done)
        assert promises[0].result(0) == "x done"
        assert launched[0].steps[-2:] == ["results", "close"]
        assert [batch.members for batch in launched] == [["x"], ["y"], ["z"]]
        assert not promises[1].done(), "other things of the thread come in between"
        here.step_until(promises[1].done)
        assert promises[1].result(0) == "y done"
        launched[2].end()
        here.step_until(promises[2].done)
        assert promises[2].result(0) == "z done"
        assert all(set(batch.waited_s) == {0.0} for batch in launched), "nobody waits"
        assert batcher.drain(0.0)

    def test_a_third_is_launched_as_soon_as_one_is_computed_and_no_fourth(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        promises = [batcher.submit("a", name, 10) for name in "vwxyz"]
        here.step()
        launched[0].compute()
        here.step()
        assert len(launched) == 2, "what the thread was sent meanwhile comes first"
        here.step()
        assert [batch.members for batch in launched] == [["v"], ["w"], ["x"]]
        assert not promises[0].done(), "its answers are on their way"
        launched[1].compute()
        here.step()
        assert here.is_idle, "no fourth before the first is answered"
        launched[0].end()
        here.step_until(promises[0].done)
        assert [batch.members for batch in launched] == [["v"], ["w"], ["x"], ["y"]]
        for n in (1, 2, 3, 4):
            launched[n].end()
            here.step_until(promises[n].done)
        assert [promise.result(0) for promise in promises] == [f"{name} done" for name in "vwxyz"]
        assert batcher.drain(0.0)

    def test_answers_are_told_of_together_as_long_as_much_waits(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        num_requests = 26
        promises = [batcher.submit(str(n), "x", 1) for n in range(num_requests)]  # 26 batches
        here.step()
        told = []
        for n, promise in enumerate(promises):
            launched[n].end()
            here.step_until(promise.done)
            told.append(here.num_told)
        # As many as sixteen batches hold wait until the ninth is over; from then on each is told of at once.
        assert told == [0, 0, 0, 1, 1, 1, 1, 2, 2, *range(3, 3 + num_requests - 9)]

    def test_of_a_device_that_is_lost_nobody_asks_more_than_once(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        promises = [batcher.submit("a", name, 10) for name in "xyz"]
        here.step()
        launched[0].cannot_say = True
        launched[0].compute()
        here.step()
        here.step()
        assert [batch.members for batch in launched] == [["x"], ["y"], ["z"]], "whoever waits for it is told"
        for n, batch in enumerate(launched):
            batch.end()
            here.step_until(promises[n].done)
        assert promises[0].result(0) == "x done"

    def test_one_that_cannot_ring_is_waited_for(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench

        def be_mute(running: InTime) -> None:
            running.cannot_ring = running.is_over = True

        at_launch(batcher, be_mute)
        promise = batcher.submit("a", "x", 10)
        here.step_until(promise.done)
        assert promise.result(0) == "x done"
        assert launched[0].waited_s[0] is None

    def test_stopping_waits_for_what_is_in_flight(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        promise = batcher.submit("a", "x", 10)
        here.step()
        assert not batcher.stop(0.0)
        launched[0].end()
        here.step_until(promise.done)
        assert batcher.stop(0.0)
        assert promise.result(0) == "x done"

    def test_what_hangs_is_there_after_stopping(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        batcher, here, launched = bench
        promise = batcher.submit("a", "x", 10)
        here.step()
        batcher.abandon()
        with pytest.raises(UnavailableError, match="hangs"):
            promise.result(0)
        assert not batcher.stop(0.0)
        launched[0].end()
        here.step()
        assert batcher.stop(0.0)

    def test_a_lone_request_that_runs_already_is_not_given_up(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]
    ) -> None:
        """Its answer may be on its way into memory that would be somebody else's if it were."""
        batcher, here, launched = bench
        promise = batcher.submit("a", "x", 1, is_last=True)
        assert not promise.cancel(), "it is a batch by now"
        batcher.hurry()
        assert [batch.members for batch in launched] == [["x"]]
        assert not promise.cancel()
        assert promise.payload == "x"
        launched[0].end()
        here.step_until(promise.done)
        assert promise.result(0) == "x done"

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
        launched[0].end()
        here.step_until(lambda: bool(seen))
        assert seen == [2]

    @pytest.mark.parametrize("is_short", [True, False])
    def test_a_lone_request_is_waited_for_briefly(
        self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]], is_short: bool
    ) -> None:
        batcher, here, launched = bench
        if is_short:
            at_launch(batcher, InTime.end)
        promise = batcher.submit("a", "x", 1)
        batcher.hurry()
        assert promise.done() == is_short
        assert launched[0].waited_s[0] == pytest.approx(0.0005)
        launched[0].end()
        here.step_until(promise.done)
        assert promise.result(0) == "x done"
        assert launched[0].steps[-2:] == ["results", "close"], "once"

    def test_one_of_several_is_not(self, bench: tuple[Batcher[str | Exception, str], Here, list[InTime]]) -> None:
        batcher, _, launched = bench
        for name in "xy":
            batcher.submit("a", name, 10)
        batcher.hurry()
        assert len(launched) == 2
        assert launched[0].waited_s == launched[1].waited_s == []

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
                batch.end()
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
            batcher.start(Here())


@pytest.mark.parametrize("how", ["at once", "briefly", "when it rings"])
def test_nor_does_one_that_fails_where_requests_are_served_live_on(how: str) -> None:
    launched: list[FailsLate] = []

    def launch(batch: Batch[Payload, str]) -> FailsLate:
        launched.append(FailsLate(["done"]))
        launched[-1].is_over = how != "when it rings"
        return launched[-1]

    in_flight = 1 if how == "at once" else 2
    limits = Limits(max_batch_tokens=1, max_queue_tokens=10, max_queue_requests=10, max_in_flight=in_flight)
    batcher, here = Batcher(launch, limits), Here()
    batcher.start(here)
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
        assert promise.done() == (how != "when it rings")
        launched[0].is_over = True
        for bell in here.bells:
            bell.ring()
        here.step_until(promise.done)
        with pytest.raises(RuntimeError, match="bad"):
            promise.result(0)
        assert batcher.stop(PATIENCE_S)
        assert alive() is None
    finally:
        gc.enable()


class Loop:
    """A serving thread whose calls wait until `turn`; of batches that are over when they were launched."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def soon(self, function: Callable[[], object]) -> None:
        self.calls.append(function)

    def told(self) -> None:
        """Nothing is put off."""

    def bell(self, function: Callable[[], object]) -> Bell:
        raise AssertionError("nothing rings here")

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
