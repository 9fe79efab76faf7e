"""The engine on the CPU and on a device that is none: whatever the company, every answer is that of the operator."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future
from functools import partial

import pytest
import torch
from engine_calls import check, make_call
from fake_device import FakeCapturer, FakeCudaBackend, fake_slots

from expertd.v1 import expertd_pb2 as pb
from expertd_server import codec
from expertd_server.backend_cpu import TorchBackend
from expertd_server.batch import Limits
from expertd_server.engine import BatchReport, Engine, ForwardCall, ForwardResult
from expertd_server.errors import BackendError
from expertd_server.layer import MoELayer
from expertd_server.spans import whole
from expertd_server.synthetic import synthetic_layers

PATIENCE_S = 30.0
LIMITS = Limits(max_batch_tokens=32, max_queue_tokens=2000, max_queue_requests=500)


class Bench:
    """An engine, on the CPU or on the fake device with graphs of up to 16 rows, and two layers."""

    def __init__(self, *, is_host: bool = False, max_graph_tokens: int = 16) -> None:
        self.reports: list[tuple[int, int, int | None]] = []
        self.backend = FakeCudaBackend()
        self.capturer = FakeCapturer()
        self.slots = fake_slots(3)
        if is_host:
            self.engine = Engine(LIMITS, TorchBackend("cpu"), on_batch=self._report)
        else:
            self.engine = Engine(
                LIMITS,
                self.backend,
                max_graph_tokens=max_graph_tokens,
                on_batch=self._report,
                slots=self.slots,
                capturer=self.capturer,
            )
        backend = TorchBackend("cpu") if is_host else self.backend
        self.layers = [
            MoELayer(name, backend.prepare(spec, weights), backend)
            for name, spec, weights in synthetic_layers("tiny", 2)
        ]

    def _report(self, report: BatchReport) -> None:
        assert report.topk_ids.shape == (report.num_tokens, report.layer.spec.top_k)
        assert ((report.topk_ids >= -1) & (report.topk_ids < report.layer.spec.num_experts)).all()
        self.reports.append((report.num_requests, report.num_tokens, report.graph_rows))

    def run(self, *calls: ForwardCall) -> list[ForwardResult]:
        futures = [self.engine.submit(call) for call in calls]
        while self.engine.batcher.run_once():
            pass
        return [future.result(0) for future in futures]


@pytest.mark.parametrize("is_host", [True, False], ids=["cpu", "device"])
def test_an_answer_that_cannot_be_written_fails_its_call_alone_and_nothing_runs_twice(is_host: bool) -> None:
    """An answer may have been written over what it was computed from, so no batch runs again after that."""
    bench = Bench(is_host=is_host)
    calls = [make_call(bench.layers[0], 2, seed, usual=True) for seed in range(3)]
    encoded: list[int] = []

    def encode(number: int, result: ForwardResult) -> bytes:
        encoded.append(number)
        if number == 1:
            raise ZeroDivisionError("no room")
        assert result.output is not None
        return result.output.view(torch.uint8).numpy().tobytes()

    expected = [encode(0, result) for result in bench.run(*calls)]
    encoded.clear()
    bench.reports.clear()
    for number, call in enumerate(calls):
        call.encode = partial(encode, number)
    promises = [bench.engine.submit(call) for call in calls]
    while bench.engine.batcher.run_once():
        pass
    assert [promises[0].result(0), promises[2].result(0)] == [expected[0], expected[2]]
    with pytest.raises(ZeroDivisionError, match="no room"):
        promises[1].result(0)
    assert encoded == [0, 1, 2]
    assert [num_requests for num_requests, _, _ in bench.reports] == [3]
    assert bench.engine.slots.in_use == 0


@pytest.mark.parametrize("is_host", [True, False], ids=["cpu", "device"])
def test_any_company_gives_the_operator_s_bytes(is_host: bool) -> None:
    bench = Bench(is_host=is_host)
    for seed in range(12):
        chance = random.Random(seed)
        calls = [
            make_call(chance.choice(bench.layers), chance.choice((0, 1, 2, 5, 16, 31)), seed * 100 + n)
            for n in range(8)
        ]
        for call, result in zip(calls, bench.run(*calls), strict=True):
            check(call, result, f"seed {seed}")
    assert bench.engine.slots.in_use == 0


@pytest.mark.parametrize("is_host", [True, False], ids=["cpu", "device"])
def test_any_company_gives_the_bytes_of_the_answer_to_one_alone(is_host: bool) -> None:
    """Written where they lie: what is copied later must still be there then, of whatever type it is."""
    bench = Bench(is_host=is_host)
    for seed in range(12):
        calls = [make_call(bench.layers[0], 1 + n % 3, seed * 100 + n) for n in range(8)]
        for call in calls:
            call.encode = lambda result: codec.write_stream_answer(1, result, 0)
        lone = [tensors_of(bench.run(call)[0]) for call in calls]
        assert [tensors_of(answer) for answer in bench.run(*calls)] == lone, f"seed {seed}"


def tensors_of(answer: object) -> bytes:
    assert isinstance(answer, bytes)
    message = pb.ForwardStreamResponse.FromString(answer)
    message.response.ClearField("timing")
    return message.SerializeToString(deterministic=True)


def test_every_bucket_full_and_in_part() -> None:
    bench = Bench()
    bench.engine.capture(bench.layers)
    bench.backend.calls.clear()
    for tokens in range(18):
        call = make_call(bench.layers[tokens % 2], tokens, tokens, usual=True)
        check(call, bench.run(call)[0], f"{tokens} tokens")
    rows = [graph_rows for _, _, graph_rows in bench.reports]
    assert rows == [1, 1, 2, 4, 4, 8, 8, 8, 8, *[16] * 8, None], "beyond the largest bucket, no graph"
    eager = [c for c in bench.backend.calls if c.get("num_valid_tokens") is None and "out" in c]
    assert [len(c["hidden_states"]) for c in eager] == [17]


def test_a_batch_is_one_copy_in_and_one_copy_out_and_padding_is_not_copied() -> None:
    bench = Bench()
    bench.engine.capture(bench.layers)
    slot = bench.slots[-1]
    slot.sent.clear()
    slot.fetched.clear()
    bench.run(*(make_call(bench.layers[0], 3, seed, usual=True) for seed in range(3)))
    # In: the count, 16 rows of 8 float32, 9 of 256 bytes. Out: 16 rows of 2 int16 and 2 bfloat16, 9 of 256 bfloat16.
    assert slot.sent == [whole(256 + 16 * 8 * 4 + 9 * 256)]
    assert slot.fetched == [whole(256 + 256 + 9 * 256 * 2)]
    assert bench.reports == [(3, 9, 16)]


def test_on_a_device_only_calls_of_one_kind_share_a_batch() -> None:
    for is_host in (True, False):
        bench = Bench(is_host=is_host)
        calls = [
            ForwardCall(**{**vars_of(make_call(bench.layers[0], 2, seed)), "do_finalize": True}) for seed in range(16)
        ]
        bench.run(*calls)
        kinds = {(c.hidden_states.dtype, c.topk_ids is None, c.output_dtype) for c in calls}
        assert len(kinds) > 4
        assert len(bench.reports) == (1 if is_host else len(kinds))


def vars_of(call: ForwardCall) -> dict[str, object]:
    return {name: getattr(call, name) for name in call.__slots__}


def test_a_rare_kind_runs_at_once_and_gets_a_graph_for_the_next_time() -> None:
    bench = Bench()
    call = make_call(bench.layers[0], 3, 7, usual=True)
    for _ in range(2):
        check(call, bench.run(call)[0], "rare")
    assert [graph_rows for *_, graph_rows in bench.reports] == [None, 4]
    assert bench.capturer.captured == 1


def test_a_version_is_swapped_while_its_graphs_are_replayed() -> None:
    bench = Bench()
    old = bench.layers[0]
    _, (name, spec, weights) = synthetic_layers("tiny", 2, seed=5)
    new = MoELayer(name, bench.backend.prepare(spec, weights), bench.backend, 2)
    bench.engine.capture([old])
    in_flight = [make_call(old, 4, 1, usual=True), make_call(new, 4, 1, usual=True)]
    futures = [bench.engine.submit(call) for call in in_flight]
    assert bench.engine.batcher.launch_once()
    capture = threading.Thread(target=bench.engine.capture, args=([new],))
    capture.start()  # it gets the slot in flight as soon as that is given back
    assert bench.engine.batcher.finish_once()
    capture.join(PATIENCE_S)
    while bench.engine.batcher.launch_once() or bench.engine.batcher.finish_once():
        pass
    results = [future.result(0) for future in futures]
    for call, result in zip(in_flight, results, strict=True):
        check(call, result, f"version {call.layer.weights_version}")
        assert result.weights_version == call.layer.weights_version
    assert [graph_rows for *_, graph_rows in bench.reports] == [4, 4]


def test_slots_in_flight_do_not_disturb_one_another() -> None:
    bench = Bench()
    bench.engine.capture(bench.layers)
    calls = [make_call(bench.layers[n % 2], 16, n, usual=True) for n in range(6)]
    futures = [bench.engine.submit(call) for call in calls]
    batcher = bench.engine.batcher
    while batcher.launch_once() or batcher.finish_once():  # always as far ahead as it goes
        assert bench.engine.slots.in_use <= 2
    for call, future in zip(calls, futures, strict=True):
        check(call, future.result(0), "in flight")


def test_a_failure_at_launch_settles_the_slot_and_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(bench.backend.inner, "forward", lambda *_, **__: 1 / 0)
    future = bench.engine.submit(make_call(bench.layers[0], 3, 0, usual=True))
    bench.engine.batcher.run_once()
    with pytest.raises(BackendError, match=r"synthetic\.tiny\.0.*3 tokens.*ZeroDivisionError"):
        future.result(0)
    assert sum(slot.settled for slot in bench.slots) == 1
    assert bench.engine.slots.in_use == 0


def test_a_failure_on_the_device_gives_the_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def fail() -> None:
        raise RuntimeError("illegal address")

    for slot in bench.slots:
        monkeypatch.setattr(slot, "wait", fail)
    futures = [bench.engine.submit(make_call(bench.layers[0], 3, seed, usual=True)) for seed in range(2)]
    while bench.engine.batcher.run_once():
        pass
    for future in futures:
        with pytest.raises(BackendError, match="illegal address"):
            future.result(0)
    assert bench.engine.slots.in_use == 0


def test_timing_says_wait_copies_and_compute() -> None:
    bench = Bench()
    timing = bench.run(make_call(bench.layers[0], 3, 0, usual=True))[0].timing
    assert timing.queue_us >= 2000
    assert timing.copy_in_us >= 1000
    assert timing.compute_us == 4000
    assert timing.copy_out_us >= 8000
    assert (timing.batch_tokens, timing.batch_requests) == (3, 1)


def test_eight_threads_of_any_calls_while_layers_are_captured() -> None:
    bench = Bench()
    bench.engine.batcher.start()
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        chance = random.Random(thread)
        try:
            calls = [make_call(chance.choice(bench.layers), chance.randrange(20), thread * 1000 + n) for n in range(12)]
            futures: list[Future[ForwardResult]] = [bench.engine.submit(call) for call in calls]
            for call, future in zip(calls, futures, strict=True):
                check(call, future.result(PATIENCE_S), f"thread {thread}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    bench.engine.capture(bench.layers)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures, failures
    assert bench.engine.batcher.stop(PATIENCE_S)
    assert bench.engine.slots.in_use == 0
