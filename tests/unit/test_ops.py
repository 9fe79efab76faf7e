"""The operator: its published signature, its results, and every error it names."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from cases import Case, every_method, make_case, make_hidden_states, make_spec, relative_error, spec_id

from expertd_server import reference
from expertd_server.backend_cpu import TorchBackend
from expertd_server.ops import trtllm_fp8_per_tensor_scale_moe, trtllm_fp8_per_tensor_scale_routed_moe
from expertd_server.types import Activation, LayerSpec, RoutingMethod

pytestmark = pytest.mark.usefixtures("two_threads")
PUBLISHED = (
    "routing_logits, routing_bias, hidden_states, gemm1_weights, output1_scales_scalar, output1_scales_gate_scalar, "
    "gemm2_weights, output2_scales_scalar, num_experts, top_k, n_group, topk_group, intermediate_size, "
    "local_expert_offset, local_num_experts, routed_scaling_factor, use_routing_scales_on_input, "
    "routing_method_type=0, do_finalize=True, enable_pdl=None, tune_max_num_tokens=8192, activation_type=3, "
    "norm_topk_prob=True, routing_replay_out=None"
)


def arguments(case: Case, **changes: Any) -> dict[str, Any]:
    """The operator's arguments for a case."""
    spec, weights = case.spec, case.weights
    return {
        "routing_logits": case.routing_logits,
        "routing_bias": weights.routing_bias,
        "hidden_states": case.hidden_states,
        "gemm1_weights": weights.gemm1_weights,
        "output1_scales_scalar": weights.output1_scales_scalar,
        "output1_scales_gate_scalar": weights.output1_scales_gate_scalar,
        "gemm2_weights": weights.gemm2_weights,
        "output2_scales_scalar": weights.output2_scales_scalar,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "n_group": spec.n_group,
        "topk_group": spec.topk_group,
        "intermediate_size": spec.intermediate_size,
        "local_expert_offset": spec.local_expert_offset,
        "local_num_experts": spec.local_num_experts,
        "routed_scaling_factor": spec.routed_scaling_factor,
        "use_routing_scales_on_input": spec.use_routing_scales_on_input,
        "routing_method_type": int(spec.routing_method),
        "activation_type": int(spec.activation),
        "norm_topk_prob": spec.norm_topk_prob,
        **changes,
    }


def routed_arguments(case: Case, **changes: Any) -> dict[str, Any]:
    """The routed operator's arguments for a case."""
    values = arguments(case)
    del values["routing_logits"], values["routing_bias"]
    expected = reference.route(case.spec, case.routing_logits, case.weights.routing_bias)
    return {"topk_ids": expected[0], "topk_weights": expected[1], **values, **changes}


def positional_signature(function: object) -> str:
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.kind is not p.KEYWORD_ONLY
    )


def test_the_signature_is_the_published_one() -> None:
    assert positional_signature(trtllm_fp8_per_tensor_scale_moe) == PUBLISHED
    routed = PUBLISHED.replace("routing_logits, routing_bias", "topk_ids, topk_weights")
    assert positional_signature(trtllm_fp8_per_tensor_scale_routed_moe) == routed


@pytest.mark.parametrize("spec", every_method()[:-1], ids=spec_id)
def test_agrees_with_the_reference(spec: LayerSpec) -> None:
    case = make_case(spec, 12, seed=21)
    expected = reference.forward(spec, case.weights, case.hidden_states, routing_logits=case.routing_logits)
    got = trtllm_fp8_per_tensor_scale_moe(**arguments(case))
    assert isinstance(got, torch.Tensor)
    assert relative_error(got, expected.output) <= 4e-3, case.name
    routed = trtllm_fp8_per_tensor_scale_routed_moe(**routed_arguments(case))
    assert isinstance(routed, torch.Tensor)
    assert torch.equal(routed, got), case.name


@pytest.mark.parametrize("activation", Activation)
def test_gives_the_bits_of_the_backend(activation: Activation) -> None:
    case = make_case(make_spec(activation=activation), 12, seed=22).slice(3, 10)
    cpu = TorchBackend()
    layer = cpu.prepare(case.spec, case.weights)
    expected = cpu.forward(layer, case.hidden_states, routing_logits=case.routing_logits)
    assert expected.output is not None
    got = trtllm_fp8_per_tensor_scale_moe(**arguments(case))
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, expected.output)


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        make_spec(),
        make_spec(hidden_size=37, intermediate_size=21, num_experts=5, top_k=3, activation=Activation.GEGLU),
        make_spec(routing_method=RoutingMethod.DEEPSEEK_V3, n_group=4, topk_group=2, local_num_experts=9),
        make_spec(routing_method=RoutingMethod.LLAMA4, top_k=1, use_routing_scales_on_input=True),
        make_spec(hidden_size=512, intermediate_size=256, num_experts=4, top_k=2),
    ],
    ids=spec_id,
)
def test_a_token_alone_and_in_batches_of_2_to_1000(spec: LayerSpec, is_routed: bool) -> None:
    """What stands in a call beside a token, and how much of it, changes no bit of the token's output."""
    pool = dataclasses.replace(spec, local_num_experts=spec.num_experts)
    case = make_case(pool, 1000, seed=28).slice(0, spec.num_local)
    values = routed_arguments(case) if is_routed else arguments(case)
    of_tokens = [name for name in ("routing_logits", "topk_ids", "topk_weights") if name in values]

    def output_of(rows: torch.Tensor) -> torch.Tensor:
        """float32: it shows differences that rounding to bfloat16 would hide."""
        hidden_states = case.hidden_states.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        of_rows = {name: values[name][rows] for name in of_tokens}
        operator = trtllm_fp8_per_tensor_scale_routed_moe if is_routed else trtllm_fp8_per_tensor_scale_moe
        got = operator(**{**values, **of_rows, "hidden_states": hidden_states}, output_dtype=torch.float32)
        assert isinstance(got, torch.Tensor)
        return got

    together = output_of(torch.arange(1000))
    generator = torch.Generator().manual_seed(28)
    for size in (*[1] * 16, 2, 3, 5, 8, 16, 33, 64, 100, 127, 500, 1000):
        company = torch.randperm(1000, generator=generator)[:size]
        got = output_of(company)
        differ = (got != together[company]).any(dim=1)
        assert not differ.any(), f"tokens {company[differ][:8].tolist()} of {size}, {case.name}"


@pytest.mark.parametrize("is_routed", [False, True])
def test_do_finalize_false_returns_three_tensors(is_routed: bool) -> None:
    case = make_case(make_spec(), 6, seed=23)
    if is_routed:
        got = trtllm_fp8_per_tensor_scale_routed_moe(**routed_arguments(case, do_finalize=False))
    else:
        got = trtllm_fp8_per_tensor_scale_moe(**arguments(case, do_finalize=False))
    assert isinstance(got, list)
    gemm2_output, expert_weights, expanded_idx_to_permuted_idx = got
    assert gemm2_output.dtype == expert_weights.dtype == torch.bfloat16
    assert expanded_idx_to_permuted_idx.dtype == torch.int32
    assert gemm2_output.shape[1] == case.spec.hidden_size
    assert expert_weights.shape == (6, 4)
    assert expanded_idx_to_permuted_idx.shape == (24,)
    expected = reference.forward(case.spec, case.weights, case.hidden_states, routing_logits=case.routing_logits)
    rows = gemm2_output[expanded_idx_to_permuted_idx.long()].view(6, 4, -1)
    assert relative_error(rows, expected.g) <= 4e-3


def test_extensions() -> None:
    case = make_case(make_spec(), 6, seed=24)
    wide = make_hidden_states(case.spec, 6, seed=24)
    out = torch.empty(6, case.spec.hidden_size, dtype=torch.float16)
    replay = torch.full((8, 4), -7, dtype=torch.int16)
    got = trtllm_fp8_per_tensor_scale_moe(
        **arguments(case, hidden_states=wide, enable_pdl=True, tune_max_num_tokens=1, routing_replay_out=replay),
        hidden_states_scale=16.0,
        output_dtype=torch.float16,
        out=out,
        num_valid_tokens=torch.tensor(6, dtype=torch.int32),
    )
    assert got is out
    same = trtllm_fp8_per_tensor_scale_moe(**arguments(case), output_dtype=torch.float16)
    assert isinstance(same, torch.Tensor)
    assert torch.equal(out, same)  # the case's own hidden states are quantised with 16, too
    assert replay[6:].eq(-7).all()
    assert replay[:6].ge(0).all()


def test_no_tokens() -> None:
    case = make_case(make_spec(), 0, seed=25)
    got = trtllm_fp8_per_tensor_scale_moe(**arguments(case))
    assert isinstance(got, torch.Tensor)
    assert got.shape == (0, case.spec.hidden_size)


def test_the_arguments_are_not_written() -> None:
    case = make_case(make_spec(), 6, seed=26)
    given = arguments(case)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    trtllm_fp8_per_tensor_scale_moe(**given)
    for name, tensor in before.items():
        assert torch.equal(given[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_torch_settings_are_left_as_they_were() -> None:
    def settings() -> tuple[object, ...]:
        return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.quantized.engine

    before = settings()
    trtllm_fp8_per_tensor_scale_moe(**arguments(make_case(make_spec(), 6, seed=27)))
    assert settings() == before


CASE = make_case(make_spec(), 6, seed=30)
FP8 = torch.float8_e4m3fn
INFINITE = torch.ones(16).index_fill(0, torch.tensor([3]), torch.inf)


def _bias(method: RoutingMethod, bias: torch.Tensor) -> dict[str, Any]:
    return {"routing_method_type": int(method), "routing_bias": bias}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"routing_logits": None}, TypeError, "routing_logits is NoneType, expected a torch.Tensor"),
        ({"routing_logits": torch.zeros(96)}, ValueError, "routing_logits has 1 dimensions (shape (96,)), expected 2"),
        ({"routing_logits": torch.zeros(5, 16)}, ValueError, "routing_logits has shape (5, 16), expected (6, 16)"),
        ({"routing_logits": torch.zeros(6, 16).half()}, TypeError, "routing_logits is torch.float16, expected"),
        ({"routing_logits": torch.zeros(6, 16).double()}, TypeError, "routing_logits is torch.float64, expected"),
        ({"routing_logits": torch.zeros(16, 6).t()}, ValueError, "routing_logits has strides (1, 6), expected a conti"),
        ({"routing_logits": torch.zeros(6, 16, device="meta")}, ValueError, "routing_logits is on meta, expected cpu"),
        ({"routing_bias": torch.zeros(16)}, ValueError, "routing_bias is given, but routing method 0 (DEFAULT)"),
        (_bias(RoutingMethod.MINIMAX2, torch.zeros(15)), ValueError, "routing_bias has shape (15,), expected (16,)"),
        (_bias(RoutingMethod.MINIMAX2, torch.zeros(16).half()), TypeError, "routing_bias is torch.float16, expected"),
        (_bias(RoutingMethod.DEEPSEEK_V3, INFINITE), ValueError, "routing_bias[3] is inf, expected a finite number"),
        ({"hidden_states": torch.zeros(6, 128).bfloat16()}, TypeError, "hidden_states is torch.bfloat16, expected"),
        ({"hidden_states": torch.zeros(6, 128).double()}, TypeError, "hidden_states is torch.float64, expected"),
        (
            {"hidden_states": torch.zeros(6, 1, 128).to(FP8)},
            ValueError,
            "hidden_states has shape (6, 1, 128), expected",
        ),
        ({"hidden_states": torch.zeros(128, 6).to(FP8).t()}, ValueError, "hidden_states has strides (1, 6), expected"),
        ({"hidden_states": torch.zeros(6, 64).to(FP8)}, ValueError, "gemm1_weights has shape (16, 128, 128), expected"),
        ({"gemm1_weights": torch.zeros(16, 128, 128)}, TypeError, "gemm1_weights is torch.float32, expected torch.flo"),
        ({"gemm1_weights": torch.zeros(16, 64, 128).to(FP8)}, ValueError, "gemm1_weights has shape (16, 64, 128), exp"),
        ({"gemm2_weights": torch.zeros(16, 64, 128).to(FP8)}, ValueError, "gemm2_weights has shape (16, 64, 128), exp"),
        ({"gemm2_weights": torch.zeros(16, 64, 128).to(FP8).mT}, ValueError, "gemm2_weights has strides"),
        ({"output1_scales_scalar": None}, TypeError, "output1_scales_scalar is NoneType, expected a torch.Tensor"),
        ({"output1_scales_scalar": torch.ones(16).half()}, TypeError, "output1_scales_scalar is torch.float16, expec"),
        ({"output1_scales_scalar": torch.ones(1)}, ValueError, "output1_scales_scalar has shape (1,), expected (16,)"),
        ({"output1_scales_gate_scalar": INFINITE}, ValueError, "output1_scales_gate_scalar[3] is inf, expected a fin"),
        ({"output2_scales_scalar": INFINITE * torch.nan}, ValueError, "output2_scales_scalar[0] is nan, expected a f"),
        ({"num_experts": 0}, ValueError, "num_experts is 0, expected at least 1"),
        ({"num_experts": 1025}, ValueError, "num_experts is 1025, expected at most 1024"),
        ({"num_experts": 16.0}, TypeError, "num_experts is 16.0, expected an int"),
        ({"num_experts": 17}, ValueError, "routing_logits has shape (6, 16), expected (6, 17)"),
        ({"top_k": 0}, ValueError, "top_k is 0, expected at least 1"),
        ({"top_k": 17}, ValueError, "top_k is 17, expected at most min(num_experts, 32) = 16"),
        ({"top_k": None}, TypeError, "top_k is None, expected an int"),
        ({"top_k": True}, TypeError, "top_k is True, expected an int"),
        ({"intermediate_size": 0}, ValueError, "intermediate_size is 0, expected at least 1"),
        ({"local_expert_offset": -1}, ValueError, "local_expert_offset is -1, expected at least 0"),
        ({"local_expert_offset": 1}, ValueError, "local_num_experts is 16 at local_expert_offset 1, expected a slice"),
        ({"local_num_experts": 0}, ValueError, "local_num_experts is 0 at local_expert_offset 0, expected a slice"),
        ({"local_num_experts": None}, TypeError, "local_num_experts is None, expected an int"),
        ({"routing_method_type": 9}, ValueError, "routing_method_type is 9, expected one of 0 (DEFAULT)"),
        ({"routing_method_type": -1}, ValueError, "routing_method_type is -1, expected one of 0 (DEFAULT)"),
        ({"routing_method_type": 3}, ValueError, "top_k is 4, routing method 3 (Llama4) needs top_k = 1"),
        ({"routing_method_type": True}, TypeError, "routing_method_type is True, expected an int"),
        ({"use_routing_scales_on_input": None}, TypeError, "use_routing_scales_on_input is None, expected True or Fal"),
        ({"norm_topk_prob": "no"}, TypeError, "norm_topk_prob is 'no', expected True or False"),
        ({"do_finalize": None}, TypeError, "do_finalize is None, expected True or False"),
        ({"enable_pdl": "x"}, TypeError, "enable_pdl is 'x', expected True, False or None"),
        ({"use_routing_scales_on_input": True}, ValueError, "top_k is 4, use_routing_scales_on_input needs top_k = 1"),
        ({"activation_type": 1}, ValueError, "activation_type is 1, expected one of 0 (GELU)"),
        ({"activation_type": 6}, ValueError, "gemm1_weights has shape (16, 128, 128), expected (16, 64, 128)"),
        ({"n_group": -3}, ValueError, "n_group is -3, expected at least 0, or None"),
        ({"n_group": False}, TypeError, "n_group is False, expected an int"),
        ({"topk_group": -1}, ValueError, "topk_group is -1, expected at least 0, or None"),
        ({"routing_method_type": 2, "n_group": -4}, ValueError, "n_group is -4, expected at least 0, or None"),
        ({"routing_method_type": 2, "n_group": 3, "topk_group": 1}, ValueError, "n_group is 3, expected a divisor of"),
        ({"routing_method_type": 2, "n_group": 16, "topk_group": 9}, ValueError, "n_group is 16, expected a divisor"),
        ({"routing_method_type": 2, "n_group": 4, "topk_group": 5}, ValueError, "topk_group is 5, expected 1 to n_gro"),
        (
            {"routing_method_type": 2, "n_group": 8, "topk_group": 1},
            ValueError,
            "top_k is 4, but 1 groups of 2 experts",
        ),
        ({"routed_scaling_factor": torch.inf}, ValueError, "routed_scaling_factor is inf, expected a finite number"),
        ({"routed_scaling_factor": "x"}, TypeError, "routed_scaling_factor is 'x', expected a number or None"),
        ({"routed_scaling_factor": True}, TypeError, "routed_scaling_factor is True, expected a number or None"),
        ({"hidden_states_scale": "x"}, TypeError, "hidden_states_scale is 'x', expected a number or None"),
        ({"hidden_states_scale": 0.0}, ValueError, "hidden_states_scale is 0.0, expected a positive finite number"),
        ({"tune_max_num_tokens": 0}, ValueError, "tune_max_num_tokens is 0, expected at least 1"),
        ({"output_dtype": torch.float64}, TypeError, "output_dtype is torch.float64, expected torch.bfloat16 or"),
        ({"out": torch.empty(6, 128)}, TypeError, "out is torch.float32, expected torch.bfloat16"),
        ({"out": torch.empty(5, 128).bfloat16()}, ValueError, "out has shape (5, 128), expected (6, 128)"),
        ({"out": torch.empty(128, 6).bfloat16().t()}, ValueError, "out has strides (1, 6), expected a contiguous"),
        ({"out": 3, "do_finalize": False}, TypeError, "out is int, expected a torch.Tensor"),
        ({"out": torch.empty(6, 128).bfloat16(), "do_finalize": False}, ValueError, "out has shape (6, 128), expected"),
        ({"routing_replay_out": torch.empty(6, 4).int()}, TypeError, "routing_replay_out is torch.int32, expected"),
        (
            {"routing_replay_out": torch.empty(5, 4).short()},
            ValueError,
            "routing_replay_out has shape (5, 4), expected",
        ),
        (
            {"routing_replay_out": torch.empty(6, 3).short()},
            ValueError,
            "routing_replay_out has shape (6, 3), expected",
        ),
        ({"routing_replay_out": torch.empty(24).short()}, ValueError, "routing_replay_out has 1 dimensions"),
        ({"num_valid_tokens": 3}, TypeError, "num_valid_tokens is int, expected a torch.Tensor"),
        ({"num_valid_tokens": torch.tensor(3)}, TypeError, "num_valid_tokens is torch.int64, expected torch.int32"),
        ({"num_valid_tokens": torch.tensor(7).int()}, ValueError, "num_valid_tokens is 7, expected 0 to 6"),
        ({"num_valid_tokens": torch.tensor(-1).int()}, ValueError, "num_valid_tokens is -1, expected 0 to 6"),
        ({"num_valid_tokens": torch.tensor([3]).int()}, ValueError, "num_valid_tokens has 1 dimensions"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        trtllm_fp8_per_tensor_scale_moe(**arguments(CASE, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk_ids": None}, TypeError, "topk_ids is NoneType, expected a torch.Tensor"),
        ({"topk_weights": None}, TypeError, "topk_weights is NoneType, expected a torch.Tensor"),
        ({"topk_ids": torch.zeros(6, 4).long()}, TypeError, "topk_ids is torch.int64, expected torch.int32"),
        ({"topk_ids": torch.zeros(6, 3).int()}, ValueError, "topk_ids has shape (6, 3), expected (6, 4)"),
        (
            {"topk_ids": torch.full((6, 4), 16).int()},
            ValueError,
            "topk_ids[0, 0] is 16, expected -1 (empty slot) to 15",
        ),
        (
            {"topk_ids": torch.full((6, 4), -2).int()},
            ValueError,
            "topk_ids[0, 0] is -2, expected -1 (empty slot) to 15",
        ),
        ({"topk_weights": torch.zeros(5, 4)}, ValueError, "topk_weights has shape (5, 4), expected (6, 4)"),
        (
            {"topk_weights": torch.zeros(6, 4).half()},
            TypeError,
            "topk_weights is torch.float16, expected torch.float32",
        ),
        ({"routing_method_type": 9}, ValueError, "routing_method_type is 9, expected one of"),
        ({"top_k": True}, TypeError, "top_k is True, expected an int"),
        ({"do_finalize": 1}, TypeError, "do_finalize is 1, expected True or False"),
    ],
)
def test_errors_of_routed_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        trtllm_fp8_per_tensor_scale_routed_moe(**routed_arguments(CASE, **changes))


def test_hidden_states_need_a_scale_unless_they_are_fp8() -> None:
    weights = dataclasses.replace(CASE.weights, hidden_states_scale=1.0)
    case = dataclasses.replace(CASE, weights=weights, hidden_states=torch.zeros(6, 128).half())
    trtllm_fp8_per_tensor_scale_moe(**arguments(case), hidden_states_scale=1.0)
    with pytest.raises(TypeError, match="because no hidden_states_scale says how to quantise it"):
        trtllm_fp8_per_tensor_scale_moe(**arguments(case))
