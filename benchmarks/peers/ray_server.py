"""Ray Serve with an operator that computes nothing; run by the interpreter that has ray[serve] installed.

    /path/to/venv/bin/python benchmarks/peers/ray_server.py --port 9000 --tokens 128 --hidden-size 2048

Takes the bytes of a ModelInferRequest and answers with those of a ModelInferResponse, which are made once: neither is
parsed, so what is measured is Ray alone, its proxy and one replica.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

# Ray's processes must find this file: its proxy is told a function of it by name.
HERE = Path(__file__).resolve()
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))

import grpc  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import gRPCOptions  # noqa: E402

RAW_OUTPUT_CONTENTS = 6
LENGTH_DELIMITED = 2


class Answer:
    """What Ray asks of a message."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The bytes that it was made of."""
        return self._data


def add_moe_to_server(servicer: Any, server: Any) -> None:
    """The service of the V2 protocol, without its messages."""
    method = grpc.unary_unary_rpc_method_handler(servicer.ModelInfer)
    handlers = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
    server.add_generic_rpc_handlers((handlers,))


@serve.deployment(max_ongoing_requests=256)
class Noop:
    """The model."""

    def __init__(self, answer_bytes: int) -> None:
        size, length = answer_bytes, bytearray()
        while size > 0x7F:
            length.append(size & 0x7F | 0x80)
            size >>= 7
        key = bytes([RAW_OUTPUT_CONTENTS << 3 | LENGTH_DELIMITED])
        self._answer = Answer(key + bytes([*length, size]) + bytes(answer_bytes))

    async def ModelInfer(self, request: bytes) -> Answer:  # noqa: N802
        """The same answer to everybody."""
        return self._answer


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    options = parser.parse_args()
    stopped = threading.Event()
    ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    add = f"{HERE.stem}.{add_moe_to_server.__name__}"
    serve.start(grpc_options=gRPCOptions(port=options.port, grpc_servicer_functions=[add]), http_options={"port": 0})
    serve.run(Noop.bind(2 * options.tokens * options.hidden_size), name="moe")
    stopped.wait()
    ray.shutdown()
    sys.exit(0)


if __name__ == "__main__":
    main()
