"""Orders to a running server: weights are replaced under load, memory is given back, bad orders change nothing."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import draft
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    OTHER_LAYER,
    PATIENCE_S,
    Running,
    SteeredBackend,
    failure_of,
    insecure_channel,
    running,
)

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server.backend import Backend, PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.cli import main
from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.layer import MoELayer
from expertd_server.server import Server
from expertd_server.synthetic import synthetic_layers
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

SEED = 20261126
ADMIN = {"admin": True, "admin_port": 0}
CERTS = Path(__file__).parent / "certs"


@dataclass
class GatedPrepare(SteeredBackend):
    """Serves at once, and prepares when the test says so."""

    may_prepare: threading.Event = field(default_factory=threading.Event)
    preparing: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_gated: bool = False

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        if self.is_gated:
            self.preparing.release()
            assert self.may_prepare.wait(PATIENCE_S), "the test never let the load go on"
        return super().prepare(spec, weights, max_num_tokens=max_num_tokens)


def admin_of(live: Running) -> expertd.AdminClient:
    return expertd.AdminClient(f"127.0.0.1:{live.server.admin_port}")


def client_of(live: Running) -> expertd.Client:
    return expertd.Client(expertd.ClientConfig(f"127.0.0.1:{live.server.port}", timeout_s=PATIENCE_S))


@pytest.fixture(scope="module")
def settled() -> Iterator[Running]:
    """A server for orders that change nothing."""
    with running(memory_budget_bytes=2**40, **ADMIN) as live:
        yield live


def inputs(seed: int, num_tokens: int = 5) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """hidden_states [T, H] bfloat16 and routing_logits [T, E] float32."""
    chance = np.random.default_rng(seed)
    hidden = chance.standard_normal((num_tokens, HIDDEN_SIZE), np.float32).astype(ml_dtypes.bfloat16)
    return hidden, chance.standard_normal((num_tokens, NUM_EXPERTS), np.float32)


def expected(seed_of_weights: int, seed_of_inputs: int) -> bytes:
    """The output's bits by the layer itself, without a server."""
    backend = TorchBackend("cpu")
    _, spec, weights = next(synthetic_layers("tiny", 1, seed=seed_of_weights))
    hidden, logits = inputs(seed_of_inputs)
    answer = MoELayer(LAYER, backend.prepare(spec, weights), backend).forward(
        torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16), routing_logits=torch.from_numpy(logits)
    )
    assert answer.output is not None
    bits: bytes = answer.output.view(torch.int16).numpy().tobytes()
    return bits


def poll(condition: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, f"{what} never came"
        time.sleep(0.005)


def died(thing: object) -> threading.Event:
    """Set when nobody has it any more."""
    event = threading.Event()
    weakref.finalize(thing, event.set)
    return event


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

        swap = admin.swap_weights(LAYER, 2)
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


def test_neither_an_idle_stream_nor_a_failed_batch_keeps_weights_alive() -> None:
    backend = SteeredBackend()
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


def test_checkpoints_are_read_from_the_servers_disk(tmp_path: Path) -> None:
    old, new = (draft(seed=seed).write(tmp_path / str(seed)) for seed in (1, 2))
    chance = np.random.default_rng(SEED)
    hidden = chance.standard_normal((6, 32), np.float32).astype(ml_dtypes.bfloat16)
    logits = chance.standard_normal((6, 4), np.float32)
    outputs = []
    for options in ({"checkpoint": old, **ADMIN}, {"checkpoint": new}):
        server = Server(Config(port=0, device="cpu", experts="1-3", **options))
        try:
            assert server.startup()
            with expertd.Client(f"127.0.0.1:{server.port}") as client:
                ask = partial(client.forward, "model.layers.1", hidden, routing_logits=logits)
                outputs.append(ask().output.tobytes())
                if server.admin_port is not None:
                    with expertd.AdminClient(f"127.0.0.1:{server.admin_port}") as admin:
                        done = admin.load_layer("model.layers.1", 2, checkpoint=new)
                        assert (done.layer.local_expert_offset, done.layer.local_num_experts) == (1, 3)
                        assert ask().output.tobytes() == outputs[0]
                        admin.swap_weights("model.layers.1", 2)
                        outputs.append(ask().output.tobytes())
        finally:
            server.shutdown()
    before, swapped, reference = outputs
    assert swapped == reference != before


def broken_checkpoint(directory: Path) -> Path:
    """One whose last down projection holds NaN."""
    broken = draft()
    broken.tensors[broken.name(1, 3, "down")].view(torch.uint8)[3, 4] = 0x7F
    return broken.write(directory)


def test_a_broken_checkpoint_changes_nothing(tmp_path: Path) -> None:
    good, broken = draft().write(tmp_path / "good"), broken_checkpoint(tmp_path / "broken")
    server = Server(Config(port=0, device="cpu", checkpoint=good, **ADMIN))
    try:
        assert server.startup()
        nbytes = server.store.nbytes
        with expertd.AdminClient(f"127.0.0.1:{server.admin_port}") as admin:
            with pytest.raises(
                expertd.OrderRefusedError, match=r"layers\.1\..*experts\.3\.w2\.weight holds NaN"
            ) as caught:
                admin.load_layer("model.layers.1", 2, checkpoint=broken)
            assert caught.value.reason == "BAD_CHECKPOINT"
            assert server.store.versions("model.layers.1") == [1]
            assert server.store.nbytes == nbytes
            admin.load_layer("model.layers.0", 2, checkpoint=broken)  # this layer of it is whole
    finally:
        server.shutdown()


SYNTHETIC = {"synthetic": pb.SyntheticSource(preset="tiny")}


def checkpoint(path: str, **fields: Any) -> dict[str, Any]:
    return {"checkpoint": pb.CheckpointSource(path=path, **fields)}


@pytest.mark.parametrize(
    ("order", "field", "says"),
    [
        ({}, "layer", "is empty"),
        ({"layer": "x" * 300}, "layer", "has 300 characters"),
        ({"layer": LAYER, **SYNTHETIC}, "weights_version", "is 0, expected at least 1"),
        ({"layer": LAYER, "weights_version": 2}, "source", "expected checkpoint or synthetic"),
        (
            {"layer": LAYER, "weights_version": 2, "synthetic": pb.SyntheticSource(preset="huge")},
            "synthetic.preset",
            "'huge' is unknown",
        ),
        (
            {"layer": LAYER, "weights_version": 2, "synthetic": pb.SyntheticSource(preset="qwen3-30b-a3b")},
            "synthetic.preset",
            "inside 0 ... 127|hidden_size=2048",
        ),
        ({"layer": LAYER, "weights_version": 2, **checkpoint("/no/such")}, "checkpoint.path", "/no/such"),
        ({"layer": LAYER, "weights_version": 2, **checkpoint("models")}, "checkpoint.path", "an absolute path"),
        ({"layer": LAYER, "weights_version": 2, **checkpoint("")}, "checkpoint.path", "an absolute path"),
        ({"layer": LAYER, "weights_version": 2, **checkpoint("/" + "x" * 5000)}, "checkpoint.path", "5001 characters"),
        (
            {"layer": LAYER, "weights_version": 2, **checkpoint("/" + "x" * 900)},
            "checkpoint.path",
            "name too long|cannot be opened",
        ),
        ({"layer": LAYER, "weights_version": 2, **checkpoint("/a\0b")}, "checkpoint.path", "not on the server's disk"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_bad_order_to_load_names_its_field(settled: Running, order: dict[str, Any], field: str, says: str) -> None:
    with insecure_channel(settled.server.admin_port or 0) as channel:
        stub = expertd_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT") as caught:
            stub.LoadLayer(pb.LoadLayerRequest(**order), timeout=PATIENCE_S)
    failure = failure_of(caught.value)
    assert failure.fields in ((field,), ("synthetic",)), failure
    assert any(part in failure.message for part in says.split("|")), failure
    assert settled.server.store.versions(LAYER) == [1]


def test_a_checkpoint_without_the_layer_and_a_bad_calibration_name_their_fields(
    settled: Running, tmp_path: Path
) -> None:
    path = draft().write(tmp_path)
    with admin_of(settled) as admin:
        with pytest.raises(expertd.InvalidRequestError, match=r"^layer: .*it has model\.layers\.0") as caught:
            admin.load_layer("model.layers.9", 2, checkpoint=path)
        assert [v.field for v in caught.value.violations] == ["layer"]
        with pytest.raises(expertd.InvalidRequestError, match=r"/no/such\.json") as caught:
            admin.load_layer("model.layers.0", 2, checkpoint=path, calibration="/no/such.json")
        assert [v.field for v in caught.value.violations] == ["checkpoint.calibration_path"]


def test_orders_that_do_not_fit_what_is_held_say_what_to_do_first(settled: Running) -> None:
    with admin_of(settled) as admin:
        with pytest.raises(expertd.OrderRefusedError, match="version 1 is held already") as caught:
            admin.load_layer(LAYER, 1, synthetic="tiny")
        assert caught.value.reason == "VERSION_CONFLICT"
        with pytest.raises(expertd.OrderRefusedError, match="swap to another first"):
            admin.unload_layer(LAYER, 1)
        with pytest.raises(expertd.VersionNotHeldError, match="held: 1"):
            admin.swap_weights(LAYER, 5)
        with pytest.raises(expertd.InvalidRequestError, match="weights_version: is 0"):
            admin.swap_weights(LAYER, 0)
        with pytest.raises(expertd.VersionNotHeldError):
            admin.unload_layer(LAYER, 5)
        for order in (lambda: admin.swap_weights("nowhere", 1), lambda: admin.unload_layer("nowhere")):
            with pytest.raises(expertd.LayerNotFoundError, match=f"held: {LAYER}"):
                order()
        with pytest.raises(expertd.InvalidRequestError, match="either checkpoint or synthetic"):
            admin.load_layer(LAYER, 2)


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    backend = GatedPrepare()
    backend.gate.set()
    _, spec, weights = next(synthetic_layers("tiny"))
    nbytes = backend.prepare(spec, weights).nbytes
    with running(backend, memory_budget_bytes=3 * nbytes - 1, **ADMIN) as live, admin_of(live) as admin:
        backend.is_gated = True  # whoever comes to prepare does not come back
        with pytest.raises(expertd.OrderRefusedError, match="memory_budget_bytes") as caught:
            admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)
        assert caught.value.reason == "INSUFFICIENT_MEMORY"
        assert (caught.value.needed_bytes, caught.value.free_bytes) == (nbytes, nbytes - 1)
        backend.is_gated = False
        admin.unload_layer(OTHER_LAYER)
        admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=7)


def test_what_the_machine_has_no_memory_for_is_refused(settled: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd_server.memory.free_bytes", lambda device: 1000)
    with (
        admin_of(settled) as admin,
        pytest.raises(expertd.OrderRefusedError, match="on cpu, 1000 are free") as caught,
    ):
        admin.load_layer(LAYER, 2, synthetic="tiny")
    assert caught.value.free_bytes == 1000


def test_one_load_runs_at_a_time_and_serving_goes_on() -> None:
    hidden, logits = inputs(1)
    backend = GatedPrepare()
    backend.gate.set()
    with running(backend, **ADMIN) as live, admin_of(live) as admin, client_of(live) as client:
        backend.is_gated = True
        with ThreadPoolExecutor() as pool:
            first = pool.submit(admin.load_layer, LAYER, 2, synthetic="tiny", synthetic_seed=7)
            assert backend.preparing.acquire(timeout=PATIENCE_S)
            with pytest.raises(expertd.OverloadedError, match="another LoadLayer runs") as caught:
                admin.load_layer(OTHER_LAYER, 2, synthetic="tiny")
            assert caught.value.retry_after_s
            for _ in range(5):
                assert client.forward(LAYER, hidden, routing_logits=logits).weights_version == 1
            assert admin.unload_layer(OTHER_LAYER).freed, "other orders need not wait for a load"
            backend.may_prepare.set()
            assert first.result(PATIENCE_S).layer.weights_versions == (1, 2)


def test_a_load_does_not_bring_back_a_layer_that_was_unloaded_meanwhile() -> None:
    backend = GatedPrepare()
    backend.gate.set()
    with running(backend, **ADMIN) as live, admin_of(live) as admin:
        backend.is_gated = True
        with ThreadPoolExecutor() as pool:
            load = pool.submit(admin.load_layer, LAYER, 2, synthetic="tiny", synthetic_seed=7)
            assert backend.preparing.acquire(timeout=PATIENCE_S)
            admin.unload_layer(LAYER)
            backend.is_gated = False
            backend.may_prepare.set()
            with pytest.raises(expertd.OrderRefusedError, match="was unloaded while version 2") as caught:
                load.result(PATIENCE_S)
        assert caught.value.reason == "VERSION_CONFLICT"
        assert [held.current.name for held in live.server.store.all_held()] == [OTHER_LAYER]
        status = health_pb2_grpc.HealthStub(live.channel).Check(health_pb2.HealthCheckRequest(service=LAYER))
        assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert admin.load_layer(LAYER, 2, synthetic="tiny").layer.weights_version == 2, "asked for again, it comes"


def test_a_load_whose_caller_leaves_leaves_nothing() -> None:
    backend = GatedPrepare()
    backend.gate.set()
    with running(backend, **ADMIN) as live, admin_of(live) as admin:
        nbytes = live.server.store.nbytes
        backend.is_gated = True
        with ThreadPoolExecutor() as pool:
            load = pool.submit(admin.load_layer, LAYER, 2, synthetic="tiny", synthetic_seed=7, timeout_s=0.5)
            assert backend.preparing.acquire(timeout=PATIENCE_S)
            with pytest.raises(expertd.TimeoutError):
                load.result(PATIENCE_S)
            backend.is_gated = False
            backend.may_prepare.set()

        def loads() -> bool:
            try:
                return admin.load_layer(LAYER, 3, synthetic="tiny").layer.weights_versions == (1, 3)
            except expertd.OverloadedError:
                return False  # the first load is on its way out

        poll(loads, "the end of the abandoned load")
        poll(lambda: live.server.store.nbytes == nbytes // 2 * 3, "the memory of the abandoned load")


def test_a_drained_server_stays_up_and_takes_nothing() -> None:
    hidden, logits = inputs(1)
    backend = SteeredBackend()
    with running(backend, **ADMIN) as live, admin_of(live) as admin, client_of(live) as client:
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(client.forward, LAYER, hidden, routing_logits=logits)
            backend.wait_started()
            assert not admin.drain(timeout_s=0.02), "a request is in flight"
            assert client.server_info().draining
            with pytest.raises(grpc.RpcError, match="draining"):
                _forward(live)
            for service in ("", LAYER):
                status = health_pb2_grpc.HealthStub(live.channel).Check(health_pb2.HealthCheckRequest(service=service))
                assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING
            backend.gate.set()
            assert asked.result(PATIENCE_S).output.tobytes() == expected(0, 1)
        assert admin.drain(timeout_s=PATIENCE_S)
        assert admin.drain(timeout_s=PATIENCE_S), "again is no error"
        with pytest.raises(expertd.UnavailableError, match="draining"):
            admin.load_layer(LAYER, 2, synthetic="tiny")
        assert client.server_info().draining, "the process is up"
        assert [layer.name for layer in client.layers()] == [LAYER, OTHER_LAYER]


def _forward(live: Running) -> pb.ForwardResponse:
    hidden, logits = inputs(1)
    answer: pb.ForwardResponse = live.stub.Forward(
        pb.ForwardRequest(
            layer=LAYER,
            hidden_states=pb.Tensor(dtype=pb.DATA_TYPE_BFLOAT16, shape=hidden.shape, data=hidden.tobytes()),
            routing_logits=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=logits.shape, data=logits.tobytes()),
        ),
        timeout=PATIENCE_S,
    )
    return answer


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"start the server with --admin \(EXPERTD_ADMIN=on\)"),
        (ADMIN, r"answered on 127\.0\.0\.1:\d+ \(admin_host"),
    ],
    ids=["off", "elsewhere"],
)
def test_the_data_port_takes_no_orders(options: dict[str, Any], says: str) -> None:
    with running(**options) as live, expertd.AdminClient(f"127.0.0.1:{live.server.port}") as admin:
        orders: list[Callable[[], object]] = [
            lambda: admin.load_layer(LAYER, 2, synthetic="tiny"),
            lambda: admin.swap_weights(LAYER, 1),
            lambda: admin.unload_layer(LAYER),
            admin.drain,
        ]
        for order in orders:
            with pytest.raises(expertd.AccessDeniedError, match=says) as caught:
                order()
            assert caught.value.reason == "ADMIN_NOT_HERE"
        count = live.server.metrics.registry.get_sample_value
        for method in ("LoadLayer", "SwapWeights", "UnloadLayer", "Drain"):
            assert count("expertd_requests_total", {"method": method, "code": "PERMISSION_DENIED"}) == 1
        assert live.server.admin_port is None if not options else live.server.admin_port != live.server.port


def test_orders_are_counted_and_the_metrics_follow() -> None:
    with running(**ADMIN) as live, admin_of(live) as admin:
        value = live.server.metrics.registry.get_sample_value

        def held() -> dict[str, float | None]:
            return {
                version: value("expertd_layer_weights_bytes", {"layer": LAYER, "weights_version": version})
                for version in ("1", "2")
            }

        def current() -> list[str]:
            return [
                sample.labels["weights_version"]
                for family in live.server.metrics.registry.collect()
                for sample in family.samples
                if sample.name == "expertd_layer_info" and sample.labels["layer"] == LAYER
            ]

        nbytes = live.server.store.get(LAYER).nbytes
        assert (held(), current()) == ({"1": nbytes, "2": None}, ["1"])
        admin.load_layer(LAYER, 2, synthetic="tiny")
        assert (held(), current()) == ({"1": nbytes, "2": nbytes}, ["1"])
        admin.swap_weights(LAYER, 2)
        assert (held(), current()) == ({"1": nbytes, "2": nbytes}, ["2"])
        admin.unload_layer(LAYER, 1)
        assert (held(), current()) == ({"1": None, "2": nbytes}, ["2"])
        with pytest.raises(expertd.VersionNotHeldError):
            admin.swap_weights(LAYER, 1)
        admin.unload_layer(LAYER)
        assert (held(), current()) == ({"1": None, "2": None}, [])
        for method, code, count in (
            ("LoadLayer", "OK", 1),
            ("SwapWeights", "OK", 1),
            ("SwapWeights", "FAILED_PRECONDITION", 1),
            ("UnloadLayer", "OK", 2),
        ):
            assert value("expertd_requests_total", {"method": method, "code": code}) == count, (method, code)


def test_beyond_this_machine_orders_take_mutual_tls() -> None:
    tls = {"tls_cert_file": CERTS / "server.pem", "tls_key_file": CERTS / "server.key"}
    clients = {"tls_client_ca_file": CERTS / "authority.pem"}
    for options in ({}, tls, {**tls, **clients}):
        with pytest.raises(ConfigError, match=r"admin_host is '0\.0\.0\.0', expected .*mutual TLS"):
            Config(admin=True, admin_host="0.0.0.0", **options)
    Config(admin_host="0.0.0.0")  # off, so nobody listens
    # "intruder" is signed by the other authority, here that of the administrators.
    administrators = {"admin_client_ca_file": CERTS / "stranger.pem", "admin_host": "0.0.0.0"}
    with running(**tls, **clients, **administrators, **ADMIN) as live:
        target = f"127.0.0.1:{live.server.admin_port}"
        known = {"ca_file": CERTS / "authority.pem", "server_name": "localhost"}
        pair = {"cert_file": CERTS / "intruder.pem", "key_file": CERTS / "intruder.key"}
        with expertd.AdminClient(expertd.ClientConfig(target, **known, **pair)) as admin:
            assert admin.swap_weights(LAYER, 1).previous_weights_version == 1
        client = {"cert_file": CERTS / "client.pem", "key_file": CERTS / "client.key"}
        for others in ({}, client):
            other = expertd.AdminClient(expertd.ClientConfig(target, **known, **others))
            with other, pytest.raises(expertd.UnavailableError):
                other.swap_weights(LAYER, 1)
        data = expertd.ClientConfig(f"127.0.0.1:{live.server.port}", **known, **client)
        with expertd.Client(data) as sender:
            assert [layer.name for layer in sender.layers()] == [LAYER, OTHER_LAYER]


def test_an_admin_port_in_use_is_said_by_name() -> None:
    with running(**ADMIN) as live:
        backend: Backend = TorchBackend("cpu")
        config = Config(port=0, admin=True, admin_port=live.server.admin_port or 0)
        server = Server(config, backend=backend, layers=[])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{live.server.admin_port}.*in use"):
            server.startup()
        server.shutdown()


def test_asyncio_has_the_same_orders() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(expertd.AdminClient) == names(expertd.AsyncAdminClient)

    async def orders(target: str) -> None:
        async with expertd.AsyncAdminClient(target) as admin:
            assert (await admin.load_layer(LAYER, 2, synthetic="tiny")).layer.weights_versions == (1, 2)
            assert (await admin.swap_weights(LAYER, 2)).previous_weights_version == 1
            assert (await admin.unload_layer(LAYER, 1)).freed
            with pytest.raises(expertd.OrderRefusedError, match="held already"):
                await admin.load_layer(LAYER, 2, synthetic="tiny")
            assert await admin.drain()

    with running(**ADMIN) as live:
        asyncio.run(orders(f"127.0.0.1:{live.server.admin_port}"))


def test_the_command_line_rolls_weights_over_servers(capsys: pytest.CaptureFixture[str]) -> None:
    with running(**ADMIN) as one, running(**ADMIN) as two:
        targets = [f"--target=127.0.0.1:{live.server.admin_port}" for live in (one, two)]
        load = ["admin", "load", LAYER, OTHER_LAYER, "--version", "2", "--synthetic", "tiny", "--seed", "7", *targets]
        assert main(load) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert all("version 2 loaded" in line and "held: 1, 2; current: 1" in line for line in lines)
        assert main(["admin", "swap", LAYER, "--version", "2", *targets]) == 0
        assert "version 2 is current, before 1" in capsys.readouterr().out
        assert main(["admin", "unload", LAYER, "--version", "2", *targets]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1, "the second server is not asked after the first refused"
        assert "VERSION_CONFLICT" in error
        assert main(["admin", "unload", LAYER, "--version", "1", *targets]) == 0
        assert main(["admin", "unload", OTHER_LAYER, "--all-versions", *targets]) == 0
        assert "freed" in capsys.readouterr().out
        assert main(["admin", "drain", targets[0]]) == 0
        assert capsys.readouterr().out.endswith(": drained\n")
        for live in (one, two):
            assert [held.weights_versions for held in live.server.store.all_held()] == [[2]]
