"""The CPU backend, and the fallback on CUDA devices without kernels of their own.

On CPUs with AVX-512 BF16 the experts run in compiled code, see `cpu_experts`. Elsewhere, and where that was not built,
the layer is plain torch. There, too, a token's bits do not depend on the tokens beside it: `products` sees to that for
the matrix products, and everything else is computed element by element or in an order that is fixed for each row. On
the CPU experts run side by side, one thread each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from expertd_server import cpu_experts
from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.fp8 import from_fp8, quantize_fp8, round_to_fp8
from expertd_server.products import MAX_ROWS, ON_CUDA, Freedom, pack, probe
from expertd_server.routing import route
from expertd_server.types import Activation, LayerSpec
from expertd_server.weights import ExpertWeights
from expertd_server.workers import run_all

__all__ = ["TorchBackend"]

_CONVERT_BLOCK_TOKENS = 64
_FINALIZE_BLOCK_TOKENS = 16  # the expert outputs of a block stay in the cache while they are summed


class TorchBackend:
    """`Backend` for the CPU ("cpu") and for any CUDA device ("torch")."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.name = "cpu" if self.device.type == "cpu" else "torch"
        self.unit = cpu_experts.find_unit() if self.device.type == "cpu" else None
        """What runs the experts of the layers that `prepare` and `wrap` give from now on; None: torch."""

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        """Convert every expert once.

        On the CPU to one byte a weight for compiled code, for torch to two (four where it has no product of less);
        elsewhere the FP8 weights stay as they are. Any hidden_size and intermediate_size will do; max_num_tokens has no
        effect. Products of torch of a size that is new to this process are probed, which takes a while for large ones:
        here, so that no request waits for it.
        """
        weights.check(spec)
        if self.device.type != "cpu":
            return self.wrap(spec, weights.to(self.device))
        none = torch.empty(0, dtype=torch.float8_e4m3fn)  # the FP8 weights are not read again
        kept = replace(weights, gemm1_weights=none, gemm2_weights=none)
        if self.unit is not None:
            packed = cpu_experts.pack(self.unit, spec, weights, range(spec.num_local))
            return PreparedLayer(spec, kept, kept.nbytes + packed.nbytes, packed)
        experts = [pack(*pair) for pair in zip(weights.gemm1_weights, weights.gemm2_weights, strict=True)]
        _cpu_freedom(spec)
        return PreparedLayer(spec, kept, kept.nbytes + sum(expert.nbytes for expert in experts), experts)

    def wrap(self, spec: LayerSpec, weights: ExpertWeights) -> PreparedLayer:
        """The layer as it is: `forward` converts the experts that it touches, at every call, and keeps none."""
        return PreparedLayer(spec, weights, weights.nbytes)

    def tune(self, layer: PreparedLayer, tune_max_num_tokens: int = 8192) -> dict[int, str]:
        """There is nothing to choose."""
        return {}

    @torch.no_grad()
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
        """As `Backend.forward`. Rows at or past num_valid_tokens get ids -1 and weights 0; enable_pdl has no effect."""
        spec = layer.spec
        num_tokens = hidden_states.shape[0]
        num_valid = num_tokens if num_valid_tokens is None else int(num_valid_tokens)
        ids = torch.full((num_tokens, spec.top_k), -1, dtype=torch.int32, device=self.device)
        expert_weights = torch.zeros(num_tokens, spec.top_k, dtype=torch.bfloat16, device=self.device)
        if routing_logits is not None:
            ids[:num_valid], expert_weights[:num_valid] = route(
                spec, routing_logits[:num_valid], layer.weights.routing_bias
            )
        else:
            assert topk_ids is not None
            assert topk_weights is not None
            ids[:num_valid] = topk_ids[:num_valid]
            expert_weights[:num_valid] = topk_weights[:num_valid].to(torch.bfloat16)
        if routing_replay_out is not None:
            routing_replay_out[:num_valid] = ids[:num_valid].to(torch.int16)

        if do_finalize and out is None:
            out = torch.empty(num_tokens, spec.hidden_size, dtype=output_dtype, device=self.device)
            out[num_valid:] = 0
        valid = slice(num_valid)
        finalized = out[valid] if do_finalize and out is not None else None
        run = self._run_compiled if self._is_compiled(layer) else self._run_with_torch
        g, row_of_slot = run(layer, hidden_states[valid], ids[valid], expert_weights[valid], finalized)
        if do_finalize:
            return MoEOutput(ids, expert_weights, output=out)
        row_of_slot = functional.pad(row_of_slot, (0, ids.numel() - len(row_of_slot)), value=-1)
        return MoEOutput(ids, expert_weights, gemm2_output=g, expanded_idx_to_permuted_idx=row_of_slot)

    def _is_compiled(self, layer: PreparedLayer) -> bool:
        """As the layer was prepared; one that was not, as this machine can."""
        return self.unit is not None if layer.state is None else isinstance(layer.state, cpu_experts.PackedExperts)

    def _run_compiled(
        self,
        layer: PreparedLayer,
        hidden_states: torch.Tensor,
        ids: torch.Tensor,
        expert_weights: torch.Tensor,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Steps 2 to 5, as `cpu_experts.run`."""
        spec, packed = layer.spec, layer.state
        if packed is None:
            assert self.unit is not None
            local = ids.flatten().long() - spec.local_expert_offset
            touched = set(local[(local >= 0) & (local < spec.num_local)].tolist())
            packed = cpu_experts.pack(self.unit, spec, layer.weights, touched)
        return cpu_experts.run(
            spec,
            layer.weights,
            packed,
            hidden_states=hidden_states,
            topk_ids=ids,
            expert_weights=expert_weights,
            out=out,
        )

    def _run_with_torch(
        self,
        layer: PreparedLayer,
        hidden_states: torch.Tensor,
        ids: torch.Tensor,
        expert_weights: torch.Tensor,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps 2 to 5; arguments and results as those of `cpu_experts.run`."""
        spec = layer.spec
        plan = _plan(spec, ids)
        # One row more than there are (token, expert) pairs: the zeros that empty and not local slots add.
        g = torch.empty(plan.num_rows + 1, spec.hidden_size, dtype=torch.bfloat16, device=self.device)
        g[plan.num_rows] = 0
        self._run_experts(layer, plan, hidden_states, expert_weights, g)
        if out is not None:
            w = torch.ones_like(expert_weights) if spec.use_routing_scales_on_input else expert_weights
            _finalize(g, plan.row_of_slot.view(ids.shape), w, out)
        return g[: plan.num_rows], plan.row_of_slot

    def _run_experts(
        self,
        layer: PreparedLayer,
        plan: _Plan,
        hidden_states: torch.Tensor,
        expert_weights: torch.Tensor,
        g: torch.Tensor,
    ) -> None:
        """Both products of every local expert that has tokens, into the rows of g."""
        spec, weights = layer.spec, layer.weights
        if hidden_states.dtype != torch.float8_e4m3fn:
            assert weights.hidden_states_scale is not None
            hidden_states = quantize_fp8(hidden_states, weights.hidden_states_scale)
        x = torch.empty(hidden_states.shape, device=self.device)

        def convert(start: int) -> None:
            block = slice(start, start + _CONVERT_BLOCK_TOKENS)
            x[block] = from_fp8(hidden_states[block], torch.float32)

        is_cpu = self.device.type == "cpu"
        several = len(x) > _CONVERT_BLOCK_TOKENS
        run_all(convert, range(0, len(x), _CONVERT_BLOCK_TOKENS), by_workers=is_cpu and several)
        up_scales = weights.output1_scales_scalar.tolist()
        gate_scales = weights.output1_scales_gate_scalar.tolist()
        output2_scales = weights.output2_scales_scalar.tolist()
        freedom = _cpu_freedom(spec) if is_cpu else ON_CUDA

        def run(piece: _Piece) -> None:
            if layer.state is not None:
                expert = layer.state[piece.local]
            else:
                expert = pack(weights.gemm1_weights[piece.local], weights.gemm2_weights[piece.local])
            slots = plan.slot_of_row[piece.rows]
            more = freedom.num_rows(len(slots)) - len(slots)
            if more:  # the last row again and again: nobody reads what comes of it
                slots = torch.cat([slots, slots[-1:].expand(more)])
            a = freedom.multiply(expert.gemm1, x.index_select(0, slots // spec.top_k))
            if spec.use_routing_scales_on_input:
                a *= expert_weights.flatten()[slots, None].float()
            inter = _activate(spec.activation, a, up_scales[piece.local], gate_scales[piece.local])
            scale = output2_scales[piece.local]
            rows = freedom.multiply(lambda inter: expert.gemm2(inter, scale), round_to_fp8(inter))
            g[piece.rows] = rows[: piece.num_rows]

        # Fewer pieces than threads: let each product have all threads, where that cannot change its bits.
        by_workers = len(plan.pieces) >= torch.get_num_threads() or not freedom.any_threads
        run_all(run, plan.pieces, by_workers=is_cpu and by_workers)


def _cpu_freedom(spec: LayerSpec) -> Freedom:
    return probe(spec.gemm1_rows, spec.hidden_size, spec.intermediate_size, torch.get_num_threads())


@dataclass(frozen=True)
class _Piece:
    """Rows of one expert that are multiplied in one go."""

    local: int
    rows: slice

    @property
    def num_rows(self) -> int:
        stop: int = self.rows.stop
        return stop - int(self.rows.start)


@dataclass(frozen=True)
class _Plan:
    """Which (token, slot) pair is which row. Rows are grouped by local expert in ascending id, then by slot."""

    pieces: list[_Piece]
    """All rows, the largest pieces first, so that no worker is left with a large one at the end."""
    num_rows: int
    slot_of_row: torch.Tensor
    """[num_rows] int64, the flat t * K + k."""
    row_of_slot: torch.Tensor
    """[T * K] int32, -1 where the slot is empty or its expert not local."""


def _plan(spec: LayerSpec, topk_ids: torch.Tensor) -> _Plan:
    local = topk_ids.flatten().long() - spec.local_expert_offset
    local = torch.where((local >= 0) & (local < spec.num_local), local, spec.num_local)
    counts = torch.bincount(local, minlength=spec.num_local + 1)[: spec.num_local].tolist()
    pieces, num_rows = [], 0
    for expert, count in enumerate(counts):
        stop = num_rows + count
        pieces += [_Piece(expert, slice(at, min(at + MAX_ROWS, stop))) for at in range(num_rows, stop, MAX_ROWS)]
        num_rows = stop
    pieces.sort(key=lambda piece: -piece.num_rows)
    slot_of_row = local.argsort(stable=True)[:num_rows]
    row_of_slot = torch.full_like(local, -1, dtype=torch.int32)
    row_of_slot[slot_of_row] = torch.arange(num_rows, dtype=torch.int32, device=local.device)
    return _Plan(pieces, num_rows, slot_of_row, row_of_slot)


def _activate(activation: Activation, a: torch.Tensor, up_scale: float, gate_scale: float) -> torch.Tensor:
    """Step 3 before its rounding: a [rows, M] float32, which is overwritten, to a new [rows, I] float32."""
    if activation.is_gated:
        up, gate = a.chunk(2, dim=1)
        return _act(activation, gate, gate_scale).mul_(up.mul_(up_scale))
    return _act(activation, a, gate_scale).mul_(up_scale)


def _act(activation: Activation, x: torch.Tensor, scale: float) -> torch.Tensor:
    """act(x * scale) as a new tensor; x is overwritten."""
    # NOTE: not functional.silu and functional.gelu: they compute the last elements of a buffer with another exponential
    # than the first, so that a token's bits would depend on its place. torch.exp and torch.erf do not.
    match activation:
        case Activation.SWIGLU:
            denominator = torch.mul(x, -scale).exp_().add_(1.0)
            return torch.div(x.mul_(scale), denominator, out=denominator)
        case Activation.GELU | Activation.GEGLU:
            x = x.mul_(scale)
            return torch.mul(x, 0.5**0.5).erf_().add_(1.0).mul_(x.mul_(0.5))
        case Activation.RELU2:
            return torch.mul(x, scale).clamp_(min=0.0).square_()
        case Activation.IDENTITY:
            return torch.mul(x, scale)


def _finalize(g: torch.Tensor, row_of_slot: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = sum over ascending k of w[t, k] * g[row_of_slot[t, k]], in float32, rounded once to the type of out.

    g: [P + 1, H] bfloat16 whose last row is zero; row_of_slot: [T, K] int32, -1 for none; w: [T, K] bfloat16.
    """
    is_empty = row_of_slot < 0
    rows = row_of_slot.masked_fill(is_empty, g.shape[0] - 1)
    w = w.float().masked_fill(is_empty, 0.0)  # NaN times the row of zeros would be NaN

    def add_up(start: int) -> None:
        block = slice(start, start + _FINALIZE_BLOCK_TOKENS)
        terms = g.index_select(0, rows[block].flatten()).view(*rows[block].shape, -1).float()
        # NOTE: product and sum as two operations, each rounded: one fused operation is fused in some lanes only.
        terms *= w[block, :, None]
        total = terms[:, 0]
        for k in range(1, terms.shape[1]):
            total = total.add_(terms[:, k])
        out[block] = total

    several = len(out) > _FINALIZE_BLOCK_TOKENS
    run_all(add_up, range(0, len(out), _FINALIZE_BLOCK_TOKENS), by_workers=g.device.type == "cpu" and several)
