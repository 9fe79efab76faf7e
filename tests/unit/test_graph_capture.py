"""Which graphs there are, when they are captured and how long they live; on a device that is none."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from fake_device import FakeCapturer, FakeCudaBackend, FakeSlot, fake_slots

from expertd_server.backend import MoEOutput
from expertd_server.errors import BackendError
from expertd_server.graphs import Graphs, buckets_up_to
from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind, input_layout, num_valid_tokens, output_layout, slot_bytes
from expertd_server.staging import HostSlot, SlotPool
from expertd_server.synthetic import synthetic_layers

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
MAX_TOKENS = 64


class Bench:
    """Two slots, graphs of up to 8 rows."""

    def __init__(self, max_rows: int = 8) -> None:
        self.slots = fake_slots(2)
        self.pool = SlotPool(self.slots)
        self.capturer = FakeCapturer()
        self.graphs = Graphs(self.pool, max_rows, self.capturer)
        self.backend = FakeCudaBackend()

    def layer(self, index: int = 0, version: int = 1) -> MoELayer:
        *_, (name, spec, weights) = synthetic_layers("tiny", index + 1)
        layer = MoELayer(name, self.backend.prepare(spec, weights), self.backend, version)
        self.pool.require(*slot_bytes(spec, MAX_TOKENS, takes_wide=True))
        return layer

    def kinds(self, slot: FakeSlot, layer: MoELayer) -> set[tuple[BatchKind, int]]:
        return set(slot.graphs.get(layer, {}))


@pytest.mark.parametrize(
    ("max_rows", "buckets"), [(0, ()), (1, (1,)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9)), (1000, None)]
)
def test_buckets_are_powers_of_two_and_the_limit(max_rows: int, buckets: tuple[int, ...] | None) -> None:
    got = buckets_up_to(max_rows)
    assert got == (buckets if buckets is not None else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000))


def test_a_batch_gets_the_smallest_bucket_that_takes_it() -> None:
    graphs = Bench().graphs
    assert [graphs.bucket(n) for n in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, None]


def test_usual_kinds_are_captured_for_every_slot_largest_first_and_nothing_is_computed_but_padding() -> None:
    bench = Bench()
    layer = bench.layer()
    told: list[int] = []
    bench.graphs.capture([layer], told.append)
    usual = {(BatchKind(d, r, BF16), rows) for d in (FP8, BF16) for r in (False, True) for rows in (1, 2, 4, 8)}
    for slot in bench.slots:
        assert bench.kinds(slot, layer) == usual
    assert sum(told) == bench.graphs.count_usual([layer]) == len(bench.graphs) == 2 * len(usual)
    rows = [call["hidden_states"].shape[0] for call in bench.backend.calls]
    assert rows[: len(usual)] == sorted(rows[: len(usual)], reverse=True), "the largest first"
    assert bench.capturer.warmed_up == len(usual), "kernels are loaded once, not for every slot"
    assert bench.capturer.replayed == 2 * len(usual), "each once, so that its memory is there"
    assert all(call["num_valid_tokens"] is not None for call in bench.backend.calls)
    assert all((slot.device_out == 0x7F).all() for slot in bench.slots), "no row was written"
    assert bench.graphs.nbytes == 100 * len(bench.graphs)
    assert bench.pool.in_use == 0


def test_fp8_alone_where_the_layer_takes_nothing_else() -> None:
    bench = Bench()
    layer = bench.layer()
    object.__setattr__(layer.prepared.weights, "hidden_states_scale", None)
    assert bench.graphs.count_usual([dataclasses.replace(layer)]) == 2 * 2 * 4


def test_a_layer_version_takes_its_graphs_with_it_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    # The fake's replay calls `run` again and so holds the layer; a real graph holds addresses alone.
    monkeypatch.setattr(bench.capturer, "capture", lambda run: (lambda: None, run()))
    old, new = bench.layer(version=1), bench.layer(version=2)
    bench.graphs.capture([old, new])
    kept = [bench.kinds(slot, new) for slot in bench.slots]
    gone = weakref.ref(old)
    bench.backend.calls.clear()
    del old
    gc.collect()
    assert gone() is None, "a graph keeps its layer, and so its weights, alive"
    assert [bench.kinds(slot, new) for slot in bench.slots] == kept
    assert len(bench.graphs) == sum(map(len, kept))


def test_an_unforeseen_kind_gets_a_graph_on_the_slot_that_ran_it() -> None:
    bench = Bench()
    layer = bench.layer()
    kind = BatchKind(torch.float16, False, torch.float32)
    slot = bench.pool.take(0.0)
    bench.graphs.capture_unforeseen(slot, layer, kind, 3)
    assert bench.kinds(bench.slots[slot.index], layer) == {(kind, 4)}
    found = bench.graphs.find(slot, layer, kind, 4)
    assert found is not None
    assert found.num_rows == 4
    assert bench.graphs.find(slot, layer, kind, 5) is None
    assert bench.capturer.replayed == 0, "the slot holds a batch"
    bench.graphs.capture_unforeseen(slot, layer, kind, 9)
    assert len(bench.graphs) == 1, "beyond the largest bucket there are none"


def test_unforeseen_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd_server.graphs._MAX_UNFORESEEN_GRAPHS", 2)
    bench = Bench()
    layer = bench.layer()
    slot = bench.pool.take(0.0)
    for tokens in (1, 2, 4, 8):
        bench.graphs.capture_unforeseen(slot, layer, BatchKind(torch.float16, False, BF16), tokens)
    assert len(bench.graphs) == 2


def test_graphs_of_versions_that_are_gone_count_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd_server.graphs._MAX_UNFORESEEN_GRAPHS", 2)
    bench = Bench()
    answer = MoEOutput(torch.empty(0), torch.empty(0))
    monkeypatch.setattr(bench.capturer, "capture", lambda _: (lambda: None, answer))  # holds no layer, as above
    slot = bench.pool.take(0.0)
    for version in (1, 2, 3):
        layer = bench.layer(version=version)
        for tokens in (1, 2, 4):
            bench.graphs.capture_unforeseen(slot, layer, BatchKind(torch.float16, False, BF16), tokens)
        assert len(bench.kinds(slot, layer)) == 2
        del layer
        gc.collect()


def test_an_unforeseen_capture_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    layer = bench.layer()
    bench.capturer.failure = RuntimeError("out of memory")
    bench.graphs.capture_unforeseen(bench.pool.take(0.0), layer, BatchKind(FP8, False, BF16), 1)
    assert len(bench.graphs) == 0
    assert "out of memory" in caplog.text


def test_a_capture_at_start_that_fails_names_the_layer_and_the_remedy_and_gives_the_slot_back() -> None:
    bench = Bench()
    layer = bench.layer()
    bench.capturer.failure = RuntimeError("out of memory")
    with pytest.raises(BackendError, match=r"synthetic\.tiny\.0.*out of memory.*max_graph_tokens"):
        bench.graphs.capture([layer])
    assert bench.pool.in_use == 0


def test_growing_slots_forget_their_graphs() -> None:
    bench = Bench()
    layer = bench.layer()
    bench.graphs.capture([layer])
    bench.pool.require(10_000_000, 0)
    slot = bench.pool.take(0.0)
    assert bench.graphs.find(slot, layer, BatchKind(FP8, False, BF16), 1) is None


def test_capturing_again_captures_only_what_growing_slots_forgot() -> None:
    """A larger layer that is loaded beside others makes the slots grow; their graphs are captured anew with its own."""
    bench = Bench()
    old, new = bench.layer(version=1), bench.layer(version=2)
    bench.graphs.capture([old])
    captured = bench.capturer.captured
    bench.graphs.capture([new, old])
    assert bench.capturer.captured == 2 * captured, "those of the old version were there"
    kinds = bench.kinds(bench.slots[0], old)
    bench.pool.require(10_000_000, 0)
    bench.graphs.capture([new, old])
    assert all(bench.kinds(slot, layer) == kinds for slot in bench.slots for layer in (old, new))
    assert bench.capturer.captured == 4 * captured
    assert len(bench.graphs) == 2 * captured


def test_a_pool_gives_the_slot_used_last_and_says_when_there_is_none() -> None:
    pool = SlotPool([HostSlot(index) for index in range(2)])
    first, second = pool.take(0.0), pool.take(0.0)
    assert pool.in_use == 2
    with pytest.raises(BackendError, match="no staging slot was free within"):
        pool.take(0.0)
    pool.give_back(first)
    with pytest.raises(BackendError):
        pool.take(0.0, second)
    pool.give_back(second)
    assert pool.take(0.0) is second, "its memory is in the cache"
    assert pool.take(0.0, first) is first


def test_a_slot_that_somebody_waits_for_is_not_taken_by_others() -> None:
    pool = SlotPool([HostSlot(index) for index in range(2)])
    busy = pool.take(0.0)
    taken: list[object] = []
    waiter = threading.Thread(target=lambda: taken.append(pool.take(30.0, busy)))
    waiter.start()
    while pool._claimed is not busy:
        waiter.join(0.001)
    other = pool.take(0.0)
    pool.give_back(busy)
    with pytest.raises(BackendError):
        pool.take(0.0)
    waiter.join(30.0)
    assert taken == [busy]
    pool.give_back(other)
    assert pool.take(0.0) is other


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_parts_lie_side_by_side_and_a_batch_is_one_piece(rows: int, is_routed: bool) -> None:
    spec = Bench().layer().spec
    kind = BatchKind(BF16, is_routed, torch.float32)
    inputs, outputs = input_layout(spec, kind, rows), output_layout(spec, kind, rows)
    for nbytes, limit in zip(
        (inputs.nbytes(rows), outputs.nbytes(rows)), slot_bytes(spec, rows, takes_wide=True), strict=True
    ):
        assert nbytes <= limit
    memory = torch.zeros(inputs.nbytes(rows), dtype=torch.uint8)
    views = [num_valid_tokens(memory), *inputs.arguments(memory, rows).values()]
    for number, view in enumerate(views, start=1):
        view.view(torch.uint8).fill_(number) if view.ndim else view.fill_(0x01010101)
    for number, view in enumerate(views, start=1):
        assert (view.reshape(-1).view(torch.uint8) == number).all(), f"part {number} overlaps another"
    assert all(view.data_ptr() % 16 == memory.data_ptr() % 16 for view in views)
    assert inputs.nbytes(rows - 1) == inputs.nbytes(rows) - spec.hidden_size * 2, "padding is not copied"
