"""Requests that wait, by key: which key's turn it is, and what of it makes a batch. For one thread at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from expertd_server.batch import Entry, Limits

__all__ = ["Waiting"]

P = TypeVar("P")
R = TypeVar("R")


class Waiting(Generic[P, R]):
    """The queues of a batcher."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Every key here has at least one entry; the key whose first entry is oldest comes first.
        self._queues: dict[Hashable, OrderedDict[int, Entry[P, R]]] = {}
        self.num_tokens = 0
        self.num_requests = 0

    def __bool__(self) -> bool:
        return bool(self._queues)

    def room(self) -> tuple[int, int]:
        """How many tokens and requests more may wait."""
        limits = self._limits
        return limits.max_queue_tokens - self.num_tokens, limits.max_queue_requests - self.num_requests

    def add(self, entry: Entry[P, R]) -> None:
        """The newest of all."""
        queue = self._queues.get(entry.key)
        if queue is None:
            queue = self._queues[entry.key] = OrderedDict()
        queue[entry.sequence] = entry
        self.num_tokens += entry.num_tokens
        self.num_requests += entry.num_requests

    def is_last(self, entry: Entry[P, R]) -> bool:
        """Whether it waits, and nothing of its key came after it."""
        queue = self._queues.get(entry.key)
        return queue is not None and next(reversed(queue)) == entry.sequence

    def resize(self, entry: Entry[P, R], num_tokens: int, num_requests: int) -> bool:
        """Count so many more, or fewer, for an entry; whether it waits."""
        queue = self._queues.get(entry.key)
        if queue is None or entry.sequence not in queue:
            return False
        entry.num_tokens += num_tokens
        entry.num_requests += num_requests
        self.num_tokens += num_tokens
        self.num_requests += num_requests
        return True

    def remove(self, entry: Entry[P, R]) -> bool:
        """Whether it waited."""
        queue = self._queues.get(entry.key)
        if queue is None or queue.pop(entry.sequence, None) is None:
            return False
        self.num_tokens -= entry.num_tokens
        self.num_requests -= entry.num_requests
        self._shrunk(entry.key)
        return True

    def clear(self) -> list[Entry[P, R]]:
        """Everything that waited; nothing does any more."""
        left = [entry for queue in self._queues.values() for entry in queue.values()]
        self._queues.clear()
        self.num_tokens = self.num_requests = 0
        return left

    def first_due(self, *, may_delay: bool) -> tuple[Hashable | None, float]:
        """The key to run next and when: among those due first, the one whose first entry is oldest.

        may_delay: whether a batch may wait for company, as far as max_queue_delay_s lets it.
        """
        if not may_delay or not self._limits.max_queue_delay_s:
            return (next(iter(self._queues)), float("-inf")) if self._queues else (None, float("inf"))
        best: tuple[float, int, Hashable] | None = None
        for key, queue in self._queues.items():
            head = next(iter(queue.values()))
            due_s = head.admitted_s + (self._limits.max_queue_delay_s if self._gains_by_waiting(queue) else 0.0)
            if best is None or (due_s, head.sequence) < best[:2]:
                best = (due_s, head.sequence, key)
        return (None, float("inf")) if best is None else (best[2], best[0])

    def pop(self, key: Hashable, now_s: float) -> tuple[list[Entry[P, R]], list[Entry[P, R]]]:
        """Members of a batch of this key, if any, which run from now on, and those whose deadline has passed."""
        queue = self._queues[key]
        members: list[Entry[P, R]] = []
        expired: list[Entry[P, R]] = []
        room = self._limits.max_batch_tokens
        while queue:
            sequence, entry = queue.popitem(last=False)
            if entry.num_tokens > room:
                # No later, smaller request passes this one: order of arrival is what bounds its wait.
                queue[sequence] = entry
                queue.move_to_end(sequence, last=False)
                break
            self.num_tokens -= entry.num_tokens
            self.num_requests -= entry.num_requests
            if not entry.set_running_or_notify_cancel():
                continue
            entry.queued_s = now_s - entry.admitted_s
            if entry.deadline_s is not None and entry.deadline_s <= now_s:
                expired.append(entry)
                continue
            members.append(entry)
            room -= entry.num_tokens
        self._shrunk(key)
        return members, expired

    def _shrunk(self, key: Hashable) -> None:
        """A queue has lost its first entries, or others: keep the keys in order."""
        if not self._queues[key]:
            del self._queues[key]
        elif len(self._queues) > 1:
            self._queues = dict(sorted(self._queues.items(), key=lambda item: next(iter(item[1]))))

    def _gains_by_waiting(self, queue: OrderedDict[int, Entry[P, R]]) -> bool:
        """Whether this queue gains by waiting for company: not when it is full, nor when a deadline is that near."""
        until_s = next(iter(queue.values())).admitted_s + self._limits.max_queue_delay_s
        return sum(e.num_tokens for e in queue.values()) < self._limits.max_batch_tokens and not any(
            e.deadline_s is not None and e.deadline_s <= until_s for e in queue.values()
        )
