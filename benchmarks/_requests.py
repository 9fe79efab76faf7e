"""Requests as a worker sends them: FP8 hidden states, float32 logits, bfloat16 answers. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from expertd.v1 import expertd_pb2 as pb

__all__ = ["RequestShape", "stream_message", "unary_message"]


@dataclass(frozen=True)
class RequestShape:
    """T tokens for a layer of hidden size H with E experts."""

    num_tokens: int
    hidden_size: int
    num_experts: int

    @property
    def request_bytes(self) -> int:
        """Bytes of the tensors sent."""
        return self.num_tokens * (self.hidden_size + 4 * self.num_experts)

    @property
    def answer_bytes(self) -> int:
        """Bytes of the tensor that comes back."""
        return self.num_tokens * self.hidden_size * 2

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of expertd.Client.forward, random ones."""
        chance = np.random.default_rng(seed)
        codes = chance.integers(0, 0x70, (self.num_tokens, self.hidden_size), dtype=np.uint8)
        codes |= chance.integers(0, 2, codes.shape, dtype=np.uint8) << 7
        logits = chance.standard_normal((self.num_tokens, self.num_experts), np.float32)
        return {"hidden_states": codes.view(ml_dtypes.float8_e4m3fn), "routing_logits": logits}


def _message(layer: str, shape: RequestShape, seed: int) -> pb.ForwardRequest:
    arrays = shape.arrays(seed)
    hidden, logits = arrays["hidden_states"], arrays["routing_logits"]
    return pb.ForwardRequest(
        layer=layer,
        hidden_states=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT8_E4M3FN, shape=hidden.shape, data=hidden.tobytes()),
        routing_logits=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=logits.shape, data=logits.tobytes()),
    )


def unary_message(layer: str, shape: RequestShape, seed: int = 0) -> bytes:
    """A serialised ForwardRequest."""
    return _message(layer, shape, seed).SerializeToString()


def stream_message(request_id: int, layer: str, shape: RequestShape, seed: int = 0) -> bytes:
    """A serialised ForwardStreamRequest."""
    return pb.ForwardStreamRequest(id=request_id, request=_message(layer, shape, seed)).SerializeToString()
