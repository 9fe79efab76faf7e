"""Which tile family a call uses: measured on this kind of GPU where a cache has it, else a built-in rule.

Whatever is chosen, the bits are the same. Nothing is measured unless somebody asks: `autotune` for the operator,
`--tune-kernels` for a server.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from expertd_server.types import LayerSpec

__all__ = [
    "CACHE_VERSION",
    "TuningCache",
    "autotune",
    "bucket",
    "choose_family",
    "is_autotuning",
    "layer_key",
    "skewed_logits",
]

CACHE_VERSION = 7
"""Raise it when the kernels change, or what is measured, so that old measurements are not believed."""


_autotuning: ContextVar[bool] = ContextVar("autotuning", default=False)


@contextlib.contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Calls of the operator inside measure the tile families for up to their tune_max_num_tokens tokens, once.

    Of use on Hopper GPUs only; elsewhere nothing happens. The first call for each kind of layer takes seconds. What is
    found holds for the process and, where EXPERTD_TUNING_CACHE names a file, for later ones. Not for use while a graph
    is captured.
    """
    token = _autotuning.set(enabled)
    try:
        yield
    finally:
        _autotuning.reset(token)


def is_autotuning() -> bool:
    """Whether the caller is inside `autotune`."""
    return _autotuning.get()


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
    """Name of the family for a call: the tuned one of its bucket, else by the rows that an expert gets on average.

    Tiles are wider than an average expert needs, because few layers are routed evenly: one tile too wide costs a call
    that is up to 1 %, but a popular expert that is cut into many tiles up to half of its time. How many rows there are
    is not known where a call is planned. docs/kernels.md has the figures.
    """
    if tuned is not None and (name := tuned.get(bucket(num_tokens))) is not None:
        return name
    rows = num_tokens * spec.top_k / spec.num_experts  # of one expert, routed evenly
    if spec.num_local < spec.num_experts:
        rows *= 3  # this slice may be the popular one
    long_sums = min(spec.hidden_size, spec.intermediate_size) >= 2048
    if rows <= (4 if long_sums else 1):
        return "s16x" if long_sums else "s16w"
    if rows <= 9:
        return "d64w"
    if rows <= (24 if long_sums else 40):
        return "m128"
    fills_tiles = spec.gemm1_rows % 256 == 0  # else half a tile of each expert is for nothing, and not shared in p160
    return "p160" if rows <= 200 and fills_tiles else "c160"


def skewed_logits(spec: LayerSpec, num_tokens: int, device: torch.device) -> torch.Tensor:
    """float32 [num_tokens, num_experts] of a layer with popular experts: drawn in proportion to 1 / rank (Zipf).

    The first of the local experts is the most popular one, so that a slice has more than its share of the rows.
    """
    uniform = torch.rand(num_tokens, spec.num_experts, device=device).clamp_(1e-9, 1 - 1e-7)
    rank = (torch.arange(spec.num_experts, device=device) - spec.local_expert_offset) % spec.num_experts + 1
    return -uniform.log().neg().log() - rank.log()  # the greatest of them are Gumbel's way to draw without replacement


class TuningCache:
    """A JSON file of measured choices: {version, devices: {name: {layer key: {bucket: family}}}}.

    path: None: the one that EXPERTD_TUNING_CACHE names; where it names none, nothing is read or written.
    Raises ValueError naming the file when it holds something else; a file of an older version is measured anew.
    """

    def __init__(self, path: str | Path | None = None) -> None:
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
        try:
            data = json.loads(path.read_text())
            if data["version"] != CACHE_VERSION:
                return {}
            return {
                device: {key: {int(b): str(name) for b, name in choice.items()} for key, choice in layers.items()}
                for device, layers in data["devices"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a tuning cache ({error}): delete it or name another file") from error
