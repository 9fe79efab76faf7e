"""What a group makes of its members as they come, go and disagree; and what keeps it looking for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
import pytest
from test_group_topology import E, member

from expertd import AsyncExpertGroup, ExpertGroup
from expertd._group_base import GroupBase, Probe
from expertd.errors import ConfigError, NoReplicaError
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
