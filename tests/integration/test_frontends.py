"""Front-ends and an engine: what callers see is what they see of one process. Processes: see test_processes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    OTHER_LAYER,
    PATIENCE_S,
    Running,
    Split,
    SteeredBackend,
    answer_of,
    any_request,
    failure_of,
    request,
    running,
    split,
    stream_failure_of,
    tensor,
)

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server import remote
from expertd_server.errors import UnavailableError

SEED = 20261126


@pytest.fixture(scope="module")
def one() -> Iterator[Running]:
    """A server of one process."""
    with running(max_message_bytes=2**21) as server:
        yield server


@pytest.fixture(scope="module", params=["woken", "looking"])
def many(request: pytest.FixtureRequest) -> Iterator[Split]:
    """A server with two front-ends, which are woken for answers, or look for those to lone requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_LEAST_CORES_TO_LOOK", 1 if request.param == "looking" else 1 << 16)
        patch.setattr(remote, "_LEAST_ALONE", 1)
        with split() as server:
            yield server


class TestAnswers:
    def test_bits_are_those_of_one_process(self, one: Running, many: Split) -> None:
        chance = np.random.default_rng(SEED)
        for number in range(60):
            layer = (LAYER, OTHER_LAYER)[number % 2]
            asked = any_request(chance, int(chance.integers(0, 40)), layer)
            expected = answer_of(one.stub.Forward(asked))
            for stub in many.stubs:
                assert answer_of(stub.Forward(asked)) == expected, f"seed {SEED}, request {number}"

    def test_streams_of_both_front_ends_share_batches_and_get_their_own_answers(
        self, one: Running, many: Split
    ) -> None:
        chance = np.random.default_rng(SEED)
        asked = [any_request(chance, int(chance.integers(0, 40))) for _ in range(60)]
        expected = [answer_of(one.stub.Forward(request)) for request in asked]
        wrong: list[str] = []

        def client(stub: Any) -> None:
            messages = (pb.ForwardStreamRequest(id=n, request=request) for n, request in enumerate(asked))
            seen = set()
            for answer in stub.ForwardStream(messages, timeout=PATIENCE_S):
                seen.add(answer.id)
                if answer.HasField("error"):
                    wrong.append(f"seed {SEED}, request {answer.id}: {answer.error.message}")
                elif answer_of(answer.response) != expected[answer.id]:
                    wrong.append(f"seed {SEED}, request {answer.id}")
            if seen != set(range(len(asked))):
                wrong.append(f"answers came for {seen}")

        threads = [threading.Thread(target=client, args=(stub,)) for stub in many.stubs * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert not wrong

    def test_what_describes_the_server_is_the_same(self, one: Running, many: Split) -> None:
        for stub in many.stubs:
            everything = pb.ListLayersRequest()
            assert stub.ListLayers(everything) == one.stub.ListLayers(everything)
            assert stub.GetLayer(pb.GetLayerRequest(layer=LAYER)) == one.stub.GetLayer(pb.GetLayerRequest(layer=LAYER))
            info, expected = (s.GetServerInfo(pb.GetServerInfoRequest()) for s in (stub, one.stub))
            assert info.instance_id == "an-instance"
            info.instance_id = expected.instance_id
            assert info == expected

    def test_health_knows_the_server_its_service_and_its_layers(self, many: Split) -> None:
        for channel in many.channels:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "expertd.v1.ExpertService", LAYER, OTHER_LAYER):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING, name

    def test_the_queue_is_told(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with split(1, backend) as server:
            first = server.stubs[0].Forward.future(request(chance, 1))
            backend.wait_started()
            others = [server.stubs[0].Forward.future(request(chance, 4)) for _ in range(2)]
            wait_for(lambda: server.engine.host.engine.queue_tokens == 8)
            backend.gate.set()
            assert first.result(PATIENCE_S).timing.queue_depth_tokens == 8
            for other in others:
                assert other.result(PATIENCE_S).timing.batch_requests == 2


class TestRefusals:
    @pytest.mark.parametrize(
        "asked",
        [
            pb.ForwardRequest(layer="nowhere"),
            pb.ForwardRequest(layer=""),
            pb.ForwardRequest(layer=LAYER),
            pb.ForwardRequest(layer=LAYER, weights_version=9),
            pb.ForwardRequest(
                layer=LAYER,
                hidden_states=tensor(np.zeros((2, HIDDEN_SIZE + 1), np.uint8), pb.DATA_TYPE_FLOAT8_E4M3FN),
                routing_logits=tensor(np.full((2, NUM_EXPERTS), np.nan, np.float32), pb.DATA_TYPE_FLOAT32),
            ),
            request(np.random.default_rng(SEED), 5000),
        ],
        ids=["unknown", "unnamed", "empty", "version", "shapes", "too-large"],
    )
    def test_what_is_wrong_is_told_in_the_same_words(self, one: Running, many: Split, asked: pb.ForwardRequest) -> None:
        expected = failure_of(error_of(one.stub, asked))
        for stub in many.stubs:
            assert failure_of(error_of(stub, asked)) == expected
            answer = next(stub.ForwardStream(iter([pb.ForwardStreamRequest(id=3, request=asked)])))
            assert stream_failure_of(answer.error) == expected

    def test_bytes_that_are_no_message(self, many: Split) -> None:
        for channel in many.channels:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/expertd.v1.ExpertService/Forward")(b"\xff\xff\xff")
            assert failure_of(caught.value).code == grpc.StatusCode.INVALID_ARGUMENT

    def test_a_full_queue_is_told_with_the_time_to_come_back(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with split(2, backend, max_batch_tokens=4, max_queue_tokens=4) as server:
            running_now = server.stubs[0].Forward.future(request(chance, 1))
            backend.wait_started()
            waiting = server.stubs[1].Forward.future(request(chance, 4))
            wait_for(lambda: server.engine.host.engine.queue_tokens == 4)
            failure = failure_of(error_of(server.stubs[0], request(chance, 1)))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert failure.retry_delay_s is not None
            backend.gate.set()
            running_now.result(PATIENCE_S)
            waiting.result(PATIENCE_S)

    def test_a_poisoned_request_fails_alone(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with split(2, backend) as server:
            first = server.stubs[0].Forward.future(request(chance, 1))
            backend.wait_started()
            bad = request(chance, 1)
            bad.hidden_states.data = bytes([SteeredBackend.POISON]) * HIDDEN_SIZE
            poisoned, good = server.stubs[0].Forward.future(bad), server.stubs[1].Forward.future(request(chance, 2))
            wait_for(lambda: server.engine.host.engine.queue_tokens == 3)
            backend.gate.set()
            first.result(PATIENCE_S)
            assert good.result(PATIENCE_S).output.shape[0] == 2
            with pytest.raises(grpc.RpcError) as caught:
                poisoned.result(PATIENCE_S)
            assert failure_of(caught.value).code == grpc.StatusCode.INTERNAL


class TestLeaving:
    def test_cancelled_and_timed_out_requests_give_their_memory_back(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with split(1, backend) as server:
            stub, engine = server.stubs[0], server.engine.host.engine
            link = server.frontends[0].engine._link
            assert link is not None
            held = stub.Forward.future(request(chance, 1))
            backend.wait_started()
            cancelled = [stub.Forward.future(request(chance, 2)) for _ in range(5)]
            stream = stub.ForwardStream(
                iter(pb.ForwardStreamRequest(id=n, request=request(chance, 2)) for n in range(5))
            )
            wait_for(lambda: engine.batcher.queue_requests == 10)
            for call in [*cancelled, stream]:
                call.cancel()
            wait_for(lambda: engine.batcher.queue_requests == 0)
            late = error_of(stub, request(chance, 2), timeout=0.05)
            assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            wait_for(lambda: engine.batcher.queue_requests == 0)
            message = pb.ForwardStreamRequest(id=1, request=request(chance, 2), timeout_ms=1)
            answers = stub.ForwardStream(iter([message]))
            wait_for(lambda: engine.batcher.queue_requests == 1)
            threading.Event().wait(0.002)  # the request's millisecond, on the real clock
            backend.gate.set()
            assert stream_failure_of(next(answers).error).code == grpc.StatusCode.DEADLINE_EXCEEDED
            held.result(PATIENCE_S)
            wait_for(lambda: not link._waiting)
            wait_for(lambda: link._arena.free_bytes() == link._arena.nbytes)
            assert backend.batches == [1], "what nobody waits for is not computed"

    def test_memory_comes_back_without_the_garbage_collector(self, many: Split) -> None:
        """A cycle anywhere on the way of a request would hold its block until Python looks for cycles."""
        chance = np.random.default_rng(SEED)
        asked = [request(chance, 3) for _ in range(100)]
        stub, link = many.stubs[0], many.frontends[0].engine._link
        assert link is not None
        gc.collect()
        gc.disable()
        try:
            for one in asked:
                stub.Forward(one)
            messages = [pb.ForwardStreamRequest(id=n, request=one) for n, one in enumerate(asked)]
            assert all(answer.HasField("response") for answer in stub.ForwardStream(iter(messages)))
            for _ in range(5):
                stream = stub.ForwardStream(iter(messages), timeout=PATIENCE_S)
                next(stream)
                stream.cancel()
                future = stub.Forward.future(asked[0])
                future.cancel()
            wait_for(lambda: link._arena.free_bytes() == link._arena.nbytes)
        finally:
            gc.enable()

    def test_memory_of_failed_and_refused_requests_comes_back_without_the_garbage_collector(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with split(1, backend, max_batch_tokens=4, max_queue_tokens=4) as server:
            stub, link = server.stubs[0], server.frontends[0].engine._link
            assert link is not None
            bad = request(chance, 1)
            bad.hidden_states.data = bytes([SteeredBackend.POISON]) * HIDDEN_SIZE
            gc.collect()
            gc.disable()
            try:
                first = stub.Forward.future(request(chance, 1))
                backend.wait_started()
                second = stub.Forward.future(request(chance, 4))
                wait_for(lambda: server.engine.host.engine.queue_tokens == 4)
                refused = [error_of(stub, request(chance, 4)).code() for _ in range(10)]
                messages = [pb.ForwardStreamRequest(id=n, request=request(chance, 4)) for n in range(10)]
                refused += [stream_failure_of(one.error).code for one in stub.ForwardStream(iter(messages))]
                assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
                backend.gate.set()
                first.result(PATIENCE_S)
                second.result(PATIENCE_S)
                failed = [error_of(stub, bad).code() for _ in range(10)]
                messages = [pb.ForwardStreamRequest(id=n, request=bad) for n in range(4)]
                failed += [stream_failure_of(one.error).code for one in stub.ForwardStream(iter(messages))]
                assert set(failed) == {grpc.StatusCode.INTERNAL}
                wait_for(lambda: link._arena.free_bytes() == link._arena.nbytes)
            finally:
                gc.enable()

    @pytest.mark.parametrize("max_answer_bytes", [2**18, 2**30])
    def test_callers_who_do_not_read_take_no_room_from_those_who_do(self, max_answer_bytes: int) -> None:
        """Their answers lie in the front-end's own memory, bounded; what it shares with the engine is free again."""
        chance = np.random.default_rng(SEED)
        one = request(chance, 64)
        one.options.output_dtype = pb.DATA_TYPE_FLOAT32  # 64 KiB an answer: flow control stops them soon
        most = 16
        with split(1, max_stream_requests=most, max_stream_answer_bytes=max_answer_bytes) as server:
            frontend, stub = server.frontends[0], server.stubs[0]
            link = frontend.engine._link
            assert link is not None
            expected = answer_of(stub.Forward(one))
            # More than the arena's 4 MiB, were the answers kept there.
            streams = []
            for _ in range(6):
                messages = (pb.ForwardStreamRequest(id=n, request=one) for n in range(200))
                streams.append(stub.ForwardStream(messages))

            def held() -> list[tuple[int, int]]:
                return [(len(each._pending), each._answer_bytes) for each in frontend._listener.service._streams]

            def is_full(num_requests: int, nbytes: int) -> bool:
                return num_requests == most or nbytes >= max_answer_bytes

            def are_stuck() -> bool:
                return len(held()) == 6 and all(is_full(*each) for each in held()) and not link._waiting

            # Both at a moment: until gRPC's own buffers are full, answers still go out and requests come in.
            wait_for(lambda: are_stuck() and link._arena.free_bytes() == link._arena.nbytes)
            assert all(nbytes < max_answer_bytes + 2**20 for _, nbytes in held())
            for _ in range(20):
                assert answer_of(stub.Forward(one)) == expected
            for stream in streams:  # they have lost nothing
                assert answer_of(next(stream).response) == expected
                stream.cancel()
            wait_for(lambda: not held())

    def test_a_front_end_that_drains_finishes_what_it_has(self) -> None:
        chance = np.random.default_rng(SEED)
        backend = SteeredBackend()
        with split(2, backend) as server:
            asked = [stub.Forward.future(request(chance, 1)) for stub in server.stubs]
            backend.wait_started()
            wait_for(lambda: sum(len(one.engine._link._waiting) for one in server.frontends if one.engine._link) == 2)
            watch = health_pb2_grpc.HealthStub(server.channels[0]).Watch(health_pb2.HealthCheckRequest(service=LAYER))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            outcome: list[bool] = []
            stopper = threading.Thread(target=lambda: outcome.append(server.frontends[0].shutdown()))
            stopper.start()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            wait_for(lambda: server.stubs[0].GetServerInfo(pb.GetServerInfoRequest()).draining)
            assert failure_of(error_of(server.stubs[0], request(chance, 1))).reason == "NOT_SERVING"
            live = health_pb2_grpc.HealthStub(server.channels[0]).Check(health_pb2.HealthCheckRequest(service="live"))
            assert live.status == health_pb2.HealthCheckResponse.SERVING
            assert not server.stubs[1].GetServerInfo(pb.GetServerInfoRequest()).draining
            backend.gate.set()
            for future in asked:
                assert future.result(PATIENCE_S).output.shape[0] == 1
            stopper.join(PATIENCE_S)
            assert outcome == [True]


class TestOrders:
    """AdminService is the engine's; what it changes, every front-end knows before the order is answered."""

    def test_versions_come_and_go(self) -> None:
        chance = np.random.default_rng(SEED)
        asked = request(chance, 3)

        def versions(server: Split, wanted: int = 0) -> list[int]:
            asked.weights_version = wanted
            return [stub.Forward(asked).weights_version for stub in server.stubs]

        with split(2, admin=True, admin_port=0) as server:
            admin = expertd.AdminClient(f"127.0.0.1:{server.engine.admin_port}")
            with admin:
                loaded = admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)
                assert (versions(server), versions(server, 2)) == ([1, 1], [2, 2])
                for number in range(20):
                    current = 2 - number % 2
                    admin.swap_weights(LAYER, current)
                    assert versions(server) == [current, current]
                admin.swap_weights(LAYER, 2)
                asked.weights_version = 0
                assert answer_of(server.stubs[0].Forward(asked)) == answer_of(server.stubs[1].Forward(asked))
                gone = admin.unload_layer(LAYER, 1)
                assert (gone.freed, gone.weights_bytes) == (True, loaded.weights_bytes)
                asked.weights_version = 1
                for stub in server.stubs:
                    assert failure_of(error_of(stub, asked)).reason == "WEIGHTS_VERSION_NOT_HELD"
                    held = stub.GetLayer(pb.GetLayerRequest(layer=LAYER)).layer
                    assert (held.weights_version, list(held.weights_versions)) == (2, [2])
                admin.unload_layer(OTHER_LAYER)
                for stub, channel in zip(server.stubs, server.channels, strict=True):
                    assert [layer.name for layer in stub.ListLayers(pb.ListLayersRequest()).layers] == [LAYER]
                    answer = health_pb2_grpc.HealthStub(channel).Check(
                        health_pb2.HealthCheckRequest(service=OTHER_LAYER)
                    )
                    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
                admin.load_layer("new", 1, synthetic="tiny")
                new = request(chance, 3, "new")
                assert [stub.Forward(new).weights_version for stub in server.stubs] == [1, 1]

    def test_a_drained_server_says_so_on_every_front_end(self) -> None:
        chance = np.random.default_rng(SEED)
        with split(2, admin=True, admin_port=0) as server:
            with expertd.AdminClient(f"127.0.0.1:{server.engine.admin_port}") as admin:
                assert admin.drain()
            for stub, channel in zip(server.stubs, server.channels, strict=True):
                wait_for(lambda stub=stub: stub.GetServerInfo(pb.GetServerInfoRequest()).draining)
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
                assert failure_of(error_of(stub, request(chance, 1))).code == grpc.StatusCode.UNAVAILABLE
            # Whatever an engine says later: there is no way back.
            frontend, said = server.frontends[0], list[bool]()
            frontend._on_serving = said.append
            server.engine.gate._is_draining = False
            server.engine.gate.publish(PATIENCE_S)
            assert said == [False]
            with pytest.raises(UnavailableError, match="draining"):
                frontend.engine.submit(None)  # type: ignore[arg-type]

    def test_the_data_port_takes_none(self, many: Split) -> None:
        for channel in many.channels:
            with pytest.raises(grpc.RpcError) as caught:
                expertd_pb2_grpc.AdminServiceStub(channel).Drain(pb.DrainRequest())
            assert "--admin" in failure_of(caught.value).message


def error_of(stub: Any, asked: pb.ForwardRequest, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Forward(asked, **options)
    return caught.value


def wait_for(condition: Any) -> None:
    """Wait for what no event tells."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail(f"not so within {PATIENCE_S} s")
