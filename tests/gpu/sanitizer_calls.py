"""Small calls of every kernel, for compute-sanitizer; a program and no test, because it runs hundreds of times slower.

    PYTHONPATH=server:client:tests/gpu compute-sanitizer --tool memcheck python tests/gpu/sanitizer_calls.py
    PYTHONPATH=server:client:tests/gpu compute-sanitizer --tool racecheck python tests/gpu/sanitizer_calls.py

Only the product's own kernels are looked at if `--kernel-regex kns=expertd` is added (torch's fill most of the time).
"""

from __future__ import annotations

import torch
from gpu_layers import TILE_FAMILIES, make_inputs, make_spec, make_weights, same_bits

from expertd_server.backend_cuda import CudaBackend
from expertd_server.types import Activation, RoutingMethod

SHAPES = (
    {"routing_method": RoutingMethod.RENORMALIZE_NAIVE, "num_experts": 8, "top_k": 2},
    {
        "routing_method": RoutingMethod.DEEPSEEK_V3,
        "num_experts": 32,
        "top_k": 4,
        "n_group": 8,
        "topk_group": 4,
        "local_expert_offset": 4,
        "local_num_experts": 8,
        "activation": Activation.RELU2,
    },
)
# Routing alone, in the two sizes that candidates are listed for and four of many tokens share a warp; and in groups.
ROUTED = (
    {"routing_method": RoutingMethod.RENORMALIZE, "num_experts": 128, "top_k": 8},
    {"routing_method": RoutingMethod.RENORMALIZE_NAIVE, "num_experts": 128, "top_k": 8},
    {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 256, "top_k": 8, "n_group": 8, "topk_group": 4},
)


def main() -> None:
    """Run every family at sizes that take each way through routing, and compare the families' bits."""
    backend = CudaBackend()
    for seed, fields in enumerate(SHAPES):
        spec = make_spec(hidden_size=528, intermediate_size=144, **fields)
        layer = backend.prepare(spec, make_weights(spec, seed, hidden_states_scale=0.05), max_num_tokens=4100)
        # Routing of one token, of a few; in one block, a cluster, the largest one, two launches, with rows in order.
        for num_tokens in (1, 3, 12, 40, 256, 700, 4100):
            hidden_states, logits = make_inputs(layer.spec, num_tokens, seed)
            outputs = []
            for family in TILE_FAMILIES if num_tokens < 4100 else TILE_FAMILIES[-1:]:
                backend.force_family = family
                routed = backend.forward(layer, hidden_states, routing_logits=logits)
                outputs.append(routed.output)
                torch.cuda.synchronize()
                print(f"shape {seed}, T {num_tokens}: {family}", flush=True)  # what is reported above this is of it
            ready = {"topk_ids": routed.topk_ids, "topk_weights": routed.expert_weights}
            outputs.append(backend.forward(layer, hidden_states, **ready).output)
            backend.forward(layer, hidden_states.to(torch.bfloat16), routing_logits=logits, output_dtype=torch.float32)
            torch.cuda.synchronize()
            assert all(same_bits(outputs[0], other) for other in outputs[1:]), f"T {num_tokens}, {fields}"
            print(f"shape {seed}, T {num_tokens}: {len(outputs)} outputs agree", flush=True)
    for seed, fields in enumerate(ROUTED):
        spec = make_spec(hidden_size=16, intermediate_size=16, **fields)
        layer = backend.prepare(spec, make_weights(spec, seed), max_num_tokens=8200)
        for num_tokens in (1, 5, 60, 300, 4100, 8200):
            hidden_states, logits = make_inputs(spec, num_tokens, seed)
            logits[::7] = logits[::7].round()  # equal scores
            backend.forward(layer, hidden_states, routing_logits=logits, do_finalize=False)
            torch.cuda.synchronize()
            print(f"routed {seed}, T {num_tokens}", flush=True)


if __name__ == "__main__":
    main()
