"""Send random tokens through every layer of a running server: python examples/forward.py [host:port]

As in a real model the router runs on the worker: it sends its logits, and the server chooses the experts.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np

import expertd


def main(target: str) -> None:
    rng = np.random.default_rng(0)
    with expertd.Client(target) as client:
        client.wait_ready(timeout_s=30)
        for layer in client.layers():
            dtype = ml_dtypes.float8_e4m3fn if layer.hidden_states_scale is None else ml_dtypes.bfloat16
            hidden_states = rng.standard_normal((16, layer.hidden_size), dtype=np.float32).astype(dtype)
            routing_logits = rng.standard_normal((16, layer.num_experts), dtype=np.float32)
            result = client.forward(layer.name, hidden_states, routing_logits=routing_logits)
            output, timing = result.output, result.timing
            print(
                f"{layer.name}: {output.shape} {output.dtype}, {timing.total_us} us in a batch of {timing.batch_tokens}"
            )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "localhost:50051")
