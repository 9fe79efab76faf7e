"""The port for orders: a listener and threads of its own, so that a server that is full still takes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc

from expertd_server.admin import ADMIN_SERVICE_NAME, AdminService
from expertd_server.config import Config
from expertd_server.interceptor import ServiceInterceptor
from expertd_server.listen import bind
from expertd_server.metrics import Metrics

__all__ = ["AdminEndpoint"]

# One load, one unload, one drain that waits, and one order that takes no time.
_NUM_CALLS = 4
_CLOSE_S = 1.0


class AdminEndpoint:
    """Answers `service` on admin_host and admin_port; `port` has the real number. Raises ConfigError."""

    def __init__(self, config: Config, service: AdminService, metrics: Metrics) -> None:
        self._pool = ThreadPoolExecutor(_NUM_CALLS, thread_name_prefix="expertd-admin")
        self._grpc = grpc.server(
            self._pool,
            interceptors=[ServiceInterceptor(ADMIN_SERVICE_NAME, metrics)],
            maximum_concurrent_rpcs=_NUM_CALLS,
            options=[("grpc.so_reuseport", 0)],
        )
        self._grpc.add_generic_rpc_handlers((service.handler(),))
        own_authority = config.admin_client_ca_file is not None
        self.port = bind(
            self._grpc,
            config,
            config.admin_host,
            config.admin_port,
            client_ca_option="admin_client_ca_file" if own_authority else "tls_client_ca_file",
        )
        self._grpc.start()

    def close(self) -> None:
        """Stop answering. A load that runs ends at the next expert."""
        self._grpc.stop(0).wait(_CLOSE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
