"""One forward of a group, from the caller's request to its parts and from their answers to the result. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from expertd._combine import combine, combine_rows
from expertd._dispatch import Dispatch, Job
from expertd._plan import PreparedRequest, timing_of
from expertd._split import NO_SHARD, AnyArray, Ints, Part, owners, split
from expertd._wire import Encoded, encode_forward_request
from expertd._wire_read import Response
from expertd.errors import InvalidRequestError, ProtocolError
from expertd.group_types import GroupResult, PartReport
from expertd.routing import route
from expertd.tensors import from_message, to_caller, to_wire
from expertd.types import LayerInfo
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Call"]


class Call:
    """A request, routed and split for the shards of one layer in one version of its weights."""

    def __init__(
        self,
        request: PreparedRequest,
        layer: LayerInfo,
        shards: Sequence[range],
        *,
        weights_version: int,
        limits: Sequence[tuple[int, int]],
        partial_dtype: str,
        broadcast: bool,
    ) -> None:
        """layer: as it is in `weights_version`. shards: disjoint slices of the experts, ascending. limits: for each
        shard, the most tokens and the most bytes in one message. partial_dtype: "auto", "bfloat16" or "float32".

        Raises InvalidRequestError when the layer does not take the request.
        """
        request.check_layer(layer)
        self.request = request
        self.weights_version = weights_version
        self._layer = layer
        self._shards = shards
        self.topk_ids, self.topk_weights = _routing(request, layer)
        max_rows = {limit: request.max_rows(layer, *limit, is_routed_here=True) for limit in set(limits)}
        self._owners = owners(self.topk_ids, layer.num_experts, shards)
        self.parts: list[Part] = split(
            request.hidden_states,
            self.topk_ids,
            self.topk_weights,
            self._owners,
            [max_rows[limit] for limit in limits],
            broadcast=broadcast,
        )
        wants_bfloat16 = request.output_dtype in (pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_BFLOAT16)
        is_bfloat16 = wants_bfloat16 if partial_dtype == "auto" else partial_dtype == "bfloat16"
        self._partial_dtype = pb.DATA_TYPE_BFLOAT16 if is_bfloat16 else pb.DATA_TYPE_FLOAT32
        self._answers: list[Response | None] = [None] * len(self.parts)
        self._arrays: list[tuple[AnyArray, ...]] = [()] * len(self.parts)
        self.sent_bytes = 0
        self.received_bytes = 0

    def encode(self, index: int) -> Encoded:
        """Part number `index` as a ForwardRequest; its bytes are counted as sent."""
        part = self.parts[index]
        encoded = encode_forward_request(
            self.request.layer,
            part.hidden_states,
            topk_ids=part.topk_ids,
            topk_weights=part.topk_weights,
            output_dtype=self._partial_dtype,
            do_finalize=self.request.do_finalize,
            weights_version=self.weights_version,
        )
        self.sent_bytes += encoded.nbytes
        return encoded

    def accept(self, index: int, response: Response) -> None:
        """Take the answer to part number `index`. Raises ProtocolError when it does not fit what was asked."""
        if response.weights_version != self.weights_version:
            raise ProtocolError(
                f"weights_version of the answer is {response.weights_version}, asked for {self.weights_version}"
            )
        part, hidden_size, top_k = self.parts[index], self._layer.hidden_size, self._layer.top_k
        arrays: tuple[AnyArray, ...]
        if self.request.do_finalize:
            arrays = (_tensor("output", response, self._partial_dtype, (part.num_tokens, hidden_size)),)
        else:
            rows = _tensor("gemm2_output", response, pb.DATA_TYPE_BFLOAT16, (None, hidden_size))
            slots = _tensor("expanded_idx_to_permuted_idx", response, pb.DATA_TYPE_INT32, (part.num_tokens * top_k,))
            if slots.size and not -1 <= slots.min() <= slots.max() < len(rows):
                raise ProtocolError(
                    f"expanded_idx_to_permuted_idx of the answer spans {slots.min()} to {slots.max()}, expected -1 to "
                    f"{len(rows) - 1}"
                )
            arrays = (rows, slots)
        self._answers[index], self._arrays[index] = response, arrays

    def result(self, dispatch: Dispatch) -> GroupResult[Any]:
        """The caller's result, from the parts that were answered."""
        request, kind = self.request, self.request.kind
        answered = [index for index, answer in enumerate(self._answers) if answer is not None]
        output = gemm2_output = permuted_idx = None
        if request.do_finalize:
            partials = [(self.parts[index].runs, self._arrays[index][0]) for index in answered]
            output = combine(
                request.num_tokens, self._layer.hidden_size, partials, _OUTPUT_DTYPES[request.output_dtype]
            )
        else:
            rows = [(self.parts[i].rows, self._arrays[i][0], self._arrays[i][1]) for i in answered]
            gemm2_output, permuted_idx = combine_rows(self.topk_ids, rows, self._layer.hidden_size)
        gives_weights = request.return_routing or not request.do_finalize
        missing_slots = self._missing_slots(dispatch.jobs)

        def deliver(array: AnyArray | None) -> Any:
            return None if array is None else to_caller(to_wire("result", array)[0], kind)

        return GroupResult(
            output=deliver(output),
            gemm2_output=deliver(gemm2_output),
            expert_weights=deliver(self.topk_weights if gives_weights else None),
            topk_ids=deliver(self.topk_ids if request.return_routing else None),
            expanded_idx_to_permuted_idx=deliver(permuted_idx),
            weights_version=self.weights_version,
            timings=tuple(timing_of(answer.timing) for answer in self._answers if answer is not None),
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
            parts=tuple(self._report(job) for job in dispatch.jobs),
            missing_experts=self._missing_experts(missing_slots),
            missing_slots=missing_slots if missing_slots.any() else None,
        )

    def _missing_slots(self, jobs: Sequence[Job]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        missing: np.ndarray[Any, np.dtype[np.bool_]]
        missing = (self._owners == NO_SHARD) & (self.topk_ids >= 0)  # experts that no shard holds
        for job in jobs:
            if job.is_missing:
                part = self.parts[job.index]
                missing[part.rows] |= self._owners[part.rows] == part.shard
        return missing

    def _missing_experts(self, missing_slots: AnyArray) -> tuple[range, ...]:
        """The missing ones of the chosen experts, as runs of neighbours."""
        experts = np.unique(self.topk_ids[missing_slots])
        runs = np.split(experts, np.flatnonzero(np.diff(experts) > 1) + 1) if experts.size else []
        return tuple(range(int(run[0]), int(run[-1]) + 1) for run in runs)

    def _report(self, job: Job) -> PartReport:
        answer = self._answers[job.index]
        return PartReport(
            experts=job.experts,
            num_tokens=job.num_tokens,
            replica=job.answered_by,
            num_attempts=job.num_attempts,
            timing=None if answer is None else timing_of(answer.timing),
        )


_OUTPUT_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_UNSPECIFIED: np.dtype(ml_dtypes.bfloat16),
    pb.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.DATA_TYPE_FLOAT32: np.dtype(np.float32),
    pb.DATA_TYPE_FLOAT16: np.dtype(np.float16),
}


def _routing(request: PreparedRequest, layer: LayerInfo) -> tuple[Ints, AnyArray]:
    """topk_ids [T, K] int32 and topk_weights [T, K] bfloat16: computed here, or the caller's own, checked."""
    if request.routing_logits is not None:
        return route(layer, request.routing_logits.numpy())
    assert request.topk_ids is not None
    assert request.topk_weights is not None
    ids, weights = request.topk_ids.numpy(), request.topk_weights.numpy()
    if ids.shape[1] != layer.top_k:
        raise InvalidRequestError.of(
            "topk_ids.shape", f"has {ids.shape[1]} columns, layer {layer.name!r} expects {layer.top_k}"
        )
    is_bad = (ids < -1) | (ids >= layer.num_experts)
    if is_bad.any():
        row, column = np.argwhere(is_bad)[0].tolist()
        raise InvalidRequestError.of(
            f"topk_ids[{row}, {column}]", f"is {ids[row, column]}, expected -1 to {layer.num_experts - 1}"
        )
    is_bad = np.isnan(weights.astype(np.float32, copy=False))
    if is_bad.any():
        row, column = np.argwhere(is_bad)[0].tolist()
        raise InvalidRequestError.of(f"topk_weights[{row}, {column}]", "is NaN, expected a number")
    return ids, weights.astype(ml_dtypes.bfloat16, copy=False)


def _tensor(field: str, response: Response, dtype: int, shape: tuple[int | None, ...]) -> AnyArray:
    tensor = from_message(field, getattr(response, field))
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise ProtocolError(
            f"{field} of the answer is {tensor.dtype_name} {tensor.shape}, expected {pb.DataType.Name(dtype)} {shape}"
        )
    return tensor.numpy()
