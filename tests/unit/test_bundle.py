"""Requests of front-ends that the engine has as one call: each is answered, or not, as if alone."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_calls import FP8, check, make_call
from fake_device import FakeCapturer, FakeCudaBackend, fake_slots
from shared_calls import SharedMemory
from test_remote import ARENA_BYTES, Side, to_result

from expertd_server import bundle as bundle_module
from expertd_server import spans
from expertd_server.batch import Limits
from expertd_server.blocks import answer_place, block_bytes, read_call, write_call
from expertd_server.bundle import BundledCalls, bundles_of
from expertd_server.engine import BatchReport, Engine
from expertd_server.forward import ForwardCall, HostTensor
from expertd_server.gate import EngineGate
from expertd_server.gather import gather
from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind, input_layout, output_layout
from expertd_server.native import Copies
from expertd_server.promise import Promise
from expertd_server.remote import SUBMIT
from expertd_server.remote_codec import RemoteCall
from expertd_server.ring import Ring, ring_bytes
from expertd_server.scatter import scatter
from expertd_server.spans import Spans, each_of
from expertd_server.status import RelayedError
from expertd_server.store import LayerStore
from expertd_server.synthetic import synthetic_layers
from expertd_server.wire import WIRE_DTYPES, call_of
from expertd_server.wire_check import CheckedRequest

pytestmark = pytest.mark.skipif(not bundle_module.IS_COMPILED, reason="the compiled modules were not built")

PATIENCE_S = 10.0
LIMITS = Limits(max_batch_tokens=32, max_queue_tokens=400, max_queue_requests=5)
MOST_TOKENS = 8  # a quarter of a batch


class Rig:
    """A front-end, and a gate to an engine on a fake device, whose batches run when the test says so."""

    def __init__(self) -> None:
        self.inlet, self.outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.backend = FakeCudaBackend()
        self.slots = fake_slots(3)
        self.reports: list[BatchReport] = []
        self.engine = Engine(
            LIMITS,
            self.backend,
            max_graph_tokens=16,
            slots=self.slots,
            capturer=FakeCapturer(),
            on_batch=self.reports.append,
        )
        self.layers = [
            MoELayer(name, self.backend.prepare(spec, weights), self.backend)
            for name, spec, weights in synthetic_layers("tiny", 2)
        ]
        self.store: LayerStore[MoELayer] = LayerStore()
        self.store.replace([(layer, True) for layer in self.layers], is_loading=False)
        self.submitted: list[object] = []
        """What the engine was asked."""
        submit = self.engine.submit

        def submit_and_tell(call: Any, *others: Any) -> Any:
            promise = submit(call, *others)
            self.submitted.append(call)
            return promise

        self.engine.submit = submit_and_tell  # type: ignore[method-assign]
        self.gate = EngineGate(
            self.engine,
            self.store,
            self.outlet,
            backend="fake",
            device="none",
            max_bundle_tokens=self.engine.max_bundle_tokens,
        )
        self.gate.start()
        self.gate.publish()
        self.sides: list[Side] = []
        self.side = self.add_side()

    def add_side(self) -> Side:
        """Another front-end."""
        side = Side(f"front-end {len(self.sides)}", self.inlet)
        side.wait_serving()
        self.sides.append(side)
        return side

    def ask(
        self, *calls: ForwardCall, deadlines_s: dict[int, float] | None = None, side: Side | None = None
    ) -> list[Promise[Any]]:
        """Send them so that the gate reads all of them at once, and wait until it has."""
        side = side or self.side
        may_read, waits = threading.Event(), threading.Event()

        def hold() -> None:
            waits.set()
            assert may_read.wait(PATIENCE_S)

        self.gate.soon(hold)
        assert waits.wait(PATIENCE_S)
        promises = [
            side.remote.submit(self.remote(call, side), (deadlines_s or {}).get(n)) for n, call in enumerate(calls)
        ]
        may_read.set()
        self.let_read()
        return promises

    def let_read(self) -> None:
        """Wait until the gate has read what was sent."""
        for _ in range(2):  # the first is called before it looks for more
            was_read = threading.Event()
            self.gate.soon(was_read.set)
            assert was_read.wait(PATIENCE_S)

    def remote(self, call: ForwardCall, side: Side | None = None) -> RemoteCall:
        return RemoteCall((side or self.side).layer(call.layer.name), as_checked(call), to_result)

    def run(self) -> None:
        """All batches that are due."""
        while self.engine.batcher.run_once():
            pass

    def num_tokens_of_bundles(self) -> list[int]:
        return [call.num_tokens for call in self.submitted if isinstance(call, BundledCalls)]

    def close(self) -> None:
        assert self.engine.slots.in_use == 0
        for side in self.sides:
            wait_for(lambda side=side: side.remote._link is None or side.is_arena_free())
            assert side.remote.stop(PATIENCE_S)
        self.gate.close()
        self.inlet.close()
        self.outlet.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it never came to pass"
        time.sleep(0.001)


def as_checked(call: ForwardCall) -> CheckedRequest:
    def part(tensor: HostTensor | None) -> Any:
        return None if tensor is None else (WIRE_DTYPES[tensor.dtype], tensor.data)

    tensors = (call.hidden_states, call.routing_logits, call.topk_ids, call.topk_weights)
    hidden_states, *others = map(part, tensors)
    dtype = WIRE_DTYPES[call.output_dtype]
    return call.num_tokens, hidden_states, *others, dtype, call.do_finalize, call.return_routing


def is_plain(call: ForwardCall) -> bool:
    real = call.routing_logits is None or call.routing_logits.dtype == torch.float32
    weights = call.topk_weights is None or call.topk_weights.dtype == torch.bfloat16
    return call.do_finalize and not call.return_routing and real and weights


def usual(rig: Rig, count: int, num_tokens: int = 1) -> list[ForwardCall]:
    return [make_call(rig.layers[0], num_tokens, seed, usual=True) for seed in range(count)]


def error_of(promise: Promise[Any]) -> str:
    with pytest.raises(RelayedError) as caught:
        promise.result(PATIENCE_S)
    return caught.value.status.message


def test_what_comes_together_is_one_call_and_each_has_its_answer(rig: Rig) -> None:
    calls = usual(rig, 5)
    promises = rig.ask(*calls)
    assert rig.num_tokens_of_bundles() == [5]
    assert len(rig.submitted) == 1
    assert rig.engine.batcher.queue_requests == 5
    rig.run()
    for call, promise in zip(calls, promises, strict=True):
        answer = promise.result(PATIENCE_S)
        check(call, answer, "in a bundle")
        assert (answer.timing.batch_tokens, answer.timing.batch_requests) == (5, 5)
        assert answer.timing.compute_us == 4000
    assert [(report.num_requests, report.num_tokens) for report in rig.reports] == [(5, 5)]
    assert rig.engine.batcher.queue_requests == rig.engine.batcher.queue_tokens == 0


def test_requests_of_any_kind_are_answered_with_their_bits(rig: Rig) -> None:
    bundled = alone = 0
    for seed in range(40):
        chance = random.Random(seed)
        calls = [
            make_call(
                chance.choice(rig.layers), chance.choice((0, 1, 2, 5, 9)), seed * 10 + n, usual=chance.random() < 0.4
            )
            for n in range(5)
        ]
        rig.submitted.clear()
        promises = rig.ask(*calls)
        bundles = [call for call in rig.submitted if isinstance(call, BundledCalls)]
        assert sum(call.num_requests for call in bundles) == sum(map(is_plain, calls))
        assert all(call.num_tokens <= LIMITS.max_batch_tokens for call in bundles)
        bundled += sum(call.num_requests > 1 for call in bundles)
        alone += len(rig.submitted) - len(bundles)
        rig.run()
        for call, promise in zip(calls, promises, strict=True):
            check(call, promise.result(PATIENCE_S), f"seed {seed}")
    assert bundled > 10
    assert alone > 50


def test_one_of_them_is_taken_back_and_the_others_run(rig: Rig) -> None:
    calls = usual(rig, 4, 2)
    promises = rig.ask(*calls)
    assert promises[1].cancel()
    rig.let_read()
    rig.run()
    for n in (0, 2, 3):
        check(calls[n], promises[n].result(PATIENCE_S), f"the {n}-th")
    assert [(report.num_requests, report.num_tokens) for report in rig.reports] == [(3, 6)]


def test_all_of_them_are_taken_back_and_nothing_runs(rig: Rig) -> None:
    promises = rig.ask(*usual(rig, 3))
    assert all(promise.cancel() for promise in promises)
    rig.let_read()
    assert rig.engine.batcher.queue_requests == rig.engine.batcher.queue_tokens == 0
    assert not rig.engine.batcher.run_once()


def test_one_that_runs_cannot_be_taken_back(rig: Rig) -> None:
    calls = usual(rig, 3)
    promises = rig.ask(*calls)
    assert rig.engine.batcher.launch_once()
    assert promises[1].cancel()  # its caller has left; the engine has it all the same
    rig.let_read()
    assert not rig.side.is_arena_free()
    assert rig.engine.batcher.finish_once()
    check(calls[0], promises[0].result(PATIENCE_S), "the first")
    check(calls[2], promises[2].result(PATIENCE_S), "the last")


@pytest.mark.parametrize("late", [(1,), (0, 1, 2, 3)])
def test_who_is_late_is_told_so_and_the_others_run(rig: Rig, late: tuple[int, ...]) -> None:
    calls = usual(rig, 4)
    soon_s = time.monotonic() + 0.05
    promises = rig.ask(*calls, deadlines_s=dict.fromkeys(late, soon_s))
    time.sleep(max(0.0, soon_s - time.monotonic()) + 0.001)
    rig.run()
    for n, promise in enumerate(promises):
        if n in late:
            assert error_of(promise).startswith("the deadline passed after 0.")
        else:
            check(calls[n], promise.result(PATIENCE_S), f"the {n}-th")
    assert sum(report.num_requests for report in rig.reports) == 4 - len(late)


def test_who_joined_later_and_is_late_is_told_how_long_it_waited_itself(rig: Rig) -> None:
    rig.ask(*usual(rig, 1))
    time.sleep(0.3)
    (late,) = rig.ask(*usual(rig, 1), deadlines_s={0: time.monotonic() + 0.01})
    assert len(rig.submitted) == 1
    time.sleep(0.05)
    rig.run()
    assert error_of(late).startswith("the deadline passed after 0.0") or "after 0.1" in error_of(late)


def test_of_a_bundle_that_does_not_fit_into_the_queue_some_do(rig: Rig) -> None:
    first, more = usual(rig, 4), usual(rig, 4)
    promises = rig.ask(*first)
    others = rig.ask(*more)
    refused = [error_of(promise) for promise in others[1:]]
    assert all(text.startswith("the queue is full: 5 requests wait, at most 5 may") for text in refused)
    rig.run()
    for call, promise in zip(first + more[:1], promises + others[:1], strict=True):
        check(call, promise.result(PATIENCE_S), "one that had room")


def test_when_a_bundle_fails_only_who_is_to_blame_has_the_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = usual(rig, 5)
    bad = calls[2].hidden_states.to_tensor().view(torch.uint8)
    for slot in rig.slots:
        compute = slot.compute

        def fail(slot: Any = slot, compute: Callable[[], Any] = compute) -> Any:
            slot.device.get_done()
            has_it = (slot.device_in.unfold(0, bad.numel(), 1)[::1] == bad.view(-1)).all(1).any()
            slot.device_in.fill_(0)
            return 1 / 0 if has_it else compute()

        monkeypatch.setattr(slot, "compute", fail)
    monkeypatch.setattr(rig.engine, "graphs", None)
    promises = rig.ask(*calls)
    num_runs = 0
    while rig.engine.batcher.run_once():
        num_runs += 1
        rig.let_read()
    assert num_runs == 2 + len(calls), "as a bundle, each in the company of the others, each alone"
    assert "ZeroDivisionError" in error_of(promises[2])
    assert all(promises[n].exception(PATIENCE_S) is None for n in (0, 1, 3, 4))


def test_what_asks_for_a_layer_that_has_gone_is_told_to_come_again(rig: Rig) -> None:
    calls = usual(rig, 3)
    promise_of = [rig.remote(call) for call in calls]
    rig.store.replace([(rig.layers[1], True)], is_loading=False)
    rig.gate.publish(PATIENCE_S)
    promises = [rig.side.remote.submit(call) for call in promise_of]
    assert all("the layers held here changed" in error_of(promise) for promise in promises)


def test_a_front_end_that_goes_leaves_nothing_in_the_queue(rig: Rig) -> None:
    rig.ask(*usual(rig, 4))
    assert rig.side.remote.stop(PATIENCE_S)
    wait_for(lambda: not rig.engine.batcher.queue_requests)
    assert not rig.engine.batcher.run_once()


def test_an_engine_that_gives_up_fails_all_of_them_once(rig: Rig) -> None:
    promises = rig.ask(*usual(rig, 4))
    assert len(rig.submitted) == 1
    rig.engine.batcher.abandon()
    assert all("hangs" in error_of(promise) for promise in promises)


def test_what_comes_later_joins_what_waits_whichever_front_end_sends_it(rig: Rig) -> None:
    other = rig.add_side()
    calls = usual(rig, 5)
    promises = rig.ask(*calls[:2]) + rig.ask(*calls[2:4], side=other) + rig.ask(calls[4])
    assert len(rig.submitted) == 1
    assert rig.num_tokens_of_bundles() == [5]
    assert (rig.engine.batcher.queue_requests, rig.engine.batcher.queue_tokens) == (5, 5)
    rig.run()
    for call, promise in zip(calls, promises, strict=True):
        answer = promise.result(PATIENCE_S)
        check(call, answer, "in a bundle of two front-ends")
        assert answer.timing.batch_requests == 5
    assert len(rig.reports) == 1


def test_each_is_told_how_long_it_waited_itself(rig: Rig) -> None:
    calls = usual(rig, 2)
    first = rig.ask(calls[0])
    time.sleep(0.05)
    second = rig.ask(calls[1])
    assert len(rig.submitted) == 1
    rig.run()
    waited_us = [promise.result(PATIENCE_S).timing.queue_us for promise in first + second]
    assert waited_us[0] - waited_us[1] >= 50_000


def test_a_bundle_grows_up_to_a_batch_and_not_after_it_has_begun(rig: Rig) -> None:
    calls = usual(rig, 5, MOST_TOKENS)
    promises = [promise for call in calls for promise in rig.ask(call)]
    assert rig.num_tokens_of_bundles() == [LIMITS.max_batch_tokens, MOST_TOKENS]
    assert rig.engine.batcher.launch_once()
    assert rig.engine.batcher.finish_once()
    more = usual(rig, 1)
    promises += rig.ask(*more)
    assert rig.num_tokens_of_bundles() == [LIMITS.max_batch_tokens, MOST_TOKENS + 1]
    rig.run()
    for call, promise in zip(calls + more, promises, strict=True):
        check(call, promise.result(PATIENCE_S), "of a full batch or the next")


def test_as_many_join_as_have_room_in_the_batch(rig: Rig) -> None:
    first, more = usual(rig, 1, 25), usual(rig, 4, 3)
    promises = rig.ask(*first) + rig.ask(*more)
    assert rig.num_tokens_of_bundles() == [25 + 2 * 3, 2 * 3]
    rig.run()
    assert [(report.num_requests, report.num_tokens) for report in rig.reports] == [(3, 31), (2, 6)]
    for call, promise in zip(first + more, promises, strict=True):
        check(call, promise.result(PATIENCE_S), "of a full batch or the next")


def test_nothing_joins_what_another_request_has_queued_behind(rig: Rig) -> None:
    early, late = usual(rig, 1), usual(rig, 2)[1:]
    between = make_call(rig.layers[0], 2, 7, usual=True)
    between.return_routing = True
    promises = rig.ask(*early) + rig.ask(between) + rig.ask(*late)
    assert len(rig.submitted) == 3, "in order of arrival"
    rig.run()
    for call, promise in zip([*early, between, *late], promises, strict=True):
        check(call, promise.result(PATIENCE_S), "one of three")


def test_who_leaves_a_bundle_makes_room_in_the_queue(rig: Rig) -> None:
    promises = rig.ask(*usual(rig, 5))
    assert promises[0].cancel()
    rig.let_read()
    assert (rig.engine.batcher.queue_requests, rig.engine.batcher.queue_tokens) == (4, 4)
    calls = usual(rig, 1)
    (promise,) = rig.ask(*calls)
    rig.run()
    check(calls[0], promise.result(PATIENCE_S), "where another was")
    assert [report.num_requests for report in rig.reports] == [5]


def test_a_front_end_that_goes_takes_its_own_out_of_a_bundle(rig: Rig) -> None:
    other = rig.add_side()
    calls = usual(rig, 4)
    kept = rig.ask(*calls[:2], side=other)
    rig.ask(*calls[2:])
    assert len(rig.submitted) == 1
    assert rig.side.remote.stop(PATIENCE_S)
    wait_for(lambda: rig.engine.batcher.queue_requests == 2)
    rig.run()
    for call, promise in zip(calls, kept, strict=False):
        check(call, promise.result(PATIENCE_S), "of who stayed")


def test_a_front_end_that_goes_while_its_bundle_runs_keeps_nobody_from_an_answer(rig: Rig) -> None:
    other = rig.add_side()
    calls = usual(rig, 3)
    kept = rig.ask(*calls[:2], side=other)
    rig.ask(calls[2])
    assert rig.engine.batcher.launch_once()
    assert rig.side.remote.stop(PATIENCE_S)
    wait_for(lambda: len(set(rig.gate._peers.values())) == 1)
    assert rig.engine.batcher.finish_once()
    for call, promise in zip(calls, kept, strict=False):
        check(call, promise.result(PATIENCE_S), "of who stayed")


def test_bundles_that_differ_do_not_absorb_each_other() -> None:
    backend = FakeCudaBackend()
    ((name, spec, weights),) = synthetic_layers("tiny", 1)
    layer = MoELayer(name, backend.prepare(spec, weights), backend)
    calls = [make_call(layer, 1, seed, usual=True) for seed in range(2)]
    calls[1].output_dtype = torch.float32
    (one, other), _ = (laid := Laid(calls, pinned=False)).bundles(8)
    with pytest.raises(ValueError, match="of one kind"):
        one.absorb(other, 8, 8)
    with pytest.raises(ValueError, match="absorbs another bundle"):
        one.absorb(one, 8, 8)
    (same,), _ = Laid(calls[:1], pinned=False).bundles(8)
    one.begin(0.0)
    with pytest.raises(ValueError, match="neither have begun"):
        one.absorb(same, 8, 8)
    assert (one.num_requests, same.num_requests, laid.ring.take()) == (1, 1, [])


class Laid:
    """Calls in blocks, one behind the other in memory that a fake device may copy from and to."""

    def __init__(self, calls: list[ForwardCall], *, pinned: bool) -> None:
        # With room, what the first copies ask for would be pinned before the second are made, at times.
        self.pinner = fake_slots(1)[0].device.pinner(1 << 30 if pinned else 0)
        shared = SharedMemory(self.pinner)
        self.view = shared.view
        self.ring = a_ring()
        self.descriptors = []
        self.given = []
        at = 0
        for number, call in enumerate(calls):
            spec = call.layer.spec
            checked = as_checked(call)
            nbytes = block_bytes(checked, spec.hidden_size, spec.top_k)
            block = self.view[at : at + nbytes]
            write_call(block, checked, 5, None)
            self.descriptors.append((SUBMIT, number, at, nbytes))
            self.given.append(block)
            at += -(-nbytes // 4096) * 4096
        if pinned:
            shared.pin()

    def bundles(self, most_tokens: int) -> tuple[list[Any], list[Any]]:
        return bundles_of(self.descriptors, SUBMIT, self, self.ring, self.view, {}, most_tokens, 0.0)


def a_ring() -> Ring:
    return Ring(memoryview(mmap.mmap(-1, ring_bytes(8))), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))


@pytest.mark.parametrize("least_direct", [1, 300, 1 << 30])
@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_bundle_is_copied_as_its_members_would_be(
    monkeypatch: pytest.MonkeyPatch, least_direct: int, is_pinned: bool
) -> None:
    monkeypatch.setattr(spans, "MIN_DIRECT_BYTES", least_direct)
    backend = FakeCudaBackend()
    ((name, spec, weights),) = synthetic_layers("tiny", 1)
    layer = MoELayer(name, backend.prepare(spec, weights), backend)
    for seed in range(10):
        chance = random.Random(seed)
        dtype, output = chance.choice((FP8, torch.float32)), torch.bfloat16
        candidates = (make_call(layer, chance.randrange(6), seed * 1000 + n) for n in itertools.count())
        wanted = BatchKind(dtype, chance.random() < 0.5, output)
        calls = list(itertools.islice((call for call in candidates if is_plain(call) and call.kind == wanted), 5))
        laid = Laid(calls, pinned=is_pinned)
        (bundle,), others = laid.bundles(1 << 20)
        assert not others
        singles = []
        for block in laid.given:
            _, _, checked, _ = read_call(block, {})
            single = call_of(layer, checked)
            single.place, single.encode = answer_place(block), lambda result: result
            singles.append(single)
        together = BundledCalls(layer, bundle, wanted, lambda *_: None, lambda: 0)
        num_tokens = together.num_tokens
        assert num_tokens == sum(call.num_tokens for call in calls)
        layout = input_layout(spec, wanted, num_tokens)
        one, other = (torch.zeros(layout.nbytes(num_tokens), dtype=torch.uint8).numpy() for _ in range(2))
        assert list(each_of(gather(one, layout, layer, [together]))) == gather(other, layout, layer, singles)
        assert (one == other).all()
        outputs = output_layout(spec, wanted, num_tokens)
        copies, places = scatter(outputs, [together], num_tokens, wants_routing=False)
        assert (list(each_of(copies)), any(places)) == (
            (expected := scatter(outputs, singles, num_tokens, wants_routing=False))[0],
            any(expected[1]),
        )
        assert bundle.is_spent == any(places)
        # In the company of what is no bundle.
        bigger = input_layout(spec, wanted, 2 * num_tokens)
        one, other = (torch.zeros(bigger.nbytes(2 * num_tokens), dtype=torch.uint8).numpy() for _ in range(2))
        mixed, apart = [together, *singles], [*singles, *singles]
        assert gather(one, bigger, layer, mixed) == gather(other, bigger, layer, apart)
        assert (one == other).all()
        outputs = output_layout(spec, wanted, 2 * num_tokens)
        copies, _ = scatter(outputs, mixed, 2 * num_tokens, wants_routing=False)
        assert copies == scatter(outputs, apart, 2 * num_tokens, wants_routing=False)[0]
        del mixed, apart, bundle, together, singles, single, block, checked, laid


def test_a_member_that_has_not_as_many_bytes_is_refused() -> None:
    backend = FakeCudaBackend()
    ((name, spec, weights),) = synthetic_layers("tiny", 1)
    layer = MoELayer(name, backend.prepare(spec, weights), backend)
    call = make_call(layer, 2, 1, usual=True)
    laid = Laid([call], pinned=False)
    (bundle,), _ = laid.bundles(8)
    flat = torch.zeros(1 << 16, dtype=torch.uint8).numpy()
    with pytest.raises(ValueError, match="part 0 of a request of 2 tokens has"):
        bundle.gather(0, flat, 0, spec.hidden_size + 1, 1, Spans(4).copies, Copies())
    with pytest.raises(ValueError, match="expected 512, and 511 fit in"):
        bundle.gather(0, flat[:511], 0, spec.hidden_size, 1, Spans(4).copies, Copies())


def test_what_makes_no_sense_is_left_to_who_reads_it_alone() -> None:
    memory = memoryview(bytearray(ARENA_BYTES))
    beyond = (SUBMIT, 1, ARENA_BYTES - 10, 4096)
    small = (SUBMIT, 2, 0, 8)
    cancel = (SUBMIT + 1, 3, 0, 0)
    empty = (SUBMIT, 4, 0, 4096)
    ring, given = a_ring(), [beyond, small, cancel, empty]
    assert bundles_of(given, SUBMIT, None, ring, memory, {}, 8, 0.0) == ([], given)
    with pytest.raises(TypeError, match="a str is given, expected a Ring"):
        bundles_of(given, SUBMIT, None, "no ring", memory, {}, 8, 0.0)  # type: ignore[arg-type]
    ring.close()
