"""Between the caller's arrays and the bytes on the wire. Torch is looked at only when the caller has imported it."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from expertd._wire_read import AnswerTensor
from expertd.errors import InvalidRequestError, ProtocolError
from expertd.v1 import expertd_pb2 as pb

__all__ = [
    "ArrayKind",
    "NewArray",
    "WireRows",
    "WireTensor",
    "dtype_to_wire",
    "from_message",
    "join_rows",
    "out_to_wire",
    "to_caller",
    "to_wire",
]

_NUMPY_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT8_E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
}
_NAMES: dict[int, str] = {code: dtype.name for code, dtype in _NUMPY_DTYPES.items()}
_CODES: dict[str, int] = {name: code for code, name in _NAMES.items()}
# Of arrays as they nearly always are: numpy makes a dtype's name anew each time that it is asked.
_CODES_BY_DTYPE: dict[np.dtype[Any], int] = {dtype: code for code, dtype in _NUMPY_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A dense, row-major, little-endian tensor that shares the memory of the array it came from, where that allows."""

    dtype: int
    """A pb.DataType."""
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]
    """[nbytes] uint8, contiguous."""

    @property
    def dtype_name(self) -> str:
        """For messages: "bfloat16"."""
        return _NAMES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, all dimensions but the first."""
        return math.prod(self.shape[1:]) * _NUMPY_DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.data.nbytes

    @property
    def pieces(self) -> tuple[memoryview, ...]:
        """The bytes, as WireRows has them."""
        return (self.data.data,)

    def is_at(self, other: WireTensor) -> bool:
        """Whether its bytes start where those of the other do."""
        return self.data is other.data or bool(self.data.ctypes.data == other.data.ctypes.data)

    def is_view_of(self, array: Any) -> bool:
        """Whether it reads the memory of the array that it was made of, and not a copy."""
        if isinstance(array, np.ndarray):
            return np.may_share_memory(self.data, array)
        return bool(array.device.type == "cpu" and array.data_ptr() == self.data.ctypes.data)

    def rows(self, start: int, stop: int) -> WireTensor:
        """Rows start ... stop - 1, without a copy."""
        if stop - start == self.shape[0]:
            return self
        data = self.data[start * self.row_nbytes : stop * self.row_nbytes]
        return WireTensor(self.dtype, (stop - start, *self.shape[1:]), data)

    def numpy(self) -> np.ndarray[Any, Any]:
        """As an array of its dtype and shape, without a copy."""
        return self.data.view(_NUMPY_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class WireRows:
    """Some rows of a tensor, in pieces that lie in its memory: the message that they go into is the first copy."""

    dtype: int
    """A pb.DataType."""
    shape: tuple[int, ...]
    pieces: tuple[memoryview, ...]
    """The bytes, one piece after the other."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * _NUMPY_DTYPES[self.dtype].itemsize

    def numpy(self) -> np.ndarray[Any, Any]:
        """As an array of its dtype and shape: a copy."""
        return np.frombuffer(b"".join(self.pieces), _NUMPY_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class ArrayKind:
    """What the caller handed in, and so what it gets back."""

    torch_device: Any = None
    """torch.device of the results; None: numpy."""


class NewArray:
    """An array that the caller wants made: its type and shape, checked."""

    def __init__(self, shape: int | Sequence[int], dtype: Any) -> None:
        """shape: as numpy takes it. dtype: a name, a numpy dtype, or a torch dtype, of which a tensor is made.

        Raises InvalidRequestError naming `dtype` or `shape`.
        """
        torch = _loaded_torch()
        self._kind = ArrayKind("cpu" if torch is not None and isinstance(dtype, torch.dtype) else None)
        self._dtype = dtype_to_wire("dtype", dtype)
        try:
            self._shape = tuple(map(operator.index, shape if isinstance(shape, Sequence) else (shape,)))
        except TypeError:
            self._shape = (-1,)
        if any(extent < 0 for extent in self._shape):
            raise InvalidRequestError.of("shape", f"is {shape!r}, expected a number of elements or a tuple of them")
        self.nbytes = math.prod(self._shape) * _NUMPY_DTYPES[self._dtype].itemsize

    def on(self, memory: np.ndarray[Any, np.dtype[np.uint8]] | None) -> Any:
        """The array, on memory of [nbytes]; None: on memory of its own. Its elements are whatever is there."""
        data = np.empty(self.nbytes, np.uint8) if memory is None else memory
        return to_caller(WireTensor(self._dtype, self._shape, data), self._kind)


def to_wire(field: str, array: Any) -> tuple[WireTensor, ArrayKind]:
    """A numpy array or torch tensor as bytes: a view where it is contiguous and on the host, otherwise a copy.

    Raises InvalidRequestError naming `field` when it is neither, or of a dtype that the service does not know.
    """
    torch = _loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        device = array.device
        code = _known_dtype(field, str(array.dtype).removeprefix("torch."), f"{field}.to(torch.{{}})")
        host = array.detach().cpu().contiguous()
        data = host.reshape(-1).view(torch.uint8).numpy()
        return WireTensor(code, tuple(host.shape), data), ArrayKind(device)
    if isinstance(array, np.ndarray):
        code = _CODES_BY_DTYPE.get(array.dtype, 0)
        if code and type(array) is np.ndarray and array.flags.c_contiguous:
            return WireTensor(code, array.shape, array.reshape(-1).view(np.uint8)), ArrayKind()
        code = _known_dtype(field, array.dtype.name, f"{field}.astype({{!r}})")
        host = np.ascontiguousarray(array, dtype=_NUMPY_DTYPES[code]).reshape(array.shape)
        return WireTensor(code, host.shape, host.reshape(-1).view(np.uint8)), ArrayKind()
    raise InvalidRequestError.of(field, f"is a {type(array).__qualname__}, expected a numpy array or a torch tensor")


def out_to_wire(array: Any, dtype: int, shape: tuple[int, ...]) -> WireTensor:
    """The memory of an array that the caller wants an output in. dtype: a pb.DataType.

    Raises InvalidRequestError naming `out` when it is of another dtype or shape, or cannot be written to as it lies.
    """
    tensor, _ = to_wire("out", array)
    if tensor.dtype != dtype:
        raise InvalidRequestError.of(
            "out.dtype", f"is {tensor.dtype_name}, expected {_NAMES[dtype]}, the output_dtype of the request"
        )
    if tensor.shape != shape:
        raise InvalidRequestError.of(
            "out.shape", f"is {list(tensor.shape)}, expected that of hidden_states, {list(shape)}"
        )
    if isinstance(array, np.ndarray):
        is_dense = array.flags.c_contiguous and array.dtype.isnative
    else:
        is_dense = array.is_contiguous() and array.device.type == "cpu"
    if not is_dense:
        raise InvalidRequestError.of(
            "out", "is not contiguous in this host's memory, expected elements in C order and in native byte order"
        )
    if not tensor.data.flags.writeable:
        raise InvalidRequestError.of("out", "is read-only, expected an array that may be written to")
    return tensor


def to_caller(tensor: WireTensor, kind: ArrayKind) -> Any:
    """The tensor as the kind of array that the caller uses.

    numpy: a view (read-only where the bytes are). torch: its own memory, because torch has no read-only tensors.
    """
    if kind.torch_device is None:
        return tensor.numpy()
    torch = sys.modules["torch"]
    dtype = getattr(torch, tensor.dtype_name)
    if not tensor.data.size:  # an empty array has strides that torch cannot view as another dtype
        return torch.empty(tensor.shape, dtype=dtype, device=kind.torch_device)
    data = tensor.data if tensor.data.flags.writeable else tensor.data.copy()
    return torch.from_numpy(data).view(dtype).reshape(tensor.shape).to(kind.torch_device)


def from_message(field: str, message: pb.Tensor | AnswerTensor) -> WireTensor:
    """The tensor of an answer: a view of the received bytes where they lie as the dtype wants, otherwise a copy.

    Raises ProtocolError naming `field` when dtype, shape and byte count do not belong together.
    """
    shape = tuple(message.shape)
    dtype = _NUMPY_DTYPES.get(message.dtype)
    data = message.data if isinstance(message.data, np.ndarray) else np.frombuffer(message.data, dtype=np.uint8)
    if dtype is None or data.nbytes != math.prod(shape) * dtype.itemsize:
        name = _NAMES.get(message.dtype, f"dtype {message.dtype}")
        raise ProtocolError(f"{field} of the answer holds {data.nbytes} bytes, which is not {name} of shape {shape}")
    if data.__array_interface__["data"][0] % dtype.itemsize:
        data = data.copy()  # numpy reads elements at odd addresses, but much slower, and few others do at all
    return WireTensor(message.dtype, shape, data)


def join_rows(field: str, tensors: Sequence[WireTensor]) -> WireTensor:
    """The tensors one below the other; a single one stays as it is.

    Raises ProtocolError naming `field` when their dtypes or rows differ.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    for other in tensors[1:]:
        if (other.dtype, other.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ProtocolError(
                f"{field} is {first.dtype_name} {first.shape} in one part of the answer and {other.dtype_name} "
                f"{other.shape} in another"
            )
    rows = sum(tensor.shape[0] for tensor in tensors)
    return WireTensor(first.dtype, (rows, *first.shape[1:]), np.concatenate([tensor.data for tensor in tensors]))


def dtype_to_wire(field: str, dtype: Any) -> int:
    """The pb.DataType of a name ("bfloat16"), a numpy dtype or a torch dtype. Raises InvalidRequestError."""
    torch = _loaded_torch()
    if torch is not None and isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif isinstance(dtype, str):
        name = dtype
    else:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
    code = _CODES.get(name)
    if code is None:
        raise InvalidRequestError.of(field, f"is {name}, expected one of {', '.join(_CODES)}")
    return code


def _known_dtype(field: str, name: str, conversion: str) -> int:
    code = _CODES.get(name)
    if code is None:
        likely = "int32" if "int" in name else "float32"
        raise InvalidRequestError.of(
            f"{field}.dtype",
            f"is {name}, expected one of {', '.join(_CODES)}; convert with {conversion.format(likely)}",
        )
    return code


def _loaded_torch() -> ModuleType | None:
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "Tensor") else None
