"""Many calls become one batch's input: which types it computes with, and every call's rows in a slot's memory.

On the CPU requests share a batch as widely as their arithmetic allows. Hidden states become FP8 and logits become ids
and bfloat16 weights row by row, exactly as the backend would do it, so callers with different input types, routed by
the server or by themselves, still run together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from expertd_server import routing
from expertd_server.forward import ForwardCall, HostTensor
from expertd_server.fp8 import quantize_fp8
from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind, InputLayout
from expertd_server.native import Copies, copy_bytes

__all__ = ["gather", "kind_of"]


def kind_of(calls: Sequence[ForwardCall]) -> BatchKind:
    """What a batch of these calls computes with: the callers' types where they agree, else those that lead to all."""
    first = calls[0]
    hidden_dtype, is_routed, output_dtype = first.hidden_states.dtype, first.topk_ids is not None, first.output_dtype
    for call in calls:
        if call.hidden_states.dtype != hidden_dtype:
            hidden_dtype = torch.float8_e4m3fn
        if call.topk_ids is not None:
            is_routed = True
        if call.output_dtype != output_dtype:
            # A mixed batch is rounded call by call from float32; that gives the bits of a batch of one dtype.
            output_dtype = torch.float32
    return BatchKind(hidden_dtype, is_routed, output_dtype)


def gather(flat: npt.NDArray[np.uint8], layout: InputLayout, layer: MoELayer, calls: Sequence[ForwardCall]) -> None:
    """Write what a batch computes on into a slot's host memory."""
    copies = Copies() if len(calls) > 1 else None  # to note a copy takes as long as to do a small one
    add = copy_bytes if copies is None else copies.add
    first = 0
    for call in calls:
        hidden_states = call.hidden_states
        if hidden_states.dtype != layout.hidden_states.dtype:
            assert layer.hidden_states_scale is not None, "the service refuses such a call"
            hidden_states = _host_tensor(quantize_fp8(hidden_states.to_tensor(), layer.hidden_states_scale))
        add(flat, layout.hidden_states.end(first), hidden_states.data)
        for (_, part), tensor in zip(layout.routing, _routing_of(call, layer, layout), strict=True):
            # float32 holds every bfloat16 logit exactly; weights are rounded to bfloat16 on entry anyway.
            same = tensor if tensor.dtype == part.dtype else _host_tensor(tensor.to_tensor().to(part.dtype))
            add(flat, part.end(first), same.data)
        first += call.num_tokens
    if copies is not None:
        copies.run()


def _routing_of(call: ForwardCall, layer: MoELayer, layout: InputLayout) -> tuple[HostTensor, ...]:
    """The logits, or ids and weights: routed here, as the CPU backend does it, where only others in the batch are."""
    if call.routing_logits is None:
        assert call.topk_ids is not None
        assert call.topk_weights is not None
        return call.topk_ids, call.topk_weights
    if len(layout.routing) == 1:
        return (call.routing_logits,)
    ids, weights = routing.route(layer.spec, call.routing_logits.to_tensor(), layer.routing_bias)
    return _host_tensor(ids), _host_tensor(weights)


def _host_tensor(tensor: torch.Tensor) -> HostTensor:
    return HostTensor(tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().data)
