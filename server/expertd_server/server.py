"""A whole server in one process: Config -> Server, then startup, serve, shutdown."""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import Final

from expertd_server import __version__, codec
from expertd_server.admin_endpoint import AdminEndpoint
from expertd_server.backend import Backend
from expertd_server.config import Config
from expertd_server.engine_host import EngineHost
from expertd_server.exits import EXIT_CUT_OFF, end_after
from expertd_server.layer import MoELayer
from expertd_server.listener import Listener
from expertd_server.metrics_endpoint import MetricsEndpoint
from expertd_server.ready import clear_ready_file, target_of, write_ready_file
from expertd_server.region_door import map_memory
from expertd_server.server_metrics import engine_hangs
from expertd_server.service import ServerFacts
from expertd_server.threads import core_of

__all__ = ["Server", "stop_on_signals"]

log = logging.getLogger(__name__)

# What this process may take to close down beyond the grace that it gives to requests.
_CLOSE_S: Final = 5.0


class Server:
    """One server process' worth of objects; several may live in one process, as in tests.

    layers: what to serve, in place of what the options name.
    is_alone: whether no other ever will: then its device copies from and to the messages themselves.
    """

    def __init__(
        self,
        config: Config,
        *,
        backend: Backend | None = None,
        layers: Iterable[MoELayer] | None = None,
        is_alone: bool = False,
    ) -> None:
        self.config = config
        self.instance_id = uuid.uuid4().hex
        self._host = EngineHost(config, backend=backend, layers=layers, on_hang=self._on_hang)
        if is_alone:
            self._host.share_messages()
        self.backend, self.metrics = self._host.backend, self._host.metrics
        self.store, self.engine = self._host.store, self._host.engine
        self.port = 0
        """The real port, once started."""
        self.metrics_port: int | None = None
        self._metrics_endpoint: MetricsEndpoint | None = None
        self.admin_port: int | None = None
        self._admin_endpoint: AdminEndpoint | None = None
        self.has_hung = False
        """Whether what computes was found to hang; `serve` then returns, and nothing but an end is left."""
        self._hangs = engine_hangs(self.metrics.registry)
        self._stop_requested = threading.Event()
        self._listener = Listener(
            config,
            store=self.store,
            engine=self.engine,
            codec=codec,
            metrics=self.metrics,
            facts=ServerFacts(
                server_version=__version__,
                backend=self.backend.name,
                device=self._host.device_name,
                max_queue_tokens=config.max_queue_tokens,
                instance_id=self.instance_id,
            ),
            map_file=partial(map_memory, share=self._host.share),
        )
        if config.grpc_on_one_core:
            self._listener.loop.stay_on(core_of(0))

    def startup(self) -> bool:
        """Listen, load every layer, say that it is ready.

        The port is bound first, so that one in use is an error before minutes of loading; until the layers are there,
        health says NOT_SERVING of the server and of every layer, the layers held so far are listed as LOADING, and
        requests get UNAVAILABLE. Raises ConfigError and CheckpointError; call `shutdown`
        then too. False, and not ready, when `stop` was called meanwhile.
        """
        config = self.config
        if config.ready_file is not None:
            clear_ready_file(config.ready_file)
        self.port = self._listener.bind(config.port)
        if config.metrics_port is not None:
            self._metrics_endpoint = MetricsEndpoint(self.metrics.registry, config.host, config.metrics_port)
            self.metrics_port = self._metrics_endpoint.port
        self._admin_endpoint = self._host.admin_endpoint(hold=self._hold, forget=self._forget, drain=self.drain)
        if self._admin_endpoint is not None:
            self.admin_port = self._admin_endpoint.port
        self._host.start(self._listener.loop)
        self._listener.start()
        if not self._host.load(self._hold, self._stop_requested.is_set):
            return False
        for layer in self.store.layers():
            self._listener.set_layer_serving(layer.name, True)
        self._listener.set_serving(True)
        log.info("ready on %s: %s", target_of(config.host, self.port), self._host.summary())
        if config.ready_file is not None:
            write_ready_file(config.ready_file, self.ready_facts())
        return True

    def ready_facts(self) -> dict[str, object]:
        """What a launcher wants to know: address, port, metrics_port, admin_port, pid, instance_id."""
        return {
            "address": target_of(self.config.host, self.port),
            "port": self.port,
            "metrics_port": self.metrics_port,
            "admin_port": self.admin_port,
            "pid": os.getpid(),
            "instance_id": self.instance_id,
        }

    def serve(self) -> None:
        """Wait until `stop` is called."""
        while not self._stop_requested.wait(1.0):
            pass

    def stop(self) -> None:
        """Ask `serve` (or `startup`) to return; safe to call from a signal handler and from any thread."""
        self._stop_requested.set()

    def drain(self, timeout_s: float) -> bool:
        """See `Listener.drain`. The process stays up; there is no way back."""
        log.info("draining: %d requests wait", self.engine.batcher.queue_requests)
        return self._listener.drain(self.engine.batcher, timeout_s)

    def shutdown(self) -> bool:
        """Drain within shutdown_grace_s, then close. False when something was cut off, or hangs."""
        self._stop_requested.set()
        if self._admin_endpoint is not None:
            self._admin_endpoint.close()
        log.info("draining: %d requests wait", self.engine.batcher.queue_requests)
        drained = self._listener.shutdown(self.engine.batcher, self.config.shutdown_grace_s)
        self._host.close()
        if self._metrics_endpoint is not None:
            self._metrics_endpoint.close()
        if self.config.ready_file is not None:
            self.config.ready_file.unlink(missing_ok=True)
        return drained and not self.has_hung

    def _on_hang(self, _what: str) -> None:
        """Say NOT_SERVING, fail every request, and have `serve` return."""
        self.has_hung = True
        self._hangs.inc()
        self._stop_requested.set()
        self.engine.batcher.abandon()
        self._listener.begin_drain()

    def _hold(self, layer: MoELayer) -> None:
        self._host.hold(layer)
        self._listener.set_layer_serving(layer.name, not self.store.is_loading)

    def _forget(self, name: str) -> None:
        self._host.forget(name)
        self._listener.set_layer_serving(name, False)


def stop_on_signals(server: Server) -> None:
    """SIGTERM and SIGINT stop the server gracefully; a second one ends the process at once.

    Whatever it is doing then, loading included, the process does not outlast shutdown_grace_s by more than _CLOSE_S.
    """
    received: list[int] = []

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        end_after(server.config.shutdown_grace_s + _CLOSE_S, EXIT_CUT_OFF)
        server.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
