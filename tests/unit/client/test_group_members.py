"""What a group makes of its members as they come, go and disagree; and what keeps it looking for them."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import pytest
from test_group_topology import E, member

from expertd._group_base import GroupBase, Probe
from expertd.errors import NoReplicaError
from expertd.topology import Member
from expertd.types import ForwardRequest

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
