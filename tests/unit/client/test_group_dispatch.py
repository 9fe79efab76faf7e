"""The course of one call, driven by hand: a fake clock, a fake wire, every failure where it hurts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from expertd._dispatch import Attempt, Dispatch, Job, Shared
from expertd._replicas import BreakerState, HedgeBudget, Latencies, Replica
from expertd._stats import GroupStats
from expertd.errors import (
    ExpertdError,
    InvalidRequestError,
    LayerNotFoundError,
    NoReplicaError,
    OverloadedError,
    ProtocolError,
    ServerError,
    TimeoutError,
    UnavailableError,
    VersionNotHeldError,
)
from expertd.group_types import GroupConfig

TOKENS = 100
DEADLINE = 1000.0


class Wire:
    """Stands in for the network: counts what is on it."""

    def __init__(self) -> None:
        self.abandoned: list[str] = []


class Ticket:
    def __init__(self, wire: Wire, address: str) -> None:
        self._wire, self._address = wire, address

    def abandon(self) -> None:
        self._wire.abandoned.append(self._address)


class Rig:
    """One dispatch, its replicas, and a clock."""

    def __init__(
        self,
        shards: Sequence[Sequence[str]],
        *,
        deadline: float = DEADLINE,
        allow_partial: bool = False,
        hedge_delay_s: float | None = None,
        **config: Any,
    ) -> None:
        options = {"attempt_timeout_s": 10.0, "no_replica_timeout_s": 5.0, **config}
        self.config = GroupConfig(**options)
        self.now = 0.0
        self.wire = Wire()
        self.stats = GroupStats()
        self.replicas = {name: Replica(name, max_in_flight=4, max_failures=3) for shard in shards for name in shard}
        latencies = Latencies(0.95, 0.0)
        if hedge_delay_s is not None:
            for _ in range(16):
                latencies.add(TOKENS, hedge_delay_s)
        self.shared = Shared(
            self.config, self.stats, latencies, HedgeBudget(self.config.hedge_share, self.config.hedge_burst)
        )
        self.shards = shards
        self.deadline, self.allow_partial = deadline, allow_partial
        self.dispatch = self.another_call()

    def another_call(self) -> Dispatch:
        jobs = [
            Job(index, range(4 * index, 4 * index + 4), TOKENS, [self.replicas[name] for name in shard])
            for index, shard in enumerate(self.shards)
        ]
        return Dispatch(
            jobs, self.shared, layer="layer", deadline=self.now + self.deadline, allow_partial=self.allow_partial
        )

    def poll(self, dispatch: Dispatch | None = None) -> list[Attempt]:
        attempts = (dispatch or self.dispatch).poll(self.now)
        for attempt in attempts:
            attempt.ticket = Ticket(self.wire, attempt.replica.address)
        return attempts

    def poll_one(self, dispatch: Dispatch | None = None) -> Attempt:
        (attempt,) = self.poll(dispatch)
        return attempt

    def sleep(self) -> float:
        """Go on to the moment at which the dispatch wants to be polled."""
        self.now = max(self.now, self.dispatch.wake_at())
        return self.now

    def fail(self, attempt: Attempt, error: ExpertdError) -> None:
        self.dispatch.failed(attempt, error, self.now)

    def answer(self, attempt: Attempt, depth: int = 0) -> bool:
        return self.dispatch.answered(attempt, depth, self.now)

    def assert_idle(self) -> None:
        for replica in self.replicas.values():
            assert replica.in_flight_requests == replica.in_flight_tokens == 0, replica


def addresses(attempts: Sequence[Attempt]) -> list[str]:
    return [attempt.replica.address for attempt in attempts]


def test_every_part_goes_to_its_shard_and_the_call_ends_when_all_are_answered() -> None:
    rig = Rig([["a"], ["b"], ["c"]])
    attempts = rig.poll()
    assert addresses(attempts) == ["a", "b", "c"]
    assert rig.poll() == []
    for attempt in reversed(attempts):
        assert not rig.dispatch.is_done
        assert rig.answer(attempt, depth=7)
    assert rig.dispatch.is_done
    assert rig.dispatch.failure is None
    assert [job.answered_by for job in rig.dispatch.jobs] == ["a", "b", "c"]
    assert rig.replicas["a"].load(rig.now) == 7
    rig.assert_idle()


def test_no_parts_are_done_at_once() -> None:
    rig = Rig([])
    assert rig.poll() == []
    assert rig.dispatch.is_done


@pytest.mark.parametrize("error", [UnavailableError("gone"), ServerError("broke"), OverloadedError("full")])
def test_a_failed_part_goes_to_another_replica_at_once(error: ExpertdError) -> None:
    rig = Rig([["a", "b"]])
    first = rig.poll_one()
    rig.fail(first, error)
    second = rig.poll_one()
    assert addresses([first, second]) == ["a", "b"]
    assert rig.answer(second)
    assert rig.dispatch.is_done
    assert rig.stats.value("failovers") == 1
    rig.assert_idle()


def test_breakers_learn_from_errors_but_not_from_overload() -> None:
    rig = Rig([["a", "b"]])
    rig.fail(rig.poll_one(), UnavailableError("gone"))
    assert rig.replicas["a"].breaker.state is BreakerState.OPEN
    rig.fail(rig.poll_one(), OverloadedError("full"))
    assert rig.replicas["b"].breaker.state is BreakerState.CLOSED


def test_all_replicas_are_tried_again_after_a_pause_that_grows() -> None:
    rig = Rig([["a", "b"]], initial_backoff_s=0.1, max_backoff_s=0.3, no_replica_timeout_s=100.0)
    pauses = []
    for _ in range(4):
        for _ in range(2):
            rig.fail(rig.poll_one(), UnavailableError("gone"))
        assert rig.poll() == []
        before = rig.now
        pauses.append(rig.sleep() - before)
    assert pauses == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert rig.answer(rig.poll_one())
    assert rig.dispatch.is_done


def test_there_may_be_very_many_rounds() -> None:
    rig = Rig([["a"]], no_replica_timeout_s=100.0, initial_backoff_s=0.01, max_backoff_s=0.01)
    for _ in range(1100):
        rig.fail(rig.poll_one(), UnavailableError("down"))
        assert rig.poll() == []
        rig.sleep()
    rig.answer(rig.poll_one())
    assert rig.dispatch.is_done


def test_an_overloaded_shard_is_given_the_time_it_asks_for() -> None:
    rig = Rig([["a"]], initial_backoff_s=0.1)
    error = OverloadedError("full")
    error.retry_after_s = 2.5
    rig.fail(rig.poll_one(), error)
    assert rig.poll() == []
    assert rig.sleep() == 2.5
    assert addresses(rig.poll()) == ["a"]


def test_no_replica_left_names_the_experts_and_the_last_error() -> None:
    rig = Rig([["a"], ["b", "c"]], initial_backoff_s=1.0, max_backoff_s=1.0, no_replica_timeout_s=3.0)
    done, *_ = rig.poll()
    rig.answer(done)
    tried = []
    rig.dispatch.failed(rig.dispatch.jobs[1].attempts[0], UnavailableError("refused"), rig.now)
    while not rig.dispatch.is_done:
        for attempt in rig.poll():
            tried.append(attempt.replica.address)
            rig.fail(attempt, UnavailableError("refused"))
        rig.sleep()
    error = rig.dispatch.failure
    assert isinstance(error, NoReplicaError)
    assert error.experts == (range(4, 8),)
    assert error.layer == "layer"
    assert "experts 4-7 of layer 'layer' (100 tokens): last error: refused" in str(error)
    assert rig.now >= 3.0
    assert set(tried) == {"b", "c"}
    rig.assert_idle()


def test_a_shard_without_replicas_fails_at_once() -> None:
    rig = Rig([["a"], []])
    rig.poll()
    assert isinstance(rig.dispatch.failure, NoReplicaError)
    rig.assert_idle()


def test_overload_to_the_end_is_reported_as_overload() -> None:
    rig = Rig([["a"]], no_replica_timeout_s=1.0, initial_backoff_s=1.0, max_backoff_s=1.0)
    while not rig.dispatch.is_done:
        for attempt in rig.poll():
            rig.fail(attempt, OverloadedError("full"))
        rig.sleep()
    assert isinstance(rig.dispatch.failure, OverloadedError)


def test_allow_partial_goes_on_without_the_experts_that_nobody_answers_for() -> None:
    rig = Rig([["a"], []], allow_partial=True)
    (attempt,) = rig.poll()
    assert rig.answer(attempt)
    assert rig.dispatch.is_done
    assert rig.dispatch.failure is None
    assert [job.is_missing for job in rig.dispatch.jobs] == [False, True]


def test_a_silent_replica_is_given_up_for_another_after_the_attempt_timeout() -> None:
    rig = Rig([["a", "b"]], attempt_timeout_s=3.0)
    rig.poll_one()
    assert rig.sleep() == 3.0
    assert addresses(rig.poll()) == ["b"]
    assert rig.wire.abandoned == ["a"]
    assert rig.replicas["a"].in_flight_requests == 0


def test_half_of_a_short_deadline_is_left_for_another_replica() -> None:
    rig = Rig([["a", "b"]], deadline=2.0)
    rig.poll_one()
    assert rig.sleep() == 1.0
    second = rig.poll_one()
    assert second.deadline == 2.0


def test_the_deadline_ends_the_call_and_takes_everything_back() -> None:
    rig = Rig([["a"], ["b"]], deadline=2.0)
    rig.answer(rig.poll()[0])
    assert rig.sleep() == 2.0
    assert rig.poll() == []
    assert isinstance(rig.dispatch.failure, TimeoutError)
    assert "experts 4-7" in str(rig.dispatch.failure)
    assert rig.wire.abandoned == ["b"]
    rig.assert_idle()


def test_an_invalid_request_fails_the_call_and_is_not_sent_again() -> None:
    rig = Rig([["a", "b"], ["c"]])
    attempts = rig.poll()
    rig.fail(attempts[0], InvalidRequestError.of("hidden_states", "is bad"))
    assert isinstance(rig.dispatch.failure, InvalidRequestError)
    assert rig.poll() == []
    assert rig.wire.abandoned == ["c"]
    rig.assert_idle()


@pytest.mark.parametrize("error", [VersionNotHeldError("not held"), LayerNotFoundError("unknown")])
def test_a_replica_that_lost_the_version_is_passed_over_and_the_last_one_makes_the_call_stale(
    error: ExpertdError,
) -> None:
    rig = Rig([["a", "b"], ["c"]])
    first, _ = rig.poll()
    rig.fail(first, error)
    assert not rig.dispatch.is_done
    second = rig.poll_one()
    assert second.replica.address == "b"
    rig.fail(second, error)
    assert rig.dispatch.is_stale
    assert rig.poll() == []
    assert rig.dispatch.failure is None, "a call to start over must not fail meanwhile"
    assert rig.replicas["b"].breaker.state is BreakerState.CLOSED
    rig.assert_idle()


BROKEN = [ServerError("broke"), ProtocolError("no message")]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_a_poisoned_request_is_sent_to_two_servers_and_opens_no_breaker(error: ExpertdError) -> None:
    rig = Rig([["a", "b", "c"], ["d"]])
    tried = []
    for _ in range(6):
        call = rig.another_call()
        first, other = rig.poll(call)
        call.failed(first, error, rig.now)
        second = rig.poll_one(call)
        assert second.replica is not first.replica
        call.failed(second, type(error)("broke again"), rig.now)
        tried += addresses([first, second])
        assert type(call.failure) is type(error)
        assert "broke again" in str(call.failure)
        (note,) = call.failure.__notes__
        assert note == f"{tried[-2]} and {tried[-1]} failed on experts 0-3 of layer 'layer' (100 tokens)"
        assert other.replica.in_flight_requests == 0
    assert set(tried) == {"a", "b", "c"}
    assert all(replica.breaker.state is BreakerState.CLOSED for replica in rig.replicas.values())
    assert rig.now == 0, "nothing to wait for"
    rig.assert_idle()


def test_a_slice_of_one_server_fails_a_poisoned_request_at_once() -> None:
    rig = Rig([["a"]])
    rig.fail(rig.poll_one(), ServerError("broke"))
    assert isinstance(rig.dispatch.failure, ServerError)
    assert rig.replicas["a"].breaker.state is BreakerState.CLOSED


def test_a_partial_answer_goes_without_a_poisoned_part() -> None:
    rig = Rig([["a"], ["b"]], allow_partial=True)
    poisoned, good = rig.poll()
    rig.fail(poisoned, ServerError("broke"))
    assert rig.answer(good)
    assert rig.dispatch.is_done
    assert rig.dispatch.failure is None
    assert [job.is_missing for job in rig.dispatch.jobs] == [True, False]


def test_a_server_that_fails_on_what_others_answer_opens_its_breaker() -> None:
    rig = Rig([["a", "b"]])
    rig.replicas["b"].sent(10_000)  # so that everybody asks a first
    for _ in range(3):
        assert rig.replicas["a"].breaker.state is BreakerState.CLOSED
        call = rig.another_call()
        call.failed(rig.poll_one(call), ServerError("broke"), rig.now)
        assert call.answered(rig.poll_one(call), 0, rig.now)
    assert rig.replicas["a"].breaker.state is BreakerState.OPEN
    assert rig.replicas["b"].breaker.state is BreakerState.CLOSED


def test_a_server_that_failed_on_a_part_does_not_get_it_again_while_another_is_busy() -> None:
    rig = Rig([["a", "b"]], initial_backoff_s=0.1)
    rig.fail(rig.poll_one(), ServerError("broke"))
    for _ in range(3):
        attempt = rig.poll_one()
        assert attempt.replica.address == "b"
        rig.fail(attempt, OverloadedError("full"))
        assert rig.poll() == []
        rig.sleep()
    assert rig.answer(rig.poll_one())
    assert rig.dispatch.failure is None


def test_when_nobody_else_comes_back_the_error_of_the_server_that_answered_is_told() -> None:
    rig = Rig([["a", "b"]], no_replica_timeout_s=1.0)
    rig.fail(rig.poll_one(), ServerError("broke"))
    while not rig.dispatch.is_done:
        for attempt in rig.poll():
            assert attempt.replica.address == "b"
            rig.fail(attempt, UnavailableError("gone"))
        rig.sleep()
    assert isinstance(rig.dispatch.failure, ServerError)
    assert rig.now >= 1.0


def test_a_hedge_answers_for_a_server_that_fails_and_two_that_fail_end_the_call() -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=0.25)
    rig.replicas["a"].breaker.failed()
    rig.replicas["a"].breaker.failed()
    first = rig.poll_one()
    rig.sleep()
    hedge = rig.poll_one()
    rig.fail(first, ServerError("broke"))
    assert rig.poll() == []
    assert rig.replicas["a"].breaker.state is BreakerState.CLOSED
    assert rig.answer(hedge)
    assert rig.replicas["a"].breaker.state is BreakerState.OPEN
    rig = Rig([["a", "b"]], hedge_delay_s=0.25)
    first = rig.poll_one()
    rig.sleep()
    hedge = rig.poll_one()
    rig.fail(first, ServerError("broke"))
    rig.fail(hedge, ServerError("broke"))
    assert isinstance(rig.dispatch.failure, ServerError)
    rig.assert_idle()


def test_a_slow_answer_is_hedged_and_the_hedge_may_win() -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=0.25)
    slow = rig.poll_one()
    assert rig.sleep() == 0.25
    hedge = rig.poll_one()
    assert hedge.is_hedge
    assert hedge.replica.address == "b"
    assert rig.answer(hedge)
    assert rig.wire.abandoned == ["a"]
    assert not rig.answer(slow), "the answer of the slow one must be dropped"
    assert (rig.stats.value("hedges"), rig.stats.value("hedge_wins")) == (1, 1)
    assert rig.dispatch.jobs[0].answered_by == "b"
    rig.assert_idle()


def test_a_hedge_that_loses_is_taken_back_without_blame() -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=0.25, max_failures=1)
    first = rig.poll_one()
    rig.sleep()
    rig.poll_one()
    assert rig.answer(first)
    assert rig.wire.abandoned == ["b"]
    assert rig.replicas["b"].breaker.state is BreakerState.CLOSED
    assert rig.stats.value("hedge_wins") == 0
    rig.assert_idle()


def test_there_is_no_hedge_without_a_second_replica_or_without_enough_answers_to_compare() -> None:
    rig = Rig([["a"]], hedge_delay_s=0.25)
    rig.poll_one()
    assert rig.dispatch.wake_at() == 10.0
    rig = Rig([["a", "b"]])
    rig.poll_one()
    assert rig.dispatch.wake_at() == 10.0


def test_the_budget_bounds_hedges() -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=0.25, hedge_burst=1, hedge_share=0.0)
    rig.poll_one()
    other = rig.another_call()
    rig.poll_one(other)
    rig.now = 0.25
    assert len(rig.poll()) == 1
    assert rig.poll(other) == []
    assert other.wake_at() == 0.5, "the call must look again: the budget grows, breakers open"


def test_a_hanging_replica_opens_its_breaker_and_frees_the_calls_that_wait_for_it() -> None:
    # The hedges of three calls win; the fourth has no budget left, but the breaker tells it all the same.
    rig = Rig([["a", "b"]], hedge_delay_s=0.25, hedge_burst=3, hedge_share=0.0)
    rig.replicas["b"].sent(10_000)  # so that everybody asks a first
    calls = [rig.another_call() for _ in range(4)]
    for call in calls:
        assert rig.poll_one(call).replica.address == "a"
    rig.now = 0.25
    for call in calls[:3]:
        hedge = rig.poll_one(call)
        assert call.answered(hedge, 0, rig.now)
    assert rig.replicas["a"].breaker.state is BreakerState.OPEN
    failover = rig.poll_one(calls[3])
    assert failover.replica.address == "b"
    assert not failover.is_hedge
    assert rig.stats.value("failovers") == 1


def test_a_full_shard_is_waited_for() -> None:
    rig = Rig([["a"]])
    for _ in range(4):
        rig.replicas["a"].sent(1)
    assert rig.poll() == []
    rig.sleep()
    assert rig.poll() == []
    rig.replicas["a"].settled(1)
    rig.sleep()
    assert addresses(rig.poll()) == ["a"]
    assert rig.dispatch.failure is None


def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    rig = Rig([["a", "b"]])
    first = rig.poll_one()
    rig.replicas["a"].draining = True
    assert rig.poll_one(rig.another_call()).replica.address == "b"
    assert rig.answer(first)
    assert rig.dispatch.jobs[0].answered_by == "a"


def test_abandon_takes_back_what_was_not_even_sent() -> None:
    rig = Rig([["a"], ["b"]])
    rig.dispatch.poll(rig.now)  # no tickets yet
    rig.dispatch.abandon()
    rig.assert_idle()


def test_a_server_that_came_after_the_call_began_is_asked_in_the_next_round() -> None:
    rig = Rig([["a"]])
    newcomer = Replica("b", max_in_flight=4, max_failures=3)
    rig.fail(rig.poll_one(), UnavailableError("gone"))
    rig.dispatch.jobs[0].look_again = lambda: [newcomer]
    assert rig.poll() == [], "a pause first"
    rig.sleep()
    attempt = rig.poll_one()
    assert attempt.replica is newcomer
    assert rig.answer(attempt)
    assert rig.dispatch.is_done
    assert rig.dispatch.failure is None


def test_a_hedge_goes_to_a_server_that_is_out_of_use_rather_than_to_none() -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=0.25)
    rig.replicas["b"].breaker.trip()
    first = rig.poll_one()
    assert first.replica.address == "a"
    rig.now = 0.25
    hedge = rig.poll_one()
    assert hedge.is_hedge
    assert hedge.replica.address == "b"
    assert rig.answer(hedge)
    assert rig.dispatch.is_done
    rig.assert_idle()


def test_a_hedge_that_fails_is_sent_again_while_the_first_server_says_nothing() -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=0.25)
    rig.poll_one()
    rig.now = 0.25
    rig.fail(rig.poll_one(), UnavailableError("restarting"))
    assert rig.poll() == []
    assert rig.sleep() == 0.5
    again = rig.poll_one()
    assert again.is_hedge
    assert again.replica.address == "b"
    assert rig.answer(again)
    rig.assert_idle()


@pytest.mark.parametrize("hedge_delay_s", [None, 0.25])
def test_while_one_server_hangs_another_that_refuses_is_given_the_time_it_asks_for(hedge_delay_s: float | None) -> None:
    rig = Rig([["a", "b"]], hedge_delay_s=hedge_delay_s)
    rig.replicas["a"].sent(10_000)  # so that b is asked first
    assert rig.poll_one().replica.address == "b"
    rig.replicas["b"].breaker.trip()
    refused = OverloadedError("full")
    refused.retry_after_s = 1.0
    asked_at = []
    while rig.now < 3.5 and len(asked_at) < 10:
        if not (attempts := rig.poll()):
            rig.sleep()
        for attempt in attempts:
            asked_at.append((attempt.replica.address, rig.now))
            rig.fail(attempt, refused)
    assert asked_at == [("a", 0.0), ("a", 1.0), ("a", 2.0), ("a", 3.0)]


def test_while_one_server_hangs_and_another_refuses_the_third_is_asked_at_once() -> None:
    rig = Rig([["a", "b", "c"]])
    hanging = rig.poll_one()
    hanging.replica.breaker.trip()
    refused = OverloadedError("full")
    refused.retry_after_s = 1.0
    second = rig.poll_one()
    rig.fail(second, refused)
    third = rig.poll_one()
    assert sorted(addresses([hanging, second, third])) == ["a", "b", "c"]


@pytest.mark.parametrize("others", [["b"], []])
def test_while_one_server_hangs_and_the_others_are_full_the_call_sleeps(others: list[str]) -> None:
    rig = Rig([["a", *others]], hedge_delay_s=0.25)
    assert rig.poll_one().replica.address == "a"
    for _ in range(4 * len(others)):
        rig.replicas["b"].sent(1)
    rig.now = 0.25
    rig.replicas["a"].breaker.trip()
    assert rig.poll() == []
    assert rig.dispatch.wake_at() > rig.now
    if others:
        rig.replicas["b"].settled(1)
        rig.sleep()
        assert rig.poll_one().replica.address == "b"
