"""A front-end process: speaks gRPC and computes nothing."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace

from expertd_server import __version__, message_memory, remote_codec
from expertd_server.child import Child
from expertd_server.config import Config
from expertd_server.event_loop import EventLoop
from expertd_server.exits import EXIT_CUT_OFF
from expertd_server.listener import Listener
from expertd_server.metrics import Metrics
from expertd_server.port_sharing import PortShare
from expertd_server.remote import EngineState, RemoteEngine
from expertd_server.remote_layer import RemoteLayer
from expertd_server.service import ServerFacts
from expertd_server.store import LayerStore
from expertd_server.threads import core_of

__all__ = ["Frontend", "run_frontend"]

log = logging.getLogger(__name__)


class Frontend:
    """What a front-end process holds. mailbox: see `RemoteEngine`. on_serving: told whether requests are answered.

    is_draining: whether the server was told to drain before this process was started. port_share: see `Listener`.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        mailbox: socket.socket,
        instance_id: str,
        on_serving: Callable[[bool], None] = lambda _: None,
        *,
        is_draining: bool = False,
        port_share: PortShare | None = None,
    ) -> None:
        self._config = config
        self._on_serving = on_serving
        self._is_draining = is_draining
        """For good."""
        self._is_drained: bool | None = None
        """What `shutdown` returned; None before."""
        self._known: set[str] = set()
        """Names of layers that health has heard of."""
        self.metrics = Metrics()
        self.store: LayerStore[RemoteLayer] = LayerStore()
        self._loop = EventLoop.acquire()
        if config.grpc_on_one_core:
            self._loop.stay_on(core_of(number_of(name)))
        self.engine = RemoteEngine(
            name,
            mailbox,
            arena_bytes=config.frontend_arena_bytes,
            max_requests=config.max_frontend_requests,
            on_state=self._apply,
            loop=self._loop,
        )
        facts = ServerFacts(
            server_version=__version__,
            backend="",
            device="",
            max_queue_tokens=config.max_queue_tokens,
            instance_id=instance_id,
        )
        self._listener = Listener(
            config,
            store=self.store,
            engine=self.engine,
            codec=remote_codec,
            metrics=self.metrics,
            facts=facts,
            shares_port=True,
            port_share=port_share,
            map_file=self.engine.regions.map_file,
        )

    def share_messages(self) -> None:
        """Have large messages of this process lie where the engine reads and writes them, for good."""
        fd = message_memory.make_file()
        try:
            message_memory.use(self.engine.regions.map_file(fd, message_memory.MESSAGE_MEMORY_BYTES))
        finally:
            os.close(fd)

    def start(self, port: int) -> int:
        """Listen, and look for an engine; returns the port. Raises ConfigError."""
        port = self._listener.bind(port)
        self._listener.start()
        self._apply(None)  # before the engine, in whose thread the next word is said
        self.engine.start()
        return port

    def shutdown(self) -> bool:
        """See `Listener.shutdown`."""
        if self._is_drained is None:
            self._is_drained = self._listener.shutdown(self.engine, self._config.shutdown_grace_s)
            self._loop.release()
        return self._is_drained

    def _apply(self, state: EngineState | None) -> None:
        """Serve what the engine holds; None: it is gone."""
        listener = self._listener
        self._is_draining |= state is not None and state.is_draining
        is_serving = state is not None and not state.is_loading and not self._is_draining
        if not is_serving:
            listener.set_serving(False)
        layers = [] if state is None else [(one, one.is_current) for one in state.layers]
        self.store.replace(layers, is_loading=state is None or state.is_loading)
        if self._is_draining:
            listener.begin_drain()
            self.engine.drain(0)
        held = set() if state is None else {one.name for one in state.layers}
        for name in self._known | held:
            listener.set_layer_serving(name, name in held and not self.store.is_loading)
        self._known |= held
        if state is not None:
            listener.service.facts = replace(listener.service.facts, backend=state.backend, device=state.device)
        if is_serving:
            listener.set_serving(True)
            log.info("serving %d layers", len(self.store.layers()))
        self._on_serving(is_serving)


def number_of(name: str) -> int:
    """That of the front-end with a name."""
    return int(name.rpartition("-")[2])


def run_frontend(child: Child) -> int:
    """Serve until the supervisor says stop; returns the exit code. Raises ConfigError."""
    frontend = Frontend(
        child.config,
        child.name,
        child.mailbox,
        child.instance_id,
        lambda serving: child.tell(is_serving=serving),
        is_draining=child.is_draining,
        port_share=PortShare(child.port_file, number_of(child.name), child.config.frontends),
    )
    frontend.share_messages()
    child.listen(lambda: list(frontend.metrics.registry.collect()))
    frontend.start(child.port)
    child.stop_requested.wait()
    return 0 if frontend.shutdown() else EXIT_CUT_OFF
