"""The CUDA backend against the reference: every method and activation, shapes with tails, and the call's options."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend

pytestmark = pytest.mark.gpu
gpu_layers = pytest.importorskip("gpu_layers", reason="needs the compiled kernels", exc_type=ImportError)

from gpu_layers import ACTIVATIONS, METHODS, check_call, error, make_inputs, make_weights, prepared, same_bits  # noqa: E402

from expertd_server import reference  # noqa: E402
from expertd_server.types import Activation, RoutingMethod  # noqa: E402
from expertd_server.weights import pad_intermediate  # noqa: E402

FAMILIES = gpu_layers.TILE_FAMILIES


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_and_activation(backend: CudaBackend, method: RoutingMethod, activation: Activation) -> None:
    layer = prepared(backend, 3, routing_method=method, activation=activation, routed_scaling_factor=2.5)
    for num_tokens, seed in ((1, 1), (37, 2), (130, 3)):
        check_call(backend, layer, num_tokens, seed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_every_family_and_activation(backend: CudaBackend, activation: Activation, family: str) -> None:
    backend.force_family = family
    layer = prepared(backend, 4, activation=activation, hidden_size=400, intermediate_size=304, num_experts=3, top_k=2)
    for num_tokens in (5, 200):
        check_call(backend, layer, num_tokens, 5, where=family)


@pytest.mark.parametrize(("n_group", "topk_group"), [(8, 4), (8, 1), (4, 4), (1, 1), (16, 3), (None, None)])
def test_groups(backend: CudaBackend, n_group: int | None, topk_group: int | None) -> None:
    layer = prepared(
        backend,
        5,
        routing_method=RoutingMethod.DEEPSEEK_V3,
        num_experts=64,
        top_k=3,
        n_group=n_group,
        topk_group=topk_group,
    )
    for num_tokens in (6, 100):
        check_call(backend, layer, num_tokens, 6)


def random_fields(rng: random.Random) -> dict[str, Any]:
    """A layer nobody would write down."""
    experts = rng.choice((1, 2, 5, 8, 31, 33, 64, 200))
    fields: dict[str, Any] = {
        "hidden_size": 16 * rng.randint(1, 20),
        "intermediate_size": 16 * rng.randint(1, 20),
        "num_experts": experts,
        "top_k": rng.randint(1, min(experts, 8)),
        "routing_method": rng.choice(METHODS),
        "activation": rng.choice(ACTIVATIONS),
        "norm_topk_prob": rng.random() < 0.7,
        "routed_scaling_factor": rng.choice((None, 2.5)),
    }
    if fields["routing_method"] == RoutingMethod.LLAMA4:
        fields["top_k"] = 1
    if fields["top_k"] == 1:
        fields["use_routing_scales_on_input"] = rng.random() < 0.5
    if fields["routing_method"] == RoutingMethod.DEEPSEEK_V3 and experts in (8, 64, 200) and rng.random() < 0.7:
        groups = rng.choice([g for g in (2, 4, 8) if experts // g >= 2])
        least = -(-fields["top_k"] // (experts // groups))
        fields.update(n_group=groups, topk_group=rng.randint(least, groups))
    if rng.random() < 0.4:
        fields["local_expert_offset"] = rng.randrange(experts)
        fields["local_num_experts"] = rng.randint(1, experts - fields["local_expert_offset"])
    return fields


@pytest.mark.parametrize("batch", range(20))
def test_random_small_cases(backend: CudaBackend, batch: int) -> None:
    exact = total = 0
    for case in range(50):
        seed = batch * 50 + case
        rng = random.Random(seed)
        backend.force_family = rng.choice((*FAMILIES, None))
        layer = prepared(backend, seed, max_num_tokens=128, **random_fields(rng))
        num_tokens = rng.choice((1, 2, 3, 7, 16, 33, 64, 65, 90))
        agreement = check_call(backend, layer, num_tokens, seed, skew=rng.choice((0.0, 0.0, 3.0)))
        exact, total = exact + agreement.inter_exact, total + agreement.inter_total
    assert exact >= 0.95 * total, f"only {exact / total:.1%} of inter equal the reference"


@pytest.mark.parametrize(("experts", "top_k"), [(1024, 32), (512, 22), (257, 9)])
def test_many_experts(backend: CudaBackend, experts: int, top_k: int) -> None:
    for method in (RoutingMethod.DEFAULT, RoutingMethod.SIGMOID_RENORM, RoutingMethod.MINIMAX2):
        fields = {"hidden_size": 64, "intermediate_size": 32, "routing_method": method}
        layer = prepared(backend, 6, num_experts=experts, top_k=top_k, **fields)
        for num_tokens in (1, 8, 70):
            check_call(backend, layer, num_tokens, 7)


def test_skewed_routing(backend: CudaBackend) -> None:
    layer = prepared(backend, 7, max_num_tokens=1000, num_experts=32, top_k=2)
    check_call(backend, layer, 700, 8, skew=6.0)


def test_slices_add_up(backend: CudaBackend) -> None:
    whole = prepared(backend, 8, num_experts=16)
    hidden_states, logits = make_inputs(whole.spec, 50, 9)
    expected = backend.forward(whole, hidden_states, routing_logits=logits, output_dtype=torch.float32).output
    total = torch.zeros_like(expected)
    w = whole.weights
    for offset, count in ((0, 3), (3, 1), (4, 12)):
        part = slice(offset, offset + count)
        spec = gpu_layers.make_spec(num_experts=16, local_expert_offset=offset, local_num_experts=count)
        weights = gpu_layers.ExpertWeights(
            *(t[part].contiguous() for t in (w.gemm1_weights, w.output1_scales_scalar, w.output1_scales_gate_scalar)),
            *(t[part].contiguous() for t in (w.gemm2_weights, w.output2_scales_scalar)),
        )
        layer = backend.prepare(spec, weights, max_num_tokens=256)
        total += backend.forward(layer, hidden_states, routing_logits=logits, output_dtype=torch.float32).output
    assert error(total.cpu(), expected.cpu()) < 1e-6


def test_no_local_expert_gives_zeros(backend: CudaBackend) -> None:
    layer = prepared(backend, 9, num_experts=8, local_expert_offset=7, local_num_experts=1)
    hidden_states, _ = make_inputs(layer.spec, 20, 1)
    ids = torch.zeros(20, 4, dtype=torch.int32, device="cuda")
    weights = torch.ones(20, 4, device="cuda")
    output = backend.forward(layer, hidden_states, topk_ids=ids, topk_weights=weights).output
    assert output is not None
    assert int(output.view(torch.int16).abs().sum()) == 0


@pytest.mark.parametrize("num_tokens", [1, 5, 80])
def test_prerouted(backend: CudaBackend, num_tokens: int) -> None:
    layer = prepared(backend, 10, num_experts=8, top_k=3)
    hidden_states, _ = make_inputs(layer.spec, num_tokens, 1)
    ids = torch.randint(-1, 8, (num_tokens, 3), dtype=torch.int32, device="cuda")  # empty slots
    ids[0] = torch.tensor([2, 5, 2])  # an expert twice in a row
    random = torch.rand(num_tokens, 3, device="cuda")
    for weights in (random, random.bfloat16()):
        result = backend.forward(layer, hidden_states, topk_ids=ids, topk_weights=weights)
        expected = reference.forward(layer.spec, layer.weights, hidden_states, topk_ids=ids, topk_weights=weights)
        assert torch.equal(result.topk_ids, ids)
        assert same_bits(result.expert_weights, weights.to(torch.bfloat16))
        assert result.output is not None
        assert error(result.output.cpu(), expected.output) < (2e-2 if num_tokens == 80 else 6e-2)
    out_of_range = torch.where(ids < 0, 1000, ids)
    other = backend.forward(layer, hidden_states, topk_ids=out_of_range, topk_weights=weights)
    assert other.output is not None
    assert same_bits(other.output, result.output)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 40, 200])
def test_slots_of_a_token_with_the_same_expert_share_a_row(backend: CudaBackend, num_tokens: int) -> None:
    layer = prepared(backend, 13, num_experts=8, local_expert_offset=3, local_num_experts=1)
    hidden_states, _ = make_inputs(layer.spec, num_tokens, 1)
    ids = torch.full((num_tokens, 4), 3, dtype=torch.int32, device="cuda")
    weights = torch.ones(num_tokens, 4, device="cuda")
    result = backend.forward(layer, hidden_states, topk_ids=ids, topk_weights=weights, do_finalize=False)
    assert result.gemm2_output is not None
    assert result.expanded_idx_to_permuted_idx is not None
    assert result.gemm2_output.shape[0] == num_tokens  # there is no room for more
    rows = torch.arange(num_tokens, dtype=torch.int32).repeat_interleave(4)
    assert torch.equal(result.expanded_idx_to_permuted_idx.flatten().cpu(), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(backend: CudaBackend, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    spec = gpu_layers.make_spec()
    layer = backend.prepare(spec, make_weights(spec, 11, hidden_states_scale=3.0), max_num_tokens=256)
    _, logits = make_inputs(spec, 77, 2)
    wide = torch.randn(77, spec.hidden_size, device="cuda").to(dtype)
    wide[3, 5] = 1e3  # saturates
    quantised = reference.quantize(wide.cpu(), 3.0).cuda()
    result = backend.forward(layer, wide, routing_logits=logits, output_dtype=out_dtype).output
    expected = backend.forward(layer, quantised, routing_logits=logits, output_dtype=torch.float32).output
    assert result is not None
    assert expected is not None
    assert same_bits(result, expected.to(out_dtype))


def test_without_finalize(backend: CudaBackend) -> None:
    layer = prepared(backend, 12, max_num_tokens=64, num_experts=12, local_expert_offset=2, local_num_experts=7)
    for num_tokens in (1, 64, 150):
        hidden_states, logits = make_inputs(layer.spec, num_tokens, 3)
        whole = backend.forward(layer, hidden_states, routing_logits=logits, output_dtype=torch.float32)
        parts = backend.forward(layer, hidden_states, routing_logits=logits, do_finalize=False)
        assert parts.output is None
        assert parts.gemm2_output is not None
        assert parts.expanded_idx_to_permuted_idx is not None
        assert bool(torch.isfinite(parts.gemm2_output).all())
        rows = parts.expanded_idx_to_permuted_idx.view(num_tokens, -1)
        local = (parts.topk_ids >= 2) & (parts.topk_ids < 9)
        assert torch.equal(rows >= 0, local)
        experts = torch.full((int(rows.max()) + 1,), -1, dtype=torch.int32, device="cuda")
        experts[rows[local].long()] = parts.topk_ids[local]
        assert torch.equal(experts, experts.sort().values), "rows are not grouped by expert in ascending id"
        total = torch.zeros(num_tokens, layer.spec.hidden_size, device="cuda")
        for k in range(layer.spec.top_k):
            g = parts.gemm2_output[rows[:, k].clamp(min=0).long()].float()
            total += torch.where(local[:, k, None], parts.expert_weights[:, k, None].float() * g, 0.0)
        assert whole.output is not None
        assert error(total.cpu(), whole.output.cpu()) < 1e-6


def test_replay_and_num_valid_tokens(backend: CudaBackend) -> None:
    layer = prepared(backend, 13, max_num_tokens=100)
    for num_tokens, valid in ((40, 17), (40, 0), (250, 201), (250, 64)):
        hidden_states, logits = make_inputs(layer.spec, num_tokens, 4)
        full = backend.forward(layer, hidden_states, routing_logits=logits)
        replay = torch.full((num_tokens + 5, 4), -7, dtype=torch.int16, device="cuda")
        out = torch.full((num_tokens, layer.spec.hidden_size), 3.0, dtype=torch.bfloat16, device="cuda")
        hidden_states.view(torch.uint8)[valid:] = 0x7F  # NaN
        result = backend.forward(
            layer,
            hidden_states,
            routing_logits=logits,
            out=out,
            routing_replay_out=replay,
            num_valid_tokens=torch.tensor(valid, dtype=torch.int32, device="cuda"),
        )
        assert result.output is out
        assert full.output is not None
        assert same_bits(out[:valid], full.output[:valid])
        assert bool((out[valid:] == 3.0).all())
        assert torch.equal(replay[:valid].int(), full.topk_ids[:valid])
        assert bool((replay[valid:] == -7).all())


def test_no_tokens(backend: CudaBackend) -> None:
    layer = prepared(backend, 14)
    hidden_states, logits = make_inputs(layer.spec, 0, 1)
    result = backend.forward(layer, hidden_states, routing_logits=logits)
    assert result.output is not None
    assert result.output.shape == (0, layer.spec.hidden_size)
    parts = backend.forward(layer, hidden_states, routing_logits=logits, do_finalize=False)
    assert parts.gemm2_output is not None
    assert parts.gemm2_output.shape == (0, layer.spec.hidden_size)


def test_nan_stays_in_its_row(backend: CudaBackend) -> None:
    for method in METHODS:
        layer = prepared(backend, 15, routing_method=method)
        hidden_states, logits = make_inputs(layer.spec, 70, 5)
        clean = backend.forward(layer, hidden_states, routing_logits=logits)
        hidden_states.view(torch.uint8)[11] = 0x7F  # NaN
        logits[20, 3] = float("nan")
        logits[21] = float("nan")
        result = backend.forward(layer, hidden_states, routing_logits=logits)
        assert result.output is not None
        assert clean.output is not None
        others = [t for t in range(70) if t not in (11, 20, 21)]
        assert same_bits(result.output[others], clean.output[others])
        assert bool(result.output[[11, 20, 21]].isnan().any(1).all()), method
        ids = result.topk_ids
        assert int(ids.min()) >= 0
        assert int(ids.max()) < layer.spec.num_experts


def test_a_hidden_size_that_cannot_be_tiled_is_refused(backend: CudaBackend) -> None:
    with pytest.raises(ValueError, match=r"hidden_size is 200.*multiple of 16"):
        prepared(backend, 16, hidden_size=200)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("intermediate_size", [1, 24, 200])
def test_an_intermediate_size_that_cannot_be_tiled_is_padded(
    backend: CudaBackend, intermediate_size: int, activation: Activation
) -> None:
    layer = prepared(backend, 16, intermediate_size=intermediate_size, activation=activation)
    spec = layer.spec
    assert spec.intermediate_size == intermediate_size
    hidden_states, logits = make_inputs(spec, 37, 5)
    result = backend.forward(layer, hidden_states, routing_logits=logits)
    assert result.output is not None
    weights = make_weights(spec, 16)  # what `prepared` padded
    expected = reference.forward(
        spec,
        weights.to("cpu"),
        hidden_states.cpu(),
        topk_ids=result.topk_ids.cpu(),
        topk_weights=result.expert_weights.cpu(),
    )
    assert error(result.output.cpu(), expected.output) < 6e-2, f"seed 16, {spec}"  # few values: see check_call
    padded = backend.prepare(*pad_intermediate(spec, weights, 64), max_num_tokens=256)
    assert padded.spec.intermediate_size % 64 == 0
    again = backend.forward(padded, hidden_states, routing_logits=logits).output
    assert again is not None
    assert same_bits(result.output, again), f"seed 16, {spec}"
