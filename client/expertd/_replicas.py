"""Which of several equal servers gets a request, when a second one is asked as well, and who is left alone for a while.

No clock and no I/O in here: the caller says what time it is. Not thread-safe: the caller holds the group's lock.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

__all__ = ["Breaker", "BreakerState", "HedgeBudget", "Latencies", "Replica", "pick"]

_DEPTH_LIFETIME_S = 1.0  # a queue that was deep a second ago says little about now
_WINDOW = 256
_MIN_SAMPLES = 16
_use_counter = itertools.count(1)


class BreakerState(enum.Enum):
    """Whether a server gets requests."""

    CLOSED = "closed"
    """It does."""
    OPEN = "open"
    """It failed: it gets none, but is probed."""
    HALF_OPEN = "half_open"
    """A probe succeeded: it gets one, on whose fate the next state depends."""


class Breaker:
    """Keeps requests away from a server that fails. A probe that succeeds lets one request through as a trial."""

    def __init__(self, max_failures: int) -> None:
        """max_failures: failures in a row that open it."""
        self.state = BreakerState.CLOSED
        self._max_failures = max_failures
        self._failures = 0
        self._on_trial = False

    @property
    def admits(self) -> bool:
        """Whether the server may get a request now."""
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and not self._on_trial)

    def sent(self) -> None:
        """A request is on its way."""
        self._on_trial = self.state is BreakerState.HALF_OPEN

    def succeeded(self) -> None:
        """A request was answered."""
        self.state, self._failures, self._on_trial = BreakerState.CLOSED, 0, False

    def failed(self) -> None:
        """A request failed, timed out, or was answered sooner by another server that was asked later."""
        self._failures += 1
        if self._failures >= self._max_failures or self.state is BreakerState.HALF_OPEN:
            self.trip()

    def trip(self) -> None:
        """The server cannot be reached, or said that it takes no requests."""
        self.state, self._failures, self._on_trial = BreakerState.OPEN, 0, False

    def probe_succeeded(self) -> None:
        """The server answered a probe."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def settled(self) -> None:
        """A request came to an end, perhaps without a verdict: another may be the trial."""
        self._on_trial = False


class Replica:
    """One server, and what is known about its load and its health."""

    def __init__(self, address: str, *, max_in_flight: int, max_failures: int) -> None:
        """max_in_flight: most requests on the wire to it at a time."""
        self.address = address
        self.breaker = Breaker(max_failures)
        self.draining = False
        self.in_flight_tokens = 0
        self.in_flight_requests = 0
        self.last_use = 0
        self._max_in_flight = max_in_flight
        self._depth_tokens = 0
        self._depth_at = float("-inf")

    def __repr__(self) -> str:
        return f"Replica({self.address!r}, {self.breaker.state.value}, {self.in_flight_tokens} tokens in flight)"

    @property
    def has_room(self) -> bool:
        """Whether one more request fits on the wire."""
        return self.in_flight_requests < self._max_in_flight

    def load(self, now: float) -> int:
        """Tokens that a new request would wait behind: ours on the wire, and what its last answer said of its queue."""
        depth = self._depth_tokens if now - self._depth_at < _DEPTH_LIFETIME_S else 0
        return self.in_flight_tokens + depth

    def note_queue_depth(self, tokens: int, now: float) -> None:
        """Take the load hint of an answer."""
        self._depth_tokens, self._depth_at = tokens, now

    def sent(self, tokens: int) -> None:
        """A request of so many tokens is on its way."""
        self.in_flight_tokens += tokens
        self.in_flight_requests += 1
        self.last_use = next(_use_counter)
        self.breaker.sent()

    def settled(self, tokens: int) -> None:
        """It is no longer: answered, failed or taken back."""
        self.in_flight_tokens -= tokens
        self.in_flight_requests -= 1
        self.breaker.settled()


def pick(
    replicas: Iterable[Replica], now: float, exclude: Container[Replica] = (), *, desperate: bool = False
) -> Replica | None:
    """The least loaded replica that takes requests; of equals the one that was used longest ago. None: there is none.

    desperate: when no healthy one is left, a replica that is draining, or whose breaker is open, is better than none:
    what is known about it may be old.
    """
    willing = [replica for replica in replicas if replica not in exclude]
    healthy = [replica for replica in willing if replica.breaker.admits and not replica.draining]
    candidates = willing if desperate and not healthy else healthy
    return min(
        (replica for replica in candidates if replica.has_room),
        key=lambda replica: (replica.load(now), replica.last_use),
        default=None,
    )


class Latencies:
    """How long answers take, by size of the request: powers of two of tokens."""

    def __init__(self, percentile: float, min_delay_s: float) -> None:
        """percentile: in 0 ... 1, the share of answers that hedging lets come in peace. min_delay_s: never sooner."""
        self._percentile = percentile
        self._min_delay_s = min_delay_s
        self._windows: dict[int, _Window] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        """One answer."""
        window = self._windows.setdefault(num_tokens.bit_length(), _Window())
        window.latencies.append(seconds)
        window.since_sorted += 1
        # Sorting for every answer would cost more than it tells.
        if window.since_sorted >= _MIN_SAMPLES:
            ordered = sorted(window.latencies)
            window.percentile_s = ordered[math.ceil(self._percentile * len(ordered)) - 1]
            window.since_sorted = 0

    def hedge_delay_s(self, num_tokens: int) -> float | None:
        """When to ask a second server; None while too few requests of this size were answered to tell."""
        window = self._windows.get(num_tokens.bit_length())
        if window is None or window.percentile_s is None:
            return None
        return max(self._min_delay_s, window.percentile_s)

    def hedge_delays_s(self) -> dict[int, float]:
        """The delays that are known, by the most tokens of the requests that each holds for."""
        return {
            2**bits - 1: max(self._min_delay_s, window.percentile_s)
            for bits, window in sorted(self._windows.items())
            if window.percentile_s is not None
        }


@dataclass(slots=True)
class _Window:
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    since_sorted: int = 0
    percentile_s: float | None = None


class HedgeBudget:
    """Bounds hedged requests to a share of all, so that an overload is not made worse."""

    def __init__(self, share: float, burst: int) -> None:
        """share: hedges per request. burst: most hedges saved up, and there at the start."""
        self._share = share
        self._burst = float(burst)
        self._saved = float(burst)

    def earn(self) -> None:
        """A request was sent."""
        self._saved = min(self._burst, self._saved + self._share)

    def spend(self) -> bool:
        """Whether one more hedge may be sent; takes it from the budget."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
