"""The peers of one run of bench_kernels.py, and why some are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

from . import PeerLayer, PeerSkippedError, open_peer

__all__ = ["Beside"]


class Beside:
    """names: of `PEERS`. A peer that cannot be measured is left out of the rest of its case, and the reason printed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._layers: dict[str, PeerLayer] = {}
        self.left_out: dict[str, dict[str, str]] = {}
        """Reasons by case and peer."""

    def open(self, case: str, spec: LayerSpec, weights: ExpertWeights) -> None:
        """Prepare every peer's layer."""
        self.close()
        for name in self._names:
            try:
                self._layers[name] = open_peer(name, spec, weights)
            except PeerSkippedError as error:
                self._leave_out(case, name, str(error))

    def time(self, case: str, time_peer: Callable[[PeerLayer], dict[str, float]]) -> dict[str, dict[str, float]]:
        """What time_peer says of each peer that is open."""
        times = {}
        for name, layer in list(self._layers.items()):
            try:
                times[name] = time_peer(layer)
            except PeerSkippedError as error:
                self._leave_out(case, name, str(error))
            except Exception as error:  # of somebody else's program: the kernels are measured all the same
                self._leave_out(case, name, f"{type(error).__name__}: {error}")
        return times

    def close(self) -> None:
        """Let go of the layers, whose weights may be copies."""
        self._layers.clear()

    def _leave_out(self, case: str, name: str, reason: str) -> None:
        self._layers.pop(name, None)
        self.left_out.setdefault(case, {})[name] = reason
        print(f"{name} is left out of {case}: {reason}", flush=True)
