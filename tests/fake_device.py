"""A GPU for tests that have none: two memories, copies that happen late, graphs that run again what they were shown.

Copies in happen when something is computed next, copies out when somebody waits: until then host and device disagree,
as on a GPU, and reading too early shows as wrong bytes. Memory of others is read and written only where it is pinned
when a copy happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.pinning import Pinner
from expertd_server.spans import PackedSpans, Span, each_of
from expertd_server.staging import Graph, GraphTable, SlotTimes, run_in_turn
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

PATIENCE_S = 30.0


class FakeDevice:
    """Work that was started and is not done, in order; and the memory of others that it may touch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[Callable[[], None]] = []
        self.pinned: dict[int, int] = {}
        """Bytes by address."""
        self.num_pinned = 0
        """Of all times."""
        self.failure: Exception | None = None
        """What pinning raises."""
        self.may_pin = threading.Event()
        """Pinning waits for it."""
        self.may_pin.set()
        self.may_end = threading.Event()
        """Nobody is told before that a batch is over, and its answers are on their way."""
        self.may_end.set()
        self.has_held = threading.Event()
        """Somebody has asked for a batch that may not end."""

    def pinner(self, max_bytes: int = 1 << 30) -> Pinner:
        return Pinner(self._pin, self._unpin, max_bytes)

    def _pin(self, address: int, nbytes: int) -> None:
        assert self.may_pin.wait(PATIENCE_S), "the test never let it go on"
        if self.failure is not None:
            raise self.failure
        ctypes.string_at(address, nbytes)  # it is mapped
        self.pinned[address] = nbytes
        self.num_pinned += 1

    def _unpin(self, address: int) -> None:
        ctypes.string_at(address, self.pinned.pop(address))

    def memory(self, address: int, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 of others."""
        inside = any(start <= address and address + nbytes <= start + size for start, size in self.pinned.items())
        assert inside, "the device touches memory that is not pinned"
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)

    def start(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._started.append(work)

    def get_done(self) -> None:
        with self._lock:
            while self._started:
                self._started.pop(0)()


class FakeSlot:
    """A slot with memory on both sides."""

    is_host = False

    def __init__(self, index: int, device: FakeDevice) -> None:
        self.index = index
        self.host_in = self.device_in = self.host_out = self.device_out = torch.empty(0, dtype=torch.uint8)
        self.graphs: GraphTable = weakref.WeakKeyDictionary()
        self.sent: list[list[Span]] = []
        self.fetched: list[list[Span]] = []
        self.settled = 0
        self.device = device

    @property
    def device_nbytes(self) -> int:
        return self.device_in.numel() + self.device_out.numel()

    def reserve(self, in_bytes: int, out_bytes: int) -> None:
        if in_bytes <= self.host_in.numel() and out_bytes <= self.host_out.numel():
            return
        self.graphs.clear()
        # 0x7F: NaN in FP8, and no valid id.
        self.host_in, self.device_in = (torch.full((in_bytes,), 0x7F, dtype=torch.uint8) for _ in range(2))
        self.host_out, self.device_out = (torch.full((out_bytes,), 0x7F, dtype=torch.uint8) for _ in range(2))

    def send(self, spans: list[Span] | PackedSpans) -> None:
        each = list(each_of(spans))
        self.sent.append(each)
        self.device.start(lambda: self._copy_in(each))

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        self.device.get_done()
        yield

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def fetch(self, spans: list[Span] | PackedSpans) -> None:
        each = list(each_of(spans))
        self.fetched.append(each)
        self.device.start(lambda: self._copy_out(each))

    def run(self, sent: list[Span] | PackedSpans, graph: Graph, fetched: list[Span] | PackedSpans) -> None:
        run_in_turn(self, sent, graph, fetched)

    def wait(self) -> None:
        assert self.is_done_within(PATIENCE_S), "the test never let it end"

    def is_done_within(self, seconds: float) -> bool:
        if not self.device.may_end.is_set():
            self.device.has_held.set()
        if not self.device.may_end.wait(seconds):
            return False
        self.device.get_done()
        return True

    def is_computed(self) -> bool:
        return self.is_done_within(0.0)

    def ring_when_done(self, fd: int) -> None:
        bell = os.dup(fd)

        def ring() -> None:
            self.device.may_end.wait(PATIENCE_S)
            os.eventfd_write(bell, 1)
            os.close(bell)

        threading.Thread(target=ring, daemon=True).start()

    def times(self) -> SlotTimes:
        return SlotTimes(0.001, 0.002, 0.004, 0.008)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def settle(self) -> None:
        self.settled += 1
        self.device.get_done()

    def _copy_in(self, spans: list[Span]) -> None:
        for start, nbytes, address in spans:
            mine = slice(start, start + nbytes)
            self.device_in[mine] = self.device.memory(address, nbytes) if address else self.host_in[mine]

    def _copy_out(self, spans: list[Span]) -> None:
        for start, nbytes, address in spans:
            mine = slice(start, start + nbytes)
            to = self.device.memory(address, nbytes) if address else self.host_out[mine]
            to.copy_(self.device_out[mine])


class FakeCapturer:
    """Remembers what was captured; a replay runs it on what the slot's memory holds by then."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.warmed_up = 0
        self.failure: Exception | None = None

    def capture(self, run: Callable[[], MoEOutput]) -> tuple[Callable[[], None], MoEOutput]:
        if self.failure is not None:
            raise self.failure
        self.captured += 1
        answer = run()
        # A graph holds addresses, not objects: it must not keep the layer alive.
        assert isinstance(run, functools.partial)
        start, (slot, layer, kind, rows), padded = run.func, run.args, run.keywords
        layer_ref = weakref.ref(layer)
        del run, layer

        def replay() -> None:
            self.replayed += 1
            alive = layer_ref()
            assert alive is not None, "replayed a graph whose layer is gone"
            again = start(slot, alive, kind, rows, **padded)
            answer.expert_weights.copy_(again.expert_weights)

        return replay, answer

    def warm_up(self, run: Callable[[], MoEOutput]) -> None:
        self.warmed_up += 1
        run()

    def free_bytes(self) -> int:
        return 1_000_000 - 100 * self.captured


class FakeCudaBackend:
    """The CPU backend under the name of the one whose batches can be graphs; counts its calls."""

    name = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.inner = TorchBackend("cpu")
        self.calls: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        return self.inner.prepare(spec, weights, max_num_tokens=max_num_tokens)

    def forward(self, layer: PreparedLayer, hidden_states: torch.Tensor, **arguments: Any) -> MoEOutput:
        with self.lock:
            self.calls.append({"hidden_states": hidden_states, **arguments})
            return self.inner.forward(layer, hidden_states, **arguments)


def fake_slots(count: int) -> list[FakeSlot]:
    """Slots of one device."""
    device = FakeDevice()
    return [FakeSlot(index, device) for index in range(count)]
