"""What the CUDA backend plans on the host: scratch memory, tile bounds, tensor-map arguments. Needs no GPU."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import make_case, make_spec

from expertd_server import tuning
from expertd_server.types import Activation, LayerSpec

backend_cuda = pytest.importorskip(
    "expertd_server.backend_cuda", reason="the kernels were not compiled here", exc_type=ImportError
)

from expertd_server.cuda_call import Call  # noqa: E402
from expertd_server.cuda_extension import _cuda  # noqa: E402
from expertd_server.cuda_families import Family, max_token_tiles  # noqa: E402
from expertd_server.cuda_workspace import Scratch, tensor_maps  # noqa: E402

FAMILIES = backend_cuda.FAMILIES.values()

SPECS = [
    make_spec(hidden_size=512, intermediate_size=256),
    make_spec(activation=Activation.RELU2, num_experts=64, top_k=6, local_expert_offset=8, local_num_experts=24),
    make_spec(num_experts=512, top_k=22, local_num_experts=3),
    make_spec(num_experts=4, top_k=1),
]
TOKENS = [1, 2, 63, 64, 65, 1000, 4096]


def test_the_module_imports_without_a_driver() -> None:
    code = "from expertd_server import _cuda; print(len(_cuda.families()))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) == len(FAMILIES)


def test_the_backend_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="device is cpu, the CUDA backend needs a CUDA device"):
        backend_cuda.CudaBackend("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"no CUDA device is available: .*CPU backend"):
            backend_cuda.CudaBackend()


def test_every_family_has_an_index_of_its_own_and_whole_tiles() -> None:
    assert [family.index for family in FAMILIES] == list(range(len(FAMILIES)))
    for family in FAMILIES:
        assert family.tile_n % family.tile_quantum == 0, family
        assert family.ctas_per_sm >= 1, family
        assert family.weight_box * family.warpgroups * family.cluster == family.tile_m, family
        assert family.tiles_per_block % family.cluster == 0, "a cluster's token tiles lie in one block"


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_built_in_choice_exists(spec: LayerSpec, num_tokens: int) -> None:
    assert tuning.choose_family(None, spec, num_tokens) in backend_cuda.FAMILIES


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parts_of_the_scratch_memory_are_aligned_and_do_not_overlap(spec: LayerSpec) -> None:
    rows_per_token = min(spec.top_k, spec.num_local)
    for quantizes, num_tokens in itertools.product((False, True), TOKENS):
        scratch = Scratch.of(spec, num_tokens, quantizes=quantizes)
        starts = [*scratch.offsets.values(), scratch.nbytes]
        assert starts == sorted(starts)
        assert not any(start % 256 for start in starts)
        sizes = dict(zip(scratch.offsets, (b - a for a, b in itertools.pairwise(starts)), strict=True))
        assert sizes["inter"] >= num_tokens * rows_per_token * spec.intermediate_size
        assert sizes["rows"] >= num_tokens * rows_per_token * spec.hidden_size * 2
        assert sizes["expanded_to_row"] >= num_tokens * spec.top_k * 4
        assert sizes["hidden_states"] >= (num_tokens * spec.hidden_size if quantizes else 0)


def test_more_tokens_never_need_less_scratch_memory() -> None:
    sizes = [Scratch.of(SPECS[1], n, quantizes=True).nbytes for n in range(1, 300)]
    assert sizes == sorted(sizes)


def whole_clusters(family: Family, tiles: int) -> int:
    """Token tiles of an expert: as many as fill the CTAs that share its weights."""
    return -(-tiles // family.cluster) * family.cluster


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_routing_needs_more_token_tiles_than_planned(spec: LayerSpec) -> None:
    rng = random.Random(0)
    slots = min(spec.top_k, spec.num_local)
    for family, num_tokens, spread in itertools.product(FAMILIES, (1, 7, 64, 300), (1, 2, spec.num_local)):
        # Every token takes different local experts, out of `spread` favourites where those are enough.
        favourites = range(max(slots, min(spread, spec.num_local)))
        rows = [0] * spec.num_local
        for _ in range(num_tokens):
            for expert in rng.sample(favourites, slots):
                rows[expert] += 1
        needed = sum(whole_clusters(family, -(-count // family.tile_n)) for count in rows)
        planned = max_token_tiles(spec, num_tokens, family)
        assert planned % family.cluster == 0
        assert needed <= planned, f"seed 0, {family.name}, {num_tokens} tokens, {spec}"
    # The worst case: one row more than whole tiles in as many experts as there are.
    for family, whole in itertools.product(FAMILIES, (0, 1, 3)):
        num_tokens = -(-spec.num_local * (whole * family.tile_n + 1) // slots)
        planned = max_token_tiles(spec, num_tokens, family)
        needed = spec.num_local * whole_clusters(family, whole + 1)
        assert needed <= planned, f"{family.name}, {num_tokens} tokens, {spec}"


@pytest.mark.parametrize("max_num_tokens", [1, 7, 16, 100])
def test_chunks_cover_every_token_once(max_num_tokens: int) -> None:
    spec = make_spec()
    case = make_case(spec, 33, seed=1)
    replay = torch.full((40, spec.top_k), -7, dtype=torch.int16)
    call = Call(
        hidden_states=case.hidden_states,
        logits=case.routing_logits,
        in_ids=None,
        in_weights=None,
        topk_ids=torch.empty(33, spec.top_k, dtype=torch.int32),
        topk_weights=torch.empty(33, spec.top_k, dtype=torch.bfloat16),
        replay=replay,
        num_valid=torch.tensor(20, dtype=torch.int32),
        pdl=True,
        stream=0,
    )
    out = torch.empty(33, spec.hidden_size)
    parts = list(call.chunks(out, max_num_tokens))
    assert all(part.num_tokens <= max_num_tokens for part, _ in parts)
    for whole, pieces in (
        (case.hidden_states.view(torch.uint8), [p.hidden_states.view(torch.uint8) for p, _ in parts]),
        (case.routing_logits, [p.logits for p, _ in parts]),
    ):
        assert torch.equal(torch.cat(pieces), whole)
    assert sum(len(piece) for _, piece in parts) == 33
    valid = [max(0, min(p.num_tokens, int(p.num_valid))) for p, _ in parts]
    assert sum(valid) == 20


@pytest.mark.parametrize("spec", [*SPECS[:2], make_spec(activation=Activation.GEGLU)], ids=str)
def test_arguments_of_the_tensor_maps(spec: LayerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    for name in ("encode_weight_rows", "encode_gate_up", "encode_rows"):
        monkeypatch.setattr(
            _cuda, name, lambda *values, name=name: calls.append((name.removeprefix("encode_"), values))
        )
    weights = make_case(spec, 1, seed=1).weights
    maps = tensor_maps(spec, weights, 0x1000, 77)
    assert maps.shape == (len(FAMILIES), 2, 3, _cuda.TENSOR_MAP_BYTES)
    places = [values[0] for _, values in calls]
    assert len(set(places)) == len(places)
    assert all(0 <= place - maps.data_ptr() <= maps.numel() - _cuda.TENSOR_MAP_BYTES for place in places)
    w1, w2 = weights.gemm1_weights.data_ptr(), weights.gemm2_weights.data_ptr()
    first = "gate_up" if spec.activation.is_gated else "weight_rows"
    for family in FAMILIES:
        expected: set[tuple[Any, ...]] = {
            (first, w1, spec.num_local, spec.intermediate_size, spec.hidden_size, family.weight_box),
            ("weight_rows", w2, spec.num_local, spec.hidden_size, spec.intermediate_size, family.weight_box),
            ("rows", 0x1000, 77, spec.intermediate_size, family.tile_n),
            ("rows", 0x1000, 77, spec.intermediate_size, family.tile_quantum),
        }
        start = maps[family.index].data_ptr()
        own = {(name, *values[1:]) for name, values in calls if start <= values[0] < start + maps[family.index].numel()}
        assert own == expected, family
