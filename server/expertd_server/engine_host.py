"""What computes, with everything that it needs but a port: backend, layers, engine, and what they count."""

from __future__ import annotations

import logging
import mmap
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from expertd_server import __version__, message_memory
from expertd_server.admin import AdminService
from expertd_server.admin_endpoint import AdminEndpoint
from expertd_server.backend import Backend, select_backend
from expertd_server.batch import Limits
from expertd_server.bell import ServingThread
from expertd_server.config import Config
from expertd_server.cuda_slot import pinner_of
from expertd_server.engine import BatchReport, Engine
from expertd_server.errors import ConfigError
from expertd_server.layer import MoELayer
from expertd_server.loader import load_layers
from expertd_server.metrics import LayerFacts, Metrics
from expertd_server.store import Held, LayerStore
from expertd_server.watchdog import Watchdog, stacks_of

__all__ = ["EngineHost"]

log = logging.getLogger(__name__)


class EngineHost:
    """The one object of its kind in a process that computes.

    layers: what to serve, in place of what the options name. on_change: see `LayerStore`.
    on_hang: told what hangs, once, when a batch takes longer than engine_hang_timeout_s; in a thread of its own.
    """

    def __init__(
        self,
        config: Config,
        *,
        backend: Backend | None = None,
        layers: Iterable[MoELayer] | None = None,
        on_change: Callable[[], object] = lambda: None,
        on_hang: Callable[[str], object],
    ) -> None:
        self._config = config
        self.backend = _backend(config) if backend is None else backend
        self.device_name = _device_name(self.backend.device)
        self.metrics = Metrics(count_expert_tokens=config.expert_token_metrics)
        self.store: LayerStore[MoELayer] = LayerStore(config.memory_budget_bytes, on_change)
        self._layers = load_layers(config, self.backend) if layers is None else layers
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
        self._pinner = pinner_of(self.backend.device, config.max_pinned_bytes)
        self._on_hang = on_hang
        self._watchdog: Watchdog | None = None
        if config.engine_hang_timeout_s:
            self._watchdog = Watchdog(self.engine.batcher.oldest_work, config.engine_hang_timeout_s, self._tell_of_hang)

    def share(self, mapped: mmap.mmap) -> memoryview:
        """A view of memory that callers share, so that the device copies straight from and to it where it can."""
        return memoryview(mapped) if self._pinner is None else self._pinner.share(mapped)

    def share_messages(self) -> None:
        """Have large messages of this process lie where the device copies from and to, if it can, for good."""
        if self._pinner is not None:
            message_memory.use(self._pinner.share(mmap.mmap(-1, message_memory.MESSAGE_MEMORY_BYTES)))

    def start(self, here: ServingThread) -> None:
        """Start the batcher and the metrics; there are no layers yet.

        here: see `Batcher.start`; for backends that start a batch in no time.
        """
        self.metrics.set_server(version=__version__, backend=self.backend.name, device=self.device_name)
        batcher = self.engine.batcher
        self.metrics.watch_queue(lambda: batcher.queue_tokens, lambda: batcher.queue_requests)
        self.metrics.watch_layers(lambda: [facts for held in self.store.all_held() for facts in _facts(held)])
        self.metrics.watch_device(lambda: self.engine.slots.in_use, self.engine.device_memory)
        # To start a batch takes no time with these two. With torch it does on a GPU as well, which is asked for counts.
        starts_at_once = self.backend.name in {"noop", "cuda"}
        batcher.start(here if starts_at_once and not self._config.max_queue_delay_us else None)
        if self._watchdog is not None:
            self._watchdog.start()

    def close(self) -> None:
        """Look after the engine no more: nothing of it runs, or the process ends anyway."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._pinner is not None:
            self._pinner.close()

    def load(self, hold: Callable[[MoELayer], None], is_stopped: Callable[[], bool]) -> bool:
        """Load every layer and capture its graphs; False when it was stopped before.

        hold: `self.hold`, or what does that and more. Raises ConfigError and CheckpointError.
        """
        layers, self._layers = self._layers, ()  # the store alone keeps layers: what it gives up shall be freed
        for layer in layers:
            hold(layer)
            if is_stopped():
                return False
        self.engine.capture(self.store.layers())
        self.store.finish_loading()
        return True

    def summary(self) -> str:
        """What is held and what runs it, for a log line."""
        num_layers, megabytes = len(self.store.layers()), self.store.nbytes / 1e6
        return f"{num_layers} layers, {megabytes:.1f} MB, backend {self.backend.name} on {self.device_name}"

    def hold(self, layer: MoELayer) -> None:
        """Have a layer answer. Raises what `LayerStore.add` does."""
        self.store.add(layer)
        spec = layer.spec
        self.metrics.count_experts(layer.name, spec.local_expert_offset, spec.num_local)
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

    def forget(self, name: str) -> None:
        """A layer is held no more."""
        self.metrics.forget_experts(name)

    def admin_endpoint(
        self,
        *,
        hold: Callable[[MoELayer], None],
        forget: Callable[[str], None],
        drain: Callable[[float], bool],
    ) -> AdminEndpoint | None:
        """Take orders from now on, where the options say so; see `AdminService`. Raises ConfigError."""
        if not self._config.admin:
            return None
        service = AdminService(
            self._config, self.backend, self.store, self.engine, hold=hold, forget=forget, drain=drain
        )
        return AdminEndpoint(self._config, service, self.metrics)

    def _tell_of_hang(self, number: int, seconds: float) -> None:
        what = f"the engine hangs: {self.engine.describe(number)}, not done after {seconds:.1f} s"
        log.critical("%s", "\n".join(filter(None, (what, stacks_of(self.engine.batcher.threads)))))
        self._on_hang(what)

    def _observe_batch(self, batch: BatchReport) -> None:
        self.metrics.observe_batch(batch.layer.name, batch.num_requests, batch.num_tokens, [batch.topk_ids])
        self.metrics.observe_device(batch.compute_s, batch.num_tokens, batch.graph_rows)


def _backend(config: Config) -> Backend:
    try:
        return select_backend(config.device, tuning_cache=config.tuning_cache)
    except (
        AssertionError,
        RuntimeError,
        ValueError,
    ) as error:  # torch has its own ways to say that there is no such GPU
        raise ConfigError(f"device {config.device}: {error}") from error


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _facts(held: Held[MoELayer]) -> list[LayerFacts]:
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
