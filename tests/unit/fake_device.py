"""A GPU for tests that have none: two memories, copies that happen late, graphs that run again what they were shown.

Copies in happen when something is computed next, copies out when somebody waits: until then host and device disagree,
as on a GPU, and reading too early shows as wrong bytes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.staging import GraphTable, SlotTimes
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights


class FakeDevice:
    """Work that was started and is not done, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[Callable[[], None]] = []

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
        self.sent_bytes: list[int] = []
        self.fetched_bytes: list[int] = []
        self.settled = 0
        self._device = device

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

    def send(self, nbytes: int) -> None:
        self.sent_bytes.append(nbytes)
        self._device.start(lambda: self._copy(self.device_in, self.host_in, nbytes))

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        self._device.get_done()
        yield

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def fetch(self, nbytes: int) -> None:
        self.fetched_bytes.append(nbytes)
        self._device.start(lambda: self._copy(self.host_out, self.device_out, nbytes))

    def wait(self) -> None:
        self._device.get_done()

    def is_done_within(self, seconds: float) -> bool:
        self._device.get_done()
        return True

    def times(self) -> SlotTimes:
        return SlotTimes(0.001, 0.002, 0.004, 0.008)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def settle(self) -> None:
        self.settled += 1
        self._device.get_done()

    @staticmethod
    def _copy(to: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        to[:nbytes] = source[:nbytes]


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
