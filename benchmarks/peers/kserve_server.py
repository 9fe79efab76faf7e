"""KServe's Python server with an operator that computes nothing; run by the interpreter that has kserve installed.

    /path/to/venv/bin/python benchmarks/peers/kserve_server.py --port 9000 --tokens 128 --hidden-size 2048

Takes hidden_states and routing_logits, and answers with the output's bytes. The answer is made once: what is measured
is the server around it.
"""

from __future__ import annotations

import argparse
import os
import socket

import numpy as np

os.environ["KSERVE_LOGLEVEL"] = "WARNING"  # read when it is imported; a line for each request would be half of its time
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

INPUTS = 2


class Noop(Model):
    """The model."""

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        super().__init__("moe")
        zeros = np.zeros((num_tokens, hidden_size), np.uint16)
        self._output = InferOutput("output", list(zeros.shape), "UINT16")
        self._output.set_data_from_numpy(zeros, binary_data=True)
        self.ready = True

    async def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None, response_headers: object = None
    ) -> InferResponse:
        """The same answer to everybody."""
        tensors = [tensor.as_numpy() for tensor in payload.inputs]  # as every operator needs them
        assert len(tensors) == INPUTS
        return InferResponse(payload.id, self.name, [self._output])


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    options = parser.parse_args()
    with socket.socket() as probe:  # it insists on HTTP too
        probe.bind(("127.0.0.1", 0))
        http_port = probe.getsockname()[1]
    server = ModelServer(
        http_port=http_port, grpc_port=options.port, workers=1, enable_grpc=True, enable_latency_logging=False
    )
    server.start([Noop(options.tokens, options.hidden_size)])


if __name__ == "__main__":
    main()
