"""From a caller's request to the parts that go on the wire, and from their answers to the caller's result. No I/O."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertd._wire import Encoded, encode_forward_request
from expertd._wire_read import Response
from expertd.errors import InvalidRequestError, ProtocolError
from expertd.tensors import (
    ArrayKind,
    WireTensor,
    dtype_to_wire,
    from_message,
    join_rows,
    out_to_wire,
    to_caller,
    to_wire,
)
from expertd.types import ForwardRequest, ForwardResult, LayerInfo, Timing
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Part", "Plan", "PreparedRequest", "prepare", "timing_of"]

_FLOATS = ("float32", "bfloat16")
_HIDDEN_DTYPES = ("float8_e4m3fn", "bfloat16", "float16", "float32")
_OUTPUT_DTYPES = ("bfloat16", "float32", "float16")
_MAX_UINT64 = 2**64 - 1
_MESSAGE_OVERHEAD_BYTES = 16 * 1024  # names, shapes, timing and details: far more than they ever take


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A request whose arguments agree with each other. T num_tokens."""

    layer: str
    kind: ArrayKind
    hidden_states: WireTensor
    routing_logits: WireTensor | None
    topk_ids: WireTensor | None
    topk_weights: WireTensor | None
    output_dtype: int
    do_finalize: bool
    return_routing: bool
    weights_version: int
    out: WireTensor | None = None
    """The memory of `out_array`."""
    out_array: Any = None
    """The caller's, which the output is written to and handed back as."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]

    def is_view_of(self, request: ForwardRequest[Any]) -> bool:
        """Whether what is sent is read from the caller's own arrays, and not from copies that were made of them."""
        fields = ("hidden_states", "routing_logits", "topk_ids", "topk_weights")
        pairs = ((getattr(self, field), getattr(request, field)) for field in fields)
        return all(tensor is None or tensor.is_view_of(array) for tensor, array in pairs)

    def check_layer(self, layer: LayerInfo) -> None:
        """Raise InvalidRequestError unless the layer takes this request."""
        _check_columns("hidden_states", self.hidden_states, layer.hidden_size, layer.name)
        if self.routing_logits is not None:
            _check_columns("routing_logits", self.routing_logits, layer.num_experts, layer.name)
        if self.hidden_states.dtype != pb.DATA_TYPE_FLOAT8_E4M3FN and layer.hidden_states_scale is None:
            raise InvalidRequestError.of(
                "hidden_states.dtype",
                f"is {self.hidden_states.dtype_name}, but layer {layer.name!r} has no hidden_states_scale; quantise to "
                f"float8_e4m3fn first",
            )

    def max_rows(
        self, layer: LayerInfo, max_batch_tokens: int, max_message_bytes: int, *, is_routed_here: bool = False
    ) -> int:
        """Most tokens of this request in one part, so that neither the batch nor a message grows too large.

        is_routed_here: what is sent are ids in int32 and weights in bfloat16, whatever the caller gave.
        """
        top_k = layer.top_k if self.topk_ids is None else self.topk_ids.shape[1]
        if is_routed_here:
            row_in = self.hidden_states.row_nbytes + 6 * top_k
        else:
            inputs = (self.hidden_states, self.routing_logits, self.topk_ids, self.topk_weights)
            row_in = sum(tensor.row_nbytes for tensor in inputs if tensor is not None)
        # Routing as float weights, ids and the permutation: 16 bytes a slot is more than all of them.
        row_out = layer.hidden_size * (4 if self.do_finalize else 2 * top_k) + 16 * top_k
        by_bytes = (max_message_bytes - _MESSAGE_OVERHEAD_BYTES) // max(row_in, row_out)
        return max(1, min(max_batch_tokens, by_bytes))


@dataclass(frozen=True, slots=True)
class Part:
    """Rows start ... stop - 1 of a request: what one message carries."""

    request: PreparedRequest
    start: int
    stop: int
    needs_ids: bool
    """Whether the answer must name the experts of each row, for joining."""
    weights_version: int

    def encode(self) -> Encoded:
        """As a ForwardRequest."""
        request = self.request

        def rows(tensor: WireTensor | None) -> WireTensor | None:
            return None if tensor is None else tensor.rows(self.start, self.stop)

        return encode_forward_request(
            request.layer,
            request.hidden_states.rows(self.start, self.stop),
            routing_logits=rows(request.routing_logits),
            topk_ids=rows(request.topk_ids),
            topk_weights=rows(request.topk_weights),
            output_dtype=request.output_dtype,
            do_finalize=request.do_finalize,
            return_routing=request.return_routing or self.needs_ids,
            weights_version=self.weights_version,
            out=rows(request.out),
        )


class Plan:
    """The parts of one request and the answers so far."""

    def __init__(self, request: PreparedRequest, max_rows: int) -> None:
        """max_rows: most tokens in one part."""
        self.request = request
        starts = range(0, request.num_tokens, max_rows) or (0,)  # an empty request is one empty part
        self._bounds = [(start, min(start + max_rows, request.num_tokens)) for start in starts]
        self._answers: list[Response | None] = [None] * len(self._bounds)
        self._weights_version = request.weights_version

    def unanswered(self) -> dict[int, Part]:
        """The parts to send now, by index; empty when the result is complete.

        When the layer's weights were replaced while the parts were under way, the parts of the older version come
        again, this time asking for the newest: no result ever mixes two versions.
        """
        if len(self._bounds) > 1 and all(answer is not None for answer in self._answers):
            newest = max(answer.weights_version for answer in self._answers if answer is not None)
            for index, answer in enumerate(self._answers):
                if answer is not None and answer.weights_version != newest:
                    self._weights_version = newest
                    self._answers[index] = None
        needs_ids = len(self._bounds) > 1 and not self.request.do_finalize
        return {
            index: Part(self.request, *bounds, needs_ids, self._weights_version)
            for index, (bounds, answer) in enumerate(zip(self._bounds, self._answers, strict=True))
            if answer is None
        }

    def answer(self, index: int, response: Response) -> None:
        """Take the answer to a part. Raises ProtocolError when it is not the version of the weights that was asked."""
        if self._weights_version not in (0, response.weights_version):
            raise ProtocolError(
                f"weights_version of the answer is {response.weights_version}, asked for {self._weights_version}"
            )
        self._answers[index] = response

    def result(self) -> ForwardResult[Any]:
        """The caller's result. Raises ProtocolError when the answers do not fit the request or one another."""
        answers = [answer for answer in self._answers if answer is not None]
        request, kind = self.request, self.request.kind
        num_tokens = request.num_tokens
        output = gemm2_output = expert_weights = topk_ids = permuted_idx = None
        split = len(answers) > 1
        if request.do_finalize:
            output = self._output(num_tokens, answers) if request.out is None else self._written(request.out, answers)
        if request.return_routing or not request.do_finalize:
            expert_weights = self._joined("expert_weights", answers, (num_tokens, None))
        if request.return_routing or (split and not request.do_finalize):
            topk_ids = self._joined("topk_ids", answers, (num_tokens, None))
        if not request.do_finalize:
            gemm2_output, permuted_idx = self._joined_rows(answers, topk_ids if split else None)
            assert expert_weights is not None
            if permuted_idx.shape != (math.prod(expert_weights.shape),):
                raise ProtocolError(
                    f"expanded_idx_to_permuted_idx of the answer has shape {permuted_idx.shape} beside expert_weights "
                    f"{expert_weights.shape}"
                )

        def deliver(tensor: WireTensor | None) -> Any:
            return None if tensor is None else to_caller(tensor, kind)

        return ForwardResult(
            output=deliver(output) if request.out is None else request.out_array,
            gemm2_output=deliver(gemm2_output),
            expert_weights=deliver(expert_weights),
            topk_ids=deliver(topk_ids if request.return_routing else None),
            expanded_idx_to_permuted_idx=deliver(permuted_idx),
            weights_version=answers[0].weights_version,
            timings=tuple(timing_of(answer.timing) for answer in answers),
        )

    def _output(self, num_tokens: int, answers: Sequence[Response]) -> WireTensor:
        output = self._joined("output", answers, (num_tokens, self.request.hidden_states.shape[1]))
        expected = self.request.output_dtype or pb.DATA_TYPE_BFLOAT16
        if output.dtype != expected:
            raise ProtocolError(f"output of the answer is {output.dtype_name}, asked for {pb.DataType.Name(expected)}")
        return output

    def _written(self, out: WireTensor, answers: Sequence[Response]) -> WireTensor:
        """The output where the caller wants it; what the server has written there is left as it is."""
        for (start, stop), answer in zip(self._bounds, answers, strict=True):
            part, rows = self._output(stop - start, [answer]), out.rows(start, stop)
            if not part.is_at(rows):
                np.copyto(rows.data, part.data)
        return out

    def _joined(self, field: str, answers: Sequence[Response], expected: tuple[int | None, ...]) -> WireTensor:
        tensor = join_rows(field, [from_message(field, getattr(answer, field)) for answer in answers])
        fits = len(tensor.shape) == len(expected) and all(
            want in (None, have) for want, have in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            raise ProtocolError(f"{field} of the answer has shape {tensor.shape}, expected {expected}")
        return tensor

    def _joined_rows(self, answers: Sequence[Response], topk_ids: WireTensor | None) -> tuple[WireTensor, WireTensor]:
        """gemm2_output and expanded_idx_to_permuted_idx of all parts.

        Each part has its own rows, grouped by expert and padded as the server likes. Joined, the rows are grouped
        again, by expert and then by token, and the padding is dropped.
        """
        rows = [from_message("gemm2_output", answer.gemm2_output) for answer in answers]
        index = [
            from_message("expanded_idx_to_permuted_idx", answer.expanded_idx_to_permuted_idx) for answer in answers
        ]
        for part_rows, part_index in zip(rows, index, strict=True):
            _check_index(part_rows, part_index)
        if topk_ids is None:
            return rows[0], index[0]
        first_row = np.cumsum([0, *(part.shape[0] for part in rows[:-1])])
        flat = np.concatenate(
            [np.where(part.numpy() < 0, -1, part.numpy() + first) for part, first in zip(index, first_row, strict=True)]
        )
        experts = topk_ids.numpy().reshape(-1)
        if flat.size != experts.size:
            raise ProtocolError(f"expanded_idx_to_permuted_idx holds {flat.size} slots, topk_ids {experts.size}")
        slots = np.flatnonzero(flat >= 0)
        slots = slots[np.argsort(experts[slots], kind="stable")]
        all_rows = join_rows("gemm2_output", rows)
        gathered = all_rows.data.reshape(all_rows.shape[0], all_rows.row_nbytes)[flat[slots]]
        permuted = np.full(flat.size, -1, dtype="<i4")
        permuted[slots] = np.arange(slots.size, dtype="<i4")
        return (
            WireTensor(all_rows.dtype, (slots.size, *all_rows.shape[1:]), gathered.reshape(-1)),
            WireTensor(pb.DATA_TYPE_INT32, permuted.shape, permuted.view(np.uint8)),
        )


def prepare(request: ForwardRequest[Any]) -> PreparedRequest:
    """Check everything about a request that can be checked without knowing the layer.

    Raises InvalidRequestError naming the argument, its value and what was expected.
    """
    if not isinstance(request.layer, str) or not request.layer:
        raise InvalidRequestError.of("layer", f"is {request.layer!r}, expected the name of a layer")
    try:
        request.layer.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError.of("layer", f"is {request.layer!r}, which is not valid Unicode") from None
    routed = request.topk_ids is not None or request.topk_weights is not None
    if routed == (request.routing_logits is not None):
        given = "both were given" if routed else "neither was given"
        raise InvalidRequestError.of(
            "routing_logits", f"expected either routing_logits or topk_ids with topk_weights, {given}"
        )
    if (request.topk_ids is None) != (request.topk_weights is None):
        missing = "topk_ids" if request.topk_ids is None else "topk_weights"
        raise InvalidRequestError.of(missing, "is missing, expected topk_ids and topk_weights together")
    hidden_states, kind = to_wire("hidden_states", request.hidden_states)
    _check("hidden_states", hidden_states, _HIDDEN_DTYPES, (None, None))
    num_tokens = hidden_states.shape[0]
    logits = _optional("routing_logits", request.routing_logits, _FLOATS, (num_tokens, None))
    topk_ids = _optional("topk_ids", request.topk_ids, ("int32",), (num_tokens, None))
    top_k = None if topk_ids is None else topk_ids.shape[1]
    topk_weights = _optional("topk_weights", request.topk_weights, _FLOATS, (num_tokens, top_k))
    output_dtype = _output_dtype(request)
    out = None
    if request.out is not None:
        inputs = {
            "hidden_states": hidden_states,
            "routing_logits": logits,
            "topk_ids": topk_ids,
            "topk_weights": topk_weights,
        }
        out = _out(request, output_dtype, inputs)
    return PreparedRequest(
        layer=request.layer,
        kind=kind,
        hidden_states=hidden_states,
        routing_logits=logits,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        output_dtype=output_dtype,
        do_finalize=request.do_finalize,
        return_routing=request.return_routing,
        weights_version=_weights_version(request.weights_version),
        out=out,
        out_array=request.out,
    )


def _optional(field: str, array: Any, dtypes: Sequence[str], shape: tuple[int | None, ...]) -> WireTensor | None:
    if array is None:
        return None
    tensor, _ = to_wire(field, array)
    _check(field, tensor, dtypes, shape)
    return tensor


def _check(field: str, tensor: WireTensor, dtypes: Sequence[str], shape: tuple[int | None, ...]) -> None:
    if tensor.dtype_name not in dtypes:
        raise InvalidRequestError.of(f"{field}.dtype", f"is {tensor.dtype_name}, expected {' or '.join(dtypes)}")
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InvalidRequestError.of(f"{field}.shape", f"is {list(tensor.shape)}, expected [{expected}]")


def _check_columns(field: str, tensor: WireTensor, columns: int, layer: str) -> None:
    if tensor.shape[1] != columns:
        raise InvalidRequestError.of(
            f"{field}.shape", f"has {tensor.shape[1]} columns, layer {layer!r} expects {columns}"
        )


def _output_dtype(request: ForwardRequest[Any]) -> int:
    if request.output_dtype is None:
        return 0
    code = dtype_to_wire("output_dtype", request.output_dtype)
    if code not in (pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16):
        raise InvalidRequestError.of(
            "output_dtype", f"is {request.output_dtype}, expected {' or '.join(_OUTPUT_DTYPES)}"
        )
    return code


def _out(request: ForwardRequest[Any], output_dtype: int, inputs: dict[str, WireTensor | None]) -> WireTensor:
    if not request.do_finalize:
        raise InvalidRequestError.of("out", "is given with do_finalize=False, where there is no output; leave it out")
    hidden_states = inputs["hidden_states"]
    assert hidden_states is not None
    out = out_to_wire(request.out, output_dtype or pb.DATA_TYPE_BFLOAT16, hidden_states.shape)
    for field, tensor in inputs.items():
        if tensor is not None and np.may_share_memory(out.data, tensor.data):
            raise InvalidRequestError.of(
                "out", f"shares memory with {field}, expected an array apart: what is sent may have to be sent again"
            )
    return out


def _weights_version(version: int | None) -> int:
    if version is None:
        return 0
    try:
        number = operator.index(version)
    except TypeError:
        number = 0
    if not 1 <= number <= _MAX_UINT64:
        raise InvalidRequestError.of(
            "weights_version", f"is {version!r}, expected 1 to 2**64 - 1, or None for the current"
        )
    return number


def _check_index(rows: WireTensor, index: WireTensor) -> None:
    if index.dtype != pb.DATA_TYPE_INT32 or len(rows.shape) != 2:
        raise ProtocolError(
            f"gemm2_output of the answer is {rows.dtype_name} {rows.shape} with an {index.dtype_name} index, expected "
            f"two dimensions and int32"
        )
    values = index.numpy()
    if values.size and not (values.min() >= -1 and values.max() < rows.shape[0]):
        raise ProtocolError(
            f"expanded_idx_to_permuted_idx of the answer spans {values.min()} to {values.max()}, expected -1 to "
            f"{rows.shape[0] - 1}"
        )


def timing_of(timing: pb.Timing) -> Timing:
    """A Timing message as the caller sees it."""
    return Timing(
        queue_us=timing.queue_us,
        copy_in_us=timing.copy_in_us,
        compute_us=timing.compute_us,
        copy_out_us=timing.copy_out_us,
        batch_tokens=timing.batch_tokens,
        batch_requests=timing.batch_requests,
        queue_depth_tokens=timing.queue_depth_tokens,
    )
