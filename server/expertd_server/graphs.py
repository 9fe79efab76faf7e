"""CUDA graphs: a batch as one launch instead of half a dozen, at the price of a fixed number of rows.

A layer version has a graph for each slot, kind of batch and bucket of rows. How many of the rows are tokens is a number
in device memory, so that the rows of padding cost nothing and mean nothing. Graphs of one capturer share their memory
and the backend's scratch memory: they are replayed one after the other.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertd_server.backend import MoEOutput
from expertd_server.cuda_slot import CudaReplay, CudaStreams, submitting
from expertd_server.errors import BackendError
from expertd_server.layer import MoELayer
from expertd_server.layout import NUM_VALID_BYTES, BatchKind, input_layout, num_valid_tokens, output_layout
from expertd_server.spans import whole
from expertd_server.staging import Graph, Slot, SlotPool
from expertd_server.types import LayerSpec

__all__ = ["Capturer", "CudaCapturer", "Graphs", "buckets_up_to", "progress_bar", "run_layer"]

log = logging.getLogger(__name__)

# Capturing waits this long for a slot that serves a batch.
_SLOT_TIMEOUT_S = 30.0
# A graph takes about 100 KB. Kinds of batches that nobody foresaw get graphs until there are this many in all.
_MAX_UNFORESEEN_GRAPHS = 4096


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Powers of two below max_rows, and max_rows, ascending; none for 0."""
    powers = [1 << n for n in range(max_rows.bit_length()) if 1 << n < max_rows]
    return (*powers, max_rows) if max_rows else ()


def run_layer(slot: Slot, layer: MoELayer, kind: BatchKind, num_rows: int, *, is_padded: bool) -> MoEOutput:
    """Start a layer on what lies in a slot's device memory, laid out for num_rows; the answer goes there too.

    is_padded: only the first num_valid_tokens rows are tokens; else all are.
    """
    inputs = input_layout(layer.spec, kind, num_rows).arguments(slot.device_in, num_rows)
    outputs = output_layout(layer.spec, kind, num_rows).arguments(slot.device_out, num_rows)
    valid = num_valid_tokens(slot.device_in) if is_padded else None
    return layer.forward(**inputs, **outputs, output_dtype=kind.output_dtype, num_valid_tokens=valid)


class Capturer(Protocol):
    """How a computation becomes a graph."""

    def capture(self, run: Callable[[], MoEOutput]) -> tuple[Callable[[], None], MoEOutput]:
        """Record what `run` starts instead of starting it; what replays it, and what `run` returned."""
        ...

    def warm_up(self, run: Callable[[], MoEOutput]) -> None:
        """Start what `run` starts, in turn with the current stream's work, with what captures use."""
        ...

    def free_bytes(self) -> int:
        """Free memory of the device."""
        ...


class CudaCapturer:
    """Captures on a stream of its own, while other threads replay, on the slots' stream. One call at a time."""

    def __init__(self, streams: CudaStreams) -> None:
        self._streams = streams
        # The backend's scratch memory belongs to a stream: all graphs share that of this one, which runs nothing else.
        self._stream = torch.cuda.Stream(streams.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], MoEOutput]) -> tuple[Callable[[], None], MoEOutput]:
        """See `Capturer`."""
        captured = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self._stream):
            # NOTE: not torch.cuda.graph, which waits for the whole device and collects garbage before every capture.
            # thread_local: what other threads do meanwhile, which is replaying, neither disturbs nor is disturbed.
            captured.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                answer = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error tells more
                    captured.capture_end()
                raise
            captured.capture_end()
        return CudaReplay(captured, self._streams), answer

    def warm_up(self, run: Callable[[], MoEOutput]) -> None:
        """See `Capturer`."""
        current = torch.cuda.current_stream(self._streams.device)
        with submitting():  # in three steps: a replay between them would run beside it
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)

    def free_bytes(self) -> int:
        """See `Capturer`."""
        return torch.cuda.mem_get_info(self._streams.device)[0]


class Graphs:
    """The graphs of a device's slots.

    max_rows: rows of the largest graph; larger batches run without one. 0: no graphs.
    """

    def __init__(self, pool: SlotPool, max_rows: int, capturer: Capturer) -> None:
        self.buckets = buckets_up_to(max_rows)
        self._pool = pool
        self._capturer = capturer
        self._lock = threading.Lock()
        # One thread at a time goes through the slots.
        self._capturing = threading.Lock()
        # Held while a slot's table of layers changes or is gone through: other threads ask for sizes.
        self._tables_lock = threading.Lock()
        self._warm: set[tuple[LayerSpec, BatchKind, int]] = set()
        self._num_unforeseen: WeakKeyDictionary[MoELayer, int] = WeakKeyDictionary()
        """Captures of kinds that nobody foresaw, those that failed included, of layer versions that are held."""

    @property
    def nbytes(self) -> int:
        """Device memory of all graphs: by how much free memory shrank while they were captured."""
        return sum(graph.nbytes for table in self._tables() for graph in list(table.values()))

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables())

    def bucket(self, num_tokens: int) -> int | None:
        """The smallest bucket that takes num_tokens; None: there is none."""
        index = bisect.bisect_left(self.buckets, num_tokens)
        return self.buckets[index] if index < len(self.buckets) else None

    def find(self, slot: Slot, layer: MoELayer, kind: BatchKind, num_tokens: int) -> Graph | None:
        """The graph for a batch; None: there is none (yet)."""
        table, bucket = slot.graphs.get(layer), self.bucket(num_tokens)
        return None if table is None or bucket is None else table.get((kind, bucket))

    def count_usual(self, layers: Iterable[MoELayer]) -> int:
        """How many graphs `capture` captures."""
        return sum(len(self._usual(layer)) for layer in layers) * len(self._pool.slots)

    def capture(self, layers: Iterable[MoELayer], advance: Callable[[int], None] | None = None) -> None:
        """Capture every graph that batches of usual kinds will ask for, the largest first, but for those there are.

        Batches may be served meanwhile, on the slots that are not being worked on. advance: told how many more are
        done. Raises BackendError when a slot does not become free or the device has no room for the graphs.
        """
        with self._capturing:
            for layer in layers:
                self._capture_usual(layer, advance)

    def capture_unforeseen(self, slot: Slot, layer: MoELayer, kind: BatchKind, num_tokens: int) -> None:
        """Capture the graph that `find` missed, for the next batch like it; not when there are too many by now.

        The slot is the caller's, and has just started such a batch without a graph: that loaded the kernels.
        """
        bucket = self.bucket(num_tokens)
        if bucket is None or sum(self._num_unforeseen.values()) >= _MAX_UNFORESEEN_GRAPHS:
            return
        if not self._lock.acquire(blocking=False):
            return  # no batch waits for the graphs of others
        try:
            self._num_unforeseen[layer] = self._num_unforeseen.get(layer, 0) + 1
            self._capture(slot, layer, [(kind, bucket)], run_once=False)
        except RuntimeError as error:
            log.warning("layer %r: no graph for %d tokens of %s: %s", layer.name, bucket, kind, error)
        finally:
            self._lock.release()

    def _tables(self) -> list[dict[tuple[BatchKind, int], Graph]]:
        with self._tables_lock:
            return [table for slot in self._pool.slots for table in slot.graphs.values()]

    def _usual(self, layer: MoELayer) -> list[tuple[BatchKind, int]]:
        hidden_dtypes = [torch.float8_e4m3fn]
        if layer.hidden_states_scale is not None:
            hidden_dtypes.append(torch.bfloat16)
        return [
            (BatchKind(dtype, is_routed, torch.bfloat16), rows)
            for rows in reversed(self.buckets)
            for dtype in hidden_dtypes
            for is_routed in (False, True)
        ]

    def _capture_usual(self, layer: MoELayer, advance: Callable[[int], None] | None) -> None:
        usual = self._usual(layer)
        for wanted in self._pool.slots:
            slot = self._pool.take(_SLOT_TIMEOUT_S, wanted)
            try:
                table = slot.graphs.get(layer, {})  # not before the slot is taken: then it may grow, and forget
                missing = [which for which in usual if which not in table]
                if missing:
                    with self._lock:
                        self._warm_up(slot, layer, missing)
                        self._capture(slot, layer, missing, run_once=True)
            except RuntimeError as error:
                slot.settle()
                raise BackendError(
                    f"layer {layer.name!r}: capturing graphs failed: {error}; max_graph_tokens makes them fewer"
                ) from error
            finally:
                self._pool.give_back(slot)
            if advance is not None:
                advance(len(usual))

    def _warm_up(self, slot: Slot, layer: MoELayer, wanted: list[tuple[BatchKind, int]]) -> None:
        """Run what is new once without a graph: only first launches load kernels and take scratch memory."""
        new = [(kind, rows) for kind, rows in wanted if (layer.spec, kind, rows) not in self._warm]
        with _no_tokens(slot):
            for kind, rows in new:
                self._capturer.warm_up(partial(run_layer, slot, layer, kind, rows, is_padded=True))
        self._warm.update((layer.spec, kind, rows) for kind, rows in new)

    def _capture(self, slot: Slot, layer: MoELayer, wanted: list[tuple[BatchKind, int]], *, run_once: bool) -> None:
        """run_once: replay each once, so that the memory it takes is taken here and not under its first batch."""
        free_bytes = self._capturer.free_bytes()
        captured = [
            (kind, rows, *self._capturer.capture(partial(run_layer, slot, layer, kind, rows, is_padded=True)))
            for kind, rows in wanted
        ]
        if run_once:
            with _no_tokens(slot):
                for _, _, replay, _ in captured:
                    replay()
        nbytes = max(0, free_bytes - self._capturer.free_bytes()) // max(1, len(wanted))
        with self._tables_lock:
            table = slot.graphs.setdefault(layer, {})
        for kind, rows, replay, answer in captured:
            table[kind, rows] = Graph(rows, replay, answer.expert_weights, nbytes)


@contextlib.contextmanager
def _no_tokens(slot: Slot) -> Iterator[None]:
    """Inside, what is started computes on nothing but padding; it has run when the block is over."""
    slot.host_in[:NUM_VALID_BYTES] = 0
    slot.send(whole(NUM_VALID_BYTES))
    with slot.compute(), slot.stream():
        yield
    slot.fetch([])
    slot.wait()


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """Counts captured graphs on a terminal; elsewhere there is none: a bar in a log file is noise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("capturing graphs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("capture", total=total)
        yield lambda count: progress.advance(task, count)
