"""Why a peer is not measured, and what all of them ask of a layer."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from expertd_server.types import Activation, LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["PeerSkippedError", "installed", "one_inter_scale", "require_swiglu"]


class PeerSkippedError(Exception):
    """A peer cannot be measured here; the message says why."""


def installed(name: str) -> ModuleType:
    """The package of a peer. Raises PeerSkippedError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerSkippedError(f"{name} is not installed ({error}); pip install {name.partition('.')[0]}") from error


def require_swiglu(spec: LayerSpec) -> None:
    """Raises PeerSkippedError for other activations."""
    if spec.activation is not Activation.SWIGLU:
        raise PeerSkippedError(f"activation is {spec.activation.name}, this peer is measured with SWIGLU alone")


def one_inter_scale(weights: ExpertWeights) -> torch.Tensor:
    """What an intermediate value of 1 is divided by before it becomes FP8, [] float32; peers take one for all experts.

    Raises PeerSkippedError where experts differ.
    """
    scales = weights.output1_scales_gate_scalar / weights.output1_scales_scalar
    if not torch.allclose(scales, scales[0], rtol=1e-6):
        raise PeerSkippedError("the scales of the intermediate differ between experts, this peer takes one for all")
    return scales[0]
