"""Calls whose tensors and answers lie in memory that others share with an engine."""

from __future__ import annotations

import dataclasses
import mmap
import time
from typing import Any

from expertd.v1 import expertd_pb2 as pb
from expertd_server import codec
from expertd_server.forward import ForwardCall, ForwardResult, HostTensor
from expertd_server.native import address_of
from expertd_server.pinning import PIECE_BYTES, Pinner, pinned_address
from expertd_server.regions import TENSORS, AnswerPlace

PATIENCE_S = 30.0
ANSWERED = ("output", "gemm2_output", "expert_weights", "topk_ids", "expanded_idx_to_permuted_idx")


class SharedMemory:
    """Calls in it, one behind the other, each with its tensors from where its answer goes, as in a client's region."""

    def __init__(self, pinner: Pinner, nbytes: int = 1 << 22) -> None:
        view = pinner.share(mmap.mmap(-1, nbytes + PIECE_BYTES))
        first = -address_of(view) % PIECE_BYTES  # so that nothing small lies in two pieces
        self.view = view[first : first + nbytes]
        self._next = 0

    def pin(self) -> SharedMemory:
        """Wait until all of it is pinned."""
        until_s = time.monotonic() + PATIENCE_S
        while not pinned_address(self.view, len(self.view)):
            assert time.monotonic() < until_s, "the memory is not pinned"
            time.sleep(0.001)
        return self

    def placed(self, call: ForwardCall, answer_bytes: int | None = None) -> ForwardCall:
        """The same call from here; its answer is a ForwardStreamResponse whose tensors lie here as far as they fit.

        answer_bytes: room for them, where it is not just that of the output.
        """
        given: dict[str, HostTensor] = {name: each for name in TENSORS if (each := getattr(call, name)) is not None}
        num_tokens, hidden_size = call.hidden_states.shape
        if answer_bytes is None:
            answer_bytes = num_tokens * hidden_size * call.output_dtype.itemsize
        start = self._next
        answer = AnswerPlace(1, start, self.view[start : start + answer_bytes])
        changed: dict[str, Any] = {"place": self.view[start : start + answer_bytes]}
        at = start
        for name, tensor in given.items():
            stop = at + len(tensor.data)
            self.view[at:stop] = tensor.data
            changed[name] = HostTensor(tensor.dtype, tensor.shape, self.view[at:stop])
            at = _aligned(stop)
        self._next = max(at, _aligned(start + answer_bytes))
        assert self._next <= len(self.view)

        def encode(result: ForwardResult) -> bytes:
            return codec.write_stream_answer(1, result, 0, answer)

        return dataclasses.replace(call, **changed, encode=encode)

    def read(self, answer: object) -> bytes:
        """Everything of an answer but its timing, its tensors put into the message."""
        assert isinstance(answer, bytes)
        response = pb.ForwardStreamResponse.FromString(answer).response
        for name in ANSWERED:
            tensor = getattr(response, name)
            if tensor.HasField("slice"):
                start = tensor.slice.offset
                tensor.data = bytes(self.view[start : start + tensor.slice.nbytes])  # and the slice is gone
                tensor.ClearField("slice")
        return everything(response)


def everything(response: pb.ForwardResponse) -> bytes:
    """Of an answer but its timing."""
    response.ClearField("timing")
    return response.SerializeToString(deterministic=True)


def by_bytes(call: ForwardCall) -> ForwardCall:
    """The same call, whose answer is a ForwardResponse with all its tensors."""
    return dataclasses.replace(call, encode=lambda result: codec.write_answer(result, 0))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
