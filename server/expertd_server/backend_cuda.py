"""The Hopper backend: routing, two grouped FP8 products and the weighted sum, in four to six kernel launches.

A call allocates nothing but its results, never looks at device data and never waits, so that it can be captured in a
CUDA graph. Its scratch memory belongs to the stream: layers share it, streams do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from expertd_server import tuning
from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.cuda_call import Call
from expertd_server.cuda_extension import _cuda
from expertd_server.cuda_families import FAMILIES, Family, expected_token_tiles, likely_token_tiles, max_token_tiles
from expertd_server.cuda_workspace import CudaLayer, Plan, Workspaces
from expertd_server.types import LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights, pad_intermediate

__all__ = ["FAMILIES", "CudaBackend", "Family"]

_TILE_MULTIPLE = 16
_EARLY_BYTES = 32 * 1024
"""Weights that each idle SM asks for while a handful of tokens is routed: about what memory delivers meanwhile."""
_DTYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CudaBackend:
    """Runs layers on one Hopper GPU.

    Calls on different streams may overlap. Graphs captured on one stream share its scratch memory: replay them one
    after the other.
    Raises RuntimeError where the device is not a Hopper GPU.
    """

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda", *, tuning_cache: str | Path | None = None) -> None:
        device = torch.device(device)
        if device.type != "cuda":
            raise RuntimeError(f"device is {device}, the CUDA backend needs a CUDA device")
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device is available: check the driver, or use the CPU backend")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        properties = torch.cuda.get_device_properties(self.device)
        if (properties.major, properties.minor) != (9, 0):
            raise RuntimeError(
                f"{properties.name} has compute capability {properties.major}.{properties.minor}, these kernels need "
                f"9.0 (Hopper); use the torch backend"
            )
        self.device_name = properties.name
        self.num_sms = properties.multi_processor_count
        self.force_family: str | None = None
        """Name of the family that every call uses, for tests and the tuner; None: the best known."""
        self._tuned = tuning.TuningCache(tuning_cache)
        self._workspaces = Workspaces(self.device)

    # ---- planning

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        """See `Backend.prepare`. Reserves the current stream's scratch memory for calls of max_num_tokens.

        hidden_size has to be a multiple of 16; an intermediate_size that is none is filled up with zeros.
        """
        if spec.hidden_size % _TILE_MULTIPLE:
            raise ValueError(
                f"hidden_size is {spec.hidden_size}, the CUDA backend needs a multiple of {_TILE_MULTIPLE}: pad the "
                f"hidden states and the weights with zeros, or use the torch backend"
            )
        if max_num_tokens < 1:
            raise ValueError(f"max_num_tokens is {max_num_tokens}, expected at least 1")
        weights.check(spec)
        weights = weights.to(self.device)
        tiled, weights = pad_intermediate(spec, weights, _TILE_MULTIPLE)
        layer = CudaLayer(tiled, weights, max_num_tokens)
        layer.tuned = self._tuned.lookup(self.device_name, tuning.layer_key(spec))
        self._workspaces.reserve(layer.scratch(max_num_tokens).nbytes)
        with torch.cuda.device(self.device):
            self._workspaces.current()
        return PreparedLayer(spec=spec, weights=weights, nbytes=weights.nbytes, state=layer)

    def family(self, layer: PreparedLayer, num_tokens: int) -> Family:
        """The tile family that a call of num_tokens uses."""
        if self.force_family is not None:
            return FAMILIES[self.force_family]
        return FAMILIES[tuning.choose_family(layer.state.tuned, layer.spec, num_tokens)]

    def tune(self, layer: PreparedLayer, tune_max_num_tokens: int = 8192) -> dict[int, str]:
        """Measure every tile family for 1, 2, 4, ... tune_max_num_tokens tokens and use the fastest from now on.

        Fastest is the one with the least geometric mean of its times with even and with skewed routing.
        Returns {tokens: family}, which the tuning cache also keeps; what it knows already is not measured again. Takes
        seconds and stalls the device: not for a server under load. Bits do not depend on the choice.
        """
        spec, forced = layer.spec, self.force_family
        choice = dict(layer.state.tuned or {})
        largest = min(tuning.bucket(tune_max_num_tokens), layer.state.max_num_tokens)
        missing = [n for n in (1 << i for i in range(largest.bit_length())) if n not in choice]
        if not missing:
            return choice
        with torch.cuda.device(self.device):
            for num_tokens in missing:
                x = torch.randn(num_tokens, spec.hidden_size, device=self.device).to(torch.float8_e4m3fn)
                even = torch.randn(num_tokens, spec.num_experts, device=self.device)
                products = dict.fromkeys(FAMILIES, 1.0)
                for logits in (even, tuning.skewed_logits(spec, num_tokens, self.device)):
                    for name in FAMILIES:
                        self.force_family = name
                        products[name] *= _median_ms(partial(self.forward, layer, x, routing_logits=logits))
                choice[num_tokens] = min(products, key=products.__getitem__)
        self.force_family = forced
        self._tuned.store(self.device_name, tuning.layer_key(spec), choice)
        layer.state.tuned = self._tuned.lookup(self.device_name, tuning.layer_key(spec))
        return choice

    def poison_workspaces(self, byte: int = 0xFF) -> None:
        """For tests: make what a call reads without having written it show, by default as NaN."""
        self._workspaces.poison(byte)

    # ---- running

    def forward(
        self,
        layer: PreparedLayer,
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
        enable_pdl: bool | None = None,
    ) -> MoEOutput:
        """See `Backend.forward`. enable_pdl: programmatic dependent launch; None: yes."""
        spec = layer.spec
        num_tokens = hidden_states.shape[0]
        with torch.cuda.device(self.device):
            ids = torch.empty(num_tokens, spec.top_k, dtype=torch.int32, device=self.device)
            weights = torch.empty(num_tokens, spec.top_k, dtype=torch.bfloat16, device=self.device)
            call = Call(
                hidden_states=hidden_states,
                logits=routing_logits,
                in_ids=topk_ids,
                in_weights=topk_weights,
                topk_ids=ids,
                topk_weights=weights,
                replay=routing_replay_out,
                num_valid=num_valid_tokens,
                pdl=enable_pdl is not False,
                stream=torch.cuda.current_stream().cuda_stream,
            )
            if not do_finalize:
                return self._forward_rows(layer, call)
            if out is None:
                out = torch.empty(num_tokens, spec.hidden_size, dtype=output_dtype, device=self.device)
            for part, out_part in call.chunks(out, layer.state.max_num_tokens):
                self._run(layer, part, out_part)
            return MoEOutput(output=out, expert_weights=weights, topk_ids=ids)

    def _forward_rows(self, layer: PreparedLayer, call: Call) -> MoEOutput:
        spec, num_tokens = layer.spec, call.num_tokens
        # NOTE: how many rows there are is known on the device only: those that no slot maps to stay zero.
        rows = torch.zeros(
            num_tokens * min(spec.top_k, spec.num_local), spec.hidden_size, dtype=torch.bfloat16, device=self.device
        )
        slots = torch.full((num_tokens * spec.top_k,), -1, dtype=torch.int32, device=self.device)
        if num_tokens:
            self._run(layer, call, None, rows=rows, expanded_to_row=slots)
        return MoEOutput(
            topk_ids=call.topk_ids,
            expert_weights=call.topk_weights,
            gemm2_output=rows,
            expanded_idx_to_permuted_idx=slots,
        )

    def _run(
        self,
        layer: PreparedLayer,
        call: Call,
        out: torch.Tensor | None,
        *,
        rows: torch.Tensor | None = None,
        expanded_to_row: torch.Tensor | None = None,
    ) -> None:
        state: CudaLayer = layer.state
        num_tokens = call.num_tokens
        planned = max(num_tokens, state.max_num_tokens)
        workspace = self._workspaces.current(state.scratch(planned).nbytes)
        plan = state.plan(workspace, planned)
        family = self.family(layer, num_tokens)
        if rows is not None:
            plan = plan.with_results(rows, expanded_to_row)
        hidden_states = call.hidden_states
        x = hidden_states.data_ptr()
        if hidden_states.dtype != torch.float8_e4m3fn:
            self.quantize(layer, plan, call)
            x = plan.hidden_states
        self.route(layer, plan, call, family)
        self.gemm1(layer, plan, call, family, x)
        self.gemm2(layer, plan, call, family)
        if out is not None:
            self.finalize(layer, plan, call, out)

    # ---- stages, one launch each (routing two, for many tokens); public for the benchmark

    def quantize(self, layer: PreparedLayer, plan: Plan, call: Call) -> None:
        """hidden_states [T, H] -> fp8 in the workspace."""
        scale = layer.weights.hidden_states_scale
        if scale is None:
            raise TypeError(f"hidden_states is {call.hidden_states.dtype}, but the layer has no hidden_states_scale")
        _cuda.quantize(
            x=call.hidden_states.data_ptr(),
            dtype=_DTYPE_IDS[call.hidden_states.dtype],
            scale=scale,
            num_valid=_address(call.num_valid),
            out=plan.hidden_states,
            num_tokens=call.num_tokens,
            hidden_size=layer.spec.hidden_size,
            stream=call.stream,
            pdl=call.pdl,
        )

    def route(self, layer: PreparedLayer, plan: Plan, call: Call, family: Family) -> None:
        """Logits or ready ids -> ids, weights, and the rows and tiles of the products."""
        spec, bias = layer.spec, layer.weights.routing_bias
        grouped = spec.is_grouped
        _cuda.route(
            logits=_address(call.logits),
            logits_dtype=_dtype_id(call.logits),
            bias=_address(bias),
            bias_dtype=_dtype_id(bias),
            in_ids=_address(call.in_ids),
            in_weights=_address(call.in_weights),
            in_weights_dtype=_dtype_id(call.in_weights),
            num_valid=_address(call.num_valid),
            num_tokens=call.num_tokens,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            local_offset=spec.local_expert_offset,
            num_local=spec.num_local,
            method=int(spec.routing_method),
            n_group=(spec.n_group or 0) if grouped else 0,
            topk_group=(spec.topk_group or 0) if grouped else 0,
            routed_scaling_factor=_scaling_factor(spec),
            norm_topk_prob=spec.norm_topk_prob,
            tile_n=family.tile_n,
            tile_quantum=family.tile_quantum,
            tiles_per_block=family.tiles_per_block,
            cluster=family.cluster,
            topk_ids=call.topk_ids.data_ptr(),
            topk_weights=call.topk_weights.data_ptr(),
            replay=_address(call.replay),
            counts=plan.counts,
            expanded_to_row=plan.expanded_to_row,
            row_token=plan.row_token,
            row_weight=plan.row_weight if spec.use_routing_scales_on_input else 0,
            schedule=plan.schedule,
            tiles=plan.tiles,
            tile_ready=plan.tile_ready,
            weights=layer.weights.gemm1_weights.data_ptr(),
            expert_bytes=layer.weights.gemm1_weights[0].numel(),
            early_blocks=self.num_sms - 1,
            early_bytes=_EARLY_BYTES,
            stream=call.stream,
            pdl=call.pdl,
        )

    def gemm1(self, layer: PreparedLayer, plan: Plan, call: Call, family: Family, x: int) -> None:
        """Rows of x [T, H] fp8 -> activated rows [R, I] fp8."""
        spec, weights = layer.state.spec, layer.weights
        _cuda.gemm1(
            family=family.index,
            activation=int(spec.activation),
            maps=plan.maps(family, 0),
            x=x,
            row_token=plan.row_token,
            row_weight=plan.row_weight if spec.use_routing_scales_on_input else 0,
            scale_gate=weights.output1_scales_gate_scalar.data_ptr(),
            scale=weights.output1_scales_scalar.data_ptr(),
            out=plan.inter,
            out_columns=spec.intermediate_size,
            k=spec.hidden_size,
            weight_rows=spec.gemm1_rows,
            max_token_tiles=max_token_tiles(spec, call.num_tokens, family),
            likely_token_tiles=likely_token_tiles(spec, call.num_tokens, family),
            num_experts=spec.num_local,
            schedule=plan.schedule,
            tiles=plan.tiles,
            tile_ready=plan.tile_ready,
            ready_count=self._ready_count(spec, family, call.num_tokens),
            grid=self._grid(spec, family, call.num_tokens, spec.gemm1_rows),
            stream=call.stream,
            pdl=call.pdl,
        )

    def gemm2(self, layer: PreparedLayer, plan: Plan, call: Call, family: Family) -> None:
        """Activated rows [R, I] fp8 -> rows [R, H] bfloat16."""
        spec = layer.state.spec
        _cuda.gemm2(
            family=family.index,
            maps=plan.maps(family, 1),
            scale=layer.weights.output2_scales_scalar.data_ptr(),
            rows=plan.rows,
            hidden_size=spec.hidden_size,
            k=spec.intermediate_size,
            max_token_tiles=max_token_tiles(spec, call.num_tokens, family),
            schedule=plan.schedule,
            tiles=plan.tiles,
            tile_ready=plan.tile_ready,
            ready_count=self._ready_count(spec, family, call.num_tokens),
            grid=self._grid(spec, family, call.num_tokens, spec.hidden_size),
            stream=call.stream,
            pdl=call.pdl,
        )

    def finalize(self, layer: PreparedLayer, plan: Plan, call: Call, out: torch.Tensor) -> None:
        """Rows [R, H] bfloat16 -> out [T, H], weighted and summed over the slots of a token."""
        spec = layer.spec
        _cuda.finalize(
            rows=plan.rows,
            expanded_to_row=plan.expanded_to_row,
            weights=0 if spec.use_routing_scales_on_input else call.topk_weights.data_ptr(),
            num_valid=_address(call.num_valid),
            out=out.data_ptr(),
            out_dtype=_DTYPE_IDS[out.dtype],
            num_tokens=call.num_tokens,
            hidden_size=spec.hidden_size,
            top_k=spec.top_k,
            is_slice=spec.num_local < spec.num_experts,
            stream=call.stream,
            pdl=call.pdl,
        )

    def _ready_count(self, spec: LayerSpec, family: Family, num_tokens: int) -> int:
        """See `GemmParams`: 0 where product 2 waits for all of product 1, which is sooner told than token tile by token
        tile, if these are ready at the same time: there is one, or product 1 is a single wave of tiles.
        """
        token_tiles = expected_token_tiles(spec, num_tokens, family)
        tiles = token_tiles * -(-spec.gemm1_rows // family.tile_m)
        if token_tiles <= 1 or tiles <= self.num_sms * family.ctas_per_sm:
            return 0
        return family.ready_count(spec.gemm1_rows)

    def _grid(self, spec: LayerSpec, family: Family, num_tokens: int, weight_rows: int) -> int:
        tiles = max_token_tiles(spec, num_tokens, family) * -(-weight_rows // family.tile_m)
        return min(tiles, self.num_sms * family.ctas_per_sm // family.cluster * family.cluster)


def _median_ms(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]  # the launches are queued before the clock starts
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _scaling_factor(spec: LayerSpec) -> float:
    scaled = spec.routing_method in (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)
    return spec.routed_scaling_factor if scaled and spec.routed_scaling_factor is not None else 1.0


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype_id(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else _DTYPE_IDS[tensor.dtype]
