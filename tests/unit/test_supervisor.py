"""What the supervisor does when the system has nothing left to give; real processes: see test_processes."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import pytest

from expertd_server import supervisor as module
from expertd_server.config import Config
from expertd_server.control import Control, Hangs, Ping, Pong
from expertd_server.errors import ConfigError
from expertd_server.supervisor import Supervisor


class FakePopen:
    """A process that has ended, with this exit code."""

    pid = 1

    def __init__(self, code: int) -> None:
        self._code = code
        self.was_killed = False

    def wait(self, _timeout_s: float | None = None) -> int:
        return self._code

    def kill(self) -> None:
        self.was_killed = True


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    one = Supervisor(Config(synthetic="tiny", frontends=1, ready_file=tmp_path / "ready"))
    yield one
    one._mailbox_in.close()
    one._mailbox_out.close()
    os.close(one._wake_fd)


def give_engine(supervisor: Supervisor, popen: FakePopen) -> Control:
    """Let an engine live that has served; returns its end of the conversation."""
    mine, theirs = socket.socketpair()
    engine = supervisor._engine
    engine.popen, engine.control, engine.has_started = popen, Control(mine), True  # type: ignore[assignment]
    engine.started_s = monotonic()
    supervisor._metrics.started(engine.name)
    return Control(theirs)


def test_a_process_that_cannot_be_started_again_is_tried_later_and_leaves_nothing_open(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise BlockingIOError("no processes left")

    monkeypatch.setattr(module, "start_child", fail)
    engine = supervisor._engine
    before = len(os.listdir("/proc/self/fd"))
    for expected_pause_s in (0.5, 1.0, 2.0):
        engine.start_at_s = 0.0
        supervisor._step()
        assert engine.popen is None
        assert engine.start_at_s > 0
        assert engine.pause_s == expected_pause_s
    assert len(os.listdir("/proc/self/fd")) == before
    assert supervisor._exit_code is None
    assert "cannot start engine: no processes left" in caplog.text
    assert supervisor._metrics.engine_restarts._value.get() == 0


def test_a_ready_file_that_cannot_be_written_is_tried_again(
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready_file = supervisor._config.ready_file
    assert ready_file is not None
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError("no space left")

        patch.setattr(module, "write_ready_file", fail)
        supervisor._set_ready(True)
    assert "no space left" in caplog.text
    assert capsys.readouterr().out == ""
    supervisor._set_ready(True)
    assert ready_file.read_text() == capsys.readouterr().out
    supervisor._set_ready(False)
    assert not ready_file.exists()


@pytest.mark.parametrize("code", [1, 2, -9])
def test_an_engine_that_has_served_is_started_again_whatever_it_ended_with(supervisor: Supervisor, code: int) -> None:
    give_engine(supervisor, FakePopen(code)).close()
    supervisor._engine.is_serving = True
    supervisor._hear(supervisor._engine)
    assert supervisor._exit_code is None
    assert supervisor._engine.start_at_s is not None
    assert not supervisor._engine.is_serving, "the server is not ready until the next one is"


def test_an_engine_that_hangs_is_killed_counted_and_started_again(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    popen = FakePopen(-9)
    engine = give_engine(supervisor, popen)
    engine.send(Hangs("layer 'a'"))
    supervisor._hear(supervisor._engine)
    assert popen.was_killed
    assert supervisor._engine.start_at_s is not None
    assert supervisor._metrics.engine_hangs._value.get() == 1
    assert "engine is killed: layer 'a'" in caplog.text
    engine.close()


class TestEngineThatStandsStill:
    """Its watchdog with it, as where a call into a driver that never returns holds the interpreter."""

    @pytest.fixture
    def popen(self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePopen]:
        self.now_s = supervisor._looked_s
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        popen = FakePopen(-9)
        self.control = give_engine(supervisor, popen)
        supervisor._engine.is_serving = True
        yield popen
        self.control.close()
        if supervisor._engine.control is not None:
            supervisor._engine.control.close()

    def look(self, supervisor: Supervisor, times: int, pause_s: float = 1.0) -> None:
        for _ in range(times):
            self.now_s += pause_s
            supervisor._look_after_engine()

    def test_is_killed_counted_and_started_again(
        self, supervisor: Supervisor, popen: FakePopen, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.look(supervisor, 60)
        assert not popen.was_killed
        self.look(supervisor, 1)
        assert popen.was_killed
        assert supervisor._engine.start_at_s is not None
        assert supervisor._metrics.engine_hangs._value.get() == 1
        assert "engine is killed: it stands still, and has said nothing for 60.0 s" in caplog.text
        assert self.control.receive() == Ping()
        with pytest.raises(EOFError):  # it was asked once
            self.control.receive()

    def test_lives_as_long_as_it_answers(self, supervisor: Supervisor, popen: FakePopen) -> None:
        for _ in range(3):
            self.look(supervisor, 59)
            assert self.control.receive() == Ping()
            self.control.send(Pong())
            supervisor._hear(supervisor._engine)
        assert not popen.was_killed

    def test_is_not_to_blame_where_the_server_stood_still(self, supervisor: Supervisor, popen: FakePopen) -> None:
        self.look(supervisor, 10, pause_s=600.0)
        assert not popen.was_killed

    def test_may_load_as_long_as_it_takes(self, supervisor: Supervisor, popen: FakePopen) -> None:
        supervisor._engine.is_serving = False
        self.look(supervisor, 1000)
        assert not popen.was_killed


def test_a_process_that_does_not_end_when_killed_holds_nobody_up(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    class Unkillable(FakePopen):
        def wait(self, timeout_s: float | None = None) -> int:
            assert timeout_s is not None, "no wait is without end"
            raise subprocess.TimeoutExpired("engine", timeout_s)

    popen = Unkillable(0)
    give_engine(supervisor, popen).close()
    supervisor._hear(supervisor._engine)
    assert popen.was_killed
    assert supervisor._engine.start_at_s is not None
    assert "is left behind" in caplog.text


def test_a_process_that_talks_nonsense_is_killed_and_started_again(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    popen = FakePopen(-9)
    engine = give_engine(supervisor, popen)
    engine._socket.sendall((3).to_bytes(8, "little") + b"abc")
    supervisor._hear(supervisor._engine)
    assert popen.was_killed
    assert supervisor._engine.start_at_s is not None
    assert "cannot make sense of engine" in caplog.text
    engine.close()


class TestPort:
    def test_a_free_one_is_looked_for_again_where_somebody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With SO_REUSEPORT the system gives ports that others of this user listen on; a bound one stands for it."""
        bind_alone = module._bind_alone
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken: int = other.getsockname()[1]
            given = iter([taken, taken, 0])
            monkeypatch.setattr(module, "_bind_alone", lambda host, _port: bind_alone(host, next(given)))
            with module._reserve_port("127.0.0.1", 0) as held:
                assert held.getsockname()[1] != taken

    def test_one_that_was_asked_for_is_not(self) -> None:
        with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
            taken: int = other.getsockname()[1]
            with pytest.raises(ConfigError, match=f"127.0.0.1:{taken}: .*; is the port in use"):
                module._reserve_port("127.0.0.1", taken)
