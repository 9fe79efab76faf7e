"""The gRPC side of a process: its port, its event loop, and the services behind it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertd_server.admin_methods import not_here_handler
from expertd_server.calls import CallEngine, Calls, Codec
from expertd_server.compiled import describe
from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.event_loop import EventLoop
from expertd_server.listen import bind
from expertd_server.metrics import Metrics
from expertd_server.port_sharing import PortShare
from expertd_server.region_door import MapMemory, RegionDoor, map_memory
from expertd_server.service import SERVICE_NAME, ExpertService, ServerFacts
from expertd_server.store import LayerStore

__all__ = ["LIVENESS_SERVICE", "Listener"]

log = logging.getLogger(__name__)

LIVENESS_SERVICE = "live"
"""A name that health says SERVING of for as long as it answers, while the server loads or drains, too."""

# Calls of everything but Forward and ForwardStream, so that a full server still answers health checks.
_SPARE_CALLS = 16
# Longer than it takes the event loop to do what takes no time.
_START_S = 30.0
# What is left to gRPC when every call is over: closing connections.
_CLOSE_S = 1.0


class Drainable(Protocol):
    """What computes the calls, as far as the end of a server is concerned; see `Batcher`."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those admitted; False when some are left after timeout_s."""
        ...

    def stop(self, timeout_s: float) -> bool:
        """Fail what is left and end; False when it has not after timeout_s."""
        ...


class _Health(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """Health of the server and its layers, and of LIVENESS_SERVICE, which nothing but silence denies."""

    async def Check(  # noqa: N802 (the name of the method in the proto)
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service == LIVENESS_SERVICE:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return await super().Check(request, context)


class Listener:
    """ExpertService, health and reflection on one port. Until told otherwise, health says NOT_SERVING.

    codec: between messages and what the engine takes and gives. shares_port: whether other processes of this server
    listen on the same port; port_share: this one's place among them. map_file: maps callers' memory. Call `shutdown` in
    any case; again is of no effect.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: LayerStore[Any],
        engine: CallEngine,
        codec: Codec,
        metrics: Metrics,
        facts: ServerFacts,
        shares_port: bool = False,
        map_file: MapMemory = map_memory,
        port_share: PortShare | None = None,
    ) -> None:
        self._config = config
        self._shares_port = shares_port
        self._metrics = metrics
        self._region_door = _region_door(config, map_file)
        self._port_share = port_share
        self.loop = EventLoop.acquire()
        calls = Calls(
            store=store,
            engine=engine,
            codec=codec,
            metrics=metrics,
            max_batch_tokens=config.max_batch_tokens,
            max_message_bytes=config.max_message_bytes,
            request_timeout_s=config.request_timeout_s,
        )
        self.service = ExpertService(
            calls,
            facts,
            self.loop,
            max_unary_requests=config.max_unary_requests,
            max_streams=config.max_streams,
            max_stream_requests=config.max_stream_requests,
            max_stream_answer_bytes=config.max_stream_answer_bytes,
            region_door=self._region_door,
            max_region_bytes=config.max_region_bytes,
            on_streams=None if port_share is None else port_share.has,
        )
        self._health = _Health()
        self._serving: dict[str, bool] = {}
        self._grpc: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_drained: bool | None = None
        """What `shutdown` returned; None before."""
        self.set_serving(False)

    def bind(self, port: int) -> int:
        """Take a port (0: any free one); returns its number. Raises ConfigError."""
        return self.loop.run(self._bind(port), _START_S)

    def start(self) -> None:
        """Answer calls."""
        assert self._grpc is not None, "bind comes first"
        self.loop.run(self._grpc.start(), _START_S)
        log.info("requests are read by %s", describe())

    def set_serving(self, serving: bool) -> None:
        """What health and the metrics say of the server and of its service."""
        self._metrics.serving.set(int(serving))
        self.set_layer_serving("", serving)
        self.set_layer_serving(SERVICE_NAME, serving)

    def set_layer_serving(self, name: str, serving: bool) -> None:
        """What health says of a layer. Whoever watches it is told of changes alone."""
        if self._serving.get(name) == serving:
            return
        self._serving[name] = serving
        status = health_pb2.HealthCheckResponse
        self._run(self._health.set(name, status.SERVING if serving else status.NOT_SERVING))

    async def _bind(self, port: int) -> int:
        config = self._config
        self._grpc = grpc.aio.server(
            # Beyond what the service refuses by itself, with words.
            maximum_concurrent_rpcs=config.max_streams + config.max_unary_requests + _SPARE_CALLS,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                # Where it is not asked for: a port in use is an error, not a second server that gets half the calls.
                ("grpc.so_reuseport", int(self._shares_port)),
                ("grpc.keepalive_time_ms", 30_000),  # notice callers that vanished without a word
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # However long nothing is said over the connection: the messages of a stream may go through rings.
                ("grpc.http2.max_pings_without_data", 0),
                # And let callers do the same: gRPC's own is five minutes, and who pings more often is hung up on.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ],
        )
        self._grpc.add_generic_rpc_handlers((self.service.handler(), not_here_handler(config, self._metrics)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if config.reflection:
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        listen = partial(bind, self._grpc, config, config.host, port, shares_port=self._shares_port)
        return listen() if self._port_share is None else self._port_share.listen(listen)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Have it run, and wait for it where that is possible."""
        if self._is_drained is not None:  # there is nobody left to tell
            coroutine.close()
        elif self.loop.is_here:
            task = self.loop.loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self.loop.run(coroutine, _START_S)

    def begin_drain(self) -> None:
        """Say NOT_SERVING, close idle streams at once and busy ones when they are idle. There is no way back."""
        self._metrics.serving.set(0)
        self._run(self._health.enter_graceful_shutdown())
        self.service.begin_drain()

    def drain(self, engine: Drainable, timeout_s: float) -> bool:
        """Refuse new requests with UNAVAILABLE, finish what is in flight within timeout_s; whether all of it is."""
        until_s = time.monotonic() + timeout_s
        self.begin_drain()
        drained = engine.drain(_left(until_s))
        return self.service.wait_idle(_left(until_s)) and drained

    def shutdown(self, engine: Drainable, grace_s: float) -> bool:
        """Drain within grace_s, and close. False when something was cut off."""
        if self._is_drained is not None:
            return self._is_drained
        drained = self._is_drained = self.drain(engine, grace_s)
        if self._port_share is not None:
            self._port_share.close()
        if self._grpc is not None:
            grace_s_left = _CLOSE_S if drained else 0
            self.loop.run(self._grpc.stop(grace_s_left), _START_S)
        engine.stop(_CLOSE_S)
        self.loop.release()
        if self._region_door is not None:
            self._region_door.close()
        if drained:
            log.info("stopped")
        else:
            log.warning("stopped after %.1f s, with requests still in flight", grace_s)
        return drained


def _region_door(config: Config, map_file: MapMemory) -> RegionDoor | None:
    """Raises ConfigError where a directory was asked for and cannot be used."""
    if not config.shared_memory:
        return None
    try:
        return RegionDoor(config.shared_memory_dir, any_user=config.shared_memory_any_user, map_file=map_file)
    except ConfigError as error:
        if config.shared_memory_dir is not None:
            raise
        log.warning("callers on this machine cannot share memory: %s", error)
        return None


def _left(until_s: float) -> float:
    return max(0.0, until_s - time.monotonic())
