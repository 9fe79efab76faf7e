"""What a group makes of its members as they come, go and disagree; and what keeps it looking for them."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
import pytest
from test_group_topology import E, member

from expertd import AsyncExpertGroup, ClientConfig, ExpertGroup, GroupConfig
from expertd._group_base import GroupBase, Probe
from expertd.errors import ConfigError, NoReplicaError, UnavailableError
from expertd.topology import Member
from expertd.types import ForwardRequest

TIMEOUT_S = 3.0
REQUEST = ForwardRequest(
    layer="layer", hidden_states=np.zeros((3, 64), ml_dtypes.float8_e4m3fn), routing_logits=np.zeros((3, E), np.float32)
)


def take(group: GroupBase, members: Iterable[Member]) -> None:
    """A refresh that finds exactly these members."""
    probes = [Probe(each.address, each) for each in members]
    group._take_members([probe.address for probe in probes], probes)


def test_a_replacement_that_disagrees_leaves_the_layer_to_those_that_are_still_there() -> None:
    group = GroupBase("unused:1")
    take(group, [member("a", 0, E), member("b", 0, E)])
    take(group, [member("b", 0, E), member("c", 0, E, hidden_states_scale=2.0)])
    placement = group.placement("layer")
    assert [sorted(shard.versions) for shard in placement.shards] == [["b"]]
    assert group._merged_info(placement).weights_bytes == 1000
    (job,) = group._begin(REQUEST, deadline=1.0, allow_partial=False).dispatch.jobs
    assert [replica.address for replica in job.replicas] == ["b"]


def test_a_slice_that_only_servers_that_disagree_are_left_for_is_missing() -> None:
    group = GroupBase("unused:1")
    take(group, [member("a", 0, 6), member("b", 6, E)])
    take(group, [member("b", 6, E), member("c", 0, 6, hidden_states_scale=2.0)])
    assert group.placement("layer").missing == [range(6)]
    assert group._merged_info(group.placement("layer")).weights_bytes == 1000
    with pytest.raises(NoReplicaError, match="no server holds experts 0-5"):
        group._begin(REQUEST, deadline=1.0, allow_partial=False)


def test_a_server_that_comes_back_with_other_weights_of_the_same_version_is_not_asked() -> None:
    group = GroupBase("unused:1")
    old = {"weights_fingerprint": 7}
    take(group, [member("a", 0, E, **old), member("b", 0, E, **old)])
    take(group, [member("a", 0, E, **old), member("b", 0, E, weights_fingerprint=8)])
    (shard,) = group.placement("layer").shards
    assert sorted(shard.versions) == ["a"], "b started again from another checkpoint, at the same address"
    take(group, [member("a", 0, E, weights_fingerprint=8), member("b", 0, E, weights_fingerprint=8)])
    (shard,) = group.placement("layer").shards
    assert sorted(shard.versions) == ["a", "b"], "now they agree again"


@pytest.mark.parametrize("change", ["another slice", "unloaded"])
def test_a_server_that_holds_something_else_now_is_not_asked_for_what_it_held(change: str) -> None:
    group = GroupBase("unused:1")
    take(group, [member("a", 0, 6), member("b", 6, E), member("d", 0, 6)])
    changed = member("a", 6, E) if change == "another slice" else Member("a", member("a", 0, 6).server, {})
    take(group, [changed, member("b", 6, E), member("c", 0, 6, hidden_states_scale=2.0), member("d", 0, 6)])
    placement = group.placement("layer")
    assert [sorted(shard.versions) for shard in placement.shards] == [["d"], ["b"]]
    assert group._merged_info(placement).weights_bytes == 2000


def test_when_only_servers_that_disagree_are_left_all_experts_are_missing() -> None:
    group = GroupBase("unused:1")
    take(group, [member("a", 0, E)])
    take(group, [member("b", 0, E), member("c", 0, E, hidden_states_scale=2.0)])
    assert group._merged_info(group.placement("layer")).weights_versions == ()
    with pytest.raises(NoReplicaError, match="no server holds experts 0-11"):
        group._begin(REQUEST, deadline=1.0, allow_partial=False)
    assert group._begin(REQUEST, deadline=1.0, allow_partial=True).dispatch.is_done


def test_of_two_addresses_of_a_server_the_one_that_answers_is_used() -> None:
    group = GroupBase("unused:1")
    one = member("a", 0, E)
    other = Member("b", one.server, one.layers)
    take(group, [one, other])
    assert list(group.placement("layer").shards[0].versions) == ["a"]
    group._take_members(["a", "b"], [Probe("a", None, UnavailableError("no route")), Probe("b", other)])
    assert list(group.placement("layer").shards[0].versions) == ["b"]


BAD_CLIENT = GroupConfig(client=functools.partial(ClientConfig, ca_file="/nowhere/ca.pem"))


def test_an_option_of_the_connections_that_cannot_be_used_is_told_at_once() -> None:
    with ExpertGroup("localhost:1", BAD_CLIENT) as group, pytest.raises(ConfigError, match=r"/nowhere/ca\.pem"):
        group.wait_ready(timeout_s=TIMEOUT_S)

    async def wait_ready() -> None:
        async with AsyncExpertGroup("localhost:1", BAD_CLIENT) as group:
            await group.wait_ready(timeout_s=TIMEOUT_S)

    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem"):
        asyncio.run(wait_ready())


def test_closing_at_the_moment_of_a_refresh_does_not_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    group = ExpertGroup("unix:/nowhere/a", GroupConfig(refresh_interval_s=60.0))
    group.refresh(timeout_s=TIMEOUT_S)
    closer = threading.Thread(target=group.close)
    clear = group._wanted.clear

    def close_and_clear() -> None:
        closer.start()
        assert group._closed.wait(TIMEOUT_S)
        while not group._wanted.is_set() or group._clients:
            time.sleep(0.001)
        clear()

    monkeypatch.setattr(group._wanted, "clear", close_and_clear)
    group._wanted.set()
    assert group._closed.wait(TIMEOUT_S)
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()


def test_an_asynchronous_group_closes_the_connections_of_those_that_have_just_left() -> None:
    async def look() -> None:
        left = asyncio.Event()

        class Leaving(AsyncExpertGroup):
            async def _ask(self, address: str) -> Probe:
                if address.endswith("b"):
                    left.set()
                    await asyncio.Event().wait()
                return Probe(address, None, UnavailableError("of no interest"))

        group = Leaving(Moving())
        await group.refresh(timeout_s=TIMEOUT_S)
        client = group._clients["unix:/nowhere/a"]
        group._wanted.set()
        await asyncio.wait_for(left.wait(), TIMEOUT_S)
        await group.close()
        assert client._closed.is_set()

    asyncio.run(look())


class Moving:
    """Stands for one address at first, then for another."""

    def __init__(self) -> None:
        self._answers = ["unix:/nowhere/a", "unix:/nowhere/b"]

    def resolve(self) -> Sequence[str]:
        return [self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]]


class Failing:
    """Fails once after the first look, then stands for other addresses than before."""

    def __init__(self, error: Exception) -> None:
        self._answers: list[Exception | list[str]] = [["unix:/nowhere/a"], error, ["unix:/nowhere/b"]]

    def resolve(self) -> Sequence[str]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


ERRORS = [ConfigError("bad line"), UnicodeError("label empty"), RuntimeError("bug"), OSError("gone")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_group_looks_again_whatever_a_resolver_raises(error: Exception) -> None:
    with ExpertGroup(Failing(error)) as group:
        group.refresh(timeout_s=TIMEOUT_S)
        group.refresh(timeout_s=TIMEOUT_S)
        assert str(error) in str(group._refresh_error)
        group.refresh(timeout_s=TIMEOUT_S)
        assert "nowhere/b" in str(group._refresh_error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_asynchronous_group_looks_again_whatever_a_resolver_raises(error: Exception) -> None:
    async def look() -> None:
        async with AsyncExpertGroup(Failing(error)) as group:
            await group.refresh(timeout_s=TIMEOUT_S)
            await group.refresh(timeout_s=TIMEOUT_S)
            assert str(error) in str(group._refresh_error)
            await group.refresh(timeout_s=TIMEOUT_S)
            assert "nowhere/b" in str(group._refresh_error)

    asyncio.run(look())
