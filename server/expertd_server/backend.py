"""What every backend offers, and which one serves a device."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["Backend", "MoEOutput", "PreparedLayer", "select_backend"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MoEOutput:
    """What a layer returns. T num_tokens, K top_k, H hidden_size."""

    topk_ids: torch.Tensor
    """[T, K] int32 global expert ids in slot order (-1: empty slot of pre-routed input)."""
    expert_weights: torch.Tensor
    """[T, K] bfloat16."""
    output: torch.Tensor | None = None
    """[T, H] in the asked dtype; None when do_finalize is False."""
    gemm2_output: torch.Tensor | None = None
    """[P, H] bfloat16, grouped by local expert in ascending id; only when do_finalize is False."""
    expanded_idx_to_permuted_idx: torch.Tensor | None = None
    """[T * K] int32, -1 where the expert is not local; only when do_finalize is False."""


@dataclass(frozen=True)
class PreparedLayer:
    """A layer in the form that its backend computes with. Opaque to everybody else."""

    spec: LayerSpec
    weights: ExpertWeights
    """Scales, bias and, where the backend reads them as they are, the FP8 weights."""
    nbytes: int
    """Bytes that this layer holds on the backend's device, weights included."""
    state: Any = None
    """The backend's own."""


class Backend(Protocol):
    """Runs layers on one device. Calls may come from any thread, one at a time for each backend object."""

    name: str
    """"cpu", "torch", "cuda" or, in benchmarks, "noop", as in GetServerInfo."""
    device: torch.device

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        """Move, convert and plan a layer for calls of up to max_num_tokens tokens (more are cut into chunks).

        Raises ValueError naming hidden_size or intermediate_size and the multiple it needs where it cannot be tiled.
        """
        ...

    def tune(self, layer: PreparedLayer, tune_max_num_tokens: int = 8192) -> dict[int, str]:
        """Measure what is fastest for up to so many tokens, and use it from now on; bits do not depend on it.

        Returns {tokens: choice}, empty on backends that have no choice.
        """
        ...

    def forward(
        self,
        layer: PreparedLayer,
        hidden_states: torch.Tensor,
        *,
        routing_logits: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        do_finalize: bool = True,
        out: torch.Tensor | None = None,
        routing_replay_out: torch.Tensor | None = None,
        num_valid_tokens: torch.Tensor | None = None,
        enable_pdl: bool | None = None,
    ) -> MoEOutput:
        """Run the layer on checked arguments (see `checks.check_forward_args`).

        hidden_states: [T, H] float8_e4m3fn, or bfloat16, float16, float32 where the weights have hidden_states_scale.
        routing_logits: [T, E] float32 or bfloat16; or topk_ids [T, K] int32 with topk_weights [T, K] float32 or
        bfloat16 (rounded to bfloat16 on entry).
        out: [T, H] in output_dtype, written and returned.
        routing_replay_out: int16 [>= T, K], rows [0, T) get the selected ids.
        num_valid_tokens: int32 scalar tensor on the device, at most T; rows at or past it are neither read nor written.
        """
        ...


def select_backend(device: torch.device | str = "auto", *, tuning_cache: Path | None = None) -> Backend:
    """The best backend for a device: "cuda" on a Hopper GPU whose kernels are installed, "torch" on any other CUDA
    device (and its log says why), "cpu" on the CPU (and its log says how).

    device: "cpu", "cuda", "cuda:1", ..., "auto": the current CUDA device where torch sees one, else the CPU; or "noop",
    which answers with zeros, for benchmarks.
    tuning_cache: file of measured choices, for "cuda"; see `tuning.TuningCache`.
    Raises ValueError, naming the device, where there is no such device.
    """
    # Imported here: the backends import this module, and the kernels exist only where they were compiled.
    from expertd_server import cpu_experts  # noqa: PLC0415
    from expertd_server.backend_cpu import TorchBackend  # noqa: PLC0415

    if device == "noop":
        from expertd_server.backend_noop import NoopBackend  # noqa: PLC0415

        return NoopBackend()
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        backend = TorchBackend(device)
        _log.info("backend 'cpu': %s", cpu_experts.how(backend.unit))
        return backend
    if device.type != "cuda" or not has_cuda:
        raise ValueError(f"device is {device}, expected {'auto, cpu or cuda' if has_cuda else 'cpu (no CUDA device)'}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    reason = _why_no_kernels(device)
    if reason is None:
        from expertd_server.backend_cuda import CudaBackend  # noqa: PLC0415

        return CudaBackend(device, tuning_cache=tuning_cache)
    _log.warning("backend 'torch' (plain torch, not the Hopper kernels) on %s: %s", device, reason)
    return TorchBackend(device)


def _why_no_kernels(device: torch.device) -> str | None:
    """None where the Hopper kernels run on this CUDA device, else the reason why they do not."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, the kernels need 9.0"
    if importlib.util.find_spec("expertd_server._cuda") is None:
        return "expertd_server._cuda is not installed; install with EXPERTD_CUDA=on where nvcc is found"
    return None
