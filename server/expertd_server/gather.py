"""Many calls become one batch's input: which types it computes with, and every call's rows in a slot's memory.

What lies in memory that a GPU can copy from stays there until it does.

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
from expertd_server.bundle import BundledCalls
from expertd_server.forward import ForwardCall, HostTensor
from expertd_server.fp8 import quantize_fp8
from expertd_server.layer import MoELayer
from expertd_server.layout import NUM_VALID_BYTES, BatchKind, InputLayout, Part
from expertd_server.native import Copies, copy_bytes
from expertd_server.spans import PackedSpans, Span, Spans, direct_address

__all__ = ["gather", "kind_of"]


def kind_of(calls: Sequence[ForwardCall | BundledCalls]) -> BatchKind:
    """What a batch of these calls computes with: the callers' types where they agree, else those that lead to all."""
    hidden_dtype, is_routed, output_dtype = calls[0].kind
    for call in calls:
        kind = call.kind
        if kind.hidden_dtype != hidden_dtype:
            hidden_dtype = torch.float8_e4m3fn
        if kind.is_routed:
            is_routed = True
        if kind.output_dtype != output_dtype:
            # A mixed batch is rounded call by call from float32; that gives the bits of a batch of one dtype.
            output_dtype = torch.float32
    return BatchKind(hidden_dtype, is_routed, output_dtype)


def gather(
    flat: npt.NDArray[np.uint8], layout: InputLayout, layer: MoELayer, calls: Sequence[ForwardCall | BundledCalls]
) -> list[Span] | PackedSpans:
    """Write what a batch computes on into a slot's host memory, but for what a GPU copies from where it lies.

    Bundles must be of the layout's kind. The copies that bring all of it to the device, the number of valid tokens
    included.
    """
    only = calls[0] if len(calls) == 1 else None
    if isinstance(only, BundledCalls):
        noted = Copies()
        packed = only.gather_all(flat, layout, noted)
        noted.run()
        return packed
    copies = None if only is not None else Copies()  # to note a copy takes as long as to do a small one
    add = copy_bytes if copies is None else copies.add
    rows = [None if isinstance(call, BundledCalls) else _tensors_of(call, layer, layout) for call in calls]
    spans = Spans(NUM_VALID_BYTES)
    last = len(layout.parts) - 1
    for number, part in enumerate(layout.parts):
        start = part.offset
        for call, tensors in zip(calls, rows, strict=True):
            if isinstance(call, BundledCalls):
                assert copies is not None
                which = 0 if number == last else number + 1
                start = call.gather(which, part, flat, start, spans.copies, copies)
                continue
            assert tensors is not None
            data = tensors[number].data
            nbytes = len(data)
            address = direct_address(data, nbytes)
            if address:
                spans.add_direct(start, nbytes, address)
            else:
                add(flat, start, data)
                spans.add(start, nbytes)
            start += nbytes
    if copies is not None:
        copies.run()
    return spans.copies


def _tensors_of(call: ForwardCall, layer: MoELayer, layout: InputLayout) -> tuple[HostTensor, ...]:
    """What a call brings, as the layout's parts lie."""
    return *_routing_of(call, layer, layout), _hidden_states_of(call, layer, layout)


def _hidden_states_of(call: ForwardCall, layer: MoELayer, layout: InputLayout) -> HostTensor:
    """Quantised here, as the CPU backend does it, where only others in the batch are."""
    if call.hidden_states.dtype == layout.hidden_states.dtype:
        return call.hidden_states
    assert layer.hidden_states_scale is not None, "the service refuses such a call"
    return _host_tensor(quantize_fp8(call.hidden_states.to_tensor(), layer.hidden_states_scale))


def _routing_of(call: ForwardCall, layer: MoELayer, layout: InputLayout) -> tuple[HostTensor, ...]:
    """The logits, or ids and weights: routed here, as the CPU backend does it, where only others in the batch are."""
    if len(layout.routing) == 1:
        assert call.routing_logits is not None
        return (_typed(call.routing_logits, layout.parts[0]),)
    if call.routing_logits is not None:
        ids, weights = routing.route(layer.spec, call.routing_logits.to_tensor(), layer.routing_bias)
        return _host_tensor(ids), _host_tensor(weights)
    assert call.topk_ids is not None
    assert call.topk_weights is not None
    return _typed(call.topk_ids, layout.parts[0]), _typed(call.topk_weights, layout.parts[1])


def _typed(tensor: HostTensor, part: Part) -> HostTensor:
    """float32 holds every bfloat16 logit exactly; weights are rounded to bfloat16 on entry anyway."""
    return tensor if tensor.dtype == part.dtype else _host_tensor(tensor.to_tensor().to(part.dtype))


def _host_tensor(tensor: torch.Tensor) -> HostTensor:
    return HostTensor(tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().data)
