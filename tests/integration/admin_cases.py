"""What the tests of administration share: servers that take orders, requests, and the answers that are right."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, PATIENCE_S, Running, SteeredBackend

import expertd
from expertd_server.backend import PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.layer import MoELayer
from expertd_server.synthetic import synthetic_layers
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

SEED = 20261126


ADMIN = {"admin": True, "admin_port": 0}


@dataclass
class GatedPrepare(SteeredBackend):
    """Serves at once, and prepares when the test says so."""

    may_prepare: threading.Event = field(default_factory=threading.Event)
    preparing: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_gated: bool = False

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        if self.is_gated:
            self.preparing.release()
            assert self.may_prepare.wait(PATIENCE_S), "the test never let the load go on"
        return super().prepare(spec, weights, max_num_tokens=max_num_tokens)


def admin_of(live: Running) -> expertd.AdminClient:
    return expertd.AdminClient(f"127.0.0.1:{live.server.admin_port}")


def client_of(live: Running) -> expertd.Client:
    return expertd.Client(expertd.ClientConfig(f"127.0.0.1:{live.server.port}", timeout_s=PATIENCE_S))


def inputs(seed: int, num_tokens: int = 5) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """hidden_states [T, H] bfloat16 and routing_logits [T, E] float32."""
    chance = np.random.default_rng(seed)
    hidden = chance.standard_normal((num_tokens, HIDDEN_SIZE), np.float32).astype(ml_dtypes.bfloat16)
    return hidden, chance.standard_normal((num_tokens, NUM_EXPERTS), np.float32)


def expected(seed_of_weights: int, seed_of_inputs: int) -> bytes:
    """The output's bits by the layer itself, without a server."""
    backend = TorchBackend("cpu")
    _, spec, weights = next(synthetic_layers("tiny", 1, seed=seed_of_weights))
    hidden, logits = inputs(seed_of_inputs)
    answer = MoELayer(LAYER, backend.prepare(spec, weights), backend).forward(
        torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16), routing_logits=torch.from_numpy(logits)
    )
    assert answer.output is not None
    bits: bytes = answer.output.view(torch.int16).numpy().tobytes()
    return bits


def poll(condition: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, f"{what} never came"
        time.sleep(0.005)


def died(thing: object) -> threading.Event:
    """Set when nobody has it any more."""
    event = threading.Event()
    weakref.finalize(thing, event.set)
    return event
