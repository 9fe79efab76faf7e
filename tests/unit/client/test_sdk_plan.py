"""What a request must be, how it is split, and which answers are believed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import expertd
from expertd._base import layer_info, timeout_ms
from expertd._plan import Plan, prepare
from expertd.tensors import to_wire
from expertd.v1 import expertd_pb2 as pb

T, H, E, K = 5, 4, 6, 2
FP8 = ml_dtypes.float8_e4m3fn
HIDDEN = np.zeros((T, H), dtype=FP8)
LOGITS = np.zeros((T, E), dtype=np.float32)
IDS = np.zeros((T, K), dtype=np.int32)
WEIGHTS = np.zeros((T, K), dtype=np.float32)


def request(**changes: Any) -> expertd.ForwardRequest[Any]:
    fields: dict[str, Any] = {"layer": "a", "hidden_states": HIDDEN, "routing_logits": LOGITS}
    return expertd.ForwardRequest(**{**fields, **changes})


def answer(
    count: int = T, *, version: int = 1, dtype: int = pb.DATA_TYPE_BFLOAT16, **tensors: pb.Tensor
) -> pb.ForwardResponse:
    itemsize = 4 if dtype == pb.DATA_TYPE_FLOAT32 else 2
    output = pb.Tensor(dtype=pb.DataType.Name(dtype), shape=[count, H], data=bytes(count * H * itemsize))
    return pb.ForwardResponse(output=output, weights_version=version)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": ""}, r"layer: is '', expected the name"),
        ({"layer": 3}, r"layer: is 3, expected the name"),
        ({"layer": "\ud800"}, r"layer: .*not valid Unicode"),
        ({"routing_logits": None}, r"routing_logits: expected either .*neither was given"),
        ({"topk_ids": IDS}, r"routing_logits: expected either .*both were given"),
        ({"routing_logits": None, "topk_ids": IDS}, r"topk_weights: is missing"),
        ({"routing_logits": None, "topk_weights": WEIGHTS}, r"topk_ids: is missing"),
        ({"hidden_states": HIDDEN[0]}, r"hidden_states\.shape: is \[4\], expected \[any, any\]"),
        ({"hidden_states": np.float32(1)}, r"hidden_states: is a float32, expected a numpy array"),
        ({"hidden_states": HIDDEN.astype(np.int32)}, r"hidden_states\.dtype: is int32, expected float8_e4m3fn or"),
        ({"routing_logits": LOGITS[:3]}, r"routing_logits\.shape: is \[3, 6\], expected \[5, any\]"),
        ({"routing_logits": LOGITS.astype(np.float16)}, r"routing_logits\.dtype: is float16, expected float32 or bfl"),
        (
            {"routing_logits": None, "topk_ids": IDS, "topk_weights": WEIGHTS[:, :1]},
            r"topk_weights\.shape: is \[5, 1\], expected \[5, 2\]",
        ),
        (
            {"routing_logits": None, "topk_ids": IDS.astype(np.float32), "topk_weights": WEIGHTS},
            r"topk_ids\.dtype: is float32, expected int32",
        ),
        ({"output_dtype": "int32"}, r"output_dtype: is int32, expected bfloat16 or float32 or float16"),
        ({"weights_version": 0}, r"weights_version: is 0, expected 1"),
        ({"weights_version": 1.5}, r"weights_version: is 1.5, expected 1"),
        ({"weights_version": "1"}, r"weights_version: is '1', expected 1"),
        ({"weights_version": 2**64}, r"weights_version: is 18446744073709551616"),
    ],
)
def test_argument_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(expertd.InvalidRequestError, match=message) as raised:
        prepare(request(**changes))
    assert raised.value.violations


OUT = np.zeros((T, H), ml_dtypes.bfloat16)
BOTH = np.zeros(T * H * 2, np.uint8)
OUT_OF_BOTH = BOTH.view(ml_dtypes.bfloat16).reshape(T, H)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": OUT.astype(np.float32)}, r"out\.dtype: is float32, expected bfloat16, the output_dtype"),
        ({"out": OUT, "output_dtype": "float32"}, r"out\.dtype: is bfloat16, expected float32"),
        ({"out": OUT[:4]}, r"out\.shape: is \[4, 4\], expected that of hidden_states, \[5, 4\]"),
        ({"out": OUT.reshape(-1)}, r"out\.shape: is \[20\]"),
        ({"out": [[0.0]]}, r"out: is a list, expected a numpy array or a torch tensor"),
        ({"out": np.zeros((H, T), ml_dtypes.bfloat16).T}, r"out: is not contiguous"),
        ({"out": np.zeros((T, 2 * H), ml_dtypes.bfloat16)[:, ::2]}, r"out: is not contiguous"),
        ({"out": np.zeros((T, H), ">f4"), "output_dtype": "float32"}, r"out: is not contiguous .* native byte order"),
        ({"out": torch.zeros((H, T), dtype=torch.bfloat16).T}, r"out: is not contiguous"),
        ({"out": np.broadcast_to(np.zeros((), ml_dtypes.bfloat16), (T, H))}, r"out: is not contiguous"),
        ({"out": np.frombuffer(bytes(T * H * 2), ml_dtypes.bfloat16).reshape(T, H)}, r"out: is read-only"),
        ({"out": OUT, "do_finalize": False}, r"out: is given with do_finalize=False"),
        (
            {
                "out": OUT_OF_BOTH,
                "hidden_states": BOTH[: T * H].view(FP8).reshape(T, H),
            },
            r"out: shares memory with hidden_states, expected an array apart",
        ),
        (
            {
                "out": OUT_OF_BOTH,
                "routing_logits": BOTH[-T * 2 :].view(ml_dtypes.bfloat16).reshape(T, 1),
            },
            r"out: shares memory with routing_logits",
        ),
    ],
)
def test_out_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(expertd.InvalidRequestError, match=message) as raised:
        prepare(request(**changes))
    assert raised.value.violations


@pytest.mark.parametrize("max_rows", [1, 2, 5])
@pytest.mark.parametrize("kind", ["numpy", "torch", "a part of another"])
def test_parts_of_the_output_are_written_where_the_caller_wants_them(max_rows: int, kind: str) -> None:
    whole = np.full((T + 2, H), -1, ml_dtypes.bfloat16)
    out: Any = np.full((T, H), -1, ml_dtypes.bfloat16)
    if kind == "torch":
        out = torch.full((T, H), -1.0, dtype=torch.bfloat16)
    elif kind == "a part of another":
        out = whole[1:-1]
    plan = Plan(prepare(request(out=out)), max_rows)
    rows = np.arange(T * H).reshape(T, H).astype(ml_dtypes.bfloat16)
    for index, part in plan.unanswered().items():
        assert part.encode().to_bytes() == Plan(prepare(request()), max_rows).unanswered()[index].encode().to_bytes()
        data = rows[part.start : part.stop].tobytes()
        output = pb.Tensor(dtype=pb.DATA_TYPE_BFLOAT16, shape=[part.stop - part.start, H], data=data)
        plan.answer(index, pb.ForwardResponse(output=output, weights_version=1))
    assert plan.result().output is out
    assert np.array_equal(to_wire("out", out)[0].numpy(), rows)
    assert (whole[[0, -1]] == -1).all()


def test_an_answer_that_does_not_fit_is_not_written() -> None:
    for wrong in (answer(T + 1), answer(dtype=pb.DATA_TYPE_FLOAT32)):
        out = np.full((T, H), -1, ml_dtypes.bfloat16)
        plan = Plan(prepare(request(out=out)), T)
        plan.answer(0, wrong)
        with pytest.raises(expertd.ProtocolError, match="output of the answer"):
            plan.result()
        assert (out == -1).all()


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_parts_cover_the_request_once(max_rows: int, sizes: list[int]) -> None:
    hidden = np.arange(T * H, dtype=np.uint8).view(FP8).reshape(T, H)
    parts = Plan(prepare(request(hidden_states=hidden)), max_rows).unanswered()
    sent = [pb.ForwardRequest.FromString(parts[index].encode().to_bytes()) for index in range(len(parts))]
    assert [message.hidden_states.shape[0] for message in sent] == sizes
    assert b"".join(message.hidden_states.data for message in sent) == hidden.tobytes()
    assert all(list(message.routing_logits.shape) == [size, E] for message, size in zip(sent, sizes, strict=True))


def test_empty_request_is_one_empty_part() -> None:
    plan = Plan(prepare(request(hidden_states=HIDDEN[:0], routing_logits=LOGITS[:0])), 8)
    assert [(part.start, part.stop) for part in plan.unanswered().values()] == [(0, 0)]
    plan.answer(0, answer(0))
    assert plan.result().output.shape == (0, H)


def layer(**changes: Any) -> expertd.LayerInfo:
    fields: dict[str, Any] = {
        "name": "a", "hidden_size": H, "num_experts": E, "top_k": K, "state": pb.LAYER_STATE_READY,
        "routing_method": pb.ROUTING_METHOD_SIGMOID, "activation": pb.ACTIVATION_RELU2,
    }  # fmt: skip
    return layer_info(pb.LayerInfo(**{**fields, **changes}))


def test_parts_shrink_until_every_message_fits() -> None:
    prepared = prepare(request())
    overhead = 16 * 1024
    largest_row = H * 4 + 16 * K
    assert prepared.max_rows(layer(), 100, overhead + 3 * largest_row) == 3
    assert prepared.max_rows(layer(), 2, overhead + 3 * largest_row) == 2
    assert prepared.max_rows(layer(), 100, overhead) == 1, (
        "a single token is always sent; the server says what it thinks"
    )
    separate = prepare(request(do_finalize=False))
    assert separate.max_rows(layer(top_k=100), 10**6, overhead + 10 * (H * 2 + 16) * 100) == 10


def test_enum_values_are_the_published_ids() -> None:
    info = layer()
    assert (info.routing_method, info.activation) == (expertd.RoutingMethod.SIGMOID, expertd.Activation.RELU2)
    for method in expertd.RoutingMethod:
        wire = getattr(pb, f"ROUTING_METHOD_{method.name}")
        assert layer(routing_method=wire).routing_method is method
    for activation in expertd.Activation:
        wire = getattr(pb, f"ACTIVATION_{activation.name}")
        assert layer(activation=wire).activation is activation


@pytest.mark.parametrize("changes", [{"routing_method": 0}, {"activation": 99}, {"state": 0}])
def test_enum_value_of_a_newer_server_is_a_protocol_error(changes: dict[str, Any]) -> None:
    with pytest.raises(expertd.ProtocolError, match="upgrade"):
        layer(**changes)


def test_parts_of_an_older_version_are_asked_again() -> None:
    plan = Plan(prepare(request()), 2)
    for index, version in enumerate([1, 2, 1]):
        assert index in plan.unanswered()
        plan.answer(index, answer(1 if index == 2 else 2, version=version))
    again = plan.unanswered()
    assert {index: part.weights_version for index, part in again.items()} == {0: 2, 2: 2}
    with pytest.raises(expertd.ProtocolError, match="weights_version of the answer is 1, asked for 2"):
        plan.answer(0, answer(2, version=1))
    plan.answer(0, answer(2, version=2))
    plan.answer(2, answer(1, version=2))
    assert plan.unanswered() == {}
    assert plan.result().weights_version == 2


def test_wrong_version_is_never_taken_for_the_asked_one() -> None:
    plan = Plan(prepare(request(weights_version=7)), 8)
    assert plan.unanswered()[0].weights_version == 7
    with pytest.raises(expertd.ProtocolError, match="asked for 7"):
        plan.answer(0, answer(version=8))


@pytest.mark.parametrize(
    ("changes", "response", "message"),
    [
        ({}, answer(T - 1), r"output of the answer has shape \(4, 4\), expected \(5, 4\)"),
        ({}, answer(dtype=pb.DATA_TYPE_FLOAT32), "output of the answer is float32, asked for DATA_TYPE_BFLOAT16"),
        ({}, pb.ForwardResponse(), "output of the answer"),
        ({"return_routing": True}, answer(), "expert_weights of the answer"),
        ({"do_finalize": False}, answer(), "expert_weights of the answer"),
    ],
)
def test_answer_that_does_not_fit_is_a_protocol_error(
    changes: dict[str, Any], response: pb.ForwardResponse, message: str
) -> None:
    plan = Plan(prepare(request(**changes)), 8)
    plan.answer(0, response)
    with pytest.raises(expertd.ProtocolError, match=message):
        plan.result()


@pytest.mark.parametrize(
    ("rows", "index", "message"),
    [
        (3, [0, 1, 2, 3, -1, -1, -1, -1, -1, -1], "spans -1 to 3, expected -1 to 2"),
        (3, [0, 1, -2, -1, -1, -1, -1, -1, -1, -1], "spans -2 to 1"),
        (3, [0, 1, 2], r"has shape \(3,\) beside expert_weights \(5, 2\)"),
    ],
)
def test_index_outside_the_rows_is_a_protocol_error(rows: int, index: list[int], message: str) -> None:
    bfloat16, int32 = pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_INT32
    plan = Plan(prepare(request(do_finalize=False)), 8)
    plan.answer(
        0,
        pb.ForwardResponse(
            weights_version=1,
            expert_weights=pb.Tensor(dtype=bfloat16, shape=[T, K], data=bytes(T * K * 2)),
            gemm2_output=pb.Tensor(dtype=bfloat16, shape=[rows, H], data=bytes(rows * H * 2)),
            expanded_idx_to_permuted_idx=pb.Tensor(
                dtype=int32, shape=[len(index)], data=np.array(index, dtype=np.int32).tobytes()
            ),
        ),
    )
    with pytest.raises(expertd.ProtocolError, match=message):
        plan.result()


def test_timeouts_on_the_wire_are_never_zero() -> None:
    assert [timeout_ms(seconds) for seconds in (-1.0, 0.0, 0.0004, 1.5, 1e12)] == [1, 1, 1, 1500, 2**32 - 1]
