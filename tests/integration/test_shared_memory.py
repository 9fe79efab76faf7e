"""Tensors through memory that a caller shares with its stream: the same bits, and no way to hurt the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    SteeredBackend,
    answer_of,
    any_request,
    failure_of,
    fp8_hidden,
    insecure_channel,
    request,
    running,
    split,
    stream_failure_of,
    tensor,
)
from shared_memory import (
    PROOF_BYTES,
    Memory,
    RawStream,
    each_name,
    eventually,
    forget_tests_before,
    hand_in,
    mapped_regions,
    shared_fds,
)

from expertd.v1 import expertd_pb2 as pb
from expertd_server.batcher import Batcher
from expertd_server.metrics import Metrics

SEED = 20261126
NBYTES = 1 << 20


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(NBYTES)
    yield made
    made.close()


def violations(answer: pb.ForwardStreamResponse) -> tuple[str, ...]:
    failure = stream_failure_of(answer.error)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT, failure
    return failure.fields


def is_fine(stream: RawStream, seed: int = SEED) -> bool:
    """Whether the stream still answers a request by bytes."""
    return stream.ask(request=request(np.random.default_rng(seed), 3)).HasField("response")


class TestAnswers:
    def test_bits_are_those_of_bytes(self, channel: grpc.Channel, memory: Memory) -> None:
        """Tensors at any offset, aligned or not; room for all, some or none of the answer."""
        chance = np.random.default_rng(SEED)
        in_memory = [0, 0]
        with RawStream(channel) as stream:
            memory.register(stream)
            for _ in range(40):
                asked = any_request(chance, int(chance.integers(0, 40)))
                expected = stream.ask(request=asked).response
                start = int(chance.integers(PROOF_BYTES, 1000))
                placed, end = memory.placed(asked, start)
                room = int(chance.choice([0, 100, 20_000, 400_000]))
                at = int(chance.choice([start, end, 500_000]))  # over the request itself, behind it, elsewhere
                placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=at, nbytes=room))
                answer = stream.ask(request=placed)
                assert answer.HasField("response"), answer.error
                got, count = memory.read(answer.response)
                assert answer_of(got) == answer_of(expected)
                in_memory[count > 0] += 1
        assert min(in_memory) > 5, in_memory

    def test_some_tensors_as_bytes_and_no_place_for_the_answer(self, channel: grpc.Channel, memory: Memory) -> None:
        asked = request(np.random.default_rng(SEED), 7)
        with RawStream(channel) as stream:
            memory.register(stream)
            expected = answer_of(stream.ask(request=asked).response)
            for name in each_name(asked):
                mixed, _ = memory.placed(asked, 64)
                getattr(mixed, name).CopyFrom(getattr(asked, name))
                assert answer_of(stream.ask(request=mixed).response) == expected

    def test_several_regions_and_a_number_that_is_used_again(self, channel: grpc.Channel) -> None:
        asked = request(np.random.default_rng(SEED), 5)
        memories = [Memory(NBYTES) for _ in range(4)]
        with RawStream(channel) as stream:
            expected = answer_of(stream.ask(request=asked).response)
            for number, each in enumerate(memories):
                each.register(stream, region=number)
            for number, each in enumerate(memories):
                placed, end = each.placed(asked, 64, region=number)
                assert answer_of(stream.ask(request=placed).response) == expected
                placed.answer_slice.CopyFrom(pb.RegionSlice(region=number, offset=end, nbytes=NBYTES - end))
                got, count = each.read(stream.ask(request=placed).response)
                assert count
                assert answer_of(got) == expected
            answer = stream.ask(register_region=pb.RegisterRegion(region=9, nbytes=NBYTES))
            assert violations(answer) == ("register_region",)
            gone = stream.ask(unregister_region=pb.UnregisterRegion(region=2))
            assert gone.WhichOneof("result") == "region_unregistered"
            placed, _ = memories[0].placed(asked, 64, region=2)
            assert violations(stream.ask(request=placed)), "the same slices were good before"
            memories[0].register(stream, region=2)
            memories[2].map[64:] = bytes(NBYTES - 64)
            assert answer_of(stream.ask(request=placed).response) == expected
        for each in memories:
            each.close()


class TestRefusals:
    """Each names its field, and the stream lives on."""

    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [
            (NBYTES, 1),
            (NBYTES - 1, 2),
            (0, NBYTES + 1),
            (2**63, 1),
            (2**64 - 1, 1),
            (1, 2**64 - 1),
            (2**64 - 1, 2**64 - 1),
        ],
    )
    def test_out_of_bounds(self, channel: grpc.Channel, memory: Memory, offset: int, nbytes: int) -> None:
        asked = request(np.random.default_rng(SEED), 5)
        outside = pb.RegionSlice(region=1, offset=offset, nbytes=nbytes)
        with RawStream(channel) as stream:
            memory.register(stream)
            for name in each_name(asked):
                placed, _ = memory.placed(asked, 64)
                getattr(placed, name).slice.CopyFrom(outside)
                assert violations(stream.ask(request=placed)) == (f"{name}.slice",)
            placed, _ = memory.placed(asked, 64)
            placed.answer_slice.CopyFrom(outside)
            assert violations(stream.ask(request=placed)) == ("answer_slice",)
            assert is_fine(stream)

    def test_more_than_any_batch_has_is_not_copied(self, memory: Memory) -> None:
        """Which would take all requests' time: a region may be a gigabyte."""
        most_nbytes = 16 * 1024 * 4
        chance = np.random.default_rng(SEED)
        with running(max_batch_tokens=16) as server, RawStream(server.channel) as stream:
            memory.register(stream)
            tried: set[str] = set()
            while len(tried) < 3:
                asked = any_request(chance, 5)
                for name in set(each_name(asked)) - {"hidden_states"}:
                    tried.add(name)
                    placed, _ = memory.placed(asked, 64)
                    getattr(placed, name).slice.nbytes = most_nbytes + 1
                    answer = stream.ask(request=placed)
                    assert violations(answer) == (f"{name}.slice",)
                    assert f"is {most_nbytes + 1} bytes, more than {most_nbytes}" in answer.error.message
            assert is_fine(stream)

    def test_beyond_what_was_registered_of_larger_memory(self, channel: grpc.Channel, memory: Memory) -> None:
        with RawStream(channel) as stream:
            memory.register(stream, nbytes=NBYTES // 2)
            placed, _ = memory.placed(request(np.random.default_rng(SEED), 5), NBYTES // 2)
            assert violations(stream.ask(request=placed)) == ("hidden_states.slice", "routing_logits.slice")

    def test_a_region_that_is_not_there(self, channel: grpc.Channel, memory: Memory) -> None:
        placed, _ = memory.placed(request(np.random.default_rng(SEED), 5), 64)
        with RawStream(channel) as stream:
            expected = ("hidden_states.slice.region", "routing_logits.slice.region")
            assert violations(stream.ask(request=placed)) == expected
            registered = stream.ask(register_region=pb.RegisterRegion(region=1, nbytes=NBYTES))
            assert registered.WhichOneof("result") == "region_ticket"  # but never handed in
            assert violations(stream.ask(request=placed)) == expected
            stream.ask(unregister_region=pb.UnregisterRegion(region=1))
            assert hand_in(registered.region_ticket, memory.fd)[:1] == b"\1"
            assert violations(stream.ask(unregister_region=pb.UnregisterRegion(region=1))) == (
                "unregister_region.region",
            )
            assert is_fine(stream)

    def test_a_slice_of_another_length_than_the_tensor(self, channel: grpc.Channel, memory: Memory) -> None:
        with RawStream(channel) as stream:
            memory.register(stream)
            for change in (-1, 1):
                placed, _ = memory.placed(request(np.random.default_rng(SEED), 5), 64)
                placed.hidden_states.slice.nbytes += change
                assert violations(stream.ask(request=placed)) == ("hidden_states.slice",)

    def test_data_and_a_slice(self, channel: grpc.Channel, memory: Memory) -> None:
        with RawStream(channel) as stream:
            memory.register(stream)
            placed, _ = memory.placed(request(np.random.default_rng(SEED), 5), 64)
            placed.routing_logits.data = b"\0"
            assert violations(stream.ask(request=placed)) == ("routing_logits.slice",)

    def test_a_unary_call(self, channel: grpc.Channel, memory: Memory) -> None:
        placed, end = memory.placed(request(np.random.default_rng(SEED), 5), 64)
        placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=64))
        forward = channel.unary_unary("/expertd.v1.ExpertService/Forward")
        with pytest.raises(grpc.RpcError) as caught:
            forward(placed.SerializeToString())
        assert set(failure_of(caught.value).fields) >= {"hidden_states.slice", "routing_logits.slice", "answer_slice"}

    def test_a_message_of_two_things(self, channel: grpc.Channel) -> None:
        region = pb.RegisterRegion(region=1, nbytes=NBYTES)
        with RawStream(channel) as stream:
            asked = request(np.random.default_rng(SEED), 5)
            assert violations(stream.ask(register_region=region, request=asked)) == ("register_region",)
            both = stream.ask(register_region=region, unregister_region=pb.UnregisterRegion(region=1))
            assert violations(both) == ("register_region",)
            assert is_fine(stream)

    @pytest.mark.parametrize("nbytes", [0, PROOF_BYTES - 1, 2**30 + 1, 2**64 - 1])
    def test_sizes(self, channel: grpc.Channel, nbytes: int) -> None:
        with RawStream(channel) as stream:
            answer = stream.ask(register_region=pb.RegisterRegion(region=1, nbytes=nbytes))
            assert violations(answer) == ("register_region.nbytes",)

    def test_all_regions_of_a_stream_together_have_a_bound(self, channel: grpc.Channel) -> None:
        with RawStream(channel) as stream:
            for number, is_taken in ((1, True), (2, False), (1, False)):
                answer = stream.ask(register_region=pb.RegisterRegion(region=number, nbytes=2**29 + 1))
                assert (answer.WhichOneof("result") == "region_ticket") is is_taken

    def test_regions_of_other_streams(self, channel: grpc.Channel, memory: Memory) -> None:
        """Numbers mean nothing elsewhere, and a ticket maps what its bearer brings into the stream that it is of."""
        asked = request(np.random.default_rng(SEED), 5)
        placed, end = memory.placed(asked, 64)
        placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=NBYTES - end))
        other = Memory(NBYTES)
        with RawStream(channel) as mine, RawStream(channel) as theirs:
            memory.register(mine)
            assert set(violations(theirs.ask(request=placed))) == {
                "hidden_states.slice.region",
                "routing_logits.slice.region",
                "answer_slice.region",
            }
            other.register(theirs)  # under the same number
            before = bytes(memory.map)
            other.map[64:end] = bytes(end - 64)
            response = theirs.ask(request=placed).response
            assert response.output.slice.nbytes
            assert bytes(memory.map) == before, "an answer went into another stream's memory"
            assert mine.ask(request=placed).response.output.slice.nbytes
            assert bytes(memory.map) != before
        other.close()


@dataclass
class Held:
    """A server whose batches a test holds up."""

    port: int
    channel: grpc.Channel
    batcher: Batcher[Any, Any]
    metrics: Metrics
    num_mappings: int
    """Of a region, by all its processes."""
    wait_taken: Callable[[], object]

    def take(self, memory: Memory, stream: RawStream) -> None:
        """Register it, and wait until whoever computes has it."""
        memory.register(stream)
        self.wait_taken()

    def in_flight(self) -> float | None:
        return self.metrics.registry.get_sample_value("expertd_in_flight_requests")


@contextmanager
def held_server(backend: SteeredBackend, *, with_front_end: bool) -> Iterator[Held]:
    """In one process, or a front-end and an engine."""
    if not with_front_end:
        with running(backend) as one:
            server = one.server
            yield Held(server.port, one.channel, server.engine.batcher, server.metrics, 1, lambda: None)
        return
    with split(1, backend) as many:
        frontend = many.frontends[0]
        regions = frontend.engine.regions._regions

        def are_taken() -> bool:
            return bool(regions) and all(region.holder is not None for region in list(regions.values()))

        yield Held(
            many.ports[0],
            many.channels[0],
            many.engine.host.engine.batcher,
            frontend.metrics,
            2,
            lambda: eventually(are_taken, True),
        )


class TestWhileItRuns:
    """The memory is its owner's, who may do anything to it at any time."""

    @pytest.fixture(params=["one process", "front-ends"])
    def held(self, request: pytest.FixtureRequest) -> Iterator[tuple[SteeredBackend, Held]]:
        """A server whose batches wait for the gate."""
        backend = SteeredBackend()
        with held_server(backend, with_front_end=request.param != "one process") as server:
            yield backend, server

    def test_ids_that_change_after_the_check(self, held: tuple[SteeredBackend, Held], memory: Memory) -> None:
        """They were copied before the check: those that were sent are those that count."""
        backend, server = held
        chance = np.random.default_rng(SEED)
        first = request(chance, 2)
        ids = np.stack([chance.permutation(NUM_EXPERTS)[:2] for _ in range(4)]).astype(np.int32)
        asked = pb.ForwardRequest(
            layer=LAYER,
            hidden_states=fp8_hidden(chance, 4),
            topk_ids=tensor(ids, pb.DATA_TYPE_INT32),
            topk_weights=tensor(chance.random((4, 2), np.float32), pb.DATA_TYPE_FLOAT32),
        )
        with RawStream(server.channel) as stream:
            server.take(memory, stream)
            placed, _ = memory.placed(asked, 64)
            stream.send(request=first)
            backend.wait_started()
            stream.send(request=placed)  # waits in the queue, checked
            eventually(lambda: server.batcher.queue_requests, 1)
            for name, junk in (("topk_ids", b"\x7f\xff\xff\x7f"), ("topk_weights", b"\xff\xff\xff\xff")):
                where = getattr(placed, name).slice
                memory.map[where.offset : where.offset + where.nbytes] = junk * (where.nbytes // 4)
            backend.gate.set()
            answers = {answer.id: answer for answer in (stream.receive(), stream.receive())}
            assert answer_of(answers[3].response) == answer_of(stream.ask(request=asked).response)

    def test_an_answer_never_goes_where_another_request_still_is(
        self, held: tuple[SteeredBackend, Held], memory: Memory
    ) -> None:
        backend, server = held
        chance = np.random.default_rng(SEED)
        asked = [request(chance, 4) for _ in range(2)]
        with RawStream(server.channel) as stream:
            server.take(memory, stream)
            first, end = memory.placed(asked[0], 64)
            first.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=8192))
            number = stream.send(request=first)
            backend.wait_started()
            second, second_end = memory.placed(asked[1], end + 8192)
            for offset, nbytes, with_what in (
                (64, 1, "hidden_states"),  # over the input of the first
                (end - 1, 1, "routing_logits"),
                (end + 8191, 1, "answer_slice"),  # over its answer
                (0, NBYTES, "answer_slice"),
            ):
                second.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=offset, nbytes=nbytes))
                answer = stream.ask(request=second)
                assert set(violations(answer)) == {"answer_slice"}
                assert with_what in answer.error.message
            inside, _ = memory.placed(asked[1], 64)
            inside.hidden_states.slice.offset = end + 100  # where the first one's answer goes
            assert set(violations(stream.ask(request=inside))) == {"hidden_states.slice"}
            second.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=second_end, nbytes=8192))
            other = stream.send(request=second)
            backend.gate.set()
            answers = {answer.id: answer.response for answer in (stream.receive(), stream.receive())}
            expected = [answer_of(stream.ask(request=each).response) for each in asked]
            assert answer_of(memory.read(answers[number])[0]) == expected[0]
            assert answer_of(memory.read(answers[other])[0]) == expected[1]
            second.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=64, nbytes=8192))
            memory.placed(asked[1], end + 8192)
            assert answer_of(memory.read(stream.ask(request=second).response)[0]) == expected[1]

    def test_a_region_that_is_given_up_while_a_request_of_it_runs(
        self, held: tuple[SteeredBackend, Held], memory: Memory
    ) -> None:
        forget_tests_before()
        backend, server = held
        before = 1  # the test's own; those of tests before may be on their way out
        eventually(mapped_regions, before)
        asked = request(np.random.default_rng(SEED), 4)
        with RawStream(server.channel) as stream:
            server.take(memory, stream)
            assert mapped_regions() == before + server.num_mappings
            stream.send(request=request(np.random.default_rng(1), 2))
            backend.wait_started()
            placed, end = memory.placed(asked, 64)
            placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=8192))
            number = stream.send(request=placed)
            eventually(lambda: server.batcher.queue_requests, 1)
            assert stream.ask(unregister_region=pb.UnregisterRegion(region=1)).HasField("region_unregistered")
            assert "region" in violations(stream.ask(request=placed))[0]
            assert mapped_regions() == before + server.num_mappings
            backend.gate.set()
            answers = {answer.id: answer for answer in (stream.receive(), stream.receive())}
            got, count = memory.read(answers[number].response)
            assert count == 1
            assert answer_of(got) == answer_of(stream.ask(request=asked).response)
            del answers
            eventually(mapped_regions, before)

    def test_a_caller_that_leaves_while_its_request_runs(
        self, held: tuple[SteeredBackend, Held], memory: Memory
    ) -> None:
        forget_tests_before()
        backend, server = held
        before = 1  # the test's own; those of tests before may be on their way out
        eventually(mapped_regions, before)
        with RawStream(server.channel) as stream:
            server.take(memory, stream)
            for start in (64, 100_000):
                placed, end = memory.placed(request(np.random.default_rng(SEED), 4), start)
                placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=8192))
                stream.send(request=placed)
                if start == 64:
                    backend.wait_started()
            eventually(lambda: server.batcher.queue_requests, 1)
        eventually(lambda: server.batcher.queue_requests, 0)
        backend.gate.set()
        eventually(mapped_regions, before)
        eventually(server.in_flight, 0)
        with RawStream(server.channel) as stream:
            assert is_fine(stream)


def test_memory_that_may_shrink_is_refused_and_the_stream_goes_on(channel: grpc.Channel) -> None:

    fd = os.memfd_create("test-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    with RawStream(channel) as stream:
        answer = stream.ask(register_region=pb.RegisterRegion(region=1, nbytes=NBYTES))
        assert b"F_SEAL_SHRINK" in hand_in(answer.region_ticket, fd)
        assert is_fine(stream)
    os.close(fd)


def test_nothing_is_left_of_many_streams(channel: grpc.Channel, memory: Memory) -> None:
    forget_tests_before()
    asked = request(np.random.default_rng(SEED), 3)

    def once() -> None:
        with RawStream(channel) as stream:
            memory.register(stream)
            placed, end = memory.placed(asked, 64)
            placed.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=end, nbytes=8192))
            assert memory.read(stream.ask(request=placed).response)[1]

    once()
    eventually(mapped_regions, 1)
    fds = shared_fds()
    for _ in range(40):
        once()
    eventually(mapped_regions, 1)
    eventually(lambda: shared_fds() <= fds, True)


def test_a_server_that_shares_nothing_says_so() -> None:
    with running(shared_memory=False) as server, RawStream(server.channel) as stream:
        assert server.stub.GetServerInfo(pb.GetServerInfoRequest()).max_region_bytes == 0
        answer = stream.ask(register_region=pb.RegisterRegion(region=1, nbytes=NBYTES))
        failure = stream_failure_of(answer.error)
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SHARED_MEMORY_OFF")
        assert is_fine(stream)


@pytest.mark.parametrize("with_front_end", [False, True], ids=["one process", "front-ends"])
def test_a_killed_client_leaves_nothing(with_front_end: bool) -> None:
    """kill -9 with a request running and one waiting: no mapping, no file, no request of it stays."""
    forget_tests_before()
    backend = SteeredBackend()
    with held_server(backend, with_front_end=with_front_end) as server:
        before = 0
        eventually(mapped_regions, before)  # those of tests before may be on their way out
        fds, shm = shared_fds(), sorted(path.name for path in Path("/dev/shm").glob("*expertd*"))
        program = f"""
            import numpy as np, ml_dtypes, sys, threading, expertd
            client = expertd.Client(expertd.ClientConfig("127.0.0.1:{server.port}", transport="shm"))
            hidden = np.ones((4, {HIDDEN_SIZE}), ml_dtypes.float8_e4m3fn)
            logits = np.ones((4, {NUM_EXPERTS}), np.float32)
            forward = lambda: client.forward("{LAYER}", hidden, routing_logits=logits)
            threading.Thread(target=forward).start()
            sys.stdin.readline()
            threading.Thread(target=forward).start()
        """
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, text=True
        ) as client:
            backend.wait_started()
            assert client.stdin is not None
            client.stdin.write("the first one runs: no batch takes both\n")
            client.stdin.flush()
            eventually(lambda: server.batcher.queue_requests, 1)
            eventually(mapped_regions, before + server.num_mappings)
            client.send_signal(signal.SIGKILL)
        eventually(lambda: server.batcher.queue_requests, 0)
        backend.gate.set()
        eventually(mapped_regions, before)
        eventually(server.in_flight, 0)
        eventually(lambda: shared_fds() <= fds, True)
        assert sorted(path.name for path in Path("/dev/shm").glob("*expertd*")) == shm
        with insecure_channel(server.port) as own, RawStream(own) as stream:
            assert is_fine(stream)
