"""Other programs that compute the same layer on the same GPU, for columns of bench_kernels.py, where installed.

A peer is a module here with one function, `prepare`. It gets FP8 hidden states, ids and weights; routing is done for it
by the routing kernel of expertd, inside the measured graph, so that every column goes from logits to bfloat16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

from .skipped import PeerSkippedError

__all__ = ["PEERS", "PeerLayer", "PeerSkippedError", "open_peer"]

PEERS = {"torch": "torch_grouped", "vllm": "vllm_triton", "flashinfer": "flashinfer_cutlass"}
"""Names of columns, and the modules that fill them."""

PeerLayer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""hidden_states [T, H] fp8, topk_ids [T, K] int32 global, topk_weights [T, K] float32 -> [T, H] bfloat16.

It can be captured in a CUDA graph and holds what such a graph reads."""


def open_peer(name: str, spec: LayerSpec, weights: ExpertWeights) -> PeerLayer:
    """A peer's layer with these weights. Raises PeerSkippedError with the reason why it cannot be measured here."""
    try:
        module = importlib.import_module(f"{__name__}.{PEERS[name]}")
        layer: PeerLayer = module.prepare(spec, weights)
    except PeerSkippedError:
        raise
    except Exception as error:  # of somebody else's program: the kernels are measured all the same
        raise PeerSkippedError(f"{type(error).__name__}: {error}") from error
    return layer
