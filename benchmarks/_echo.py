"""The least that a Python gRPC server can do with the bytes of a request: take them, and send as many back as asked.

What expertd reaches is measured against this, in the same run, by the same clients, over the same number of processes.

    python benchmarks/_echo.py --port 50060 --processes 4 --answer-bytes 524311
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SERVICE = "expertd.benchmark.Echo"


def main() -> None:
    """Serve until SIGTERM, in --processes processes on one port."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--answer-bytes", type=int, required=True)
    options = parser.parse_args()
    children = []
    # Forked before gRPC is imported: it does not survive a fork.
    for _ in range(options.processes - 1):
        child = os.fork()
        if child == 0:
            children.clear()
            break
        children.append(child)
    serve(options.port, bytes(options.answer_bytes))
    for child in children:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


def serve(port: int, answer: bytes) -> None:
    """One process of it."""
    import grpc  # noqa: PLC0415

    def echo_stream(requests: Any, _context: Any) -> Any:
        for _ in requests:
            yield answer

    handlers = {
        "Stream": grpc.stream_stream_rpc_method_handler(echo_stream),
        "Unary": grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer),
    }
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(256), options=[*unlimited, ("grpc.so_reuseport", 1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if server.add_insecure_port(f"127.0.0.1:{port}") != port:
        sys.exit(f"port {port} is taken")
    signal.signal(signal.SIGTERM, lambda *_: server.stop(0))
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
