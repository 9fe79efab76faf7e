"""What a layer's kernels, the transport and the client take, as fitted to measured runs.

The numbers lie in plan_figures.json, which benchmarks/fit_plan_figures.py writes from the results of the benchmarks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from expertd_server.errors import ConfigError
from expertd_server.types import LayerSpec

__all__ = [
    "Client",
    "Figures",
    "Gpu",
    "KernelWork",
    "Kernels",
    "Serving",
    "Transport",
    "load_figures",
    "weight_bytes_per_expert",
]


def weight_bytes_per_expert(spec: LayerSpec) -> int:
    """Bytes of one expert's FP8 weights."""
    return (spec.gemm1_rows + spec.intermediate_size) * spec.hidden_size


@dataclass(frozen=True, kw_only=True)
class KernelWork:
    """What one call of a layer cannot do without."""

    read_bytes: float
    """Weights of the touched experts, FP8 tokens in, bfloat16 tokens out."""
    flops: float
    row_bytes: float
    """Of the rows between the kernels: FP8 gathered and activated, bfloat16 before the sum; written and read."""

    @classmethod
    def of(cls, spec: LayerSpec, *, tokens: float, rows: float, touched: float) -> KernelWork:
        """tokens: rows of the batch. rows: (token, local expert) pairs. touched: local experts that got any."""
        per_expert = weight_bytes_per_expert(spec)
        return cls(
            read_bytes=touched * per_expert + 3 * tokens * spec.hidden_size,
            flops=2 * rows * per_expert,
            row_bytes=rows * (5 * spec.hidden_size + 2 * spec.intermediate_size),
        )


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The time of a layer on one kind of GPU. The factors say how far from the ceilings the kernels are."""

    read_gbs: float
    fp8_tflops: float
    launch_us: float
    read_factor: float
    math_factor: float
    rows_factor: float
    blend: float
    """Reading and arithmetic overlap: 1 would add them, infinity take the longer one."""

    def layer_us(self, work: KernelWork) -> float:
        """Microseconds from routing logits to bfloat16 output, cold weights, CUDA graph."""
        read = self.read_factor * work.read_bytes / self.read_gbs / 1e3
        math = self.math_factor * work.flops / self.fp8_tflops / 1e6
        rows = self.rows_factor * work.row_bytes / self.read_gbs / 1e3
        longer, shorter = max(read, math), min(read, math)
        share: float = shorter / longer if longer else 0.0
        blended: float = longer * (1 + share**self.blend) ** (1 / self.blend)
        return self.launch_us + blended + rows


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    gpu: str
    source: str
    time: str
    is_scaled: bool
    """True: the kernels were timed on another GPU; only the ceilings are this one's."""
    memory_bytes: int
    kernels: Kernels
    cells: int
    """Measured cells that the fit is of."""
    rms_error: float
    worst_error: float
    """Of the fit over its cells, as a share."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """Routing, splitting and summing on the client, in one thread."""

    source: str
    call_us: float
    value_ns: float
    """For each returned value: tokens times shards that they need times hidden_size."""
    worst_error: float


@dataclass(frozen=True, kw_only=True)
class Serving:
    """gRPC of a server with a number of serving processes that was measured, without a network."""

    processes: int
    server_gbs: float
    """Most GB/s of requests and answers together."""
    exchange_us: float
    """One request in flight on an open stream, whatever its size."""
    exchange_byte_ns: float
    """For each byte of request and answer."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """gRPC without a network, and copies to and from the GPU."""

    source: str
    servings: tuple[Serving, ...]
    """Ascending in processes, from 1."""
    copies_us: float
    copies_byte_ns: float
    """For each byte in or out."""

    def serving(self, processes: int) -> Serving:
        """The measured one with the most processes up to so many: nothing is promised that was not seen."""
        return [serving for serving in self.servings if serving.processes <= processes][-1]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything in the file."""

    gpus: dict[str, Gpu]
    client: Client
    transport: Transport

    def gpu(self, name: str) -> Gpu:
        """Figures of one kind of GPU. Raises ConfigError naming those that there are."""
        if name not in self.gpus:
            raise ConfigError(f"gpu is {name!r}, expected one of {', '.join(self.gpus)}")
        return self.gpus[name]


def load_figures() -> Figures:
    """The figures that came with the package."""
    text = resources.files("expertd_server").joinpath("plan_figures.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    transport = document["transport"]
    servings = tuple(Serving(**serving) for serving in transport["servings"])
    return Figures(
        gpus={name: Gpu(**(gpu | {"kernels": Kernels(**gpu["kernels"])})) for name, gpu in document["gpus"].items()},
        client=Client(**document["client"]),
        transport=Transport(**(transport | {"servings": servings})),
    )
