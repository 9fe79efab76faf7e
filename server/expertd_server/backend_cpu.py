"""The layer in plain torch: the CPU backend, and the fallback on CUDA devices without kernels of their own.

A token's bits may not depend on the tokens beside it. Matrix products are the one place where a library could break
that, by summing in another order for another number of rows. So the products used here are probed once for each size:
where a row's bits change with the number of rows, rows go through blocks of a fixed size instead.

On the CPU experts run side by side, one thread each.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch.nn import functional

from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.fp8 import from_fp8, quantize_fp8, to_fp8
from expertd_server.routing import route
from expertd_server.types import Activation, LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["TorchBackend"]

_log = logging.getLogger(__name__)
_PIECE_ROWS = 256
"""Most rows of one product: an expert with more is shared among threads."""
_PROBE_ROWS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    12,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    80,
    95,
    96,
    127,
    128,
    130,
    200,
    255,
    256,
)
_ROW_BLOCK = 32  # divides _PIECE_ROWS
_K_MULTIPLE = 32
_WORKERS_START_TIMEOUT_S = 60.0
_CONVERT_BLOCK_TOKENS = 64
_FINALIZE_BLOCK_TOKENS = 16  # the expert outputs of a block stay in the cache while they are summed


class TorchBackend:
    """`Backend` for the CPU ("cpu") and for any CUDA device ("torch")."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.name = "cpu" if self.device.type == "cpu" else "torch"

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        """Convert every expert once: two bytes a weight on the CPU; elsewhere the FP8 weights stay as they are.

        Any hidden_size and intermediate_size will do; max_num_tokens has no effect.
        """
        weights.check(spec)
        if self.device.type != "cpu":
            return self.wrap(spec, weights.to(self.device))
        experts = [_pack(*pair) for pair in zip(weights.gemm1_weights, weights.gemm2_weights, strict=True)]
        none = torch.empty(0, dtype=torch.float8_e4m3fn)  # the FP8 weights are not read again
        kept = replace(weights, gemm1_weights=none, gemm2_weights=none)
        return PreparedLayer(spec, kept, kept.nbytes + sum(expert.nbytes for expert in experts), experts)

    def wrap(self, spec: LayerSpec, weights: ExpertWeights) -> PreparedLayer:
        """The layer as it is: `forward` converts the experts that it touches, at every call, and keeps none."""
        return PreparedLayer(spec, weights, weights.nbytes)

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

        plan = _plan(spec, ids)
        # One row more than there are (token, expert) pairs: the zeros that empty and not local slots add.
        g = torch.empty(plan.num_rows + 1, spec.hidden_size, dtype=torch.bfloat16, device=self.device)
        g[plan.num_rows] = 0
        self._run_experts(layer, plan, hidden_states[:num_valid], expert_weights, g)
        if not do_finalize:
            return MoEOutput(
                ids, expert_weights, gemm2_output=g[: plan.num_rows], expanded_idx_to_permuted_idx=plan.row_of_slot
            )
        if out is None:
            out = torch.zeros(num_tokens, spec.hidden_size, dtype=output_dtype, device=self.device)
        w = torch.ones_like(expert_weights) if spec.use_routing_scales_on_input else expert_weights
        _finalize(g, plan.row_of_slot.view(num_tokens, spec.top_k)[:num_valid], w[:num_valid], out[:num_valid])
        return MoEOutput(ids, expert_weights, output=out)

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
        _run_all(convert, range(0, len(x), _CONVERT_BLOCK_TOKENS), in_parallel=is_cpu)
        up_scales = weights.output1_scales_scalar.tolist()
        gate_scales = weights.output1_scales_gate_scalar.tolist()
        output2_scales = weights.output2_scales_scalar.tolist()
        if is_cpu:
            freedom = _freedom(spec.gemm1_rows, spec.hidden_size, spec.intermediate_size, torch.get_num_threads())
        else:
            freedom = _Freedom(any_rows=False, any_threads=True)
        block = None if freedom.any_rows else _ROW_BLOCK

        def run(piece: _Piece) -> None:
            if layer.state is not None:
                expert = layer.state[piece.local]
            else:
                expert = _pack(weights.gemm1_weights[piece.local], weights.gemm2_weights[piece.local])
            slots = plan.slot_of_row[piece.rows]
            a = _in_blocks(expert.gemm1, x.index_select(0, slots // spec.top_k), block)
            if spec.use_routing_scales_on_input:
                a *= expert_weights.flatten()[slots, None].float()
            inter = _activate(spec.activation, a, up_scales[piece.local], gate_scales[piece.local])
            gemm2 = functools.partial(expert.gemm2, scale=output2_scales[piece.local])
            g[piece.rows] = _in_blocks(gemm2, from_fp8(to_fp8(inter), torch.bfloat16), block)

        # Fewer pieces than threads: let each product have all threads, where that cannot change its bits.
        in_parallel = len(plan.pieces) >= torch.get_num_threads() or not freedom.any_threads
        _run_all(run, plan.pieces, in_parallel=is_cpu and in_parallel)


class _Expert(Protocol):
    """One expert's two products, in a form ready to multiply with."""

    nbytes: int

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, H] float32 holding fp8 values, to a [rows, M] float32."""
        ...

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        """inter [rows, I] bfloat16 holding fp8 values, to scale * product [rows, H] bfloat16, rounded once."""
        ...


class _SplitExpert:
    """Both products on the CPU's bfloat16 unit.

    fp8 values are exact in bfloat16 and sums are kept in float32, but torch rounds what it returns to bfloat16: too
    coarse for the input of the activation. So a second pass of the first product returns what the first pass rounded
    away. With weights in oneDNN's own order the two passes take as long as one with weights in rows.
    """

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        rows = _padded(from_fp8(gemm1_weights, torch.bfloat16))
        self._gemm1_weights = torch.ops.mkldnn._reorder_linear_weight(rows, _ROW_BLOCK)
        self._gemm2_weights = _padded(from_fp8(gemm2_weights, torch.bfloat16)).t()
        self.nbytes = 2 * (rows.numel() + self._gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        x = _padded(x.bfloat16())
        high: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._gemm1_weights, None, "none", [], "")
        low = torch.ops.mkldnn._linear_pointwise.binary(x, high, self._gemm1_weights, None, "sub")
        return high.float().add_(low)

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return _scaled_mm(_padded(inter), self._gemm2_weights, scale)


class _HalfExpert:
    """The first product with float32 activations and float16 weights on the CPU's vector unit, the second as above.

    It reads two bytes a weight, as bfloat16 would, and returns float32 in one pass.
    """

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        self._gemm1_weights = torch.ops.quantized.linear_prepack_fp16(from_fp8(gemm1_weights, torch.float32), None)
        self._gemm2_weights = _padded(from_fp8(gemm2_weights, torch.bfloat16)).t()
        self.nbytes = 2 * (gemm1_weights.numel() + self._gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._gemm1_weights)
        return a

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return _scaled_mm(_padded(inter), self._gemm2_weights, scale)


class _CudaExpert:
    """Both products in bfloat16 with float32 results, which torch has on CUDA devices only."""

    def __init__(self, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> None:
        self._gemm1_weights = gemm1_weights.bfloat16().t()
        self._gemm2_weights = gemm2_weights.bfloat16().t()
        self.nbytes = 2 * (gemm1_weights.numel() + gemm2_weights.numel())

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x.bfloat16(), self._gemm1_weights, out_dtype=torch.float32)

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.mm(inter, self._gemm2_weights, out_dtype=torch.float32).mul_(scale).bfloat16()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """x [rows, K] with zeros up to a multiple of _K_MULTIPLE columns."""
    # NOTE: for other K oneDNN's AMX product reads on into the next row and multiplies what it finds there by zero: were
    # that NaN, it would reach this row.
    return functional.pad(x, (0, -x.shape[1] % _K_MULTIPLE)) if x.shape[1] % _K_MULTIPLE else x


def _scaled_mm(x: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """bfloat16(scale * (x @ weights)), scaled before the only rounding."""
    unread = x.new_zeros(1)  # addmm's first operand, which beta = 0 takes out
    return torch.addmm(unread, x, weights, beta=0.0, alpha=scale)


@functools.cache
def _cpu_expert_type() -> type[_SplitExpert] | type[_HalfExpert]:
    # AMX is several times as fast as the vector unit: there two passes cost less than one of float32 arithmetic.
    has_float16_product = "fbgemm" in torch.backends.quantized.supported_engines
    return _HalfExpert if has_float16_product and not torch.cpu._is_amx_tile_supported() else _SplitExpert


def _pack(gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> _Expert:
    """One expert from its FP8 weights [M, H] and [H, I]."""
    if gemm1_weights.device.type == "cpu":
        return _cpu_expert_type()(gemm1_weights, gemm2_weights)
    return _CudaExpert(gemm1_weights, gemm2_weights)


def _in_blocks(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, block: int | None) -> torch.Tensor:
    """product(x), in blocks of that many rows, the last one filled with zeros; None: in one piece."""
    if block is None:
        return product(x)
    padded = functional.pad(x, (0, 0, 0, -len(x) % block))
    return torch.cat([product(rows) for rows in torch.split(padded, block)])[: len(x)]


@dataclass(frozen=True)
class _Freedom:
    """What cannot change the bits of a row in the CPU's products of one size. Tried, not assumed: it depends on the CPU
    and on the libraries under torch.
    """

    any_rows: bool
    """The number of rows, up to _PIECE_ROWS."""
    any_threads: bool
    """One thread or all of them."""


@functools.cache
def _freedom(gemm1_rows: int, hidden_size: int, intermediate_size: int, num_threads: int) -> _Freedom:
    generator = torch.Generator().manual_seed(0)

    def random_fp8(*shape: int) -> torch.Tensor:
        # Any byte but the two NaNs, 0x7f and 0xff.
        codes = torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * 0x80
        return (codes + signs).view(torch.float8_e4m3fn)

    expert = _pack(random_fp8(gemm1_rows, hidden_size), random_fp8(hidden_size, intermediate_size))
    x = from_fp8(random_fp8(_PIECE_ROWS, hidden_size), torch.float32)
    inter = from_fp8(random_fp8(_PIECE_ROWS, intermediate_size), torch.bfloat16)

    def products(*, on_one_thread: bool) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Both products of the last rows of x and inter, by their number."""
        results = {}

        def run(rows: int) -> None:
            results[rows] = expert.gemm1(x[-rows:]), expert.gemm2(inter[-rows:], 0.3)

        _run_all(run, _PROBE_ROWS, in_parallel=on_one_thread)
        return results

    def equal(some: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return all(torch.equal(left, right) for left, right in zip(some, other, strict=True))

    one, many = products(on_one_thread=True), products(on_one_thread=False)
    a, g = one[_PIECE_ROWS]
    freedom = _Freedom(
        any_rows=all(equal(one[rows], (a[-rows:], g[-rows:])) for rows in _PROBE_ROWS),
        any_threads=all(equal(one[rows], many[rows]) for rows in _PROBE_ROWS),
    )
    if not freedom.any_rows:
        _log.warning(
            "products of %d x %d and %d x %d round differently for different numbers of rows on this CPU: tokens go "
            "through blocks of %d rows, which is slower",
            gemm1_rows, hidden_size, hidden_size, intermediate_size, _ROW_BLOCK,
        )  # fmt: skip
    return freedom


_Item = TypeVar("_Item")


def _run_all(function: Callable[[_Item], None], items: Sequence[_Item], *, in_parallel: bool) -> None:
    """function(item) for every item: here, one after the other, or by the workers."""
    num_threads = torch.get_num_threads()
    if not in_parallel or num_threads == 1 or len(items) < 2:
        for item in items:
            function(item)
        return
    is_inference = torch.is_inference_mode_enabled()  # a property of the thread, which the workers have to share

    def call(item: _Item) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            function(item)

    for _ in _workers(num_threads).map(call, items):
        pass


@functools.cache
def _workers(num_threads: int) -> ThreadPoolExecutor:
    """As many threads, in each of which torch uses one thread.

    Experts side by side wait for one another once in a call, threads inside an operation at each of its ends: on a
    machine with other work to do that is the difference between slower and several times slower.
    """
    all_started = threading.Barrier(num_threads + 1)

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread's number when first asked, and would undo the next line
        torch.set_num_threads(1)
        all_started.wait(_WORKERS_START_TIMEOUT_S)

    workers = ThreadPoolExecutor(num_threads, thread_name_prefix="expertd-cpu")
    started = [workers.submit(start) for _ in range(num_threads)]
    all_started.wait(_WORKERS_START_TIMEOUT_S)
    for future in started:
        future.result(_WORKERS_START_TIMEOUT_S)
    # NOTE: set_num_threads is this thread's number and the default of threads to come; put the latter back.
    torch.set_num_threads(num_threads)
    return workers


@dataclass(frozen=True)
class _Piece:
    """Rows of one expert that are multiplied in one go."""

    local: int
    rows: slice


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
        pieces += [_Piece(expert, slice(at, min(at + _PIECE_ROWS, stop))) for at in range(num_rows, stop, _PIECE_ROWS)]
        num_rows = stop
    pieces.sort(key=lambda piece: piece.rows.start - piece.rows.stop)
    slot_of_row = local.argsort(stable=True)[:num_rows]
    row_of_slot = torch.full_like(local, -1, dtype=torch.int32)
    row_of_slot[slot_of_row] = torch.arange(num_rows, dtype=torch.int32, device=local.device)
    return _Plan(pieces, num_rows, slot_of_row, row_of_slot)


def _activate(activation: Activation, a: torch.Tensor, up_scale: float, gate_scale: float) -> torch.Tensor:
    """Step 3 before its rounding: a [rows, M] float32 to [rows, I] float32."""
    if activation.is_gated:
        up, gate = a.chunk(2, dim=1)
        return _act(activation, gate * gate_scale).mul_(up * up_scale)
    return _act(activation, a * gate_scale).mul_(up_scale)


def _act(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    # NOTE: not functional.silu and functional.gelu: they compute the last elements of a buffer with another exponential
    # than the first, so that a token's bits would depend on its place. torch.exp and torch.erf do not.
    match activation:
        case Activation.SWIGLU:
            return x / torch.exp(-x).add_(1.0)
        case Activation.GELU | Activation.GEGLU:
            return torch.erf(x * 0.5**0.5).add_(1.0).mul_(x * 0.5)
        case Activation.RELU2:
            return x.clamp(min=0.0).square_()
        case Activation.IDENTITY:
            return x


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

    _run_all(add_up, range(0, len(out), _FINALIZE_BLOCK_TOKENS), in_parallel=g.device.type == "cpu")
