"""Requests of the V2 inference protocol (KServe, Triton), which peers' servers speak, written without its stubs.

The bytes are those of `_requests.py`: hidden states and logits in. Raw contents, as every fast client sends them.
"""

from __future__ import annotations

from typing import Final, Literal

from _requests import RequestShape

__all__ = ["METHOD", "MODEL", "Encoding", "v2_message"]

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
MODEL: Final = "moe"

Encoding = Literal["numbers", "bytes"]
"""How tensors are typed: by their elements, or as BYTES tensors of one element, for servers that are slow otherwise."""

# Fields of ModelInferRequest and of InferInputTensor.
_MODEL_NAME, _INPUTS, _RAW_INPUT_CONTENTS = 1, 5, 7
_NAME, _DATATYPE, _SHAPE = 1, 2, 3


def v2_message(shape: RequestShape, encoding: Encoding) -> bytes:
    """A serialised ModelInferRequest."""
    arrays = shape.arrays()
    inputs, raw = [], []
    for name, numbers in (("hidden_states", "UINT8"), ("routing_logits", "FP32")):
        data = arrays[name].tobytes()
        datatype, extents = numbers, arrays[name].shape
        if encoding == "bytes":
            datatype, extents, data = "BYTES", (1,), len(data).to_bytes(4, "little") + data
        described = _field(_NAME, name.encode()) + _field(_DATATYPE, datatype.encode())
        described += _field(_SHAPE, b"".join(map(_varint, extents)))
        inputs.append(_field(_INPUTS, described))
        raw.append(_field(_RAW_INPUT_CONTENTS, data))
    return b"".join([_field(_MODEL_NAME, MODEL.encode()), *inputs, *raw])


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
