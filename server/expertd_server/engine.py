"""The engine: gathers the requests of a batch in a staging slot, runs the layer once, hands every request its own rows.

On the CPU requests share a batch as widely as their arithmetic allows, see `gather.py`; each gets its own output type,
rounded from float32 once.

A GPU rounds for itself, faster than the host and not always to the same last bit. There, requests share a batch when
their types agree; the batch is one copy in, one graph and one copy out, and two batches are in flight. What lies in
pinned memory of others, see `pinning.py`, is copied by the GPU from there, and answers to there.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from expertd_server.backend import Backend, MoEOutput
from expertd_server.batch import Batch, Entry, Limits
from expertd_server.batcher import Batcher
from expertd_server.bundle import IS_COMPILED, BundledCalls
from expertd_server.cuda_slot import CudaSlot, CudaStreams
from expertd_server.errors import ExpertdServerError
from expertd_server.forward import ForwardCall, ForwardResult, HostTensor, Matrix
from expertd_server.gather import gather, kind_of
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
from expertd_server.running import BatchReport, HostOutput, RunningBatch, unexpected
from expertd_server.scatter import scatter
from expertd_server.spans import PackedSpans, Span
from expertd_server.staging import Graph, HostSlot, Slot, SlotPool
from expertd_server.timing import ForwardTiming
from expertd_server.types import LayerSpec

if TYPE_CHECKING:
    from expertd_server._blocks import Bundle

__all__ = ["BatchReport", "Engine", "ForwardCall", "ForwardResult", "ForwardTiming", "HostTensor"]

# A GPU computes one batch while the next is gathered and copied. More would only make batches smaller, unless as much
# waits as a large batch holds, a quarter of the largest: to gather and copy that takes as long as to compute it. So it
# does to copy answers back, and one batch whose answers are on their way does not count.
_IN_FLIGHT_ON_DEVICE = 2
_IN_FLIGHT_IN_A_CROWD = 1
_CROWDS_OF_A_BATCH = 4
_COMING_BACK = 1
_HANDED_OUT = 1
# Of inputs of different sizes, for each slot.
_MOST_VIEWS = 256
# Of what requests may have in common. Who is the first after so many meets no company that came before.
_MOST_KEYS = 4096
# Longer than any capture keeps a slot to itself.
_SLOT_TIMEOUT_S = 30.0


class _Key:
    """One for all requests that may share a batch; compared by identity, which takes no time."""


class Engine:
    """Runs calls in batches on one backend.

    limits: max_in_flight, crowd_tokens and max_coming_back are the engine's to choose. max_graph_tokens: rows of the
    largest CUDA graph; 0: none.
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
        if slots is None and self._is_host:
            slots = [HostSlot(0, clock)]
        elif slots is None:
            streams = CudaStreams(backend.device)
            num_slots = _IN_FLIGHT_ON_DEVICE + _IN_FLIGHT_IN_A_CROWD + _COMING_BACK + _HANDED_OUT
            slots = [CudaSlot(index, streams) for index in range(num_slots)]
            if capturer is None and backend.name == "cuda" and max_graph_tokens:
                capturer = CudaCapturer(streams)
        self.slots = SlotPool(slots)
        if self._is_host:
            limits = replace(limits, max_in_flight=1)
        else:
            num_more = len(slots) - _IN_FLIGHT_ON_DEVICE - _HANDED_OUT
            limits = replace(
                limits,
                max_in_flight=_IN_FLIGHT_ON_DEVICE,
                max_coming_back=min(_COMING_BACK, max(0, num_more)),
                crowd_tokens=limits.max_batch_tokens // _CROWDS_OF_A_BATCH if num_more > _COMING_BACK else None,
            )
        self.graphs: Graphs | None = None
        if capturer is not None:
            self.graphs = Graphs(self.slots, min(max_graph_tokens, limits.max_batch_tokens), capturer)
        self._views: dict[int, _SlotViews] = {}
        self._keys: dict[tuple[object, ...], _Key] = {}
        self._met: dict[int, weakref.ref[MoELayer]] = {}
        """By id; what a layer's death leaves behind here is never taken for another."""
        self._met_lock = threading.Lock()  # a scrape of the metrics goes through them while batches add to them
        self.batcher: Batcher[ForwardCall | BundledCalls, Any] = Batcher(self._launch, limits, clock=clock)

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return self.batcher.queue_tokens

    def submit(
        self,
        call: ForwardCall | BundledCalls,
        deadline_s: float | None = None,
        on_done: Callable[[Promise[Any]], object] | None = None,
        is_last: bool = False,
    ) -> Promise[Any]:
        """Queue a call; a promise of a ForwardResult, or of what call.encode makes of it; of None for a bundle.

        Errors, deadline, cancellation and the rest as in `Batcher.submit`.
        """
        key = self._key_of(call)
        return self.batcher.submit(key, call, call.num_tokens, deadline_s, on_done, is_last, call.num_requests)

    def join(self, promise: Promise[Any], bundle: Bundle) -> bool:
        """Have as many of a bundle's members as there is room for join a bundle that was submitted; whether any did.
        promise: of `submit`. What is left must be a call of its own."""
        assert isinstance(promise, Entry)
        return self.batcher.join(promise, lambda *room: promise.payload.absorb(bundle, *room))

    def left(self, promise: Promise[Any], num_tokens: int, num_requests: int) -> None:
        """So many of a bundle that was submitted will not run."""
        assert isinstance(promise, Entry)
        call = promise.payload
        if call is not None:
            call.count()
            self.batcher.left(promise, num_tokens, num_requests)

    @property
    def max_bundle_tokens(self) -> int:
        """Most tokens of a bundle; 0: none are taken."""
        return 0 if self._is_host or not IS_COMPILED else self._max_batch_tokens

    def _key_of(self, call: ForwardCall | BundledCalls) -> _Key:
        """What the batcher knows of a call. On the CPU any kind may run with any other."""
        common: tuple[object, ...] = id(call.layer), call.do_finalize  # the layer lives while a call to it waits
        if not self._is_host:
            common += call.kind
        key = self._keys.get(common)
        if key is None:
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            key = self._keys.setdefault(common, _Key())
        return key

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return self.batcher.oldest_work() is None

    def announce(self) -> None:
        """There is nothing to do before it comes."""

    def hurry(self) -> None:
        """See `Batcher.hurry`."""
        self.batcher.hurry()

    def describe(self, number: int) -> str:
        """Which batch the batcher's number stands for, for a log line."""
        batch = self.batcher.in_flight(number)
        if batch is None:
            return f"{self.batcher.queue_requests} requests wait, and none is taken"
        call = batch.entries[0].payload
        if call is None:
            return f"a batch of {batch.num_tokens} tokens that is being handed out"
        rows = None if self.graphs is None or not call.do_finalize else self.graphs.bucket(batch.num_tokens)
        bucket = "no graph" if rows is None else f"bucket {rows}"
        size = f"{batch.num_requests} requests of {batch.num_tokens} tokens together"
        return f"layer {call.layer.name!r}, {size}, {bucket}"

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
            layers = [layer for met in self._met.values() if (layer := met()) is not None]
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
        met = self._met.get(id(layer))
        if met is not None and met() is layer:
            return
        takes_wide = layer.hidden_states_scale is not None
        self.slots.require(*slot_bytes(layer.spec, self._max_batch_tokens, takes_wide=takes_wide))
        if self._backend.device.type == "cuda":
            # NOTE: the weights were written on the default stream, which the slots' streams do not wait for.
            torch.cuda.default_stream(self._backend.device).synchronize()
        with self._met_lock:
            self._met = {key: met for key, met in self._met.items() if met() is not None}
            self._met[id(layer)] = weakref.ref(layer)

    def _launch(self, batch: Batch[ForwardCall | BundledCalls, Any]) -> RunningBatch:
        layer = batch.entries[0].payload.layer
        try:
            self._meet(layer)
            slot = self.slots.take(_SLOT_TIMEOUT_S)
            try:
                return self._start(batch, slot)
            except BaseException:
                slot.settle()
                self.slots.give_back(slot)
                raise
        except ExpertdServerError:
            raise
        except Exception as error:
            raise unexpected(error, layer, batch.num_tokens) from error

    def _start(self, batch: Batch[ForwardCall | BundledCalls, Any], slot: Slot) -> RunningBatch:
        calls = [entry.payload for entry in batch.entries]
        for call in calls:
            if isinstance(call, BundledCalls):
                call.begin(self.clock())
        layer, num_tokens = calls[0].layer, sum([call.num_tokens for call in calls])
        kind = kind_of(calls) if slot.is_host else calls[0].kind  # on a GPU they are all alike
        do_finalize, wants_routing = calls[0].do_finalize, any(call.return_routing for call in calls)
        graph = None
        if self.graphs is not None and do_finalize:
            graph = self.graphs.find(slot, layer, kind, num_tokens)
        num_rows = num_tokens if graph is None else graph.num_rows

        start_s = self.clock()
        views = self._views_of(slot)
        plan = views.plan(layer.spec, kind, num_rows)
        spans: list[Span] | PackedSpans = gather(views.host_in, plan.inputs, layer, calls)
        if not slot.is_host:
            copy_bytes(views.host_in, 0, num_tokens.to_bytes(NUM_VALID_BYTES, "little"))
        gather_s = self.clock() - start_s
        places: list[int]
        answer: MoEOutput | None = None
        if graph is not None and not wants_routing:
            places = self._run_graph(batch, slot, calls, num_tokens, plan, spans, graph)
        else:
            places, answer = self._run_in_steps(
                batch, slot, calls, num_tokens, plan, spans, graph, wants_routing=wants_routing
            )
        if self.graphs is not None and do_finalize and graph is None:
            self.graphs.capture_unforeseen(slot, layer, kind, num_tokens)
        graph_rows = None if graph is None else graph.num_rows
        return RunningBatch(
            batch,
            layer,
            self.slots,
            slot,
            calls,
            num_tokens,
            places,
            plan.in_slot,
            answer,
            gather_s,
            graph_rows,
            self.clock,
            self.on_batch,
        )

    def _run_graph(  # noqa: PLR0917 (called for every batch, and keywords take time)
        self,
        batch: Batch[ForwardCall | BundledCalls, Any],
        slot: Slot,
        calls: list[ForwardCall | BundledCalls],
        num_tokens: int,
        plan: _Plan,
        spans: list[Span] | PackedSpans,
        graph: Graph,
    ) -> list[int]:
        """Start the copies in, the graph and the copies out; the calls' places, see `scatter`."""
        if self.slots.in_use > 1:
            fetched, places = scatter(plan.outputs, calls, num_tokens, wants_routing=False)
            _spend(batch, places)  # who hears that something went wrong does not hear how far it had got
            slot.run(spans, graph, fetched)
            return places
        # The device would wait until another thread gets to it.
        slot.send(spans)
        with slot.compute():
            graph.replay()
        fetched, places = scatter(plan.outputs, calls, num_tokens, wants_routing=False)  # while it computes
        _spend(batch, places)
        slot.fetch(fetched)
        return places

    @staticmethod
    def _run_in_steps(  # noqa: PLR0917 (as above)
        batch: Batch[ForwardCall | BundledCalls, Any],
        slot: Slot,
        calls: list[ForwardCall | BundledCalls],
        num_tokens: int,
        plan: _Plan,
        spans: list[Span] | PackedSpans,
        graph: Graph | None,
        *,
        wants_routing: bool,
    ) -> tuple[list[int], MoEOutput | None]:
        """Start a batch whose graph is none, or not all of it. The calls' places, and the answer where that does not
        lie in the slot."""
        layer, kind, do_finalize = calls[0].layer, plan.kind, calls[0].do_finalize
        if not slot.is_host:
            slot.send(spans)
        answer: MoEOutput | None = None
        with slot.compute():
            if graph is not None:
                graph.replay()
                expert_weights = graph.expert_weights
            elif slot.is_host or not do_finalize:
                with slot.stream():
                    answer = layer.forward(**plan.arguments, output_dtype=kind.output_dtype, do_finalize=do_finalize)
            else:
                with slot.stream():
                    expert_weights = run_layer(slot, layer, kind, num_tokens, is_padded=False).expert_weights
            if answer is None and wants_routing:
                with slot.stream():
                    copy = plan.outputs.expert_weights.view(slot.device_out, num_tokens)
                    copy.copy_(expert_weights[:num_tokens], non_blocking=True)
        places: list[int] = []
        if not slot.is_host:
            fetched: list[Span] | PackedSpans = []
            if answer is None:
                fetched, places = scatter(plan.outputs, calls, num_tokens, wants_routing=wants_routing)
                _spend(batch, places)
            slot.fetch(fetched)
        return places, answer


def _spend(batch: Batch[ForwardCall | BundledCalls, Any], places: list[int]) -> None:
    """Entries whose answers go where they are wanted run once. places: see `scatter`."""
    for entry, place in zip(batch.entries, places, strict=True):
        entry.is_spent = bool(place)


class _Plan(NamedTuple):
    """Where a batch lies in a slot's memory, padding included."""

    kind: BatchKind
    inputs: InputLayout
    outputs: OutputLayout
    arguments: dict[str, torch.Tensor]
    """The inputs on the device, as `Backend.forward` takes them."""
    in_slot: HostOutput | None
    """The outputs on the host; None on the CPU, where each answer has memory of its own."""


class _SlotViews:
    """A slot's memory as it is asked for; made once, because to make a tensor takes as long as to copy a small one, and
    torch lets other threads have the interpreter meanwhile."""

    def __init__(self, slot: Slot) -> None:
        self.memory = slot.host_in
        self.host_in = slot.host_in.numpy()
        self._slot = slot
        self._plans: dict[tuple[int, BatchKind, int], tuple[LayerSpec, _Plan]] = {}
        """By spec, kind and rows; it keeps the spec, whose id is in the key: to hash it takes longer than all else."""

    def plan(self, spec: LayerSpec, kind: BatchKind, num_rows: int) -> _Plan:
        """How a batch of num_rows lies in the slot."""
        key = id(spec), kind, num_rows
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= _MOST_VIEWS:
                self._plans.clear()
            slot, inputs, outputs = self._slot, input_layout(spec, kind, num_rows), output_layout(spec, kind, num_rows)
            in_slot = None
            if not slot.is_host:
                parts = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
                views = {name: part.view(slot.host_out, num_rows) for name, part in parts.items()}
                in_slot = HostOutput(MoEOutput(**views), Matrix.of(views["output"]), views["topk_ids"].numpy())
            plan = _Plan(kind, inputs, outputs, inputs.arguments(slot.device_in, num_rows), in_slot)
            found = self._plans[key] = spec, plan
        return found[1]
