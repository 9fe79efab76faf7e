"""Targets that cannot be resolved: a group goes on with what it knows, and looks at its servers all the same."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import wait

import pytest

from expertd import AsyncExpertGroup, ExpertGroup, GroupConfig
from expertd._lookup import Lookup
from expertd.errors import UnavailableError

PATIENCE_S = 30.0
CONFIG = GroupConfig(probe_timeout_s=0.05)


class Hanging:
    """Answers when it is let, and keeps count of who asks."""

    def __init__(self) -> None:
        self.answering = threading.Event()
        self.answering.set()
        self.answer: list[str] | Exception = ["unix:/nowhere/a"]
        self.num_asked = 0

    def resolve(self) -> Sequence[str]:
        self.num_asked += 1
        assert self.answering.wait(PATIENCE_S)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def resolver() -> Iterator[Hanging]:
    hanging = Hanging()
    yield hanging
    hanging.answering.set()


def ask(lookup: Lookup) -> Sequence[str]:
    wait((lookup.ask(),), lookup.patience_s)
    return lookup.take()


def test_what_is_known_stands_until_an_answer_comes_and_one_question_is_open(
    resolver: Hanging, caplog: pytest.LogCaptureFixture
) -> None:
    lookup = Lookup(resolver, first_patience_s=PATIENCE_S, patience_s=0.05)
    assert ask(lookup) == ["unix:/nowhere/a"]
    assert lookup.patience_s == 0.05
    resolver.answering.clear()
    resolver.answer = ["unix:/nowhere/b"]
    with caplog.at_level(logging.WARNING, "expertd.group"):
        for _ in range(3):
            assert ask(lookup) == ["unix:/nowhere/a"]
            assert lookup.patience_s == 0, "it was waited for once"
    assert lookup.trouble == "no answer within 0.05 s"
    assert resolver.num_asked == 2
    assert len(caplog.records) == 1
    resolver.answering.set()
    wait((lookup.ask(),), PATIENCE_S)
    assert lookup.take() == ["unix:/nowhere/b"]
    assert lookup.trouble == ""
    assert lookup.patience_s == 0.05
    assert resolver.num_asked == 2


def test_an_error_leaves_what_is_known_and_is_raised_where_nothing_is(
    resolver: Hanging, caplog: pytest.LogCaptureFixture
) -> None:
    lookup = Lookup(resolver, first_patience_s=PATIENCE_S, patience_s=PATIENCE_S)
    resolver.answer = OSError("no such name")
    with pytest.raises(OSError, match="no such name"):
        ask(lookup)
    resolver.answer = ["unix:/nowhere/a"]
    assert ask(lookup) == ["unix:/nowhere/a"]
    resolver.answer = OSError("no such name")
    with caplog.at_level(logging.WARNING, "expertd.group"):
        for _ in range(2):
            assert ask(lookup) == ["unix:/nowhere/a"]
    assert lookup.trouble == "no such name"
    assert len(caplog.records) == 1


def test_nobody_waits_forever_for_the_first_answer(resolver: Hanging) -> None:
    resolver.answering.clear()
    lookup = Lookup(resolver, first_patience_s=0.01, patience_s=PATIENCE_S)
    with pytest.raises(UnavailableError, match=r"not resolved within 0\.01 s"):
        ask(lookup)


def test_a_group_asks_its_servers_while_the_resolver_hangs(resolver: Hanging) -> None:
    with ExpertGroup(resolver, CONFIG) as group:
        group.refresh(timeout_s=PATIENCE_S)
        resolver.answering.clear()
        for _ in range(3):
            group.refresh(timeout_s=PATIENCE_S)
        # Both are told: that the name server is silent, and what the servers say that were known.
        assert "no answer within 0.05 s" in str(group._refresh_error)
        assert "unix:/nowhere/a" in str(group._refresh_error)


def test_an_asynchronous_group_asks_its_servers_while_the_resolver_hangs(resolver: Hanging) -> None:
    async def look() -> None:
        async with AsyncExpertGroup(resolver, CONFIG) as group:
            await group.refresh(timeout_s=PATIENCE_S)
            resolver.answering.clear()
            for _ in range(3):
                await group.refresh(timeout_s=PATIENCE_S)
            assert "no answer within 0.05 s" in str(group._refresh_error)
            assert "unix:/nowhere/a" in str(group._refresh_error)

    asyncio.run(look())  # which would wait for a thread of the loop's own


def test_a_group_closes_while_its_first_question_is_open(resolver: Hanging) -> None:
    resolver.answering.clear()
    group = ExpertGroup(resolver, GroupConfig(timeout_s=PATIENCE_S))
    with pytest.raises(TimeoutError):
        group.refresh(timeout_s=0.05)
    group.close()
    assert group._refresher is not None
    assert not group._refresher.is_alive()
