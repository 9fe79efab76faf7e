"""Messages through rings in shared memory: what they mean on the stream, at every end that it can have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from raw_rings import END, NUM_SLOTS, OFFSET, RING_NBYTES, SLOT_NBYTES, WANTS_BELL, WRITTEN, RawRings, wanted
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    Running,
    SteeredBackend,
    answer_of,
    any_request,
    failure_of,
    insecure_channel,
    request,
    running,
    stream_failure_of,
)
from shared_memory import (
    Memory,
    RawStream,
    eventually,
    forget_tests_before,
    hand_in_for_bells,
    mapped_regions,
    shared_fds,
)

from expertd.v1 import expertd_pb2 as pb

SEED = 20261127


@pytest.fixture
def held() -> Iterator[tuple[SteeredBackend, Running]]:
    """A server whose batches wait for the gate."""
    backend = SteeredBackend()
    with running(backend) as server:
        yield backend, server


def in_flight(server: Running) -> Any:
    return server.server.metrics.registry.get_sample_value("expertd_in_flight_requests")


def test_bits_are_those_of_the_stream(channel: grpc.Channel) -> None:
    chance = np.random.default_rng(SEED)
    with RawRings(channel) as rings:
        for _ in range(5 * NUM_SLOTS):
            asked = any_request(chance, int(chance.integers(0, 8)))
            if not asked.options.do_finalize and asked.options.HasField("do_finalize"):
                asked.options.do_finalize = True  # those have an answer that may have no room in the ring
            expected = rings.stream.ask(request=asked).response
            got, count = rings.memory.read(rings.ask(request=rings.placed(asked)).response)
            assert count == bool(asked.hidden_states.shape[0]) * (1 + 2 * asked.options.return_routing)
            assert answer_of(got) == answer_of(expected)


def test_tensors_may_be_in_the_message_where_they_have_room(channel: grpc.Channel) -> None:
    asked = request(np.random.default_rng(SEED), 1)
    with RawRings(channel) as rings:
        assert answer_of(rings.ask(request=asked).response) == answer_of(rings.stream.ask(request=asked).response)


def test_an_answer_without_room_in_a_slot_comes_on_the_stream(channel: grpc.Channel) -> None:
    asked = request(np.random.default_rng(SEED), 5)  # 2560 bytes out
    with RawRings(channel) as rings:
        expected = rings.stream.ask(request=asked).response
        placed, _ = rings.memory.placed(asked, END)
        number = rings.send(request=placed)
        answer = rings.stream.receive()
        assert answer.id == number
        assert answer_of(answer.response) == answer_of(expected)


def test_answers_that_nobody_takes_come_on_the_stream_when_the_ring_is_full(channel: grpc.Channel) -> None:
    asked = request(np.random.default_rng(SEED), 1)
    with RawRings(channel) as rings:
        expected = answer_of(rings.stream.ask(request=asked).response)
        numbers = []
        for _ in range(2 * NUM_SLOTS):
            eventually(lambda: rings._sent - rings.word(OFFSET + 64) < NUM_SLOTS, True)
            numbers.append(rings.send(request=asked))
        answers = [rings.stream.receive() for _ in range(NUM_SLOTS)]
        answers += [rings.receive() for _ in range(NUM_SLOTS)]
        assert sorted(answer.id for answer in answers) == numbers
        assert {answer_of(answer.response) for answer in answers} == {expected}


def test_errors_are_those_of_the_stream(channel: grpc.Channel) -> None:
    good = request(np.random.default_rng(SEED), 2)
    bad = []
    for change in (
        lambda one: setattr(one, "layer", "nowhere"),
        lambda one: setattr(one.hidden_states, "dtype", pb.DATA_TYPE_INT32),
        lambda one: setattr(one, "weights_version", 99),
        lambda one: one.ClearField("routing_logits"),
        lambda one: one.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=2**63, nbytes=1)),
    ):
        bad.append(pb.ForwardRequest())
        bad[-1].CopyFrom(good)
        change(bad[-1])
    with RawRings(channel) as rings:
        for one in bad:
            through_ring, on_stream = rings.ask(request=one).error, rings.stream.ask(request=one).error
            assert through_ring.code
            assert through_ring == on_stream
        assert rings.ask().error == rings.stream.ask().error
        assert rings.ask(request=good).HasField("response")


def test_requests_are_counted_and_errors_logged_as_those_of_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    good, poisoned = (request(np.random.default_rng(SEED), 1) for _ in range(2))
    poisoned.hidden_states.data = bytes([SteeredBackend.POISON]) * HIDDEN_SIZE
    backend = SteeredBackend()
    backend.gate.set()

    def counted(code: str, name: str = "expertd_requests_total") -> float:
        labels = {"method": "ForwardStream", "code": code}
        return server.server.metrics.registry.get_sample_value(name, labels) or 0.0

    with running(backend) as server, RawRings(server.channel) as rings:
        for ask in (rings.stream.ask, rings.ask):
            before = [counted(code) for code in ("OK", "NOT_FOUND", "INTERNAL")]
            assert ask(request=good).HasField("response")
            assert ask(request=pb.ForwardRequest(layer="nowhere")).error.code
            caplog.clear()
            assert ask(request=poisoned).error.code == grpc.StatusCode.INTERNAL.value[0]
            assert sum("poisoned" in record.getMessage() for record in caplog.records) >= 1
            eventually(lambda: [counted(code) for code in ("OK", "NOT_FOUND", "INTERNAL")], [n + 1 for n in before])


def test_regions_may_be_registered_through_the_ring(channel: grpc.Channel) -> None:
    other = Memory(1 << 16)
    asked = request(np.random.default_rng(SEED), 2)
    with RawRings(channel) as rings:
        ticket = rings.ask(register_region=pb.RegisterRegion(region=2, nbytes=1 << 16)).region_ticket
        assert hand_in_for_bells(ticket, other.fd) == (b"\0" + other.map[:16], [])
        placed, _ = other.placed(asked, 64, region=2)
        assert rings.ask(request=placed).HasField("response")
        assert rings.ask(unregister_region=pb.UnregisterRegion(region=2)).HasField("region_unregistered")
        assert rings.ask(request=placed).error.code
    other.close()


class TestRegistration:
    def test_who_asks_for_none_gets_none(self, channel: grpc.Channel) -> None:
        memory = Memory(1 << 20)
        with RawStream(channel) as stream:
            answer = stream.ask(register_region=pb.RegisterRegion(region=1, nbytes=1 << 20))
            assert hand_in_for_bells(answer.region_ticket, memory.fd) == (b"\0" + memory.map[:16], [])
        memory.close()

    @pytest.mark.parametrize(
        ("fields", "wrong"), [({"num_slots": 0}, "rings.num_slots"), ({"slot_nbytes": 2**31}, "rings")]
    )
    def test_rings_that_cannot_be(self, channel: grpc.Channel, fields: dict[str, int], wrong: str) -> None:
        region = pb.RegisterRegion(region=1, nbytes=1 << 20, rings=wanted(**fields))
        with RawStream(channel) as stream:
            for _ in range(2):
                failure = stream_failure_of(stream.ask(register_region=region).error)
                assert failure.fields == (f"register_region.{wrong}",)

    def test_one_pair_for_a_stream_which_lasts_as_long(self, channel: grpc.Channel) -> None:
        second = pb.RegisterRegion(region=2, nbytes=1 << 20, rings=wanted())
        with RawRings(channel) as rings:
            failure = stream_failure_of(rings.stream.ask(register_region=second).error)
            assert failure.fields == ("register_region.rings",)
            failure = stream_failure_of(rings.ask(unregister_region=pb.UnregisterRegion(region=1)).error)
            assert failure.fields == ("unregister_region.region",)
            assert rings.ask(request=request(np.random.default_rng(SEED), 1)).HasField("response")

    def test_a_pair_that_was_never_handed_in_may_be_given_up(self, channel: grpc.Channel) -> None:
        region = pb.RegisterRegion(region=1, nbytes=1 << 20, rings=wanted())
        with RawStream(channel) as stream:
            for _ in range(2):
                assert stream.ask(register_region=region).WhichOneof("result") == "region_ticket"
                gone = stream.ask(unregister_region=pb.UnregisterRegion(region=1))
                assert gone.WhichOneof("result") == "region_unregistered"


class TestEnds:
    def test_a_deadline_in_the_queue(self, held: tuple[SteeredBackend, Running]) -> None:
        backend, server = held
        chance = np.random.default_rng(SEED)
        with RawRings(server.channel) as rings:
            first = rings.send(request=request(chance, 1))
            backend.wait_started()
            late = rings.send(request=request(chance, 1), timeout_ms=1)
            eventually(lambda: server.server.engine.batcher.queue_requests, 1)
            time.sleep(0.002)
            backend.gate.set()
            answers = {answer.id: answer for answer in (rings.receive(), rings.receive())}
            assert answers[first].HasField("response")
            assert stream_failure_of(answers[late].error).code is grpc.StatusCode.DEADLINE_EXCEEDED

    def test_a_caller_that_cancels(self, held: tuple[SteeredBackend, Running]) -> None:
        backend, server = held
        chance = np.random.default_rng(SEED)
        with RawRings(server.channel) as rings:
            rings.send(request=request(chance, 1))
            backend.wait_started()
            rings.send(request=request(chance, 1))
            eventually(lambda: server.server.engine.batcher.queue_requests, 1)
        eventually(lambda: server.server.engine.batcher.queue_requests, 0)
        backend.gate.set()
        eventually(lambda: in_flight(server), 0)

    def test_a_server_that_drains(self, held: tuple[SteeredBackend, Running]) -> None:
        """What it has admitted is answered, through the ring, and then the stream ends."""
        backend, server = held
        chance = np.random.default_rng(SEED)
        with RawRings(server.channel) as rings:
            first = rings.send(request=request(chance, 1))
            backend.wait_started()
            draining = threading.Thread(target=server.server.shutdown)
            draining.start()
            eventually(lambda: server.server._listener.service._is_draining, True)
            backend.gate.set()
            answer = rings.receive()
            assert answer.id == first
            assert answer.HasField("response")
            with pytest.raises(grpc.RpcError) as caught:
                rings.stream.receive()
            assert failure_of(caught.value).code is grpc.StatusCode.UNAVAILABLE
            draining.join()

    def test_the_callers_side_of_the_stream_ends(self, channel: grpc.Channel) -> None:
        with RawRings(channel) as rings:
            rings.ask(request=request(np.random.default_rng(SEED), 1))
            rings.stream._requests.put(None)
            with pytest.raises(StopIteration):
                next(rings.stream.call)

    def test_a_caller_that_hangs_up_goes_on_over_the_stream(self, channel: grpc.Channel) -> None:
        asked = request(np.random.default_rng(SEED), 1)
        with RawRings(channel) as rings:
            rings.ask(request=asked)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, rings.to_ring)
            os.dup2(null, rings.bell)
            os.close(null)
            for _ in range(3):
                assert rings.stream.ask(request=asked).HasField("response")

    @pytest.mark.parametrize("what", ["a count", "a length", "a message"])
    def test_a_ring_that_makes_no_sense(self, channel: grpc.Channel, what: str) -> None:
        asked = request(np.random.default_rng(SEED), 1)
        with RawRings(channel) as rings:
            rings.ask(request=asked)
            if what == "a count":
                rings.poke(OFFSET + WRITTEN, 2**40)
                rings.ring()
            elif what == "a length":
                at = OFFSET + 192 + SLOT_NBYTES
                rings.memory.map[at : at + 4] = b"\xff" * 4
                rings.poke(OFFSET + WRITTEN, 2)
                rings.ring()
            else:
                rings.put(b"\xff")
            with pytest.raises(grpc.RpcError) as caught:
                rings.stream.receive()
            failure = failure_of(caught.value)
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
            assert failure.fields == ("request" if what == "a message" else "register_region.rings",)


def test_nothing_is_left_of_many_streams(channel: grpc.Channel) -> None:
    forget_tests_before()
    asked = request(np.random.default_rng(SEED), 2)

    def once() -> None:
        with RawRings(channel) as rings:
            assert rings.memory.read(rings.ask(request=rings.placed(asked)).response)[1]

    once()
    eventually(mapped_regions, 0)
    fds = shared_fds()
    for _ in range(30):
        once()
    eventually(mapped_regions, 0)
    eventually(lambda: shared_fds() <= fds, True)


def spoil(channel: grpc.Channel, seed: int, until_s: float) -> int:
    """Streams whose memory is written all over, at any time, with numbers that are nearly right and with any others."""
    chance = random.Random(seed)
    streams = 0
    while time.monotonic() < until_s:
        with RawRings(channel) as rings:
            streams += 1
            asked = rings.placed(request(np.random.default_rng(seed), 2))
            sent = pb.ForwardStreamRequest(id=1, request=asked).SerializeToString()
            for slot in range(NUM_SLOTS):  # so that the counts alone make requests of them
                at = OFFSET + 192 + slot * SLOT_NBYTES
                rings.memory.map[at : at + 4] = len(sent).to_bytes(4, "little")
                rings.memory.map[at + 8 : at + 8 + len(sent)] = sent
            written = 0
            for _ in range(chance.randrange(400)):
                written += chance.randrange(4)
                rings.poke(OFFSET + WRITTEN, written)
                at = chance.choice([OFFSET, OFFSET + RING_NBYTES]) + 8 * chance.randrange(RING_NBYTES // 8)
                if chance.random() < 0.3:
                    rings.poke(at, chance.choice([0, 1, 2**63, chance.randrange(2**64)]))
                if chance.random() < 0.01:
                    rings.poke(OFFSET + WRITTEN, chance.randrange(2**64))
                rings.poke(OFFSET + RING_NBYTES + WANTS_BELL, chance.randrange(2))
                for _ in range(chance.randrange(20)):
                    rings.ring()
    return streams


def test_a_hostile_caller_harms_nobody_else() -> None:
    forget_tests_before()
    asked = request(np.random.default_rng(SEED), 3)
    with running() as server:
        with RawStream(server.channel) as stream:
            expected = answer_of(stream.ask(request=asked).response)
        eventually(mapped_regions, 0)
        fds = shared_fds()
        until_s = time.monotonic() + 4
        with insecure_channel(server.server.port) as hostile:
            spoiled: list[int] = []
            spoilers = [
                threading.Thread(target=lambda seed=seed: spoiled.append(spoil(hostile, seed, until_s)))
                for seed in range(2)
            ]
            for spoiler in spoilers:
                spoiler.start()
            answered = 0
            while time.monotonic() < until_s:
                with RawRings(server.channel) as rings:
                    for _ in range(20):
                        got, count = rings.memory.read(rings.ask(request=rings.placed(asked)).response)
                        assert count
                        assert answer_of(got) == expected
                        answered += 1
            for spoiler in spoilers:
                spoiler.join()
        assert answered >= 100
        assert sum(spoiled) >= 20
        eventually(lambda: in_flight(server), 0)
        eventually(mapped_regions, 0)
        eventually(lambda: shared_fds() <= fds, True)
        with RawRings(server.channel) as rings:
            assert rings.ask(request=asked).HasField("response")


def test_clients_that_are_killed_at_any_instruction(tmp_path: Path) -> None:
    forget_tests_before()
    with running() as server:
        eventually(mapped_regions, 0)
        fds = shared_fds()
        program = f"""
            import numpy as np, ml_dtypes, threading, expertd
            client = expertd.Client(expertd.ClientConfig("127.0.0.1:{server.server.port}", transport="shm"))
            hidden = np.ones((4, {HIDDEN_SIZE}), ml_dtypes.float8_e4m3fn)
            logits = np.ones((4, {NUM_EXPERTS}), np.float32)
            def forward():
                while True:
                    client.forward("{LAYER}", hidden, routing_logits=logits)
            for _ in range(2):
                threading.Thread(target=forward).start()
            client.forward("{LAYER}", hidden, routing_logits=logits)
            print("runs", flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        for number in range(6):
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "runs\n"
                time.sleep(0.0137 * number)
                client.send_signal(signal.SIGKILL)
        eventually(lambda: in_flight(server), 0)
        eventually(mapped_regions, 0)
        eventually(lambda: shared_fds() <= fds, True)
        with RawRings(server.channel) as rings:
            assert rings.ask(request=request(np.random.default_rng(SEED), 2)).HasField("response")
