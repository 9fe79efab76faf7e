"""The layers that a server holds, by name and version."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from expertd_server.errors import (
    ConfigError,
    InsufficientMemoryError,
    LayerNotFoundError,
    UnavailableError,
    VersionConflictError,
    VersionNotHeldError,
)
from expertd_server.types import LayerSpec

__all__ = ["Held", "HeldLayer", "LayerStore", "Removed"]

# Names shown when a name is not found: enough to see the pattern, short enough for a message.
_MAX_NAMES_SHOWN = 8
# What is told to whoever asks for a layer while layers are being loaded.
_LOADING_RETRY_DELAY_S = 1.0


class HeldLayer(Protocol):
    """What is known of a layer wherever requests to it are checked: a `MoELayer`, or a `RemoteLayer` in its place."""

    @property
    def name(self) -> str: ...
    @property
    def weights_version(self) -> int: ...
    @property
    def weights_fingerprint(self) -> int: ...
    @property
    def spec(self) -> LayerSpec: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def hidden_states_scale(self) -> float | None: ...
    def bias_values(self) -> Sequence[float] | None: ...


L = TypeVar("L", bound=HeldLayer)


@dataclass(frozen=True)
class Held(Generic[L]):
    """A layer as it is held at one moment."""

    current: L
    versions: tuple[L, ...]
    """All of them, the current one included, by ascending version."""

    @property
    def weights_versions(self) -> list[int]:
        """Ascending."""
        return [layer.weights_version for layer in self.versions]


@dataclass(frozen=True)
class Removed:
    """Versions that were given up. Whoever still computes with them keeps them alive."""

    nbytes: int
    """What they take, or took."""
    freed: tuple[threading.Event, ...]
    """One for each, set when nobody has it any more."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until all are freed; False when some are not after timeout_s."""
        until_s = time.monotonic() + timeout_s
        return all(event.wait(max(0.0, until_s - time.monotonic())) for event in self.freed)


class LayerStore(Generic[L]):
    """Many named layers, each in one or more versions of its weights, one of them current; thread-safe.

    budget_bytes: most bytes that the prepared layers may hold together; None: no bound. Versions that were removed
    count until nobody has them any more. on_change: called after each change of what is held or current.
    A store starts out loading: layers are held, and none answers; see `get`.
    """

    def __init__(self, budget_bytes: int | None = None, on_change: Callable[[], object] = lambda: None) -> None:
        self._budget_bytes = budget_bytes
        self._on_change = on_change
        self._lock = threading.Lock()
        self._layers: dict[str, dict[int, L]] = {}
        self._current: dict[str, int] = {}
        self._removed: weakref.WeakSet[L] = weakref.WeakSet()
        self._loading = True

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold, those included that were removed and are still in use."""
        with self._lock:
            return self._nbytes()

    @property
    def is_loading(self) -> bool:
        """Whether `finish_loading` is still to come."""
        return self._loading

    def add(self, layer: L) -> None:
        """Hold a layer. The first version of a name is the current one; others wait for `set_current`.

        Raises VersionConflictError when this version is held already, ConfigError when its shape differs from that of
        the versions held, InsufficientMemoryError when the budget does not allow it.
        """
        with self._lock:
            versions = self._layers.get(layer.name, {})
            if layer.weights_version in versions:
                raise VersionConflictError(f"layer {layer.name!r} version {layer.weights_version} is held already")
            for held in versions.values():
                if held.spec != layer.spec:
                    raise ConfigError(
                        f"layer {layer.name!r} version {layer.weights_version} has {layer.spec}, expected "
                        f"{held.spec} as in version {held.weights_version}"
                    )
            self._check_room(layer.name, layer.nbytes)
            self._layers.setdefault(layer.name, versions)[layer.weights_version] = layer
            self._current.setdefault(layer.name, layer.weights_version)
        self._on_change()

    def check_room(self, name: str, nbytes: int) -> None:
        """Raise InsufficientMemoryError unless the budget allows a layer of so many bytes."""
        with self._lock:
            self._check_room(name, nbytes)

    def set_current(self, name: str, weights_version: int) -> int:
        """Make a version the one that `get` gives to those who ask for none; returns the one before.

        Raises LayerNotFoundError or VersionNotHeldError.
        """
        with self._lock:
            self._find(name, weights_version)
            before, self._current[name] = self._current[name], weights_version
        self._on_change()
        return before

    def remove(self, name: str, weights_version: int | None = None) -> Removed:
        """Give up one version, or a layer with all its versions.

        Raises LayerNotFoundError, VersionNotHeldError, and VersionConflictError for the current version: what requests
        without a version would get next is not the store's to choose.
        """
        with self._lock:
            self._find(name, weights_version)
            versions = self._layers[name]
            if weights_version is None:
                gone = list(versions.values())
                del self._layers[name], self._current[name]
            elif weights_version == self._current[name]:
                others = ", ".join(str(v) for v in sorted(versions) if v != weights_version) or "none"
                raise VersionConflictError(
                    f"weights_version {weights_version} of layer {name!r} is the current one; swap to another first "
                    f"(held: {others}), or unload the layer with all its versions"
                )
            else:
                gone = [versions.pop(weights_version)]
            self._removed.update(gone)
        self._on_change()
        return Removed(sum(layer.nbytes for layer in gone), tuple(_freed(layer) for layer in gone))

    def replace(self, layers: Iterable[tuple[L, bool]], *, is_loading: bool) -> None:
        """Hold exactly these versions, each with whether it is the current one, whatever their size."""
        held: dict[str, dict[int, L]] = {}
        current: dict[str, int] = {}
        for layer, is_current in layers:
            held.setdefault(layer.name, {})[layer.weights_version] = layer
            if is_current:
                current[layer.name] = layer.weights_version
        with self._lock:
            self._layers, self._current, self._loading = held, current, is_loading

    def finish_loading(self) -> None:
        """Say that every layer is there and ready: from now on they answer, and an unknown name is NOT_FOUND."""
        with self._lock:
            self._loading = False
        self._on_change()

    def get(self, name: str, weights_version: int | None = None) -> L:
        """A layer by name, in its current version or in the asked one.

        Raises LayerNotFoundError and VersionNotHeldError, which list what is held; while layers are being loaded,
        UnavailableError, also for a layer that is there already: its graphs may not be.
        """
        with self._lock:
            if self._loading:
                raise _not_loaded(name)
            versions = self._layers.get(name)
            if versions is not None:  # as _find does, which knows what to say where there is none
                layer = versions.get(self._current[name] if weights_version is None else weights_version)
                if layer is not None:
                    return layer
            return self._find(name, weights_version, or_else="; leave it unset for the current one")

    def held(self, name: str) -> Held[L]:
        """A layer with all its versions. Raises LayerNotFoundError, or UnavailableError when it may still come."""
        with self._lock:
            self._find(name, None)
            return self._held(name)

    def all_held(self) -> list[Held[L]]:
        """Every layer with all its versions, sorted by name."""
        with self._lock:
            return [self._held(name) for name in sorted(self._layers)]

    def layers(self) -> list[L]:
        """The current version of every layer, sorted by name."""
        return [held.current for held in self.all_held()]

    def versions(self, name: str) -> list[int]:
        """Every version held of a layer, ascending. Raises LayerNotFoundError."""
        return self.held(name).weights_versions

    def _held(self, name: str) -> Held[L]:
        versions = self._layers[name]
        return Held(versions[self._current[name]], tuple(versions[number] for number in sorted(versions)))

    def _nbytes(self) -> int:
        held = sum(layer.nbytes for versions in self._layers.values() for layer in versions.values())
        return held + sum(layer.nbytes for layer in self._removed)

    def _check_room(self, name: str, nbytes: int) -> None:
        if self._budget_bytes is None:
            return
        held_bytes = self._nbytes()
        total = held_bytes + nbytes
        if total > self._budget_bytes:
            raise InsufficientMemoryError(
                f"layer {name!r} takes {nbytes} bytes, which makes {total}, but memory_budget_bytes is "
                f"{self._budget_bytes}; hold fewer layers, experts or versions here, or raise the budget",
                needed_bytes=nbytes,
                free_bytes=max(0, self._budget_bytes - held_bytes),
            )

    def _find(self, name: str, weights_version: int | None, *, or_else: str = "") -> L:
        """or_else: what a request may do where the version is not held. An order may not: unset, it unloads all."""
        versions = self._layers.get(name)
        if versions is None:
            if self._loading:
                raise _not_loaded(name)
            raise LayerNotFoundError(f"layer {name!r} is not held here; {self._names_held()}")
        if weights_version is None:
            return versions[self._current[name]]
        if weights_version not in versions:
            raise VersionNotHeldError(
                f"layer {name!r} is not held in weights_version {weights_version}; held: "
                f"{', '.join(map(str, sorted(versions)))}{or_else}"
            )
        return versions[weights_version]

    def _names_held(self) -> str:
        names = sorted(self._layers)
        if not names:
            return "no layer is"
        more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
        return f"held: {', '.join(names[:_MAX_NAMES_SHOWN])}{more}"


def _not_loaded(name: str) -> UnavailableError:
    return UnavailableError(
        f"layer {name!r} is not loaded yet: the server is starting; come back", _LOADING_RETRY_DELAY_S
    )


def _freed(layer: HeldLayer) -> threading.Event:
    """Set when nobody has the layer any more."""
    event = threading.Event()
    weakref.finalize(layer, event.set).atexit = False
    return event
