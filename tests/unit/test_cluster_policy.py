"""When a replica moves from one shard to another, and that it never moves back for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_server.cluster_policy import Balancer, Move, PolicyConfig, ShardLoad
from expertd_server.cluster_policy import best_move as best_of

CONFIG = PolicyConfig(min_replicas=1, full_queue_tokens=1000, patience=3, cooldown=4)


def load(shard: int, num_replicas: int, busy_servers: float, queue_tokens: float = 0.0) -> ShardLoad:
    return ShardLoad(shard=shard, num_replicas=num_replicas, busy_servers=busy_servers, queue_tokens=queue_tokens)


def best_move(loads: Sequence[ShardLoad], config: PolicyConfig) -> Move | None:
    """Where no place is free."""
    return best_of(loads, config, has_room=False)


def pair(move: Move | None) -> tuple[int | None, int] | None:
    return None if move is None else (move.source, move.target)


class TestBestMove:
    def test_an_idle_shard_gives_to_a_busy_one(self) -> None:
        # 1.8 / 2 = 0.9 each; afterwards max(1.8 / 3, 0.2 / 1) = 0.6, a third less.
        assert pair(best_move([load(0, 2, 1.8), load(1, 2, 0.2)], CONFIG)) == (1, 0)

    def test_the_donor_is_the_one_that_misses_it_least(self) -> None:
        assert pair(best_move([load(0, 2, 0.4), load(1, 2, 1.9), load(2, 2, 0.1)], CONFIG)) == (2, 1)

    def test_nobody_gives_below_the_minimum(self) -> None:
        loads = [load(0, 2, 1.9), load(1, 2, 0.0)]
        assert best_move(loads, PolicyConfig(min_replicas=2)) is None

    def test_with_the_default_configuration_one_of_two_is_given(self) -> None:
        assert pair(best_move([load(0, 2, 1.9), load(1, 2, 0.0)], PolicyConfig())) == (1, 0)

    def test_the_last_replica_is_never_given(self) -> None:
        assert best_move([load(0, 2, 1.9), load(1, 1, 0.0)], PolicyConfig()) is None

    @pytest.mark.parametrize("idle", [[], [load(1, 2, 0.0)]], ids=["alone", "beside an idle one"])
    def test_a_free_place_comes_first(self, idle: list[ShardLoad]) -> None:
        assert pair(best_of([load(0, 2, 1.9), *idle], CONFIG, has_room=True)) == (None, 0)

    def test_free_places_are_taken_up_to_the_maximum(self) -> None:
        loads = [load(0, 4, 3.9), load(1, 2, 0.0)]
        assert pair(best_of(loads, PolicyConfig(max_replicas=5), has_room=True)) == (None, 0)
        assert pair(best_of(loads, PolicyConfig(max_replicas=4), has_room=True)) == (1, 0)

    def test_a_shard_that_is_not_hot_takes_no_free_place(self) -> None:
        assert best_of([load(0, 2, 1.0), load(1, 2, 0.0)], CONFIG, has_room=True) is None

    @pytest.mark.parametrize("has_room", [True, False])
    def test_help_that_is_on_its_way_is_awaited(self, has_room: bool) -> None:
        hot = ShardLoad(shard=0, num_replicas=2, num_starting=1, busy_servers=1.9)
        assert best_of([hot, load(1, 2, 0.0)], CONFIG, has_room=has_room) is None

    def test_a_shard_that_is_not_hot_needs_no_help(self) -> None:
        assert best_move([load(0, 2, 1.0), load(1, 2, 0.0)], CONFIG) is None  # 0.5 each, below 0.6

    def test_a_move_has_to_be_worth_it(self) -> None:
        # Now 0.95; afterwards max(1.9 / 3, 0.8 / 1) = 0.8, only 16 % less.
        assert best_move([load(0, 2, 1.9), load(1, 2, 0.8)], CONFIG) is None

    def test_a_queue_counts_as_work(self) -> None:
        # Both devices never rest; 600 of 1000 tokens wait for shard 0: 2.6 / 2 = 1.3 each, then max(0.87, 1.0).
        assert best_move([load(0, 2, 2.0), load(1, 2, 1.0)], CONFIG) is None
        assert pair(best_move([load(0, 2, 2.0, 600), load(1, 2, 1.0)], CONFIG)) == (1, 0)

    def test_a_shard_without_a_serving_replica_takes_no_part(self) -> None:
        assert best_move([load(0, 0, 0.0), load(1, 2, 1.9)], CONFIG) is None

    def test_the_reason_names_the_hot_expert(self) -> None:
        hot = ShardLoad(shard=0, num_replicas=2, busy_servers=1.9, hottest_expert=3, hottest_share=0.71)
        move = best_move([hot, load(1, 2, 0.0)], CONFIG)
        assert move is not None
        assert "expert 3 gets 71% of it" in move.reason


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0, 5)), min_size=2, max_size=6),
    st.floats(0.05, 0.9),
)
def test_with_a_steady_load_the_moves_come_to_an_end(shards: list[tuple[int, float]], margin: float) -> None:
    """Every move makes the hottest shard cooler; none is taken back."""
    config = PolicyConfig(min_replicas=1, full_queue_tokens=1000, margin=margin)
    replicas = [count for count, _ in shards]
    moves: list[tuple[int | None, int]] = []
    for _ in range(100):
        move = best_move([load(i, replicas[i], demand) for i, (_, demand) in enumerate(shards)], config)
        if move is None:
            return
        assert move.source is not None
        assert (move.target, move.source) not in moves, (shards, moves)
        moves.append((move.source, move.target))
        replicas[move.source] -= 1
        replicas[move.target] += 1
        assert min(replicas) >= 1
    pytest.fail(f"still moving after 100 steps: {shards}")


class TestBalancer:
    HOT = (load(0, 2, 1.9), load(1, 2, 0.0))
    COLD = (load(0, 2, 0.1), load(1, 2, 0.0))

    def test_it_waits_for_the_same_verdict_several_times(self) -> None:
        balancer = Balancer(CONFIG)
        assert [pair(balancer.look(self.HOT)) for _ in range(3)] == [None, None, (None, 0)]

    def test_without_room_a_donor_is_asked_as_patiently_and_room_is_hoped_for_later(self) -> None:
        balancer = Balancer(dataclasses.replace(CONFIG, cooldown=0, full=6))
        for _ in range(2):
            assert [pair(balancer.look(self.HOT)) for _ in range(3)] == [None, None, (None, 0)]
            balancer.no_room()
            assert [pair(balancer.look(self.HOT)) for _ in range(3)] == [None, None, (1, 0)]
            assert [pair(balancer.look(self.COLD)) for _ in range(3)] == [None] * 3

    def test_a_short_burst_moves_nothing(self) -> None:
        balancer = Balancer(CONFIG)
        looks = [self.HOT, self.HOT, self.COLD, self.HOT, self.HOT, self.COLD]
        assert [balancer.look(loads) for loads in looks] == [None] * 6

    def test_it_rests_after_a_move(self) -> None:
        balancer = Balancer(CONFIG)
        decisions = [pair(balancer.look(self.HOT)) for _ in range(3 + 4 + 3)]
        assert decisions == [None, None, (None, 0), *[None] * 4, None, None, (None, 0)]


@pytest.mark.parametrize(
    "field",
    [
        {"min_replicas": 0},
        {"max_replicas": 0},
        {"full": 5},
        {"margin": 1.0},
        {"patience": 0},
        {"hot_load": 0.0},
        {"full_queue_tokens": 0},
    ],
)
def test_values_that_make_no_sense_are_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        PolicyConfig(**field)  # type: ignore[arg-type]
