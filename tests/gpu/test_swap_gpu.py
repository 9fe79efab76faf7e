"""Weights are swapped under load on a GPU: graphs of both versions are replayed, each with its own weights."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch

import expertd
from expertd_server.config import Config
from expertd_server.layer import MoELayer
from expertd_server.server import Server
from expertd_server.synthetic import synthetic_layers

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend

pytestmark = pytest.mark.gpu

LAYER = "synthetic.tiny.0"
NUM_CLIENTS = 8
PATIENCE_S = 60.0
SEED_OF = {1: 0, 2: 7}


def inputs(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states [T, H] bfloat16 and routing_logits [T, E] float32; T differs by client, and so do the graphs."""
    generator = torch.Generator().manual_seed(client)
    num_tokens = (1, 2, 3, 8, 17, 32, 64, 100)[client % 8]
    hidden_states = torch.randn(num_tokens, 256, generator=generator).to(torch.bfloat16)
    return hidden_states, torch.randn(num_tokens, 8, generator=generator)


def test_swapped_graphs_run_with_the_weights_that_they_were_captured_for(shared_backend: CudaBackend) -> None:
    expected: dict[tuple[int, int], bytes] = {}
    for version, seed in SEED_OF.items():
        _, spec, weights = next(synthetic_layers("tiny", 1, seed=seed))
        layer = MoELayer(LAYER, shared_backend.prepare(spec, weights), shared_backend, version)
        for client in range(NUM_CLIENTS):
            hidden_states, logits = inputs(client)
            output = layer.forward(
                hidden_states.to(shared_backend.device), routing_logits=logits.to(shared_backend.device)
            ).output
            assert output is not None
            expected[version, client] = output.cpu().view(torch.int16).numpy().tobytes()
    del layer

    server = Server(
        Config(port=0, synthetic="tiny", max_batch_tokens=512, max_graph_tokens=128, admin=True, admin_port=0),
        backend=shared_backend,
    )
    counts = {version: threading.Semaphore(0) for version in SEED_OF}
    is_over = threading.Event()

    def load(number: int) -> None:
        hidden_states, logits = inputs(number)
        hidden = hidden_states.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        with expertd.Client(f"127.0.0.1:{server.port}") as client:
            while not is_over.is_set():
                result = client.forward(LAYER, hidden, routing_logits=np.asarray(logits))
                version = result.weights_version
                assert result.output.tobytes() == expected[version, number], f"client {number}, version {version}"
                counts[version].release()

    def more(version: int) -> None:
        for _ in range(20 * NUM_CLIENTS):
            assert counts[version].acquire(timeout=PATIENCE_S), f"answers of version {version} stopped coming"

    try:
        assert server.startup()
        num_graphs, nbytes = _num_graphs(server), server.store.nbytes
        with ThreadPoolExecutor(NUM_CLIENTS) as pool, expertd.AdminClient(f"127.0.0.1:{server.admin_port}") as admin:
            loads = [pool.submit(load, number) for number in range(NUM_CLIENTS)]
            try:
                for before, after in ((1, 2), (2, 1)):
                    more(before)
                    admin.load_layer(LAYER, after, synthetic="tiny", synthetic_seed=SEED_OF[after])
                    assert _num_graphs(server) >= 2 * num_graphs, "the new version has its graphs before it is used"
                    more(before)
                    admin.swap_weights(LAYER, after)
                    more(after)
                    assert admin.unload_layer(LAYER, before, timeout_s=PATIENCE_S).freed
                    more(after)
            finally:
                is_over.set()
            for each in loads:
                each.result(PATIENCE_S)
        assert server.store.nbytes == nbytes
        assert server.engine.graphs is None or all(len(slot.graphs) == 1 for slot in server.engine.slots.slots)
    finally:
        server.shutdown()


def _num_graphs(server: Server) -> int:
    return 0 if server.engine.graphs is None else len(server.engine.graphs)
