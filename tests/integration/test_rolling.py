"""New weights for a tier under load: loaded everywhere, swapped server by server, the old ones unloaded."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from cases import Case, make_case
from tier import PATIENCE_S, Load, group_of, stopping, sum_of_slices

from expertd import AdminClient, Client
from expertd_server.config import Config
from expertd_server.server import Server
from expertd_server.synthetic import synthetic_spec

LAYER = "synthetic.tiny.0"
OLD_SEED, NEW_SEED = 0, 7
SLICES = (range(4), range(4, 8))
CASE: Case = make_case(synthetic_spec("tiny"), 23, 20261126)  # for its inputs


def serve(experts: range) -> Server:
    """A server of the old weights that takes orders."""
    server = Server(
        Config(
            port=0,
            device="cpu",
            synthetic="tiny",
            synthetic_seed=OLD_SEED,
            experts=f"{experts.start}-{experts.stop - 1}",
            admin=True,
            admin_port=0,
        )
    )
    assert server.startup()
    return server


@pytest.fixture(scope="module")
def answers() -> dict[int, bytes]:
    """The bits of the tier's answer by version, worked out with one server."""
    server = serve(range(8))
    with stopping(server), AdminClient(f"127.0.0.1:{server.admin_port}") as admin:
        admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=NEW_SEED)
        return {version: sum_of_slices(server, LAYER, CASE, SLICES, version) for version in (1, 2)}


@pytest.fixture
def tier() -> Iterator[list[Server]]:
    """Two shards with two replicas each."""
    servers = [serve(experts) for _ in range(2) for experts in SLICES]
    with stopping(*servers):
        yield servers


@pytest.mark.parametrize("refresh_interval_s", [0.1, 1000.0], ids=["told", "finds_out"])
def test_a_rolling_swap_under_load_fails_nothing_and_mixes_nothing(
    tier: list[Server], answers: dict[int, bytes], refresh_interval_s: float
) -> None:
    """A group that looks often follows the swap; one that does not finds out when its version is gone."""
    admins = [AdminClient(f"127.0.0.1:{server.admin_port}") for server in tier]
    with group_of(*tier, refresh_interval_s=refresh_interval_s) as group, Load(group, LAYER, CASE) as load:
        load.wait(20)
        for admin in admins:
            admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=NEW_SEED)
            load.wait(10)
        assert set(load.by_version) == {1}, "nobody asked for the new version yet"
        for admin in admins:
            assert admin.swap_weights(LAYER, 2).previous_weights_version == 1
            load.wait(10)
        for admin in admins:
            assert admin.unload_layer(LAYER, 1, timeout_s=PATIENCE_S).freed
            load.wait(10)
        load.stop()
        until_s = time.monotonic() + PATIENCE_S  # ten answers may take less time than a look at the tier
        while group.layer(LAYER).weights_versions != (2,) and time.monotonic() < until_s:
            time.sleep(0.01)
        final = group.layer(LAYER)
    for admin in admins:
        admin.close()
    assert load.failures == []
    assert load.by_version == {version: {answer} for version, answer in answers.items()}
    assert (final.weights_version, final.weights_versions) == (2, (2,))


def test_a_server_that_loads_swaps_and_unloads_at_once_is_asked_for_nothing_it_has_not(
    tier: list[Server], answers: dict[int, bytes]
) -> None:
    """The careless way, one server after the other: as long as a version is left everywhere, nothing fails."""
    first, other = tier[0], tier[2]
    with group_of(*tier) as group, Load(group, LAYER, CASE) as load:
        load.wait(20)
        with AdminClient(f"127.0.0.1:{first.admin_port}") as admin:
            admin.load_layer(LAYER, 2, synthetic="tiny", synthetic_seed=NEW_SEED)
            admin.swap_weights(LAYER, 2)
            assert admin.unload_layer(LAYER, 1, timeout_s=PATIENCE_S).freed
        load.wait(40)
    assert load.failures == []
    assert load.by_version == {1: {answers[1]}}, "the other shard has the old version only"
    with Client(f"127.0.0.1:{first.port}") as one, Client(f"127.0.0.1:{other.port}") as two:
        assert (one.layer(LAYER).weights_versions, two.layer(LAYER).weights_versions) == ((2,), (1,))
