"""Where servers are and what they hold: targets, topology files, slices, replicas, versions."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertd.errors import ConfigError, TopologyError
from expertd.topology import LayerPlacement, Member, NamedAddress, TopologyFile, distinct, place_layer, resolver_for
from expertd.types import Activation, LayerInfo, LayerState, RoutingMethod, ServerInfo

E = 12


def member(address: str, start: int, stop: int, *, instance: str | None = None, **layer: Any) -> Member:
    """A server that holds experts start ... stop - 1 of the one layer."""
    info = LayerInfo(
        name="layer",
        hidden_size=64,
        intermediate_size=32,
        num_experts=E,
        local_expert_offset=start,
        local_num_experts=stop - start,
        top_k=2,
        routing_method=RoutingMethod.MINIMAX2,
        activation=Activation.SWIGLU,
        n_group=0,
        topk_group=0,
        routed_scaling_factor=None,
        norm_topk_prob=True,
        use_routing_scales_on_input=False,
        hidden_states_scale=None,
        routing_bias=np.zeros(E, np.float32),
        weights_version=1,
        weights_versions=(1,),
        weights_bytes=1000,
        state=LayerState.READY,
    )
    server = ServerInfo(
        server_version="0",
        backend="cpu",
        device="none",
        max_batch_tokens=64,
        max_message_bytes=0,
        max_queue_tokens=64,
        draining=False,
        instance_id=instance or f"instance of {address}",
    )
    return Member(address, server, {"layer": dataclasses.replace(info, **layer)})


def place(members: Sequence[Member], previous: LayerPlacement | None = None) -> LayerPlacement:
    placement = place_layer("layer", members, previous)
    assert placement is not None
    return placement


def slices(placement: LayerPlacement) -> list[tuple[int, int, list[str]]]:
    return [(s.experts.start, s.experts.stop, sorted(s.versions)) for s in placement.shards]


def test_equal_slices_are_replicas_and_shards_ascend() -> None:
    placement = place([member("d", 8, 12), member("b", 0, 4), member("a", 0, 4), member("c", 4, 8)])
    assert slices(placement) == [(0, 4, ["a", "b"]), (4, 8, ["c"]), (8, 12, ["d"])]
    assert placement.missing == []


def test_missing_experts_are_named() -> None:
    placement = place([member("a", 0, 3), member("b", 5, 9)])
    assert placement.missing == [range(3, 5), range(9, 12)]
    assert "no server holds experts 3-4, 9-11 of 12" in placement.describe_missing()


def test_overlaps_resolve_to_the_fewest_missing_then_the_fewest_shards() -> None:
    quarters = [member(f"q{i}", 3 * i, 3 * i + 3) for i in range(4)]
    halves = [member(f"h{i}", 6 * i, 6 * i + 6) for i in range(2)]
    assert slices(place(quarters + halves)) == [(0, 6, ["h0"]), (6, 12, ["h1"])]
    assert place(quarters + halves).unused == ("q0", "q1", "q2", "q3")
    # Half a tier is not enough: the other way covers everything.
    assert [s[:2] for s in slices(place([*quarters, halves[0]]))] == [(0, 6), (6, 9), (9, 12)]
    assert [s[:2] for s in slices(place([*quarters, member("m", 4, 10)]))] == [(0, 3), (3, 6), (6, 9), (9, 12)]


def test_overlaps_that_cannot_be_resolved_say_who_is_left_out() -> None:
    placement = place([member("a", 0, 8), member("b", 4, 12)])
    assert len(placement.shards) == 1
    assert "hold slices that overlap others" in placement.describe_missing()


def test_the_way_chosen_before_is_kept_while_it_covers_everything() -> None:
    quarters = [member(f"q{i}", 3 * i, 3 * i + 3) for i in range(4)]
    whole = member("w", 0, 12)
    before = place(quarters)
    assert len(place([*quarters, whole], before).shards) == 4
    assert slices(place([*quarters[1:], whole], before)) == [(0, 12, ["w"])]


def test_servers_that_disagree_on_the_layer_are_an_error_that_names_both() -> None:
    with pytest.raises(TopologyError, match=r"layer 'layer': top_k is 2 and 3 on a and b"):
        place([member("a", 0, 6), member("b", 6, 12, top_k=3)])
    with pytest.raises(TopologyError, match="routing_bias differs on a and b"):
        place([member("a", 0, 6), member("b", 6, 12, routing_bias=np.ones(E, np.float32))])
    with pytest.raises(TopologyError, match=r"hidden_states_scale is None and 2\.0"):
        place([member("a", 0, 6), member("b", 6, 12, hidden_states_scale=2.0)])


def test_replicas_with_other_weights_of_the_same_version_are_an_error_that_says_what_to_do() -> None:
    expected = (
        r"weights of experts 0-5 differ on a and c \(weights_fingerprint is 0{15}7 and 0{15}8\), expected the same, as "
        r"both call them version 1; start servers of another checkpoint with another --weights-version"
    )
    first = [member("a", 0, 6, weights_fingerprint=7), member("b", 6, 12, weights_fingerprint=9)]
    with pytest.raises(TopologyError, match=expected):
        place([*first, member("c", 0, 6, weights_fingerprint=8)])
    # Of another slice, of another version, or not told: nothing to compare.
    assert place(first).shards[0].fingerprints == {1: 7}
    new = member("c", 0, 6, weights_fingerprint=8, weights_version=2, weights_versions=(2,))
    assert sorted(place([*first, new]).shards[0].versions) == ["a", "c"]
    assert sorted(place([*first, member("c", 0, 6)]).shards[0].versions) == ["a", "c"]


def test_versions_may_differ_in_what_belongs_to_the_weights() -> None:
    new = {"weights_version": 2, "weights_versions": (1, 2), "routing_bias": np.ones(E, np.float32)}
    placement = place([member("a", 0, 6, **new), member("b", 6, 12)])
    assert sorted(placement.infos) == [1, 2]
    assert placement.infos[2].routing_bias is not None
    assert placement.infos[2].routing_bias.all()
    assert placement.num_current == {1: 1, 2: 1}
    assert placement.shards[0].versions == {"a": frozenset({1, 2})}


def test_the_bias_of_the_version_before_is_remembered_while_somebody_holds_it() -> None:
    before = place([member("a", 0, 12)])
    both = place([member("a", 0, 12, weights_version=2, weights_versions=(1, 2))], before)
    assert sorted(both.infos) == [1, 2]
    after = place([member("a", 0, 12, weights_version=2, weights_versions=(2,))], both)
    assert sorted(after.infos) == [2]


def test_a_layer_that_is_still_loading_is_not_held() -> None:
    assert place_layer("layer", [member("a", 0, 12, state=LayerState.LOADING)]) is None
    assert place_layer("other", [member("a", 0, 12)]) is None


def test_one_server_under_two_addresses_is_one_member() -> None:
    members = [member("[::1]:1", 0, 12, instance="x"), member("127.0.0.1:1", 0, 12, instance="x")]
    assert [each.address for each in distinct(members)] == ["127.0.0.1:1"]


def test_topology_file(tmp_path: Path) -> None:
    path = tmp_path / "tier.json"
    path.write_text(
        '{"expertd_topology": 1, "servers": [{"address": "10.0.0.1:5", "zone": "b"}, {"address": "[::1]:6"}]}'
    )
    for target in (path, str(path), [path], ["10.0.0.1:5", path]):
        assert resolver_for(target).resolve() == ["10.0.0.1:5", "[::1]:6"], target
    path.write_text('{"expertd_topology": 1, "servers": []}')
    assert resolver_for(path).resolve() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not JSON"),
        ("[]", "expertd_topology is None, expected 1"),
        ('{"expertd_topology": 2}', "expertd_topology is 2, expected 1"),
        ('{"expertd_topology": 1}', "servers is None, expected a list"),
        ('{"expertd_topology": 1, "servers": ["a:1"]}', r"servers\[0\].address is None"),
        (
            '{"expertd_topology": 1, "servers": [{"address": "unix:/a"}, {"address": "a"}]}',
            r"tier.json': servers\[1\].address: target is 'a'",
        ),
    ],
)
def test_a_bad_topology_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tier.json"
    path.write_text(text)
    with pytest.raises(TopologyError, match=message):
        TopologyFile(path).resolve()
    with pytest.raises(TopologyError, match="cannot be read: No such file"):
        TopologyFile(tmp_path / "nowhere.json").resolve()


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "experts.internal"
        found = [(socket.AF_INET, (f"10.0.0.{n}", port)) for n in (2, 1, 2)]
        found.append((socket.AF_INET6, ("fd00::1", port)))
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    expected = ["10.0.0.1:50051", "10.0.0.2:50051", "[fd00::1]:50051"]
    assert sorted(resolver_for("experts.internal:50051").resolve()) == expected
    assert sorted(resolver_for("dns:///experts.internal:50051").resolve()) == expected


def test_an_address_knows_the_name_it_was_found_under(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    for target in ("experts.internal:1", "experts.internal.:1", ["experts.internal:1", "10.0.0.1:1"]):
        (address,) = resolver_for(target).resolve()
        assert isinstance(address, NamedAddress)
        assert (address, address.server_name) == ("10.0.0.1:1", "experts.internal")
    for target in ("10.0.0.1:1", "[fd00::1]:1"):
        (address,) = resolver_for(target).resolve()
        assert not isinstance(address, NamedAddress)


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_name_that_no_host_can_have_is_an_error_of_the_topology(host: str) -> None:
    with pytest.raises(TopologyError, match=f"'{host}' is no host name"):
        resolver_for(f"{host}:1").resolve()
    assert resolver_for([f"{host}:1", "unix:/b"]).resolve() == ["unix:/b"]


def test_a_resolver_object_and_a_socket_path_are_targets() -> None:
    class Fixed:
        def resolve(self) -> Sequence[str]:
            return ["10.0.0.9:1"]

    assert resolver_for([Fixed(), "unix:/run/expertd.sock"]).resolve() == ["10.0.0.9:1", "unix:/run/expertd.sock"]


@pytest.mark.parametrize("target", ["", "host", ":50051", "host:", "host:x", "host:0", "host:65536", [], 7])
def test_a_target_that_is_none_is_an_error(target: Any) -> None:
    with pytest.raises(ConfigError, match="target"):
        resolver_for(target)


class Changing:
    """A resolver that says what the test wants."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] | None = addresses

    def resolve(self) -> Sequence[str]:
        if self.addresses is None:
            raise socket.gaierror("no such host")
        return self.addresses


def test_a_target_that_cannot_be_resolved_takes_nothing_from_the_others() -> None:
    gone, moving = Changing("a:1"), Changing("b:1")
    resolver = resolver_for([gone, moving])
    assert resolver.resolve() == ["a:1", "b:1"]
    gone.addresses, moving.addresses = None, ["c:1"]
    assert resolver.resolve() == ["a:1", "c:1"], "what it stood for before, and the other's new address"


def test_a_target_that_was_never_resolved_is_left_out() -> None:
    gone = Changing()
    gone.addresses = None
    assert resolver_for([gone, Changing("b:1")]).resolve() == ["b:1"]
    with pytest.raises(OSError, match="no such host"):
        resolver_for([gone, gone]).resolve()


def test_a_name_in_a_topology_file_takes_nothing_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"a.test": "10.0.0.1", "b.test": "10.0.0.2", "c.test": "10.0.0.3"}

    def look_up(host: str, port: int, **_: object) -> list[Any]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], port))]

    def write(*hosts: str) -> None:
        servers = [{"address": f"{host}:1"} for host in hosts]
        path.write_text(json.dumps({"expertd_topology": 1, "servers": servers}))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    path = tmp_path / "tier.json"
    file = TopologyFile(path)
    write("a.test", "b.test")
    assert file.resolve() == ["10.0.0.1:1", "10.0.0.2:1"]
    del known["a.test"]
    write("a.test", "b.test", "c.test", "new.test")
    assert file.resolve() == ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"], "a stands for what it stood for"
    write("b.test")
    assert file.resolve() == ["10.0.0.2:1"]
    write("a.test")
    with pytest.raises(OSError, match=r"'a\.test' cannot be resolved: Name or service not known"):
        file.resolve()
