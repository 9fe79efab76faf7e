"""The least that a Python gRPC server can do with the bytes of a request: take them, and send as many back as asked.

What expertd reaches is measured against this, in the same run, by the same clients, over the same number of processes.
Like expertd it serves from one event loop in each process; --threads is the other way to write one in Python, which
answers fewer small requests.

    python benchmarks/_echo.py --port 50060 --processes 4 --answer-bytes 524311
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SERVICE = "expertd.benchmark.Echo"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 1),
]


def main() -> None:
    """Serve until SIGTERM, in --processes processes on one port."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--answer-bytes", type=int, required=True)
    parser.add_argument("--threads", action="store_true", help="a thread for each stream in place of an event loop")
    options = parser.parse_args()
    children: list[int] = []
    # Forked before gRPC is imported: it does not survive a fork.
    for _ in range(options.processes - 1):
        child = os.fork()
        if child == 0:
            children.clear()
            break
        children.append(child)
    answer = bytes(options.answer_bytes)
    if options.threads:
        serve_in_threads(options.port, answer)
    else:
        asyncio.run(serve_in_loop(options.port, answer))
    for child in children:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


async def serve_in_loop(port: int, answer: bytes) -> None:
    """One process of it."""
    import grpc  # noqa: PLC0415

    async def echo_stream(_requests: Any, context: Any) -> None:
        end = grpc.aio.EOF  # type: ignore[attr-defined]
        read, write = context.read, context.write
        while await read() is not end:
            await write(answer)

    async def echo_unary(_request: bytes, _context: Any) -> bytes:
        return answer

    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((handler(grpc, echo_stream, echo_unary),))
    if server.add_insecure_port(f"127.0.0.1:{port}") != port:
        sys.exit(f"port {port} is taken")
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await server.start()
    await stopped.wait()
    await server.stop(0)


def serve_in_threads(port: int, answer: bytes) -> None:
    """One process of it, the other way."""
    import grpc  # noqa: PLC0415

    def echo_stream(requests: Any, _context: Any) -> Any:
        for _ in requests:
            yield answer

    server = grpc.server(ThreadPoolExecutor(256), options=OPTIONS)
    server.add_generic_rpc_handlers((handler(grpc, echo_stream, lambda _request, _context: answer),))
    if server.add_insecure_port(f"127.0.0.1:{port}") != port:
        sys.exit(f"port {port} is taken")
    signal.signal(signal.SIGTERM, lambda *_: server.stop(0))
    server.start()
    server.wait_for_termination()


def handler(grpc: Any, stream: Any, unary: Any) -> Any:
    """The service of either kind."""
    methods = {
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


if __name__ == "__main__":
    main()
