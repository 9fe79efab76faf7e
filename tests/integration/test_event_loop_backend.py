"""A backend whose batches run in the event loop, as the no-op backend's do: a lone request has a way of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Queue

import grpc
import numpy as np
import pytest
from raw_rings import RawRings
from serving import HIDDEN_SIZE, PATIENCE_S, Running, SteeredBackend, request, running, tensor

from expertd.v1 import expertd_pb2 as pb


@pytest.fixture
def backend() -> SteeredBackend:
    """The CPU backend under the name of the one that computes in no time."""
    backend = SteeredBackend(name="noop")
    backend.gate.set()
    return backend


@pytest.fixture
def live(backend: SteeredBackend) -> Iterator[Running]:
    with running(backend) as live:
        assert live.server.engine.batcher.threads == []
        yield live


class Caller:
    """One stream, driven request by request."""

    def __init__(self, live: Running) -> None:
        self._requests: Queue[pb.ForwardStreamRequest | None] = Queue()
        self.answers = live.stub.ForwardStream(iter(self._requests.get, None), timeout=PATIENCE_S)

    def send(self, *messages: pb.ForwardStreamRequest) -> None:
        for message in messages:
            self._requests.put(message)

    def ask(self, message: pb.ForwardStreamRequest) -> pb.ForwardStreamResponse:
        self.send(message)
        return next(self.answers)

    def end(self) -> None:
        self._requests.put(None)


def message(number: int, num_tokens: int = 3, seed: int = 0) -> pb.ForwardStreamRequest:
    asked = request(np.random.default_rng(seed), num_tokens)
    return pb.ForwardStreamRequest(id=number, request=asked)


def poisoned(number: int) -> pb.ForwardStreamRequest:
    hidden = np.full((2, HIDDEN_SIZE), SteeredBackend.POISON, np.uint8)
    asked = message(number, 2)
    asked.request.hidden_states.CopyFrom(tensor(hidden, pb.DATA_TYPE_FLOAT8_E4M3FN))
    return asked


def test_alone_or_in_company_the_bytes_are_the_operator_s(live: Running, backend: SteeredBackend) -> None:
    with running() as other:
        expected = [other.stub.Forward(message(0, seed=seed).request).output for seed in range(12)]
    caller = Caller(live)
    for seed in range(12):  # one in flight
        answer = caller.ask(message(seed, seed=seed))
        assert (answer.id, answer.response.output) == (seed, expected[seed])
        assert answer.response.timing.batch_requests == 1
    assert [live.stub.Forward(message(0, seed=seed).request).output for seed in range(12)] == expected
    backend.batches.clear()
    caller.send(*(message(seed, seed=seed) for seed in range(12)))
    answers = {answer.id: answer.response.output for _, answer in zip(range(12), caller.answers, strict=False)}
    assert answers == dict(enumerate(expected))
    assert sum(backend.batches) == 36
    caller.end()


def test_a_poisoned_request_fails_alone_whoever_comes_with_it(live: Running) -> None:
    caller = Caller(live)
    assert caller.ask(poisoned(1)).error.code == grpc.StatusCode.INTERNAL.value[0]
    assert caller.ask(message(2)).WhichOneof("result") == "response"
    caller.send(message(3), poisoned(4), message(5), message(6))
    kinds = {answer.id: answer.WhichOneof("result") for _, answer in zip(range(4), caller.answers, strict=False)}
    assert kinds == {3: "response", 4: "error", 5: "response", 6: "response"}
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Forward(poisoned(0).request)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    caller.end()


def test_a_request_beyond_a_batch_is_refused_and_the_next_is_served(backend: SteeredBackend) -> None:
    with running(backend, max_batch_tokens=8, max_queue_tokens=8) as live:
        caller = Caller(live)
        assert caller.ask(message(1, 9)).error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert caller.ask(message(2, 8)).WhichOneof("result") == "response"
        caller.end()


def test_what_comes_while_a_batch_runs_is_served_next(live: Running, backend: SteeredBackend) -> None:
    backend.gate.clear()
    caller = Caller(live)
    caller.send(message(1))
    backend.wait_started()  # alone, in the event loop, which it holds up
    caller.send(message(2), message(3))
    backend.gate.set()
    answers = [next(caller.answers) for _ in range(3)]
    assert [answer.id for answer in answers] == [1, 2, 3]
    assert {answer.WhichOneof("result") for answer in answers} == {"response"}
    caller.end()


def test_who_drains_waits_for_the_one_that_runs(live: Running, backend: SteeredBackend) -> None:
    backend.gate.clear()
    caller = Caller(live)
    caller.send(message(1))
    backend.wait_started()
    batcher = live.server.engine.batcher
    assert not batcher.drain(0.0)
    opens = threading.Timer(0.1, backend.gate.set)
    opens.start()
    assert batcher.drain(PATIENCE_S)
    assert next(caller.answers).WhichOneof("result") == "response"
    late = caller.ask(message(2)).error
    assert (late.code, "draining" in late.message) == (grpc.StatusCode.UNAVAILABLE.value[0], True)
    caller.end()
    opens.join()


def test_a_caller_who_leaves_while_its_request_runs_harms_nobody(live: Running, backend: SteeredBackend) -> None:
    backend.gate.clear()
    leaver = Caller(live)
    leaver.send(message(1))
    backend.wait_started()
    leaver.answers.cancel()
    backend.gate.set()
    stayer = Caller(live)
    assert stayer.ask(message(2)).WhichOneof("result") == "response"
    stayer.end()
    assert live.server.engine.batcher.drain(PATIENCE_S)
    assert live.server.engine.slots.in_use == 0


def test_what_waits_in_rings_while_a_batch_runs_shares_batches(live: Running, backend: SteeredBackend) -> None:
    """Of several streams: each of their messages is read alone, and none must be taken for the only one."""
    with RawRings(live.channel) as one, RawRings(live.channel) as two, RawRings(live.channel) as three:
        one.ask(request=message(0).request)  # every server's end waits for its bell
        backend.batches.clear()
        backend.gate.clear()
        one.send(request=message(0, 1).request)
        for _ in range(2):
            backend.wait_started()
        for caller in (one, two, three):
            for _ in range(2):
                caller.send(request=message(0, 2).request)
        backend.gate.set()
        for caller, count in ((one, 3), (two, 2), (three, 2)):
            for _ in range(count):
                assert caller.receive().HasField("response")
        assert sum(backend.batches) == 13
        assert len(backend.batches) <= 3, backend.batches  # the rest of the first's ring, and what rang meanwhile
