"""The engine: gathers the requests of a batch, runs the layer once, hands every request its own rows.

Requests share a batch as widely as their arithmetic allows. Hidden states become FP8 and logits become ids and bfloat16
weights row by row, exactly as the backend would do it, so callers with different input types, routed by the server
or by themselves, still run together; each gets its own output type, rounded from float32 once. (Where the backend
routes with kernels of its own, those that are routed already run among themselves.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch

from expertd_server import routing
from expertd_server.batcher import Batch, Batcher, Limits
from expertd_server.errors import BackendError, ExpertdServerError
from expertd_server.fp8 import quantize_fp8
from expertd_server.layer import MoELayer

__all__ = ["Engine", "ForwardCall", "ForwardResult", "ForwardTiming", "HostTensor"]


@dataclass(frozen=True, slots=True)
class HostTensor:
    """Somebody else's bytes as a tensor: dense, row-major, little-endian, read-only."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | memoryview

    def copy_to(self, destination: torch.Tensor) -> None:
        """Write the elements into a contiguous host tensor of the same dtype and shape."""
        np.copyto(destination.reshape(-1).view(torch.uint8).numpy(), np.frombuffer(self.data, np.uint8))

    def to_tensor(self) -> torch.Tensor:
        """A torch tensor of its own memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(tensor)
        return tensor


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """One checked request. T num_tokens, H hidden_size, E num_experts, K top_k."""

    layer: MoELayer
    hidden_states: HostTensor
    """[T, H] float8_e4m3fn, or bfloat16, float16, float32 where the layer has a hidden_states_scale."""
    routing_logits: HostTensor | None = None
    """[T, E] float32 or bfloat16; or topk_ids and topk_weights."""
    topk_ids: HostTensor | None = None
    """[T, K] int32."""
    topk_weights: HostTensor | None = None
    """[T, K] float32 or bfloat16."""
    output_dtype: torch.dtype = torch.bfloat16
    do_finalize: bool = True
    return_routing: bool = False

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]


@dataclass(frozen=True, slots=True)
class ForwardTiming:
    """Where a request's time went, in microseconds, and in what company it ran; the proto's Timing has the words."""

    queue_us: int
    copy_in_us: int
    compute_us: int
    copy_out_us: int
    batch_tokens: int
    batch_requests: int


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """The answer to one call, in host memory of its own; the tensors that were not asked for are None."""

    weights_version: int
    timing: ForwardTiming
    output: torch.Tensor | None = None
    """[T, H] in the asked dtype."""
    gemm2_output: torch.Tensor | None = None
    """[P, H] bfloat16: the rows of this request alone, by local expert, then by slot; no padding."""
    expert_weights: torch.Tensor | None = None
    """[T, K] bfloat16."""
    topk_ids: torch.Tensor | None = None
    """[T, K] int32."""
    expanded_idx_to_permuted_idx: torch.Tensor | None = None
    """[T * K] int32."""


@dataclass(frozen=True, slots=True)
class _Key:
    """What requests must have in common to share a batch."""

    layer: MoELayer
    do_finalize: bool
    is_routed: bool
    """Always False where the engine can route as the backend does: then either kind may run with the other."""


class Engine:
    """Runs calls in batches on the layers' backend.

    on_batch: for metrics; called after each batch was answered with its layer, its numbers of requests and tokens, and
    the ids that were selected: tensors [T, K] int32 on the host, none when the batch failed.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        on_batch: Callable[[MoELayer, int, int, Sequence[torch.Tensor]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_batch = on_batch
        self._clock = clock
        # Written and read by the batcher's thread alone. More than one when members had to run singly.
        self._selected_ids: list[torch.Tensor] = []
        self.batcher: Batcher[ForwardCall, ForwardResult] = Batcher(
            self._run, limits, on_batch=self._after_batch, clock=clock
        )

    def submit(self, call: ForwardCall, deadline_s: float | None = None) -> Future[ForwardResult]:
        """Queue a call; errors, deadline and cancellation as in `Batcher.submit`."""
        key = _Key(call.layer, call.do_finalize, call.topk_ids is not None and not call.layer.routes_by_torch)
        return self.batcher.submit(key, call, call.num_tokens, deadline_s=deadline_s)

    def _run(self, batch: Batch[ForwardCall, ForwardResult]) -> list[ForwardResult]:
        calls = [entry.payload for entry in batch.entries]
        layer = calls[0].layer
        try:
            results = self._forward(layer, calls)
        except ExpertdServerError:
            raise
        except Exception as error:
            raise BackendError(
                f"layer {layer.name!r}: the {layer.backend.name} backend failed on {batch.num_tokens} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error
        return [
            replace(result, timing=replace(result.timing, queue_us=_us(entry.queued_s)))
            for entry, result in zip(batch.entries, results, strict=True)
        ]

    def _forward(self, layer: MoELayer, calls: Sequence[ForwardCall]) -> list[ForwardResult]:
        device = layer.backend.device
        finalize = calls[0].do_finalize
        dtypes = {call.output_dtype for call in calls}
        # A mixed batch is rounded call by call from float32; that gives the bits of a batch of one dtype.
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

        start_s = self._clock()
        hidden_states = _gather_hidden_states(layer, calls).to(device)
        route = {name: tensor.to(device) for name, tensor in _gather_routing(layer, calls, device).items()}
        copied_s = self._clock()
        answer = layer.forward(hidden_states, **route, output_dtype=dtype, do_finalize=finalize)
        topk_ids = answer.topk_ids.cpu()  # waits for the device
        computed_s = self._clock()

        self._selected_ids.append(topk_ids)
        expert_weights = answer.expert_weights.cpu()
        outputs = [part.cpu() for part in (answer.output, answer.gemm2_output) if part is not None]
        rows = answer.expanded_idx_to_permuted_idx
        host_rows = None if rows is None else rows.cpu().view(-1, layer.spec.top_k)
        parts: list[dict[str, torch.Tensor | None]] = []
        first = 0
        for call in calls:
            mine = slice(first, first + call.num_tokens)
            first += call.num_tokens
            part: dict[str, torch.Tensor | None] = {}
            if host_rows is None:
                part["output"] = _own(outputs[0][mine], call.output_dtype, alone=len(calls) == 1)
            else:
                part["gemm2_output"], part["expanded_idx_to_permuted_idx"] = _own_rows(
                    outputs[0], host_rows[mine], topk_ids[mine]
                )
            if call.return_routing or not finalize:
                part["expert_weights"] = expert_weights[mine].clone()
            if call.return_routing:
                part["topk_ids"] = topk_ids[mine].clone()
            parts.append(part)
        split_s = self._clock()

        timing = ForwardTiming(
            queue_us=0,
            copy_in_us=_us(copied_s - start_s),
            compute_us=_us(computed_s - copied_s),
            copy_out_us=_us(split_s - computed_s),
            batch_tokens=first,
            batch_requests=len(calls),
        )
        return [ForwardResult(layer.weights_version, timing, **part) for part in parts]

    def _after_batch(self, batch: Batch[ForwardCall, ForwardResult], _ran_s: float) -> None:
        selected_ids, self._selected_ids = self._selected_ids, []
        if self._on_batch is not None:
            layer = batch.entries[0].payload.layer
            self._on_batch(layer, len(batch.entries), batch.num_tokens, selected_ids)


def _gather_hidden_states(layer: MoELayer, calls: Sequence[ForwardCall]) -> torch.Tensor:
    """[T, H] of the whole batch: in the callers' dtype where they agree, else FP8."""
    dtypes = {call.hidden_states.dtype for call in calls}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float8_e4m3fn
    gathered = torch.empty((sum(call.num_tokens for call in calls), layer.spec.hidden_size), dtype=dtype)
    first = 0
    for call in calls:
        rows = gathered[first : first + call.num_tokens]
        first += call.num_tokens
        if call.hidden_states.dtype == dtype:
            call.hidden_states.copy_to(rows)
        else:
            assert layer.hidden_states_scale is not None, "the service refuses such a call"
            rows.copy_(quantize_fp8(call.hidden_states.to_tensor(), layer.hidden_states_scale))
    return gathered


def _gather_routing(layer: MoELayer, calls: Sequence[ForwardCall], device: torch.device) -> dict[str, torch.Tensor]:
    """The routing arguments of the whole batch: logits where every caller gave them, else ids and weights."""
    logits = [call.routing_logits for call in calls]
    if all(tensor is not None for tensor in logits):
        # float32 holds every bfloat16 exactly, and routing is float32 arithmetic anyway.
        return {"routing_logits": torch.cat([t.to_tensor().float() for t in logits if t is not None])}
    ids: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    for call in calls:
        if call.routing_logits is not None:
            # NOTE: on the backend's device, whose exponential may differ from the host's in the last bit.
            call_logits = call.routing_logits.to_tensor().to(device)
            call_ids, call_weights = routing.route(layer.spec, call_logits, layer.routing_bias)
        else:
            assert call.topk_ids is not None
            assert call.topk_weights is not None
            call_ids, call_weights = call.topk_ids.to_tensor().to(device), call.topk_weights.to_tensor().to(device)
        ids.append(call_ids)
        weights.append(call_weights.to(torch.bfloat16))
    return {"topk_ids": torch.cat(ids), "topk_weights": torch.cat(weights)}


def _own(rows: torch.Tensor, dtype: torch.dtype, *, alone: bool) -> torch.Tensor:
    """The rows in memory of their own: a slow reader must not hold the whole batch's output."""
    return rows.to(dtype) if alone or rows.dtype != dtype else rows.clone()


def _own_rows(
    gemm2_output: torch.Tensor, rows: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call's share of the unfinalised output: its rows by expert, then by slot, and where each slot's row went.

    gemm2_output [P, H] of the batch; rows [T, K] int32 into it, -1: none; topk_ids [T, K].
    """
    flat_rows, flat_ids = rows.reshape(-1), topk_ids.reshape(-1)
    held = (flat_rows >= 0).nonzero().view(-1)
    # The order is ours, not the batch's, so that the answer's bytes do not depend on the company.
    order = held[torch.sort(flat_ids[held], stable=True).indices]
    expanded = torch.full_like(flat_rows, -1)
    expanded[order] = torch.arange(order.numel(), dtype=expanded.dtype)
    return gemm2_output[flat_rows[order].long()], expanded


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
