"""Messages over gRPC whose tensors nobody copies: the device reads requests and writes answers in the messages
themselves, or the engine's process does, and the bits are those of any other server."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import grpc
import numpy as np
import pytest
from alone import alone
from fake_device import FakeCudaBackend, fake_slots
from serving import (
    PATIENCE_S,
    Running,
    Split,
    answer_of,
    any_request,
    insecure_channel,
    request,
    running,
    split,
    tiny_layers,
)
from shared_memory import RawStream, eventually

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server import engine_host
from expertd_server.compiled import CODEC
from expertd_server.config import Config
from expertd_server.engine import Engine
from expertd_server.message_memory import MESSAGE_MEMORY_BYTES
from expertd_server.server import Server

pytestmark = pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built")

SEED = 20261128
FEW_BYTES = 1 << 19
NUM_TOKENS = 160  # whose hidden states, and whose outputs, are large


class Rig:
    """What computes here."""

    def __init__(self) -> None:
        self.slots = fake_slots(4)
        self.device = self.slots[0].device

    def num_direct(self) -> tuple[int, int]:
        """Copies from and to memory of others, so far."""
        return tuple(
            sum(address != 0 for slot in self.slots for copies in getattr(slot, way) for *_, address in copies)
            for way in ("sent", "fetched")
        )  # type: ignore[return-value]

    @contextlib.contextmanager
    def computes(self) -> Iterator[None]:
        """For servers that are made inside."""
        with (
            mock.patch.object(engine_host, "Engine", functools.partial(Engine, slots=self.slots)),
            mock.patch.object(engine_host, "pinner_of", lambda _, max_bytes: self.device.pinner(max_bytes)),
        ):
            yield


@contextlib.contextmanager
def running_alone(rig: Rig) -> Iterator[Running]:
    """The only server of this process, ever."""
    backend = FakeCudaBackend()
    with rig.computes():
        server = Server(Config(port=0), backend=backend, layers=tiny_layers(backend), is_alone=True)
    try:
        assert server.startup()
        with insecure_channel(server.port) as channel:
            yield Running(server, channel)
    finally:
        server.shutdown()


@contextlib.contextmanager
def split_alone(rig: Rig | None = None) -> Iterator[Split]:
    """A server with one front-end, the only one of this process."""
    with contextlib.ExitStack() as stack:
        backend = None if rig is None else FakeCudaBackend()
        with contextlib.nullcontext() if rig is None else rig.computes():
            server = stack.enter_context(split(1, backend, max_message_bytes=2**22, frontend_arena_bytes=2**24))
        (frontend,) = server.frontends
        frontend.share_messages()
        regions = frontend.engine.regions._regions
        eventually(lambda: [region.holder is not None for region in list(regions.values())], [True])
        yield server


def asked() -> list[pb.ForwardRequest]:
    """Requests of all kinds, large ones among them."""
    chance = np.random.default_rng(SEED)
    mixed = [any_request(chance, int(chance.choice([0, 1, 40, NUM_TOKENS, 200]))) for _ in range(60)]
    return mixed + [request(chance, NUM_TOKENS) for _ in range(20)]


def leaves_nothing(case: Callable[[], None]) -> Callable[[], None]:
    """When it is over next to no large object is left: the interpreter's own tables may lie there, too."""

    @functools.wraps(case)
    def checked() -> None:
        case()

        def is_left() -> bool:
            gc.collect()
            return MESSAGE_MEMORY_BYTES - CODEC.free_message_bytes() > FEW_BYTES

        eventually(is_left, False)

    return checked


def answers_to(requests: list[pb.ForwardRequest]) -> list[bytes]:
    """Of another server. To be asked for first: no other runs beside one that is alone."""
    with running() as other:
        return [answer_of(other.stub.Forward(each)) for each in requests]


def answers_are_right(
    channel: grpc.Channel,
    stub: expertd_pb2_grpc.ExpertServiceStub,
    requests: list[pb.ForwardRequest],
    expected: list[bytes],
) -> None:
    """One by one, and all at once, over a stream and not."""
    for each, answer in zip(requests, expected, strict=True):
        assert answer_of(stub.Forward(each)) == answer
    with RawStream(channel) as stream:
        for each, answer in zip(requests, expected, strict=True):
            assert answer_of(stream.ask(request=each).response) == answer
        for _ in range(3):
            numbers = {stream.send(request=each): answer for each, answer in zip(requests, expected, strict=True)}
            for _ in requests:
                received = stream.receive()
                assert answer_of(received.response) == numbers.pop(received.id)


@alone
@leaves_nothing
def test_of_one_process_the_device_reads_and_writes_messages() -> None:
    requests = asked()
    expected = answers_to(requests)
    rig = Rig()
    with running_alone(rig) as server:
        large = request(np.random.default_rng(SEED), NUM_TOKENS)
        server.stub.Forward(large)
        eventually(lambda: bool(rig.device.pinned), True)
        server.stub.Forward(large)
        before = rig.num_direct()
        server.stub.Forward(large)
        assert np.subtract(rig.num_direct(), before).tolist() == [1, 1]
        answers_are_right(server.channel, server.stub, requests, expected)
        assert min(rig.num_direct()) > 100


@alone
@leaves_nothing
def test_with_front_ends_the_device_reads_and_writes_messages() -> None:
    requests = asked()
    expected = answers_to(requests)
    rig = Rig()
    with split_alone(rig) as server:
        large = request(np.random.default_rng(SEED), NUM_TOKENS)

        def is_direct() -> bool:
            before = rig.num_direct()
            server.stubs[0].Forward(large)
            return bool(np.all(np.subtract(rig.num_direct(), before) == 1))

        eventually(is_direct, True)  # once it is pinned
        answers_are_right(server.channels[0], server.stubs[0], requests, expected)
        assert min(rig.num_direct()) > 100


@alone
@leaves_nothing
def test_with_front_ends_the_engine_reads_and_writes_messages() -> None:
    requests = asked()
    expected = answers_to(requests)
    with split_alone() as server:
        answers_are_right(server.channels[0], server.stubs[0], requests, expected)


@alone
@leaves_nothing
def test_a_message_is_the_device_s_until_it_is_done_with_it() -> None:
    """Its caller has left, and others come, whose messages lie elsewhere."""
    chance = np.random.default_rng(SEED)
    large, other = request(chance, NUM_TOKENS), request(chance, NUM_TOKENS)
    expected, other_expected = answers_to([large, other])
    rig = Rig()
    with running_alone(rig) as server:
        for _ in range(3):
            assert answer_of(server.stub.Forward(large)) == expected
            eventually(lambda: bool(rig.device.pinned), True)
        for _ in range(20):
            rig.device.may_end.clear()
            rig.device.has_held.clear()
            leaver = server.stub.Forward.future(large)
            assert rig.device.has_held.wait(PATIENCE_S)
            leaver.cancel()
            stayers = [server.stub.Forward.future(each) for each in (other, large, other)]
            threading.Timer(0.01, rig.device.may_end.set).start()
            answers = [answer_of(each.result(PATIENCE_S)) for each in stayers]
            assert answers == [other_expected, expected, other_expected]


@alone
@leaves_nothing
def test_a_lost_engine_s_callers_hear_of_it_when_it_writes_no_more() -> None:
    rig = Rig()
    with split_alone(rig) as server:
        large = request(np.random.default_rng(SEED), NUM_TOKENS)
        expected = answer_of(server.stubs[0].Forward(large))
        eventually(lambda: bool(rig.device.pinned), True)

        def is_written_by_device() -> bool:
            before = rig.num_direct()[1]
            assert answer_of(server.stubs[0].Forward(large)) == expected
            return rig.num_direct()[1] > before

        eventually(is_written_by_device, True)
        link = server.frontends[0].engine._link
        assert link is not None
        before = rig.num_direct()[1]
        rig.device.may_end.clear()
        future = server.stubs[0].Forward.future(large)
        eventually(lambda: rig.num_direct()[1] > before, True)
        link.hang_up()
        eventually(lambda: link._is_over, True)
        with pytest.raises(grpc.FutureTimeoutError):
            future.result(0.2)
        rig.device.may_end.set()
        with pytest.raises(grpc.RpcError) as caught:
            future.result(PATIENCE_S)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
