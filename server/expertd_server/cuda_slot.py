"""Slots of a GPU: pinned memory and device memory for both directions, and the copies between.

The copy in of one slot, the computation of another and the copy out of a third overlap, each kind of work on a stream
of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from weakref import WeakKeyDictionary

import torch

from expertd_server.pinning import Pinner
from expertd_server.spans import PackedSpans, Span, each_of
from expertd_server.staging import Graph, GraphTable, SlotTimes, run_in_turn

try:
    from expertd_server.cuda_extension import _cuda
except ImportError:  # a GPU without kernels of its own
    _cuda = None  # type: ignore[assignment]

__all__ = ["CudaReplay", "CudaSlot", "CudaStreams", "pinner_of", "submitting"]


def pinner_of(device: torch.device, max_bytes: int) -> Pinner | None:
    """What pins shared memory for the copies of a device's slots; None where they cannot use it, or max_bytes is 0."""
    if device.type != "cuda" or _cuda is None or not max_bytes:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return Pinner(partial(_cuda.pin, index), partial(_cuda.unpin, index), max_bytes)


class CudaStreams:
    """One stream for each kind of work, shared by the slots of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy_in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One stream for all layers: their graphs share scratch memory, so they run one after the other.
        self.compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copy_out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def submitting() -> Iterator[None]:
    """Inside, nobody else starts anything that uses the scratch memory of graphs. Not without the compiled module."""
    _cuda.begin_submitting()
    try:
        yield
    finally:
        _cuda.end_submitting()


class CudaReplay:
    """Starts a captured graph on a device's stream for computations, and owns the memory that it uses.

    captured: with keep_graph. Not without the compiled module.
    """

    def __init__(self, captured: torch.cuda.CUDAGraph, streams: CudaStreams) -> None:
        self.graph = _cuda.Graph(captured.raw_cuda_graph())
        """What `SlotWork.start` takes."""
        self._captured = captured
        self._stream = streams.compute.cuda_stream

    def __call__(self) -> None:
        with submitting():
            self.graph.launch(self._stream)


class CudaSlot:
    """A slot of a GPU. One thread at a time may use it."""

    is_host = False

    def __init__(self, index: int, streams: CudaStreams) -> None:
        self.index = index
        self.graphs: GraphTable = WeakKeyDictionary()
        self._streams = streams
        self.host_in = self.host_out = torch.empty(0, dtype=torch.uint8)
        self.device_in = self.device_out = torch.empty(0, dtype=torch.uint8, device=streams.device)
        handles = (stream.cuda_stream for stream in (streams.copy_in, streams.compute, streams.copy_out))
        self._work = _TorchWork(streams) if _cuda is None else _cuda.SlotWork(*handles)

    @property
    def device_nbytes(self) -> int:
        """See `Slot`."""
        return self.device_in.numel() + self.device_out.numel()

    def reserve(self, in_bytes: int, out_bytes: int) -> None:
        """See `Slot`."""
        if in_bytes <= self.host_in.numel() and out_bytes <= self.host_out.numel():
            return
        self.graphs.clear()
        in_bytes, out_bytes = max(in_bytes, self.host_in.numel()), max(out_bytes, self.host_out.numel())
        # Zeros, so that a graph that is warmed up before its first batch reads numbers and no tokens.
        self.host_in = torch.zeros(in_bytes, dtype=torch.uint8, pin_memory=True)
        self.host_out = torch.zeros(out_bytes, dtype=torch.uint8, pin_memory=True)
        self.device_in = torch.zeros(in_bytes, dtype=torch.uint8, device=self._streams.device)
        self.device_out = torch.zeros(out_bytes, dtype=torch.uint8, device=self._streams.device)
        # NOTE: the zeros are written on this thread's stream, which the slot's streams do not wait for.
        torch.cuda.current_stream(self._streams.device).synchronize()
        memory = self.host_in, self.device_in, self.device_out, self.host_out
        if isinstance(self._work, _TorchWork):
            self._work.memory = memory
        else:
            self._work.place(*(tensor.data_ptr() for tensor in memory))

    def send(self, spans: list[Span] | PackedSpans) -> None:
        """See `Slot`."""
        self._work.send(spans)

    def compute(self) -> AbstractContextManager[None]:
        """See `Slot`; returns at once."""
        return self

    def __enter__(self) -> None:
        self._work.begin()

    def __exit__(self, *_: object) -> None:
        self._work.end()

    def stream(self) -> AbstractContextManager[None]:
        """See `Slot`."""
        return torch.cuda.stream(self._streams.compute)

    def fetch(self, spans: list[Span] | PackedSpans) -> None:
        """See `Slot`."""
        self._work.fetch(spans)

    def run(self, sent: list[Span] | PackedSpans, graph: Graph, fetched: list[Span] | PackedSpans) -> None:
        """See `Slot`; by a thread that the interpreter does not keep waiting, where that was compiled."""
        if isinstance(graph.replay, CudaReplay) and not isinstance(self._work, _TorchWork):
            self._work.start(sent, graph.replay.graph, fetched)
        else:
            run_in_turn(self, sent, graph, fetched)

    def wait(self) -> None:
        """See `Slot`. The interpreter is free meanwhile."""
        self._work.wait()

    def is_done_within(self, seconds: float) -> bool:
        """See `Slot`. The interpreter is free meanwhile."""
        return self._work.is_done_within(seconds)

    def is_computed(self) -> bool:
        """See `Slot`."""
        return self._work.is_computed()

    def ring_when_done(self, fd: int) -> None:
        """See `Slot`. Not without the compiled module: batches are then waited for in a thread of the batcher's."""
        assert not isinstance(self._work, _TorchWork)
        self._work.ring_when_done(fd)

    def times(self) -> SlotTimes:
        """See `Slot`."""
        return SlotTimes(*self._work.times())

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Slot`."""
        with torch.cuda.stream(self._streams.copy_out):  # not the stream of the batches that compute by now
            return tensor.cpu()

    def settle(self) -> None:
        """See `Slot`."""
        streams = self._streams
        for stream in (streams.copy_in, streams.compute, streams.copy_out):
            with contextlib.suppress(RuntimeError):  # a device that failed touches nothing any more
                stream.synchronize()


class _TorchWork:
    """What `SlotWork` of the compiled module does, by torch, which takes ten times as long."""

    def __init__(self, streams: CudaStreams) -> None:
        self._streams = streams
        self.memory: tuple[torch.Tensor, ...] = ()
        """host_in, device_in, device_out, host_out."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]  # type: ignore[no-untyped-call]
        self._begun, self._sent, self._started, self._computed, self._fetched = self._events

    def send(self, spans: list[Span] | PackedSpans) -> None:
        host_in, device_in, _, _ = self.memory
        self._begun.record(self._streams.copy_in)
        with torch.cuda.stream(self._streams.copy_in):
            self._copy(device_in, host_in, spans)
        self._sent.record(self._streams.copy_in)
        self._streams.compute.wait_event(self._sent)

    def begin(self) -> None:
        self._started.record(self._streams.compute)

    def end(self) -> None:
        self._computed.record(self._streams.compute)

    def fetch(self, spans: list[Span] | PackedSpans) -> None:
        _, _, device_out, host_out = self.memory
        self._streams.copy_out.wait_event(self._computed)
        with torch.cuda.stream(self._streams.copy_out):
            self._copy(host_out, device_out, spans)
        self._fetched.record(self._streams.copy_out)

    @staticmethod
    def _copy(to: torch.Tensor, source: torch.Tensor, spans: list[Span] | PackedSpans) -> None:
        for start, num_bytes, address in each_of(spans):
            assert not address, "nothing is pinned without the compiled module"
            to[start : start + num_bytes].copy_(source[start : start + num_bytes], non_blocking=True)

    def wait(self) -> None:
        self._fetched.synchronize()

    def is_done_within(self, seconds: float) -> bool:
        until_s = time.monotonic() + seconds
        while not self._fetched.query():  # type: ignore[no-untyped-call]
            if time.monotonic() >= until_s:
                return False
        return True

    def is_computed(self) -> bool:
        return self._computed.query()  # type: ignore[no-untyped-call, no-any-return]

    def times(self) -> tuple[float, float, float, float]:
        copy_in_s, wait_s, compute_s, copy_out_s = (
            float(a.elapsed_time(b)) / 1e3 for a, b in itertools.pairwise(self._events)
        )
        return copy_in_s, wait_s, compute_s, copy_out_s
