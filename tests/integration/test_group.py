"""Many servers as one layer: the same answers as one server, and the same bits whatever happens to servers."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import every_method, make_case, make_spec, relative_error, spec_id
from tier import (
    PATIENCE_S,
    GatedBackend,
    Load,
    address,
    bits,
    group_of,
    inputs,
    kill,
    moe_layer,
    other_weights,
    shares,
    slice_of,
    stand_for,
    start,
    stopping,
    sum_of_slices,
)

import expertd
from expertd import AsyncExpertGroup, Client, ExpertGroup, GroupConfig
from expertd._group_base import GroupBase
from expertd.errors import (
    ClosedError,
    InvalidRequestError,
    LayerNotFoundError,
    NoReplicaError,
    ServerError,
    TimeoutError,
    TopologyError,
    VersionNotHeldError,
)
from expertd_server.config import Config
from expertd_server.server import Server
from expertd_server.types import RoutingMethod

SEED, NUM_TOKENS = 11, 37
METHODS = [spec for spec in every_method() if spec.num_experts % 4 == 0]
CASES = {spec_id(spec): make_case(spec, NUM_TOKENS, SEED) for spec in METHODS}
LAYER = spec_id(make_spec(routing_method=RoutingMethod.RENORMALIZE))
CASE = CASES[LAYER]
ONE = {LAYER: CASE}


SOON_S = 5.0


@pytest.fixture(scope="module")
def whole() -> Iterator[Server]:
    """One server of everything."""
    server = start(CASES)
    with stopping(server):
        yield server


@pytest.fixture(scope="module")
def tier() -> Iterator[list[Server]]:
    """Four shards with two replicas each: servers 0 to 3 and, again, 4 to 7."""
    servers = [start(CASES, share, of=4) for _ in range(2) for share in shares(4)]
    with stopping(*servers):
        yield servers


@pytest.mark.parametrize("layer", CASES)
def test_four_shards_agree_with_one_server(whole: Server, tier: list[Server], layer: str) -> None:
    case = CASES[layer]
    hidden, logits = inputs(case)
    with Client(address(whole)) as client, group_of(*tier) as group:
        one = client.forward(layer, hidden, routing_logits=logits, output_dtype="float32", return_routing=True)
        many = group.forward(layer, hidden, routing_logits=logits, output_dtype="float32", return_routing=True)
        rounded = group.forward(layer, hidden, routing_logits=logits)
    assert one.output is not None
    assert many.output is not None
    assert rounded.output is not None
    assert np.array_equal(many.topk_ids, one.topk_ids), case.name
    assert (many.expert_weights == one.expert_weights).mean() > 0.98, case.name
    # The same rounded rows of the experts, added up in another order.
    error = relative_error(torch.from_numpy(many.output.copy()), torch.from_numpy(one.output.copy()))
    assert error < 2**-12, f"{case.name}: {error}"
    assert rounded.output.dtype == ml_dtypes.bfloat16
    error = relative_error(torch.from_numpy(rounded.output.astype(np.float32)), torch.from_numpy(one.output.copy()))
    assert error < 2**-8, f"{case.name}: {error}"


def test_every_routing_method_is_among_them() -> None:
    assert {spec.routing_method for spec in METHODS} == set(RoutingMethod)


@pytest.mark.parametrize("layer", [LAYER, "deepseek_v3-swiglu-n_group=4-topk_group=2-routed_scaling_factor=2.5"])
def test_bits_depend_neither_on_the_run_nor_on_replicas_mode_or_api(tier: list[Server], layer: str) -> None:
    hidden, logits = inputs(CASES[layer])
    outputs = set()
    ways: list[tuple[list[Server], dict[str, Any]]] = [
        (tier[:4], {}),
        (tier[4:], {}),
        ([*tier[:2], *tier[6:]], {}),
        (tier, {}),
        (tier[:4], {"mode": "broadcast"}),
    ]
    for servers, options in ways:
        with group_of(*servers, **options) as group:
            for _ in range(3):
                outputs.add(bits(group.forward(layer, hidden, routing_logits=logits).output))
    outputs.add(bits(asyncio.run(_forward_async(tier, layer, hidden, logits))))
    assert len(outputs) == 1, f"seed {SEED}, T {NUM_TOKENS}, {layer}"


async def _forward_async(servers: list[Server], layer: str, hidden: Any, logits: Any) -> Any:
    config = GroupConfig(hedge_percentile=None)
    async with AsyncExpertGroup([address(server) for server in servers], config) as group:
        await group.wait_ready(timeout_s=PATIENCE_S)
        return (await group.forward(layer, hidden, routing_logits=logits)).output


def test_bits_do_not_depend_on_the_order_of_answers() -> None:
    hidden, logits = inputs(CASE)
    turn = threading.Condition()
    order: list[int] = []

    def waiting(index: int) -> Any:
        def before(*_: object) -> None:
            with turn:
                assert turn.wait_for(lambda: bool(order) and order[0] == index, PATIENCE_S)

        return before

    servers = [start(ONE, share, of=4, backend=GatedBackend(waiting(i))) for i, share in enumerate(shares(4))]
    outputs = set()
    with stopping(*servers), group_of(*servers) as group:
        group.wait_ready(timeout_s=PATIENCE_S)
        settle = group._settle

        def settled(prepared: Any, attempt: Any, outcome: Any, now: float) -> None:
            settle(prepared, attempt, outcome, now)
            with turn:  # the next shard may answer only when this answer has arrived
                arrived.append(attempt.job.index)
                order.pop(0)
                turn.notify_all()

        group._settle = settled  # type: ignore[method-assign]
        for permutation in itertools.permutations(range(4)):
            arrived: list[int] = []
            with turn:
                order[:] = permutation
                turn.notify_all()
            outputs.add(bits(group.forward(LAYER, hidden, routing_logits=logits).output))
            assert tuple(arrived) == permutation
    assert len(outputs) == 1


def test_no_more_bytes_are_sent_than_the_tokens_need(tier: list[Server]) -> None:
    case = make_case(make_spec(hidden_size=128), 128, 3)
    hidden, logits = inputs(dataclasses.replace(case, weights=CASE.weights))
    with group_of(*tier[:4]) as group, group_of(*tier[:4], mode="broadcast") as broadcast:
        result = group.forward(LAYER, hidden, routing_logits=logits, return_routing=True)
        everything = broadcast.forward(LAYER, hidden, routing_logits=logits)
        assert group.stats.value("sent_bytes") == result.sent_bytes
        assert group.stats.value("received_bytes") == result.received_bytes
    assert result.topk_ids is not None
    top_k = CASE.spec.top_k
    rows_needed = sum(len(set(row)) for row in (result.topk_ids // 4).tolist())
    row_bytes = CASE.spec.hidden_size + 6 * top_k  # FP8 values; an int32 and a bfloat16 for each slot
    assert result.sent_bytes <= 1.05 * rows_needed * row_bytes
    assert sum(part.num_tokens for part in result.parts) == rows_needed
    assert everything.sent_bytes > result.sent_bytes
    row_bytes = CASE.spec.hidden_size * 2
    assert rows_needed * row_bytes < result.received_bytes <= rows_needed * row_bytes + 100 * len(result.parts)


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_every_answer_counts_as_received_also_one_that_comes_too_late(flavour: str) -> None:
    hidden, logits = inputs(CASE)
    output_bytes = 2 * hidden.size
    gate = threading.Event()

    def before(*_: object) -> None:
        assert gate.wait(PATIENCE_S)

    slow, fast = start(ONE, backend=GatedBackend(before)), start(ONE)
    names = [address(slow), address(fast)]
    options: dict[str, Any] = {"hedge_percentile": 0.5, "hedge_burst": 100, "probe_timeout_s": PATIENCE_S}

    def check(group: Any, results: list[Any]) -> None:
        assert group.stats.value("hedge_wins") >= 1
        used = sum(result.received_bytes for result in results)
        assert group.stats.value("received_bytes") == used
        assert all(0 < result.received_bytes - output_bytes < 100 for result in results), "one answer each"
        gate.set()
        # Not all need be late: what is taken back before it is on the wire is not sent.
        _wait_until(lambda: group.stats.value("received_bytes") - used > output_bytes)

    def fill(group: Any) -> None:
        """Enough answers to know when to hedge."""
        for _ in range(16):
            group._shared.latencies.add(NUM_TOKENS, 0.5)

    async def run() -> None:
        async with AsyncExpertGroup(names, GroupConfig(**options)) as group:
            fill(group)
            results = [await group.forward(LAYER, hidden, routing_logits=logits) for _ in range(4)]
            await asyncio.to_thread(check, group, results)

    with stopping(slow, fast):
        try:
            if flavour == "async":
                asyncio.run(run())
                return
            with group_of(*names, **options) as group:
                fill(group)
                check(group, [group.forward(LAYER, hidden, routing_logits=logits) for _ in range(4)])
        finally:
            gate.set()


def test_separate_expert_rows_come_as_from_one_server(whole: Server, tier: list[Server]) -> None:
    hidden, logits = inputs(CASE)
    with Client(address(whole)) as client, group_of(*tier) as group:
        one = client.forward(LAYER, hidden, routing_logits=logits, do_finalize=False)
        many = group.forward(LAYER, hidden, routing_logits=logits, do_finalize=False)
    assert one.gemm2_output is not None
    assert many.gemm2_output is not None
    assert many.output is None
    slots = many.expanded_idx_to_permuted_idx
    assert bits(one.gemm2_output[one.expanded_idx_to_permuted_idx]) == bits(many.gemm2_output[slots])
    assert bits(many.expert_weights) == bits(one.expert_weights)


def test_prerouted_torch_and_empty_requests(whole: Server, tier: list[Server]) -> None:
    hidden, logits = inputs(CASE)
    with Client(address(whole)) as client, group_of(*tier) as group:
        routed = group.forward(LAYER, hidden, routing_logits=logits, return_routing=True)
        ids, weights = routed.topk_ids, routed.expert_weights
        again = group.forward(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert bits(again.output) == bits(routed.output)
        tensors = group.forward(LAYER, CASE.hidden_states, routing_logits=CASE.routing_logits)
        assert isinstance(tensors.output, torch.Tensor)
        assert bits(tensors.output.view(torch.int16).numpy()) == bits(routed.output)
        empty = np.full_like(ids, -1)
        empty[0, 0] = 5
        sparse = group.forward(LAYER, hidden, topk_ids=empty, topk_weights=weights)
        assert [part.num_tokens for part in sparse.parts] == [1]
        alone = client.forward(LAYER, hidden, topk_ids=empty, topk_weights=weights)
        assert bits(sparse.output) == bits(alone.output)
        nothing = group.forward(LAYER, hidden[:0], routing_logits=logits[:0])
        assert nothing.output is not None
        assert nothing.output.shape == (0, CASE.spec.hidden_size)
        assert nothing.sent_bytes == 0


def test_requests_larger_than_a_batch_are_cut_and_keep_their_bits(tier: list[Server]) -> None:
    hidden, logits = inputs(CASE)
    small = [start(ONE, share, of=4, max_batch_tokens=8) for share in shares(4)]
    with stopping(*small), group_of(*small) as group, group_of(*tier) as reference:
        cut = group.forward(LAYER, hidden, routing_logits=logits)
        assert max(part.num_tokens for part in cut.parts) == 8
        assert bits(cut.output) == bits(reference.forward(LAYER, hidden, routing_logits=logits).output)


def test_errors_name_what_is_wrong(tier: list[Server]) -> None:
    hidden, logits = inputs(CASE)
    ids = np.zeros((NUM_TOKENS, CASE.spec.top_k), np.int32)
    weights = np.ones(ids.shape, np.float32)
    with group_of(*tier) as group:
        with pytest.raises(LayerNotFoundError, match=f"'nowhere'; it holds .*{LAYER}"):
            group.forward("nowhere", hidden, routing_logits=logits)
        with pytest.raises(VersionNotHeldError, match=r"weights_version 9 is not held for all experts .*0-3: \[1\]"):
            group.forward(LAYER, hidden, routing_logits=logits, weights_version=9)
        bad = logits.copy()
        bad[5, 1] = np.nan
        with pytest.raises(InvalidRequestError, match="row 5 holds NaN"):
            group.forward(LAYER, hidden, routing_logits=bad)
        ids[3, 2] = 16
        with pytest.raises(InvalidRequestError, match=r"topk_ids\[3, 2\]: is 16, expected -1 to 15"):
            group.forward(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        with pytest.raises(InvalidRequestError, match="hidden_states"):
            group.forward(LAYER, hidden[:, :-1].copy(), routing_logits=logits)
        for timeout_s in (0, float("inf")):
            with pytest.raises(InvalidRequestError, match=f"timeout_s: is {timeout_s}"):
                group.forward(LAYER, hidden, routing_logits=logits, timeout_s=timeout_s)
        assert 'expertd_client_requests_total{outcome="error"} 7' in group.metrics_text()


def test_layers_are_described_as_by_one_server(whole: Server, tier: list[Server]) -> None:
    with Client(address(whole)) as client, group_of(*tier) as group:
        ours, theirs = group.layers(), client.layers()
        assert [layer.name for layer in ours] == [layer.name for layer in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            same = dataclasses.replace(mine, routing_bias=None, weights_bytes=0)
            assert same == dataclasses.replace(other, routing_bias=None, weights_bytes=0)
            assert np.array_equal(mine.routing_bias, other.routing_bias)
        assert group.layer(LAYER).name == LAYER


def test_uncovered_experts_are_an_error_before_the_first_answer(tier: list[Server]) -> None:
    hidden, logits = inputs(CASE)
    with group_of(*tier[:3]) as group:
        with pytest.raises(TopologyError, match=f"layer '{LAYER}': no server holds experts 12-15 of 16"):
            group.forward(LAYER, hidden, routing_logits=logits)
        with pytest.raises(TimeoutError, match="no server holds experts 12-15"):
            group.wait_ready(timeout_s=0.3)


def _call(flavour: str, servers: list[Server], *calls: dict[str, Any]) -> list[Any]:
    """What one group answers to calls of forward, or raises, one after the other."""
    hidden, logits = inputs(CASE)
    results: list[Any] = []
    if flavour == "sync":
        with group_of(*servers) as group:
            for options in calls:
                try:
                    results.append(group.forward(LAYER, hidden, routing_logits=logits, **options))
                except expertd.ExpertdError as error:
                    results.append(error)
        return results

    async def run() -> None:
        async with AsyncExpertGroup([address(server) for server in servers]) as group:
            for options in calls:
                try:
                    results.append(await group.forward(LAYER, hidden, routing_logits=logits, **options))
                except expertd.ExpertdError as error:
                    results.append(error)

    asyncio.run(run())
    return results


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_a_call_may_take_a_partial_answer_of_a_group_that_was_never_complete(flavour: str, tier: list[Server]) -> None:
    partial, again, whole = _call(flavour, tier[:3], {"allow_partial": True}, {"allow_partial": True}, {})
    assert partial.is_partial
    assert all(12 <= experts.start < experts.stop <= 16 for experts in partial.missing_experts)
    assert bits(again.output) == bits(partial.output)
    assert isinstance(whole, TopologyError), "a call that takes only whole answers gets none"


def test_wait_ready_waits_for_the_last_shard(tier: list[Server], tmp_path: Path) -> None:
    hidden, logits = inputs(CASE)
    path = tmp_path / "tier.json"
    _write_topology(path, *tier[:3])
    with group_of(path) as group:
        with pytest.raises(TopologyError):
            group.forward(LAYER, hidden, routing_logits=logits)
        _write_topology(path, *tier[:4])
        group.wait_ready(timeout_s=PATIENCE_S)
        assert group.forward(LAYER, hidden, routing_logits=logits).output is not None


def test_servers_without_a_layer_are_not_ready_yet() -> None:
    server = start({})
    with (
        stopping(server),
        group_of(server) as group,
        pytest.raises(TimeoutError, match=f"no layer .*{server.port} yet"),
    ):
        group.wait_ready(timeout_s=0.3)


def _write_topology(path: Path, *servers: Server) -> None:
    partial = path.with_suffix(".part")
    document = {"expertd_topology": 1, "servers": [{"address": address(server)} for server in servers]}
    partial.write_text(json.dumps(document))
    partial.replace(path)


def test_no_replica_left_names_the_experts_unless_partial_answers_are_allowed() -> None:
    hidden, logits = inputs(CASE)
    servers = [start(ONE, share, of=4) for share in shares(4)]
    with stopping(*servers), group_of(*servers, no_replica_timeout_s=0.2) as group:
        whole = group.forward(LAYER, hidden, routing_logits=logits, return_routing=True)
        kill(servers[2])
        with pytest.raises(NoReplicaError, match="experts 8-11") as caught:
            group.forward(LAYER, hidden, routing_logits=logits)
        assert caught.value.experts == (range(8, 12),)
        partial = group.forward(LAYER, hidden, routing_logits=logits, allow_partial=True)
        assert whole.topk_ids is not None
        lost = (whole.topk_ids >= 8) & (whole.topk_ids < 12)
        assert partial.is_partial
        assert np.array_equal(partial.missing_slots, lost)
        assert partial.missing_experts == (range(8, 12),)
        assert [part.replica is None for part in partial.parts] == [False, False, True, False]
        without = np.where(lost, -1, whole.topk_ids).astype(np.int32)
        rest = group.forward(LAYER, hidden, topk_ids=without, topk_weights=whole.expert_weights)
        assert bits(rest.output) == bits(partial.output)
        assert not rest.is_partial
        assert group.stats.value("requests", outcome="partial") == 1


@pytest.mark.parametrize("stop", [kill, Server.shutdown], ids=["kill", "drain"])
def test_a_replica_goes_and_another_comes_under_load_without_a_failure(stop: Any, tmp_path: Path) -> None:
    servers = [start(ONE, share, of=2) for _ in range(2) for share in shares(2)]
    path = tmp_path / "tier.json"
    _write_topology(path, *servers)
    with stopping(*servers), group_of(path) as group, Load(group, LAYER, CASE) as load:
        load.wait(40)
        stop(servers[0])
        load.wait(40)
        replacement = start(ONE, range(1), of=2)
        with stopping(replacement):
            _write_topology(path, *servers[1:], replacement)
            _wait_for_use(group, replacement)
            # The new one carries its shard alone: what is left of the old tier's first shard goes too.
            stop(servers[2])
            load.wait(40)
            _write_topology(path, servers[1], servers[3], replacement)
            group.refresh(timeout_s=PATIENCE_S)
            load.wait(40)
            assert len(load.outputs) == 1
            with group._lock:
                assert set(group._members) == {address(servers[1]), address(servers[3]), address(replacement)}
            load.stop()
        assert not load.failures


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_a_name_that_stands_for_other_servers_takes_the_load_there_without_a_failure(
    flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [f"127.0.0.{number}" for number in (2, 3, 4, 5)]
    servers = [start(ONE, range(1), of=2, host=hosts[0])]
    port = servers[0].port
    servers += [start(ONE, range(n % 2, n % 2 + 1), of=2, host=hosts[n], port=port) for n in (1, 2, 3)]
    names = [f"{host}:{port}" for host in hosts]
    now = hosts[:2]
    stand_for(monkeypatch, "experts.test", now)

    def change() -> None:
        now[:] = hosts[2:]

    with stopping(*servers):
        run = _move_async if flavour == "async" else _move
        replicas, members = run(f"experts.test:{port}", change, names[2:])
    assert replicas <= set(names)
    assert replicas >= set(names[2:])
    assert members == set(names[2:]), "the servers of the old addresses are left"


def _move(target: str, change: Any, after: list[str]) -> tuple[set[str], set[str]]:
    with group_of(target) as group, Load(group, LAYER, CASE) as load:
        load.wait(20)
        change()
        _wait_until(lambda: set(group._clients) == set(after) == set(group._members))
        load.wait(20)
        load.stop()
        assert not load.failures
        assert len(load.outputs) == 1
        result = group.forward(LAYER, inputs(CASE)[0], routing_logits=inputs(CASE)[1])
        return {str(part.replica) for part in result.parts}, set(group._members)


def _move_async(target: str, change: Any, after: list[str]) -> tuple[set[str], set[str]]:
    hidden, logits = inputs(CASE)

    async def run() -> tuple[set[str], set[str]]:
        config = GroupConfig(refresh_interval_s=0.2, hedge_percentile=None)
        async with AsyncExpertGroup(target, config) as group:
            replicas: set[str] = set()
            answers, deadline = set(), time.monotonic() + PATIENCE_S
            for number in itertools.count():
                results = await asyncio.gather(*(group.forward(LAYER, hidden, routing_logits=logits) for _ in range(4)))
                answers |= {bits(result.output) for result in results}
                replicas |= {str(part.replica) for result in results for part in result.parts}
                if number == 5:
                    change()
                if number > 5 and replicas >= set(after) and set(group._members) == set(after):
                    break
                assert time.monotonic() < deadline, f"still asks {set(group._members)}"
            assert len(answers) == 1
            return replicas, set(group._members)

    return asyncio.run(run())


def _wait_for_use(group: ExpertGroup, server: Server) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        group.refresh(timeout_s=PATIENCE_S)
        with group._lock:
            replica = group._replicas.get(address(server))
            if replica is not None and replica.last_use:
                return
    raise AssertionError(f"{address(server)} never got a request")


def test_weights_are_replaced_under_load_and_versions_never_mix() -> None:
    backend = GatedBackend()
    new = other_weights(CASE, 77)
    servers = [start(ONE, share, of=2, backend=backend) for share in shares(2)]
    reference = start({"old": CASE, "new": new}, range(1), of=1, backend=backend)
    slices = [slice_of(CASE, share, 2) for share in shares(2)]
    with stopping(*servers, reference):
        with group_of(*servers) as group, Load(group, LAYER, CASE) as load:
            load.wait(20)
            for server, experts in zip(servers, slices, strict=True):
                server.store.add(moe_layer(LAYER, new, experts, backend, 2))
                server.store.set_current(LAYER, 2)
                load.wait(20)
            group.refresh(timeout_s=PATIENCE_S)
            load.wait(20)
            for server in servers:
                server.store.remove(LAYER, 1)
                load.wait(20)
            load.stop()
            final = group.forward(LAYER, *inputs(CASE)[:1], routing_logits=inputs(CASE)[1])
        assert not load.failures
        assert final.weights_version == 2
        one = [sum_of_slices(reference, layer, CASE, slices) for layer in ("old", "new")]
        assert load.outputs == set(one), "an answer that is of neither version alone"
        assert bits(final.output) == one[1]


def test_a_version_that_vanishes_between_look_and_use_is_replaced_by_a_common_one() -> None:
    backend = GatedBackend()
    servers = [start(ONE, share, of=2, backend=backend) for share in shares(2)]
    hidden, logits = inputs(CASE)
    with stopping(*servers), group_of(*servers, refresh_interval_s=1000.0) as group:
        before = group.forward(LAYER, hidden, routing_logits=logits)
        for server, share in zip(servers, shares(2), strict=True):
            server.store.add(moe_layer(LAYER, other_weights(CASE, 5), slice_of(CASE, share, 2), backend, 2))
            server.store.set_current(LAYER, 2)
            server.store.remove(LAYER, 1)
        after = group.forward(LAYER, hidden, routing_logits=logits)
        assert (before.weights_version, after.weights_version) == (1, 2)
        assert bits(before.output) != bits(after.output)
        assert group.stats.value("version_restarts") == 1


def test_replicas_of_other_weights_with_the_same_version_are_refused_and_another_version_is_not() -> None:
    def serve(seed: int, version: int = 1) -> Server:
        server = Server(
            Config(
                port=0, device="cpu", synthetic="tiny", synthetic_layers=1, synthetic_seed=seed, weights_version=version
            )
        )
        assert server.startup()
        return server

    name = "synthetic.tiny.0"
    servers = [serve(1), serve(1), serve(2), serve(2, version=2)]
    with stopping(*servers):
        one, same, other, other_version = servers
        with group_of(one, same, other_version, probe_timeout_s=PATIENCE_S) as group:
            group.wait_ready(timeout_s=PATIENCE_S)
            group.refresh(timeout_s=PATIENCE_S)
            assert len(group.placement(name).shards[0].versions) == 3
        with (
            group_of(one, same, other, probe_timeout_s=PATIENCE_S) as group,
            pytest.raises(TopologyError, match=f"'{name}': weights of experts 0-.*--weights-version"),
        ):
            group.layer(name, timeout_s=PATIENCE_S)
        with Client(address(one)) as client, Client(address(same)) as twin:
            assert client.layer(name).weights_fingerprint == twin.layer(name).weights_fingerprint != 0


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_poisoned_requests_fail_alone_and_take_no_server_out_of_use(flavour: str) -> None:
    hidden, logits = inputs(CASE)
    poison = np.full_like(hidden, 448.0)

    def before(_: object, rows: torch.Tensor) -> None:
        if (rows.float() == 448.0).all(dim=1).any():
            raise RuntimeError("poisoned")

    servers = [start(ONE, share, of=2, backend=GatedBackend(before)) for _ in range(2) for share in shares(2)]
    names = [address(server) for server in servers]

    async def poison_async(count: int) -> str:
        async with AsyncExpertGroup(names, GroupConfig(hedge_percentile=None)) as group:
            for _ in range(count):
                with pytest.raises(ServerError):
                    await group.forward(LAYER, poison, routing_logits=logits, timeout_s=PATIENCE_S)
            assert group.stats.value("attempts") <= 4 * count
            return group.metrics_text()

    with stopping(*servers), group_of(*servers, hedge_percentile=None) as group:
        good = bits(group.forward(LAYER, hidden, routing_logits=logits).output)
        attempts = group.stats.value("attempts")
        if flavour == "async":
            text = asyncio.run(poison_async(6))
        else:
            for _ in range(6):
                with pytest.raises(ServerError):
                    group.forward(LAYER, poison, routing_logits=logits, timeout_s=PATIENCE_S)
            assert group.stats.value("attempts") - attempts <= 4 * 6
            text = group.metrics_text()
        for name in names:
            assert f'expertd_client_replica_up{{replica="{name}"}} 1' in text
        assert bits(group.forward(LAYER, hidden, routing_logits=logits).output) == good


def test_an_overloaded_replica_is_passed_over() -> None:
    hidden, logits = inputs(CASE)
    gate = threading.Event()
    entered = threading.Semaphore(0)

    def before(*_: object) -> None:
        entered.release()
        assert gate.wait(PATIENCE_S)

    held = start(ONE, backend=GatedBackend(before), max_batch_tokens=64, max_queue_tokens=64, max_queue_requests=1)
    free = start(ONE)
    with stopping(held, free), Client(address(held)) as client, group_of(held, free) as group:
        try:
            blockers = [
                threading.Thread(target=client.forward, args=(LAYER, hidden), kwargs={"routing_logits": logits})
                for _ in range(2)
            ]
            blockers[0].start()
            assert entered.acquire(timeout=PATIENCE_S)
            blockers[1].start()
            _wait_until(lambda: held.engine.batcher.queue_requests == 1)
            for _ in range(4):
                result = group.forward(LAYER, hidden, routing_logits=logits, timeout_s=PATIENCE_S)
                assert result.parts[0].replica == address(free)
            assert group.stats.value("failovers") >= 1
        finally:
            gate.set()
        for blocker in blockers:
            blocker.join(PATIENCE_S)


def _wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.005)


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_a_call_leaves_a_server_that_goes_out_of_use_though_nothing_is_hedged(
    flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, logits = inputs(CASE)
    gate, entered = threading.Event(), threading.Event()

    def before(*_: object) -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    def trip(group: GroupBase) -> None:
        """As probes without an answer do, which this server would answer."""
        monkeypatch.setattr(group, "_take_health", lambda probe: None)
        with group._lock:
            (replica,) = (each for each in group._replicas.values() if each.in_flight_requests)
            replica.breaker.trip()

    servers = [start(ONE, backend=GatedBackend(before)), start(ONE)]
    targets = [address(server) for server in servers]
    config = GroupConfig(hedge_percentile=None, refresh_interval_s=0.1)  # and attempt_timeout_s is ten seconds

    def sync() -> None:
        with ExpertGroup(targets, config) as group, ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(group.forward, LAYER, hidden, routing_logits=logits) for _ in range(2)]
            assert entered.wait(PATIENCE_S)
            _wait_until(lambda: any(call.done() for call in calls))
            trip(group)
            for call in calls:
                assert call.result(SOON_S).parts[0].replica == targets[1]

    async def asynchronous() -> None:
        async with AsyncExpertGroup(targets, config) as group:
            calls = [asyncio.create_task(group.forward(LAYER, hidden, routing_logits=logits)) for _ in range(2)]
            assert await asyncio.to_thread(entered.wait, PATIENCE_S)
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
            trip(group)
            async with asyncio.timeout(SOON_S):
                assert {(await call).parts[0].replica for call in calls} == {targets[1]}

    with stopping(*servers):
        try:
            sync() if flavour == "sync" else asyncio.run(asynchronous())
        finally:
            gate.set()


def test_close_fails_what_is_in_flight_and_leaves_no_threads() -> None:
    hidden, logits = inputs(CASE)
    gate, entered = threading.Event(), threading.Event()

    def before(*_: object) -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    server = start(ONE, backend=GatedBackend(before))
    threads_before = set(threading.enumerate())
    caught: list[BaseException] = []
    with stopping(server):
        group = group_of(server)

        def call() -> None:
            try:
                group.forward(LAYER, hidden, routing_logits=logits)
            except ClosedError as error:
                caught.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        assert entered.wait(PATIENCE_S)
        group.close()
        caller.join(PATIENCE_S)
        gate.set()
        assert len(caught) == 1
        with pytest.raises(ClosedError):
            group.forward(LAYER, hidden, routing_logits=logits)
        group.close()
        left = [t for t in threading.enumerate() if t not in threads_before and t.name.startswith("expertd-group")]
        assert not left


def test_async_group_survives_a_lost_replica_and_closes_cleanly() -> None:
    hidden, logits = inputs(CASE)
    servers = [start(ONE, share, of=2) for _ in range(2) for share in shares(2)]

    async def run() -> set[bytes]:
        config = GroupConfig(refresh_interval_s=0.2, hedge_percentile=None)
        async with AsyncExpertGroup([address(server) for server in servers], config) as group:
            first = await group.forward(LAYER, hidden, routing_logits=logits)
            calls = [asyncio.create_task(group.forward(LAYER, hidden, routing_logits=logits)) for _ in range(60)]
            await asyncio.to_thread(kill, servers[0])
            results = [first, *await asyncio.gather(*calls)]
            results.append(await group.forward(LAYER, hidden, routing_logits=logits))
            assert (await group.layer(LAYER)).local_num_experts == 16
            pending = asyncio.create_task(group.forward(LAYER, hidden, routing_logits=logits))
            await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await pending
        return {bits(result.output) for result in results}

    with stopping(*servers):
        assert len(asyncio.run(run(), debug=False)) == 1


def test_sync_and_async_groups_have_the_same_methods() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(ExpertGroup) == names(AsyncExpertGroup)
    assert names(expertd.Client) & names(ExpertGroup) >= {"forward", "layers", "layer", "wait_ready", "close"}


def _spawn(tmp_path: Path, name: str, port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
    """A server in a process of its own, and its address."""
    ready = tmp_path / f"{name}.json"
    ready.unlink(missing_ok=True)
    arguments = ["serve", "--synthetic", "tiny", "--device", "cpu", "--port", str(port), "--ready-file", str(ready)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "expertd_server", *arguments], env=environment)
    deadline = time.monotonic() + PATIENCE_S
    while not ready.exists():
        assert process.poll() is None, f"{name} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{name} was not ready in time"
        time.sleep(0.05)
    return process, json.loads(ready.read_text())["address"]


def test_a_paused_and_a_killed_process_cost_no_request(tmp_path: Path) -> None:
    case = make_case(make_spec(hidden_size=256, intermediate_size=128, num_experts=8, top_k=2), 16, SEED)
    (first, one), (second, two) = _spawn(tmp_path, "one"), _spawn(tmp_path, "two")
    try:
        # No FIN, no error: only hedges and timeouts can tell that the first one hangs.
        with (
            group_of(one, two, hedge_percentile=0.9, attempt_timeout_s=2.0, probe_timeout_s=0.5) as group,
            Load(group, "synthetic.tiny.0", case) as load,
        ):
            load.wait(200)
            first.send_signal(signal.SIGSTOP)
            load.wait(200)
            first.send_signal(signal.SIGCONT)
            _wait_until(lambda: f'replica_up{{replica="{one}"}} 1' in group.metrics_text())
            second.kill()
            second.wait()
            load.wait(200)
            second, _ = _spawn(tmp_path, "two", int(two.rpartition(":")[2]))
            _wait_until(lambda: f'replica_up{{replica="{two}"}} 1' in group.metrics_text())
            first.kill()
            first.wait()
            load.wait(200)
            load.stop()
        assert not load.failures
        assert len(load.outputs) == 1
    finally:
        for process in (first, second):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
