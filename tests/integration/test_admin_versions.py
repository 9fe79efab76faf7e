"""Weights are replaced under load, every answer is of one version, and memory is given back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from admin_cases import ADMIN, SEED, admin_of, client_of, died, expected, inputs, poll
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, OTHER_LAYER, PATIENCE_S, SteeredBackend, running

import expertd
from expertd.v1 import expertd_pb2 as pb


def test_a_version_is_loaded_beside_swapped_and_unloaded() -> None:
    hidden, logits = inputs(1)
    old, new = expected(0, 1), expected(7, 1)
    assert old != new
    with running(**ADMIN) as live, admin_of(live) as admin, client_of(live) as client:

        def ask(version: int | None = None) -> tuple[int, bytes]:
            result = client.forward(LAYER, hidden, routing_logits=logits, weights_version=version)
            return result.weights_version, result.output.tobytes()

        nbytes = live.server.store.nbytes
        done = admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)
        assert (done.layer.weights_version, done.layer.weights_versions) == (1, (1, 2))
        assert live.server.store.nbytes == nbytes + done.weights_bytes
        assert (ask(), ask(1), ask(2)) == ((1, old), (1, old), (2, new))

        before = client.layer(LAYER).weights_fingerprint
        swap = admin.swap_weights(LAYER, 2)
        assert swap.layer.weights_fingerprint not in (0, before)
        assert (swap.previous_weights_version, swap.layer.weights_version) == (1, 2)
        assert (ask(), ask(1), ask(2)) == ((2, new), (1, old), (2, new))
        assert admin.swap_weights(LAYER, 2).previous_weights_version == 2, "nothing to do is no error"

        weights = died(live.server.store.get(LAYER, 1).prepared.weights)
        gone = admin.unload_layer(LAYER, 1)
        assert (gone.freed, gone.weights_bytes) == (True, done.weights_bytes)
        assert weights.wait(PATIENCE_S), "the old weights are still there"
        assert live.server.store.nbytes == nbytes
        assert ask() == (2, new)
        with pytest.raises(expertd.VersionNotHeldError, match="held: 2"):
            ask(1)


def test_weights_are_swapped_under_the_load_of_eight_clients() -> None:
    """Nothing fails, every answer is that of the version it names, and the old weights go without a collection.

    Requests are larger than a batch, so each is sent in two parts: these must not be of two versions either.
    """
    num_clients = 8
    answers = {(version, n): expected(seed, SEED + n) for version, seed in ((1, 0), (2, 5)) for n in range(num_clients)}
    seen: list[list[int]] = [[] for _ in range(num_clients)]
    failures: list[BaseException] = []
    is_over = threading.Event()

    def load(n: int, client: expertd.Client) -> None:
        hidden, logits = inputs(SEED + n)
        try:
            while not is_over.is_set():
                result = client.forward(LAYER, hidden, routing_logits=logits)
                version = result.weights_version
                assert result.output.tobytes() == answers[version, n], f"client {n}, version {version}, seed {SEED}"
                assert not seen[n] or seen[n][-1] <= version, "a version that was swapped away came back"
                seen[n].append(version)
        except BaseException as error:
            failures.append(error)

    def more(version: int) -> None:
        """Every client gets a few more answers of that version."""
        counts = [len(each) for each in seen]
        for n, count in enumerate(counts):
            poll(
                lambda n=n, count=count: bool(failures) or seen[n][count + 2 :].count(version) >= 3,  # type: ignore[misc]
                f"answers of version {version} to client {n}",
            )
        assert not failures, failures

    with running(max_batch_tokens=4, **ADMIN) as live, admin_of(live) as admin:
        clients = [client_of(live) for _ in range(num_clients)]
        threads = [threading.Thread(target=load, args=(n, client)) for n, client in enumerate(clients)]
        gc.collect()
        gc.disable()  # what is freed below is freed because nobody has it, not because Python looked for cycles
        try:
            for thread in threads:
                thread.start()
            more(1)
            admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=5)
            more(1)
            weights = died(live.server.store.get(LAYER, 1).prepared.weights)
            admin.swap_weights(LAYER, 2)
            more(2)
            assert admin.unload_layer(LAYER, 1).freed
            assert weights.wait(PATIENCE_S), "the old weights are still there"
            more(2)
        finally:
            gc.enable()
            is_over.set()
            for thread in threads:
                thread.join(PATIENCE_S)
            for client in clients:
                client.close()
    assert failures == []


def test_what_was_admitted_is_answered_by_its_version_however_it_is_unloaded() -> None:
    hidden, logits = inputs(3)
    backend = SteeredBackend()
    with running(backend, **ADMIN) as live, admin_of(live) as admin, client_of(live) as client:
        admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)
        with ThreadPoolExecutor() as pool:
            running_one = pool.submit(client.forward, LAYER, hidden, routing_logits=logits)
            backend.wait_started()
            waiting_one = pool.submit(client.forward, LAYER, hidden, routing_logits=logits)
            poll(lambda: live.server.engine.batcher.queue_requests == 1, "the second request")
            admin.swap_weights(LAYER, 2)
            nbytes = live.server.store.nbytes
            late = admin.unload_layer(LAYER, 1, timeout_s=0.02)
            assert not late.freed, "both requests need it"
            assert live.server.store.nbytes == nbytes, "in use, so it counts"
            new_one = pool.submit(client.forward, LAYER, hidden, routing_logits=logits)
            poll(lambda: live.server.engine.batcher.queue_requests == 2, "the third request")
            backend.gate.set()
            results = [one.result(PATIENCE_S) for one in (running_one, waiting_one, new_one)]
        assert [result.weights_version for result in results] == [1, 1, 2]
        assert [r.output.tobytes() for r in results] == [expected(0, 3), expected(0, 3), expected(7, 3)]
        poll(lambda: live.server.store.nbytes == nbytes - late.weights_bytes, "the memory of the old version")


def test_unloading_waits_for_what_is_in_flight() -> None:
    hidden, logits = inputs(3)
    backend = SteeredBackend()
    with running(backend, **ADMIN) as live, admin_of(live) as admin, client_of(live) as client:
        admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(client.forward, LAYER, hidden, routing_logits=logits, weights_version=2)
            backend.wait_started()
            unload = pool.submit(admin.unload_layer, LAYER, 2, timeout_s=PATIENCE_S)
            poll(lambda: live.server.store.versions(LAYER) == [1], "the removal")
            with pytest.raises(expertd.OverloadedError, match="another UnloadLayer runs"):
                admin.unload_layer(OTHER_LAYER)
            assert not unload.done()
            backend.gate.set()
            assert unload.result(PATIENCE_S).freed
            assert asked.result(PATIENCE_S).weights_version == 2


@pytest.mark.parametrize("name", ["cpu", "noop"])  # batches in a thread, and in the event loop
def test_neither_an_idle_stream_nor_a_failed_batch_keeps_weights_alive(name: str) -> None:
    backend = SteeredBackend(name=name)
    backend.gate.set()
    poison = np.full((2, HIDDEN_SIZE), backend.POISON, np.uint8)
    bad = pb.ForwardRequest(
        layer=LAYER,
        hidden_states=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT8_E4M3FN, shape=poison.shape, data=poison.tobytes()),
        routing_logits=pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT32, shape=(2, NUM_EXPERTS), data=np.zeros((2, NUM_EXPERTS), np.float32).tobytes()
        ),
    )
    is_over = threading.Event()

    def messages() -> Iterator[pb.ForwardStreamRequest]:
        yield pb.ForwardStreamRequest(id=1, request=bad)
        is_over.wait(PATIENCE_S)  # the stream stays open

    with running(backend, **ADMIN) as live, admin_of(live) as admin:
        stream = live.stub.ForwardStream(messages())
        assert "poisoned" in next(stream).error.message
        admin.load_layer(LAYER, 2, synthetic="tiny")
        admin.swap_weights(LAYER, 2)
        assert admin.unload_layer(LAYER, 1).freed
        is_over.set()
        assert list(stream) == []


def test_a_layer_is_unloaded_and_another_one_comes() -> None:
    hidden, logits = inputs(1)
    with running(metrics_port=0, **ADMIN) as live, admin_of(live) as admin, client_of(live) as client:
        health = health_pb2_grpc.HealthStub(live.channel)
        check = health_pb2.HealthCheckRequest(service=OTHER_LAYER)
        assert admin.unload_layer(OTHER_LAYER).freed
        assert [layer.name for layer in client.layers()] == [LAYER]
        assert health.Check(check).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(expertd.LayerNotFoundError, match=f"held: {LAYER}"):
            client.forward(OTHER_LAYER, hidden, routing_logits=logits)
        done = admin.load_layer(OTHER_LAYER, 9, synthetic="tiny", synthetic_seed=3)
        assert (done.layer.weights_version, done.layer.weights_versions) == (9, (9,)), "new here, so it is current"
        assert health.Check(check).status == health_pb2.HealthCheckResponse.SERVING
        result = client.forward(OTHER_LAYER, hidden, routing_logits=logits)
        assert (result.weights_version, result.output.tobytes()) == (9, expected(3, 1))
