"""Requests that are made once and sent many times on one stream, in whose memory all of them lies. No I/O."""

from __future__ import annotations

import copy
from typing import Any, Final, Generic, Protocol, TypeVar

from expertd._base import Outcome, stream_outcome, unasked_ticket
from expertd._plan import Part, Plan, timing_of
from expertd._shm import Placed, StreamMemory
from expertd._wire_read import KnownAnswer
from expertd.errors import ExpertdError, ProtocolError, UnavailableError
from expertd.types import ForwardResult
from expertd.v1 import expertd_pb2 as pb

__all__ = ["FIRST_STANDING_ID", "STANDING_KEY", "STOP_STANDING_ID", "Standing", "StandingStream", "key_of", "part_of"]

FIRST_STANDING_ID: Final = 2**49
"""The ids of standing requests; no stream sends as many others. Their varints have eight bytes, all of them."""

STOP_STANDING_ID: Final = 2**56

STANDING_KEY: Final = slice(0, 9)
"""Where an answer says whose it is, if it is that of a standing request: the key of its id, and the id."""

SettledT = TypeVar("SettledT")


def key_of(request_id: int) -> bytes:
    """The bytes at STANDING_KEY of the answer to a standing request."""
    return bytes((0x08, *(request_id >> shift & 0x7F | 0x80 for shift in range(0, 49, 7)), request_id >> 49))


def part_of(plan: Plan) -> Part | None:
    """What could be sent as a standing request; None: it is sent in parts, or has no array for its output."""
    parts = plan.unanswered()
    return parts[0] if len(parts) == 1 and plan.request.out is not None else None


class StandingStream(Protocol):
    """A stream, to what is made of an answer."""

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""

    @property
    def request_id(self) -> str | None:
        """The x-request-id of its call."""

    def retire(self) -> None:
        """Take no more requests: this server starts or drains, and a new stream may reach another one."""

    def break_off(self, failure: ProtocolError) -> None:
        """Have it end: its server does not make sense."""


class Standing(Generic[SettledT]):
    """One of them, for one thread at a time.

    settled: where its stream puts its answer, or what came in place of one: bytes as they came, mostly.
    """

    __slots__ = (
        "_known",
        "_weights_version",
        "detached",
        "key",
        "memory",
        "message",
        "part",
        "placed",
        "request_id",
        "settled",
        "stream",
    )

    def __init__(  # noqa: PLR0917 (all of it is known at once)
        self,
        stream: StandingStream,
        request_id: int,
        part: Part,
        memory: StreamMemory,
        message: bytes,
        placed: Placed,
        settled: SettledT,
    ) -> None:
        self.stream = stream
        self.request_id = request_id
        self.key = key_of(request_id)
        self.part = part
        self.memory = memory
        self.message = message
        self.placed = placed
        self.settled = settled
        self.detached = memory.detached
        """What was not in the memory any more when this was placed: it may be sent as long as that is all."""
        self._known: KnownAnswer | None = None
        """The answer that was read and checked last."""
        self._weights_version = 0
        """That of it."""

    @property
    def may_be_sent(self) -> bool:
        """Whether its arrays still lie where they lay."""
        return self.detached is self.memory.detached

    def result_of(self, answer: bytes | Outcome) -> ForwardResult[Any] | ExpertdError:
        """What an answer says; a failure is returned, not raised, where the request may be sent again.

        Raises ProtocolError where the answer does not fit the request.
        """
        if self._known is not None and type(answer) is bytes:
            timing = self._known.timing_of(answer)
            if timing is not None:
                return ForwardResult(
                    output=self.part.request.out_array,
                    gemm2_output=None,
                    expert_weights=None,
                    topk_ids=None,
                    expanded_idx_to_permuted_idx=None,
                    weights_version=self._weights_version,
                    timings=(timing_of(timing),),
                )
        outcome = self._outcome_of(answer)
        if isinstance(outcome, ExpertdError):
            return outcome
        request = self.part.request
        plan = self.plan()
        plan.answer(0, outcome)
        result = plan.result()
        # Not one with tensors in it, which are others each time.
        self._known = KnownAnswer(answer) if isinstance(answer, bytes) and not request.return_routing else None
        self._weights_version = result.weights_version
        return result

    def plan(self) -> Plan:
        """A plan that sends the same in one part."""
        return Plan(self.part.request, max(1, self.part.request.num_tokens))

    def _outcome_of(self, answer: bytes | Outcome) -> Outcome:
        outcome: Outcome | pb.RegionTicket
        if isinstance(answer, bytes):
            try:
                _, outcome = stream_outcome(answer, self.stream.request_id)
            except ProtocolError as error:
                # Copies: what it was raised from knows this frame, and the stream keeps its own.
                self.stream.break_off(copy.copy(error))
                return copy.copy(error)
        else:
            outcome = answer
        if isinstance(outcome, pb.RegionTicket):
            return unasked_ticket()
        if isinstance(outcome, UnavailableError):
            self.stream.retire()
        return outcome if isinstance(outcome, ExpertdError) else self.memory.response(outcome, self.placed)
