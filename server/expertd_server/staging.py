"""Where batches lie while they run: memory on both sides of the bus, and the copies between.

A slot holds one batch at a time. On a GPU, see `cuda_slot`, it has memory on both sides for both directions. On the CPU
both sides are the same memory and nothing is copied.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch

from expertd_server.errors import BackendError
from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind
from expertd_server.spans import PackedSpans, Span

__all__ = ["Graph", "GraphTable", "HostSlot", "Slot", "SlotPool", "SlotTimes", "run_in_turn"]


_NOWHERE_ELSE = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured computation of one layer version on one slot's memory, for up to num_rows tokens."""

    num_rows: int
    replay: Callable[[], None]
    """Start it; inside `Slot.compute`."""
    expert_weights: torch.Tensor
    """[num_rows, K] bfloat16 on the device; what a replay leaves there stays until the next replay of any graph."""
    nbytes: int
    """Device memory that it takes."""


GraphTable: TypeAlias = WeakKeyDictionary[MoELayer, dict[tuple[BatchKind, int], Graph]]
"""Graphs of a slot by layer version, then by kind and rows. A graph is bound to the addresses of its slot and of its
layer's weights, so it lives no longer than either."""


class SlotTimes(NamedTuple):
    """Where the time of a batch went, on the device."""

    copy_in_s: float
    wait_s: float
    """Behind earlier batches."""
    compute_s: float
    copy_out_s: float


class Slot(Protocol):
    """Memory of one batch in flight, and what is done with it: send, compute, fetch, wait, in this order."""

    index: int
    is_host: bool
    """Both sides are the same memory."""
    host_in: torch.Tensor
    """[bytes] uint8, where a batch is gathered; likewise device_in, device_out, host_out."""
    device_in: torch.Tensor
    device_out: torch.Tensor
    host_out: torch.Tensor
    graphs: GraphTable

    @property
    def device_nbytes(self) -> int:
        """Bytes of device memory; 0 on the CPU."""
        ...

    def reserve(self, in_bytes: int, out_bytes: int) -> None:
        """Have at least this much memory each way. Growing forgets the slot's graphs."""
        ...

    def send(self, spans: list[Span] | PackedSpans) -> None:
        """Copy to device_in, from host_in and memory of others; what is computed next waits for it."""
        ...

    def compute(self) -> AbstractContextManager[None]:
        """Inside, what is started runs on the device after `send` and after every earlier batch: graphs, and what
        torch starts inside `stream`."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Inside `compute`: has torch start things where graphs are started."""
        ...

    def fetch(self, spans: list[Span] | PackedSpans) -> None:
        """Copy from device_out, to host_out and memory of others, what is computed by then."""
        ...

    def run(self, sent: list[Span] | PackedSpans, graph: Graph, fetched: list[Span] | PackedSpans) -> None:
        """Send, replay and fetch, in place of doing so one after the other; perhaps a moment later, and in turn with
        what other slots run and send. What goes wrong is raised here, or by what waits."""
        ...

    def wait(self) -> None:
        """Return when `fetch` is done. Raises what went wrong on the device."""
        ...

    def is_done_within(self, seconds: float) -> bool:
        """Whether `wait` would return by then; waits for that. Raises what `wait` does."""
        ...

    def is_computed(self) -> bool:
        """Whether the device is through with what it computes, though not, perhaps, with `fetch`. Raises as `wait`."""
        ...

    def ring_when_done(self, fd: int) -> None:
        """Write to an eventfd when `wait` would return at once, and before that when `is_computed`, from a thread that
        the interpreter does not keep waiting; after `fetch` or `run`. The file may be closed before."""
        ...

    def times(self) -> SlotTimes:
        """After `wait`."""
        ...

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A computed tensor on the host; after `wait`."""
        ...

    def settle(self) -> None:
        """Return when nothing touches the slot any more, however its batch failed."""
        ...


def run_in_turn(slot: Slot, sent: list[Span] | PackedSpans, graph: Graph, fetched: list[Span] | PackedSpans) -> None:
    """`Slot.run`, here and now."""
    slot.send(sent)
    with slot.compute():
        graph.replay()
    slot.fetch(fetched)


class HostSlot:
    """A slot of the CPU: one memory each way.

    clock: seconds, monotonic.
    """

    is_host = True

    def __init__(self, index: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.index = index
        self.host_in = self.device_in = torch.empty(0, dtype=torch.uint8)
        # Nobody writes here: on the CPU an answer has memory of its own, which goes to the caller as it is.
        self.host_out = self.device_out = torch.empty(0, dtype=torch.uint8)
        self.graphs: GraphTable = WeakKeyDictionary()
        self._clock = clock
        self._in_bytes = 0
        self._start_s = self._compute_s = 0.0

    @property
    def device_nbytes(self) -> int:
        """See `Slot`."""
        return 0

    def reserve(self, in_bytes: int, out_bytes: int) -> None:
        """See `Slot`."""
        if self._in_bytes < in_bytes:
            self.host_in = self.device_in = torch.empty(in_bytes, dtype=torch.uint8)
            self._in_bytes = in_bytes

    def send(self, spans: list[Span] | PackedSpans) -> None:
        """Nothing: the device reads the host's memory."""

    def compute(self) -> HostSlot:
        """See `Slot`; the computation is over when the block is."""
        return self

    def stream(self) -> AbstractContextManager[None]:
        """See `Slot`."""
        return _NOWHERE_ELSE

    def __enter__(self) -> None:
        self._start_s = self._clock()

    def __exit__(self, *_: object) -> None:
        self._compute_s = self._clock() - self._start_s

    def fetch(self, spans: list[Span] | PackedSpans) -> None:
        """Nothing: the answer is on the host."""

    def run(self, sent: list[Span] | PackedSpans, graph: Graph, fetched: list[Span] | PackedSpans) -> None:
        """See `Slot`."""
        run_in_turn(self, sent, graph, fetched)

    def wait(self) -> None:
        """Nothing: it was computed at once."""

    def is_done_within(self, seconds: float) -> bool:
        """It was computed at once."""
        return True

    def is_computed(self) -> bool:
        """It was computed at once."""
        return True

    def ring_when_done(self, fd: int) -> None:
        """It was computed at once."""
        os.eventfd_write(fd, 1)

    def times(self) -> SlotTimes:
        """See `Slot`."""
        return SlotTimes(0.0, 0.0, self._compute_s, 0.0)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Slot`."""
        return tensor

    def settle(self) -> None:
        """Nothing: nothing runs on."""


class SlotPool:
    """The slots of a device, taken and given back by any thread."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._free = list(self.slots)
        self._required = (0, 0)
        self._num_waiting = 0
        # Somebody waits for this one: under load it would be taken again as soon as it is given back.
        self._claimed: Slot | None = None

    @property
    def in_use(self) -> int:
        """Slots that hold a batch, or whose graphs are being captured."""
        return len(self.slots) - len(self._free)

    @property
    def device_nbytes(self) -> int:
        """Bytes of device memory of all slots."""
        return sum(slot.device_nbytes for slot in self.slots)

    def require(self, in_bytes: int, out_bytes: int) -> None:
        """Slots that are taken from now on have at least this much memory each way."""
        with self._lock:
            self._required = (max(in_bytes, self._required[0]), max(out_bytes, self._required[1]))

    def take(self, timeout_s: float, wanted: Slot | None = None) -> Slot:
        """A free slot: the wanted one, or the one used last. Raises BackendError when there is none in time.

        One thread at a time may want a certain one.
        """
        with self._lock:
            if wanted is None and self._claimed is None and self._free:
                slot = self._free.pop()
            else:
                slot = self._wait_for(wanted, timeout_s)
            required = self._required
        try:
            slot.reserve(*required)
        except BaseException:
            self.give_back(slot)
            raise
        return slot

    def _wait_for(self, wanted: Slot | None, timeout_s: float) -> Slot:
        """Under the lock."""
        self._claimed = wanted or self._claimed
        self._num_waiting += 1
        try:
            if not self._changed.wait_for(lambda: self._may_take(wanted), timeout_s):
                raise BackendError(f"no staging slot was free within {timeout_s:.1f} s: the device does not get on")
        finally:
            self._num_waiting -= 1
            self._claimed = None if wanted else self._claimed
        slot = wanted or self._unclaimed()[-1]
        self._free.remove(slot)
        return slot

    def _may_take(self, wanted: Slot | None) -> bool:
        return wanted in self._free if wanted else bool(self._unclaimed())

    def _unclaimed(self) -> list[Slot]:
        return [slot for slot in self._free if slot is not self._claimed]

    def give_back(self, slot: Slot) -> None:
        """Let others take it."""
        with self._lock:
            self._free.append(slot)
            if self._num_waiting:
                self._changed.notify_all()
