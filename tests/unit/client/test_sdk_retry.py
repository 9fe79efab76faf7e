"""The retry policy, without a clock."""

from __future__ import annotations

import random

import pytest

import expertd
from expertd._retry import Retries


class Always(random.Random):
    """Draws the given share of the range."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def uniform(self, a: float, b: float) -> float:
        return a + self.share * (b - a)


POLICY = expertd.RetryPolicy(max_attempts=5, initial_backoff_s=0.1, max_backoff_s=0.5, multiplier=2.0)
UNAVAILABLE = expertd.UnavailableError("down")


def test_backoff_doubles_up_to_its_ceiling_and_ends() -> None:
    retries = Retries(POLICY, deadline=1e9, rng=Always(1.0))
    assert [retries.delay_s(UNAVAILABLE, now=0.0) for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, None]


def test_however_many_attempts_there_are() -> None:
    policy = expertd.RetryPolicy(max_attempts=10_000, initial_backoff_s=0.1, max_backoff_s=0.5, multiplier=10.0)
    retries = Retries(policy, deadline=1e9, rng=Always(1.0))
    assert [retries.delay_s(UNAVAILABLE, now=0.0) for _ in range(9_999)] == [0.1] + [0.5] * 9_998


def test_jitter_is_full() -> None:
    rng = random.Random(7)
    drawn = [Retries(POLICY, 1e9, rng).delay_s(UNAVAILABLE, 0.0) or 0.0 for _ in range(1000)]
    assert min(drawn) < 0.01
    assert 0.09 < max(drawn) <= 0.1


def test_server_delay_comes_on_top_of_the_jitter() -> None:
    full = expertd.OverloadedError("full")
    full.retry_after_s = 3.0
    assert Retries(POLICY, 1e9, Always(1.0)).delay_s(full, now=0.0) == pytest.approx(3.1)


def test_no_wait_goes_past_the_deadline() -> None:
    assert Retries(POLICY, deadline=10.0, rng=Always(1.0)).delay_s(UNAVAILABLE, now=9.95) is None
    full = expertd.OverloadedError("full")
    full.retry_after_s = 60.0
    assert Retries(POLICY, deadline=10.0, rng=Always(0.0)).delay_s(full, now=0.0) is None


@pytest.mark.parametrize(
    "error", [expertd.ServerError("x"), expertd.InvalidRequestError("x"), expertd.TimeoutError("x")]
)
def test_other_errors_are_final(error: expertd.ExpertdError) -> None:
    assert Retries(POLICY, 1e9, Always(0.0)).delay_s(error, 0.0) is None


def test_one_attempt_means_no_retry() -> None:
    assert Retries(expertd.RetryPolicy(max_attempts=1), 1e9, Always(0.0)).delay_s(UNAVAILABLE, 0.0) is None
