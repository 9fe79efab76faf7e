"""MLServer with an operator that computes nothing; run by the interpreter that has mlserver installed.

    /path/to/venv/bin/python benchmarks/peers/mlserver_server.py --port 9000 --tokens 128 --hidden-size 2048

Takes hidden_states and routing_logits, and answers with the output's bytes, in tensors of the kind it was sent: of
numbers, or of type BYTES with one element. MLServer makes a Python list of numbers, so BYTES are much faster.
"""

from __future__ import annotations

import argparse
import asyncio
import socket

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

INPUTS = 2


class Noop(MLModel):
    """The model. Its parameters: num_tokens, hidden_size."""

    async def load(self) -> bool:
        """Make the answer."""
        extra = self.settings.parameters.extra
        self._zeros = np.zeros((extra["num_tokens"], extra["hidden_size"]), np.uint16)
        self._bytes = self._zeros.tobytes()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The same answer to everybody."""
        if payload.inputs[0].datatype == "BYTES":
            tensors = [np.frombuffer(tensor.data[0], np.uint8) for tensor in payload.inputs]
            output = ResponseOutput(name="output", shape=[1], datatype="BYTES", data=[self._bytes])
        else:
            tensors = [NumpyCodec.decode_input(tensor) for tensor in payload.inputs]
            output = NumpyCodec.encode_output("output", self._zeros)
        assert len(tensors) == INPUTS
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[output])


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    with socket.socket() as probe:  # it insists on HTTP too
        probe.bind(("127.0.0.1", 0))
        http_port = probe.getsockname()[1]
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=http_port,
        grpc_port=options.port,
        grpc_max_message_length=-1,
        metrics_endpoint=None,
        parallel_workers=0,  # in this process: a pool would copy every tensor once more
    )
    model = ModelSettings(
        name="moe",
        implementation=Noop,
        parameters={"extra": {"num_tokens": options.tokens, "hidden_size": options.hidden_size}},
    )
    server = MLServer(settings)
    await server.start([model])


def main() -> None:
    """Read the command line, serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
