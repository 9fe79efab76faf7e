"""A server of several processes: starts the engine's and the front-ends, starts again what dies, ends them all.

This process imports neither gRPC nor torch, holds no request, and has one thread besides those that answer Prometheus.
Every other is a fresh interpreter with two files: a control connection to this one, and the mailbox, through which
front-ends find whichever engine process lives.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import signal
import socket
import subprocess
import time
import uuid
from types import FrameType
from typing import Final

from expertd_server.child import ENGINE, start_child
from expertd_server.config import Config
from expertd_server.control import Collect, Collected, Control, Draining, Hangs, Ping, Pong, Serving, Start, Stop
from expertd_server.errors import ConfigError
from expertd_server.exits import EXIT_CUT_OFF, EXIT_FAILED
from expertd_server.host_memory import available_memory_bytes
from expertd_server.metrics_endpoint import MetricsEndpoint
from expertd_server.port_sharing import make_port_file
from expertd_server.ready import clear_ready_file, target_of, write_ready_file
from expertd_server.ring import shared_bytes
from expertd_server.server_metrics import ServerMetrics

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

# What died is started again at once; when it dies soon after, after a pause, which doubles each time.
_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0
_SOON_S: Final = 60.0
# What processes may take to close down beyond the grace that they give to requests.
_CLOSE_S: Final = 5.0
# The loop looks up this often, and whether the engine answers.
_LOOK_UP_S: Final = 1.0
_PORT_ATTEMPTS: Final = 8


class _Process:
    """An engine or a front-end, whichever incarnation of it lives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_engine = name == ENGINE
        self.popen: subprocess.Popen[bytes] | None = None
        """None: none lives."""
        self.control: Control | None = None
        self.has_started = False
        """Whether any incarnation got as far as it must before it is worth starting another."""
        self.is_serving = False
        self.is_asked = False
        """Whether it is to say that it is there, and has not yet."""
        self.silent_s = 0.0
        """For how long."""
        self.started_s = 0.0
        self.pause_s = 0.0
        self.start_at_s: float | None = None
        """When the next one is due."""

    @property
    def pid(self) -> int | None:
        return None if self.popen is None else self.popen.pid


class Supervisor:
    """Runs a server with front-ends."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._instance_id = uuid.uuid4().hex
        self._engine = _Process(ENGINE)
        self._frontends = [_Process(f"frontend-{number}") for number in range(config.frontends)]
        self._processes = [self._engine, *self._frontends]
        self._mailbox_in, self._mailbox_out = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._port_file = make_port_file(config.frontends)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signals: list[int] = []
        self._looked_s = time.monotonic()
        """When it was last seen to that the engine answers."""
        self._metrics = ServerMetrics(self._ask_for_metrics)
        self._metrics_port: int | None = None
        self._port = 0
        self._summary = ""
        self._admin_port: int | None = None
        self._was_ready = self._is_ready = False
        self._exit_code: int | None = None
        """Set when the server ends."""
        self._stop_by_s = 0.0
        self._engine_was_told = False
        self._is_draining = False
        """Told by an engine; every process that is started later learns it."""

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit code. Raises ConfigError."""
        config = self._config
        _check_memory(config)
        if config.ready_file is not None:
            clear_ready_file(config.ready_file)
        # Held while the server lives, so that no other program is given the port while a front-end is started again.
        with _reserve_port(config.host, config.port) as held:
            self._port = held.getsockname()[1]
            endpoint = None
            if config.metrics_port is not None:
                endpoint = MetricsEndpoint(self._metrics.registry, config.host, config.metrics_port)
                self._metrics_port = endpoint.port
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)
            try:
                for process in self._processes:
                    self._start(process)
                while self._exit_code is None or any(process.popen for process in self._processes):
                    self._step()
            finally:
                self._kill_all()
                self._set_ready(False)
                if endpoint is not None:
                    endpoint.close()
        log.info("stopped")
        return self._exit_code

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """The first ends the server gracefully, the second at once."""
        if self._signals:
            self._kill_all()
            os._exit(128 + signum)
        self._signals.append(signum)
        os.eventfd_write(self._wake_fd, 1)

    def _start(self, process: _Process) -> None:
        mine, theirs = socket.socketpair()
        mailbox = self._mailbox_out if process.is_engine else self._mailbox_in
        with theirs:
            try:
                process.popen = start_child(process.name, theirs, mailbox, self._port_file)
            except OSError:
                mine.close()
                raise
        process.control = Control(mine)
        process.started_s, process.start_at_s = time.monotonic(), None
        process.is_asked, process.silent_s = False, 0.0
        process.control.send(Start(self._config, self._port, self._instance_id, self._is_draining))
        self._metrics.started(process.name)
        log.info("%s is process %d", process.name, process.popen.pid)

    def _step(self) -> None:
        """Wait for something to happen, and deal with it."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        by_fd = {process.control.fileno(): process for process in self._processes if process.control is not None}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(self._pause_s() * 1000):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            else:
                self._hear(by_fd[fd])
        if self._signals and self._exit_code is None:
            log.info("draining")
            self._stop(0)
        if self._exit_code is not None:
            self._go_on_stopping()
            return
        self._look_after_engine()
        for process in self._processes:
            if process.start_at_s is not None and process.start_at_s <= time.monotonic():
                self._start_again(process)
        self._set_ready(all(process.is_serving for process in self._processes))

    def _start_again(self, process: _Process) -> None:
        try:
            self._start(process)
        except OSError as error:  # no memory, files or processes left, for now: the others serve on
            log.error("cannot start %s: %s; it is tried again in %.1f s", process.name, error, process.pause_s)
            self._start_later(process)
            return
        counter = self._metrics.engine_restarts if process.is_engine else self._metrics.frontend_restarts
        counter.inc()

    def _start_later(self, process: _Process) -> None:
        process.start_at_s = time.monotonic() + process.pause_s
        process.pause_s = min(max(_FIRST_PAUSE_S, 2 * process.pause_s), _MAX_PAUSE_S)

    def _pause_s(self) -> float:
        due_s = [process.start_at_s for process in self._processes if process.start_at_s is not None]
        return max(0.0, min([*(at_s - time.monotonic() for at_s in due_s), _LOOK_UP_S]))

    def _hear(self, process: _Process) -> None:
        assert process.control is not None
        try:
            message = process.control.receive()
        except EOFError:
            self._ended(process)
            return
        except Exception:  # whatever it meant to say, there is no making sense of what follows either
            log.exception("cannot make sense of %s, which is killed", process.name)
            assert process.popen is not None
            process.popen.kill()
            self._ended(process)
            return
        match message:
            case Serving(is_serving, summary, admin_port):
                process.has_started = True
                process.is_serving = is_serving
                if process.is_engine:
                    self._summary, self._admin_port = summary, admin_port
            case Hangs(what):
                self._kill_hung(process, what)
            case Pong():
                process.is_asked, process.silent_s = False, 0.0
            case Draining():
                self._is_draining = True
            case Collected(number, families):
                self._metrics.received(process.name, number, families)

    def _look_after_engine(self) -> None:
        """Kill an engine that serves and is silent: what hangs may hold the interpreter, which its watchdog needs."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_UP_S:
            return
        # Where the whole server stood still, as in a paused container, the engine is not to blame.
        passed_s, self._looked_s = min(now_s - self._looked_s, 2 * _LOOK_UP_S), now_s
        engine, timeout_s = self._engine, self._config.engine_hang_timeout_s
        if not engine.is_serving or not timeout_s:
            return
        if not engine.is_asked:
            assert engine.control is not None
            engine.is_asked = engine.control.send(Ping())
            return
        engine.silent_s += passed_s
        if engine.silent_s >= timeout_s:
            self._kill_hung(engine, f"it stands still, and has said nothing for {engine.silent_s:.1f} s")

    def _kill_hung(self, process: _Process, what: str) -> None:
        self._metrics.engine_hangs.inc()
        log.critical("%s is killed: %s", process.name, what)
        assert process.popen is not None
        process.popen.kill()
        self._ended(process)

    def _ended(self, process: _Process) -> None:
        assert process.popen is not None
        assert process.control is not None
        try:
            code = process.popen.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:  # it hung up, and does not end
            process.popen.kill()
            code = self._wait_killed(process)
        process.control.close()
        process.control = None
        process.popen = None
        process.is_serving = False
        self._metrics.ended(process.name)
        if self._exit_code is not None:
            if code:
                self._exit_code = self._exit_code or (code if code > 0 else EXIT_FAILED)
            return
        self._set_ready(False)
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        # Later on whatever an engine ends with may pass: other programs share its GPU and its checkpoint's disk.
        if not process.has_started:
            log.error("%s %s and cannot be started", process.name, how)
            self._stop(code if code > 0 else EXIT_FAILED)
        elif process.is_engine and not self._config.engine_restart:
            log.error("%s %s; the server ends with it (engine_restart is off)", process.name, how)
            self._stop(EXIT_FAILED)
        else:
            if time.monotonic() - process.started_s > _SOON_S:
                process.pause_s = 0.0
            log.error("%s %s; it is started again in %.1f s", process.name, how, process.pause_s)
            self._start_later(process)

    def _wait_killed(self, process: _Process) -> int:
        assert process.popen is not None
        try:
            return process.popen.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:  # within the kernel, in a driver
            log.critical("%s (process %d) was killed and does not end; it is left behind", process.name, process.pid)
            return -signal.SIGKILL

    def _stop(self, exit_code: int) -> None:
        """Begin to end the server: first the front-ends, which finish what is in flight, then the engine."""
        self._exit_code = exit_code
        self._stop_by_s = time.monotonic() + self._config.shutdown_grace_s + _CLOSE_S
        self._set_ready(False)
        for process in self._processes:
            process.start_at_s = None
        for process in self._frontends:
            if process.control is not None:
                process.control.send(Stop())

    def _go_on_stopping(self) -> None:
        if not self._engine_was_told and not any(process.popen for process in self._frontends):
            self._engine_was_told = True
            if self._engine.control is not None:
                self._engine.control.send(Stop())
        if time.monotonic() > self._stop_by_s:
            log.error("some processes do not end, and are killed")
            self._kill_all()
            self._exit_code = self._exit_code or EXIT_CUT_OFF
            self._stop_by_s = float("inf")

    def _kill_all(self) -> None:
        for process in self._processes:
            if process.popen is not None:
                process.popen.kill()

    def _set_ready(self, is_ready: bool) -> None:
        """Say so in the ready file, and the first time on standard output."""
        if is_ready == self._is_ready:
            return
        ready_file, facts = self._config.ready_file, self._ready_facts()
        if ready_file is not None:
            try:
                if is_ready:
                    write_ready_file(ready_file, facts)
                else:
                    ready_file.unlink(missing_ok=True)
            except OSError as error:
                log.error("the ready file cannot be changed, and is tried again: %s", error)
                return
        self._is_ready = is_ready
        if not is_ready:
            return
        log.info("ready on %s, %d front-ends: %s", facts["address"], len(self._frontends), self._summary)
        if not self._was_ready:
            print(json.dumps(facts), flush=True)
        self._was_ready = True

    def _ready_facts(self) -> dict[str, object]:
        """What `Server.ready_facts` says, and which processes there are."""
        return {
            "address": target_of(self._config.host, self._port),
            "port": self._port,
            "metrics_port": self._metrics_port,
            "admin_port": self._admin_port,
            "pid": os.getpid(),
            "instance_id": self._instance_id,
            "engine_pid": self._engine.pid,
            "frontend_pids": [process.pid for process in self._frontends],
        }

    def _ask_for_metrics(self, number: int) -> list[str]:
        """Called by a thread of the metrics endpoint."""
        asked = []
        for process in self._processes:
            control = process.control
            if control is not None and control.send(Collect(number)):
                asked.append(process.name)
        return asked


def _check_memory(config: Config) -> None:
    """Raise ConfigError when the memory that front-ends share with the engine is more than there is."""
    needed = config.frontends * shared_bytes(config.frontend_arena_bytes, config.max_frontend_requests)
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"{config.frontends} front-ends may share {needed} bytes of memory with the engine, but {available} are "
            f"available; have fewer of them (frontends) or give each less (frontend_arena_bytes, which needs "
            f"max_message_bytes and some)"
        )


def _reserve_port(host: str, port: int) -> socket.socket:
    """A socket that holds a port (0: any free one) for processes that listen there with SO_REUSEPORT.

    It does not listen itself, so it gets no connection. Raises ConfigError where somebody else listens there.
    """
    # Of ports that are free for SO_REUSEPORT, the system may give one where a server of the same user listens with it.
    attempts_left = 1 if port else _PORT_ATTEMPTS
    while True:
        attempts_left -= 1
        try:
            return _bind_alone(host, port)
        except OSError as error:
            if not attempts_left or error.errno != errno.EADDRINUSE:
                hint = "is it an address of this machine, and a port for this user?"
                if error.errno == errno.EADDRINUSE:
                    hint = "is the port in use?"
                raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; {hint}") from error


def _bind_alone(host: str, port: int) -> socket.socket:
    """See `_reserve_port`. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    held = socket.socket(family, kind, protocol)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
        # Another server with SO_REUSEPORT would share its calls with this one. Without, it is in the way.
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(held.getsockname())
    except OSError:
        held.close()
        raise
    return held
