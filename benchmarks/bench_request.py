"""What the server does for one request besides gRPC, over and over on one thread: read, check, batch, answer.

    PYTHONPATH=server:client python benchmarks/bench_request.py

One ForwardStream whose messages come at once and whose answers are taken at once, in place of gRPC; the no-op backend.
CPU microseconds for each request, the least of some rounds; --python without the compiled codec; --profile by function.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
from _requests import RequestShape, stream_message

from expertd_server import codec, gather, messages, native, running


class Context:
    """gRPC's side of a stream: in_flight messages come, then as many as were answered."""

    def __init__(self, message: bytes, in_flight: int, count: int) -> None:
        self._message = message
        self._left = count
        self._may_come = asyncio.Semaphore(in_flight)

    def time_remaining(self) -> None:
        """No deadline."""

    def done(self) -> bool:
        """Not yet."""
        return False

    async def read(self) -> Any:
        """The next message, or the end."""
        if not self._left:
            return grpc.aio.EOF  # type: ignore[attr-defined]
        self._left -= 1
        await self._may_come.acquire()
        return self._message

    async def write(self, answer: bytes) -> None:
        """Take an answer."""
        assert answer[2] == 0x12, "an error"
        self._may_come.release()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--python", action="store_true", help="without the compiled codec")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    if options.python:
        codec.CODEC = messages.CODEC = native.CODEC = None  # type: ignore[assignment, attr-defined]
        gather.Copies = running.Copies = native._Copies  # type: ignore[assignment, attr-defined]
        gather.copy_bytes = native._copy_bytes  # type: ignore[attr-defined]
    with_server(lambda calls, inbox, loop: measure(options, calls, inbox, loop))


def with_server(use: Callable[[Any, Any, Any], None]) -> None:
    """Everything of a server but its port."""
    from expertd_server.backend_noop import NoopBackend  # noqa: PLC0415 (after the codec is chosen)
    from expertd_server.config import Config  # noqa: PLC0415
    from expertd_server.layer import MoELayer  # noqa: PLC0415
    from expertd_server.server import Server  # noqa: PLC0415
    from expertd_server.synthetic import synthetic_layers  # noqa: PLC0415

    backend = NoopBackend()
    layers = [
        MoELayer(name, backend.prepare(spec, weights), backend)
        for name, spec, weights in synthetic_layers("qwen3-30b-a3b", 1, local_num_experts=1)
    ]
    server = Server(Config(port=0), backend=backend, layers=layers)
    try:
        assert server.startup()
        service = server._listener.service
        use(service._calls, service._inbox, server._listener.loop)
    finally:
        server.shutdown()


def measure(options: argparse.Namespace, calls: Any, inbox: Any, loop: Any) -> None:
    """The table."""
    from expertd_server.regions import StreamRegions  # noqa: PLC0415
    from expertd_server.stream import Stream  # noqa: PLC0415

    async def run(num_tokens: int) -> tuple[float, int]:
        message = stream_message(1, "synthetic.qwen3-30b-a3b.0", RequestShape(num_tokens, 2048, 128))
        context: Any = Context(message, options.in_flight, options.count)
        regions = StreamRegions(None, 0)
        stream = Stream(
            calls,
            context,
            inbox,
            regions=regions,
            max_requests=256,
            max_tokens=2**20,
            max_answer_bytes=2**30,
            log_id="-",
        )
        profile: Any = cProfile.Profile() if options.profile else SimpleNamespace(enable=int, disable=int)
        start_s = time.thread_time()
        profile.enable()
        await stream.run()
        profile.disable()
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return time.thread_time() - start_s, threading.get_ident()

    how = "Python" if options.python else "the compiled codec"
    print(f"CPU µs for each request, {options.in_flight} in flight, {how}")
    for num_tokens in options.tokens:
        taken = min(loop.run(run(num_tokens), 300)[0] for _ in range(options.rounds))
        print(f"{num_tokens:5d} tokens: {taken / options.count * 1e6:6.1f}")


if __name__ == "__main__":
    main()
