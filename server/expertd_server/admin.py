"""expertd.v1.AdminService: orders to a running server."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import torch

from expertd.v1 import expertd_pb2 as pb
from expertd_server import memory
from expertd_server.admin_methods import ADMIN_SERVICE_NAME, admin_handler
from expertd_server.backend import Backend
from expertd_server.config import Config
from expertd_server.engine import Engine
from expertd_server.errors import (
    InsufficientMemoryError,
    InvalidArgumentError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
    VersionConflictError,
)
from expertd_server.layer import MoELayer
from expertd_server.sources import Source, source_of
from expertd_server.store import LayerStore
from expertd_server.types import LayerSpec
from expertd_server.wire_answer import layer_info
from expertd_server.wire_check import checked_name

__all__ = ["ADMIN_SERVICE_NAME", "AdminService"]

log = logging.getLogger(__name__)

# What a caller is told who comes while another one's order of the same kind runs.
_BUSY_RETRY_DELAY_S = 1.0
# A load says how far it is this often.
_PROGRESS_INTERVAL_S = 5.0


class AdminService:
    """The service. Errors are raised; `ServiceInterceptor` turns them into statuses.

    Every method runs in its call's own thread; batches go on in theirs.
    hold, forget: make a layer known to everything but the engine, and a layer's name unknown again.
    drain: as `Server.drain`.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        store: LayerStore[MoELayer],
        engine: Engine,
        *,
        hold: Callable[[MoELayer], None],
        forget: Callable[[str], None],
        drain: Callable[[float], bool],
    ) -> None:
        self._config = config
        self._backend = backend
        self._store = store
        self._engine = engine
        self._hold = hold
        self._forget = forget
        self._drain = drain
        self._loading = threading.Lock()
        self._unloading = threading.Lock()
        self._changing = threading.Lock()
        """Held for moments, while what is held changes: the store and all that is told of it change together."""

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Every method, as gRPC serves it."""
        return admin_handler(self.load_layer, self.swap_weights, self.unload_layer, self.drain)

    def load_layer(self, request: pb.LoadLayerRequest, context: grpc.ServicerContext) -> pb.LoadLayerResponse:
        """Read, prepare and hold a version beside the others."""
        name, version = checked_name(request.layer), request.weights_version
        if version < 1:
            raise InvalidArgumentError.of("weights_version", f"is {version}, expected at least 1")
        is_draining = self._engine.batcher.is_draining
        if self._store.is_loading or is_draining:
            what = "draining" if is_draining else "loading the layers that it starts with"
            raise UnavailableError(f"the server is {what} and takes no others")
        with _alone(self._loading, "LoadLayer"):
            start_s = time.monotonic()
            was_held = self._is_held(name)
            source = self._source(request)
            self._check_room(name, source.spec)
            log.info("loading layer %s version %d: %.1f MB to read", name, version, source.spec.weights_nbytes / 1e6)
            layer = self._prepare(name, version, source, context)
            # Graphs of others too: where the slots had to grow for this layer, they have forgotten them.
            self._engine.capture([layer, *(one for held in self._store.all_held() for one in held.versions)])
            _check_caller(context)
            with self._changing:
                if was_held and not self._is_held(name):
                    raise VersionConflictError(
                        f"layer {name!r} was unloaded while version {version} was being loaded; nothing of it is held: "
                        f"load it again if it is still wanted"
                    )
                self._hold(layer)
                info = self._info(name)
            elapsed_s = time.monotonic() - start_s
            log.info("loaded layer %s version %d in %.1f s", name, version, elapsed_s)
            return pb.LoadLayerResponse(layer=info, weights_bytes=layer.nbytes, load_time_ms=round(elapsed_s * 1e3))

    def swap_weights(self, request: pb.SwapWeightsRequest, _context: grpc.ServicerContext) -> pb.SwapWeightsResponse:
        """Make a version that is held the current one."""
        name, version = checked_name(request.layer), request.weights_version
        if version < 1:
            raise InvalidArgumentError.of("weights_version", f"is {version}, expected a version that is held")
        before = self._store.set_current(name, version)
        log.info("layer %s: version %d is current, before %d", name, version, before)
        return pb.SwapWeightsResponse(layer=self._info(name), previous_weights_version=before)

    def unload_layer(self, request: pb.UnloadLayerRequest, context: grpc.ServicerContext) -> pb.UnloadLayerResponse:
        """Give up a version or a layer, and wait until nobody computes with it."""
        name, version = checked_name(request.layer), request.weights_version
        with _alone(self._unloading, "UnloadLayer"):
            with self._changing:
                removed = self._store.remove(name, version or None)
                if not version:
                    self._forget(name)
            freed = removed.wait(self._timeout_s(request.timeout_ms, context))
        what = f"version {version}" if version else "all versions"
        log.info("unloaded layer %s, %s: %.1f MB %s", name, what, removed.nbytes / 1e6, "free" if freed else "in use")
        return pb.UnloadLayerResponse(weights_bytes=removed.nbytes, freed=freed)

    def drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        """Take no new requests and wait until those admitted are answered."""
        return pb.DrainResponse(idle=self._drain(self._timeout_s(request.timeout_ms, context)))

    def _source(self, request: pb.LoadLayerRequest) -> Source:
        """What to load. Keeps no layer alive: another one may be unloaded while this one is read."""
        name, version = request.layer, request.weights_version
        held = next((each for each in self._store.all_held() if each.current.name == name), None)
        if held is None:
            return source_of(request, self._config.expert_range)
        if version in held.weights_versions:
            raise VersionConflictError(f"layer {name!r} version {version} is held already")
        spec = held.current.spec
        first = spec.local_expert_offset
        source = source_of(request, range(first, first + spec.num_local))
        if source.spec != spec:
            raise InvalidArgumentError.of(
                request.WhichOneof("source") or "source",
                f"has {source.spec}, expected {spec} as version {held.current.weights_version} of layer {name!r}",
            )
        return source

    def _prepare(self, name: str, version: int, source: Source, context: grpc.ServicerContext) -> MoELayer:
        backend = self._backend
        weights = source.load(_Progress(name, version, source.spec.weights_nbytes, context))
        _check_caller(context)
        try:
            prepared = backend.prepare(source.spec, weights, max_num_tokens=self._config.max_batch_tokens)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError.of(
                "source", f"layer {name!r} cannot run on the {backend.name} backend: {error}"
            ) from error
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(
                f"layer {name!r} version {version} does not fit into the memory of {backend.device}; unload another",
                needed_bytes=source.spec.weights_nbytes,
                free_bytes=memory.free_bytes(backend.device) or 0,
            ) from error
        return MoELayer(name, prepared, backend, version, weights.fingerprint())

    def _check_room(self, name: str, spec: LayerSpec) -> None:
        """Raise InsufficientMemoryError unless a layer of this shape will fit, as far as can be known before."""
        device, host = self._backend.device, torch.device("cpu")
        nbytes = self._estimated_nbytes(spec)
        self._store.check_room(name, nbytes)
        needs = {host: spec.weights_nbytes}  # read there, and gone once they are prepared
        needs[device] = needs.get(device, 0) + nbytes
        for where, needed in needs.items():
            free = memory.free_bytes(where)
            if free is not None and needed > free:
                raise InsufficientMemoryError(
                    f"loading layer {name!r} takes about {needed} bytes of memory on {where}, {free} are free; unload "
                    f"another version or layer first",
                    needed_bytes=needed,
                    free_bytes=free,
                )

    def _estimated_nbytes(self, spec: LayerSpec) -> int:
        """What a layer of this shape takes when it is prepared: as much as its like, or in proportion to others."""
        held = [each.current for each in self._store.all_held()]
        same = next((layer.nbytes for layer in held if layer.spec == spec), None)
        if same is not None:
            return same
        return round(spec.weights_nbytes * max((one.nbytes / one.spec.weights_nbytes for one in held), default=1.0))

    def _is_held(self, name: str) -> bool:
        return any(held.current.name == name for held in self._store.all_held())

    def _info(self, name: str) -> pb.LayerInfo:
        held = self._store.held(name)
        return layer_info(held.current, held.weights_versions)

    def _timeout_s(self, timeout_ms: int, context: grpc.ServicerContext) -> float:
        asked_s = timeout_ms / 1e3 if timeout_ms else self._config.shutdown_grace_s
        return min(asked_s, context.time_remaining())


class _Progress:
    """Told how many bytes were read: says so in the log, and stops the reading when the caller has left."""

    def __init__(self, name: str, version: int, total_bytes: int, context: grpc.ServicerContext) -> None:
        self._what = f"layer {name} version {version}"
        self._total_bytes = total_bytes
        self._context = context
        self._done_bytes = 0
        self._told_s = time.monotonic()

    def __call__(self, num_bytes: int) -> None:
        _check_caller(self._context)
        self._done_bytes += num_bytes
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_INTERVAL_S:
            self._told_s = now_s
            log.info("loading %s: %.1f of %.1f MB", self._what, self._done_bytes / 1e6, self._total_bytes / 1e6)


@contextlib.contextmanager
def _alone(lock: threading.Lock, method: str) -> Iterator[None]:
    """One order of a kind at a time: another one is refused rather than kept waiting."""
    if not lock.acquire(blocking=False):
        raise OverloadedError(f"another {method} runs, one at a time; come back when it is over", _BUSY_RETRY_DELAY_S)
    try:
        yield
    finally:
        lock.release()


def _check_caller(context: grpc.ServicerContext) -> None:
    if not context.is_active():
        raise RequestCancelledError("the caller left before the layer was loaded; nothing of it is held")
