"""Calls of the asynchronous client that are checked, planned and encoded once, and made many times."""

from __future__ import annotations

import asyncio
import builtins
from typing import TYPE_CHECKING, Generic

from expertd._base import timeout_ms
from expertd._plan import Plan, PreparedRequest, prepare
from expertd._standing import part_of
from expertd._transport_aio import AwaitedStanding
from expertd.errors import ExpertdError, TimeoutError
from expertd.types import ArrayT, ForwardRequest, ForwardResult

if TYPE_CHECKING:
    from expertd.aio import AsyncClient

__all__ = ["AsyncPreparedForward"]


class AsyncPreparedForward(Generic[ArrayT]):
    """One forward on the same arrays, over and over: see `AsyncClient.prepare`, which makes it.

    What `PreparedForward` is to `Client`. `run` it in one task at a time where it has an `out`, which they would share.
    """

    def __init__(self, client: AsyncClient, request: ForwardRequest[ArrayT]) -> None:
        """See `AsyncClient.prepare`, which calls `stand` next."""
        self._client = client
        self._request: ForwardRequest[ArrayT] = request
        self.timeout_s = client._timeout_s(request.timeout_s)
        """What each call allows, retries included."""
        self.checked: PreparedRequest = prepare(request)
        """The request as it was first."""
        self._is_view = self.checked.is_view_of(request)
        self._standing: AwaitedStanding | None = None

    def stand(self, plan: Plan) -> None:
        """Have it in place, where all arrays lie in a stream's memory. plan: of what was checked."""
        part, transport = part_of(plan), self._client._transport
        if part is not None and self._is_view and transport is not None:
            self._standing = transport.stand(part, timeout_ms(self.timeout_s))

    async def run(self) -> ForwardResult[ArrayT]:
        """Make the call. Raises ExpertdError: see `expertd.errors`."""
        client, standing = self._client, self._standing
        prepared = self.checked if self._is_view else None
        if standing is None:
            return await client._forward(self._request, prepared)
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        scope = asyncio.timeout_at(deadline)
        try:
            async with scope:
                async with client._places:
                    is_sent = standing.on.send_standing(standing)
                    answer = await standing.on.settle_standing(standing) if is_sent else None
                if answer is not None:
                    result = standing.result_of(answer)
                    if not isinstance(result, ExpertdError):
                        return result
                    resumed = client._resume(standing.plan(), deadline, result)
                    del answer, result  # which will know this frame: leave no cycle, it would keep the caller's arrays
                    return await resumed
        except builtins.TimeoutError as error:
            self._standing = None
            if scope.expired():
                raise TimeoutError(f"no answer within {self.timeout_s:g} s") from error
            raise
        except asyncio.CancelledError:
            self._standing = None
            raise
        finally:
            del scope  # it knows the task, which may end with an error that knows this frame: leave no cycle
        self._standing = self._stand_again(standing)
        return await client._forward(self._request, prepared, deadline)

    def _stand_again(self, standing: AwaitedStanding) -> AwaitedStanding | None:
        """In place of one that was not sent; None where there will be none any more."""
        if standing.settled is not None:  # another task has it on the wire
            return standing
        transport = self._client._transport
        again = None if transport is None else transport.stand(standing.part, timeout_ms(self.timeout_s))
        if again is None and standing.on.is_open and standing.memory.holds(standing.part.encode()):
            return standing
        return again
