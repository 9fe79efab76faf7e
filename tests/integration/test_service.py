"""The service over a real channel, by its raw stubs: answers, company, refusals, streams, health, reflection."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving import (
    HIDDEN_SIZE,
    LAYER,
    OTHER_LAYER,
    PATIENCE_S,
    TOP_K,
    Failure,
    Running,
    SteeredBackend,
    answer_of,
    any_request,
    failure_of,
    insecure_channel,
    request,
    running,
    stream_failure_of,
)

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc

pytestmark = pytest.mark.usefixtures("two_threads")
SEED = 20261123
POOL_TOKENS = 1000
SIZES = (1, 2, 3, 7, 16, 33, 100, 257, 1000)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(SEED)


def refusal(call: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return failure_of(caught.value)


class Outbox:
    """The requests of an open stream, sent one by one."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[pb.ForwardStreamRequest | None] = queue.SimpleQueue()

    def send(self, request_id: int, request: pb.ForwardRequest, timeout_ms: int = 0) -> None:
        self._messages.put(pb.ForwardStreamRequest(id=request_id, request=request, timeout_ms=timeout_ms))

    def close(self) -> None:
        self._messages.put(None)

    def __iter__(self) -> Iterator[pb.ForwardStreamRequest]:
        return iter(self._messages.get, None)


class TestForward:
    def test_the_answer_is_the_layers(self, live: Running, chance: np.random.Generator) -> None:
        asked = request(chance, 5, options=pb.ForwardOptions(return_routing=True))
        answer = live.stub.Forward(asked)
        layer = live.server.store.get(LAYER)
        hidden = torch.frombuffer(bytearray(asked.hidden_states.data), dtype=torch.float8_e4m3fn).view(5, HIDDEN_SIZE)
        logits = torch.frombuffer(bytearray(asked.routing_logits.data), dtype=torch.float32).view(5, -1)
        expected = layer.forward(hidden, routing_logits=logits)
        assert expected.output is not None
        assert answer.output.data == expected.output.view(torch.uint8).numpy().tobytes()
        assert (answer.output.dtype, list(answer.output.shape)) == (pb.DATA_TYPE_BFLOAT16, [5, HIDDEN_SIZE])
        assert answer.topk_ids.data == expected.topk_ids.numpy().tobytes()
        assert (answer.topk_ids.dtype, list(answer.topk_ids.shape)) == (pb.DATA_TYPE_INT32, [5, TOP_K])
        assert answer.expert_weights.data == expected.expert_weights.view(torch.uint8).numpy().tobytes()
        assert not answer.HasField("gemm2_output")
        assert answer.weights_version == 1
        assert (answer.timing.batch_tokens, answer.timing.batch_requests) == (5, 1)

    @pytest.mark.parametrize("do_finalize", [True, False])
    def test_no_tokens_give_an_empty_answer(
        self, live: Running, chance: np.random.Generator, do_finalize: bool
    ) -> None:
        answer = live.stub.Forward(request(chance, 0, options=pb.ForwardOptions(do_finalize=do_finalize)))
        tensor = answer.output if do_finalize else answer.gemm2_output
        assert list(tensor.shape) == [0, HIDDEN_SIZE]
        assert tensor.data == b""

    def test_unfinalised_rows_add_up_to_the_output(self, live: Running, chance: np.random.Generator) -> None:
        asked = request(chance, 9)
        asked.options.output_dtype = pb.DATA_TYPE_FLOAT32
        output = np.frombuffer(live.stub.Forward(asked).output.data, np.float32).reshape(9, HIDDEN_SIZE)
        asked.options.do_finalize = False
        answer = live.stub.Forward(asked)
        assert not answer.HasField("output")
        assert list(answer.gemm2_output.shape) == [9 * TOP_K, HIDDEN_SIZE]

        def floats(message: pb.Tensor) -> torch.Tensor:
            return torch.frombuffer(bytearray(message.data), dtype=torch.bfloat16).view(*message.shape).float()

        rows, weights = floats(answer.gemm2_output), floats(answer.expert_weights)
        where = torch.frombuffer(bytearray(answer.expanded_idx_to_permuted_idx.data), dtype=torch.int32).view(9, TOP_K)
        total = torch.zeros(9, HIDDEN_SIZE)
        for slot in range(TOP_K):
            total += weights[:, slot, None] * rows[where[:, slot].long()]
        assert np.array_equal(total.numpy(), output), f"seed {SEED}"

    def test_callers_of_every_kind_share_one_batch_and_get_their_lone_answers(
        self, chance: np.random.Generator
    ) -> None:
        backend = SteeredBackend()
        backend.gate.set()
        with running(backend) as live:
            asked = [any_request(chance, tokens) for tokens in (1, 3, 2, 7, 0, 5, 4, 16)]
            for one in asked:
                one.options.ClearField("do_finalize")
            lone = [answer_of(live.stub.Forward(one)) for one in asked]
            backend.gate.clear()
            for _ in asked:
                backend.wait_started()
            blocker = live.stub.Forward.future(request(chance, 1))
            backend.wait_started()
            together = [live.stub.Forward.future(one) for one in asked]
            wait_for_queue(live, len(asked))
            backend.gate.set()
            blocker.result(PATIENCE_S)
            answers = [future.result(PATIENCE_S) for future in together]
            assert {answer.timing.batch_requests for answer in answers} == {len(asked)}
            assert [answer_of(answer) for answer in answers] == lone, f"seed {SEED}"

    def test_batch_invariance_with_eight_concurrent_clients(self, live: Running) -> None:
        """Every answer is, to the byte, the one that the same request got alone."""
        chances = [np.random.default_rng([SEED, client]) for client in range(8)]
        asked = [
            [any_request(c, int(c.integers(1, 65)), LAYER if c.integers(3) else OTHER_LAYER) for _ in range(12)]
            for c in chances
        ]
        lone = [[answer_of(live.stub.Forward(one)) for one in mine] for mine in asked]
        barrier = threading.Barrier(8)

        def client(number: int) -> tuple[list[bytes], int]:
            with insecure_channel(live.server.port) as channel:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                barrier.wait(PATIENCE_S)
                mine = asked[number]
                if number % 2:
                    answers = [call.result(PATIENCE_S) for call in [stub.Forward.future(one) for one in mine]]
                else:
                    messages = [pb.ForwardStreamRequest(id=n, request=one) for n, one in enumerate(mine)]
                    by_id = {a.id: a.response for a in stub.ForwardStream(iter(messages), timeout=PATIENCE_S)}
                    answers = [by_id[n] for n in range(len(mine))]
                return [answer_of(a) for a in answers], max(a.timing.batch_requests for a in answers)

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(client, range(8)))
        for number, (answers, _) in enumerate(results):
            for n, (answer, expected) in enumerate(zip(answers, lone[number], strict=True)):
                shape = list(asked[number][n].hidden_states.shape)
                assert answer == expected, f"seed {SEED} client {number} request {n} shape {shape}"
        assert max(company for _, company in results) > 1, "no two requests ever shared a batch: nothing was tested"

    def test_a_token_alone_and_inside_1_to_1000_from_eight_clients(self, live: Running) -> None:
        """The answer for a token has the bytes that it has alone, in whatever random company it is sent."""
        chance = np.random.default_rng(SEED)
        pool = request(chance, POOL_TOKENS)
        rows = {
            name: np.frombuffer(getattr(pool, name).data, np.uint8).reshape(POOL_TOKENS, -1)
            for name in ("hidden_states", "routing_logits")
        }

        def of(tokens: np.ndarray[Any, Any]) -> pb.ForwardRequest:
            asked = pb.ForwardRequest(layer=LAYER)
            for name, values in rows.items():
                columns = list(getattr(pool, name).shape)[1]
                picked = pb.Tensor(dtype=getattr(pool, name).dtype, shape=[len(tokens), columns])
                picked.data = values[tokens].tobytes()
                getattr(asked, name).CopyFrom(picked)
            return asked

        watched = chance.permutation(POOL_TOKENS)[:8]
        alone = {token: live.stub.Forward(of(np.array([token]))).output.data for token in watched}
        barrier = threading.Barrier(8)

        def client(number: int) -> int:
            mine = np.random.default_rng([SEED, number])
            company = 1
            with insecure_channel(live.server.port) as channel:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                barrier.wait(PATIENCE_S)
                for size in mine.permutation(SIZES):
                    tokens = mine.permutation(POOL_TOKENS)[:size]
                    places = mine.permutation(size)[: len(watched)]
                    tokens[places] = mine.permutation(watched)[: len(places)]
                    answer = stub.Forward(of(tokens), timeout=PATIENCE_S)
                    output = np.frombuffer(answer.output.data, np.uint8).reshape(size, -1)
                    for place in places:
                        what = f"seed {SEED} client {number}: token {tokens[place]} at {place} of {size}"
                        assert output[place].tobytes() == alone[tokens[place]], what
                    company = max(company, answer.timing.batch_requests)
            return company

        with ThreadPoolExecutor(8) as threads:
            companies = list(threads.map(client, range(8)))
        assert max(companies) > 1, "no two requests ever shared a batch: nothing was tested"


class TestRefusals:
    def test_an_unknown_layer_is_not_found_and_names_those_held(self, live: Running) -> None:
        failure = refusal(lambda: live.stub.Forward(pb.ForwardRequest(layer="nowhere")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "LAYER_NOT_FOUND")
        assert LAYER in failure.message
        assert OTHER_LAYER in failure.message

    def test_a_version_that_is_not_held(self, live: Running, chance: np.random.Generator) -> None:
        assert live.stub.Forward(request(chance, 1, weights_version=1)).weights_version == 1
        failure = refusal(lambda: live.stub.Forward(request(chance, 1, weights_version=7)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WEIGHTS_VERSION_NOT_HELD")

    def test_every_wrong_field_is_named_at_once(self, live: Running, chance: np.random.Generator) -> None:
        asked = request(chance, 2)
        asked.hidden_states.dtype = pb.DATA_TYPE_INT32
        asked.routing_logits.shape[1] = 7
        asked.options.output_dtype = 99
        failure = refusal(lambda: live.stub.Forward(asked))
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failure.fields == ("hidden_states.dtype", "routing_logits.shape", "options.output_dtype")

    def test_an_unexpected_error_tells_an_id_and_no_more(
        self, chance: np.random.Generator, caplog: pytest.LogCaptureFixture
    ) -> None:
        with running() as live:
            live.server.engine.submit = None  # type: ignore[method-assign, assignment]
            failure = refusal(lambda: live.stub.Forward(request(chance, 1)))
        assert failure.code == grpc.StatusCode.INTERNAL
        assert "NoneType" not in failure.message
        incident = failure.message.split()[2].rstrip(";")
        logged = [record for record in caplog.records if incident in record.getMessage()]
        assert len(logged) == 1
        assert logged[0].exc_info is not None

    def test_a_poisoned_request_never_fails_its_neighbours(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend) as live:
            good = [request(chance, 2) for _ in range(3)]
            bad = request(chance, 2)
            bad.hidden_states.data = bytes([SteeredBackend.POISON]) + bad.hidden_states.data[1:]
            blocker = live.stub.Forward.future(request(chance, 1))
            backend.wait_started()
            futures = [live.stub.Forward.future(one) for one in (good[0], bad, good[1], good[2])]
            wait_for_queue(live, 4)
            backend.gate.set()
            blocker.result(PATIENCE_S)
            failure = refusal(lambda: futures.pop(1).result(PATIENCE_S))
            assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "BACKEND_FAILED")
            assert LAYER in failure.message
            answers = [answer_of(future.result(PATIENCE_S)) for future in futures]
            assert backend.batches[:2] == [1, 8], "they ran together first"
            assert answers == [answer_of(live.stub.Forward(one)) for one in good]

    def test_a_full_queue_says_when_to_come_back(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend, max_batch_tokens=8, max_queue_tokens=8) as live:
            admitted = [live.stub.Forward.future(request(chance, 8))]
            backend.wait_started()
            admitted.append(live.stub.Forward.future(request(chance, 8)))
            wait_for_queue(live, 1)
            failure = refusal(lambda: live.stub.Forward(request(chance, 1)))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert failure.retry_delay_s is not None
            assert failure.retry_delay_s > 0
            backend.gate.set()
            for future in admitted:
                assert future.result(PATIENCE_S).output.shape[0] == 8

    def test_a_request_whose_deadline_passes_in_the_queue_is_not_computed(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend) as live:
            blocker = live.stub.Forward.future(request(chance, 1))
            backend.wait_started()
            with pytest.raises(grpc.RpcError) as caught:
                live.stub.Forward(request(chance, 2), timeout=0.05)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            backend.gate.set()
            blocker.result(PATIENCE_S)
            live.stub.Forward(request(chance, 3))
            assert backend.batches == [1, 3]

    def test_the_server_bounds_a_request_without_deadline(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend, request_timeout_s=0.05) as live:
            failure = refusal(lambda: live.stub.Forward(request(chance, 1)))
            assert failure.code == grpc.StatusCode.DEADLINE_EXCEEDED

    def test_a_cancelled_request_is_not_computed(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend) as live:
            blocker = live.stub.Forward.future(request(chance, 1))
            backend.wait_started()
            gone = live.stub.Forward.future(request(chance, 2))
            wait_for_queue(live, 1)
            gone.cancel()
            wait_for_queue(live, 0)
            backend.gate.set()
            blocker.result(PATIENCE_S)
            live.stub.Forward(request(chance, 3))
            assert backend.batches == [1, 3]

    def test_more_unary_calls_than_may_run_are_refused_at_once(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend, max_unary_requests=2) as live:
            admitted = [live.stub.Forward.future(request(chance, 1))]
            backend.wait_started()
            admitted.append(live.stub.Forward.future(request(chance, 1)))
            wait_for_queue(live, 1)
            failure = refusal(lambda: live.stub.Forward(request(chance, 1)))
            assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_unary_requests" in failure.message
            health = health_pb2_grpc.HealthStub(live.channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING, "a busy server is a healthy one"
            backend.gate.set()
            for future in admitted:
                future.result(PATIENCE_S)


class TestStream:
    def test_answers_carry_their_ids(self, live: Running, chance: np.random.Generator) -> None:
        asked = {n * 1000: request(chance, n % 5) for n in range(100)}
        messages = [pb.ForwardStreamRequest(id=n, request=one) for n, one in asked.items()]
        answers = list(live.stub.ForwardStream(iter(messages), timeout=PATIENCE_S))
        assert sorted(answer.id for answer in answers) == sorted(asked)
        for answer in answers:
            assert answer.response.output.shape[0] == asked[answer.id].hidden_states.shape[0]

    def test_answers_come_as_they_complete(self, chance: np.random.Generator) -> None:
        """A refusal is complete at once; it does not wait for the answer before it."""
        backend = SteeredBackend()
        with running(backend) as live:
            outbox = Outbox()
            answers = live.stub.ForwardStream(iter(outbox), timeout=PATIENCE_S)
            outbox.send(1, request(chance, 1))
            backend.wait_started()
            outbox.send(2, pb.ForwardRequest(layer="nowhere"))
            assert next(answers).id == 2
            backend.gate.set()
            assert next(answers).id == 1
            outbox.close()
            assert list(answers) == []

    def test_a_failed_request_fails_alone(self, live: Running, chance: np.random.Generator) -> None:
        wrong = request(chance, 2)
        wrong.hidden_states.data = b"short"
        messages = [
            pb.ForwardStreamRequest(id=1, request=request(chance, 2)),
            pb.ForwardStreamRequest(id=2, request=wrong),
            pb.ForwardStreamRequest(id=3),
            pb.ForwardStreamRequest(id=4, request=request(chance, 2)),
        ]
        answers = {a.id: a for a in live.stub.ForwardStream(iter(messages), timeout=PATIENCE_S)}
        assert answers[1].response.output.shape[0] == answers[4].response.output.shape[0] == 2
        failures = [stream_failure_of(answers[n].error) for n in (2, 3)]
        assert [f.code for f in failures] == [grpc.StatusCode.INVALID_ARGUMENT] * 2
        assert [f.fields for f in failures] == [("hidden_states.data",), ("request",)]

    def test_bytes_that_are_no_message_end_the_stream_after_the_answers_in_flight(
        self, live: Running, chance: np.random.Generator
    ) -> None:
        raw = live.channel.stream_stream("/expertd.v1.ExpertService/ForwardStream")
        good = pb.ForwardStreamRequest(id=5, request=request(chance, 1)).SerializeToString()
        answers = raw(iter([good, b"\xff\xff\xff"]), timeout=PATIENCE_S)
        assert pb.ForwardStreamResponse.FromString(next(answers)).id == 5
        failure = refusal(lambda: next(answers))
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failure.fields == ("request",)

    def test_a_request_gives_up_by_its_own_timeout(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend) as live:
            outbox = Outbox()
            answers = live.stub.ForwardStream(iter(outbox), timeout=PATIENCE_S)
            outbox.send(1, request(chance, 1))
            backend.wait_started()
            outbox.send(2, request(chance, 2), timeout_ms=1)
            outbox.send(3, request(chance, 3))
            wait_for_queue(live, 2)
            threading.Event().wait(0.002)  # the millisecond of request 2, on the real clock
            backend.gate.set()
            by_id = {answer.id: answer for answer in (next(answers) for _ in range(3))}
            assert stream_failure_of(by_id[2].error).code == grpc.StatusCode.DEADLINE_EXCEEDED
            assert by_id[3].response.output.shape[0] == 3
            assert backend.batches == [1, 3]
            outbox.close()

    def test_a_client_that_goes_takes_its_queued_requests_along(self, chance: np.random.Generator) -> None:
        backend = SteeredBackend()
        with running(backend) as live:
            outbox = Outbox()
            answers = live.stub.ForwardStream(iter(outbox))
            outbox.send(0, request(chance, 1))
            backend.wait_started()
            for n in range(1, 5):
                outbox.send(n, request(chance, 1))
            wait_for_queue(live, 4)
            answers.cancel()
            outbox.close()
            wait_for_queue(live, 0)
            backend.gate.set()
            live.stub.Forward(request(chance, 7))
            assert backend.batches == [1, 7]

    def test_a_slow_reader_is_not_read_from(self, chance: np.random.Generator) -> None:
        """Of 200 requests whose answers nobody takes, only what fits the window is ever admitted."""
        backend = SteeredBackend()
        backend.gate.set()
        with running(backend, max_stream_requests=4) as live:
            with insecure_channel(live.server.port) as channel:
                stub = expertd_pb2_grpc.ExpertServiceStub(channel)
                one = request(chance, 64)
                one.options.output_dtype = pb.DATA_TYPE_FLOAT32  # 64 KiB an answer: flow control stops them soon
                messages = (pb.ForwardStreamRequest(id=n, request=one) for n in range(2000))
                answers = stub.ForwardStream(messages)
                in_flight = lambda: live.server.metrics.registry.get_sample_value("expertd_in_flight_requests")  # noqa: E731
                wait_until(lambda: in_flight() == 4 and sum(backend.batches) > 0 and is_settled(backend))
                assert sum(backend.batches) < 64 * 2000
                assert next(answers).response.output.shape[0] == 64
                answers.cancel()
            wait_until(lambda: in_flight() == 0)

    def test_streams_beyond_the_limit_are_refused_at_once(self, live: Running) -> None:
        with running(max_streams=2) as small:
            boxes = [Outbox() for _ in range(2)]
            streams = [small.stub.ForwardStream(iter(box)) for box in boxes]
            registry = small.server.metrics.registry
            wait_until(lambda: registry.get_sample_value("expertd_open_streams") == 2)
            failure = refusal(lambda: next(small.stub.ForwardStream(iter(()))))
            assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_streams" in failure.message
            boxes[0].close()
            assert list(streams[0]) == []
            wait_until(lambda: registry.get_sample_value("expertd_open_streams") == 1)
            assert list(small.stub.ForwardStream(iter(()))) == []
            boxes[1].close()


class TestDescriptions:
    def test_layers(self, live: Running) -> None:
        layers = live.stub.ListLayers(pb.ListLayersRequest()).layers
        assert [layer.name for layer in layers] == [LAYER, OTHER_LAYER]
        one = live.stub.GetLayer(pb.GetLayerRequest(layer=LAYER)).layer
        assert one == layers[0]
        assert (one.hidden_size, one.num_experts, one.local_num_experts, one.top_k) == (HIDDEN_SIZE, 8, 8, TOP_K)
        assert one.routing_method == pb.ROUTING_METHOD_RENORMALIZE
        assert one.activation == pb.ACTIVATION_SWIGLU
        assert one.state == pb.LAYER_STATE_READY
        assert (one.weights_version, list(one.weights_versions)) == (1, [1])
        assert one.weights_bytes == live.server.store.get(LAYER).nbytes

    @pytest.mark.parametrize(("name", "code"), [("nowhere", "NOT_FOUND"), ("", "INVALID_ARGUMENT")])
    def test_no_such_layer(self, live: Running, name: str, code: str) -> None:
        assert refusal(lambda: live.stub.GetLayer(pb.GetLayerRequest(layer=name))).code.name == code

    def test_server_info(self, live: Running) -> None:
        info = live.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.backend, info.max_batch_tokens, info.max_queue_tokens) == ("cpu", 4096, 32768)
        assert info.instance_id == live.server.instance_id
        assert not info.draining

    @pytest.mark.parametrize("service", ["", "expertd.v1.ExpertService", LAYER])
    def test_health(self, live: Running, service: str) -> None:
        stub = health_pb2_grpc.HealthStub(live.channel)
        assert (
            stub.Check(health_pb2.HealthCheckRequest(service=service)).status
            == stub.Check(health_pb2.HealthCheckRequest()).status
            == health_pb2.HealthCheckResponse.SERVING
        )

    def test_health_of_an_unknown_layer(self, live: Running) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(live.channel).Check(health_pb2.HealthCheckRequest(service="nowhere"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    def test_reflection_tells_the_service_and_its_file(self, live: Running) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(live.channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="expertd.v1.ExpertService"),
        ]
        services, file = stub.ServerReflectionInfo(iter(asked))
        assert "expertd.v1.ExpertService" in [s.name for s in services.list_services_response.service]
        assert file.file_descriptor_response.file_descriptor_proto[0] == pb.DESCRIPTOR.serialized_pb


def wait_for_queue(live: Running, requests: int) -> None:
    """Return when this many requests wait."""
    wait_until(lambda: live.server.engine.batcher.queue_requests == requests)


def wait_until(condition: Any) -> None:
    """Poll, for what no event tells; fails after PATIENCE_S."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    pytest.fail(f"not so within {PATIENCE_S} s")


def is_settled(backend: SteeredBackend) -> bool:
    """Whether no batch starts for a while."""
    return not backend_moves(backend)


def backend_moves(backend: SteeredBackend) -> bool:
    before = len(backend.batches)
    threading.Event().wait(0.3)
    return len(backend.batches) != before
