"""The operations of one caller of the synchronous client: sent, tried again, waited for."""

from __future__ import annotations

import functools
import heapq
import itertools
import queue
import time
from typing import TYPE_CHECKING, Any

from expertd._base import CLOSED_IN_FLIGHT, Outcome
from expertd._plan import Part, Plan, PreparedRequest, prepare
from expertd._retry import Retries
from expertd._transport import Ticket
from expertd.errors import ClosedError, ExpertdError, TimeoutError
from expertd.types import ForwardRequest, ForwardResult

if TYPE_CHECKING:
    from expertd.client import Client

__all__ = ["Operation", "Pipeline"]


class Run:
    """One part of an operation, on its way."""

    __slots__ = ("index", "operation", "part", "retries", "ticket")

    def __init__(self, operation: Operation, index: int, part: Part, retries: Retries) -> None:
        self.operation = operation
        self.index = index
        self.part = part
        self.retries = retries
        self.ticket: Ticket | None = None


class Operation:
    """One forward."""

    __slots__ = ("deadline", "error", "plan", "runs", "timeout_s")

    def __init__(self, deadline: float, timeout_s: float) -> None:
        self.deadline = deadline
        self.timeout_s = timeout_s
        self.plan: Plan | None = None
        self.runs: set[Run] = set()
        """Parts without an answer."""
        self.error: ExpertdError | None = None

    def fail(self, error: ExpertdError) -> None:
        """Settle with an error; what is on the wire is abandoned."""
        # NOTE: a traceback knows the frames that know the operation, which knows the error: leave no cycle, it would
        # keep the caller's arrays. The caller sees the error from where `wait` raises it.
        self.error = error.with_traceback(None)
        for run in self.runs:
            if run.ticket is not None:
                run.ticket.abandon()
        self.runs.clear()


class Pipeline:
    """The operations of one caller. Used by the caller's thread alone, but for the queue that answers come in by."""

    def __init__(self, client: Client, *, reads: bool = False) -> None:
        """reads: whether the caller waits for each operation as soon as it is started."""
        self._client = client
        self._reads = reads
        self._settled: queue.SimpleQueue[tuple[Run, Outcome] | None] = queue.SimpleQueue()
        self._operations: set[Operation] = set()
        self._waiting: list[tuple[float, int, Run]] = []
        """Heap of (when to try again, tie breaker, what)."""
        self._tie = itertools.count()

    def __enter__(self) -> Pipeline:
        with self._client._lock:
            self._client._pipelines.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._client._lock:
            self._client._pipelines.discard(self)
        for operation in self._operations:
            operation.fail(ClosedError("the caller left"))

    def wake(self) -> None:
        """Make the caller's thread look again, because the client was closed. From any thread."""
        self._settled.put(None)

    @property
    def has_news(self) -> bool:
        """Whether something has come of an operation that nobody has looked at; or one has failed as it was started."""
        return not self._settled.empty() or any(operation.error is not None for operation in self._operations)

    def _arrived(self, run: Run, outcome: Outcome) -> None:
        self._settled.put((run, outcome))

    def start(self, request: ForwardRequest[Any], prepared: PreparedRequest | None = None) -> Operation:
        """Check, split and send a request. Its own failures show when it is waited for.

        prepared: the request, where that is checked already.
        """
        client = self._client
        now = time.monotonic()
        operation = Operation(now, 0.0)
        self._operations.add(operation)
        try:
            operation.timeout_s = client._timeout_s(request.timeout_s)
            operation.deadline = now + operation.timeout_s
            operation.plan = client._make_plan(prepared or prepare(request), operation.deadline)
        except ExpertdError as error:
            operation.fail(error)
        else:
            self._send_unanswered(operation)
        return operation

    def resume(self, plan: Plan, deadline: float, timeout_s: float, error: ExpertdError) -> Operation:
        """Go on with a request of one part that was sent and has failed."""
        operation = Operation(deadline, timeout_s)
        self._operations.add(operation)
        operation.plan = plan
        ((index, part),) = plan.unanswered().items()
        run = Run(operation, index, part, self._client._retries(deadline))
        operation.runs.add(run)
        self._failed(run, error)
        return operation

    def wait(self, operation: Operation) -> ForwardResult[Any]:
        """The result of an operation. Raises its error. Meanwhile the others go on."""
        try:
            while operation.runs:
                self._step(operation)
            if operation.error is not None:
                raise operation.error
            assert operation.plan is not None
            return operation.plan.result()
        finally:
            self._operations.discard(operation)
            operation.error = None  # it knows this frame: leave no cycle

    def _step(self, operation: Operation) -> None:
        """Handle the next thing that happens: an answer, a retry that is due, the operation's deadline, close()."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            self._submit(heapq.heappop(self._waiting)[2])
        wake_at = min(operation.deadline, self._waiting[0][0] if self._waiting else operation.deadline)
        ticket = next((run.ticket for run in operation.runs), None)
        if self._reads and ticket is not None:
            ticket.read_for(self._settled, wake_at)
        try:
            settled = self._settled.get(timeout=max(0.0, wake_at - time.monotonic()))
        except queue.Empty:
            if time.monotonic() >= operation.deadline and operation.runs:
                operation.fail(TimeoutError(f"no answer within {operation.timeout_s:g} s"))
            return
        if settled is not None:
            self._settle(*settled)
        elif self._client._closed.is_set():
            for each in self._operations:
                if each.runs:
                    each.fail(ClosedError(CLOSED_IN_FLIGHT))

    def _settle(self, run: Run, outcome: Outcome) -> None:
        operation = run.operation
        if run not in operation.runs:
            return  # the operation was over before this answer came
        if not isinstance(outcome, ExpertdError):
            assert operation.plan is not None
            try:
                operation.plan.answer(run.index, outcome)
            except ExpertdError as error:
                outcome = error.with_traceback(None)  # which knows this frame: leave no cycle
        if isinstance(outcome, ExpertdError):
            self._failed(run, outcome)
            return
        operation.runs.discard(run)
        if not operation.runs:
            self._send_unanswered(operation)

    def _failed(self, run: Run, error: ExpertdError) -> None:
        self._client._forget(error)
        delay = run.retries.delay_s(error, time.monotonic())
        if delay is None:
            run.operation.fail(error)
        else:
            run.ticket = None
            heapq.heappush(self._waiting, (time.monotonic() + delay, next(self._tie), run))

    def _send_unanswered(self, operation: Operation) -> None:
        assert operation.plan is not None
        parts = operation.plan.unanswered()
        runs = [Run(operation, index, part, self._client._retries(operation.deadline)) for index, part in parts.items()]
        operation.runs.update(runs)
        for run in runs:
            self._submit(run)

    def _submit(self, run: Run) -> None:
        if run not in run.operation.runs:
            return
        on_done = functools.partial(self._arrived, run)
        reads = self._reads and len(run.operation.runs) == 1
        try:
            run.ticket = self._client._transport.submit(run.part.encode(), run.operation.deadline, on_done, reads=reads)
        except ExpertdError as error:
            run.operation.fail(error)
