"""Choice among replicas, circuit breaker, latencies and hedging budget, on a clock that stands still."""

from __future__ import annotations

import numpy as np

from expertd._replicas import Breaker, BreakerState, HedgeBudget, Latencies, Replica, pick


def replica(name: str, **options: int) -> Replica:
    return Replica(name, **{"max_in_flight": 8, "max_failures": 3, **options})


def test_the_least_loaded_is_picked_by_tokens_in_flight_and_queue_depth() -> None:
    a, b, c = replica("a"), replica("b"), replica("c")
    a.sent(100)
    b.sent(10)
    b.note_queue_depth(500, now=0.0)
    c.sent(200)
    assert pick([a, b, c], now=0.5) is a
    # What b said of its queue is forgotten: otherwise b would never be asked again and never say anything else.
    assert pick([a, b, c], now=2.0) is b
    assert pick([a, b, c], now=2.0, exclude={a, b}) is c
    b.settled(10)
    assert b.load(2.0) == 0


def test_equals_take_turns() -> None:
    members = [replica(name) for name in "abc"]
    turns = []
    for _ in range(6):
        chosen = pick(members, now=0.0)
        assert chosen is not None
        turns.append(chosen.address)
        chosen.sent(1)
        chosen.settled(1)
    assert turns == ["a", "b", "c", "a", "b", "c"]


def test_a_full_replica_is_not_picked_even_in_despair() -> None:
    only = replica("a", max_in_flight=2)
    for _ in range(2):
        only.sent(1)
    assert pick([only], 0.0) is None
    assert pick([only], 0.0, desperate=True) is None
    only.settled(1)
    assert pick([only], 0.0) is only


def test_draining_and_broken_replicas_are_a_last_resort() -> None:
    draining, broken, well = replica("draining"), replica("broken"), replica("well", max_in_flight=1)
    draining.draining = True
    broken.breaker.trip()
    assert pick([draining, broken, well], 0.0, desperate=True) is well
    well.sent(1)
    # Well but busy: worth waiting for, rather than sending to one that will not answer.
    assert pick([draining, broken, well], 0.0, desperate=True) is None
    assert pick([draining, broken], 0.0) is None
    assert pick([draining, broken], 0.0, desperate=True) is draining


def test_breaker_opens_after_failures_in_a_row() -> None:
    breaker = Breaker(3)
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(2):
        breaker.failed()
        assert breaker.admits
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admits


def test_breaker_lets_one_trial_through_after_a_probe() -> None:
    breaker = Breaker(3)
    breaker.trip()
    breaker.probe_succeeded()
    assert breaker.admits
    breaker.sent()
    assert not breaker.admits, "a second trial before the verdict on the first"
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    breaker.probe_succeeded()
    breaker.sent()
    breaker.succeeded()
    breaker.settled()
    assert breaker.state is BreakerState.CLOSED
    breaker.sent()
    assert breaker.admits


def test_a_trial_that_is_taken_back_leaves_room_for_another() -> None:
    one = replica("a")
    one.breaker.trip()
    one.breaker.probe_succeeded()
    one.sent(5)
    assert not one.breaker.admits
    one.settled(5)
    assert one.breaker.admits
    assert one.breaker.state is BreakerState.HALF_OPEN


def test_probe_does_not_close_a_breaker_by_itself() -> None:
    breaker = Breaker(1)
    breaker.failed()
    breaker.probe_succeeded()
    assert breaker.state is BreakerState.HALF_OPEN
    closed = Breaker(1)
    closed.probe_succeeded()
    assert closed.state is BreakerState.CLOSED


def test_hedge_delay_is_the_percentile_of_answers_of_like_size() -> None:
    latencies = Latencies(0.95, min_delay_s=0.001)
    random = np.random.default_rng(0)
    for _ in range(15):
        latencies.add(100, 0.5)
    assert latencies.hedge_delay_s(100) is None, "too few to tell"
    latencies.add(100, 0.5)
    assert latencies.hedge_delay_s(100) == 0.5
    assert latencies.hedge_delays_s() == {127: 0.5}
    values = random.permutation(np.arange(1, 257)) / 1000
    for value in values.tolist():
        latencies.add(100, value)
    assert latencies.hedge_delay_s(127) == 0.244  # the 244th of 256; 64 ... 127 tokens are one size
    assert latencies.hedge_delay_s(128) is None
    for _ in range(32):
        latencies.add(1, 1e-6)
    assert latencies.hedge_delay_s(1) == 0.001


def test_latencies_forget_the_past() -> None:
    latencies = Latencies(0.5, min_delay_s=0.0)
    for value in [9.0] * 256 + [1.0] * 256:
        latencies.add(8, value)
    assert latencies.hedge_delay_s(8) == 1.0


def test_hedges_are_a_share_of_requests_after_the_first_burst() -> None:
    budget = HedgeBudget(0.25, burst=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    spent = 0
    for _ in range(400):
        budget.earn()
        spent += budget.spend()
    assert spent == 100
    for _ in range(400):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False], "saved more than the burst"
