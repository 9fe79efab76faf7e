"""Loading: from where, one at a time, in what memory, and what is left when it fails or its caller leaves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from admin_cases import ADMIN, SEED, GatedPrepare, admin_of, client_of, inputs, poll
from checkpoints import draft
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LAYER, OTHER_LAYER, PATIENCE_S, running

import expertd
from expertd_server import admin as admin_module
from expertd_server.config import Config
from expertd_server.server import Server
from expertd_server.synthetic import synthetic_layers


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


def test_a_load_whose_caller_leaves_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[grpc.ServicerContext] = []
    check = admin_module._check_caller

    def noted(context: grpc.ServicerContext) -> None:
        contexts.append(context)
        check(context)

    monkeypatch.setattr(admin_module, "_check_caller", noted)
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
            poll(lambda: not contexts[-1].is_active(), "the server to hear that its caller has left")
            backend.is_gated = False
            backend.may_prepare.set()

        def loads() -> bool:
            try:
                return admin.load_layer(LAYER, 3, synthetic="tiny").layer.weights_versions == (1, 3)
            except expertd.OverloadedError:
                return False  # the first load is on its way out

        poll(loads, "the end of the abandoned load")
        poll(lambda: live.server.store.nbytes == nbytes // 2 * 3, "the memory of the abandoned load")
