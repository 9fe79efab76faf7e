"""Asking a resolver that may hang or fail, without hanging or failing with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from expertd.errors import TopologyError, UnavailableError
from expertd.topology import Resolver

__all__ = ["Lookup"]

logger = logging.getLogger("expertd.group")


class Lookup:
    """What the targets of a group stand for, asked in a thread of its own, one question at a time.

    A name server that says nothing holds up `getaddrinfo` for as long as it likes. Whoever asks waits for `patience_s`
    at most and goes on with the addresses that are known; the answer is taken when it has come. Used by one thread.
    """

    def __init__(self, resolver: Resolver, *, first_patience_s: float, patience_s: float) -> None:
        """first_patience_s: how long to wait while no address is known. patience_s: how long afterwards."""
        self.trouble = ""
        """Why the addresses are those known from before; empty when they are what the resolver said last."""
        self._resolver = resolver
        self._first_patience_s = first_patience_s
        self._patience_s = patience_s
        self._asked: Future[None] | None = None
        """Done when the resolver has answered."""
        self._answer: Sequence[str] | Exception = ()
        """Written by the thread before `_asked` is done, read afterwards."""
        self._known: Sequence[str] | None = None
        self._is_overdue = False

    @property
    def patience_s(self) -> float:
        """How long to wait for what `ask` returns before `take`: not again for an answer that is overdue already."""
        if self._known is None:
            return self._first_patience_s
        return 0.0 if self._is_overdue else self._patience_s

    def ask(self) -> Future[None]:
        """Ask the resolver, unless it is being asked still. The future is done when there is an answer, of any kind."""
        if self._asked is None:
            self._asked = Future()
            self._asked.set_running_or_notify_cancel()  # nobody can cancel it any more
            # NOTE: a daemon, and no executor's thread: those are waited for when the process ends.
            threading.Thread(target=self._resolve, args=(self._asked,), name="expertd-resolver", daemon=True).start()
        return self._asked

    def take(self) -> Sequence[str]:
        """The addresses: those of the answer; without one, and when it is an error, those known from before.

        While none are known, raises what the resolver raised, or UnavailableError when it does not answer.
        """
        if self._asked is not None and self._asked.done():
            answer, self._answer = self._answer, ()
            self._asked = None
            self._is_overdue = False
            if not isinstance(answer, Exception):
                self._known, self.trouble = answer, ""
                return answer
            if self._known is None:
                raise answer
            self._go_on(str(answer) or repr(answer), answer)
            return self._known
        if self._known is None:
            raise UnavailableError(
                f"the targets were not resolved within {self._first_patience_s:g} s; look whether the name server, or "
                f"whatever else resolves them, answers"
            )
        self._is_overdue = True
        self._go_on(f"no answer within {self._patience_s:g} s")
        return self._known

    def _go_on(self, trouble: str, error: Exception | None = None) -> None:
        if not self.trouble:
            # Of a resolver of the caller's own, or a mistake of ours, it must be seen where it comes from.
            is_strange = error is not None and not isinstance(error, OSError | TopologyError)
            logger.warning(
                "the targets cannot be resolved, going on with the addresses known: %s",
                trouble,
                exc_info=error if is_strange else None,
            )
        self.trouble = trouble

    def _resolve(self, asked: Future[None]) -> None:
        try:
            self._answer = list(self._resolver.resolve())
        except Exception as error:
            self._answer = error
        asked.set_result(None)
