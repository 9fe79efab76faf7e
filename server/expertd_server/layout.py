"""How a batch lies in memory: which part is where, for requests of any size in any company.

The same layout holds on the host and on the device, so that what lies in the slot is copied in one piece.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from expertd_server.types import LayerSpec

__all__ = [
    "NUM_VALID_BYTES",
    "BatchKind",
    "InputLayout",
    "OutputLayout",
    "Part",
    "input_layout",
    "num_valid_tokens",
    "output_layout",
    "slot_bytes",
]

NUM_VALID_BYTES = 4
"""What num_valid_tokens takes at the start of a batch's input."""

# The kernels read 16 bytes at a time, and copies are fastest from whole lines.
_ALIGN = 256


class BatchKind(NamedTuple):
    """The types of a batch's tensors: what decides how it is laid out, and which graph can run it."""

    hidden_dtype: torch.dtype
    is_routed: bool
    """topk_ids and topk_weights come in, not routing_logits."""
    output_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix in a slot's memory."""

    offset: int
    """Bytes."""
    dtype: torch.dtype
    columns: int
    row_bytes: int = field(init=False)
    """Bytes of one row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_bytes", self.columns * self.dtype.itemsize)

    def end(self, num_rows: int) -> int:
        """Where it ends, in bytes."""
        return self.offset + num_rows * self.row_bytes

    def view(self, memory: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[num_rows, columns] of the memory, [bytes] uint8."""
        return memory[self.offset : self.end(num_rows)].view(self.dtype).view(num_rows, self.columns)


@dataclass(frozen=True, slots=True)
class InputLayout:
    """num_valid_tokens int32 at 0, then the routing, then the hidden states: the largest part last, so that the rows
    of padding are not copied."""

    routing: tuple[tuple[str, Part], ...]
    """routing_logits [rows, E] float32, or topk_ids [rows, K] int32 and topk_weights [rows, K] bfloat16."""
    hidden_states: Part
    """[rows, H]."""
    parts: tuple[Part, ...] = field(init=False)
    """All of them, as they lie."""
    bundled_parts: tuple[tuple[int, int, int], ...] = field(init=False)
    """The same as `Bundle.gather_all` takes them: which one, offset and row_bytes; hidden states are number 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", (*(part for _, part in self.routing), self.hidden_states))
        numbered = (*enumerate(self.parts[:-1], start=1), (0, self.hidden_states))
        bundled_parts = tuple((number, part.offset, part.row_bytes) for number, part in numbered)
        object.__setattr__(self, "bundled_parts", bundled_parts)

    def nbytes(self, num_tokens: int) -> int:
        """Bytes from the start that a batch of num_tokens fills, at most the rows that it was laid out for."""
        return self.hidden_states.end(num_tokens)

    def arguments(self, memory: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
        """The inputs of `Backend.forward` as views of a slot's memory."""
        parts = (("hidden_states", self.hidden_states), *self.routing)
        return {name: part.view(memory, num_rows) for name, part in parts}


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """As `InputLayout`, for what comes out."""

    topk_ids: Part
    """[rows, K] int16, what `routing_replay_out` takes."""
    expert_weights: Part
    """[rows, K] bfloat16; filled only for callers who want them."""
    output: Part
    """[rows, H]."""

    def nbytes(self, num_tokens: int) -> int:
        """Bytes from the start that the answer to num_tokens fills."""
        return self.output.end(num_tokens)

    def arguments(self, memory: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
        """The outputs of `Backend.forward` as views of a slot's memory."""
        return {
            "out": self.output.view(memory, num_rows),
            "routing_replay_out": self.topk_ids.view(memory, num_rows),
        }


@functools.lru_cache(maxsize=4096)
def input_layout(spec: LayerSpec, kind: BatchKind, num_rows: int) -> InputLayout:
    """Where the inputs of a batch of num_rows lie, padding included."""
    if kind.is_routed:
        names = [("topk_ids", torch.int32, spec.top_k), ("topk_weights", torch.bfloat16, spec.top_k)]
    else:
        names = [("routing_logits", torch.float32, spec.num_experts)]
    routing = []
    at = _ALIGN  # behind num_valid_tokens
    for name, dtype, columns in names:
        part = Part(at, dtype, columns)
        routing.append((name, part))
        at = _aligned(part.end(num_rows))
    return InputLayout(tuple(routing), Part(at, kind.hidden_dtype, spec.hidden_size))


@functools.lru_cache(maxsize=4096)
def output_layout(spec: LayerSpec, kind: BatchKind, num_rows: int) -> OutputLayout:
    """Where the outputs of a batch of num_rows lie, padding included."""
    topk_ids = Part(0, torch.int16, spec.top_k)
    expert_weights = Part(_aligned(topk_ids.end(num_rows)), torch.bfloat16, spec.top_k)
    output = Part(_aligned(expert_weights.end(num_rows)), kind.output_dtype, spec.hidden_size)
    return OutputLayout(topk_ids, expert_weights, output)


def num_valid_tokens(memory: torch.Tensor) -> torch.Tensor:
    """The int32 scalar at the start of a batch's input, as a view of a slot's memory."""
    return memory[:NUM_VALID_BYTES].view(torch.int32).view(())


@functools.lru_cache(maxsize=64)
def slot_bytes(spec: LayerSpec, max_tokens: int, *, takes_wide: bool) -> tuple[int, int]:
    """Bytes that the inputs and the outputs of a batch of max_tokens take at most.

    takes_wide: hidden states may be float32, not only FP8.
    """
    hidden_dtype = torch.float32 if takes_wide else torch.float8_e4m3fn
    kinds = [BatchKind(hidden_dtype, is_routed, torch.float32) for is_routed in (False, True)]
    in_bytes = max(input_layout(spec, kind, max_tokens).nbytes(max_tokens) for kind in kinds)
    return in_bytes, output_layout(spec, kinds[0], max_tokens).nbytes(max_tokens)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
