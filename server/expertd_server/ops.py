"""The operator: one call with everything it needs, under the published name and signature.

A server prepares its layers once and calls a backend (`backend.py`). These functions are for those who hold the tensors
themselves: they check every argument, on CPU tensors convert only the experts that the tokens reach, and keep nothing.
"""

from __future__ import annotations

import functools
from numbers import Real

import torch

from expertd_server.backend import Backend, select_backend
from expertd_server.backend_cpu import TorchBackend
from expertd_server.checks import check_forward_args
from expertd_server.tuning import is_autotuning
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["trtllm_fp8_per_tensor_scale_moe", "trtllm_fp8_per_tensor_scale_routed_moe"]


def trtllm_fp8_per_tensor_scale_moe(  # noqa: PLR0917 (the published signature)
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    output1_scales_scalar: torch.Tensor,
    output1_scales_gate_scalar: torch.Tensor,
    gemm2_weights: torch.Tensor,
    output2_scales_scalar: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    use_routing_scales_on_input: bool,
    routing_method_type: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    tune_max_num_tokens: int = 8192,
    activation_type: int = 3,
    norm_topk_prob: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    *,
    hidden_states_scale: float | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
) -> list[torch.Tensor] | torch.Tensor:
    """Route T tokens to the best top_k of num_experts FP8 experts and sum what the local ones return.

    T num_tokens, H hidden_size, E num_experts, L local_num_experts, K top_k, I intermediate_size, M = 2 I with a gated
    activation (rows 0 ... I-1 the linear half, rows I ... 2I-1 the gate half), else I. All tensors contiguous, on one
    device.

    routing_logits: [T, E] float32 or bfloat16.
    routing_bias: [E] float32 or bfloat16, with routing methods 2 and 7 only; or None.
    hidden_states: [T, H] float8_e4m3fn; with hidden_states_scale also bfloat16, float16 or float32, which is quantised
        as fp8(x * hidden_states_scale).
    gemm1_weights: [L, M, H] float8_e4m3fn. gemm2_weights: [L, H, I] float8_e4m3fn. Plain rows, not shuffled.
    output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar: [L] float32, finite.
    n_group, topk_group: groups of routing method 2; None, 0 or 1 group: no grouping.
    local_expert_offset: global id of the first local expert.
    routed_scaling_factor: for routing methods 2 and 7; None: 1.0.
    use_routing_scales_on_input: scale the first product by the routing weight instead of the output; K must be 1.
    routing_method_type: 0 Default, 1 Renormalize, 2 DeepSeekV3, 3 Llama4, 4 RenormalizeNaive, 5 TopK, 6 SigmoidRenorm,
        7 MiniMax2, 8 Sigmoid (`types.RoutingMethod`).
    activation_type: 0 Gelu, 3 Swiglu, 4 Geglu, 6 Relu2, 7 Identity (`types.Activation`).
    norm_topk_prob: False: methods 4 and 6 do not divide by the sum of the selected scores.
    routing_replay_out: [>= T, K] int16, rows 0 ... T-1 get the selected global ids.
    enable_pdl: programmatic dependent launch of the Hopper kernels; no effect elsewhere.
    tune_max_num_tokens: inside `tuning.autotune` the Hopper kernels are tuned for up to so many tokens, at least 1; no
        effect outside of it and elsewhere.
    output_dtype: bfloat16, float32 or float16, of the finalized output. out: [T, H] of that type, written and returned.
    num_valid_tokens: int32 scalar on the device, at most T; rows at or past it are neither read nor written.

    Returns [T, H] in output_dtype; with do_finalize=False instead [gemm2_output, expert_weights,
    expanded_idx_to_permuted_idx]: [P, H] bfloat16 grouped by local expert, [T, K] bfloat16, and [T * K] int32, the row
    of gemm2_output for slot t * K + k or -1 where the expert is not local.
    Raises TypeError or ValueError naming the argument, its value and what was expected.
    """
    spec, weights = _layer(
        num_experts=num_experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        intermediate_size=intermediate_size,
        local_expert_offset=local_expert_offset,
        local_num_experts=local_num_experts,
        routed_scaling_factor=routed_scaling_factor,
        use_routing_scales_on_input=use_routing_scales_on_input,
        routing_method_type=routing_method_type,
        activation_type=activation_type,
        norm_topk_prob=norm_topk_prob,
        tune_max_num_tokens=tune_max_num_tokens,
        hidden_states=hidden_states,
        gemm1_weights=gemm1_weights,
        output1_scales_scalar=output1_scales_scalar,
        output1_scales_gate_scalar=output1_scales_gate_scalar,
        gemm2_weights=gemm2_weights,
        output2_scales_scalar=output2_scales_scalar,
        routing_bias=routing_bias,
        hidden_states_scale=hidden_states_scale,
    )
    return _run(
        spec,
        weights,
        hidden_states,
        routing_logits=_tensor("routing_logits", routing_logits),
        do_finalize=do_finalize,
        enable_pdl=enable_pdl,
        routing_replay_out=routing_replay_out,
        output_dtype=output_dtype,
        out=out,
        num_valid_tokens=num_valid_tokens,
        tune_max_num_tokens=tune_max_num_tokens,
    )


def trtllm_fp8_per_tensor_scale_routed_moe(  # noqa: PLR0917 (the published signature)
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    output1_scales_scalar: torch.Tensor,
    output1_scales_gate_scalar: torch.Tensor,
    gemm2_weights: torch.Tensor,
    output2_scales_scalar: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    use_routing_scales_on_input: bool,
    routing_method_type: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    tune_max_num_tokens: int = 8192,
    activation_type: int = 3,
    norm_topk_prob: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    *,
    hidden_states_scale: float | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
) -> list[torch.Tensor] | torch.Tensor:
    """The same layer for tokens that the caller has routed.

    topk_ids: [T, K] int32 global expert ids, -1 an empty slot. An expert may come twice in a row: its outputs add up.
    topk_weights: [T, K] float32 or bfloat16, rounded to bfloat16 before use.

    Everything else as in `trtllm_fp8_per_tensor_scale_moe`, whose remaining arguments it shares so that a caller can
    change over by exchanging the first two. Those that describe the routing (n_group, topk_group,
    routed_scaling_factor, routing_method_type, norm_topk_prob) are checked and then have no effect: the weights come as
    they are to be used.
    """
    spec, weights = _layer(
        num_experts=num_experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        intermediate_size=intermediate_size,
        local_expert_offset=local_expert_offset,
        local_num_experts=local_num_experts,
        routed_scaling_factor=routed_scaling_factor,
        use_routing_scales_on_input=use_routing_scales_on_input,
        routing_method_type=routing_method_type,
        activation_type=activation_type,
        norm_topk_prob=norm_topk_prob,
        tune_max_num_tokens=tune_max_num_tokens,
        hidden_states=hidden_states,
        gemm1_weights=gemm1_weights,
        output1_scales_scalar=output1_scales_scalar,
        output1_scales_gate_scalar=output1_scales_gate_scalar,
        gemm2_weights=gemm2_weights,
        output2_scales_scalar=output2_scales_scalar,
        routing_bias=None,
        hidden_states_scale=hidden_states_scale,
    )
    return _run(
        spec,
        weights,
        hidden_states,
        topk_ids=_tensor("topk_ids", topk_ids),
        topk_weights=_tensor("topk_weights", topk_weights),
        do_finalize=do_finalize,
        enable_pdl=enable_pdl,
        routing_replay_out=routing_replay_out,
        output_dtype=output_dtype,
        out=out,
        num_valid_tokens=num_valid_tokens,
        tune_max_num_tokens=tune_max_num_tokens,
    )


def _layer(
    *,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    use_routing_scales_on_input: bool,
    routing_method_type: int,
    activation_type: int,
    norm_topk_prob: bool,
    tune_max_num_tokens: int,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    output1_scales_scalar: torch.Tensor,
    output1_scales_gate_scalar: torch.Tensor,
    gemm2_weights: torch.Tensor,
    output2_scales_scalar: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states_scale: float | None,
) -> tuple[LayerSpec, ExpertWeights]:
    integers = {
        "num_experts": num_experts,
        "top_k": top_k,
        "n_group": 0 if n_group is None else n_group,
        "topk_group": 0 if topk_group is None else topk_group,
        "intermediate_size": intermediate_size,
        "local_expert_offset": local_expert_offset,
        "local_num_experts": local_num_experts,
        "routing_method_type": routing_method_type,
        "tune_max_num_tokens": tune_max_num_tokens,
        "activation_type": activation_type,
    }
    for name, value in integers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected an int")
    numbers = {"routed_scaling_factor": routed_scaling_factor, "hidden_states_scale": hidden_states_scale}
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, Real) or isinstance(number, bool)):
            raise TypeError(f"{name} is {number!r}, expected a number or None")
    _check_bool("use_routing_scales_on_input", use_routing_scales_on_input)
    _check_bool("norm_topk_prob", norm_topk_prob)
    if tune_max_num_tokens < 1:
        raise ValueError(f"tune_max_num_tokens is {tune_max_num_tokens}, expected at least 1")
    if _tensor("hidden_states", hidden_states).dim() != 2:
        raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}, expected [num_tokens, hidden_size]")
    spec = LayerSpec(
        hidden_size=hidden_states.shape[1],
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        local_expert_offset=local_expert_offset,
        local_num_experts=local_num_experts,
        routing_method=routing_method_type,  # type: ignore[arg-type]  # LayerSpec refuses what is not in the table
        activation=activation_type,  # type: ignore[arg-type]
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
        use_routing_scales_on_input=use_routing_scales_on_input,
    )
    weights = ExpertWeights(
        gemm1_weights=_tensor("gemm1_weights", gemm1_weights),
        output1_scales_scalar=_tensor("output1_scales_scalar", output1_scales_scalar),
        output1_scales_gate_scalar=_tensor("output1_scales_gate_scalar", output1_scales_gate_scalar),
        gemm2_weights=_tensor("gemm2_weights", gemm2_weights),
        output2_scales_scalar=_tensor("output2_scales_scalar", output2_scales_scalar),
        routing_bias=None if routing_bias is None else _tensor("routing_bias", routing_bias),
        hidden_states_scale=hidden_states_scale,
    )
    weights.check(spec)
    return spec, weights


def _run(
    spec: LayerSpec,
    weights: ExpertWeights,
    hidden_states: torch.Tensor,
    *,
    routing_logits: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    do_finalize: bool,
    enable_pdl: bool | None,
    routing_replay_out: torch.Tensor | None,
    output_dtype: torch.dtype,
    out: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    tune_max_num_tokens: int,
) -> list[torch.Tensor] | torch.Tensor:
    _check_bool("do_finalize", do_finalize)
    if enable_pdl is not None:
        _check_bool("enable_pdl", enable_pdl, "True, False or None")
    check_forward_args(
        spec,
        weights,
        hidden_states,
        routing_logits=routing_logits,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        output_dtype=output_dtype,
        do_finalize=do_finalize,
        out=out,
        routing_replay_out=routing_replay_out,
        num_valid_tokens=num_valid_tokens,
    )
    backend = _backend(weights.device)
    if isinstance(backend, TorchBackend):
        layer = backend.wrap(spec, weights)
    else:
        max_num_tokens = max(1, hidden_states.shape[0])
        if is_autotuning():
            layer = backend.prepare(spec, weights, max_num_tokens=max(max_num_tokens, tune_max_num_tokens))
            backend.tune(layer, tune_max_num_tokens)
        else:
            layer = backend.prepare(spec, weights, max_num_tokens=max_num_tokens)
    result = backend.forward(
        layer,
        hidden_states,
        routing_logits=routing_logits,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        output_dtype=output_dtype,
        do_finalize=do_finalize,
        out=out,
        routing_replay_out=routing_replay_out,
        num_valid_tokens=num_valid_tokens,
        enable_pdl=enable_pdl,
    )
    if do_finalize:
        assert result.output is not None
        return result.output
    assert result.gemm2_output is not None
    assert result.expanded_idx_to_permuted_idx is not None
    return [result.gemm2_output, result.expert_weights, result.expanded_idx_to_permuted_idx]


@functools.cache
def _backend(device: torch.device) -> Backend:
    return select_backend(device)


def _tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")
    return value


def _check_bool(name: str, value: bool, expected: str = "True or False") -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected {expected}")
