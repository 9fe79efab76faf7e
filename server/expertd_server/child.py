"""A process of a server that has several, from first line to last: `python -m expertd_server.child NAME FD FD FD`.

The supervisor starts it and tells it what to be. Signals are the supervisor's business: a child ends when it is told
to, or when the supervisor is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from expertd_server.control import Collect, Collected, Control, Draining, Hangs, Ping, Pong, Serving, Start, Stop
from expertd_server.exits import end_with
from expertd_server.garbage import look_rarely
from expertd_server.logs import configure_logging

__all__ = ["ENGINE", "Child", "start_child"]

log = logging.getLogger(__name__)

ENGINE: Final = "engine"

# The thread looks up this often; nothing else depends on it.
_LOOK_UP_S: Final = 1.0
# The mailbox is full only while no engine process lives, and has room again when one does.
_MAILBOX_TIMEOUT_S: Final = 5.0


def start_child(name: str, control: socket.socket, mailbox: socket.socket, port_file: int) -> subprocess.Popen[bytes]:
    """Start a child. name: ENGINE, or any other of a front-end; control: its end of the connection; port_file: see
    `PortShare`.

    It finds modules where this process does, and no file of the current directory takes the place of one.
    """
    fds = control.fileno(), mailbox.fileno(), port_file
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "expertd_server.child", name, *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


class Child:
    """A child's side of what it and the supervisor have to say to each other."""

    def __init__(self, name: str, control: Control, mailbox: socket.socket, port_file: int, start: Start) -> None:
        self.name = name
        self.mailbox = mailbox
        self.port_file = port_file
        self.config, self.port, self.instance_id = start.config, start.port, start.instance_id
        self.is_draining = start.is_draining
        """Whether the server was told to drain before this process was started."""
        self.stop_requested = threading.Event()
        self._control = control

    def listen(self, collect: Callable[[], list[Any]]) -> None:
        """Obey the supervisor from now on. collect: gives the metrics' families."""
        threading.Thread(target=self._listen, args=(collect,), name="expertd-child", daemon=True).start()

    def tell(self, *, is_serving: bool, summary: str = "", admin_port: int | None = None) -> None:
        """Tell the supervisor whether this process answers requests."""
        self._control.send(Serving(is_serving, summary, admin_port))

    def tell_of_hang(self, what: str) -> None:
        """Ask the supervisor to kill this process, which hangs."""
        self._control.send(Hangs(what))

    def tell_draining(self) -> None:
        """Tell the supervisor that the server drains, for the processes that it starts from now on."""
        self._control.send(Draining())

    def _listen(self, collect: Callable[[], list[Any]]) -> None:
        while not self.stop_requested.is_set():
            if not self._control.wait(_LOOK_UP_S):
                continue
            try:
                message = self._control.receive()
            except EOFError:  # the supervisor is gone
                message = Stop()
            match message:
                case Stop():
                    self.stop_requested.set()
                case Collect(number):
                    self._send_metrics(number, collect)
                case Ping():
                    self._control.send(Pong())

    def _send_metrics(self, number: int, collect: Callable[[], list[Any]]) -> None:
        try:
            self._control.send(Collected(number, collect()))
        except Exception:  # this thread must hear the supervisor's next word, whatever the metrics are up to
            log.exception("cannot collect metrics")
            self._control.send(Collected(number, []))


class _Role(Protocol):
    def __call__(self, child: Child) -> int: ...


def _main() -> int:
    name, (control_fd, mailbox_fd, port_file) = sys.argv[1], map(int, sys.argv[2:5])
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    control = Control(socket.socket(fileno=control_fd))
    mailbox = socket.socket(fileno=mailbox_fd)
    mailbox.settimeout(_MAILBOX_TIMEOUT_S)
    start = control.receive()
    configure_logging(start.config.log_level, start.config.log_format, name)
    role: _Role
    if name == ENGINE:
        from expertd_server.engine_process import run_engine as role  # noqa: PLC0415
    else:
        from expertd_server.frontend import run_frontend as role  # noqa: PLC0415
    look_rarely()
    return role(Child(name, control, mailbox, port_file, start))


if __name__ == "__main__":
    end_with(_main)
