"""Calls that are checked, planned and encoded once, and made many times."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING, Generic

from expertd._base import timeout_ms
from expertd._pipeline import Operation, Pipeline
from expertd._plan import Plan, PreparedRequest, prepare
from expertd._standing import part_of
from expertd._transport import QueuedStanding, Settled
from expertd.errors import ExpertdError, InvalidRequestError, TimeoutError
from expertd.types import ArrayT, ForwardRequest, ForwardResult

if TYPE_CHECKING:
    from expertd.client import Client

__all__ = ["PreparedForward"]


class PreparedForward(Generic[ArrayT]):
    """One forward on the same arrays, over and over: see `Client.prepare`, which makes it.

    One request at a time, and one thread at a time. One thread can have many of them in flight, each started before the
    first is waited for.

    Where all its arrays and `out` are of `Client.empty`, a message made once is all that is sent, and an answer like
    the one before is not read again. Otherwise, and whenever that cannot be (the stream has ended, the server has gone,
    a request is tried again), it does what forward does, with the same results and errors.
    """

    def __init__(self, client: Client, request: ForwardRequest[ArrayT]) -> None:
        """See `Client.prepare`."""
        self._client = client
        self._request: ForwardRequest[ArrayT] = request
        self.timeout_s = client._timeout_s(request.timeout_s)
        """What each call allows, retries included."""
        prepared = prepare(request)
        self._prepared: PreparedRequest | None = prepared if prepared.is_view_of(request) else None
        """None: arrays were copied, and have to be whenever they are sent."""
        self._deadline = time.monotonic() + self.timeout_s
        self._settled: Settled = queue.SimpleQueue()
        self._standing = self._stand(client._make_plan(prepared, self._deadline))
        self._sent: QueuedStanding | None = None
        """What is on the wire, if it is the standing request."""
        self._pipeline: Pipeline | None = None
        """Of what is on the wire otherwise, and that."""
        self._operation: Operation | None = None

    def run(self) -> ForwardResult[ArrayT]:
        """Make the call: `start`, then `wait`. The request is abandoned when an exception gets in between."""
        self._check_idle()
        try:
            self._start(reads=True)
            return self.wait()
        except BaseException:
            self._abandon()
            raise

    def start(self) -> None:
        """Send the request. `wait` must follow, which raises what goes wrong meanwhile and here.

        Waits for a place among max_in_flight, and for the server where it is not known any more. Raises
        InvalidRequestError when the request before was not waited for.
        """
        self._check_idle()
        try:
            self._start(reads=False)
        except BaseException:  # KeyboardInterrupt, most likely: nothing is left to wait for
            self._abandon()
            raise

    @property
    def is_answered(self) -> bool:
        """Whether there is something for `wait` to return, or to look at, of the request that was started.

        As far as it was read: whoever waits for one of the client's calls takes the answers to others as well.
        """
        sent = self._sent
        if sent is not None:
            return not sent.settled.empty()
        return self._pipeline is not None and self._pipeline.has_news

    def wait(self) -> ForwardResult[ArrayT]:
        """The result of the request that was started. Raises ExpertdError: see `expertd.errors`."""
        sent = self._sent
        if sent is None:
            return self._wait_otherwise()
        answer = sent.on.settle_standing(sent, self._deadline)
        if answer is None:
            self._abandon()
            raise TimeoutError(f"no answer within {self.timeout_s:g} s")
        self._sent = None
        result = sent.result_of(answer)
        if not isinstance(result, ExpertdError):
            return result
        pipeline = self._enter_pipeline(reads=True)
        try:
            self._operation = pipeline.resume(sent.plan(), self._deadline, self.timeout_s, result)
        except BaseException:
            self._abandon()
            raise
        finally:
            del answer, result  # which will know this frame: leave no cycle, it would keep the caller's arrays
        return self._wait_otherwise()

    def _check_idle(self) -> None:
        if self._sent is not None or self._pipeline is not None:
            raise InvalidRequestError.of("start", "is called again before wait, expected one request at a time")

    def _start(self, *, reads: bool) -> None:
        self._deadline = time.monotonic() + self.timeout_s
        standing = self._standing
        if standing is not None:
            self._sent = standing
            if standing.on.send_standing(standing):
                return
            self._sent = None
            self._standing = self._stand_again(standing)
        pipeline = self._enter_pipeline(reads=reads)
        self._operation = pipeline.start(self._request, self._prepared)

    def _wait_otherwise(self) -> ForwardResult[ArrayT]:
        pipeline, operation = self._pipeline, self._operation
        if pipeline is None or operation is None:
            raise InvalidRequestError.of("wait", "is called before start, expected a request that was started")
        try:
            return pipeline.wait(operation)
        finally:
            self._abandon()

    def _enter_pipeline(self, *, reads: bool) -> Pipeline:
        self._pipeline = Pipeline(self._client, reads=reads).__enter__()
        return self._pipeline

    def _abandon(self) -> None:
        """Nobody waits for what is on the wire any more, if anything is."""
        sent, self._sent = self._sent, None
        if sent is not None:
            # Its array for the output is the caller's alone now, and its answer may be there already.
            self._standing, self._settled = None, queue.SimpleQueue()
            sent.on.abandon_standing(sent)
        pipeline, self._pipeline, self._operation = self._pipeline, None, None
        if pipeline is not None:
            pipeline.__exit__()

    def _stand(self, plan: Plan) -> QueuedStanding | None:
        """A standing request, where all arrays lie in a stream's memory."""
        part = part_of(plan)
        if part is None or self._prepared is None:
            return None
        return self._client._transport.stand(part, timeout_ms(self.timeout_s), self._settled)

    def _stand_again(self, standing: QueuedStanding) -> QueuedStanding | None:
        """In place of one that was not sent; None where there will be none any more."""
        stand = self._client._transport.stand
        again = stand(standing.part, timeout_ms(self.timeout_s), self._settled)
        if again is None and standing.on.is_open and standing.memory.holds(standing.part.encode()):
            return standing
        return again
