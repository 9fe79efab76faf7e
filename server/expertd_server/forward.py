"""A request for a layer's output and its answer, as everything between the wire and the batch knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind
from expertd_server.native import Copies
from expertd_server.timing import ForwardTiming

__all__ = ["ForwardCall", "ForwardResult", "HostTensor", "Matrix"]


@dataclass(slots=True)  # not frozen, which makes making one take three times as long; likewise below
class HostTensor:
    """Somebody else's bytes as a tensor: dense, row-major, little-endian, read-only."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | memoryview

    def copy_to(self, destination: torch.Tensor) -> None:
        """Write the elements into a contiguous host tensor of the same dtype and shape."""
        np.copyto(destination.reshape(-1).view(torch.uint8).numpy(), np.frombuffer(self.data, np.uint8))

    def to_tensor(self) -> torch.Tensor:
        """A torch tensor of its own memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(tensor)
        return tensor


@dataclass(slots=True)
class ForwardCall:
    """One checked request. T num_tokens, H hidden_size, E num_experts, K top_k."""

    layer: MoELayer
    hidden_states: HostTensor
    """[T, H] float8_e4m3fn, or bfloat16, float16, float32 where the layer has a hidden_states_scale."""
    routing_logits: HostTensor | None = None
    """[T, E] float32 or bfloat16; or topk_ids and topk_weights."""
    topk_ids: HostTensor | None = None
    """[T, K] int32."""
    topk_weights: HostTensor | None = None
    """[T, K] float32 or bfloat16."""
    output_dtype: torch.dtype = torch.bfloat16
    do_finalize: bool = True
    return_routing: bool = False
    encode: Callable[[ForwardResult], Any] | None = None
    """What to make of the answer where it lies, in whichever thread finishes the batch. The promise is then kept with
    what this returns, when the copies that this noted are done; the tensors it is given are valid until then. None:
    with the ForwardResult."""
    place: memoryview | None = None
    """Together with encode: where the output alone may be written before that is called, at the start; the call's own
    tensors may lie there too. It is this call's until its promise is kept."""

    num_requests: ClassVar = 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]

    @property
    def kind(self) -> BatchKind:
        """What a batch of such calls alone computes with."""
        return BatchKind(self.hidden_states.dtype, self.topk_ids is not None, self.output_dtype)


class Matrix(NamedTuple):
    """A dense matrix in plain numbers, because a tensor takes long to make and to ask."""

    dtype: torch.dtype
    num_rows: int
    num_columns: int
    address: int
    """Of host memory that belongs to somebody else."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Matrix | None:
        """Where a matrix lies; None: it is not dense."""
        if not tensor.is_contiguous():
            return None
        num_rows, num_columns = tensor.shape
        return cls(tensor.dtype, num_rows, num_columns, tensor.data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.num_rows * self.num_columns * self.dtype.itemsize

    def rows(self, first: int, num_rows: int) -> Matrix:
        """Some of its rows."""
        address = self.address + first * self.num_columns * self.dtype.itemsize
        return Matrix(self.dtype, num_rows, self.num_columns, address)


class ForwardResult:
    """The answer to one call, in host memory of its own, but see `ForwardCall.encode`; the tensors that were not asked
    for are None.

    output: [T, H] in the asked dtype. gemm2_output: [P, H] bfloat16, the rows of this request alone, by local expert,
    then by slot; no padding. expert_weights: [T, K] bfloat16. topk_ids: [T, K] int32. expanded_idx_to_permuted_idx:
    [T * K] int32. copies: where `ForwardCall.encode` notes what is to be copied out of these tensors; None: it copies
    at once.
    """

    __slots__ = (
        "_matrix",
        "_output",
        "_place",
        "_rows",
        "copies",
        "expanded_idx_to_permuted_idx",
        "expert_weights",
        "gemm2_output",
        "timing",
        "topk_ids",
        "weights_version",
    )

    def __init__(  # noqa: PLR0917 (made for every request, and keywords take time)
        self,
        weights_version: int,
        timing: ForwardTiming,
        output: torch.Tensor | None = None,
        gemm2_output: torch.Tensor | None = None,
        expert_weights: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        expanded_idx_to_permuted_idx: torch.Tensor | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.weights_version = weights_version
        self.timing = timing
        self.gemm2_output = gemm2_output
        self.expert_weights = expert_weights
        self.topk_ids = topk_ids
        self.expanded_idx_to_permuted_idx = expanded_idx_to_permuted_idx
        self.copies = copies
        self._output = output
        self._rows: slice | None = None
        """Of _output, where that is a whole batch's."""
        self._matrix: Matrix | None = None
        self._place: memoryview | None = None
        """What holds the output where there is no tensor yet."""

    def lies_in(self, output: torch.Tensor, whole: Matrix | None, first: int, num_rows: int) -> None:
        """Say that its output is these rows of a batch's. whole: where that lies, if it is dense."""
        self._output = output
        self._rows = slice(first, first + num_rows)
        self._matrix = None if whole is None else whole.rows(first, num_rows)

    def lies_at(self, matrix: Matrix, place: memoryview) -> None:
        """Say that its output is in place already. place: the memory, from the matrix on."""
        self._matrix, self._place = matrix, place

    @property
    def place(self) -> memoryview | None:
        """What `lies_at` was told, as long as nobody has asked for the output."""
        return self._place

    @property
    def output(self) -> torch.Tensor | None:
        """[T, H] in the asked dtype."""
        if self._place is not None:
            assert self._matrix is not None
            dtype, num_rows, num_columns, _ = self._matrix
            rows = torch.frombuffer(self._place, dtype=dtype, count=num_rows * num_columns)
            self._output, self._place = rows.view(num_rows, num_columns), None
        if self._rows is not None and self._output is not None:
            self._output, self._rows = self._output[self._rows], None
        return self._output

    @output.setter
    def output(self, output: torch.Tensor | None) -> None:
        self._output, self._rows, self._matrix, self._place = output, None, None, None

    @property
    def matrix(self) -> Matrix | None:
        """Where its output lies, if it is dense and all that there is of the answer."""
        if (
            self.expert_weights is not None
            or self.topk_ids is not None
            or self.gemm2_output is not None
            or self.expanded_idx_to_permuted_idx is not None
        ):
            return None
        if self._matrix is None and self._output is not None:
            assert self.output is not None
            self._matrix = Matrix.of(self.output)
        return self._matrix
