"""The parts of one call on their way: who gets which part, when another server is asked, when to give up.

No clock, no I/O and no waiting in here. The driver says what time it is, puts on the wire what `poll` returns, reports
what comes back, and calls `poll` again at `wake_at` at the latest. The caller holds the group's lock throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from expertd._replicas import BreakerState, HedgeBudget, Latencies, Replica, pick
from expertd._stats import GroupStats
from expertd.errors import (
    AccessDeniedError,
    ClosedError,
    ExpertdError,
    InvalidRequestError,
    LayerNotFoundError,
    MessageTooLargeError,
    NoReplicaError,
    OverloadedError,
    ProtocolError,
    ServerError,
    TimeoutError,
    UnavailableError,
    VersionNotHeldError,
)
from expertd.group_types import GroupConfig

__all__ = ["Attempt", "Dispatch", "Job", "Shared", "Ticket"]

_ROOM_POLL_S = 0.002  # how soon to look again when every server of a slice has all it may have on the wire
_MAX_DOUBLINGS = 64  # more than any max_backoff_s lets count
_FATAL = (InvalidRequestError, MessageTooLargeError, AccessDeniedError)
_MAX_BROKEN_ANSWERS = 2  # servers that may fail on one part before the call does: the request may be to blame


class Ticket(Protocol):
    """A request on the wire."""

    def abandon(self) -> None:
        """Forget it: its answer, should it still come, is dropped."""


@dataclass(frozen=True)
class Shared:
    """What all calls of one group share."""

    config: GroupConfig
    stats: GroupStats
    latencies: Latencies | None
    """None: never hedge."""
    budget: HedgeBudget


@dataclass(eq=False, slots=True)
class Attempt:
    """One part on the wire to one server."""

    job: Job
    replica: Replica
    sent_at: float
    deadline: float
    is_hedge: bool
    ticket: Ticket | None = None
    """Set by the driver."""


@dataclass(eq=False, slots=True)
class Job:
    """One part: what it is for, and how it fares."""

    index: int
    """Position in the driver's list of parts."""
    experts: range
    num_tokens: int
    replicas: Sequence[Replica]
    """Servers that hold the experts in the version that the call asks for."""
    look_again: Callable[[], Sequence[Replica]] = tuple
    """Who holds them now; nobody: go on with those that did."""
    attempts: list[Attempt] = field(default_factory=list)
    """On the wire now."""
    tried: set[Replica] = field(default_factory=set)
    """Asked in this round; when all were, the next round begins after a pause."""
    unfit: set[Replica] = field(default_factory=set)
    """Turned out not to hold the layer, or not in this version."""
    failed_on: dict[Replica, ExpertdError] = field(default_factory=dict)
    """Servers that failed on this part while they were there: they do not get it again."""
    num_rounds: int = 0
    num_attempts: int = 0
    not_before: float = float("-inf")
    """When the round begins."""
    retry_after_s: float = 0.0
    """The longest pause that an overloaded server asked for in this round."""
    hedge_at: float | None = None
    """When to look whether to ask another server while one has the part."""
    failing_since: float | None = None
    last_error: ExpertdError | None = None
    answered_by: str | None = None
    is_missing: bool = False

    @property
    def untried(self) -> list[Replica]:
        """Servers that may be asked in this round."""
        return [replica for replica in self.replicas if replica not in self.tried and not self.is_out(replica)]

    @property
    def is_hopeless(self) -> bool:
        """Whether no server is left that may ever be asked."""
        return all(map(self.is_out, self.replicas))

    def is_out(self, replica: Replica) -> bool:
        """Whether a server does not get this part again."""
        return replica in self.unfit or replica in self.failed_on

    @property
    def is_open(self) -> bool:
        """Whether an answer is still wanted."""
        return self.answered_by is None and not self.is_missing


class Dispatch:
    """All parts of one call."""

    def __init__(
        self, jobs: Sequence[Job], shared: Shared, *, layer: str, deadline: float, allow_partial: bool
    ) -> None:
        """deadline: of the call, on the driver's clock."""
        self.jobs = jobs
        self.failure: ExpertdError | None = None
        """Why the call failed."""
        self.is_stale = False
        """Whether the servers no longer hold what they were thought to: look again, and start over."""
        self._shared = shared
        self._layer = layer
        self._deadline = deadline
        self._allow_partial = allow_partial
        shared.stats.count("parts", len(jobs))

    @property
    def is_done(self) -> bool:
        """Whether nothing more will happen."""
        return self.failure is not None or self.is_stale or not any(job.is_open for job in self.jobs)

    def poll(self, now: float) -> list[Attempt]:
        """What to put on the wire now. Expires what has waited too long."""
        if self.is_done:
            return []
        attempts = []
        for job in self.jobs:
            if not job.is_open:
                continue
            if now >= self._deadline:
                self._give_up(job, TimeoutError(f"no answer for {_describe(self._layer, job)} before the deadline"))
            else:
                self._expire(job, now)
                attempt = self._next_attempt(job, now)
                if attempt is not None:
                    attempts.append(attempt)
            if self.failure is not None:
                break
        if self.is_done:
            self.abandon()
            return []
        return attempts

    def wake_at(self) -> float:
        """When to poll next, unless something comes back sooner."""
        times = [self._deadline]
        for job in self.jobs:
            if not job.is_open:
                continue
            if not job.attempts:
                times.append(job.not_before)
            times += [attempt.deadline for attempt in job.attempts]
            if job.hedge_at is not None:
                times.append(job.hedge_at)
        return min(times)

    def answered(self, attempt: Attempt, queue_depth_tokens: int, now: float) -> bool:
        """An answer came. False: it is not needed any more."""
        job = attempt.job
        if attempt not in job.attempts:
            return False
        self._settle(attempt)
        attempt.replica.breaker.succeeded()
        attempt.replica.note_queue_depth(queue_depth_tokens, now)
        if self._shared.latencies is not None:
            self._shared.latencies.add(job.num_tokens, now - attempt.sent_at)
        if attempt.is_hedge:
            self._shared.stats.count("hedge_wins")
        for slower in list(job.attempts):
            if slower.sent_at < attempt.sent_at:
                # Asked first and still not there: once is chance, several times in a row is a server that hangs.
                slower.replica.breaker.failed()
            self._take_back(slower)
        for broken in job.failed_on:
            broken.breaker.failed()  # the request was good after all
        job.answered_by = attempt.replica.address
        return True

    def failed(self, attempt: Attempt, error: ExpertdError, now: float) -> None:
        """An attempt failed, on the way or on the server."""
        job = attempt.job
        if attempt not in job.attempts:
            return
        self._settle(attempt)
        self._judge(attempt.replica, job, error, now)
        if job.attempts:
            # Another server has the part still. Should it be slow, this one may be asked again, after a pause.
            if not job.is_out(attempt.replica) and not job.untried:
                self._next_round(job, now)
            delay = self._hedge_delay_s(job)
            job.hedge_at = None if delay is None else max(now + delay, job.not_before)
        if isinstance(error, _FATAL):
            self.failure = error
        elif len(job.failed_on) >= _MAX_BROKEN_ANSWERS or (job.failed_on and not job.attempts and job.is_hopeless):
            self._give_up(job, self._broken(job))
        elif not job.attempts and job.unfit.issuperset(job.replicas):
            self.is_stale = True
            job.last_error = error
        if self.is_done:
            self.abandon()

    def abandon(self) -> None:
        """Take back everything that is on the wire."""
        for job in self.jobs:
            for attempt in list(job.attempts):
                self._take_back(attempt)

    def _judge(self, replica: Replica, job: Job, error: ExpertdError, now: float) -> None:
        job.last_error = error
        if job.failing_since is None:
            job.failing_since = now
        match error:
            case VersionNotHeldError() | LayerNotFoundError():
                job.unfit.add(replica)
            case OverloadedError():
                job.retry_after_s = max(job.retry_after_s, error.retry_after_s or 0.0)
            case UnavailableError() | ClosedError():
                replica.breaker.trip()
            case ServerError() | ProtocolError():
                # NOTE: no word to the breaker yet, or one poisoned request would take all servers of a slice away.
                job.failed_on[replica] = error
            case _ if not isinstance(error, _FATAL):
                replica.breaker.failed()

    def _expire(self, job: Job, now: float) -> None:
        for attempt in list(job.attempts):
            if now >= attempt.deadline:
                self._take_back(attempt)
                waited = f"{attempt.replica.address} did not answer within {now - attempt.sent_at:.3g} s"
                self._judge(attempt.replica, job, TimeoutError(waited), now)

    def _next_attempt(self, job: Job, now: float) -> Attempt | None:
        if not job.attempts:
            return self._try_another(job, now)
        if all(attempt.replica.breaker.state is BreakerState.OPEN for attempt in job.attempts):
            # Others found out that this server is gone: do not wait for what will not come.
            return self._fail_over(job, now)
        if job.hedge_at is not None and now >= job.hedge_at:
            return self._hedge(job, now)
        return None

    def _fail_over(self, job: Job, now: float) -> Attempt | None:
        untried = job.untried
        replica = pick(untried, now, desperate=True) if now >= job.not_before else None
        if replica is not None:
            return self._send(job, replica, now)
        job.hedge_at = max(job.not_before, now + _ROOM_POLL_S) if untried else None
        return None

    def _try_another(self, job: Job, now: float) -> Attempt | None:
        if now < job.not_before:
            return None
        patience_s = self._shared.config.no_replica_timeout_s
        if untried := job.untried:
            replica = pick(untried, now, desperate=True)
            if replica is not None:
                return self._send(job, replica, now)
            job.not_before = now + _ROOM_POLL_S
        elif job.is_hopeless or (job.failing_since is not None and now - job.failing_since >= patience_s):
            self._give_up(job, self._no_replica(job))
        else:
            self._next_round(job, now)
        return None

    def _next_round(self, job: Job, now: float) -> None:
        """After a pause, all servers may be asked again that do not have the part still."""
        config = self._shared.config
        pause = min(config.max_backoff_s, config.initial_backoff_s * 2 ** min(job.num_rounds, _MAX_DOUBLINGS))
        job.not_before = now + max(pause, job.retry_after_s)
        job.num_rounds += 1
        job.retry_after_s = 0.0
        job.tried = {attempt.replica for attempt in job.attempts}
        job.replicas = job.look_again() or job.replicas  # servers may have come since the call began

    def _send(self, job: Job, replica: Replica, now: float, *, is_hedge: bool = False) -> Attempt:
        config = self._shared.config
        job.tried.add(replica)
        job.num_attempts += 1
        left = self._deadline - now
        has_others = bool(job.untried)
        timeout = min(config.attempt_timeout_s, left / 2 if has_others else left)
        delay = self._hedge_delay_s(job)
        job.hedge_at = None if is_hedge or delay is None or not has_others else now + delay
        attempt = Attempt(job, replica, now, now + timeout, is_hedge)
        job.attempts.append(attempt)
        replica.sent(job.num_tokens)
        stats = self._shared.stats
        stats.count("attempts")
        if is_hedge:
            stats.count("hedges")
        else:
            self._shared.budget.earn()
            stats.count("failovers", int(job.num_attempts > 1))
        return attempt

    def _hedge(self, job: Job, now: float) -> Attempt | None:
        # One that is out of use is better than none: it may have been slow for a moment, this one may be frozen.
        delay = self._hedge_delay_s(job)
        replica = None if delay is None else pick(job.untried, now, desperate=True)
        if replica is not None and self._shared.budget.spend():
            return self._send(job, replica, now, is_hedge=True)
        # Look again in a while: the budget grows, and other calls may find out that the first server is gone.
        job.hedge_at = now + (delay or self._shared.config.attempt_timeout_s)
        return None

    def _hedge_delay_s(self, job: Job) -> float | None:
        return None if self._shared.latencies is None else self._shared.latencies.hedge_delay_s(job.num_tokens)

    def _no_replica(self, job: Job) -> ExpertdError:
        if isinstance(job.last_error, OverloadedError):
            return job.last_error  # they are there, they are only busy
        if job.failed_on:
            return self._broken(job)
        reason = "nobody holds them" if job.last_error is None else f"last error: {job.last_error}"
        error = NoReplicaError(f"no server left for {_describe(self._layer, job)}: {reason}")
        error.layer, error.experts = self._layer, (job.experts,)
        error.__cause__ = job.last_error
        return error

    def _broken(self, job: Job) -> ExpertdError:
        """What the last server said that failed on a part."""
        error = list(job.failed_on.values())[-1]
        error.add_note(f"{' and '.join(r.address for r in job.failed_on)} failed on {_describe(self._layer, job)}")
        return error

    def _give_up(self, job: Job, error: ExpertdError) -> None:
        if self._allow_partial:
            for attempt in list(job.attempts):
                self._take_back(attempt)
            job.is_missing = True
            job.last_error = error
        else:
            self.failure = error

    def _settle(self, attempt: Attempt) -> None:
        attempt.job.attempts.remove(attempt)
        attempt.replica.settled(attempt.job.num_tokens)

    def _take_back(self, attempt: Attempt) -> None:
        self._settle(attempt)
        if attempt.ticket is not None:
            attempt.ticket.abandon()


def _describe(layer: str, job: Job) -> str:
    return f"experts {job.experts.start}-{job.experts.stop - 1} of layer {layer!r} ({job.num_tokens} tokens)"
