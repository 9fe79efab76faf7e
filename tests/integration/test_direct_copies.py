"""A server whose device reads requests and writes answers where they lie, in regions of callers and in front-ends'
arenas: the same bits, and whoever leaves, at any time, leaves nothing behind and spoils nothing of others."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from fake_device import FakeCapturer, FakeCudaBackend, FakeDevice, FakeSlot, fake_slots
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, PATIENCE_S, answer_of, any_request, request, running, split
from shared_memory import PROOF_BYTES, Memory, RawStream, eventually, forget_tests_before, mapped_regions

from expertd.v1 import expertd_pb2 as pb
from expertd_server import engine_host, spans
from expertd_server.compiled import CODEC
from expertd_server.engine import Engine
from expertd_server.native import address_of
from expertd_server.pinning import Pinner

pytestmark = pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built")

SEED = 20261127
NBYTES = 1 << 20
NUM_TOKENS = 5
ANSWER_BYTES = NUM_TOKENS * HIDDEN_SIZE * 2


class Rig:
    """What the servers of a test compute on."""

    def __init__(self) -> None:
        self.slots: list[FakeSlot] = fake_slots(3)
        self.device: FakeDevice = self.slots[0].device

    def num_direct(self) -> tuple[int, int]:
        """Copies from and to memory of others, so far."""
        sent = [address for slot in self.slots for copies in slot.sent for *_, address in copies]
        fetched = [address for slot in self.slots for copies in slot.fetched for *_, address in copies]
        return np.count_nonzero(sent), np.count_nonzero(fetched)

    def is_pinned(self) -> bool:
        return bool(self.device.pinned)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig()

    def pinner_of(_: object, max_bytes: int) -> Pinner:
        return rig.device.pinner(max_bytes)

    monkeypatch.setattr(engine_host, "Engine", partial(Engine, slots=rig.slots, capturer=FakeCapturer()))
    monkeypatch.setattr(engine_host, "pinner_of", pinner_of)
    monkeypatch.setattr(spans, "MIN_DIRECT_BYTES", 1)
    forget_tests_before()
    eventually(mapped_regions, 0)
    yield rig
    rig.device.may_end.set()
    eventually(rig.is_pinned, False)
    eventually(mapped_regions, 0)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(NBYTES)
    yield made
    made.close()


@pytest.fixture(params=["one process", "front-ends"])
def channel(request: pytest.FixtureRequest, rig: Rig) -> Iterator[grpc.Channel]:
    """To a server, or to a front-end of one."""
    if request.param == "one process":
        with running(FakeCudaBackend()) as server:
            yield server.channel
    else:
        with split(1, FakeCudaBackend()) as server:
            yield server.channels[0]


def placed(memory: Memory, asked: pb.ForwardRequest, start: int = PROOF_BYTES) -> pb.ForwardRequest:
    """The request in the memory, its answer over it."""
    message, end = memory.placed(asked, start)
    message.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=start, nbytes=max(end - start, ANSWER_BYTES)))
    return message


def test_bits_are_those_of_any_other_server(channel: grpc.Channel, rig: Rig, memory: Memory) -> None:
    chance = np.random.default_rng(SEED)
    asked = [any_request(chance, int(chance.integers(0, 20))) for _ in range(60)]
    asked += [request(chance, NUM_TOKENS) for _ in range(20)]
    with running() as other:
        expected = [answer_of(other.stub.Forward(each)) for each in asked]
    with RawStream(channel) as stream:
        memory.register(stream)
        for each, answer in zip(asked, expected, strict=True):
            got, _ = memory.read(stream.ask(request=placed(memory, each)).response)
            assert answer_of(got) == answer
    sent, fetched = rig.num_direct()
    assert sent > 60
    assert fetched > 20


def test_many_at_a_time_share_batches(channel: grpc.Channel, rig: Rig, memory: Memory) -> None:
    chance = np.random.default_rng(SEED)
    asked = [request(chance, NUM_TOKENS) for _ in range(24)]
    with running() as other:
        expected = [answer_of(other.stub.Forward(each)) for each in asked]
    with RawStream(channel) as stream:
        memory.register(stream)
        for turn in range(4):
            rig.device.may_end.clear()  # for as long as it takes the others to come
            threading.Timer(0.2, rig.device.may_end.set).start()
            numbers = {
                stream.send(request=placed(memory, each, 4096 * (n + 1)) if n % 4 else each): n
                for n, each in enumerate(asked)
            }
            for _ in asked:
                answer = stream.receive()
                got, _ = memory.read(answer.response)
                assert answer_of(got) == expected[numbers[answer.id]], turn
    assert min(rig.num_direct()) > 24
    assert max(len(copies) for slot in rig.slots for copies in slot.fetched) > 2


@pytest.mark.parametrize("how", ["leaves", "unregisters"])
def test_memory_outlives_its_caller_until_the_batch_is_over(
    channel: grpc.Channel, rig: Rig, memory: Memory, how: str
) -> None:
    asked = request(np.random.default_rng(SEED), NUM_TOKENS)
    with RawStream(channel) as stream:
        memory.register(stream)
        expected = answer_of(memory.read(stream.ask(request=placed(memory, asked)).response)[0])
        eventually(rig.is_pinned, True)
        rig.device.may_end.clear()
        number = stream.send(request=placed(memory, asked))
        eventually(lambda: len([1 for slot in rig.slots for _ in slot.fetched]) >= 2, True)
        if how == "unregisters":
            assert stream.ask(unregister_region=pb.UnregisterRegion(region=1)).HasField("region_unregistered")
            assert rig.is_pinned()
            rig.device.may_end.set()
            answer = stream.receive()
            assert answer.id == number
            assert answer_of(memory.read(answer.response)[0]) == expected
    assert how == "unregisters" or rig.is_pinned()
    rig.device.may_end.set()
    with RawStream(channel) as stream:
        assert answer_of(stream.ask(request=asked).response) == expected


def test_a_device_copies_from_and_to_callers_of_a_front_end_itself(rig: Rig, memory: Memory) -> None:
    asked = request(np.random.default_rng(SEED), NUM_TOKENS)
    with split(1, FakeCudaBackend()) as server, RawStream(server.channels[0]) as stream:
        expected = answer_of(stream.ask(request=asked).response)
        memory.register(stream)
        regions = server.frontends[0].engine.regions._regions
        eventually(lambda: [region.holder is not None for region in list(regions.values())], [True])
        (peer,) = set(server.engine.gate._peers.values())
        (view,) = peer.regions.views.values()
        start = address_of(view)
        del view

        def is_direct() -> bool:
            got, _ = memory.read(stream.ask(request=placed(memory, asked)).response)
            assert answer_of(got) == expected
            sent = {address for slot in rig.slots for copies in slot.sent for *_, address in copies}
            fetched = {address for slot in rig.slots for copies in slot.fetched for *_, address in copies}
            return start + PROOF_BYTES in sent and start + PROOF_BYTES in fetched

        eventually(is_direct, True)  # once it is pinned
        link = server.frontends[0].engine._link
        assert link is not None
        assert link._arena.free_bytes() == link._arena.nbytes


def test_an_arena_has_no_block_back_before_the_device_is_done_with_it(rig: Rig) -> None:
    """The caller has left, and others come: their blocks are elsewhere until the batch is over."""
    chance = np.random.default_rng(SEED)
    asked = request(chance, NUM_TOKENS)
    with split(1, FakeCudaBackend()) as server:
        link = server.frontends[0].engine._link
        assert link is not None
        expected = answer_of(server.stubs[0].Forward(asked))
        eventually(rig.is_pinned, True)
        assert answer_of(server.stubs[0].Forward(asked)) == expected
        before = rig.num_direct()[1]
        assert before
        rig.device.may_end.clear()
        leaver = server.stubs[0].Forward.future(asked)
        eventually(lambda: link._arena.free_bytes() < link._arena.nbytes, True)
        eventually(lambda: rig.num_direct()[1] > before, True)
        leaver.cancel()
        eventually(lambda: [one.is_taken_back for one in link._waiting.values()], [True])
        stayer = server.stubs[0].Forward.future(asked)
        eventually(lambda: len({one.block.offset for one in link._waiting.values() if one.block}), 2)
        rig.device.may_end.set()
        assert answer_of(stayer.result(PATIENCE_S)) == expected
        eventually(link._arena.free_bytes, link._arena.nbytes)


def test_a_front_end_that_dies_leaves_its_arena_to_the_batch_that_runs(rig: Rig) -> None:
    asked = request(np.random.default_rng(SEED), NUM_TOKENS)
    with split(2, FakeCudaBackend()) as server:
        expected = answer_of(server.stubs[0].Forward(asked))
        eventually(rig.is_pinned, True)
        before = rig.num_direct()[1]
        rig.device.may_end.clear()
        future = server.stubs[0].Forward.future(asked)
        eventually(lambda: rig.num_direct()[1] > before, True)
        link = server.frontends[0].engine._link
        assert link is not None
        link.hang_up()  # which is all that the engine sees of its end
        with pytest.raises(grpc.RpcError):
            future.result(PATIENCE_S)
        assert rig.is_pinned()
        rig.device.may_end.set()
        eventually(rig.is_pinned, False)
        assert answer_of(server.stubs[1].Forward(asked)) == expected


def test_a_killed_client_leaves_nothing(rig: Rig) -> None:
    with running(FakeCudaBackend()) as server:
        program = f"""
            import numpy as np, ml_dtypes, sys, expertd
            client = expertd.Client(expertd.ClientConfig("127.0.0.1:{server.server.port}", transport="shm"))
            hidden = np.ones((4, {HIDDEN_SIZE}), ml_dtypes.float8_e4m3fn)
            logits = np.ones((4, {NUM_EXPERTS}), np.float32)
            while True:
                client.forward("{LAYER}", hidden, routing_logits=logits)
                print("answered", flush=True)
        """
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            while rig.num_direct()[1] < 5:
                assert client.stdout.readline() == "answered\n"
            rig.device.may_end.clear()
            assert rig.device.has_held.wait(PATIENCE_S)
            client.send_signal(signal.SIGKILL)
        eventually(lambda: server.server.metrics.registry.get_sample_value("expertd_in_flight_requests"), 0)
        assert rig.is_pinned()
        rig.device.may_end.set()
        eventually(rig.is_pinned, False)
        eventually(mapped_regions, 0)
        asked = request(np.random.default_rng(SEED), NUM_TOKENS)
        assert server.stub.Forward(asked).HasField("output")


def test_who_comes_while_memory_is_being_pinned_is_served(channel: grpc.Channel, rig: Rig, memory: Memory) -> None:
    asked = request(np.random.default_rng(SEED), NUM_TOKENS)
    rig.device.may_pin.clear()
    with RawStream(channel) as stream:
        memory.register(stream)
        expected = answer_of(stream.ask(request=asked).response)
        for _ in range(5):
            assert answer_of(memory.read(stream.ask(request=placed(memory, asked)).response)[0]) == expected
        assert rig.num_direct() == (0, 0)
    rig.device.may_pin.set()


def test_pinning_may_be_turned_off(rig: Rig, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[Any] = []
    monkeypatch.setattr(engine_host, "pinner_of", lambda device, max_bytes: asked_for.append((device.type, max_bytes)))
    with running(FakeCudaBackend(), max_pinned_bytes=0) as server, RawStream(server.channel) as stream:
        memory.register(stream)
        asked = request(np.random.default_rng(SEED), NUM_TOKENS)
        assert stream.ask(request=placed(memory, asked)).HasField("response")
    assert asked_for == [("cpu", 0)]
    assert rig.num_direct() == (0, 0)
