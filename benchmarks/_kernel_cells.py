"""One layer, one number of tokens: times of the whole call, of its stages, and of peers that compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from _kernel_cases import relative_error
from _kernel_timer import Timer
from peers_gpu import PeerLayer, PeerSkippedError

from expertd_server.backend import PreparedLayer
from expertd_server.cuda_call import Call

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend

__all__ = ["time_cell", "time_peer", "time_stages"]

MOST_DIFFERENCE = 0.05
"""Of a peer's output from that of the kernels, relative: each is 0.03 off by the rounding of the intermediate."""


def time_cell(
    backend: CudaBackend,
    layer: PreparedLayer,
    call: Call,
    timer: Timer,
    *,
    stages: bool = False,
    check_rows: int = 0,
    sustained_s: float = 0.0,
) -> dict[str, Any]:
    """A whole call and, where asked, one at the end of sustained_s of them, and each stage alone: cold, without PDL."""
    out = torch.empty(call.hidden_states.shape, dtype=torch.bfloat16, device=backend.device)
    family = backend.family(layer, call.num_tokens)

    def whole() -> None:
        for part, out_part in on_this_stream(call).chunks(out, layer.state.max_num_tokens):
            backend._run(layer, part, out_part)

    graph = timer.capture(whole)
    cell: dict[str, Any] = {"us": round(timer.median_us(graph), 2), "family": family.name}
    if sustained_s:
        cell["sustained_us"] = round(timer.sustained_us(graph, sustained_s), 2)
    if check_rows:
        cell["error"] = relative_error(layer, call, out, check_rows)
    if stages:
        cell |= time_stages(backend, layer, call, timer, out)
    return cell


def time_stages(
    backend: CudaBackend, layer: PreparedLayer, call: Call, timer: Timer, out: torch.Tensor
) -> dict[str, float]:
    """Microseconds of each stage, alone."""
    times: dict[str, float] = {}
    family = backend.family(layer, call.num_tokens)
    planned = layer.state.max_num_tokens
    slab = backend._workspaces.current(layer.state.scratch(planned).nbytes)

    def stage(name: str) -> Callable[[], None]:
        def run() -> None:
            part = replace(on_this_stream(call), pdl=False)
            plan = layer.state.plan(slab, planned)  # NOTE: the eager slab also inside the capture: stages share it
            if name == "route":
                backend.route(layer, plan, part, family)
            elif name == "gemm1":
                backend.gemm1(layer, plan, part, family, part.hidden_states.data_ptr())
            elif name == "gemm2":
                backend.gemm2(layer, plan, part, family)
            else:
                backend.finalize(layer, plan, part, out)

        return run

    counters = slab[8:16]  # the products' dynamic tile counters, which routing zeroes
    for name in ("route", "gemm1", "gemm2", "finalize"):
        if name != "route":
            counters.zero_()
        graph = timer.capture(stage(name))
        before = None if name == "route" else counters.zero_
        times[f"{name}_us"] = round(timer.median_us(graph, before=before), 2)
        if name == "route":
            times["route_warm_us"] = round(timer.median_us(graph, cold=False), 2)
    return times


def time_peer(
    backend: CudaBackend,
    layer: PreparedLayer,
    call: Call,
    timer: Timer,
    peer: PeerLayer,
    *,
    sustained_s: float = 0.0,
) -> dict[str, float]:
    """Microseconds of a peer behind the routing kernel, by the rules of `time_cell`.

    Raises PeerSkippedError where its output is not the layer's.
    """
    expected = torch.empty(call.hidden_states.shape, dtype=torch.bfloat16, device=backend.device)
    backend._run(layer, on_this_stream(call), expected)
    planned = layer.state.max_num_tokens
    slab = backend._workspaces.current(layer.state.scratch(planned).nbytes)
    plan, family = layer.state.plan(slab, planned), backend.family(layer, call.num_tokens)
    output = expected

    def run() -> None:
        nonlocal output
        backend.route(layer, plan, on_this_stream(call), family)
        output = peer(call.hidden_states, call.topk_ids, call.topk_weights.float())

    graph = timer.capture(run)
    us = timer.median_us(graph)
    difference = float((output.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= MOST_DIFFERENCE:
        raise PeerSkippedError(
            f"its output differs from the kernels' by {difference:.3f}, expected at most {MOST_DIFFERENCE}"
        )
    times = {"us": round(us, 2), "difference": difference}
    if sustained_s:
        times["sustained_us"] = round(timer.sustained_us(graph, sustained_s), 2)
    return times


def on_this_stream(call: Call) -> Call:
    """The call for the current stream, in a capture that of the graph."""
    return replace(call, stream=torch.cuda.current_stream().cuda_stream)
