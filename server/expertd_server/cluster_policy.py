"""Which shard should get one more replica, and from where. Pure functions of statistics: no clock, no I/O, no Ray.

A hot expert makes every replica of its shard busy. Its slice cannot be cut while requests run, because another slicing
sums in another order; but the shard can get one more replica: in a free place, or where there is none at the cost of a
shard that has little to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Balancer", "Move", "PolicyConfig", "ShardLoad", "best_move"]


@dataclass(frozen=True, kw_only=True)
class ShardLoad:
    """What the replicas of one shard did of late."""

    shard: int
    num_replicas: int
    """Those that serve."""
    num_starting: int = 0
    """Those that do not serve yet, or not any more: help that is on its way."""
    busy_servers: float
    """Sum over its replicas of the share of time that the device computed, each 0 to 1."""
    queue_tokens: float = 0.0
    """Tokens that wait, over all its replicas."""
    hottest_expert: int | None = None
    """Global id of the expert that got the most tokens; None: no tokens."""
    hottest_share: float = 0.0
    """Its share of the tokens of the shard's experts, 0 to 1."""

    def demand(self, full_queue_tokens: int) -> float:
        """Servers' worth of work: a full queue counts as much as a busy device."""
        return self.busy_servers + self.queue_tokens / full_queue_tokens


@dataclass(frozen=True, kw_only=True)
class Move:
    """Start one replica of `target`: in a free place, or in that of a replica of `source`, which is stopped."""

    source: int | None
    """None: in a free place."""
    target: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """When to move, and how reluctantly. Raises ValueError naming the field when a value makes no sense."""

    min_replicas: int = 1
    """A shard never gives away a replica when it would have fewer left."""
    max_replicas: int = 4
    """A shard gets no replica in a free place when it would have more."""
    full_queue_tokens: int = 32768
    """Tokens in a full queue: the servers' max_queue_tokens."""
    hot_load: float = 0.6
    """Load of each replica below which a shard needs no help: 1 is a device that never rests."""
    margin: float = 0.2
    """Move only when afterwards the more loaded of the two shards carries at least this share less per replica than
    the hot one does now. With a steady load no move is ever taken back."""
    patience: int = 5
    """How many times in a row the same move must be the best one."""
    cooldown: int = 30
    """How many looks to let pass after a move, while the new replica loads and the statistics settle."""
    full: int = 60
    """How many looks no free place is hoped for, after there was none."""

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas is {self.min_replicas}, expected at least 1")
        if self.max_replicas < 1:
            raise ValueError(f"max_replicas is {self.max_replicas}, expected at least 1")
        if self.full_queue_tokens < 1:
            raise ValueError(f"full_queue_tokens is {self.full_queue_tokens}, expected at least 1")
        if not 0 < self.margin < 1:
            raise ValueError(f"margin is {self.margin}, expected more than 0 and less than 1")
        if self.hot_load <= 0:
            raise ValueError(f"hot_load is {self.hot_load}, expected more than 0")
        if self.patience < 1 or self.cooldown < 0:
            raise ValueError(
                f"patience is {self.patience}, expected at least 1; cooldown is {self.cooldown}, expected at least 0"
            )
        if self.full <= self.patience:
            raise ValueError(
                f"full is {self.full}, expected more than the patience of {self.patience}: else no donor is ever asked"
            )


def best_move(loads: Sequence[ShardLoad], config: PolicyConfig, *, has_room: bool) -> Move | None:
    """What helps the hottest shard; None: it needs no help, has some on its way, or none is worth it.

    With has_room a free place comes first: it costs nobody anything. Else it is the move that leaves the hottest shard
    and its donor with the least load per replica.
    """
    shards = [load for load in loads if load.num_replicas > 0]
    if not shards:
        return None
    demand = {load.shard: load.demand(config.full_queue_tokens) for load in shards}
    hot = max(shards, key=lambda load: (demand[load.shard] / load.num_replicas, -load.shard))
    now = demand[hot.shard] / hot.num_replicas
    if now < config.hot_load or hot.num_starting:
        return None
    expert = "" if hot.hottest_expert is None else f", expert {hot.hottest_expert} gets {hot.hottest_share:.0%} of it"
    why = f"shard {hot.shard} carries a load of {now:.2f} on each of {hot.num_replicas} replicas{expert}"
    if has_room and hot.num_replicas < config.max_replicas:
        return Move(source=None, target=hot.shard, reason=why)
    donors = [load for load in shards if load is not hot and load.num_replicas > config.min_replicas]
    if not donors:
        return None
    donor = min(donors, key=lambda load: (demand[load.shard] / (load.num_replicas - 1), load.shard))
    after = max(demand[hot.shard] / (hot.num_replicas + 1), demand[donor.shard] / (donor.num_replicas - 1))
    if after > now * (1 - config.margin):
        return None
    reason = f"{why}; with one of shard {donor.shard} both carry at most {after:.2f}"
    return Move(source=donor.shard, target=hot.shard, reason=reason)


class Balancer:
    """Says yes to a move when it was the best one several times in a row, and then rests. Not thread-safe."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self._candidate: tuple[int | None, int] | None = None
        self._seen = 0
        self._rest = 0
        self._full = 0

    def look(self, loads: Sequence[ShardLoad]) -> Move | None:
        """Take one set of statistics; a move to make now, or None. Call it at even intervals."""
        self._full = max(0, self._full - 1)
        if self._rest:
            self._rest -= 1
            return None
        move = best_move(loads, self.config, has_room=not self._full)
        candidate = None if move is None else (move.source, move.target)
        self._seen = self._seen + 1 if candidate == self._candidate else 1
        self._candidate = candidate
        if move is None or self._seen < self.config.patience:
            return None
        self._candidate, self._seen, self._rest = None, 0, self.config.cooldown
        return move

    def no_room(self) -> None:
        """The last move could not be made, for want of a free place: look for donors at once, and for a while."""
        self._rest, self._full = 0, self.config.full
