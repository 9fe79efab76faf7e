"""The engine: gathers the requests of a batch in a staging slot, runs the layer once, hands every request its own rows.

On the CPU requests share a batch as widely as their arithmetic allows. Hidden states become FP8 and logits become ids
and bfloat16 weights row by row, exactly as the backend would do it, so callers with different input types, routed by
the server or by themselves, still run together; each gets its own output type, rounded from float32 once.

A GPU rounds for itself, faster than the host and not always to the same last bit. There, requests share a batch when
their types agree; the batch is one copy in, one graph and one copy out, and two batches are in flight.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from expertd_server import routing
from expertd_server.backend import Backend, MoEOutput
from expertd_server.batcher import Batch, Batcher, Limits
from expertd_server.errors import BackendError, ExpertdServerError
from expertd_server.fp8 import quantize_fp8
from expertd_server.graphs import Capturer, CudaCapturer, Graphs, progress_bar, run_layer
from expertd_server.layer import MoELayer
from expertd_server.layout import (
    NUM_VALID_BYTES,
    BatchKind,
    InputLayout,
    OutputLayout,
    input_layout,
    output_layout,
    slot_bytes,
)
from expertd_server.native import copy_bytes
from expertd_server.promise import Promise
from expertd_server.staging import Slot, SlotPool, make_slots
from expertd_server.timing import ForwardTiming

__all__ = ["BatchReport", "Engine", "ForwardCall", "ForwardResult", "ForwardTiming", "HostTensor"]

# A GPU computes one batch while the next is gathered and copied. More would only make batches smaller.
_IN_FLIGHT_ON_DEVICE = 2
# Of inputs of different sizes, for each slot.
_MOST_VIEWS = 256
# Longer than any capture keeps a slot to itself.
_SLOT_TIMEOUT_S = 30.0


@dataclass(slots=True)  # not frozen, which makes making one take three times as long; likewise below
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


@dataclass(slots=True)
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
    encode: Callable[[ForwardResult], Any] | None = None
    """What to make of the answer where it lies, in whichever thread finishes the batch. The promise is then kept with
    what this returns, and the tensors it is given are valid during the call alone; None: with the ForwardResult."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]


@dataclass(slots=True)
class ForwardResult:
    """The answer to one call, in host memory of its own, but see `ForwardCall.encode`; the tensors that were not asked
    for are None."""

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
class BatchReport:
    """What one batch did, for metrics."""

    layer: MoELayer
    num_requests: int
    num_tokens: int
    graph_rows: int | None
    """Rows of the graph that was replayed, padding included; None: it ran without one."""
    compute_s: float
    """How long it had the device to itself."""
    topk_ids: torch.Tensor
    """[T, K] int32 or int16 on the host, the experts that were selected; valid during the call alone."""


class _Key(NamedTuple):
    """What requests must have in common to share a batch."""

    layer: MoELayer
    do_finalize: bool
    kind: BatchKind | None
    """None on the CPU, where any kind may run with any other."""


class Engine:
    """Runs calls in batches on one backend.

    limits: max_in_flight is the engine's to choose. max_graph_tokens: rows of the largest CUDA graph; 0: none.
    on_batch: for metrics; called after a batch was answered, on a thread of the batcher.
    slots, capturer: by default those of the backend's device.
    """

    def __init__(
        self,
        limits: Limits,
        backend: Backend,
        *,
        max_graph_tokens: int = 0,
        on_batch: Callable[[BatchReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        slots: Sequence[Slot] | None = None,
        capturer: Capturer | None = None,
    ) -> None:
        self._backend = backend
        self._max_batch_tokens = limits.max_batch_tokens
        self.on_batch = on_batch
        self.clock = clock
        self._is_host = backend.device.type == "cpu" if slots is None else slots[0].is_host
        limits = replace(limits, max_in_flight=1 if self._is_host else _IN_FLIGHT_ON_DEVICE)
        if slots is None:
            # Batches in flight, and one whose answers are being handed out.
            slots = make_slots(backend.device, 1 if self._is_host else _IN_FLIGHT_ON_DEVICE + 1, clock)
        self.slots = SlotPool(slots)
        if capturer is None and backend.name == "cuda" and max_graph_tokens:
            capturer = CudaCapturer(backend.device)
        self.graphs: Graphs | None = None
        if capturer is not None:
            self.graphs = Graphs(self.slots, min(max_graph_tokens, limits.max_batch_tokens), capturer)
        self._views: dict[int, _SlotViews] = {}
        self._met: WeakSet[MoELayer] = WeakSet()
        self._met_lock = threading.Lock()  # a scrape of the metrics goes through them while batches add to them
        self.batcher: Batcher[ForwardCall, Any] = Batcher(self._launch, limits, clock=clock)

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return self.batcher.queue_tokens

    def submit(self, call: ForwardCall, deadline_s: float | None = None) -> Promise[Any]:
        """Queue a call; a promise of a ForwardResult, or of what call.encode makes of it.

        Errors, deadline and cancellation as in `Batcher.submit`.
        """
        kind = None if self._is_host else _kind_of([call])
        return self.batcher.submit(
            _Key(call.layer, call.do_finalize, kind), call, call.num_tokens, deadline_s=deadline_s
        )

    def hurry(self) -> None:
        """See `Batcher.hurry`."""
        self.batcher.hurry()

    def capture(self, layers: Sequence[MoELayer]) -> None:
        """Take the memory that these layers' batches need and capture their graphs, so that no request waits for it.

        A layer that is not captured here runs all the same. Requests may be served meanwhile. Raises BackendError.
        """
        for layer in layers:
            self._meet(layer)
        if self.graphs is not None:
            with progress_bar(self.graphs.count_usual(layers)) as advance:
                self.graphs.capture(layers, advance)

    def device_memory(self) -> dict[str, int]:
        """Bytes of a CUDA device's memory by purpose: weights, staging, graphs, and workspace, which is all else that
        tensors hold. Empty on the CPU."""
        if self._backend.device.type != "cuda":
            return {}
        with self._met_lock:
            layers = list(self._met)
        weights, staging = sum(layer.nbytes for layer in layers), self.slots.device_nbytes
        return {
            "weights": weights,
            "staging": staging,
            "graphs": 0 if self.graphs is None else self.graphs.nbytes,
            "workspace": max(0, torch.cuda.memory_allocated(self._backend.device) - weights - staging),
        }

    def _views_of(self, slot: Slot) -> _SlotViews:
        views = self._views.get(slot.index)
        if views is None or views.memory is not slot.host_in:  # it has grown
            views = self._views[slot.index] = _SlotViews(slot)
        return views

    def _meet(self, layer: MoELayer) -> None:
        """Before a layer's first batch."""
        if layer in self._met:
            return
        takes_wide = layer.hidden_states_scale is not None
        self.slots.require(*slot_bytes(layer.spec, self._max_batch_tokens, takes_wide=takes_wide))
        if self._backend.device.type == "cuda":
            # NOTE: the weights were written on the default stream, which the slots' streams do not wait for.
            torch.cuda.default_stream(self._backend.device).synchronize()
        with self._met_lock:
            self._met.add(layer)

    def _launch(self, batch: Batch[ForwardCall, Any]) -> _Running:
        layer = batch.entries[0].payload.layer
        with _Naming(layer, batch.num_tokens):
            self._meet(layer)
            slot = self.slots.take(_SLOT_TIMEOUT_S)
            try:
                return self._start(batch, slot)
            except BaseException:
                slot.settle()
                self.slots.give_back(slot)
                raise

    def _start(self, batch: Batch[ForwardCall, Any], slot: Slot) -> _Running:
        calls = [entry.payload for entry in batch.entries]
        layer, num_tokens = calls[0].layer, batch.num_tokens
        kind, do_finalize = _kind_of(calls), calls[0].do_finalize
        graph = None
        if self.graphs is not None and do_finalize:
            graph = self.graphs.find(slot, layer, kind, num_tokens)
        num_rows = num_tokens if graph is None else graph.num_rows
        inputs, outputs = input_layout(layer.spec, kind, num_rows), output_layout(layer.spec, kind, num_rows)

        start_s = self.clock()
        views = self._views_of(slot)
        _gather(views.host_in, inputs, layer, calls, num_tokens)
        slot.send(inputs.nbytes(num_tokens))
        sent_s = self.clock()
        answer: MoEOutput | None = None
        with slot.compute():
            if graph is not None:
                graph.replay()
                expert_weights = graph.expert_weights
            elif slot.is_host or not do_finalize:
                answer = layer.forward(
                    **views.arguments(inputs, num_rows),
                    output_dtype=kind.output_dtype,
                    do_finalize=do_finalize,
                )
            else:
                expert_weights = run_layer(slot, layer, kind, num_rows, is_padded=False).expert_weights
            if answer is None and any(call.return_routing for call in calls):
                copy = outputs.expert_weights.view(slot.device_out, num_tokens)
                copy.copy_(expert_weights[:num_tokens], non_blocking=True)
        slot.fetch(outputs.nbytes(num_tokens) if answer is None else 0)
        if self.graphs is not None and do_finalize and graph is None:
            self.graphs.capture_unforeseen(slot, layer, kind, num_tokens)
        return _Running(
            engine=self,
            batch=batch,
            slot=slot,
            outputs=outputs,
            answer=answer,
            gather_s=sent_s - start_s,
            graph_rows=None if graph is None else graph.num_rows,
        )


class _SlotViews:
    """A slot's memory as it is asked for; made once, because to make a tensor takes as long as to copy a small one."""

    def __init__(self, slot: Slot) -> None:
        self.memory = slot.host_in
        self.host_in = slot.host_in.numpy()
        self._device_in = slot.device_in
        self._arguments: dict[tuple[int, int], tuple[InputLayout, dict[str, torch.Tensor]]] = {}
        """By layout and rows; it keeps the layout, whose id is the key."""

    def arguments(self, layout: InputLayout, num_rows: int) -> dict[str, torch.Tensor]:
        """See `InputLayout.arguments`."""
        key = id(layout), num_rows
        found = self._arguments.get(key)
        if found is None:
            if len(self._arguments) >= _MOST_VIEWS:
                self._arguments.clear()
            found = self._arguments[key] = layout, layout.arguments(self._device_in, num_rows)
        return found[1]


@dataclass(eq=False, slots=True, kw_only=True)
class _Running:
    """A batch that was launched, see `batcher.Running`."""

    engine: Engine
    batch: Batch[ForwardCall, Any]
    slot: Slot
    outputs: OutputLayout
    answer: MoEOutput | None
    """None where the answer lies in the slot, by `outputs`."""
    gather_s: float
    """What the host took until the copy in was started."""
    graph_rows: int | None
    report: BatchReport | None = None

    @property
    def layer(self) -> MoELayer:
        return self.batch.entries[0].payload.layer

    def wait(self) -> None:
        with _Naming(self.layer, self.batch.num_tokens):
            self.slot.wait()

    def results(self) -> list[Any]:
        with _Naming(self.layer, self.batch.num_tokens):
            return self._split()

    def close(self) -> None:
        try:
            if self.report is not None and self.engine.on_batch is not None:
                self.engine.on_batch(self.report)
        finally:
            self.engine.slots.give_back(self.slot)

    def _split(self) -> list[Any]:
        batch, clock = self.batch, self.engine.clock
        start_s = clock()
        answer = self._host_answer()
        entries, layer = batch.entries, self.layer
        times = self.slot.times()
        num_requests, num_tokens = len(entries), batch.num_tokens
        self.report = BatchReport(layer, num_requests, num_tokens, self.graph_rows, times.compute_s, answer.topk_ids)
        copy_in_us, compute_us = _us(self.gather_s + times.copy_in_s), _us(times.compute_s)
        calls = [entry.payload for entry in entries]
        outputs = self._outputs(answer, calls)
        parts: list[Any] = []
        first = 0
        for number, (entry, call) in enumerate(zip(entries, calls, strict=True)):
            queue_us = _us(entry.queued_s + times.wait_s)
            timing = ForwardTiming(queue_us, copy_in_us, compute_us, 0, num_tokens, num_requests)
            part = ForwardResult(layer.weights_version, timing)
            if outputs is not None:
                part.output = outputs[number]
            if call.return_routing or not call.do_finalize:
                self._fill(part, call, answer, first)
            first += entry.num_tokens
            parts.append(part)
        # Last, and then nothing may go wrong any more: see _encoded.
        for number, call in enumerate(calls):
            parts[number].timing.copy_out_us = _us(times.copy_out_s + clock() - start_s)
            if call.encode is not None:
                parts[number] = _encoded(call.encode, parts[number])
        return parts

    def _outputs(self, answer: MoEOutput, calls: Sequence[ForwardCall]) -> Sequence[torch.Tensor] | None:
        """Each call's rows of the output, in its own type; None where the output is not summed."""
        output, entries = answer.output, self.batch.entries
        if output is None:
            return None
        is_owned = len(entries) == 1 and self.answer is not None
        rows = [output] if len(entries) == 1 else output.split_with_sizes([entry.num_tokens for entry in entries])
        dtype = output.dtype
        return [
            one
            if dtype == call.output_dtype and call.encode is not None
            # In memory of its own: a slow reader must not hold the whole batch's output.
            else _own(one, call.output_dtype, is_owned=is_owned)
            for one, call in zip(rows, calls, strict=True)
        ]

    def _fill(self, part: ForwardResult, call: ForwardCall, answer: MoEOutput, first: int) -> None:
        """Set the tensors of one call's answer but its output. first: where the call's rows begin."""
        mine = slice(first, first + call.num_tokens)
        if answer.expanded_idx_to_permuted_idx is not None:
            assert answer.gemm2_output is not None
            slots = answer.expanded_idx_to_permuted_idx.view(-1, self.layer.spec.top_k)
            part.gemm2_output, part.expanded_idx_to_permuted_idx = _own_rows(
                answer.gemm2_output, slots[mine], answer.topk_ids[mine]
            )
        if call.return_routing or not call.do_finalize:
            part.expert_weights = answer.expert_weights[mine].clone()
        if call.return_routing:
            part.topk_ids = answer.topk_ids[mine].to(torch.int32, copy=True)

    def _host_answer(self) -> MoEOutput:
        """The whole batch's answer on the host; where it lies in the slot, as views."""
        slot, outputs, num_tokens = self.slot, self.outputs, self.batch.num_tokens
        if self.answer is None:
            return MoEOutput(
                topk_ids=outputs.topk_ids.view(slot.host_out, num_tokens),
                expert_weights=outputs.expert_weights.view(slot.host_out, num_tokens),
                output=outputs.output.view(slot.host_out, num_tokens),
            )
        if slot.is_host:
            return self.answer
        on_host: dict[str, Any] = {
            name: None if tensor is None else slot.read(tensor) for name, tensor in vars(self.answer).items()
        }
        return MoEOutput(**on_host)


class _Naming:
    """Says which batch an unexpected error met. A class: a generator would take as long as what it surrounds."""

    __slots__ = ("_layer", "_num_tokens")

    def __init__(self, layer: MoELayer, num_tokens: int) -> None:
        self._layer = layer
        self._num_tokens = num_tokens

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, ExpertdServerError):
            layer = self._layer
            raise BackendError(
                f"layer {layer.name!r}: the {layer.backend.name} backend failed on {self._num_tokens} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error


def _encoded(encode: Callable[[ForwardResult], Any], result: ForwardResult) -> Any:
    """What a caller makes of its answer, or its error as a result: the batch must not run again, because answers may
    have been written over what they were computed from."""
    try:
        return encode(result)
    except Exception as error:
        return error


def _kind_of(calls: Sequence[ForwardCall]) -> BatchKind:
    """What a batch of these calls computes with: the callers' types where they agree, else those that lead to all."""
    first = calls[0]
    hidden_dtype, is_routed, output_dtype = first.hidden_states.dtype, first.topk_ids is not None, first.output_dtype
    for call in calls:
        if call.hidden_states.dtype != hidden_dtype:
            hidden_dtype = torch.float8_e4m3fn
        if call.topk_ids is not None:
            is_routed = True
        if call.output_dtype != output_dtype:
            # A mixed batch is rounded call by call from float32; that gives the bits of a batch of one dtype.
            output_dtype = torch.float32
    return BatchKind(hidden_dtype, is_routed, output_dtype)


def _gather(
    flat: npt.NDArray[np.uint8], layout: InputLayout, layer: MoELayer, calls: Iterable[ForwardCall], num_tokens: int
) -> None:
    """Write a batch into a slot's host memory."""
    copy_bytes(flat, 0, num_tokens.to_bytes(NUM_VALID_BYTES, "little"))
    first = 0
    hidden, routing, is_routed = layout.hidden_states, layout.routing, len(layout.routing) > 1
    for call in calls:
        hidden_states = call.hidden_states
        if hidden_states.dtype != hidden.dtype:
            assert layer.hidden_states_scale is not None, "the service refuses such a call"
            hidden_states = _host_tensor(quantize_fp8(hidden_states.to_tensor(), layer.hidden_states_scale))
        copy_bytes(flat, hidden.end(first), hidden_states.data)
        for (_, part), tensor in zip(routing, _routing_of(call, layer, is_routed=is_routed), strict=True):
            # float32 holds every bfloat16 logit exactly; weights are rounded to bfloat16 on entry anyway.
            same = tensor if tensor.dtype == part.dtype else _host_tensor(tensor.to_tensor().to(part.dtype))
            copy_bytes(flat, part.end(first), same.data)
        first += call.num_tokens


def _routing_of(call: ForwardCall, layer: MoELayer, *, is_routed: bool) -> tuple[HostTensor, ...]:
    """The logits, or ids and weights: routed here, as the CPU backend does it, where only others in the batch are."""
    if call.routing_logits is None:
        assert call.topk_ids is not None
        assert call.topk_weights is not None
        return call.topk_ids, call.topk_weights
    if not is_routed:
        return (call.routing_logits,)
    ids, weights = routing.route(layer.spec, call.routing_logits.to_tensor(), layer.routing_bias)
    return _host_tensor(ids), _host_tensor(weights)


def _host_tensor(tensor: torch.Tensor) -> HostTensor:
    return HostTensor(tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().data)


def _own(rows: torch.Tensor, dtype: torch.dtype, *, is_owned: bool) -> torch.Tensor:
    """The rows in memory of their own: a slow reader must not hold the whole batch's output."""
    if rows.dtype != dtype:
        return rows.to(dtype)
    return rows if is_owned else rows.clone()


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
