"""Closing and cancelling: what is in flight fails, others go on, no thread and no task is left."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
from fake_service import FakeServer
from sdk_cases import expected_output, tokens, wait

import expertd
from expertd.v1 import expertd_pb2 as pb


def client_threads() -> set[threading.Thread]:
    """All but the executors of the fake server and of the test."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("ThreadPoolExecutor")}


def test_close_lets_go_of_the_call(server: FakeServer) -> None:
    """Else that is done when the interpreter ends, and may wait forever for a thread of gRPC's that has stopped."""
    client = expertd.Client(expertd.ClientConfig(server.target, transport="stream"))
    hidden, logits = tokens(1)
    client.forward("a", hidden, routing_logits=logits)
    (stream,) = client._transport._streams  # type: ignore[attr-defined]
    call = weakref.ref(stream._call)
    client.close()
    assert call() is None


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_close_fails_what_is_in_flight_and_leaves_no_thread(
    server: FakeServer, transport: Literal["stream", "unary"]
) -> None:
    before = client_threads()
    arrived, release = threading.Semaphore(0), threading.Event()

    def hang(request: pb.ForwardRequest) -> None:
        arrived.release()
        wait(release)

    server.service.hook = hang
    client = expertd.Client(expertd.ClientConfig(server.target, transport=transport, num_channels=2, max_in_flight=2))
    hidden, logits = tokens(1)
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(client.forward, "a", hidden, routing_logits=logits) for _ in range(4)]
            assert arrived.acquire(timeout=10)
            assert arrived.acquire(timeout=10)  # two in flight, two wait for a place
            client.close()
            for call in calls:
                assert isinstance(call.exception(timeout=10), expertd.ClosedError)
    finally:
        release.set()
    assert not [thread for thread in client_threads() - before if thread.name.startswith("expertd")]
    with pytest.raises(expertd.ClosedError):
        client.forward("a", hidden, routing_logits=logits)
    client.close()  # closing twice is fine
    server.stop()
    for thread in client_threads() - before:
        thread.join(10)  # those of gRPC end on their own time
    assert client_threads() - before == set()


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_async_close_fails_what_is_in_flight_and_leaves_no_task(
    server: FakeServer, transport: Literal["stream", "unary"]
) -> None:
    release = threading.Event()
    hidden, logits = tokens(1)

    async def scenario() -> None:
        arrived = asyncio.Semaphore(0)
        loop = asyncio.get_running_loop()

        def hang(request: pb.ForwardRequest) -> None:
            loop.call_soon_threadsafe(arrived.release)
            wait(release)

        server.service.hook = hang
        client = expertd.AsyncClient(expertd.ClientConfig(server.target, transport=transport, max_in_flight=2))
        calls = [asyncio.create_task(client.forward("a", hidden, routing_logits=logits)) for _ in range(4)]
        async with asyncio.timeout(10):
            await arrived.acquire()
            await arrived.acquire()
        await client.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [expertd.ClosedError] * 4
        with pytest.raises(expertd.ClosedError):
            await client.forward("a", hidden, routing_logits=logits)
        await client.close()
        assert [task for task in asyncio.all_tasks() if task.get_name().startswith("expertd")] == []

    try:
        asyncio.run(scenario())
    finally:
        release.set()


def test_cancelling_one_task_leaves_the_stream_to_the_others(server: FakeServer) -> None:
    release = threading.Event()
    first, first_logits = tokens(1)
    other, other_logits = tokens(2)

    async def scenario() -> None:
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hang(request: pb.ForwardRequest) -> None:
            loop.call_soon_threadsafe(arrived.set)
            wait(release)

        async with expertd.AsyncClient(server.target) as client:
            await client.forward("a", first, routing_logits=first_logits)
            server.service.hook = hang
            doomed = asyncio.create_task(client.forward("a", first, routing_logits=first_logits))
            async with asyncio.timeout(10):
                await arrived.wait()
            survivor = asyncio.create_task(
                client.forward("a", other, routing_logits=other_logits, output_dtype="float32")
            )
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            release.set()
            assert np.array_equal((await survivor).output, expected_output(other, other_logits))
        assert server.service.streams == 1

    try:
        asyncio.run(scenario())
    finally:
        release.set()


_NEVER_CLOSED = """
import sys
import ml_dtypes, numpy as np
import expertd
client = expertd.Client(sys.argv[1])
x = np.zeros((1, 16), dtype=ml_dtypes.bfloat16)
client.forward("a", x, routing_logits=np.zeros((1, 8), dtype=np.float32))
assert "torch" not in sys.modules
print("done")
"""


def test_program_that_never_closes_its_client_still_ends(server: FakeServer) -> None:
    program = subprocess.run(
        [sys.executable, "-c", _NEVER_CLOSED, server.target], capture_output=True, text=True, timeout=60, check=False
    )
    assert (program.returncode, program.stdout) == (0, "done\n"), program.stderr
