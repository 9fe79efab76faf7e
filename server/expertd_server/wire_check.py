"""Parsed requests to checked ones: what a request must be, and what its caller is told where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from expertd.v1 import expertd_pb2 as pb
from expertd_server.errors import FieldViolation, InvalidArgumentError
from expertd_server.store import HeldLayer, LayerStore
from expertd_server.types import LayerSpec
from expertd_server.wire_parse import RawRequest, RawTensor

__all__ = ["ITEM_BYTES", "MAX_NAME_LENGTH", "CheckedRequest", "Part", "check_request", "checked_name", "is_nan"]

Part: TypeAlias = tuple[int, bytes | memoryview]
"""A pb.DataType, and the elements of a dense, row-major, little-endian matrix, whose shape the layer says."""

CheckedRequest: TypeAlias = tuple[int, Part, Part | None, Part | None, Part | None, int, bool, bool]
"""num_tokens T, hidden_states [T, H], routing_logits [T, E], topk_ids [T, K], topk_weights [T, K], output_dtype, which
is a pb.DataType, do_finalize, return_routing. The compiled codec makes the same, so it is a plain tuple."""

# A layer name is repeated in error messages, which travel in size-limited gRPC metadata.
MAX_NAME_LENGTH: Final = 256

ITEM_BYTES: Final[dict[int, int]] = {
    pb.DATA_TYPE_FLOAT32: 4,
    pb.DATA_TYPE_BFLOAT16: 2,
    pb.DATA_TYPE_FLOAT16: 2,
    pb.DATA_TYPE_FLOAT8_E4M3FN: 1,
    pb.DATA_TYPE_INT32: 4,
}
"""Of one element, by pb.DataType."""

_Layer = TypeVar("_Layer", bound=HeldLayer)


def is_nan(dtype: int, data: bytes | memoryview) -> npt.NDArray[np.bool_]:
    """Which elements, float32 or bfloat16, are NaN."""
    if dtype == pb.DATA_TYPE_FLOAT32:
        found: npt.NDArray[np.bool_] = np.isnan(np.frombuffer(data, "<f4"))
    else:  # bfloat16, which numpy does not know: all exponent bits, and a mantissa
        found = (np.frombuffer(data, "<u2") & 0x7FFF) > 0x7F80
    return found


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


def check_request(
    request: RawRequest, store: LayerStore[_Layer], *, max_batch_tokens: int, max_message_bytes: int
) -> tuple[_Layer, CheckedRequest]:
    """Check everything about a request; the layer that it asks for, and what it asks.

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
        answer_bytes = _answer_bytes(spec, num_tokens, ITEM_BYTES[output_dtype], request.do_finalize)
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
    assert num_tokens is not None
    return layer, (
        num_tokens,
        hidden_states.part,
        None if logits is None else logits.part,
        None if ids is None else ids.part,
        None if weights is None else weights.part,
        output_dtype,
        request.do_finalize,
        request.return_routing,
    )


class _Tensor(NamedTuple):
    """One that is as its field wants it. dtype: a pb.DataType."""

    dtype: int
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def part(self) -> Part:
        return self.dtype, self.data


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
    ) -> _Tensor | None:
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
        data = message.data
        num_bytes = math.prod(shape) * ITEM_BYTES[message.dtype]
        if len(data) != num_bytes:
            part = "data" if message.slice is None else "slice"
            name = f"torch.{_dtype_name(message.dtype).partition(' ')[0].lower()}"
            self.add(f"{field}.{part}", f"has {len(data)} bytes, expected {num_bytes} for {list(shape)} {name}")
            return None
        return _Tensor(message.dtype, shape, data)

    def no_nan(self, field: str, tensor: _Tensor | None) -> None:
        if tensor is None:
            return
        found = is_nan(tensor.dtype, tensor.data)
        if found.any():
            row, column = divmod(int(found.argmax()), tensor.shape[1])
            self.add(f"{field}.data", f"row {row} holds NaN (column {column}), expected numbers")

    def ids_in_range(self, field: str, tensor: _Tensor | None, num_experts: int) -> None:
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
