"""The layers that a server holds, by name and version."""

from __future__ import annotations

import threading

from expertd_server.errors import ConfigError, LayerNotFoundError, UnavailableError, VersionNotHeldError
from expertd_server.layer import MoELayer

__all__ = ["LayerStore"]

# Names shown when a name is not found: enough to see the pattern, short enough for a message.
_MAX_NAMES_SHOWN = 8


class LayerStore:
    """Many named layers, each in one or more versions of its weights; thread-safe.

    budget_bytes: most bytes that the prepared layers may hold together; None: no bound.
    A store starts out loading; see `get`.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._layers: dict[str, dict[int, MoELayer]] = {}
        self._loading = True

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        with self._lock:
            return self._nbytes()

    def add(self, layer: MoELayer) -> None:
        """Hold a layer. Raises ConfigError when this version is held already, when its shape differs from that of the
        versions held, or when the budget does not allow it."""
        with self._lock:
            versions = self._layers.get(layer.name, {})
            if layer.weights_version in versions:
                raise ConfigError(f"layer {layer.name!r} version {layer.weights_version} is held already")
            for held in versions.values():
                if held.spec != layer.spec:
                    raise ConfigError(
                        f"layer {layer.name!r} version {layer.weights_version} has {layer.spec}, expected "
                        f"{held.spec} as in version {held.weights_version}"
                    )
            total = self._nbytes() + layer.nbytes
            if self._budget_bytes is not None and total > self._budget_bytes:
                raise ConfigError(
                    f"layer {layer.name!r} takes {layer.nbytes} bytes, which makes {total}, but memory_budget_bytes is "
                    f"{self._budget_bytes}; hold fewer layers or experts here, or raise the budget"
                )
            self._layers.setdefault(layer.name, versions)[layer.weights_version] = layer

    def remove(self, name: str, weights_version: int) -> None:
        """Forget one version. Raises LayerNotFoundError or VersionNotHeldError."""
        with self._lock:
            self._find(name, weights_version)
            del self._layers[name][weights_version]
            if not self._layers[name]:
                del self._layers[name]

    def finish_loading(self) -> None:
        """Say that every layer is there: from now on an unknown name is NOT_FOUND rather than UNAVAILABLE."""
        with self._lock:
            self._loading = False

    def get(self, name: str, weights_version: int | None = None) -> MoELayer:
        """A layer by name, in its newest version or in the asked one.

        Raises LayerNotFoundError (while layers are still being loaded: UnavailableError) and VersionNotHeldError, which
        list what is held.
        """
        with self._lock:
            return self._find(name, weights_version)

    def layers(self) -> list[MoELayer]:
        """The newest version of every layer, sorted by name."""
        with self._lock:
            return [versions[max(versions)] for _, versions in sorted(self._layers.items())]

    def versions(self, name: str) -> list[int]:
        """Every version held of a layer, ascending. Raises LayerNotFoundError."""
        with self._lock:
            self._find(name, None)
            return sorted(self._layers[name])

    def _nbytes(self) -> int:
        return sum(layer.nbytes for versions in self._layers.values() for layer in versions.values())

    def _find(self, name: str, weights_version: int | None) -> MoELayer:
        versions = self._layers.get(name)
        if versions is None:
            if self._loading:
                raise UnavailableError(f"layer {name!r} is not loaded yet: the server is starting; come back")
            raise LayerNotFoundError(f"layer {name!r} is not held here; {self._names_held()}")
        if weights_version is None:
            return versions[max(versions)]
        if weights_version not in versions:
            raise VersionNotHeldError(
                f"layer {name!r} is not held in weights_version {weights_version}; held: "
                f"{', '.join(map(str, sorted(versions)))}; leave it unset for the newest"
            )
        return versions[weights_version]

    def _names_held(self) -> str:
        names = sorted(self._layers)
        if not names:
            return "no layer is"
        more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
        return f"held: {', '.join(names[:_MAX_NAMES_SHOWN])}{more}"
