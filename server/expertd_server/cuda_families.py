"""The shapes of tiles that the kernels were compiled for, and how many tiles a call has with each."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_server.cuda_extension import _cuda
from expertd_server.types import LayerSpec

__all__ = ["FAMILIES", "Family", "expected_token_tiles", "likely_token_tiles", "max_rows", "max_token_tiles"]

_BLOCK_TOKENS = 2048
"""Tokens of one expert that share a pass over its weights: what their rows fill stays in L2."""
_LIKELY = 0.6
"""How probable it must be that an expert is chosen at all, for a guess of which weights come first."""


@dataclass(frozen=True)
class Family:
    """One shape of tile of the matrix products. All families give the same bits."""

    index: int
    name: str
    tile_m: int
    tile_n: int
    tile_quantum: int
    warpgroups: int
    ctas_per_sm: int
    cluster: int
    """CTAs that work side by side on as many token tiles of one expert, and share its weights."""

    @property
    def tiles_per_block(self) -> int:
        """Token tiles of an expert that share a pass over its weights."""
        return max(1, _BLOCK_TOKENS // self.tile_n // self.cluster) * self.cluster

    @property
    def weight_box(self) -> int:
        """Weight rows that one CTA loads at a time: for one warpgroup, and all of its cluster."""
        return self.tile_m // self.warpgroups // self.cluster

    def ready_count(self, weight_rows: int) -> int:
        """What a token tile's counter reaches when the first product is done with it: one for each warpgroup."""
        return -(-weight_rows // self.tile_m) * self.warpgroups


FAMILIES = {f[0]: Family(i, *f) for i, f in enumerate(_cuda.families())}


def max_rows(spec: LayerSpec, num_tokens: int) -> int:
    """Rows of the products, one for each (token, local expert) pair, that num_tokens may lead to."""
    return num_tokens * min(spec.top_k, spec.num_local)


def max_token_tiles(spec: LayerSpec, num_tokens: int, family: Family) -> int:
    """Token tiles that num_tokens may lead to, whatever the routing."""
    rows = max_rows(spec, num_tokens)
    tiles = rows // family.tile_n + family.cluster * min(spec.num_local, rows)
    return tiles // family.cluster * family.cluster  # whole clusters, so as many as that at most


def likely_token_tiles(spec: LayerSpec, num_tokens: int, family: Family) -> int:
    """Token tiles that each expert has if all are equally chosen; 0 where many experts go without a token."""
    chosen = 1 - (1 - spec.top_k / spec.num_experts) ** num_tokens
    clusters = -(-num_tokens * spec.top_k // (spec.num_experts * family.tile_n * family.cluster))
    return clusters * family.cluster if chosen >= _LIKELY else 0


def expected_token_tiles(spec: LayerSpec, num_tokens: int, family: Family) -> float:
    """Token tiles of a call that is routed evenly, about."""
    rows = num_tokens * spec.top_k * spec.num_local / spec.num_experts
    return max(min(rows, spec.num_local), rows / family.tile_n)
