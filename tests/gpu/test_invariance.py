"""A row's bits depend on the row and the layer alone; streams and graphs change nothing either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend

pytestmark = pytest.mark.gpu
gpu_layers = pytest.importorskip("gpu_layers", reason="needs the compiled kernels", exc_type=ImportError)

from gpu_layers import make_inputs, prepared, same_bits  # noqa: E402

from expertd_server.types import Activation, RoutingMethod  # noqa: E402

FAMILIES = gpu_layers.TILE_FAMILIES
SIZES = (1, 2, 7, 8, 12, 33, 64, 129, 256, 500, 2048, 8192)


@pytest.mark.parametrize("activation", [Activation.SWIGLU, Activation.RELU2], ids=lambda a: a.name)
def test_batch_size_and_family(backend: CudaBackend, activation: Activation) -> None:
    layer = prepared(
        backend, 21, max_num_tokens=8192, hidden_size=1040, intermediate_size=528, num_experts=32, activation=activation
    )
    hidden_states, logits = make_inputs(layer.spec, max(SIZES), 1, skew=0.5)
    expected = backend.forward(layer, hidden_states, routing_logits=logits, output_dtype=torch.float32)
    assert expected.output is not None
    shuffle = torch.randperm(max(SIZES), device="cuda")
    for family in FAMILIES:
        backend.force_family = family
        for num_tokens in SIZES:
            for order in (torch.arange(num_tokens, device="cuda"), shuffle[:num_tokens]):
                x = hidden_states.view(torch.uint8)[order].view(torch.float8_e4m3fn)
                result = backend.forward(layer, x, routing_logits=logits[order], output_dtype=torch.float32)
                assert result.output is not None
                assert same_bits(result.output, expected.output[order]), f"{family}, T {num_tokens}"
                assert same_bits(result.expert_weights, expected.expert_weights[order]), f"{family}, T {num_tokens}"


ROUTINGS: tuple[dict[str, Any], ...] = (
    {"routing_method": RoutingMethod.RENORMALIZE, "num_experts": 128, "top_k": 8},
    {"routing_method": RoutingMethod.TOPK, "num_experts": 64, "top_k": 3},
    {"routing_method": RoutingMethod.SIGMOID_RENORM, "num_experts": 100, "top_k": 8},
    {"routing_method": RoutingMethod.MINIMAX2, "num_experts": 160, "top_k": 8},
    {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 256, "top_k": 8, "n_group": 8, "topk_group": 4},
    {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 256, "top_k": 3, "n_group": 8, "topk_group": 2},
    {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 256, "top_k": 8, "n_group": 8, "topk_group": 1},
    {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 128, "top_k": 6, "n_group": 8, "topk_group": 3},
    {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 128, "top_k": 8, "n_group": 4, "topk_group": 2},
    {"routing_method": RoutingMethod.RENORMALIZE_NAIVE, "num_experts": 128, "top_k": 8},
    {"routing_method": RoutingMethod.DEFAULT, "num_experts": 100, "top_k": 5},
    {"routing_method": RoutingMethod.DEFAULT, "num_experts": 200, "top_k": 8},
)
BY_LOGIT = (RoutingMethod.RENORMALIZE, RoutingMethod.TOPK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", ROUTINGS, ids=lambda f: f"{f['routing_method'].name} {f['num_experts']}")
def test_routing_of_many_tokens(backend: CudaBackend, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Four tokens share a warp where there are many, if a layer allows it; one has a warp of its own in small calls."""
    most = 8200  # the logits of so many come in the order of the warps
    layer = prepared(backend, 31, max_num_tokens=most, hidden_size=16, intermediate_size=16, **fields)
    _, logits = make_inputs(layer.spec, most, 10)
    logits = logits.float()
    draw = torch.rand(logits.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    logits[1::8] = (4 * draw[1::8]).floor()  # many equal scores, so too many that may be chosen
    logits[2::8] = (logits[2::8] * 2).round() / 2  # some
    logits[3::8] = torch.where(draw[3::8] < 0.2, 0.0, -0.0)
    logits[4::8] *= 30  # scores that are 0 or 1
    logits[5::8] = torch.where(draw[5::8] < 0.01, float("nan"), logits[5::8])
    logits[6::8] = torch.where(
        draw[6::8] < 0.1, float("inf"), torch.where(draw[6::8] < 0.3, -float("inf"), logits[6::8])
    )
    logits[7::8] = torch.where(draw[7::8] < 0.9, -float("inf"), logits[7::8])
    logits = logits.to(dtype)
    hidden_states = torch.zeros(most, 16, device="cuda").to(torch.float8_e4m3fn)
    many = backend.forward(layer, hidden_states, routing_logits=logits, do_finalize=False)
    starts = [(start, 100) for start in range(0, 4100, 100)] + [(start, 8) for start in range(0, 400, 8)]
    for start, num_tokens in [(0, 4100), *starts]:
        part = slice(start, start + num_tokens)
        few = backend.forward(layer, hidden_states[part], routing_logits=logits[part], do_finalize=False)
        assert torch.equal(many.topk_ids[part], few.topk_ids)
        assert same_bits(many.expert_weights[part], few.expert_weights)
    if layer.spec.routing_method in BY_LOGIT:  # a sort says what they are: NaN first, equal ones by their place
        best = logits.float().sort(dim=1, descending=True, stable=True).indices[:, : layer.spec.top_k]
        assert torch.equal(many.topk_ids, best.int())
    # The rows are those of a stable sort by expert.
    ids = many.topk_ids.flatten()
    rows = torch.empty_like(ids)
    rows[ids.argsort(stable=True)] = torch.arange(len(ids), dtype=torch.int32, device="cuda")
    assert many.expanded_idx_to_permuted_idx is not None
    assert torch.equal(many.expanded_idx_to_permuted_idx.flatten(), rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 8, "top_k": 2},
        {"num_experts": 8, "top_k": 2, "local_expert_offset": 2, "local_num_experts": 4},
        {"routing_method": RoutingMethod.RENORMALIZE_NAIVE, "num_experts": 128, "top_k": 8},
        {"routing_method": RoutingMethod.DEEPSEEK_V3, "num_experts": 256, "top_k": 8, "n_group": 8, "topk_group": 4},
        {"routing_method": RoutingMethod.TOPK, "num_experts": 600, "top_k": 8},
    ],
    ids=lambda f: f"{f['num_experts']} {f.get('local_num_experts', 'all')}",
)
def test_weights_that_are_asked_for_while_few_tokens_are_routed(backend: CudaBackend, fields: dict[str, Any]) -> None:
    layer = prepared(backend, 23, hidden_size=512, intermediate_size=96, **fields)  # three times what a block asks for
    hidden_states, logits = make_inputs(layer.spec, 64, 2)
    many = backend.forward(layer, hidden_states, routing_logits=logits)
    assert many.output is not None
    for num_tokens in range(1, 9):
        x = hidden_states[:num_tokens]
        few = backend.forward(layer, x, routing_logits=logits[:num_tokens])
        ready = backend.forward(layer, x, topk_ids=few.topk_ids, topk_weights=few.expert_weights)
        for result in (few, ready):
            assert result.output is not None
            assert same_bits(result.output, many.output[:num_tokens])
            assert torch.equal(result.topk_ids, many.topk_ids[:num_tokens])


@pytest.mark.parametrize("num_tokens", [1, 8, 300])
def test_product_2_waits_for_all_of_product_1_or_for_its_token_tiles(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    layer = prepared(backend, 29, max_num_tokens=300, hidden_size=1040, intermediate_size=528, num_experts=32)
    hidden_states, logits = make_inputs(layer.spec, num_tokens, 7)
    outputs = []
    for family in FAMILIES:
        backend.force_family = family
        for waits_for_all in (True, False):
            monkeypatch.setattr(
                type(backend),
                "_ready_count",
                lambda self, spec, chosen, _, zero=waits_for_all: 0 if zero else chosen.ready_count(spec.gemm1_rows),
            )
            backend.poison_workspaces()
            outputs.append(backend.forward(layer, hidden_states, routing_logits=logits).output)
    assert not outputs[0].isnan().any()
    assert all(same_bits(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F])  # of a tile list: small and huge counts, indexes out of it
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_nothing_that_lies_in_scratch_memory_matters(backend: CudaBackend, num_tokens: int, byte: int) -> None:
    layer = prepared(backend, 30, max_num_tokens=300)
    hidden_states, logits = make_inputs(layer.spec, num_tokens, 8)
    expected = backend.forward(layer, hidden_states, routing_logits=logits).output
    for family in FAMILIES:
        backend.force_family = family
        backend.poison_workspaces(byte)
        output = backend.forward(layer, hidden_states, routing_logits=logits).output
        assert same_bits(output, expected), family


def test_pdl_and_chunks(backend: CudaBackend) -> None:
    layer = prepared(backend, 22, max_num_tokens=2048)
    chunked = backend.prepare(layer.spec, layer.weights, max_num_tokens=100)
    for num_tokens in (3, 64, 1000):
        hidden_states, logits = make_inputs(layer.spec, num_tokens, 2)
        outputs = [
            backend.forward(chosen, hidden_states, routing_logits=logits, enable_pdl=pdl).output
            for chosen, pdl in ((layer, None), (layer, False), (layer, True), (chunked, True))
        ]
        assert all(same_bits(outputs[0], other) for other in outputs[1:])


def test_long_calls(backend: CudaBackend) -> None:
    layer = prepared(backend, 23, max_num_tokens=65536, hidden_size=64, intermediate_size=32)
    hidden_states, logits = make_inputs(layer.spec, 65536, 3)
    whole = backend.forward(layer, hidden_states, routing_logits=logits).output
    part = backend.forward(layer, hidden_states[60000:60100], routing_logits=logits[60000:60100]).output
    assert same_bits(whole[60000:60100], part)


def test_long_sums_again_and_again(backend: CudaBackend) -> None:
    """Many rounds of every ring: whoever took a stage before it had arrived, or too late, would give other bits."""
    layer = prepared(backend, 31, max_num_tokens=512, hidden_size=7168, intermediate_size=1040, num_experts=16, top_k=4)
    hidden_states, logits = make_inputs(layer.spec, 512, 9)
    for num_tokens in (40, 512):
        expected = backend.forward(layer, hidden_states[:num_tokens], routing_logits=logits[:num_tokens]).output
        for family in FAMILIES:
            backend.force_family = family
            for _ in range(5):
                output = backend.forward(layer, hidden_states[:num_tokens], routing_logits=logits[:num_tokens]).output
                assert same_bits(output, expected), f"{family}, T {num_tokens}"
        backend.force_family = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 5, 8, 20])
def test_many_tokens_of_a_slice(backend: CudaBackend, top_k: int, dtype: torch.dtype) -> None:
    """The zeros of tokens without a local expert are written by blocks of their own; a warp sums up to four tokens."""
    slice_of_experts = {"num_experts": 64, "local_expert_offset": 30, "local_num_experts": 3, "top_k": top_k}
    layer = prepared(backend, 33, max_num_tokens=8300, hidden_size=2112, intermediate_size=48, **slice_of_experts)
    few = backend.prepare(layer.spec, layer.weights, max_num_tokens=1000)
    hidden_states, logits = make_inputs(layer.spec, 8300, 5)
    expected = backend.forward(few, hidden_states, routing_logits=logits, output_dtype=dtype).output
    assert expected is not None
    assert bool((expected == 0).all(dim=1).any())
    for valid in (8300, 8193, 0):
        out = torch.full_like(expected, 3.0)
        num_valid = torch.tensor(valid, dtype=torch.int32, device="cuda")
        backend.forward(
            layer, hidden_states, routing_logits=logits, output_dtype=dtype, out=out, num_valid_tokens=num_valid
        )
        assert same_bits(out[:valid], expected[:valid])
        assert bool((out[valid:] == 3.0).all())


def test_repeated_runs(backend: CudaBackend) -> None:
    layer = prepared(backend, 24, max_num_tokens=512, num_experts=64, top_k=8)
    hidden_states, logits = make_inputs(layer.spec, 300, 4)
    first = backend.forward(layer, hidden_states, routing_logits=logits).output
    for _ in range(50):
        assert same_bits(first, backend.forward(layer, hidden_states, routing_logits=logits).output)


@pytest.mark.parametrize("num_tokens", [1, 64, 300])
def test_graph_replay(backend: CudaBackend, num_tokens: int) -> None:
    layer = prepared(backend, 25, max_num_tokens=512, routing_method=RoutingMethod.RENORMALIZE_NAIVE)
    hidden_states, logits = make_inputs(layer.spec, num_tokens, 5)
    valid = torch.tensor(num_tokens, dtype=torch.int32, device="cuda")
    out = torch.empty(num_tokens, layer.spec.hidden_size, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first call on this stream
        backend.forward(layer, hidden_states, routing_logits=logits, out=out, num_valid_tokens=valid)
    for seed in range(6, 10):
        fresh_states, fresh_logits = make_inputs(layer.spec, num_tokens, 2 * seed + 1)
        hidden_states.copy_(fresh_states)
        logits.copy_(fresh_logits)
        graph.replay()
        replayed = out.clone()
        assert same_bits(replayed, backend.forward(layer, hidden_states, routing_logits=logits).output)


def test_two_streams(backend: CudaBackend) -> None:
    layers = [prepared(backend, seed, max_num_tokens=512, num_experts=8) for seed in (26, 27)]
    inputs = [make_inputs(layer.spec, 257, seed) for seed, layer in enumerate(layers)]
    expected = [
        backend.forward(layer, x, routing_logits=r).output for layer, (x, r) in zip(layers, inputs, strict=True)
    ]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                x, logits = inputs[i]
                outputs[i].append(backend.forward(layers[i], x, routing_logits=logits).output)
    torch.cuda.synchronize()
    for i in range(2):
        assert all(same_bits(expected[i], output) for output in outputs[i])


def test_tuner(backend: CudaBackend, tmp_path: Path) -> None:
    from expertd_server.backend_cuda import CudaBackend as Backend

    cache = tmp_path / "tuning.json"
    tuned_backend = Backend(tuning_cache=str(cache))
    layer = prepared(tuned_backend, 28, max_num_tokens=16)
    hidden_states, logits = make_inputs(layer.spec, 16, 6)
    before = tuned_backend.forward(layer, hidden_states, routing_logits=logits).output
    choice = tuned_backend.tune(layer, 16)
    assert set(choice) == {1, 2, 4, 8, 16}
    assert same_bits(before, tuned_backend.forward(layer, hidden_states, routing_logits=logits).output)
    again = Backend(tuning_cache=str(cache))
    known = again.prepare(layer.spec, layer.weights, max_num_tokens=16)
    assert again.family(known, 5).name == choice[8]
    written = cache.stat().st_mtime_ns
    assert again.tune(known, 16) == choice
    assert cache.stat().st_mtime_ns == written, "what is known is not measured again"
