"""Where the servers of a group are, and which experts each of them holds. No connection is made here.

Addresses come from targets: "host:port", a DNS name that stands for many hosts, a topology file, or any object with a
`resolve` method. What a server holds is never written down anywhere: the servers are asked.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import socket
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from expertd.errors import ConfigError, TopologyError
from expertd.types import LayerInfo, LayerState, ServerInfo

__all__ = [
    "DnsName",
    "LayerPlacement",
    "Member",
    "NamedAddress",
    "Resolver",
    "Shard",
    "Targets",
    "TopologyFile",
    "distinct",
    "place_layer",
    "resolver_for",
    "still_held",
]

_FILE_VERSION = 1


@runtime_checkable
class Resolver(Protocol):
    """Anything that knows the addresses of the servers at present."""

    def resolve(self) -> Sequence[str]:
        """Addresses such as "10.0.0.7:50051", asked for again and again while the group lives.

        May block: it is called in a thread of its own, once at a time. Raises TopologyError, or OSError. A group that
        is running keeps the addresses that it has when this raises, and while it blocks.
        """


Targets: TypeAlias = "str | os.PathLike[str] | Resolver | Sequence[str | os.PathLike[str] | Resolver]"
"""What a group takes as its targets: see `resolver_for`."""


class NamedAddress(str):
    """An address that a host name stands for, and that name: certificates tell it, addresses they rarely do."""

    server_name: str

    @classmethod
    def of(cls, address: str, server_name: str) -> NamedAddress:
        """address, found under server_name."""
        named = cls(address)
        named.server_name = server_name
        return named


@dataclass(frozen=True)
class DnsName:
    """All addresses that a host name stands for, such as a headless Kubernetes service or a Compose service."""

    host: str
    port: int

    def resolve(self) -> Sequence[str]:
        """See Resolver; of a name that is no address itself, NamedAddress each.

        Raises TopologyError for a name that no host can have, OSError for one that none has.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise TopologyError(f"{self.host!r} is no host name: {error}") from error
        except socket.gaierror as error:
            raise socket.gaierror(error.errno, f"{self.host!r} cannot be resolved: {error.strerror}") from error
        hosts = {str(address[0]) for *_, address in found}
        addresses = sorted(f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in hosts)
        if _is_ip_address(self.host):
            return addresses
        return [NamedAddress.of(address, self.host.removesuffix(".")) for address in addresses]


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class TopologyFile:
    """A JSON file that lists addresses; read again at each refresh, so replace it in one step (write, then rename).

        {"expertd_topology": 1, "servers": [{"address": "10.0.0.7:50051"}, {"address": "shard-1.experts:50051"}]}

    An address may be a DNS name that stands for many hosts; one that cannot be resolved at the moment stands for what
    it stood for before, and takes nothing from the others. Further keys are allowed and mean nothing here.
    """

    path: Path
    last: dict[str, Sequence[str]] = field(default_factory=dict, compare=False)
    """By address in the file, what each has stood for last."""

    def resolve(self) -> Sequence[str]:
        """See Resolver. Raises TopologyError naming the file and the key, OSError when no address can be resolved."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TopologyError(f"topology file {str(self.path)!r} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise TopologyError(f"topology file {str(self.path)!r} is not JSON: {error}") from error
        version = document.get("expertd_topology") if isinstance(document, dict) else None
        if version != _FILE_VERSION:
            raise TopologyError(
                f"topology file {str(self.path)!r}: expertd_topology is {version!r}, expected {_FILE_VERSION}"
            )
        servers = document.get("servers")
        if not isinstance(servers, list):
            raise TopologyError(f"topology file {str(self.path)!r}: servers is {servers!r}, expected a list")
        found: dict[str, Sequence[str]] = {}
        unresolved: OSError | None = None
        for index, server in enumerate(servers):
            address = server.get("address") if isinstance(server, dict) else None
            if not isinstance(address, str):
                raise TopologyError(
                    f"topology file {str(self.path)!r}: servers[{index}].address is {address!r}, expected 'host:port'"
                )
            try:
                found[address] = resolver_for(address).resolve()
            except (ConfigError, TopologyError) as error:
                raise TopologyError(f"topology file {str(self.path)!r}: servers[{index}].address: {error}") from error
            except OSError as error:
                unresolved = error
                found[address] = self.last.get(address, ())
        self.last.clear()
        self.last.update(found)
        addresses = [each for some in found.values() for each in some]
        if unresolved is not None and not addresses:
            raise unresolved
        return addresses


@dataclass(frozen=True)
class _Fixed:
    addresses: tuple[str, ...]

    def resolve(self) -> Sequence[str]:
        return self.addresses


@dataclass(frozen=True)
class _Union:
    resolvers: tuple[Resolver, ...]
    last: dict[int, Sequence[str]] = field(default_factory=dict)
    """By position in `resolvers`, what each has said last."""

    def resolve(self) -> Sequence[str]:
        """One target that cannot be resolved, such as a container that is down, takes nothing from the others: it
        stands for what it stood for before. Raises its error when no target stands for anything."""
        errors: list[OSError | TopologyError] = []
        for index, resolver in enumerate(self.resolvers):
            try:
                self.last[index] = resolver.resolve()
            except (OSError, TopologyError) as error:
                errors.append(error)
        if errors and not self.last:
            raise errors[0]
        return list(dict.fromkeys(address for index in sorted(self.last) for address in self.last[index]))


def resolver_for(targets: Targets) -> Resolver:
    """The resolver that targets stand for.

    A string is "host:port" (every address of the host), "unix:/path/to/socket", or the path of a topology file, which
    ends in ".json". A sequence stands for everything in it. Raises ConfigError naming a target that is none of these.
    """
    if isinstance(targets, str):
        return _resolver_for_name(targets)
    if isinstance(targets, os.PathLike):
        return TopologyFile(Path(targets))
    if isinstance(targets, Resolver):
        return targets
    if not isinstance(targets, Sequence) or not targets:
        raise ConfigError(f"targets is {targets!r}, expected 'host:port', a topology file, a resolver, or some of them")
    return _Union(tuple(resolver_for(target) for target in targets))


def _resolver_for_name(target: str) -> Resolver:
    if target.startswith("unix:"):
        return _Fixed((target,))
    if target.endswith(".json"):
        return TopologyFile(Path(target))
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"target is {target!r}, expected 'host:port', 'unix:/path' or a topology file '….json'")
    return DnsName(host, int(port))


@dataclass(frozen=True)
class Member:
    """One server, as it answered when it was asked last."""

    address: str
    server: ServerInfo
    layers: Mapping[str, LayerInfo]


@dataclass(frozen=True)
class Shard:
    """One slice of a layer's experts and the servers that hold exactly this slice."""

    experts: range
    versions: Mapping[str, frozenset[int]]
    """By address, the versions of the layer's weights that it holds. Its keys are the replicas."""
    fingerprints: Mapping[int, int] = field(default_factory=dict)
    """By version, LayerInfo.weights_fingerprint of this slice, where it is known."""


@dataclass(frozen=True)
class LayerPlacement:
    """Where one layer's experts are."""

    name: str
    num_experts: int
    shards: tuple[Shard, ...]
    """Disjoint, in ascending order of their experts."""
    infos: Mapping[int, LayerInfo]
    """The layer by version of its weights: the routing bias and the scale of the input belong to the weights."""
    num_current: Mapping[int, int]
    """By version, on how many servers it is the current one."""
    unused: tuple[str, ...]
    """Addresses whose slice overlaps the chosen ones without being one of them: they get no requests."""

    @property
    def missing(self) -> list[range]:
        """Experts that no shard holds."""
        edges = [0, *(edge for shard in self.shards for edge in (shard.experts.start, shard.experts.stop))]
        edges.append(self.num_experts)
        return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    def describe_missing(self) -> str:
        """The missing experts, for messages."""
        gaps = ", ".join(f"{gap.start}-{gap.stop - 1}" for gap in self.missing)
        overlaps = f" ({', '.join(self.unused)} hold slices that overlap others)" if self.unused else ""
        return f"layer {self.name!r}: no server holds experts {gaps} of {self.num_experts}{overlaps}"


def place_layer(name: str, members: Iterable[Member], previous: LayerPlacement | None = None) -> LayerPlacement | None:
    """Work out which servers serve which slice of a layer; None when nobody holds the layer.

    Servers with equal slices are replicas of one shard. Where slices overlap without being equal (a tier that is being
    cut anew), one way to cover the experts is chosen: the fewest experts missing, then the fewest shards, then the
    smallest offsets; the other servers stay unused. The way chosen before is kept as long as it still covers every
    expert, because another one would sum in another order.
    Raises TopologyError when two servers do not agree on what the layer is.
    """
    holders = sorted(
        ((member.address, member.layers[name]) for member in members if name in member.layers), key=lambda pair: pair[0]
    )
    holders = [(address, layer) for address, layer in holders if layer.state is LayerState.READY]
    if not holders:
        return None
    _check_agreement(holders)
    replicas: dict[tuple[int, int], dict[str, frozenset[int]]] = {}
    fingerprints: dict[tuple[int, int], dict[int, int]] = {}
    infos: dict[int, LayerInfo] = {}
    num_current: dict[int, int] = {}
    for address, layer in holders:
        held = frozenset(layer.weights_versions) | {layer.weights_version}
        start = layer.local_expert_offset
        bounds = (start, start + layer.local_num_experts)
        replicas.setdefault(bounds, {})[address] = held
        if layer.weights_fingerprint:
            fingerprints.setdefault(bounds, {})[layer.weights_version] = layer.weights_fingerprint
        infos.setdefault(layer.weights_version, layer)
        num_current[layer.weights_version] = num_current.get(layer.weights_version, 0) + 1
    if previous is not None:
        # A server tells bias and scale of its current version only; those of the one before are remembered.
        held_somewhere = frozenset().union(*(held for by_address in replicas.values() for held in by_address.values()))
        infos = {v: layer for v, layer in {**previous.infos, **infos}.items() if v in held_somewhere}
    num_experts = holders[0][1].num_experts
    slices = _kept(replicas, previous) or _cover(replicas, num_experts)
    return LayerPlacement(
        name=name,
        num_experts=num_experts,
        shards=tuple(Shard(range(*bounds), replicas[bounds], fingerprints.get(bounds, {})) for bounds in slices),
        infos=infos,
        num_current=num_current,
        unused=tuple(sorted(a for bounds, held in replicas.items() if bounds not in slices for a in held)),
    )


def still_held(placement: LayerPlacement, members: Mapping[str, Member]) -> LayerPlacement:
    """What is left of a placement: each shard with those of its servers that are members, by address, and still hold
    exactly this slice, with the same weights; a shard without any is missing."""
    shards = []
    for shard in placement.shards:
        versions = {
            a: held for a, held in shard.versions.items() if a in members and _holds(members[a], placement, shard)
        }
        if versions:
            shards.append(replace(shard, versions=versions))
    unused = tuple(address for address in placement.unused if address in members)
    return replace(placement, shards=tuple(shards), unused=unused)


def _holds(member: Member, placement: LayerPlacement, shard: Shard) -> bool:
    layer = member.layers.get(placement.name)
    if layer is None or layer.state is not LayerState.READY:
        return False
    start = layer.local_expert_offset
    known = shard.fingerprints.get(layer.weights_version, 0)
    is_other = known and layer.weights_fingerprint and known != layer.weights_fingerprint
    return not is_other and range(start, start + layer.local_num_experts) == shard.experts


def _kept(slices: Iterable[tuple[int, int]], previous: LayerPlacement | None) -> list[tuple[int, int]] | None:
    if previous is None or previous.missing:
        return None
    chosen = [(shard.experts.start, shard.experts.stop) for shard in previous.shards]
    return chosen if set(chosen) <= set(slices) else None


def _cover(slices: Iterable[tuple[int, int]], num_experts: int) -> list[tuple[int, int]]:
    """Disjoint slices that leave the fewest experts of 0 ... num_experts - 1 out: a shortest path along their edges."""
    by_start: dict[int, list[int]] = {}
    for start, stop in slices:
        by_start.setdefault(start, []).append(stop)
    edges = sorted({0, num_experts, *(edge for bounds in slices for edge in bounds)})
    # From each edge, going backwards: experts left out on the best way to the end, its slices.
    best: dict[int, tuple[int, int, list[tuple[int, int]]]] = {num_experts: (0, 0, [])}
    for edge, following in reversed(list(itertools.pairwise(edges))):
        left_out, count, way = best[following]
        ways = [(left_out + following - edge, count, way)]
        for stop in by_start.get(edge, ()):
            left_out, count, way = best[stop]
            ways.append((left_out, count + 1, [(edge, stop), *way]))
        best[edge] = min(ways)
    return best[0][2]


# What the servers of a layer have to agree on; the rest is about the server, or about one version of the weights.
_SPEC_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "top_k",
    "routing_method",
    "activation",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "use_routing_scales_on_input",
)


def _check_agreement(holders: Sequence[tuple[str, LayerInfo]]) -> None:
    first_address, first = holders[0]
    by_version: dict[int, tuple[str, LayerInfo]] = {}
    by_slice: dict[tuple[int, int, int], tuple[str, LayerInfo]] = {}
    for address, layer in holders:
        for name in _SPEC_FIELDS:
            _same(name, (first_address, first), (address, layer), getattr(first, name), getattr(layer, name))
        other = by_version.setdefault(layer.weights_version, (address, layer))
        _same("hidden_states_scale", other, (address, layer), other[1].hidden_states_scale, layer.hidden_states_scale)
        _same("routing_bias", other, (address, layer), _bias_bytes(other[1]), _bias_bytes(layer))
        if layer.weights_fingerprint:
            key = (layer.local_expert_offset, layer.local_num_experts, layer.weights_version)
            _same_weights(by_slice.setdefault(key, (address, layer)), (address, layer))


def _same(field: str, one: tuple[str, LayerInfo], other: tuple[str, LayerInfo], a: Any, b: Any) -> None:
    if a != b:
        values = "differs" if isinstance(a, bytes) or isinstance(b, bytes) else f"is {a!r} and {b!r}"
        raise TopologyError(
            f"layer {one[1].name!r}: {field} {values} on {one[0]} and {other[0]}, expected the same; serve one "
            f"checkpoint from all servers of a group"
        )


def _same_weights(one: tuple[str, LayerInfo], other: tuple[str, LayerInfo]) -> None:
    a, b = one[1].weights_fingerprint, other[1].weights_fingerprint
    if a != b:
        layer = one[1]
        stop = layer.local_expert_offset + layer.local_num_experts
        raise TopologyError(
            f"layer {layer.name!r}: weights of experts {layer.local_expert_offset}-{stop - 1} differ on {one[0]} and "
            f"{other[0]} (weights_fingerprint is {a:016x} and {b:016x}), expected the same, as both call them version "
            f"{layer.weights_version}; start servers of another checkpoint with another --weights-version"
        )


def _bias_bytes(layer: LayerInfo) -> bytes | None:
    return None if layer.routing_bias is None else layer.routing_bias.tobytes()


def distinct(members: Iterable[Member], answered: Container[str] = ()) -> list[Member]:
    """Members without those that are the same server under another address: of several addresses one of those that
    have `answered` when they were asked last, and of these the first."""
    by_instance: dict[str, Member] = {}
    for member in sorted(members, key=lambda each: (each.address not in answered, each.address)):
        by_instance.setdefault(member.server.instance_id or member.address, member)
    return list(by_instance.values())
