"""Orders: bad ones change nothing and name what is wrong, good ones are counted; from Python and the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from admin_cases import ADMIN, admin_of, client_of, expected, inputs
from checkpoints import draft
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LAYER, OTHER_LAYER, PATIENCE_S, Running, SteeredBackend, failure_of, insecure_channel, running

import expertd
from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server.cli import main


@pytest.fixture(scope="module")
def settled() -> Iterator[Running]:
    """A server for orders that change nothing."""
    with running(memory_budget_bytes=2**40, **ADMIN) as live:
        yield live


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
        # A third of what such a message takes as gRPC's metadata are its characters.
        ({"layer": LAYER, "weights_version": 2, **checkpoint("/" + "模" * 1000)}, "checkpoint.path", "/模模模"),
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


def test_what_the_machine_has_no_memory_for_is_refused(settled: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd_server.memory.free_bytes", lambda device: 1000)
    with (
        admin_of(settled) as admin,
        pytest.raises(expertd.OrderRefusedError, match="on cpu, 1000 are free") as caught,
    ):
        admin.load_layer(LAYER, 2, synthetic="tiny")
    assert caught.value.free_bytes == 1000


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


@pytest.mark.parametrize("number", [0, -1, 2**64])
def test_a_number_that_no_version_has_is_no_order(
    settled: Running, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the wire 0 unloads the layer with all its versions."""
    what = f"weights_version: is {number}, expected 1 to"
    target = f"127.0.0.1:{settled.server.admin_port}"
    for order in (["load", "--synthetic", "tiny"], ["swap"], ["unload"]):
        assert main(["admin", *order, LAYER, "--version", str(number), "--target", target]) == 1
        assert what in capsys.readouterr().err

    async def ask() -> None:
        async with expertd.AsyncAdminClient(target) as admin:
            with pytest.raises(expertd.InvalidRequestError, match=what):
                await admin.swap_weights(LAYER, number)
            with pytest.raises(expertd.InvalidRequestError, match=what):
                await admin.unload_layer(LAYER, number)

    asyncio.run(ask())
    with client_of(settled) as client:
        assert client.layer(LAYER).weights_versions == (1,)
