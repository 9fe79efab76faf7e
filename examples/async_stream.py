"""Keep many requests of one layer in flight from asyncio: python examples/async_stream.py [host:port]"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

import expertd


def requests(layer: expertd.LayerInfo, count: int) -> Iterator[expertd.ForwardRequest[np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    dtype = ml_dtypes.float8_e4m3fn if layer.hidden_states_scale is None else ml_dtypes.bfloat16
    for _ in range(count):
        hidden_states = rng.standard_normal((8, layer.hidden_size), dtype=np.float32).astype(dtype)
        routing_logits = rng.standard_normal((8, layer.num_experts), dtype=np.float32)
        yield expertd.ForwardRequest(layer=layer.name, hidden_states=hidden_states, routing_logits=routing_logits)


async def main(target: str) -> None:
    async with expertd.AsyncClient(target) as client:
        await client.wait_ready(timeout_s=30)
        layer = (await client.layers())[0]
        batches = [result.timing.batch_tokens async for result in client.forward_many(requests(layer, 100))]
        print(f"{layer.name}: {len(batches)} answers, from batches of {min(batches)} to {max(batches)} tokens")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"))
