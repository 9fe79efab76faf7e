"""Parsed requests to typed calls, answers to bytes: how the layer's vocabulary is spelled in protobuf.

Published routing and activation ids are shifted by one on the wire (see the proto). Answers are a hand-made header
joined with the tensors' bytes: building them through protobuf would copy every tensor twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch

from expertd.v1 import expertd_pb2 as pb
from expertd_server.errors import FieldViolation, InvalidArgumentError
from expertd_server.forward import ForwardCall, ForwardResult, ForwardTiming, HostTensor
from expertd_server.layer import MoELayer
from expertd_server.regions import AnswerPlace, RegionReply
from expertd_server.store import LayerStore
from expertd_server.types import LayerSpec
from expertd_server.wire_parse import RawRequest, RawTensor

__all__ = [
    "MAX_NAME_LENGTH",
    "TORCH_DTYPES",
    "WIRE_DTYPES",
    "checked_name",
    "encode_region_reply",
    "encode_response",
    "encode_stream_error",
    "encode_stream_response",
    "layer_info",
    "read_call",
]

# A layer name is repeated in error messages, which travel in size-limited gRPC metadata.
MAX_NAME_LENGTH: Final = 256

TORCH_DTYPES: Final[dict[int, torch.dtype]] = {
    pb.DATA_TYPE_FLOAT32: torch.float32,
    pb.DATA_TYPE_BFLOAT16: torch.bfloat16,
    pb.DATA_TYPE_FLOAT16: torch.float16,
    pb.DATA_TYPE_FLOAT8_E4M3FN: torch.float8_e4m3fn,
    pb.DATA_TYPE_INT32: torch.int32,
}
WIRE_DTYPES: Final = {dtype: value for value, dtype in TORCH_DTYPES.items()}
_FP8_ONLY: Final = (pb.DATA_TYPE_FLOAT8_E4M3FN,)
_HIDDEN_DTYPES: Final = (*_FP8_ONLY, pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_FLOAT32)
_REAL_DTYPES: Final = (pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_BFLOAT16)
_ID_DTYPES: Final = (pb.DATA_TYPE_INT32,)
_NO_REGIONS_HERE: Final = "names a region, which only a ForwardStream has; send the tensor's data"
_OUTPUT_DTYPES: Final = (pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16)


def checked_name(name: str) -> str:
    """A layer name that is fit to look up and to repeat. Raises InvalidArgumentError."""
    if not name:
        raise InvalidArgumentError.of("layer", "is empty, expected a name that ListLayers gives")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidArgumentError.of("layer", f"has {len(name)} characters, expected at most {MAX_NAME_LENGTH}")
    return name


def read_call(request: RawRequest, store: LayerStore, *, max_batch_tokens: int, max_message_bytes: int) -> ForwardCall:
    """Check everything about a request, and type it.

    Raises InvalidArgumentError, with a violation for every field that is wrong, and what `LayerStore.get` raises.
    """
    layer = store.get(checked_name(request.layer), request.weights_version or None)
    spec = layer.spec
    checks = _Checks()

    takes = _FP8_ONLY if layer.hidden_states_scale is None else _HIDDEN_DTYPES
    hidden_states = checks.tensor(request.hidden_states, "hidden_states", takes, spec.hidden_size)
    num_tokens = None if hidden_states is None else hidden_states.shape[0]
    if num_tokens is not None and num_tokens > max_batch_tokens:
        checks.add("hidden_states.shape", f"has {num_tokens} tokens, expected at most {max_batch_tokens}; split it")

    logits = ids = weights = None
    has_logits = request.routing_logits is not None
    if has_logits == (request.topk_ids is not None or request.topk_weights is not None):
        given = "is given together with topk_ids or topk_weights" if has_logits else "is missing"
        checks.add("routing_logits", f"{given}, expected either routing_logits or both topk_ids and topk_weights")
    elif has_logits:
        logits = checks.tensor(request.routing_logits, "routing_logits", _REAL_DTYPES, spec.num_experts, num_tokens)
        checks.no_nan("routing_logits", logits)
    else:
        ids = checks.tensor(request.topk_ids, "topk_ids", _ID_DTYPES, spec.top_k, num_tokens)
        weights = checks.tensor(request.topk_weights, "topk_weights", _REAL_DTYPES, spec.top_k, num_tokens)
        checks.ids_in_range("topk_ids", ids, spec.num_experts)
        checks.no_nan("topk_weights", weights)

    output_dtype = request.output_dtype or pb.DATA_TYPE_BFLOAT16
    if output_dtype not in _OUTPUT_DTYPES:
        checks.add("options.output_dtype", f"is {_dtype_name(output_dtype)}, expected {_choice(_OUTPUT_DTYPES)}")
    elif num_tokens is not None:
        answer_bytes = _answer_bytes(spec, num_tokens, TORCH_DTYPES[output_dtype].itemsize, request.do_finalize)
        if answer_bytes > max_message_bytes:
            checks.add(
                "hidden_states.shape",
                f"has {num_tokens} tokens, whose answer takes {answer_bytes} bytes, expected at most "
                f"{max_message_bytes}; split it",
            )
    if request.answer_slice is not None:
        checks.add("answer_slice", _NO_REGIONS_HERE)
    checks.finish()
    assert hidden_states is not None
    return ForwardCall(
        layer,
        hidden_states,
        routing_logits=logits,
        topk_ids=ids,
        topk_weights=weights,
        output_dtype=TORCH_DTYPES[output_dtype],
        do_finalize=request.do_finalize,
        return_routing=request.return_routing,
    )


class _Checks:
    """Collects what is wrong with a request, field by field."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self._violations.append(FieldViolation(field, description))

    def finish(self) -> None:
        if self._violations:
            raise InvalidArgumentError(self._violations)

    def tensor(
        self, message: RawTensor | None, field: str, dtypes: Sequence[int], columns: int, rows: int | None = None
    ) -> HostTensor | None:
        """The [rows, columns] tensor of a field; None, with a violation, when it is not one. rows None: any number."""
        if message is None:
            self.add(field, f"is missing, expected a [num_tokens, {columns}] tensor")
            return None
        before = len(self._violations)
        if message.slice is not None and not message.is_resolved:
            self.add(f"{field}.slice", _NO_REGIONS_HERE)
        if message.dtype not in dtypes:
            self.add(f"{field}.dtype", f"is {_dtype_name(message.dtype)}, expected {_choice(dtypes)}")
        shape = message.shape
        expected = f"[{'num_tokens' if rows is None else rows}, {columns}]"
        if message.rank != 2:
            self.add(f"{field}.shape", f"has {message.rank} dimensions, expected {expected}")
        elif shape[1] != columns or rows not in (None, shape[0]):
            self.add(f"{field}.shape", f"is {list(shape)}, expected {expected}")
        if len(self._violations) > before:
            return None
        dtype = TORCH_DTYPES[message.dtype]
        data = message.data
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(data) != num_bytes:
            part = "data" if message.slice is None else "slice"
            self.add(f"{field}.{part}", f"has {len(data)} bytes, expected {num_bytes} for {list(shape)} {dtype}")
            return None
        return HostTensor(dtype, shape, data)

    def no_nan(self, field: str, tensor: HostTensor | None) -> None:
        if tensor is None:
            return
        if tensor.dtype == torch.float32:
            is_nan = np.isnan(np.frombuffer(tensor.data, "<f4"))
        else:  # bfloat16, which numpy does not know: all exponent bits, and a mantissa
            is_nan = (np.frombuffer(tensor.data, "<u2") & 0x7FFF) > 0x7F80
        if is_nan.any():
            row, column = divmod(int(is_nan.argmax()), tensor.shape[1])
            self.add(f"{field}.data", f"row {row} holds NaN (column {column}), expected numbers")

    def ids_in_range(self, field: str, tensor: HostTensor | None, num_experts: int) -> None:
        if tensor is None:
            return
        ids = np.frombuffer(tensor.data, "<i4")
        is_out = (ids < -1) | (ids >= num_experts)
        if is_out.any():
            at = int(is_out.argmax())
            row, slot = divmod(at, tensor.shape[1])
            self.add(
                f"{field}.data",
                f"row {row} slot {slot} is {ids[at]}, expected an expert id from 0 to "
                f"{num_experts - 1}, or -1 for an empty slot",
            )


def encode_response(result: ForwardResult, queue_depth_tokens: int) -> bytes:
    """A serialised ForwardResponse."""
    parts, _ = _response(result, queue_depth_tokens)
    return b"".join(parts)


def encode_stream_response(
    request_id: int, result: ForwardResult, queue_depth_tokens: int, place: AnswerPlace | None = None
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    parts, num_bytes = _response(result, queue_depth_tokens, place)
    return b"".join((_number(1, request_id) + _key(2) + _varint(num_bytes), *parts))


def encode_stream_error(request_id: int, error: pb.StreamError) -> bytes:
    """A serialised ForwardStreamResponse that holds an error."""
    return pb.ForwardStreamResponse(id=request_id, error=error).SerializeToString()


def encode_region_reply(request_id: int, reply: RegionReply) -> bytes:
    """A serialised ForwardStreamResponse to a message about a region."""
    if isinstance(reply, pb.RegionTicket):
        return pb.ForwardStreamResponse(id=request_id, region_ticket=reply).SerializeToString()
    return pb.ForwardStreamResponse(id=request_id, region_unregistered=reply).SerializeToString()


def layer_info(layer: MoELayer, versions: Iterable[int], *, is_loading: bool = False) -> pb.LayerInfo:
    """What ListLayers and GetLayer say about a layer. is_loading: whether requests to it are still refused."""
    spec = layer.spec
    info = pb.LayerInfo(
        name=layer.name,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_experts=spec.num_experts,
        local_expert_offset=spec.local_expert_offset,
        local_num_experts=spec.num_local,
        top_k=spec.top_k,
        routing_method=pb.RoutingMethod.Name(spec.routing_method + 1),
        activation=pb.Activation.Name(spec.activation + 1),
        n_group=spec.n_group or 0,
        topk_group=spec.topk_group or 0,
        routed_scaling_factor=spec.routed_scaling_factor,
        norm_topk_prob=spec.norm_topk_prob,
        use_routing_scales_on_input=spec.use_routing_scales_on_input,
        hidden_states_scale=layer.hidden_states_scale,
        weights_version=layer.weights_version,
        weights_bytes=layer.nbytes,
        state=pb.LAYER_STATE_LOADING if is_loading else pb.LAYER_STATE_READY,
        weights_versions=versions,
    )
    if layer.routing_bias is not None:
        bias = layer.routing_bias.float().cpu()
        info.routing_bias.CopyFrom(
            pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=tuple(bias.shape), data=_tensor_bytes(bias).tobytes())
        )
    return info


# The writer. Parts are bytes written here and the tensors themselves; nothing is copied before the one join.

_Parts = list[bytes | memoryview]


def _response(result: ForwardResult, queue_depth_tokens: int, place: AnswerPlace | None = None) -> tuple[_Parts, int]:
    """The pieces of a ForwardResponse, and their bytes together."""
    parts: _Parts = []
    num_bytes = 0
    tensors = (
        result.output,
        result.gemm2_output,
        result.expert_weights,
        result.topk_ids,
        result.expanded_idx_to_permuted_idx,
    )
    for field, tensor in enumerate(tensors, start=1):
        if tensor is None:
            continue
        where = None if place is None or not tensor.numel() else place.put(_tensor_bytes(tensor))
        if where is not None:
            head = _placed_tensor(field, tensor.dtype, tensor.shape, where)
            parts.append(head)
            num_bytes += len(head)
        else:
            head, data_bytes = _tensor_head(field, tensor.dtype, tensor.shape)
            parts.append(head)
            num_bytes += len(head) + data_bytes
            if data_bytes:
                parts.append(_tensor_bytes(tensor))
    timing = _timing(result.timing, queue_depth_tokens)
    tail = _key(6) + _varint(len(timing)) + timing + _number(7, result.weights_version)
    parts.append(tail)
    return parts, num_bytes + len(tail)


@functools.lru_cache(maxsize=4096)
def _tensor_head(field: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """A field's Tensor up to its elements, and how many bytes of those must follow."""
    extents = b"".join(map(_varint, shape))
    data_bytes = math.prod(shape) * dtype.itemsize
    head = _number(1, WIRE_DTYPES[dtype]) + _key(2) + _varint(len(extents)) + extents
    if data_bytes:  # an empty field is left out
        head += _key(3) + _varint(data_bytes)
    return _key(field) + _varint(len(head) + data_bytes) + head, data_bytes


def _placed_tensor(field: int, dtype: torch.dtype, shape: tuple[int, ...], where: tuple[int, int, int]) -> bytes:
    """A field's Tensor whose elements lie in a region. where: the fields of RegionSlice."""
    extents = b"".join(map(_varint, shape))
    piece = b"".join(_number(number, value) for number, value in enumerate(where, start=1))
    body = _number(1, WIRE_DTYPES[dtype]) + _key(2) + _varint(len(extents)) + extents
    body += _key(4) + _varint(len(piece)) + piece
    return _key(field) + _varint(len(body)) + body


def _timing(timing: ForwardTiming, queue_depth_tokens: int) -> bytes:
    return (
        _number(1, timing.queue_us)
        + _number(2, timing.copy_in_us)
        + _number(3, timing.compute_us)
        + _number(4, timing.copy_out_us)
        + _number(5, timing.batch_tokens)
        + _number(6, timing.batch_requests)
        + _number(7, queue_depth_tokens)
    )


def _key(field: int) -> bytes:
    """What starts a length-delimited field."""
    return _BYTES[field << 3 | 2]


def _number(field: int, value: int) -> bytes:
    """A varint field, left out when zero."""
    return _BYTES[field << 3] + _varint(value) if value else b""


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTES[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_BYTES: Final = tuple(bytes((value,)) for value in range(0x80))


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a contiguous host tensor of at least one, as bytes of the tensor's dimensions; a view."""
    return tensor.view(torch.uint8).numpy().data


def _answer_bytes(spec: LayerSpec, num_tokens: int, itemsize: int, do_finalize: bool) -> int:
    """Most bytes that an answer can take, a header's worth rounded up generously."""
    slots = num_tokens * spec.top_k
    rows = num_tokens * itemsize if do_finalize else slots * 2
    return rows * spec.hidden_size + slots * (4 + 4 + 2) + 4096


def _dtype_name(value: int) -> str:
    name = pb.DataType.Name(value).removeprefix("DATA_TYPE_") if value in pb.DataType.values() else "unknown"
    return f"{name} ({value})"


def _choice(dtypes: Iterable[int]) -> str:
    return " or ".join(pb.DataType.Name(dtype).removeprefix("DATA_TYPE_") for dtype in dtypes)
