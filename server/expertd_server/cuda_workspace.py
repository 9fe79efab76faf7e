"""The scratch memory of the CUDA backend: its parts, its owners, and the addresses that kernels are given."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from expertd_server.cuda_extension import _cuda
from expertd_server.cuda_families import FAMILIES, Family, max_rows, max_token_tiles
from expertd_server.types import Activation, LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["CudaLayer", "Plan", "Scratch", "Workspaces", "tensor_maps"]

_ALIGN = 256


@dataclass(frozen=True)
class Scratch:
    """Where the parts of the scratch memory lie, in bytes from its start."""

    offsets: dict[str, int]
    nbytes: int

    @classmethod
    def of(cls, spec: LayerSpec, num_tokens: int, *, quantizes: bool) -> Scratch:
        """What calls of up to num_tokens need. quantizes: their hidden states may have to become fp8 first."""
        rows = max_rows(spec, num_tokens)
        blocks = _cuda.max_route_blocks(num_tokens)
        tiles = max(max_token_tiles(spec, num_tokens, f) for f in FAMILIES.values())
        sizes = {
            "schedule": _cuda.SCHEDULE_BYTES,
            "tiles": tiles * _cuda.TOKEN_TILE_BYTES,
            "tile_ready": tiles * 4,
            "counts": blocks * spec.num_local,
            "expanded_to_row": num_tokens * spec.top_k * 4,
            "row_token": rows * 4,
            "row_weight": rows * 4,
            "hidden_states": num_tokens * spec.hidden_size if quantizes else 0,
            "inter": rows * spec.intermediate_size,
            "rows": rows * spec.hidden_size * 2,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // _ALIGN) * _ALIGN
        return cls(offsets, at)


class Workspaces:
    """One slab of device memory per stream, shared by the layers that run there one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._nbytes = 0
        self._slabs: dict[int, torch.Tensor] = {}
        self._retired: list[torch.Tensor] = []

    def reserve(self, nbytes: int) -> None:
        """Every slab from now on has at least nbytes."""
        self._nbytes = max(self._nbytes, nbytes)

    def current(self, nbytes: int = 0) -> torch.Tensor:
        """The current stream's slab, of nbytes at least. Allocates only where the stream has none as large."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        slab = self._slabs.get(stream)
        if slab is None or slab.numel() < max(nbytes, self._nbytes):
            with self._lock:
                if slab is not None:
                    self._retired.append(slab)  # NOTE: captured graphs keep its address, so it is never freed
                self._nbytes = max(self._nbytes, nbytes)
                slab = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
                self._slabs[stream] = slab
        return slab

    def poison(self, byte: int = 0xFF) -> None:
        """Fill every slab with a byte; the default makes NaN in fp8, bfloat16 and float32."""
        for slab in self._slabs.values():
            slab.fill_(byte)


@dataclass(frozen=True)
class Plan:
    """Addresses for a layer in one slab, and the tensor maps that hold them."""

    schedule: int
    tiles: int
    tile_ready: int
    counts: int
    expanded_to_row: int
    row_token: int
    row_weight: int
    hidden_states: int
    inter: int
    rows: int
    tensor_maps: torch.Tensor
    """[families, 2 products, 3 maps, bytes] on the host: weights, token tile, part of a token tile."""

    def maps(self, family: Family, product: int) -> int:
        """Host address of the three maps of a product."""
        return self.tensor_maps.data_ptr() + (family.index * 2 + product) * 3 * _cuda.TENSOR_MAP_BYTES

    def with_results(self, rows: torch.Tensor, expanded_to_row: torch.Tensor | None) -> Plan:
        """The same plan, writing the second product's rows and their places to tensors of the caller's."""
        fields = {**self.__dict__, "rows": rows.data_ptr()}
        if expanded_to_row is not None:
            fields["expanded_to_row"] = expanded_to_row.data_ptr()
        return Plan(**fields)


@dataclass
class CudaLayer:
    """What CudaBackend keeps for a layer."""

    spec: LayerSpec
    weights: ExpertWeights
    max_num_tokens: int
    tuned: dict[int, str] | None = None
    _scratch: dict[int, Scratch] = field(default_factory=dict)
    _plans: dict[tuple[int, int], Plan] = field(default_factory=dict)

    def scratch(self, num_tokens: int) -> Scratch:
        """The layout for calls of num_tokens."""
        found = self._scratch.get(num_tokens)
        if found is None:
            quantizes = self.weights.hidden_states_scale is not None
            found = self._scratch[num_tokens] = Scratch.of(self.spec, num_tokens, quantizes=quantizes)
        return found

    def plan(self, slab: torch.Tensor, num_tokens: int) -> Plan:
        """The layer's addresses and tensor maps in a slab."""
        key = (slab.data_ptr(), num_tokens)
        found = self._plans.get(key)
        if found is None:
            base = slab.data_ptr()
            addresses = {name: base + offset for name, offset in self.scratch(num_tokens).offsets.items()}
            maps = tensor_maps(self.spec, self.weights, addresses["inter"], max_rows(self.spec, num_tokens))
            found = self._plans[key] = Plan(**addresses, tensor_maps=maps)
        return found


def tensor_maps(spec: LayerSpec, weights: ExpertWeights, inter: int, rows: int) -> torch.Tensor:
    """`Plan.tensor_maps` of a layer's weights on the device and of the rows [rows, I] fp8 at `inter`, an address."""
    size = _cuda.TENSOR_MAP_BYTES
    maps = torch.zeros(len(FAMILIES), 2, 3, size, dtype=torch.uint8)
    w1, w2 = weights.gemm1_weights.data_ptr(), weights.gemm2_weights.data_ptr()
    experts, hidden, intermediate = spec.num_local, spec.hidden_size, spec.intermediate_size
    for family in FAMILIES.values():
        at = maps[family.index].data_ptr()
        if spec.activation in (Activation.SWIGLU, Activation.GEGLU):
            _cuda.encode_gate_up(at, w1, experts, intermediate, hidden, family.weight_box)
        else:
            _cuda.encode_weight_rows(at, w1, experts, intermediate, hidden, family.weight_box)
        at += 3 * size
        _cuda.encode_weight_rows(at, w2, experts, hidden, intermediate, family.weight_box)
        _cuda.encode_rows(at + size, inter, rows, intermediate, family.tile_n)
        _cuda.encode_rows(at + 2 * size, inter, rows, intermediate, family.tile_quantum)
    return maps
