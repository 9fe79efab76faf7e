"""The hand-made encoder writes what protobuf writes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd._wire import encode_forward_request, encode_placed_request, encode_stream_request
from expertd.tensors import WireTensor
from expertd.v1 import expertd_pb2 as pb

_TENSORS = ("hidden_states", "routing_logits", "topk_ids", "topk_weights")
_ITEMSIZE = {1: 4, 2: 2, 3: 2, 4: 1, 5: 4}


@st.composite
def tensors(draw: st.DrawFn) -> WireTensor:
    dtype = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 300]), max_size=2)))
    nbytes = int(np.prod(shape, dtype=np.int64)) * _ITEMSIZE[dtype]
    fill = draw(st.integers(0, 255))
    return WireTensor(dtype, shape, np.full(nbytes, fill, dtype=np.uint8))


optional_tensors = st.none() | tensors()
uint64 = st.integers(0, 2**64 - 1)


def message(tensor: WireTensor) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DataType.Name(tensor.dtype), shape=tensor.shape, data=tensor.data.tobytes())


def slice_of(where: tuple[int, int, int]) -> pb.RegionSlice:
    return pb.RegionSlice(region=where[0], offset=where[1], nbytes=where[2])


@settings(deadline=None, max_examples=300)
@given(
    layer=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    hidden_states=tensors(),
    routing_logits=optional_tensors,
    topk_ids=optional_tensors,
    topk_weights=optional_tensors,
    output_dtype=st.integers(0, 5),
    do_finalize=st.booleans(),
    return_routing=st.booleans(),
    weights_version=uint64,
    request_id=uint64,
    timeout_ms=st.integers(0, 2**32 - 1),
)
def test_bytes_are_those_of_protobuf(
    *,
    layer: str,
    hidden_states: WireTensor,
    routing_logits: WireTensor | None,
    topk_ids: WireTensor | None,
    topk_weights: WireTensor | None,
    output_dtype: int,
    do_finalize: bool,
    return_routing: bool,
    weights_version: int,
    request_id: int,
    timeout_ms: int,
) -> None:
    expected = pb.ForwardRequest(layer=layer, hidden_states=message(hidden_states), weights_version=weights_version)
    for name, tensor in (("routing_logits", routing_logits), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if tensor is not None:
            getattr(expected, name).CopyFrom(message(tensor))
    if output_dtype or not do_finalize or return_routing:
        expected.options.output_dtype = pb.DataType.Name(output_dtype)
        expected.options.return_routing = return_routing
        if not do_finalize:
            expected.options.do_finalize = False
    encoded = encode_forward_request(
        layer,
        hidden_states,
        routing_logits=routing_logits,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        output_dtype=output_dtype,
        do_finalize=do_finalize,
        return_routing=return_routing,
        weights_version=weights_version,
    )
    assert encoded.to_bytes() == expected.SerializeToString(deterministic=True)
    assert encoded.nbytes == expected.ByteSize()
    stream = pb.ForwardStreamRequest(id=request_id, request=expected, timeout_ms=timeout_ms)
    assert encode_stream_request(request_id, encoded, timeout_ms) == stream.SerializeToString(deterministic=True)
    slices = [(1, 64 * number, tensor.data.nbytes) for number, (_, tensor) in enumerate(encoded.tensors)]
    placed = encode_placed_request(request_id, encoded, slices, (1, 2**40, 7), timeout_ms)
    fields = [name for name in _TENSORS if expected.HasField(name)]
    for name, where in zip(fields, slices, strict=True):
        getattr(expected, name).ClearField("data")
        getattr(expected, name).slice.CopyFrom(slice_of(where))
    expected.answer_slice.CopyFrom(slice_of((1, 2**40, 7)))
    stream = pb.ForwardStreamRequest(id=request_id, request=expected, timeout_ms=timeout_ms)
    assert pb.ForwardStreamRequest.FromString(placed) == stream


def test_tensors_are_not_copied_before_the_join() -> None:
    data = np.arange(64, dtype=np.uint8)
    encoded = encode_forward_request("l", WireTensor(pb.DATA_TYPE_FLOAT8_E4M3FN, (8, 8), data))
    view = next(chunk for chunk in encoded.chunks if isinstance(chunk, memoryview))
    assert np.shares_memory(np.frombuffer(view, dtype=np.uint8), data)
