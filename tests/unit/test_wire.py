"""The codec: hand-made answers against protobuf's own, typed calls against what was sent, refusals by field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.v1 import expertd_pb2 as pb
from expertd_server.backend_cpu import TorchBackend
from expertd_server.engine import ForwardResult, ForwardTiming
from expertd_server.errors import InvalidArgumentError, LayerNotFoundError, VersionNotHeldError
from expertd_server.layer import MoELayer
from expertd_server.store import LayerStore
from expertd_server.synthetic import synthetic_layers
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.wire import encode_response, encode_stream_response, read_call
from expertd_server.wire_answer import encode_stream_error, layer_info
from expertd_server.wire_parse import parse_request

DTYPES = {
    torch.float32: pb.DATA_TYPE_FLOAT32,
    torch.bfloat16: pb.DATA_TYPE_BFLOAT16,
    torch.float16: pb.DATA_TYPE_FLOAT16,
    torch.int32: pb.DATA_TYPE_INT32,
}

uint32 = st.one_of(st.just(0), st.integers(0, 2**32 - 1))
uint64 = st.one_of(st.just(0), st.integers(0, 2**64 - 1))


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype], ndim: int = 2) -> torch.Tensor:
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 300), min_size=ndim, max_size=ndim).filter(lambda s: np.prod(s) < 5000))
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():  # any bits at all, NaNs among them
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        bits = random.integers(0, 256, tensor.nbytes, dtype=np.uint8)
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(bits))
    return tensor


@st.composite
def results(draw: st.DrawFn) -> ForwardResult:
    timing = ForwardTiming(*(draw(uint64) for _ in range(4)), draw(uint32), draw(uint32))
    bfloat16, int32 = [torch.bfloat16], [torch.int32]
    return ForwardResult(
        draw(uint64),
        timing,
        output=draw(st.none() | tensors([torch.float32, torch.bfloat16, torch.float16])),
        gemm2_output=draw(st.none() | tensors(bfloat16)),
        expert_weights=draw(st.none() | tensors(bfloat16)),
        topk_ids=draw(st.none() | tensors(int32)),
        expanded_idx_to_permuted_idx=draw(st.none() | tensors(int32, ndim=1)),
    )


def by_protobuf(result: ForwardResult, queue_depth_tokens: int) -> pb.ForwardResponse:
    def message(tensor: torch.Tensor | None) -> pb.Tensor | None:
        if tensor is None:
            return None
        data = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return pb.Tensor(dtype=DTYPES[tensor.dtype], shape=tensor.shape, data=data)

    timing = result.timing
    return pb.ForwardResponse(
        output=message(result.output),
        gemm2_output=message(result.gemm2_output),
        expert_weights=message(result.expert_weights),
        topk_ids=message(result.topk_ids),
        expanded_idx_to_permuted_idx=message(result.expanded_idx_to_permuted_idx),
        timing=pb.Timing(
            queue_us=timing.queue_us,
            copy_in_us=timing.copy_in_us,
            compute_us=timing.compute_us,
            copy_out_us=timing.copy_out_us,
            batch_tokens=timing.batch_tokens,
            batch_requests=timing.batch_requests,
            queue_depth_tokens=queue_depth_tokens,
        ),
        weights_version=result.weights_version,
    )


@settings(deadline=None, max_examples=200)
@given(results(), uint32)
def test_a_hand_made_answer_is_protobufs_to_the_byte(result: ForwardResult, depth: int) -> None:
    assert encode_response(result, depth) == by_protobuf(result, depth).SerializeToString(deterministic=True)


@settings(deadline=None, max_examples=100)
@given(uint64, results(), uint32)
def test_a_hand_made_stream_answer_is_protobufs_to_the_byte(number: int, result: ForwardResult, depth: int) -> None:
    expected = pb.ForwardStreamResponse(id=number, response=by_protobuf(result, depth))
    assert encode_stream_response(number, result, depth) == expected.SerializeToString(deterministic=True)


def test_a_stream_error_carries_its_id() -> None:
    error = pb.StreamError(code=3, message="wrong")
    assert pb.ForwardStreamResponse.FromString(encode_stream_error(7, error)) == pb.ForwardStreamResponse(
        id=7, error=error
    )


def layers() -> LayerStore:
    """A store of one layer "x": H 256, E 8, K 2."""
    store = LayerStore()
    backend = TorchBackend("cpu")
    ((_, spec, weights),) = synthetic_layers("tiny")
    store.add(MoELayer("x", backend.prepare(spec, weights), backend))
    store.finish_loading()
    return store


STORE = layers()


def good(num_tokens: int = 3, **fields: Any) -> pb.ForwardRequest:
    hidden = np.arange(num_tokens * 256, dtype=np.uint8) % 0x70
    logits = np.arange(num_tokens * 8, dtype=np.float32)
    return pb.ForwardRequest(
        layer="x",
        hidden_states=pb.Tensor(dtype=4, shape=[num_tokens, 256], data=hidden.tobytes()),
        routing_logits=pb.Tensor(dtype=1, shape=[num_tokens, 8], data=logits.tobytes()),
        **fields,
    )


def routed(ids: list[list[int]], weights: list[list[float]]) -> pb.ForwardRequest:
    asked = good(len(ids))
    asked.ClearField("routing_logits")
    asked.topk_ids.CopyFrom(pb.Tensor(dtype=5, shape=[len(ids), 2], data=np.array(ids, np.int32).tobytes()))
    asked.topk_weights.CopyFrom(pb.Tensor(dtype=1, shape=[len(ids), 2], data=np.array(weights, np.float32).tobytes()))
    return asked


def read(asked: pb.ForwardRequest, max_message_bytes: int = 2**20) -> Any:
    return read_bytes(asked.SerializeToString(), max_message_bytes)


def read_bytes(data: bytes, max_message_bytes: int = 2**20) -> Any:
    return read_call(parse_request(data), STORE, max_batch_tokens=16, max_message_bytes=max_message_bytes)


def violations(asked: pb.ForwardRequest, **limits: int) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        read(asked, **limits)
    return {violation.field: violation.description for violation in caught.value.violations}


class TestReadCall:
    def test_what_was_sent_is_what_is_typed(self) -> None:
        asked = good(options=pb.ForwardOptions(output_dtype=1, do_finalize=False, return_routing=True))
        call = read(asked)
        assert call.layer.name == "x"
        assert call.num_tokens == 3
        assert (call.hidden_states.dtype, call.hidden_states.shape) == (torch.float8_e4m3fn, (3, 256))
        assert call.hidden_states.data == asked.hidden_states.data
        assert torch.equal(call.routing_logits.to_tensor(), torch.arange(24.0).view(3, 8))
        assert (call.topk_ids, call.topk_weights) == (None, None)
        assert (call.output_dtype, call.do_finalize, call.return_routing) == (torch.float32, False, True)

    def test_defaults(self) -> None:
        call = read(good())
        assert (call.output_dtype, call.do_finalize, call.return_routing) == (torch.bfloat16, True, False)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_hidden_states_of_other_types(self, dtype: torch.dtype) -> None:
        asked = good()
        hidden = torch.randn(3, 256).to(dtype)
        asked.hidden_states.CopyFrom(
            pb.Tensor(dtype=DTYPES[dtype], shape=[3, 256], data=hidden.view(torch.uint8).numpy().tobytes())
        )
        assert torch.equal(read(asked).hidden_states.to_tensor(), hidden)

    def test_no_tokens(self) -> None:
        assert read(good(0)).num_tokens == 0

    def test_empty_slots_and_repeated_ids_pass(self) -> None:
        call = read(routed([[-1, 7], [3, 3]], [[0.0, 1.0], [float("inf"), -1.0]]))
        assert call.topk_ids.to_tensor().tolist() == [[-1, 7], [3, 3]]
        assert call.topk_weights.to_tensor().tolist() == [[0.0, 1.0], [float("inf"), -1.0]]

    def test_infinite_logits_pass(self) -> None:
        asked = good(1)
        asked.routing_logits.data = np.array([-np.inf] * 7 + [np.inf], np.float32).tobytes()
        assert read(asked).num_tokens == 1

    def test_unknown_fields_pass(self) -> None:
        later_version = good().SerializeToString() + b"\xfa\x3e\x03new"  # field 1007
        assert read_bytes(later_version).num_tokens == 3

    def test_an_unknown_layer_or_version(self) -> None:
        with pytest.raises(LayerNotFoundError, match="'y' is not held here; held: x"):
            read(pb.ForwardRequest(layer="y"))
        with pytest.raises(VersionNotHeldError, match="weights_version 2; held: 1"):
            read(good(weights_version=2))


class TestViolations:
    """Each message names the field, what was given and what was expected."""

    def test_bytes_that_are_no_message(self) -> None:
        with pytest.raises(InvalidArgumentError, match="request: 3 bytes are no ForwardRequest"):
            parse_request(b"\xff\xff\xff")

    def test_fields_of_a_wrong_wire_type_are_missing_fields(self) -> None:
        with pytest.raises(InvalidArgumentError, match="layer: is empty"):
            read_bytes(b"\x08\x01\x10\x01\x18\x01")

    def test_layer_name(self) -> None:
        assert violations(pb.ForwardRequest(layer="é" * 257)) == {"layer": "has 257 characters, expected at most 256"}

    @pytest.mark.parametrize(
        ("shape", "says"),
        [
            ([], "has 0 dimensions, expected [num_tokens, 256]"),
            ([768], "has 1 dimensions, expected [num_tokens, 256]"),
            ([1, 3, 256], "has 3 dimensions, expected [num_tokens, 256]"),
            ([3, 255], "is [3, 255], expected [num_tokens, 256]"),
        ],
    )
    def test_shape_of_hidden_states(self, shape: list[int], says: str) -> None:
        asked = good()
        asked.hidden_states.shape[:] = shape
        assert violations(asked) == {"hidden_states.shape": says}

    def test_rows_must_agree(self) -> None:
        asked = good()
        asked.routing_logits.shape[0] = 4
        assert violations(asked) == {"routing_logits.shape": "is [4, 8], expected [3, 8]"}

    def test_too_many_tokens(self) -> None:
        assert violations(good(17)) == {"hidden_states.shape": "has 17 tokens, expected at most 16; split it"}

    def test_an_answer_beyond_a_message(self) -> None:
        said = violations(good(16), max_message_bytes=10_000)
        assert said["hidden_states.shape"].startswith("has 16 tokens, whose answer takes 12608 bytes")

    def test_dtype(self) -> None:
        asked = good()
        asked.hidden_states.dtype = 5
        asked.routing_logits.dtype = 42
        assert violations(asked) == {
            "hidden_states.dtype": "is INT32 (5), expected FLOAT8_E4M3FN or BFLOAT16 or FLOAT16 or FLOAT32",
            "routing_logits.dtype": "is unknown (42), expected FLOAT32 or BFLOAT16",
        }

    def test_byte_count(self) -> None:
        asked = good()
        asked.routing_logits.data += b"\0"
        assert violations(asked) == {
            "routing_logits.data": "has 97 bytes, expected 96 for [3, 8] torch.float32",
        }

    @pytest.mark.parametrize("value", [-2, 8, 2**31 - 1])
    def test_ids(self, value: int) -> None:
        said = violations(routed([[0, 1], [2, value]], [[1.0, 1.0]] * 2))
        assert said["topk_ids.data"].startswith(f"row 1 slot 1 is {value}, expected an expert id from 0 to 7")

    def test_nan_in_float32(self) -> None:
        said = violations(routed([[0, 1]] * 3, [[1.0, 1.0], [1.0, 1.0], [float("nan"), 1.0]]))
        assert said == {"topk_weights.data": "row 2 holds NaN (column 0), expected numbers"}

    @pytest.mark.parametrize("code", [0x7FC0, 0xFF81, 0x7F81, 0xFFFF])
    def test_nan_in_bfloat16(self, code: int) -> None:
        asked = good()
        values = np.array([[0x7F80, 0xFF80, 0, 0x8000, 1, 2, 3, 4]] * 3, np.uint16)  # infinities pass
        asked.routing_logits.CopyFrom(pb.Tensor(dtype=2, shape=[3, 8], data=values.tobytes()))
        assert read(asked).num_tokens == 3
        values[1, 5] = code
        asked.routing_logits.data = values.tobytes()
        assert violations(asked) == {"routing_logits.data": "row 1 holds NaN (column 5), expected numbers"}

    def test_exactly_one_kind_of_routing(self) -> None:
        asked = good()
        asked.topk_ids.SetInParent()
        assert "together with" in violations(asked)["routing_logits"]
        asked.ClearField("topk_ids")
        asked.ClearField("routing_logits")
        assert violations(asked)["routing_logits"].startswith("is missing, expected either")
        asked = routed([[0, 1]], [[1.0, 1.0]])
        asked.ClearField("topk_weights")
        assert violations(asked) == {"topk_weights": "is missing, expected a [num_tokens, 2] tensor"}

    @pytest.mark.parametrize("value", [4, 5, 6, -1])
    def test_output_dtype(self, value: int) -> None:
        said = violations(good(options=pb.ForwardOptions(output_dtype=value)))  # type: ignore[arg-type]
        assert said["options.output_dtype"].endswith("expected BFLOAT16 or FLOAT32 or FLOAT16")

    def test_a_layer_without_scale_takes_fp8_only(self) -> None:
        import dataclasses

        layer = STORE.get("x")
        weights = dataclasses.replace(layer.prepared.weights, hidden_states_scale=None)
        store = LayerStore()
        store.add(dataclasses.replace(layer, prepared=dataclasses.replace(layer.prepared, weights=weights)))
        store.finish_loading()
        asked = good()
        asked.hidden_states.dtype = 2
        with pytest.raises(InvalidArgumentError, match=r"is BFLOAT16 \(2\), expected FLOAT8_E4M3FN$"):
            read_call(parse_request(asked.SerializeToString()), store, max_batch_tokens=16, max_message_bytes=2**20)


class TestLayerInfo:
    @pytest.mark.parametrize("method", RoutingMethod)
    def test_routing_methods_are_shifted_by_one(self, method: RoutingMethod) -> None:
        spec = LayerSpec(hidden_size=64, intermediate_size=32, num_experts=8, top_k=1, routing_method=method)
        info = layer_info(_layer(spec), [1])
        assert info.routing_method == method + 1
        name = pb.RoutingMethod.Name(info.routing_method).removeprefix("ROUTING_METHOD_")
        assert name.replace("_", "") == method.name.replace("_", "")

    @pytest.mark.parametrize("activation", Activation)
    def test_activations_are_shifted_by_one(self, activation: Activation) -> None:
        spec = LayerSpec(hidden_size=64, intermediate_size=32, num_experts=8, top_k=1, activation=activation)
        info = layer_info(_layer(spec), [1])
        assert info.activation == activation + 1
        assert pb.Activation.Name(info.activation) == f"ACTIVATION_{activation.name}"

    def test_what_is_optional(self) -> None:
        spec = LayerSpec(
            hidden_size=64,
            intermediate_size=32,
            num_experts=8,
            top_k=2,
            routing_method=RoutingMethod.DEEPSEEK_V3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        )
        bias = torch.arange(8, dtype=torch.bfloat16)
        info = layer_info(_layer(spec, routing_bias=bias, hidden_states_scale=None), [1, 3])
        assert (info.n_group, info.topk_group, info.routed_scaling_factor) == (4, 2, 2.5)
        assert not info.HasField("hidden_states_scale")
        assert (info.routing_bias.dtype, list(info.routing_bias.shape)) == (pb.DATA_TYPE_FLOAT32, [8])
        assert np.frombuffer(info.routing_bias.data, np.float32).tolist() == list(range(8))
        assert list(info.weights_versions) == [1, 3]
        plain = layer_info(STORE.get("x"), [1])
        assert not plain.HasField("routing_bias")
        assert not plain.HasField("routed_scaling_factor")


def _layer(spec: LayerSpec, **weights: Any) -> MoELayer:
    from unittest.mock import Mock

    from expertd_server.backend import PreparedLayer

    fields = {"hidden_states_scale": 1.0, "routing_bias": None, **weights}
    return MoELayer("x", PreparedLayer(spec, Mock(**fields), 1000), TorchBackend("cpu"))
