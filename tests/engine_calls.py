"""Calls of every kind for the engine, and what the operator answers to each of them alone."""

from __future__ import annotations

import random

import torch

from expertd_server.engine import ForwardCall, ForwardResult, HostTensor
from expertd_server.fp8 import quantize_fp8
from expertd_server.layer import MoELayer

FP8 = torch.float8_e4m3fn


def host(tensor: torch.Tensor) -> HostTensor:
    return HostTensor(tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def make_call(layer: MoELayer, num_tokens: int, seed: int, *, usual: bool = False) -> ForwardCall:
    """Any kind of call, by its seed; usual: FP8 and logits in, bfloat16 out."""
    chance, g = random.Random(seed), torch.Generator().manual_seed(seed)
    spec = layer.spec
    hidden_states = torch.randn(num_tokens, spec.hidden_size, generator=g)
    dtype = FP8 if usual else chance.choice((FP8, torch.bfloat16, torch.float16, torch.float32))
    assert layer.hidden_states_scale is not None
    hidden_states = quantize_fp8(hidden_states, layer.hidden_states_scale) if dtype == FP8 else hidden_states.to(dtype)
    real = chance.choice((torch.float32, torch.bfloat16))
    if usual or chance.random() < 0.5:
        logits = torch.randn(num_tokens, spec.num_experts, generator=g)
        routing = {"routing_logits": host(logits if usual else logits.to(real))}
    else:
        ids = torch.rand(num_tokens, spec.num_experts, generator=g).argsort(1)[:, : spec.top_k].int() - 1
        weights = torch.rand(num_tokens, spec.top_k, generator=g).to(real)
        routing = {"topk_ids": host(ids), "topk_weights": host(weights)}
    return ForwardCall(
        layer,
        host(hidden_states),
        **routing,
        output_dtype=torch.bfloat16 if usual else chance.choice((torch.bfloat16, torch.float32, torch.float16)),
        do_finalize=usual or chance.random() < 0.8,
        return_routing=not usual and chance.random() < 0.5,
    )


def expected(call: ForwardCall) -> dict[str, torch.Tensor | None]:
    """What the operator answers to the call alone."""
    device = call.layer.backend.device
    given = {
        name: tensor.to_tensor().to(device)
        for name in ("routing_logits", "topk_ids", "topk_weights")
        if (tensor := getattr(call, name)) is not None
    }
    answer = call.layer.forward(
        call.hidden_states.to_tensor().to(device), **given, output_dtype=call.output_dtype, do_finalize=call.do_finalize
    )
    return {
        "output": answer.output,
        "gemm2_output": answer.gemm2_output,
        "expert_weights": answer.expert_weights if call.return_routing or not call.do_finalize else None,
        "topk_ids": answer.topk_ids if call.return_routing else None,
    }


def check(
    call: ForwardCall, result: ForwardResult, where: str, answer: dict[str, torch.Tensor | None] | None = None
) -> None:
    """Equal to the operator's answer as bytes. answer: what `expected` gave, where it is known."""
    where = f"{where}: {call.hidden_states.shape} {call.hidden_states.dtype} -> {call.output_dtype}"
    for name, tensor in (expected(call) if answer is None else answer).items():
        got = getattr(result, name)
        assert (got is None) == (tensor is None), f"{where}: {name}"
        if tensor is not None:
            assert got.dtype == tensor.dtype, f"{where}: {name}"
            assert torch.equal(got.view(torch.uint8), tensor.cpu().view(torch.uint8)), f"{where}: {name} differs"
