"""Arrays to bytes and back, without copies where there need be none."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import expertd
from expertd.tensors import ArrayKind, NewArray, WireTensor, dtype_to_wire, from_message, join_rows, to_caller, to_wire
from expertd.v1 import expertd_pb2 as pb

DTYPES = {
    pb.DATA_TYPE_FLOAT32: (np.dtype("float32"), torch.float32),
    pb.DATA_TYPE_BFLOAT16: (np.dtype(ml_dtypes.bfloat16), torch.bfloat16),
    pb.DATA_TYPE_FLOAT16: (np.dtype("float16"), torch.float16),
    pb.DATA_TYPE_FLOAT8_E4M3FN: (np.dtype(ml_dtypes.float8_e4m3fn), torch.float8_e4m3fn),
    pb.DATA_TYPE_INT32: (np.dtype("int32"), torch.int32),
}


def random_bytes(nbytes: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("code", DTYPES, ids=pb.DataType.Name)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5)], ids=str)
def test_numpy_travels_without_a_copy_and_to_the_bit(code: Any, shape: tuple[int, int]) -> None:
    dtype, _ = DTYPES[code]
    data = random_bytes(shape[0] * shape[1] * dtype.itemsize, seed=code)
    array = data.view(dtype).reshape(shape)
    wire, kind = to_wire("x", array)
    assert (wire.dtype, wire.shape, kind) == (code, shape, ArrayKind())
    assert wire.data.tobytes() == data.tobytes()
    assert not array.size or np.shares_memory(wire.data, array)
    back = to_caller(wire, kind)
    assert (back.dtype, back.shape, back.tobytes()) == (dtype, shape, data.tobytes())


@pytest.mark.parametrize("code", DTYPES, ids=pb.DataType.Name)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5)], ids=str)
def test_torch_travels_without_a_copy_and_to_the_bit(code: Any, shape: tuple[int, int]) -> None:
    dtype, torch_dtype = DTYPES[code]
    data = random_bytes(shape[0] * shape[1] * dtype.itemsize, seed=code)
    tensor = torch.from_numpy(data.copy()).view(torch.uint8)
    tensor = (tensor.view(torch_dtype) if data.size else torch.empty(0, dtype=torch_dtype)).reshape(shape)
    wire, kind = to_wire("x", tensor)
    assert (wire.dtype, wire.shape, kind.torch_device) == (code, shape, torch.device("cpu"))
    assert wire.data.tobytes() == data.tobytes()
    assert not data.size or wire.data.ctypes.data == tensor.data_ptr()
    back = to_caller(wire, kind)
    assert (back.dtype, tuple(back.shape)) == (torch_dtype, shape)
    assert to_wire("x", back)[0].data.tobytes() == data.tobytes()


def test_layouts_that_are_not_dense_are_copied_right() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array.T, array[:, ::2], array[::-1], array.astype(">f4")):
        assert np.array_equal(to_wire("x", view)[0].numpy(), view)
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    for torch_view in (tensor.T, tensor[:, ::2], tensor.clone().requires_grad_()):
        assert np.array_equal(to_wire("x", torch_view)[0].numpy(), torch_view.detach().numpy())


def test_answers_are_views_of_the_message_for_numpy_and_own_memory_for_torch() -> None:
    message = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 2], data=np.array([1, 2], dtype=np.float32).tobytes())
    wire = from_message("output", message)
    array = to_caller(wire, ArrayKind())
    assert np.shares_memory(array, wire.data)
    assert not array.flags.writeable
    tensor = to_caller(wire, ArrayKind(torch.device("cpu")))
    tensor += 1
    assert array.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([[1.0]], r"x: is a list, expected a numpy array or a torch tensor"),
        (np.zeros((1, 1)), r"x\.dtype: is float64, .*convert with x\.astype\('float32'\)"),
        (np.zeros((1, 1), dtype=np.int64), r"x\.dtype: is int64, .*x\.astype\('int32'\)"),
        (torch.zeros((1, 1), dtype=torch.int64), r"x\.dtype: is int64, .*x\.to\(torch\.int32\)"),
        (torch.zeros((1, 1), dtype=torch.float8_e5m2), r"x\.dtype: is float8_e5m2"),
        (np.zeros((1, 1), dtype=ml_dtypes.float8_e4m3), r"x\.dtype: is float8_e4m3,"),
    ],
    ids=["list", "float64", "int64", "torch int64", "e5m2", "e4m3 with infinities"],
)
def test_other_arrays_are_refused_with_a_remedy(array: Any, message: str) -> None:
    with pytest.raises(expertd.InvalidRequestError, match=message) as raised:
        to_wire("x", array)
    assert raised.value.violations[0].field.startswith("x")


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), torch.bfloat16],
    ids=["name", "type", "dtype", "torch"],
)
def test_dtype_has_many_names(dtype: Any) -> None:
    assert dtype_to_wire("output_dtype", dtype) == pb.DATA_TYPE_BFLOAT16


@pytest.mark.parametrize("dtype", ["float64", np.float64, torch.float64, 17, "nonsense"])
def test_unknown_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(expertd.InvalidRequestError, match=r"output_dtype: is .*expected one of float32"):
        dtype_to_wire("output_dtype", dtype)


@pytest.mark.parametrize(
    "message",
    [
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 2], data=b"1234567"),
        pb.Tensor(dtype=pb.DATA_TYPE_UNSPECIFIED, shape=[2], data=b"12"),
        pb.Tensor(dtype=17, shape=[2], data=b"12"),  # type: ignore[arg-type]
    ],
)
def test_tensor_that_contradicts_itself_is_a_protocol_error(message: pb.Tensor) -> None:
    with pytest.raises(expertd.ProtocolError, match="output of the answer"):
        from_message("output", message)


def test_parts_of_different_kinds_do_not_join() -> None:
    narrow = WireTensor(pb.DATA_TYPE_FLOAT32, (1, 1), np.zeros(4, np.uint8))
    wide = WireTensor(pb.DATA_TYPE_FLOAT32, (1, 2), np.zeros(8, np.uint8))
    with pytest.raises(expertd.ProtocolError, match="output is float32"):
        join_rows("output", [narrow, wide])
    assert join_rows("output", [narrow]) is narrow


def test_without_torch_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    wire, kind = to_wire("x", np.zeros((2, 2), dtype=np.float32))
    assert to_caller(wire, kind).shape == (2, 2)
    assert dtype_to_wire("output_dtype", "float32") == pb.DATA_TYPE_FLOAT32
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
        (np.float32, np.dtype(np.float32)),
        (ml_dtypes.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn)),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.int32, torch.int32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "extents"), [(3, (3,)), ((2, 3), (2, 3)), ([4], (4,)), ((), ()), ((0, 5), (0, 5)), (np.int64(2), (2,))]
)
def test_a_new_array_is_of_the_kind_of_its_dtype(
    dtype: Any, expected: Any, shape: Any, extents: tuple[int, ...]
) -> None:
    new = NewArray(shape, dtype)
    memory = np.zeros(new.nbytes, np.uint8)
    for array in (new.on(None), new.on(memory)):
        assert isinstance(array, torch.Tensor if isinstance(expected, torch.dtype) else np.ndarray)
        assert array.dtype == expected
        assert tuple(array.shape) == extents
        assert new.nbytes == to_wire("x", array)[0].nbytes
    if new.nbytes:
        to_wire("x", array)[0].data[:] = 7
        assert (memory == 7).all(), "it does not lie on the memory"


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, -1), "bfloat16", r"shape: is \(2, -1\), expected a number of elements or a tuple"),
        (2.5, "bfloat16", r"shape: is 2\.5"),
        ("ab", "bfloat16", r"shape: is 'ab'"),
        (2, "float64", r"dtype: is float64, expected one of float32"),
        (2, torch.int64, r"dtype: is int64"),
    ],
)
def test_a_new_array_that_cannot_be_is_named(shape: Any, dtype: Any, message: str) -> None:
    with pytest.raises(expertd.InvalidRequestError, match=message):
        NewArray(shape, dtype)
