"""Use many servers as one: python examples/expert_group.py host:port,host:port,… | name:port | tier.json

Prints what each layer's answer cost on the wire, and which servers gave it.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np

import expertd


def main(targets: list[str]) -> None:
    rng = np.random.default_rng(0)
    with expertd.ExpertGroup(targets) as group:
        group.wait_ready(timeout_s=30)
        for layer in group.layers():
            dtype = ml_dtypes.float8_e4m3fn if layer.hidden_states_scale is None else ml_dtypes.bfloat16
            hidden_states = rng.standard_normal((16, layer.hidden_size), dtype=np.float32).astype(dtype)
            routing_logits = rng.standard_normal((16, layer.num_experts), dtype=np.float32)
            result = group.forward(layer.name, hidden_states, routing_logits=routing_logits)
            print(f"{layer.name}: {result.output.shape}, {result.sent_bytes} bytes out, {result.received_bytes} back")
            for part in result.parts:
                span = f"{part.experts.start}-{part.experts.stop - 1}"
                print(f"  experts {span}: {part.num_tokens} tokens to {part.replica}")


if __name__ == "__main__":
    main(sys.argv[1].split(",") if len(sys.argv) > 1 else ["localhost:50051"])
