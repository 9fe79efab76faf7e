"""A whole server: Config -> Server, then startup, serve, shutdown."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertd_server import __version__
from expertd_server.admin import ADMIN_SERVICE_NAME, AdminService, not_here_handler
from expertd_server.admin_endpoint import AdminEndpoint
from expertd_server.backend import Backend, select_backend
from expertd_server.batcher import Limits
from expertd_server.calls import Calls
from expertd_server.config import Config
from expertd_server.engine import BatchReport, Engine
from expertd_server.errors import ConfigError
from expertd_server.interceptor import ServiceInterceptor
from expertd_server.layer import MoELayer
from expertd_server.listen import bind
from expertd_server.loader import load_layers
from expertd_server.metrics import LayerFacts, Metrics, MetricsEndpoint
from expertd_server.service import SERVICE_NAME, ExpertService, ServerFacts
from expertd_server.store import Held, LayerStore

__all__ = ["Server", "stop_on_signals"]

log = logging.getLogger(__name__)

# Threads for everything but Forward and ForwardStream, so that a full server still answers health checks.
_SPARE_THREADS = 16
# What is left to gRPC when every call is over: closing connections.
_CLOSE_S = 1.0


class Server:
    """One server process' worth of objects; several may live in one process, as in tests.

    layers: what to serve, in place of what the options name.
    """

    def __init__(
        self, config: Config, *, backend: Backend | None = None, layers: Iterable[MoELayer] | None = None
    ) -> None:
        self.config = config
        self.instance_id = uuid.uuid4().hex
        self.backend = _backend(config) if backend is None else backend
        self._layers = load_layers(config, self.backend) if layers is None else layers
        self.metrics = Metrics(count_expert_tokens=config.expert_token_metrics)
        self.store = LayerStore(config.memory_budget_bytes)
        self.engine = Engine(
            Limits(
                max_batch_tokens=config.max_batch_tokens,
                max_queue_tokens=config.max_queue_tokens,
                max_queue_requests=config.max_queue_requests,
                max_queue_delay_s=config.max_queue_delay_us / 1e6,
            ),
            self.backend,
            max_graph_tokens=config.max_graph_tokens,
            on_batch=self._observe_batch,
        )
        self.port = 0
        """The real port, once started."""
        self.metrics_port: int | None = None
        self._metrics_endpoint: MetricsEndpoint | None = None
        self.admin_port: int | None = None
        self._admin_endpoint: AdminEndpoint | None = None
        self._stop_requested = threading.Event()
        self._service = self._make_service()
        self._health = health.HealthServicer()
        self._grpc = self._make_grpc_server()

    def startup(self) -> bool:
        """Listen, load every layer, say that it is ready.

        The port is bound first, so that one in use is an error before minutes of loading; until the layers are there,
        health says NOT_SERVING and requests get UNAVAILABLE. Raises ConfigError and CheckpointError; call `shutdown`
        then too. False, and not ready, when `stop` was called meanwhile.
        """
        config = self.config
        if config.ready_file is not None:
            _clear_ready_file(config.ready_file)
        self._set_health(SERVICE_NAME, serving=False)
        self._set_health("", serving=False)
        device = _device_name(self.backend.device)
        self.metrics.set_server(version=__version__, backend=self.backend.name, device=device)
        batcher = self.engine.batcher
        self.metrics.watch_queue(lambda: batcher.queue_tokens, lambda: batcher.queue_requests)
        self.metrics.watch_layers(lambda: [facts for held in self.store.all_held() for facts in _facts(held)])
        self.metrics.watch_device(lambda: self.engine.slots.in_use, self.engine.device_memory)
        self.port = bind(self._grpc, config, config.host, config.port)
        if config.metrics_port is not None:
            try:
                self._metrics_endpoint = MetricsEndpoint(self.metrics.registry, config.host, config.metrics_port)
            except OSError as error:
                raise ConfigError(f"metrics_port {config.metrics_port} on {config.host}: {error}") from error
            self.metrics_port = self._metrics_endpoint.port
        if config.admin:
            self._admin_endpoint = AdminEndpoint(config, self._make_admin_service(), self.metrics)
            self.admin_port = self._admin_endpoint.port
        batcher.start()
        self._grpc.start()
        layers, self._layers = self._layers, ()  # the store alone keeps layers: what it gives up shall be freed
        for layer in layers:
            self._hold(layer)
            if self._stop_requested.is_set():
                return False
        self.engine.capture(self.store.layers())
        self.store.finish_loading()
        self._set_health(SERVICE_NAME, serving=True)
        self._set_health("", serving=True)
        log.info(
            "ready: %d layers, %.1f MB, on %s:%d, backend %s on %s",
            len(self.store.layers()),
            self.store.nbytes / 1e6,
            config.host,
            self.port,
            self.backend.name,
            device,
        )
        if config.ready_file is not None:
            _write_ready_file(config.ready_file, self.ready_facts())
        return True

    def ready_facts(self) -> dict[str, object]:
        """What a launcher wants to know: address, port, metrics_port, admin_port, pid, instance_id."""
        return {
            "address": f"{self.config.host}:{self.port}",
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
        """Say NOT_SERVING, refuse new requests with UNAVAILABLE, finish what is in flight; whether all of it is.

        Idle streams are closed at once, busy ones when they are idle. The process stays up; there is no way back.
        """
        until_s = time.monotonic() + timeout_s
        self._health.enter_graceful_shutdown()
        log.info("draining: %d requests wait", self.engine.batcher.queue_requests)
        self._service.begin_drain()
        drained = self.engine.batcher.drain(_left(until_s))
        return self._service.wait_idle(_left(until_s)) and drained

    def shutdown(self) -> bool:
        """Drain within shutdown_grace_s, then close. False when something was cut off."""
        self._stop_requested.set()
        if self._admin_endpoint is not None:
            self._admin_endpoint.close()
        drained = self.drain(self.config.shutdown_grace_s)
        self._grpc.stop(_CLOSE_S if drained else 0).wait(2 * _CLOSE_S)
        self.engine.batcher.stop(_CLOSE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._metrics_endpoint is not None:
            self._metrics_endpoint.close()
        if self.config.ready_file is not None:
            self.config.ready_file.unlink(missing_ok=True)
        if drained:
            log.info("stopped")
        else:
            log.warning("stopped after %.1f s, with requests still in flight", self.config.shutdown_grace_s)
        return drained

    def _make_service(self) -> ExpertService:
        config = self.config
        calls = Calls(
            store=self.store,
            engine=self.engine,
            metrics=self.metrics,
            max_batch_tokens=config.max_batch_tokens,
            max_message_bytes=config.max_message_bytes,
            request_timeout_s=config.request_timeout_s,
        )
        facts = ServerFacts(
            server_version=__version__,
            backend=self.backend.name,
            device=_device_name(self.backend.device),
            max_queue_tokens=config.max_queue_tokens,
            instance_id=self.instance_id,
        )
        return ExpertService(
            calls,
            facts,
            max_unary_requests=config.max_unary_requests,
            max_streams=config.max_streams,
            max_stream_requests=config.max_stream_requests,
        )

    def _make_admin_service(self) -> AdminService:
        return AdminService(
            self.config, self.backend, self.store, self.engine, hold=self._hold, forget=self._forget, drain=self.drain
        )

    def _make_grpc_server(self) -> grpc.Server:
        config = self.config
        num_threads = config.max_streams + config.max_unary_requests + _SPARE_THREADS
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="expertd-rpc")
        server = grpc.server(
            self._pool,
            interceptors=[ServiceInterceptor(name, self.metrics) for name in (SERVICE_NAME, ADMIN_SERVICE_NAME)],
            # More calls than threads would wait for one without bound; gRPC refuses them with RESOURCE_EXHAUSTED.
            maximum_concurrent_rpcs=num_threads,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server that gets half the calls
                ("grpc.keepalive_time_ms", 30_000),  # notice callers that vanished without a word
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ],
        )
        server.add_generic_rpc_handlers((self._service.handler(), not_here_handler(config)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if config.reflection:
            reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _hold(self, layer: MoELayer) -> None:
        self.store.add(layer)
        spec = layer.spec
        self.metrics.count_experts(layer.name, spec.local_expert_offset, spec.num_local)
        self._set_health(layer.name, serving=True)
        log.info(
            "layer %s version %d: H %d, I %d, experts %d-%d of %d, top_k %d, %.1f MB",
            layer.name,
            layer.weights_version,
            spec.hidden_size,
            spec.intermediate_size,
            spec.local_expert_offset,
            spec.local_expert_offset + spec.num_local - 1,
            spec.num_experts,
            spec.top_k,
            layer.nbytes / 1e6,
        )

    def _forget(self, name: str) -> None:
        self.metrics.forget_experts(name)
        self._set_health(name, serving=False)

    def _observe_batch(self, batch: BatchReport) -> None:
        self.metrics.observe_batch(batch.layer.name, batch.num_requests, batch.num_tokens, [batch.topk_ids.numpy()])
        self.metrics.observe_device(batch.compute_s, batch.num_tokens, batch.graph_rows)

    def _set_health(self, service: str, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self._health.set(service, status.SERVING if serving else status.NOT_SERVING)


def stop_on_signals(server: Server) -> None:
    """SIGTERM and SIGINT stop the server gracefully; a second one ends the process at once."""
    received: list[int] = []

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        server.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def _backend(config: Config) -> Backend:
    try:
        return select_backend(config.device, tuning_cache=config.tuning_cache)
    except (
        AssertionError,
        RuntimeError,
        ValueError,
    ) as error:  # torch has its own ways to say that there is no such GPU
        raise ConfigError(f"device {config.device}: {error}") from error


def _clear_ready_file(path: Path) -> None:
    """Remove what an earlier process left. Raises ConfigError where the file could not be written later."""
    if not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir():
        raise ConfigError(f"ready_file is {path}, expected a file in a directory that this process may write to")
    path.unlink(missing_ok=True)


def _write_ready_file(path: Path, facts: dict[str, object]) -> None:
    """Whole or not at all: a launcher that sees the file can read it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(facts) + "\n")
    partial.replace(path)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _facts(held: Held) -> list[LayerFacts]:
    """What the metrics say about a layer, version by version."""
    spec = held.current.spec
    return [
        LayerFacts(
            layer=layer.name,
            weights_version=layer.weights_version,
            is_current=layer is held.current,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            experts=f"{spec.local_expert_offset}-{spec.local_expert_offset + spec.num_local - 1}",
            top_k=spec.top_k,
            routing=spec.routing_method.name.lower(),
            activation=spec.activation.name.lower(),
            nbytes=layer.nbytes,
        )
        for layer in held.versions
    ]


def _left(until_s: float) -> float:
    return max(0.0, until_s - time.monotonic())
