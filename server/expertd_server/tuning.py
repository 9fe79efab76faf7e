"""Which tile family a call uses: measured on this kind of GPU where a cache has it, else a built-in rule.

Whatever is chosen, the bits are the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from expertd_server.types import LayerSpec

__all__ = ["CACHE_VERSION", "TuningCache", "bucket", "choose_family", "layer_key"]

CACHE_VERSION = 2
"""Raise it when the kernels change, so that old measurements are not believed."""


def bucket(num_tokens: int) -> int:
    """The power of two at or above num_tokens: calls are tuned by bucket."""
    return 1 << max(0, num_tokens - 1).bit_length()


def layer_key(spec: LayerSpec) -> str:
    """What the speed of a layer depends on."""
    return (
        f"E{spec.num_experts} L{spec.num_local} k{spec.top_k} H{spec.hidden_size} I{spec.intermediate_size} "
        f"a{int(spec.activation)}"
    )


def choose_family(tuned: dict[int, str] | None, spec: LayerSpec, num_tokens: int) -> str:
    """Name of the family for a call: the tuned one of its bucket, else by the rows that an expert gets on average."""
    if tuned is not None and (name := tuned.get(bucket(num_tokens))) is not None:
        return name
    rows = num_tokens * spec.top_k / spec.num_experts  # of one expert, routed evenly
    long_sums = min(spec.hidden_size, spec.intermediate_size) >= 2048
    if num_tokens == 1 and not long_sums:
        return "s16w"
    if rows <= 9 and long_sums:
        return "s16x"
    for limit, name in ((20, "d32w"), (45, "d64w"), (100, "m128")):
        if rows <= limit:
            return name
    return "q160" if rows <= 150 else "p160"


class TuningCache:
    """A JSON file of measured choices: {version, devices: {name: {layer key: {bucket: family}}}}.

    path: None reads no file and writes none. EXPERTD_TUNING_CACHE names one for the whole process.
    """

    def __init__(self, path: str | None = None) -> None:
        path = path or os.environ.get("EXPERTD_TUNING_CACHE")
        self._path = Path(path) if path else None
        self._devices: dict[str, dict[str, dict[int, str]]] = {}
        if self._path is not None and self._path.exists():
            self._devices = self._read(self._path)

    def lookup(self, device_name: str, key: str) -> dict[int, str] | None:
        """Bucket -> family, or None where nothing was measured."""
        return self._devices.get(device_name, {}).get(key)

    def store(self, device_name: str, key: str, choice: dict[int, str]) -> None:
        """Keep a measurement, and write the file where there is one."""
        self._devices.setdefault(device_name, {}).setdefault(key, {}).update(choice)
        if self._path is not None:
            text = json.dumps({"version": CACHE_VERSION, "devices": self._devices}, indent=1, sort_keys=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(text + "\n")
            temporary.replace(self._path)  # other processes read the old file or the new one, never half of it

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, dict[int, str]]]:
        data = json.loads(path.read_text())
        if data.get("version") != CACHE_VERSION:
            return {}
        return {
            device: {key: {int(b): name for b, name in choice.items()} for key, choice in layers.items()}
            for device, layers in data["devices"].items()
        }
