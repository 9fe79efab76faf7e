"""The experts in compiled code: what the tests of the CPU backend, which run them too, do not ask of every backend."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import by_slot, check_against_reference, output, run
from cases import Case, make_case, make_spec

from expertd_server import cpu_experts, products, reference
from expertd_server.backend import select_backend
from expertd_server.backend_cpu import TorchBackend
from expertd_server.cpu_experts import Unit
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.weights import ExpertWeights

each_unit = pytest.mark.usefixtures("unit")
needs_unit = pytest.mark.skipif(cpu_experts.find_unit() is None, reason=f"needs a unit: {cpu_experts.how(None)}")
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
REAL = make_spec(hidden_size=2048, intermediate_size=768, num_experts=4, top_k=2)  # worth more than one thread


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def identity_layer(hidden_size: int, intermediate_size: int) -> tuple[LayerSpec, ExpertWeights]:
    """One expert without an activation, whose scales are 1 and whose weights are 0."""
    spec = make_spec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=1,
        top_k=1,
        activation=Activation.IDENTITY,
    )
    one = torch.ones(1)
    gemm1 = torch.zeros(1, intermediate_size, hidden_size).to(torch.float8_e4m3fn)
    gemm2 = torch.zeros(1, hidden_size, intermediate_size).to(torch.float8_e4m3fn)
    return spec, ExpertWeights(gemm1, one, one, gemm2, one)


def forward(spec: LayerSpec, weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
    """float32 output of a layer of one expert."""
    backend = TorchBackend()
    ids = torch.zeros(len(hidden_states), 1, dtype=torch.int32)
    layer = backend.prepare(spec, weights)
    result = backend.forward(
        layer, hidden_states, topk_ids=ids, topk_weights=torch.ones(ids.shape), output_dtype=torch.float32
    )
    assert result.output is not None
    return result.output


def eye(rows: int, columns: int) -> torch.Tensor:
    return torch.eye(rows, columns).to(torch.float8_e4m3fn)


@each_unit
@pytest.mark.parametrize("what", ["hidden_states", "gemm1_weights", "gemm2_weights"])
def test_every_fp8_value_is_exact(what: str) -> None:
    spec, weights = identity_layer(256, 256)
    finite = torch.where(ALL_CODES.float().isnan(), 0.0, ALL_CODES.float()).to(torch.float8_e4m3fn)
    # Each value in each place: row i holds them turned by i.
    values = torch.stack([finite.view(torch.uint8).roll(i) for i in range(256)]).view(torch.float8_e4m3fn)
    hidden_states, gemm1, gemm2 = (values if name == what else eye(256, 256) for name in _INPUTS)
    weights = dataclasses.replace(weights, gemm1_weights=gemm1[None], gemm2_weights=gemm2[None])
    expected = values.float() if what == "hidden_states" else values.float().t()
    assert torch.equal(forward(spec, weights, hidden_states), expected)


_INPUTS = ("hidden_states", "gemm1_weights", "gemm2_weights")


@each_unit
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_weights_reach_what_they_are_part_of_and_nothing_else(code: int) -> None:
    spec, weights = identity_layer(70, 70)
    gemm1, gemm2 = eye(70, 70).view(torch.uint8).clone(), eye(70, 70).view(torch.uint8).clone()
    gemm2[69, 69] = code
    weights = dataclasses.replace(weights, gemm2_weights=gemm2.view(torch.float8_e4m3fn)[None])
    for gemm1_code, only in ((None, True), (code, False)):
        if gemm1_code is not None:
            gemm1[3, 69] = gemm1_code  # of inter 3, which every output is multiplied with
        layer = dataclasses.replace(weights, gemm1_weights=gemm1.view(torch.float8_e4m3fn)[None])
        is_nan = forward(spec, layer, torch.ones(5, 70).to(torch.float8_e4m3fn)).isnan()
        assert is_nan[:, 69].all()
        assert is_nan[:, :69].any() != only


@each_unit
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("num_rows", [17, 300])
def test_a_row_has_the_same_bits_in_every_place(activation: Activation, num_rows: int) -> None:
    spec = make_spec(hidden_size=200, intermediate_size=72, num_experts=1, top_k=1, activation=activation)
    case = make_case(spec, num_rows, seed=3)
    alone = case.hidden_states[:1]
    expected = forward(spec, case.weights, alone)[0]
    got = forward(spec, case.weights, alone.view(torch.uint8).expand(num_rows, -1).view(torch.float8_e4m3fn))
    assert torch.equal(got, expected.expand(num_rows, -1))
    for place in range(0, num_rows, 5):  # among others
        company = case.hidden_states.view(torch.uint8).clone()
        company[place] = alone.view(torch.uint8)[0]
        got = forward(spec, case.weights, company.view(torch.float8_e4m3fn))
        assert torch.equal(got[place], expected), f"{place} of {num_rows}"


@each_unit
@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 700])
def test_the_number_of_threads_changes_no_bit(num_tokens: int) -> None:
    case = make_case(REAL, num_tokens, seed=4)
    backend = TorchBackend()
    layer = backend.prepare(case.spec, case.weights)
    outputs = []
    for num_threads in (1, 2, 3, 16):
        torch.set_num_threads(num_threads)
        for _ in range(2):
            outputs.append(backend.forward(layer, case.hidden_states, routing_logits=case.routing_logits).output)
    for got in outputs[1:]:
        assert torch.equal(got, outputs[0])


@each_unit
@pytest.mark.parametrize("hidden_size", [64, 9000])
def test_many_rows_of_one_expert_are_cut_into_pieces(hidden_size: int) -> None:
    spec = make_spec(hidden_size=hidden_size, intermediate_size=40, num_experts=3, top_k=1)
    case = make_case(spec, 600, seed=5, logits="one_expert")
    rows = torch.tensor([0, 15, 16, 255, 256, 257, 511, 512, 599])
    few = dataclasses.replace(
        case,
        hidden_states=case.hidden_states.view(torch.uint8)[rows].view(torch.float8_e4m3fn),
        routing_logits=case.routing_logits[rows],
    )
    check_against_reference(few)
    assert torch.equal(output(case)[rows], output(few))


@each_unit
def test_gelu_agrees_with_the_reference_far_below_zero() -> None:
    """Where it is nearly 0, and a large scale makes it visible: 1 + erf would have lost it by rounding."""
    spec = make_spec(hidden_size=64, intermediate_size=64, num_experts=1, top_k=1, activation=Activation.GELU)
    case = make_case(spec, 200, seed=6)
    weights = dataclasses.replace(
        case.weights,
        output1_scales_gate_scalar=case.weights.output1_scales_gate_scalar * 3.0,
        output1_scales_scalar=torch.full((1,), 1e9),
    )
    check_against_reference(dataclasses.replace(case, weights=weights))


@each_unit
def test_columns_that_fill_up_a_tile_add_nothing_even_to_infinite_sums() -> None:
    spec = make_spec(
        hidden_size=64,
        intermediate_size=40,
        num_experts=1,
        top_k=1,
        activation=Activation.IDENTITY,
        routing_method=RoutingMethod.LLAMA4,
        use_routing_scales_on_input=True,
    )
    case = make_case(spec, 3, seed=14)
    routed = {"topk_ids": torch.zeros(3, 1, dtype=torch.int32), "topk_weights": torch.full((3, 1), torch.inf)}
    expected = reference.forward(spec, case.weights, case.hidden_states, **routed)
    assert expected.output.isfinite().all(), "every inter is 448 or -448"
    assert torch.equal(output(case, **routed), expected.output)


@needs_unit
@pytest.mark.usefixtures("_threads_as_before")
def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    torch.set_num_threads(3)
    cases = [make_case(REAL, num_tokens, seed=7) for num_tokens in (1, 9, 40)]
    routed = [run(case) for case in cases]
    packed = cpu_experts.pack(cpu_experts.find_unit(), REAL, cases[0].weights, range(4))

    def call(number: int) -> torch.Tensor:
        case, routing = cases[number % 3], routed[number % 3]
        g, _ = cpu_experts.run(
            REAL,
            case.weights,
            packed,
            hidden_states=case.hidden_states,
            topk_ids=routing.topk_ids,
            expert_weights=routing.expert_weights,
            out=None,
        )
        return g

    expected = [call(number) for number in range(3)]
    with ThreadPoolExecutor(4) as threads:
        for number, got in enumerate(threads.map(call, range(300))):
            assert torch.equal(got, expected[number % 3]), number


@each_unit
def test_products_of_torch_go_on_as_before() -> None:
    """They use the same unit, with tiles of another shape."""
    case = make_case(make_spec(), 20, seed=10)
    left, right = torch.randn(70, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    product, expected = left @ right, output(case)
    for _ in range(3):
        assert torch.equal(left @ right, product)
        assert torch.equal(output(case), expected)


@each_unit
def test_a_caller_that_flushes_subnormal_numbers_gets_the_same_bits() -> None:
    spec, weights = identity_layer(32, 32)
    weights = dataclasses.replace(weights, gemm1_weights=eye(32, 32)[None], gemm2_weights=eye(32, 32)[None])
    weights = dataclasses.replace(weights, output2_scales_scalar=torch.full((1,), 2.0**-126))
    backend = TorchBackend()
    arguments = {"topk_ids": torch.zeros(1, 1, dtype=torch.int32), "topk_weights": torch.full((1, 1), 0.25)}
    layer = backend.prepare(spec, weights)
    assert torch.set_flush_denormal(True)
    try:
        out = backend.forward(layer, eye(1, 32), output_dtype=torch.float32, **arguments).output  # type: ignore[arg-type]
        is_flushing = float(torch.full((1,), 2.0**-126) * 0.25) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert out is not None
    assert float(out[0, 0]) == 2.0**-128
    assert is_flushing, "the caller's own mode was not put back"


@needs_unit
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_are_not_contiguous(dtype: torch.dtype) -> None:
    case = make_case(make_spec(), 20, seed=11)
    wide = torch.zeros(20, 200, dtype=torch.uint8)
    wide[:, 7:135] = case.hidden_states.view(torch.uint8)
    spread = dataclasses.replace(case, hidden_states=wide[:, 7:135].view(torch.float8_e4m3fn))
    assert not spread.hidden_states.is_contiguous()
    room = torch.full((20, 300), 7.0, dtype=dtype)
    out = room[:, 100:228]
    assert output(spread, out=out, output_dtype=dtype) is out
    assert torch.equal(out, output(case, output_dtype=dtype))
    assert room[:, :100].eq(7.0).all()
    assert room[:, 228:].eq(7.0).all()


@needs_unit
def test_slots_of_far_away_experts_are_skipped() -> None:
    case = make_case(make_spec(top_k=2), 3, seed=12).slice(4, 8)
    limits = torch.iinfo(torch.int32)
    ids = torch.tensor([[limits.min, limits.max], [3, 12], [4, 11]], dtype=torch.int32)
    result = run(case, topk_ids=ids, topk_weights=torch.ones(3, 2), do_finalize=False)
    assert result.expanded_idx_to_permuted_idx is not None
    assert result.expanded_idx_to_permuted_idx.tolist() == [-1, -1, -1, -1, 0, 1]
    assert not by_slot(result)[:2].any()
    backend = TorchBackend()  # a layer that was not prepared packs what the call touches
    got = backend.forward(
        backend.wrap(case.spec, case.weights), case.hidden_states, topk_ids=ids, topk_weights=torch.ones(3, 2)
    )
    assert torch.equal(got.output, output(case, topk_ids=ids, topk_weights=torch.ones(3, 2)))


@needs_unit
@pytest.mark.parametrize(
    ("spec", "weights_nbytes"),
    [
        (make_spec(), 16 * (128 * 128 + 128 * 64)),
        # Sizes are filled up to multiples of 32; of a gated layer, either half.
        (make_spec(hidden_size=37, intermediate_size=21), 16 * (64 * 64 + 64 * 32)),
        (make_spec(hidden_size=37, intermediate_size=40, activation=Activation.RELU2), 16 * (64 * 64 + 64 * 64)),
    ],
)
def test_nbytes_counts_one_byte_a_weight(spec: LayerSpec, weights_nbytes: int) -> None:
    prepared = TorchBackend().prepare(spec, make_case(spec, 1, seed=2).weights)
    assert prepared.nbytes == weights_nbytes + 3 * 4 * 16
    assert prepared.state.nbytes == weights_nbytes


def cancelling(num_tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 hidden states [num_tokens, size] and weights [size, size] whose products would be 0.

    What comes out is the rounding error of the sum. Of a sum far from 0, rounded to fp8 or bfloat16, hardly a bit would
    tell in which order it was added up. size: an even number.
    """
    generator = torch.Generator().manual_seed(15)
    # Any code but NaN, 0x7F and 0xFF.
    codes = torch.randint(0, 0x7F, (num_tokens + size, size), generator=generator, dtype=torch.uint8)
    codes += torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8) * 0x80
    hidden_states, weights = codes.split([num_tokens, size])
    left, right = torch.randperm(size, generator=generator).chunk(2)
    hidden_states[:, right] = hidden_states[:, left]
    weights[:, right] = weights[:, left] ^ 0x80  # the sign
    return hidden_states.view(torch.float8_e4m3fn), weights.view(torch.float8_e4m3fn)


@each_unit
@pytest.mark.parametrize("size", [300, 600])
@pytest.mark.parametrize("what", ["gemm1_weights", "gemm2_weights"])
def test_a_row_has_the_same_bits_among_any_number_of_rows(what: str, size: int) -> None:
    """Few rows are multiplied in another way than many, and those of a tile in parts."""
    hidden_states, cancelling_weights = cancelling(50, size)
    spec, weights = identity_layer(size, size)
    gemm1, gemm2 = (cancelling_weights if name == what else eye(size, size) for name in _INPUTS[1:])
    scale = torch.full((1,), 256.0 if what == "gemm1_weights" else 1.0)  # rounding errors to where fp8 is finest
    weights = dataclasses.replace(
        weights, gemm1_weights=gemm1[None], gemm2_weights=gemm2[None], output1_scales_scalar=scale
    )
    every = forward(spec, weights, hidden_states)
    assert every.unique().numel() > 100, "too few rounding errors to tell anything"
    for num_rows in range(1, 50):
        got = forward(spec, weights, hidden_states[50 - num_rows :])
        assert torch.equal(got, every[50 - num_rows :]), f"{num_rows} rows"


class Module:
    """The compiled module on a machine that can use none of the units, or the vector unit alone."""

    def __init__(self, *, has_avx512: bool) -> None:
        self._has_avx512 = has_avx512

    def why_not(self, unit: Unit) -> str | None:
        if unit is Unit.AMX:
            return "the kernel does not permit the use of AMX"
        return None if self._has_avx512 else "the CPU has no AVX-512 BF16"


def pretend(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setattr(cpu_experts, "_cpu_experts", module)
    monkeypatch.setattr(cpu_experts, "_import_error", "No module named 'expertd_server._cpu_experts'", raising=False)
    monkeypatch.setattr(cpu_experts, "why_not", cpu_experts.why_not.__wrapped__)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "No module named 'expertd_server._cpu_experts'; install"),
        (Module(has_avx512=False), "the CPU has no AVX-512 BF16"),
    ],
)
def test_without_a_unit_torch_does_the_same(
    module: object, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, module)
    with caplog.at_level(logging.INFO, "expertd_server.backend"):
        backend = select_backend("cpu")
    (line,) = caplog.messages
    assert line.startswith(f"backend 'cpu': experts run in torch: {reason}")
    case = make_case(make_spec(), 20, seed=13)
    (expert, *_) = backend.prepare(case.spec, case.weights).state
    assert isinstance(expert, products.cpu_expert_type())
    check_against_reference(case)


def test_the_vector_unit_stands_in_for_the_matrix_unit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, Module(has_avx512=True))
    with caplog.at_level(logging.INFO, "expertd_server.backend"):
        select_backend("cpu")
    assert caplog.messages == [
        "backend 'cpu': experts run on the vector unit (AVX-512 BF16): the kernel does not permit the use of AMX"
    ]


def test_the_log_says_which_unit_runs_the_experts(unit: Unit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "expertd_server.backend"):
        backend = select_backend("cpu")
    name = {Unit.AMX: "matrix unit (AMX)", Unit.AVX512: "vector unit (AVX-512 BF16)"}[unit]
    assert caplog.messages[0].startswith(f"backend 'cpu': experts run on the {name}")
    case: Case = make_case(make_spec(), 1, seed=1)
    assert backend.prepare(case.spec, case.weights).state.unit is unit


@needs_unit
@pytest.mark.parametrize("number", [-1, len(Unit)])
def test_no_other_unit_is_known(number: int) -> None:
    with pytest.raises(ValueError, match=f"unit is {number}, expected 0 to 1"):
        cpu_experts._cpu_experts.why_not(number)
