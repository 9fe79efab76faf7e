"""Calls of the asynchronous client that are checked once, and made many times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from expertd._plan import PreparedRequest, prepare
from expertd.types import ArrayT, ForwardRequest, ForwardResult

if TYPE_CHECKING:
    from expertd.aio import AsyncClient

__all__ = ["AsyncPreparedForward"]


class AsyncPreparedForward(Generic[ArrayT]):
    """One forward on the same arrays, over and over: see `AsyncClient.prepare`, which makes it.

    Its calls do not share what they write: with an `out` one at a time.
    """

    def __init__(self, client: AsyncClient, request: ForwardRequest[ArrayT]) -> None:
        """See `AsyncClient.prepare`."""
        self._client = client
        self._request: ForwardRequest[ArrayT] = request
        self.checked: PreparedRequest = prepare(request)
        """The request as it was first."""
        self._is_view = self.checked.is_view_of(request)

    async def run(self) -> ForwardResult[ArrayT]:
        """Make the call. Raises ExpertdError: see `expertd.errors`."""
        return await self._client._forward(self._request, self.checked if self._is_view else None)
