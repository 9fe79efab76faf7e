"""When to try again. No clock and no sleeping in here: the caller says what time it is and does the waiting."""

from __future__ import annotations

import random

from expertd.config import RetryPolicy
from expertd.errors import ExpertdError, OverloadedError, UnavailableError

__all__ = ["Retries"]


class Retries:
    """The attempts of one request, or of one part of it. The first one is under way when this is made."""

    def __init__(self, policy: RetryPolicy, deadline: float, rng: random.Random) -> None:
        self._policy = policy
        self._deadline = deadline
        self._rng = rng
        self._attempts = 1
        self._ceiling_s = policy.initial_backoff_s

    def delay_s(self, error: ExpertdError, now: float) -> float | None:
        """How long to wait before the next attempt; None: give up with `error`.

        Gives up when the error is not retryable, the attempts are spent or the wait would pass the deadline.
        """
        policy = self._policy
        if not error.retryable or self._attempts >= policy.max_attempts:
            return None
        # Full jitter: callers that failed together must not come back together.
        delay = self._rng.uniform(0, self._ceiling_s)
        if isinstance(error, OverloadedError | UnavailableError):
            delay += error.retry_after_s or 0.0
        if now + delay >= self._deadline:
            return None
        self._attempts += 1
        self._ceiling_s = min(policy.max_backoff_s, self._ceiling_s * policy.multiplier)
        return delay
