"""A tier of real servers in this process, each with a slice of the same layers, and groups that use it."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import Case, make_case

from expertd import Client, ExpertGroup, GroupConfig
from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.config import Config
from expertd_server.layer import MoELayer
from expertd_server.server import Server
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

PATIENCE_S = 30.0


def noted(layer: PreparedLayer, hidden_states: torch.Tensor) -> None:
    """The default of GatedBackend.before: nothing."""


@dataclass
class GatedBackend:
    """The CPU backend, with something of the test's before each batch."""

    before: Callable[[PreparedLayer, torch.Tensor], None] = noted
    name: str = "cpu"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    inner: TorchBackend = field(default_factory=lambda: TorchBackend("cpu"))

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        return self.inner.prepare(spec, weights, max_num_tokens=max_num_tokens)

    def forward(self, layer: PreparedLayer, hidden_states: torch.Tensor, **arguments: Any) -> MoEOutput:
        self.before(layer, hidden_states)
        return self.inner.forward(layer, hidden_states, **arguments)


def moe_layer(name: str, case: Case, experts: range, backend: GatedBackend, weights_version: int = 1) -> MoELayer:
    """A slice of a case as a layer that a server can hold."""
    part = case.slice(experts.start, len(experts))
    return MoELayer(name, backend.prepare(part.spec, part.weights), backend, weights_version)


def start(
    cases: Mapping[str, Case],
    share: range | None = None,
    *,
    of: int = 1,
    backend: GatedBackend | None = None,
    **options: Any,
) -> Server:
    """A started server of all layers. share: which of `of` equal slices of each layer's experts it holds."""
    backend = backend or GatedBackend()
    layers = [moe_layer(name, case, slice_of(case, share, of), backend) for name, case in cases.items()]
    server = Server(Config(**{"port": 0, **options}), backend=backend, layers=layers)
    assert server.startup()
    return server


def slice_of(case: Case, share: range | None, of: int) -> range:
    """The experts of some of the `of` equal slices."""
    size = case.spec.num_experts // of
    return range(case.spec.num_experts) if share is None else range(share.start * size, share.stop * size)


def stand_for(monkeypatch: pytest.MonkeyPatch, name: str, hosts: list[str]) -> None:
    """Have a host name stand for these addresses, whatever they are at the moment."""
    found = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        asked = list(hosts) if host == name else [host]
        return [each for one in asked for each in found(one, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def kill(server: Server) -> None:
    """As good as a kill in one process: every connection breaks, nothing is finished, nobody is told."""
    listener = server._listener
    listener.loop.run(listener._grpc.stop(0), PATIENCE_S)
    server.shutdown()


def address(server: Server) -> str:
    """Where the server listens."""
    return f"127.0.0.1:{server.port}"


@contextlib.contextmanager
def stopping(*servers: Server) -> Iterator[None]:
    """Shut servers down at the end."""
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()


def group_of(*targets: Any, **options: Any) -> ExpertGroup:
    """A group that looks often and never hedges, where the test does not say otherwise."""
    defaults: dict[str, Any] = {"refresh_interval_s": 0.2, "hedge_percentile": None, "no_replica_timeout_s": 2.0}
    addresses = [address(target) if isinstance(target, Server) else target for target in targets]
    return ExpertGroup(addresses, GroupConfig(**{**defaults, **options}))


def inputs(case: Case) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """hidden_states [T, H] float8_e4m3fn and routing_logits [T, E] float32 in numpy."""
    hidden = case.hidden_states.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return hidden, case.routing_logits.numpy()


def bits(array: Any) -> bytes:
    """An output's bits."""
    result: bytes = array.tobytes()
    return result


@dataclass
class Load:
    """Threads that call one group again and again and keep what they got."""

    group: ExpertGroup
    layer: str
    case: Case
    num_threads: int = 4
    timeout_s: float = 20.0
    outputs: set[bytes] = field(default_factory=set)
    by_version: dict[int, set[bytes]] = field(default_factory=dict)
    num_answers: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._answered = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name=f"load-{n}") for n in range(self.num_threads)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the calls that are under way end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            assert not thread.is_alive(), "a call never came back"

    def wait(self, num_answers: int) -> None:
        """Return when so many more answers have come."""
        with self._answered:
            wanted = self.num_answers + num_answers
            done = self._answered.wait_for(lambda: self.num_answers >= wanted or self.failures, PATIENCE_S)
        assert not self.failures, self.failures
        assert done, f"{wanted - self.num_answers} of {num_answers} answers never came"

    def _run(self) -> None:
        hidden, logits = inputs(self.case)
        while not self._stop.is_set():
            try:
                result = self.group.forward(self.layer, hidden, routing_logits=logits, timeout_s=self.timeout_s)
            except BaseException as error:
                with self._answered:
                    self.failures.append(error)
                    self._answered.notify_all()
                return
            with self._answered:
                self.outputs.add(bits(result.output))
                self.by_version.setdefault(result.weights_version, set()).add(bits(result.output))
                self.num_answers += 1
                self._answered.notify_all()


def sum_of_slices(
    server: Server, layer: str, case: Case, slices: Sequence[range], weights_version: int | None = None
) -> bytes:
    """What a group of servers with these slices answers, worked out with one server and the group's own sum."""
    hidden, logits = inputs(case)
    with Client(address(server)) as client:
        routed = client.forward(
            layer, hidden, routing_logits=logits, return_routing=True, weights_version=weights_version
        )
        assert routed.topk_ids is not None
        total = np.zeros(hidden.shape, np.float32)
        for experts in slices:
            is_mine = (routed.topk_ids >= experts.start) & (routed.topk_ids < experts.stop)
            ids = np.where(is_mine, routed.topk_ids, -1).astype(np.int32)
            part = client.forward(
                layer, hidden, topk_ids=ids, topk_weights=routed.expert_weights, weights_version=weights_version
            )
            assert part.output is not None
            total += part.output.astype(np.float32)
    return bits(total.astype(ml_dtypes.bfloat16))


def other_weights(case: Case, seed: int) -> Case:
    """The same layer and inputs with other weights."""
    weights = make_case(case.spec, 1, seed).weights
    return dataclasses.replace(case, weights=weights, name=f"{case.name}, weights of seed {seed}")


def shares(count: int) -> Sequence[range]:
    """Each single slice of `count`."""
    return [range(index, index + 1) for index in range(count)]
