"""The engine's process: holds the layers and computes what front-ends send; speaks no gRPC."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable

from expertd_server.admin_endpoint import AdminEndpoint
from expertd_server.backend import Backend
from expertd_server.child import Child
from expertd_server.config import Config
from expertd_server.engine_host import EngineHost
from expertd_server.exits import EXIT_CUT_OFF, EXIT_FAILED
from expertd_server.gate import EngineGate
from expertd_server.layer import MoELayer

__all__ = ["EngineProcess", "run_engine"]

log = logging.getLogger(__name__)

# A front-end that hangs holds up an order this long. When it goes on, it asks for what was current until it has applied
# the change; the gate refuses what is not held any more.
_APPLY_TIMEOUT_S = 1.0
# What is left to a batch that runs on when the grace is over.
_STOP_S = 1.0
# A supervisor that has not killed an engine that hangs by then is gone, or hangs itself.
_KILL_S = 5.0


class EngineProcess:
    """What the engine's process holds. mailbox: see `RemoteEngine`; backend, layers: see `EngineHost`.

    is_draining: whether the server was told to drain before this process was started. on_drain: called when it is.
    on_hang: see `EngineHost`; called when every front-end knows. The process is of no more use then.
    """

    def __init__(
        self,
        config: Config,
        mailbox: socket.socket,
        *,
        backend: Backend | None = None,
        layers: Iterable[MoELayer] | None = None,
        is_draining: bool = False,
        on_drain: Callable[[], object] = lambda: None,
        on_hang: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._config = config
        self._on_drain = on_drain
        self._on_hang = on_hang
        self._admin: AdminEndpoint | None = None
        # Whoever changes what is held may rely on it: front-ends check the next request against the change.
        self.host = EngineHost(
            config,
            backend=backend,
            layers=layers,
            on_change=lambda: self.gate.publish(_APPLY_TIMEOUT_S),
            on_hang=self._leave,
        )
        self.gate = EngineGate(
            self.host.engine,
            self.host.store,
            mailbox,
            backend=self.host.backend.name,
            device=self.host.device_name,
            share=self.host.share,
            max_bundle_tokens=self.host.engine.max_bundle_tokens,
        )
        if is_draining:
            self._drain(0)

    def startup(self, is_stopped: Callable[[], bool]) -> bool:
        """Take front-ends in, and load every layer; False when it was stopped before.

        Raises ConfigError and CheckpointError; call `shutdown` then too.
        """
        self._admin = self.host.admin_endpoint(hold=self.host.hold, forget=self.host.forget, drain=self.drain)
        self.host.start(self.gate)
        self.gate.start()
        return self.host.load(self.host.hold, is_stopped)

    @property
    def admin_port(self) -> int | None:
        """Where orders are taken."""
        return None if self._admin is None else self._admin.port

    def drain(self, timeout_s: float) -> bool:
        """Refuse what is new, here and in the front-ends, and finish what is in flight; whether all of it is."""
        self._on_drain()
        return self._drain(timeout_s)

    def _drain(self, timeout_s: float) -> bool:
        self.gate.begin_drain()
        return self.host.engine.batcher.drain(timeout_s)

    def shutdown(self) -> bool:
        """Drain within shutdown_grace_s, and close. False when something was cut off."""
        if self._admin is not None:
            self._admin.close()
        drained = self._drain(self._config.shutdown_grace_s)
        self.host.engine.batcher.stop(_STOP_S)
        self.host.close()
        self.gate.close()
        log.info("stopped")
        return drained

    def _leave(self, what: str) -> None:
        """Front-ends fail what they have asked for and turn health off, as if this process had ended."""
        self.gate.leave()
        self._on_hang(what)


def run_engine(child: Child) -> int:
    """Compute until the supervisor says stop; returns the exit code. Raises ConfigError and CheckpointError.

    An engine that hangs asks the supervisor to be killed.
    """

    def on_hang(what: str) -> None:
        child.tell_of_hang(what)
        time.sleep(_KILL_S)
        os._exit(EXIT_FAILED)

    engine = EngineProcess(
        child.config,
        child.mailbox,
        is_draining=child.is_draining,
        on_drain=child.tell_draining,
        on_hang=on_hang,
    )
    child.listen(lambda: list(engine.host.metrics.registry.collect()))
    if engine.startup(child.stop_requested.is_set):
        child.tell(is_serving=True, summary=engine.host.summary(), admin_port=engine.admin_port)
        child.stop_requested.wait()
    return 0 if engine.shutdown() else EXIT_CUT_OFF
