"""Checks of a call's arguments: TypeError or ValueError naming the argument, its value and what was expected."""

from __future__ import annotations

import torch

from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["check_forward_args"]

_WIDE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OUTPUT_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def check_forward_args(
    spec: LayerSpec,
    weights: ExpertWeights,
    hidden_states: torch.Tensor,
    *,
    routing_logits: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    do_finalize: bool = True,
    out: torch.Tensor | None = None,
    routing_replay_out: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
) -> None:
    """Check what `Backend.forward` takes. T num_tokens, H hidden_size, E num_experts, K top_k.

    hidden_states: [T, H] float8_e4m3fn, or bfloat16, float16, float32 where the weights have hidden_states_scale.
    Either routing_logits [T, E] float32 or bfloat16, or topk_ids [T, K] int32 (-1 ... E-1; an expert may come twice in
    a row, its outputs then add up) and topk_weights [T, K] float32 or bfloat16.
    output_dtype: bfloat16, float32 or float16; out: [T, H] of that dtype, only where the call finalizes.
    routing_replay_out: [>= T, K] int16. num_valid_tokens: int32 scalar, 0 ... T.

    Every tensor is contiguous and on the device of the weights. The values of topk_ids and num_valid_tokens are looked
    at on the CPU only, elsewhere that would stall the device: there an id out of range is an empty slot.
    """
    device = weights.device
    _check_rank(hidden_states, "hidden_states", 2)
    num_tokens = hidden_states.shape[0]
    wide = _WIDE_DTYPES if weights.hidden_states_scale is not None else ()
    if hidden_states.dtype in _WIDE_DTYPES and not wide:
        raise TypeError(
            f"hidden_states is {hidden_states.dtype}, expected torch.float8_e4m3fn because no hidden_states_scale says "
            f"how to quantise it"
        )
    _check(hidden_states, "hidden_states", (num_tokens, spec.hidden_size), (torch.float8_e4m3fn, *wide), device)
    _check_routing(
        spec, num_tokens, device, routing_logits=routing_logits, topk_ids=topk_ids, topk_weights=topk_weights
    )
    if output_dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"output_dtype is {output_dtype}, expected {_either(_OUTPUT_DTYPES)}")
    if out is not None:
        _check_rank(out, "out", 2)
        if not do_finalize:
            raise ValueError(f"out has shape {tuple(out.shape)}, expected None with do_finalize=False")
        _check(out, "out", (num_tokens, spec.hidden_size), (output_dtype,), device)
    if routing_replay_out is not None:
        _check_rank(routing_replay_out, "routing_replay_out", 2)
        rows = max(num_tokens, routing_replay_out.shape[0])
        _check(routing_replay_out, "routing_replay_out", (rows, spec.top_k), (torch.int16,), device)
    if num_valid_tokens is not None:
        _check(num_valid_tokens, "num_valid_tokens", (), (torch.int32,), device)
        if device.type == "cpu" and not 0 <= int(num_valid_tokens) <= num_tokens:
            raise ValueError(f"num_valid_tokens is {int(num_valid_tokens)}, expected 0 to {num_tokens}")


def _check_routing(
    spec: LayerSpec,
    num_tokens: int,
    device: torch.device,
    *,
    routing_logits: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
) -> None:
    logit_dtypes = (torch.float32, torch.bfloat16)
    if (routing_logits is None) == (topk_ids is None) or (topk_ids is None) != (topk_weights is None):
        given = {"routing_logits": routing_logits, "topk_ids": topk_ids, "topk_weights": topk_weights}
        names = [name for name, tensor in given.items() if tensor is not None]
        raise ValueError(
            f"got {', '.join(names) or 'no routing'}, expected either routing_logits or both topk_ids and topk_weights"
        )
    if routing_logits is not None:
        _check(routing_logits, "routing_logits", (num_tokens, spec.num_experts), logit_dtypes, device)
        return
    assert topk_ids is not None
    assert topk_weights is not None
    _check(topk_ids, "topk_ids", (num_tokens, spec.top_k), (torch.int32,), device)
    _check(topk_weights, "topk_weights", (num_tokens, spec.top_k), logit_dtypes, device)
    if device.type == "cpu":
        is_bad = (topk_ids < -1) | (topk_ids >= spec.num_experts)
        if bool(is_bad.any()):
            t, k = is_bad.nonzero()[0].tolist()
            raise ValueError(
                f"topk_ids[{t}, {k}] is {int(topk_ids[t, k])}, expected -1 (empty slot) to {spec.num_experts - 1}"
            )


def _check(
    tensor: torch.Tensor, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    _check_rank(tensor, name, len(shape))
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}, expected {_either(dtypes)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} where the weights are")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor; call .contiguous()")


def _check_rank(tensor: torch.Tensor, name: str, rank: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dim() != rank:
        raise ValueError(f"{name} has {tensor.dim()} dimensions (shape {tuple(tensor.shape)}), expected {rank}")


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))
