"""Metrics over HTTP."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, start_http_server

from expertd_server.errors import ConfigError
from expertd_server.threads import ended

__all__ = ["MetricsEndpoint"]

# Whoever connects and says nothing for so long, or reads nothing, is left: each has a thread and a file here.
_PATIENCE_S: Final = 10.0


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_S

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each scrape is noise."""


class MetricsEndpoint:
    """A registry at /metrics. port 0: any free one; `port` has the real number. Raises ConfigError."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(f"metrics_port {port} on {host}: {error}") from error
        self._server.RequestHandlerClass = _Handler
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop answering."""
        closer = threading.Thread(target=self._close, name="expertd-metrics-close", daemon=True)
        closer.start()
        ended(closer)

    def _close(self) -> None:
        self._server.shutdown()  # waits without a limit for the thread that listens
        self._server.server_close()
        self._thread.join()
