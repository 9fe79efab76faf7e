"""What a batcher queues and runs: requests, batches of them, and what becomes of a batch once it is launched."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from expertd_server.promise import Promise

__all__ = ["Batch", "Entry", "Flight", "Limits", "Running"]

P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may wait, and what may run together."""

    max_batch_tokens: int
    max_queue_tokens: int
    """Tokens that may wait, over all keys; batches in flight do not count."""
    max_queue_requests: int
    max_queue_delay_s: float = 0.0
    """How long the first request of a batch may wait for company while there is room in flight."""
    max_in_flight: int = 1
    """Batches that are launched and not computed yet."""
    crowd_tokens: int | None = None
    """Tokens that wait when one batch more may be in flight; None: never."""
    max_coming_back: int = 0
    """Batches more that are computed and whose answers are on their way back."""


class Entry(Promise[R], Generic[P, R]):
    """One admitted request, and the promise of its result.

    Cancelling it takes a waiting request out of the queue; a running one is not stopped.
    """

    __slots__ = (
        "_forget",
        "admitted_s",
        "deadline_s",
        "is_spent",
        "key",
        "num_requests",
        "num_tokens",
        "payload",
        "queued_s",
        "sequence",
    )

    def __init__(  # noqa: PLR0917 (made for every request, and keywords take time)
        self,
        sequence: int,
        key: Hashable,
        payload: P,
        num_tokens: int,
        admitted_s: float,
        deadline_s: float | None,
        forget: Callable[[Entry[P, R]], None],
        on_done: Callable[[Entry[P, R]], object] | None,
        num_requests: int = 1,
    ) -> None:
        super().__init__(on_done)
        self.sequence = sequence
        self.key = key
        self.payload = payload
        """What is to be computed; None when it is over."""
        self.num_tokens = num_tokens
        self.num_requests = num_requests
        """Callers that it stands for."""
        self.admitted_s = admitted_s
        self.deadline_s = deadline_s
        self.queued_s = 0.0
        """From admission to the start of its batch; set when the batch is taken."""
        self.is_spent = False
        """Set by who launches: its answer may be on its way over what it is computed from, so it runs once."""
        self._forget = forget

    def _tell(self) -> None:
        # Whoever keeps the promise keeps the result alone, not the request's tensors and its layer.
        self.payload = None  # type: ignore[assignment]
        if self.cancelled():
            self._forget(self)
        super()._tell()


@dataclass(eq=False, slots=True)
class Batch(Generic[P, R]):
    """Entries of one key that run together, in order of arrival; at least one."""

    key: Hashable
    entries: list[Entry[P, R]]
    num_tokens: int
    """Of all members, when they were taken from the queue."""
    number: int
    """Of no other batch of its batcher."""

    @property
    def num_requests(self) -> int:
        """Of all members, when they were admitted."""
        return sum([entry.num_requests for entry in self.entries])


class Running(Protocol[R_co]):
    """A batch that was launched. Its methods are called in this order, by one thread."""

    def wait(self, seconds: float | None = None) -> bool:
        """Return when it is computed, or when so much time has passed; whether it is. Raises what went wrong."""
        ...

    def is_computed(self) -> bool:
        """Whether it needs what computes no more, though its answers may still be on their way. Raises as `wait`."""
        ...

    def ring_when_over(self, fd: int) -> None:
        """Write to an eventfd when `wait` would return at once, and before that when `is_computed`, from whatever
        thread; see `Bell`. Called once, before `wait` without an end."""
        ...

    def results(self) -> Sequence[R_co]:
        """One for each entry, in order; an exception among them fails its entry alone. Raises what went wrong."""
        ...

    def close(self) -> None:
        """Called last, in any case, when its waiters have been served: what need not keep them waiting."""
        ...


@dataclass(eq=False, slots=True)
class Flight(Generic[P, R]):
    """A batch that was launched and is not over and done with."""

    batch: Batch[P, R]
    running: Running[R]
    launched_s: float
    error: Exception | None = None
    """What waiting for it raised."""
    was_computed: bool = False
    """As `is_computed` has said."""

    def wait(self, seconds: float | None = None) -> bool:
        """See `Running.wait`; what it raises is kept."""
        try:
            return self.running.wait(seconds)
        except Exception as error:
            self.error = error
            return True

    def is_computed(self) -> bool:
        """See `Running.is_computed`; what fails is no longer computed, and `wait` says why."""
        try:
            self.was_computed = self.was_computed or self.running.is_computed()
        except Exception:
            self.was_computed = True
        return self.was_computed
