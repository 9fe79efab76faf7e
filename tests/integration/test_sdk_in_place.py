"""Arrays in the memory that a client shares with its server: the same bits without a copy, and never anybody else's."""

from __future__ import annotations

import asyncio
import mmap
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from in_place import BFLOAT16, ROW_NBYTES, an_out, break_off, lent, stream_of, values
from sdk_cases import Driver, connected
from serving import HIDDEN_SIZE, LAYER, PATIENCE_S, Running, SteeredBackend, running, split
from shared_memory import eventually, forget_tests_before, mapped_regions, shared_fds

import expertd
from expertd._shm import Placed, StreamMemory
from expertd.types import ForwardRequest

FLAVOURS = ("sync", "async")
FP8 = ml_dtypes.float8_e4m3fn


class Seen(NamedTuple):
    """What one request was given of the memory."""

    num_inputs: int
    """Tensors that lay there already."""
    is_out: bool
    """Whether the output went where the caller wanted it."""
    is_copied: bool
    """Whether there was anything else."""
    offset: int
    """Of the answer."""


class Spy:
    """All of them."""

    def __init__(self) -> None:
        self.placed: list[Seen] = []
        self.refused = 0

    @property
    def num_inputs(self) -> list[int]:
        return [each.num_inputs for each in self.placed]

    @property
    def num_outs(self) -> int:
        return sum(each.is_out for each in self.placed)

    def clear(self) -> None:
        self.placed.clear()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen, place = Spy(), StreamMemory.place

    def spied(memory: StreamMemory, *arguments: Any) -> tuple[bytes, Placed] | None:
        result = place(memory, *arguments)
        if result is None:
            seen.refused += 1
        else:
            placed = result[1]
            seen.placed.append(Seen(len(placed._inputs), placed.is_out, placed._piece is not None, placed.offset))
        return result

    monkeypatch.setattr(StreamMemory, "place", spied)
    return seen


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_batch_tokens=64) as one:
        yield one


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", [FP8, BFLOAT16, np.float16, np.float32])
def test_bits_are_those_of_grpc_and_nothing_is_copied(server: Running, spy: Spy, flavour: str, dtype: Any) -> None:
    """Sizes from nothing to several parts, either routing, all types of output."""
    port = server.server.port
    with connected(flavour, port) as shm, connected(flavour, port, "grpc") as grpc:
        for num_tokens in (0, 1, 33, 128):
            hidden, logits = values(num_tokens)
            hidden = hidden.astype(dtype)
            routed = grpc.forward(LAYER, hidden, routing_logits=logits, return_routing=True)
            ids, weights = routed.topk_ids, routed.expert_weights
            mine = lent(shm, hidden)
            for routing in (
                {"routing_logits": logits},
                {"routing_logits": logits.astype(BFLOAT16)},
                {"topk_ids": ids, "topk_weights": weights},
            ):
                in_place = {name: lent(shm, array) for name, array in routing.items()}
                for out_dtype in (BFLOAT16, np.float16, np.float32):
                    spy.clear()
                    out = an_out(shm, num_tokens, out_dtype)
                    result = shm.forward(LAYER, mine, output_dtype=out_dtype, out=out, **in_place)
                    expected = grpc.forward(LAYER, hidden, output_dtype=out_dtype, **routing)
                    assert result.output is out
                    assert out.tobytes() == expected.output.tobytes()
                    if num_tokens:
                        assert spy.num_outs == len(spy.placed) == -(-num_tokens // 64)
                        assert set(spy.num_inputs) == {1 + len(routing)}
                        assert not any(each.is_copied for each in spy.placed)
            assert mine.tobytes() == hidden.tobytes()
    assert not spy.refused


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_all_outputs_beside_one_in_place(server: Running, spy: Spy, flavour: str) -> None:
    hidden, logits = values(20)
    port = server.server.port
    with connected(flavour, port) as shm, connected(flavour, port, "grpc") as grpc:
        mine, out = lent(shm, hidden), an_out(shm, 20)
        for options in ({"return_routing": True, "out": out}, {"do_finalize": False, "return_routing": True}):
            result = shm.forward(LAYER, mine, routing_logits=logits, **options)
            options.pop("out", None)
            expected = grpc.forward(LAYER, hidden, routing_logits=logits, **options)
            for name in ("output", "gemm2_output", "expert_weights", "topk_ids", "expanded_idx_to_permuted_idx"):
                one, other = getattr(result, name), getattr(expected, name)
                assert (one is None) == (other is None), name
                assert one is None or one.tobytes() == other.tobytes(), name
    assert [each.is_out for each in spy.placed] == [True, False]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("transport", ["shm", "auto", "grpc", "unary"])
def test_out_on_every_transport(server: Running, flavour: str, transport: str) -> None:
    """Of the client's memory or any other, numpy or torch, at any address; what is beside it stays as it is."""
    hidden, logits = values(20)
    port = server.server.port
    with connected(flavour, port, transport) as driver:
        expected = driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
        whole = driver.empty((24, HIDDEN_SIZE), "bfloat16")
        outs: list[Any] = [
            driver.empty((20, HIDDEN_SIZE), "bfloat16"),
            np.empty((20, HIDDEN_SIZE), BFLOAT16),
            whole[:20],
            whole[3:23],
            np.empty(20 * ROW_NBYTES + 1, np.uint8)[1:].view(BFLOAT16).reshape(20, HIDDEN_SIZE),
        ]
        for out in outs:
            whole[...] = -77
            result = driver.forward(LAYER, hidden, routing_logits=logits, out=out)
            assert result.output is out
            assert out.tobytes() == expected
        assert (whole[20:] == -77).all() or (whole[:3] == -77).all()
        tensors = [
            driver.empty((20, HIDDEN_SIZE), torch.bfloat16),
            torch.empty((20, HIDDEN_SIZE), dtype=torch.bfloat16),
        ]
        for tensor in tensors:
            result = driver.forward(LAYER, torch.from_numpy(hidden), routing_logits=logits, out=tensor)
            assert result.output is tensor
            assert tensor.view(torch.uint8).numpy().tobytes() == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_client_that_may_do_without_the_memory_waits_for_it_to_make_an_array(
    server: Running, spy: Spy, flavour: str
) -> None:
    hidden, logits = values(20)
    with connected(flavour, server.server.port, "auto") as driver:
        out = an_out(driver, 20)
        driver.forward(LAYER, lent(driver, hidden), routing_logits=logits, out=out)
        assert (spy.num_inputs, spy.num_outs) == ([1], 1)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_neighbours_on_the_same_page_are_left_alone(server: Running, spy: Spy, flavour: str) -> None:
    """An output that shares a page comes as a copy: its page could not be taken from the server alone."""
    hidden, logits = values(3)
    per_page = mmap.PAGESIZE // ROW_NBYTES
    with connected(flavour, server.server.port) as driver:
        whole = driver.empty((3 * per_page, HIDDEN_SIZE), "bfloat16")
        expected = driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
        whole[...] = -77
        spy.clear()
        driver.forward(LAYER, hidden, routing_logits=logits, out=whole[per_page : per_page + 3])
        assert whole[per_page : per_page + 3].tobytes() == expected
        assert (whole[:per_page] == -77).all()
        assert (whole[per_page + 3 :] == -77).all()
        assert spy.num_outs == 0
        hidden, logits = values(per_page)
        driver.forward(LAYER, hidden, routing_logits=logits, out=whole[per_page : 2 * per_page])
        assert (whole[:per_page] == -77).all()
        assert (whole[2 * per_page :] == -77).all()
        assert spy.num_outs == 1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_torch_tensors_are_found_too(server: Running, spy: Spy, flavour: str) -> None:
    hidden, logits = values(20)
    with connected(flavour, server.server.port) as driver:
        expected = driver.forward(LAYER, torch.from_numpy(hidden).bfloat16(), routing_logits=logits).output
        mine = driver.empty(hidden.shape, torch.bfloat16)
        mine.copy_(torch.from_numpy(hidden))
        shared = torch.from_numpy(lent(driver, logits))
        out = driver.empty(hidden.shape, torch.bfloat16)
        spy.clear()
        result = driver.forward(LAYER, mine, routing_logits=shared, out=out)
        assert torch.equal(result.output, expected)
        assert (spy.num_inputs, spy.num_outs) == ([2], 1)
        half = driver.forward(LAYER, mine[10:], routing_logits=shared[10:]).output
        assert torch.equal(half, expected[10:])
        assert spy.num_inputs == [2, 2]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_result_is_in_place_for_the_next_layer(server: Running, spy: Spy, flavour: str) -> None:
    hidden, logits = values(20)
    port = server.server.port
    with connected(flavour, port) as shm, connected(flavour, port, "grpc") as grpc:
        one, other = hidden, hidden
        for _ in range(4):
            one, other = (
                each.forward(LAYER, states, routing_logits=logits).output
                for each, states in ((shm, one), (grpc, other))
            )
            assert one.tobytes() == other.tobytes()
    assert spy.num_inputs == [0, 1, 1, 1]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_half_of_the_memory_is_lent_and_comes_back(server: Running, spy: Spy, flavour: str) -> None:
    """Beyond that arrays are ordinary ones, and requests find room at any time."""
    forget_tests_before()
    hidden, logits = values(32)
    nbytes = 1 << 20
    with connected(flavour, server.server.port, shared_memory_bytes=nbytes) as driver:
        expected = driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
        arena = stream_of(driver)._memory._arena

        def count_shared(driver: Driver) -> int:
            outs = [an_out(driver, 32) for _ in range(2 * nbytes // (32 * ROW_NBYTES))]
            spy.clear()
            for out in outs:
                assert driver.forward(LAYER, hidden, routing_logits=logits, out=out).output.tobytes() == expected
            assert all(out.tobytes() == expected for out in outs)
            assert not spy.refused
            return spy.num_outs

        first = count_shared(driver)
        assert nbytes // 4 < first * 32 * ROW_NBYTES <= nbytes // 2
        assert count_shared(driver) == first
        assert not arena._detached
    del driver, arena
    eventually(mapped_regions, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_who_has_given_up_gets_the_array_back_at_once(flavour: str, spy: Spy) -> None:
    """The server, which computes on, does not write to it any more, nor to whoever has its memory next."""
    backend = SteeredBackend()
    hidden, logits = values(32)
    with running(backend) as one, connected(flavour, one.server.port) as driver:
        mine, out = lent(driver, hidden), an_out(driver, 32)
        with pytest.raises(expertd.TimeoutError):
            driver.forward(LAYER, mine, routing_logits=logits, out=out, timeout_s=0.5)  # it runs, held up by the gate
        backend.wait_started()
        out[...] = 5
        others = [an_out(driver, 32) for _ in range(5)]
        (given_up,) = spy.placed
        backend.gate.set()
        expected = driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
        eventually(lambda: len(stream_of(driver)._placed), 0)
        arena = stream_of(driver)._memory._arena
        assert (out == 5).all()
        assert all((other == -77).all() for other in others)

        # It still serves, as any array does.
        driver.forward(LAYER, mine, routing_logits=logits, out=out)
        assert out.tobytes() == expected
        assert [each.is_out for each in spy.placed] == [True, False, False]
        assert driver.forward(LAYER, out, routing_logits=logits).output.shape == out.shape
        assert spy.num_inputs[-1] == 0

        # Its memory is shared again when nobody has it any more, with the late answer in it.
        del out
        forget_tests_before()
        spy.clear()
        again = driver.empty((32, HIDDEN_SIZE), "bfloat16")
        assert arena.find(again.reshape(-1).view(np.uint8)) == given_up.offset
        assert again.tobytes() == expected
        again[...] = -77
        driver.forward(LAYER, mine, routing_logits=logits, out=again)
        assert again.tobytes() == expected
        assert spy.num_outs == 1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_array_that_is_still_read_for_nobody_can_be_written_to(flavour: str, spy: Spy) -> None:
    """Two arrays by turns, input and output, and the first call is given up."""
    backend = SteeredBackend()
    hidden, logits = values(32)
    with running(backend) as one, connected(flavour, one.server.port) as driver:
        ping, pong = lent(driver, hidden.astype(BFLOAT16)), an_out(driver, 32)
        with pytest.raises(expertd.TimeoutError):
            driver.forward(LAYER, ping, routing_logits=logits, out=pong, timeout_s=0.5)
        backend.wait_started()
        pong[...] = hidden.astype(BFLOAT16)
        threading.Timer(0.3, backend.gate.set).start()
        driver.forward(LAYER, pong, routing_logits=logits, out=ping)
        with connected(flavour, one.server.port, "grpc") as grpc:
            expected = grpc.forward(LAYER, hidden.astype(BFLOAT16), routing_logits=logits).output
        assert ping.tobytes() == expected.tobytes()
        assert [each.is_out for each in spy.placed] == [True, False]


def test_a_task_that_is_cancelled_gets_the_array_back(spy: Spy) -> None:
    backend = SteeredBackend()
    hidden, logits = values(32)

    async def scenario(port: int) -> None:
        config = expertd.ClientConfig(f"127.0.0.1:{port}", transport="shm", timeout_s=PATIENCE_S)
        async with expertd.AsyncClient(config) as client:
            out = await client.empty((32, HIDDEN_SIZE), "bfloat16")
            task = asyncio.create_task(client.forward(LAYER, hidden, routing_logits=logits, out=out))
            await asyncio.to_thread(backend.wait_started)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            out[...] = 5
            backend.gate.set()
            answer = await client.forward(LAYER, hidden, routing_logits=logits)
            while client._transport._streams[0]._placed:  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
            assert (out == 5).all()
            assert answer.output.any()
            await client.forward(LAYER, hidden, routing_logits=logits, out=out)
            assert out.tobytes() == answer.output.tobytes()

    with running(backend) as one:
        asyncio.run(asyncio.wait_for(scenario(one.server.port), PATIENCE_S))
    assert [each.is_out for each in spy.placed] == [True, False, False]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_that_breaks_leaves_ordinary_arrays_and_the_request_is_sent_again(flavour: str, spy: Spy) -> None:
    backend = SteeredBackend()
    backend.gate.set()
    hidden, logits = values(32)
    retry = expertd.RetryPolicy(max_attempts=3, initial_backoff_s=0.01)
    with running(backend) as one, connected(flavour, one.server.port, retry=retry) as driver:
        mine, out, kept = lent(driver, hidden), an_out(driver, 32), an_out(driver, 4)
        expected = driver.forward(LAYER, mine, routing_logits=logits).output.tobytes()
        backend.wait_started()
        first = stream_of(driver)
        arena = first._memory._arena
        start = arena.find(out.reshape(-1).view(np.uint8))
        backend.gate.clear()
        spy.clear()

        def break_it() -> None:
            backend.wait_started()
            break_off(first, flavour)
            backend.gate.set()

        breaker = threading.Thread(target=break_it)
        breaker.start()
        result = driver.forward(LAYER, mine, routing_logits=logits, out=out)
        breaker.join(PATIENCE_S)
        assert result.output is out
        assert out.tobytes() == expected
        assert mine.tobytes() == hidden.tobytes()
        assert (kept == -77).all()
        assert stream_of(driver) is not first
        assert [(each.num_inputs, each.is_out) for each in spy.placed] == [(1, True), (0, False)]

        # A server that has not noticed and writes its answer now.
        np.frombuffer(mmap.mmap(arena._pages._fd, arena.memory.nbytes), np.uint8)[start : start + out.nbytes] = 0xEE
        assert out.tobytes() == expected

        # New ones lie in the new stream's memory, and the old ones serve as any array does.
        spy.clear()
        assert driver.forward(LAYER, lent(driver, hidden), routing_logits=logits, out=out).output.tobytes() == expected
        again = an_out(driver, 32)
        assert driver.forward(LAYER, mine, routing_logits=logits, out=again).output.tobytes() == expected
        assert [(each.num_inputs, each.is_out) for each in spy.placed] == [(1, False), (0, True)]


def test_a_request_that_was_refused_is_in_place_when_it_is_sent_again(spy: Spy) -> None:
    """The queue is full until the gate is open."""
    backend = SteeredBackend()
    hidden, logits = values(32)
    retry = expertd.RetryPolicy(max_attempts=1000, initial_backoff_s=0.01, max_backoff_s=0.05)
    options: dict[str, Any] = {"max_batch_tokens": 32, "max_queue_tokens": 32}
    with (
        running(backend, **options) as one,
        connected("sync", one.server.port) as other,
        connected("sync", one.server.port, retry=retry) as driver,
    ):
        out = an_out(driver, 32)
        fillers = [
            threading.Thread(target=other.forward, args=(LAYER, hidden), kwargs={"routing_logits": logits})
            for _ in range(2)
        ]
        fillers[0].start()
        backend.wait_started()
        fillers[1].start()
        eventually(lambda: one.server.engine.batcher.queue_requests, 1)

        def open_later() -> None:
            eventually(lambda: spy.num_outs > 3, True)
            backend.gate.set()

        opener = threading.Thread(target=open_later)
        opener.start()
        result = driver.forward(LAYER, hidden, routing_logits=logits, out=out)
        for thread in (*fillers, opener):
            thread.join(PATIENCE_S)
        expected = driver.forward(LAYER, hidden, routing_logits=logits).output
        assert result.output.tobytes() == expected.tobytes()
    assert spy.num_outs > 3


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_close_leaves_the_arrays(flavour: str) -> None:
    forget_tests_before()
    backend = SteeredBackend()
    hidden, logits = values(8)
    with running(backend) as one:
        fds = shared_fds()
        with connected(flavour, one.server.port) as driver:
            mine, out = lent(driver, hidden), an_out(driver, 8)
            with pytest.raises(expertd.TimeoutError):
                driver.forward(LAYER, mine, routing_logits=logits, out=out, timeout_s=0.3)
            out[...] = 6
        del driver
        backend.gate.set()
        assert mine.tobytes() == hidden.tobytes()
        assert (out == 6).all()
        del mine, out
        forget_tests_before()
        eventually(mapped_regions, 0)
        eventually(lambda: shared_fds() <= fds, True)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_requests_of_forward_many_have_their_own(server: Running, spy: Spy, flavour: str) -> None:
    port = server.server.port
    with connected(flavour, port, max_in_flight=8) as shm, connected(flavour, port, "grpc") as grpc:
        requests = []
        for seed in range(40):
            hidden, logits = values(1 + seed, seed)
            mine, out = lent(shm, hidden), an_out(shm, 1 + seed)
            requests.append(ForwardRequest(layer=LAYER, hidden_states=mine, routing_logits=logits, out=out))
        for asked, result in zip(requests, shm.forward_many(requests), strict=True):
            assert result.output is asked.out
            expected = grpc.forward(LAYER, asked.hidden_states, routing_logits=asked.routing_logits).output
            assert result.output.tobytes() == expected.tobytes()
    assert spy.num_outs == 40


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_front_ends(spy: Spy, flavour: str) -> None:
    hidden, logits = values(50)
    with split(2) as server:
        for port in server.ports:
            with connected(flavour, port) as shm, connected(flavour, port, "grpc") as grpc:
                out = an_out(shm, 50)
                shm.forward(LAYER, lent(shm, hidden), routing_logits=logits, out=out)
                assert out.tobytes() == grpc.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
    assert (spy.num_inputs, spy.num_outs) == ([1, 1], 2)


def test_groups_take_such_arrays_as_any_other(server: Running) -> None:
    hidden, logits = values(20)
    target = f"127.0.0.1:{server.server.port}"
    with connected("sync", server.server.port) as driver, expertd.ExpertGroup([target]) as group:
        expected = group.forward(LAYER, hidden, routing_logits=logits).output
        output = group.forward(LAYER, lent(driver, hidden), routing_logits=lent(driver, logits)).output
        assert output.tobytes() == expected.tobytes()


class TestEmpty:
    """Where there is no memory to lie in."""

    @pytest.mark.parametrize("flavour", FLAVOURS)
    @pytest.mark.parametrize("transport", ["auto", "grpc", "unary"])
    def test_it_is_an_ordinary_array(self, flavour: str, transport: str) -> None:
        hidden, logits = values(5)
        with running(shared_memory=False) as one, connected(flavour, one.server.port, transport) as driver:
            out = an_out(driver, 5)
            driver.forward(LAYER, lent(driver, hidden), routing_logits=logits, out=out)
            assert out.tobytes() == driver.forward(LAYER, hidden, routing_logits=logits).output.tobytes()
            assert driver.empty((2, 0), "float32").shape == (2, 0)

    @pytest.mark.parametrize("flavour", FLAVOURS)
    def test_unless_there_has_to_be_some(self, flavour: str) -> None:
        with running(shared_memory=False) as one, connected(flavour, one.server.port) as driver:
            with pytest.raises(expertd.SharedMemoryError, match="takes no shared memory"):
                driver.empty(5, "float32")
            with pytest.raises(expertd.InvalidRequestError, match=r"shape: is -1"):
                driver.empty(-1, "float32")

    @pytest.mark.parametrize("flavour", FLAVOURS)
    @pytest.mark.parametrize("is_known", [False, True])
    def test_nobody_to_ask(self, flavour: str, is_known: bool) -> None:
        with running() as one:
            port = one.server.port
            driver = Driver(flavour, expertd.ClientConfig(f"127.0.0.1:{port}", timeout_s=5.0))
            if is_known:
                driver.server_info()
        with socket.socket() as nobody:
            # Bound and not listening: connections are refused, and no other test's server comes to this port.
            nobody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            nobody.bind(("127.0.0.1", port))
            with pytest.raises((expertd.UnavailableError, expertd.TimeoutError)):
                driver.empty(5, "float32", timeout_s=1.0)
            driver.run(driver.client.close())
            with pytest.raises(expertd.ClosedError):
                driver.empty(5, "float32")
            driver.shut()

    @pytest.mark.parametrize("flavour", FLAVOURS)
    def test_nobody_answers(self, server: Running, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
        held = threading.Event()
        monkeypatch.setattr(StreamMemory, "take", lambda *_: held.wait(PATIENCE_S) and None)
        try:
            with connected(flavour, server.server.port, "auto") as driver:
                with pytest.raises(expertd.TimeoutError, match="had not taken the shared memory"):
                    driver.empty(5, "float32", timeout_s=0.5)
                held.set()
        finally:
            held.set()
