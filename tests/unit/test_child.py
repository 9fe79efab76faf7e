"""A child's side of the conversation with the supervisor."""

from __future__ import annotations

import socket

import pytest

from expertd_server.child import Child
from expertd_server.config import Config
from expertd_server.control import Collect, Collected, Control, Ping, Pong, Start, Stop

PATIENCE_S = 30.0


def test_a_child_says_that_it_is_there() -> None:
    mine, theirs = socket.socketpair()
    supervisor = Control(mine)
    child = Child("engine", Control(theirs), mine, -1, Start(Config(synthetic="tiny"), 1, "it", is_draining=False))
    child.listen(list)
    for _ in range(2):
        supervisor.send(Ping())
        assert supervisor.wait(PATIENCE_S)
        assert supervisor.receive() == Pong()
    supervisor.send(Stop())
    assert child.stop_requested.wait(PATIENCE_S)
    supervisor.close()
    theirs.close()


def test_metrics_that_fail_leave_a_child_that_listens(caplog: pytest.LogCaptureFixture) -> None:
    mine, theirs = socket.socketpair()
    supervisor = Control(mine)
    start = Start(Config(synthetic="tiny"), 1, "an-instance", is_draining=False)
    child = Child("engine", Control(theirs), mine, -1, start)
    answers = iter([RuntimeError("changed size during iteration"), ["a family"]])

    def collect() -> list[str]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    child.listen(collect)
    for number, families in ((1, []), (2, ["a family"])):
        supervisor.send(Collect(number))
        assert supervisor.wait(PATIENCE_S)
        assert supervisor.receive() == Collected(number, families)
    assert "changed size during iteration" in caplog.text
    supervisor.send(Stop())
    assert child.stop_requested.wait(PATIENCE_S)
    supervisor.close()
    theirs.close()
