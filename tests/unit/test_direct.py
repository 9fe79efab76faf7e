"""Calls in shared memory on a device that is none: it reads them and writes answers where they lie, if it may."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from engine_calls import make_call
from fake_device import FakeCapturer, FakeCudaBackend, fake_slots
from shared_calls import SharedMemory, by_bytes, everything

from expertd.v1 import expertd_pb2 as pb
from expertd_server import pinning, spans
from expertd_server.batch import Limits
from expertd_server.engine import Engine
from expertd_server.errors import BackendError
from expertd_server.forward import ForwardCall
from expertd_server.layer import MoELayer
from expertd_server.spans import Spans, whole
from expertd_server.synthetic import synthetic_layers

PATIENCE_S = 10.0
LIMITS = Limits(max_batch_tokens=32, max_queue_tokens=2000, max_queue_requests=500)
HIDDEN_SIZE = 256
UNTOUCHED = 0x7F


class Bench:
    """An engine on the fake device, with graphs of up to 16 rows, and memory that is shared with it."""

    def __init__(self) -> None:
        self.backend = FakeCudaBackend()
        self.slots = fake_slots(3)
        self.device = self.slots[0].device
        self.pinner = self.device.pinner()
        self.engine = Engine(LIMITS, self.backend, max_graph_tokens=16, slots=self.slots, capturer=FakeCapturer())
        self.layers = [
            MoELayer(name, self.backend.prepare(spec, weights), self.backend)
            for name, spec, weights in synthetic_layers("tiny", 2)
        ]
        self.engine.capture(self.layers)
        self.memory = SharedMemory(self.pinner)

    def run(self, *calls: ForwardCall) -> list[object]:
        """Their answers; what the slots were asked to copy in the last of the batches is in sent and fetched."""
        promises = [self.engine.submit(call) for call in calls]
        while self.engine.batcher.run_once():
            pass
        return [promise.result(0) for promise in promises]

    @property
    def sent(self) -> list[spans.Span]:
        return self._slot.sent[-1]

    @property
    def fetched(self) -> list[spans.Span]:
        return self._slot.fetched[-1]

    @property
    def _slot(self):  # type: ignore[no-untyped-def]
        return self.slots[-1]  # used last, and so taken first

    def expected(self, *calls: ForwardCall) -> list[bytes]:
        """What the same calls are answered when nothing is shared."""
        answers = self.run(*map(by_bytes, calls))
        return [everything(pb.ForwardResponse.FromString(answer)) for answer in answers if isinstance(answer, bytes)]


@pytest.fixture(autouse=True)
def small_things_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "MIN_DIRECT_BYTES", 1)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    assert bench.engine.slots.in_use == 0
    del bench.memory
    gc.collect()
    wait_for(lambda: not bench.device.pinned)
    bench.pinner.close()


def addresses(copies: list[spans.Span]) -> list[int]:
    return [address for _, _, address in copies if address]


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it never came to pass"
        time.sleep(0.001)


def usual(bench: Bench, num_tokens: int, seed: int) -> ForwardCall:
    return make_call(bench.layers[0], num_tokens, seed, usual=True)


def test_the_device_reads_a_call_and_writes_its_answer_where_they_lie(bench: Bench) -> None:
    call = usual(bench, 5, 1)
    expected = bench.expected(call)
    bench.memory.pin()
    placed = bench.memory.placed(call)
    hidden = pinning.address_of(placed.hidden_states.data)
    assert placed.routing_logits is not None
    logits = pinning.address_of(placed.routing_logits.data)
    for slot in bench.slots:
        slot.host_in.fill_(UNTOUCHED)
        slot.host_out.fill_(UNTOUCHED)
    assert [bench.memory.read(answer) for answer in bench.run(placed)] == expected
    assert addresses(bench.sent) == [logits, hidden]
    assert sum(nbytes for _, nbytes, address in bench.sent if not address) == 4, "the number of tokens alone"
    assert placed.place is not None
    assert addresses(bench.fetched) == [pinning.address_of(placed.place)]
    for slot in bench.slots:
        assert (slot.host_in[256:] == UNTOUCHED).all(), "the processor has copied something in"
        rows = slot.host_out.numel() - 5 * HIDDEN_SIZE * 2
        assert (slot.host_out[-rows // 2 :] == UNTOUCHED).all(), "the processor was handed an answer"


def test_any_company_in_memory_of_any_kind_gives_the_same_bytes(bench: Bench) -> None:
    bench.memory.pin()
    direct = 0
    for seed in range(30):
        chance = random.Random(seed)
        calls = [
            make_call(chance.choice(bench.layers), chance.choice((0, 1, 2, 5, 9)), seed * 100 + n) for n in range(8)
        ]
        expected = bench.expected(*calls)
        given = [bench.memory.placed(call) if chance.random() < 0.6 else by_bytes(call) for call in calls]
        for call, answer, message in zip(given, bench.run(*given), expected, strict=True):
            assert isinstance(answer, bytes)
            if call.place is None:
                assert everything(pb.ForwardResponse.FromString(answer)) == message, f"seed {seed}"
            else:
                assert bench.memory.read(answer) == message, f"seed {seed}"
        direct += sum(len(addresses(copies)) for slot in bench.slots for copies in slot.fetched)
    assert direct > 30


def test_memory_that_is_not_pinned_yet_is_copied_by_the_processor(bench: Bench) -> None:
    calls = [usual(bench, 3, seed) for seed in range(3)]
    expected = bench.expected(*calls)
    bench.device.may_pin.clear()
    placed = [bench.memory.placed(call) for call in calls]
    assert [bench.memory.read(answer) for answer in bench.run(*placed)] == expected
    assert not addresses(bench.sent)
    assert not addresses(bench.fetched)
    bench.device.may_pin.set()
    bench.memory.pin()
    placed = [bench.memory.placed(call) for call in calls]
    assert [bench.memory.read(answer) for answer in bench.run(*placed)] == expected
    assert len(addresses(bench.sent)) == 6
    assert len(addresses(bench.fetched)) == 3


@pytest.mark.parametrize("how", ["with routing", "unfinalised", "no room", "no memory"])
def test_any_other_answer_comes_as_it_did(bench: Bench, how: str) -> None:
    bench.memory.pin()
    call = usual(bench, 3, 1)
    if how == "with routing":
        call = replace(call, return_routing=True)
    elif how == "unfinalised":
        call = replace(call, do_finalize=False)
    expected = bench.expected(call)
    placed = bench.memory.placed(call, 3 * HIDDEN_SIZE * 2 - 1 if how == "no room" else 1 << 14)
    if how == "no memory":
        placed.place = None
    assert [bench.memory.read(answer) for answer in bench.run(placed)] == expected
    assert len(addresses(bench.sent)) == 2
    assert not addresses(bench.fetched)


def test_little_is_copied_by_the_processor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "MIN_DIRECT_BYTES", 3 * HIDDEN_SIZE)
    bench.memory.pin()
    calls = [usual(bench, 3, 0), usual(bench, 2, 1)]
    expected = bench.expected(*calls)
    placed = [bench.memory.placed(call) for call in calls]
    assert [bench.memory.read(answer) for answer in bench.run(*placed)] == expected
    assert addresses(bench.sent) == [pinning.address_of(placed[0].hidden_states.data)]
    assert addresses(bench.fetched) == [pinning.address_of(call.place) for call in placed if call.place is not None]


def test_what_the_processor_copies_side_by_side_goes_in_one_copy(bench: Bench) -> None:
    bench.memory.pin()
    calls = [usual(bench, 2, seed) for seed in range(6)]
    expected = bench.expected(*calls)
    given = [bench.memory.placed(call) if seed == 3 else by_bytes(call) for seed, call in enumerate(calls)]
    answers = bench.run(*given)
    assert bench.memory.read(answers[3]) == expected[3]
    layout_start = 256 + 16 * 8 * 4  # the count, and 16 rows of 8 logits
    assert [span[:2] for span in bench.sent] == [
        (0, 256 + 6 * 8 * 4),  # the logits of three, and then...
        (256 + 6 * 8 * 4, 2 * 8 * 4),
        (256 + 8 * 8 * 4, layout_start - (256 + 8 * 8 * 4) + 6 * HIDDEN_SIZE),  # ... of two, and hidden states of three
        (layout_start + 6 * HIDDEN_SIZE, 2 * HIDDEN_SIZE),
        (layout_start + 8 * HIDDEN_SIZE, 4 * HIDDEN_SIZE),
    ]
    assert [span[:2] for span in bench.fetched] == [
        (0, 512 + 6 * HIDDEN_SIZE * 2),
        (512 + 6 * HIDDEN_SIZE * 2, 2 * HIDDEN_SIZE * 2),
        (512 + 8 * HIDDEN_SIZE * 2, 4 * HIDDEN_SIZE * 2),
    ]


def test_memory_stays_until_the_batch_is_over_whoever_leaves(bench: Bench) -> None:
    bench.memory.pin()
    call = bench.memory.placed(usual(bench, 4, 1))
    promise = bench.engine.submit(call)
    assert bench.engine.batcher.launch_once()
    assert not promise.cancel(), "it runs"
    del call, promise
    bench.memory = SharedMemory(bench.pinner)
    gc.collect()
    assert bench.device.pinned, "the device is not done with it"
    while bench.engine.batcher.finish_once():
        pass
    wait_for(lambda: not bench.device.pinned)


def test_a_waiting_call_that_is_cancelled_is_never_written(bench: Bench) -> None:
    bench.memory.pin()
    call = bench.memory.placed(usual(bench, 4, 1))
    promise = bench.engine.submit(call)
    assert promise.cancel()
    before = bytes(bench.memory.view)
    assert not bench.engine.batcher.run_once()
    assert bytes(bench.memory.view) == before


def test_a_batch_that_fails_when_answers_may_be_written_does_not_run_these_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.memory.pin()
    calls = [usual(bench, 2, seed) for seed in range(3)]
    expected = bench.expected(*calls)
    given = [bench.memory.placed(calls[0]), by_bytes(calls[1]), bench.memory.placed(replace(calls[2]), 16)]
    failures = iter([True])
    for slot in bench.slots:
        times = slot.times
        monkeypatch.setattr(slot, "times", lambda times=times: 1 / 0 if next(failures, False) else times())
    promises = [bench.engine.submit(call) for call in given]
    with caplog.at_level(logging.WARNING):
        while bench.engine.batcher.run_once():
            pass
    assert "a batch of 3 requests failed, 2 run again one by one" in caplog.text
    caplog.clear()  # it has the error, which will know this frame
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        promises[0].result(0)
    assert everything(pb.ForwardResponse.FromString(promises[1].result(0))) == expected[1]
    assert bench.memory.read(promises[2].result(0)) == expected[2]


def test_a_batch_that_fails_before_that_runs_all_of_them_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.memory.pin()
    calls = [usual(bench, 2, seed) for seed in range(3)]
    expected = bench.expected(*calls)
    failures = iter([True])
    for slot in bench.slots:
        compute = slot.compute
        monkeypatch.setattr(slot, "compute", lambda compute=compute: 1 / 0 if next(failures, False) else compute())
    assert [bench.memory.read(answer) for answer in bench.run(*map(bench.memory.placed, calls))] == expected
    caplog.clear()  # as above


def test_a_slot_that_breaks_down_half_way_leaves_no_answer_on_its_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of a batch's answers are under way when the next cannot be started: nothing is told before they end."""
    bench.memory.pin()
    calls = [usual(bench, 2, seed) for seed in range(2)]
    bench.expected(*calls)
    for slot in bench.slots:
        fetch = slot.fetch

        def fail(copies: list[spans.Span], fetch: Callable[[list[spans.Span]], None] = fetch) -> None:
            fetch(copies)
            raise RuntimeError("no more copies")

        monkeypatch.setattr(slot, "fetch", fail)
    promises = [bench.engine.submit(bench.memory.placed(call)) for call in calls]
    while bench.engine.batcher.run_once():
        pass
    after = bytes(bench.memory.view)
    for promise in promises:
        with pytest.raises(BackendError, match="no more copies"):
            promise.result(0)
    bench.device.get_done()
    assert bytes(bench.memory.view) == after


def test_results_whose_answers_nobody_encodes_have_memory_of_their_own(bench: Bench) -> None:
    bench.memory.pin()
    call = usual(bench, 3, 1)
    placed = bench.memory.placed(call)
    placed.encode = None
    result = bench.run(placed)[0]
    bench.memory.view[:] = bytes(len(bench.memory.view))
    output = result.output  # type: ignore[attr-defined]
    (expected,) = bench.run(call)
    assert torch.equal(output.view(torch.int16), expected.output.view(torch.int16))  # type: ignore[attr-defined]


class TestSpans:
    def test_neighbours_and_those_with_a_small_gap_between_are_one(self) -> None:
        made = Spans(4)
        made.add(256, 100)
        made.add(356, 100)
        made.add(456 + 64 * 1024, 10)
        assert made.copies == whole(466 + 64 * 1024)
        made.add(466 + 2 * 64 * 1024 + 1, 10)
        assert made.copies[1:] == [(466 + 2 * 64 * 1024 + 1, 10, 0)]

    def test_nothing_is_no_copy(self) -> None:
        made = Spans(4)
        made.add(1 << 20, 0)
        made.add_direct(1 << 20, 100, 1 << 40)
        made.add((1 << 20) + 100, 0)
        assert made.copies == [(0, 4, 0), (1 << 20, 100, 1 << 40)]

    def test_what_is_direct_stands_for_itself(self) -> None:
        made = Spans(4)
        made.add_direct(256, 100, 1 << 40)
        made.add_direct(356, 100, (1 << 40) + 100)
        made.add(456, 1)
        made.add(457, 1)
        assert made.copies == [(0, 4, 0), (256, 100, 1 << 40), (356, 100, (1 << 40) + 100), (456, 2, 0)]

    def test_no_copy_reaches_from_one_pinned_piece_into_the_next(self) -> None:
        piece = pinning.PIECE_BYTES
        made = Spans(4)
        made.add_direct(256, 2 * piece + 20, 5 * piece - 10)
        assert made.copies[1:] == [
            (256, 10, 5 * piece - 10),
            (266, piece, 5 * piece),
            (266 + piece, piece, 6 * piece),
            (266 + 2 * piece, 10, 7 * piece),
        ]
