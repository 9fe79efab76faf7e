"""The CPU backend against the reference, and each of its options."""

from __future__ import annotations

import dataclasses
import functools
import logging

import pytest
import torch
from agreement import WHOLE_OUTPUT_BOUND, by_slot, check_against_reference, expect, is_local, output, run
from cases import every_method, make_case, make_hidden_states, make_spec, relative_error, spec_id

from expertd_server import backend, backend_cpu, cpu_experts, products, reference
from expertd_server.backend import select_backend
from expertd_server.backend_cpu import TorchBackend
from expertd_server.fp8 import from_fp8, quantize_fp8, round_to_fp8, to_fp8
from expertd_server.types import Activation, LayerSpec, RoutingMethod
from expertd_server.workers import run_all

pytestmark = pytest.mark.usefixtures("two_threads")
WITHOUT_ROUNDINGS_BOUND = 3e-2
either_way = pytest.mark.usefixtures("experts_run_by")
each_way = pytest.mark.usefixtures("experts_run_by_each")


def has_packed_bfloat16() -> bool:
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=torch.bfloat16), 32)
    except RuntimeError:
        return False
    return True


def has_float16() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


EVERY_EXPERT_TYPE = [
    pytest.param(
        products.SplitExpert,
        marks=pytest.mark.skipif(
            not has_packed_bfloat16(), reason="no bfloat16 product with packed weights on this CPU"
        ),
    ),
    *(
        pytest.param(kind, marks=pytest.mark.skipif(not has_float16(), reason="torch has no float16 product here"))
        for kind in (products.HalfExpert, products.MixedExpert)
    ),
    products.FloatExpert,
]


def use(monkeypatch: pytest.MonkeyPatch, expert_type: type) -> None:
    """Multiply as on a CPU with these products."""
    monkeypatch.setattr(cpu_experts, "find_unit", lambda: None)
    monkeypatch.setattr(products, "cpu_expert_type", lambda: expert_type)
    # A cache of its own: the usual one does not know the type.
    monkeypatch.setattr(backend_cpu, "probe", functools.cache(products.probe.__wrapped__))


@either_way
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
@pytest.mark.parametrize("spec", every_method(), ids=spec_id)
def test_agrees_with_the_reference_for_every_routing_method(spec: LayerSpec, num_tokens: int) -> None:
    check_against_reference(make_case(spec, num_tokens if spec.num_experts <= 16 else 3, seed=num_tokens))


@each_way
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(128, 64), (200, 72), (256, 256), (37, 21)])
def test_agrees_with_the_reference_for_every_activation(
    activation: Activation, hidden_size: int, intermediate_size: int
) -> None:
    spec = make_spec(hidden_size=hidden_size, intermediate_size=intermediate_size, activation=activation)
    check_against_reference(make_case(spec, 40, seed=11))


@either_way
@pytest.mark.parametrize("logits", ["all_equal", "two_values", "saturated_high", "one_expert", "one_dominates"])
def test_agrees_with_the_reference_on_adversarial_logits(logits: str) -> None:
    for method in (RoutingMethod.DEFAULT, RoutingMethod.SIGMOID_RENORM):
        check_against_reference(make_case(make_spec(routing_method=method), 70, seed=3, logits=logits))


@each_way
def test_agrees_with_the_reference_on_the_shape_of_a_real_layer() -> None:
    spec = make_spec(hidden_size=2048, intermediate_size=768, num_experts=4, top_k=2)
    check_against_reference(make_case(spec, 12, seed=1))


@either_way
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "spec",
    [
        *(make_spec(hidden_size=512, intermediate_size=256, activation=activation) for activation in Activation),
        make_spec(hidden_size=1024, intermediate_size=512, num_experts=8, top_k=2),
        make_spec(hidden_size=2048, intermediate_size=768, num_experts=4, top_k=2),
        make_spec(
            hidden_size=512,
            intermediate_size=256,
            num_experts=32,
            top_k=8,
            routing_method=RoutingMethod.DEEPSEEK_V3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        ),
        make_spec(
            hidden_size=512,
            intermediate_size=512,
            num_experts=8,
            top_k=1,
            routing_method=RoutingMethod.LLAMA4,
            use_routing_scales_on_input=True,
        ),
    ],
    ids=spec_id,
)
def test_all_roundings_together_cost_at_most_three_percent(spec: LayerSpec, seed: int) -> None:
    """Against exact arithmetic without any rounding: nearly all of it is that of `inter` to fp8."""
    case = make_case(spec, 24, seed)  # so many that no single token decides
    if spec.activation == Activation.RELU2:
        # Squares reach far: scaled as the others are, the greatest would lie beyond the range of fp8.
        scales = case.weights.output1_scales_scalar / 16.0
        case = dataclasses.replace(case, weights=dataclasses.replace(case.weights, output1_scales_scalar=scales))
    error = relative_error(output(case), expect(case).output_without_roundings)
    assert error <= WITHOUT_ROUNDINGS_BOUND, f"{case.name}: output off by {error}"


@each_way
def test_inter_saturates() -> None:
    case = make_case(make_spec(activation=Activation.RELU2), 8, seed=4)
    scales = case.weights.output1_scales_scalar * 1e4
    case = dataclasses.replace(case, weights=dataclasses.replace(case.weights, output1_scales_scalar=scales))
    assert float(expect(case).inter.float().abs().max()) == 448.0
    check_against_reference(case)


@either_way
@pytest.mark.parametrize("parts", [1, 2, 4, 16])
@pytest.mark.parametrize("method", [RoutingMethod.RENORMALIZE, RoutingMethod.DEEPSEEK_V3])
def test_slices_add_up_to_the_whole(method: RoutingMethod, parts: int) -> None:
    case = make_case(make_spec(routing_method=method), 50, seed=parts)
    size = case.spec.num_experts // parts
    slices = [case.slice(offset, size) for offset in range(0, case.spec.num_experts, size)]
    for part in slices:
        check_against_reference(part)
    total = torch.stack([output(part, output_dtype=torch.float32) for part in slices]).sum(0)
    whole = output(case, output_dtype=torch.float32)
    torch.testing.assert_close(total, whole, rtol=0.0, atol=float(whole.abs().max()) * 1e-6, msg=case.name)


@either_way
def test_tokens_without_a_local_expert_get_zeros() -> None:
    case = make_case(make_spec(routing_method=RoutingMethod.LLAMA4, top_k=1), 20, seed=1, logits="one_expert")
    case = case.slice(0, 4)  # every token goes to expert 8
    assert torch.equal(output(case), torch.zeros(20, case.spec.hidden_size, dtype=torch.bfloat16))
    rows = run(case, do_finalize=False)
    assert rows.gemm2_output is not None
    assert rows.expanded_idx_to_permuted_idx is not None
    assert rows.gemm2_output.shape == (0, case.spec.hidden_size)
    assert rows.expanded_idx_to_permuted_idx.tolist() == [-1] * 20


@either_way
def test_do_finalize_false_groups_rows_by_ascending_expert_and_adds_up_to_the_output() -> None:
    case = make_case(make_spec(), 33, seed=6).slice(4, 8)
    result = run(case, do_finalize=False)
    rows = result.expanded_idx_to_permuted_idx
    assert rows is not None
    assert result.output is None
    local = is_local(case.spec, result.topk_ids).flatten()
    assert torch.equal(rows >= 0, local)
    assert sorted(rows[local].tolist()) == list(range(int(local.sum())))
    experts_by_row = result.topk_ids.flatten()[local][rows[local].argsort()]
    assert experts_by_row.tolist() == sorted(experts_by_row.tolist())
    w = result.expert_weights.float()
    total = torch.zeros(33, case.spec.hidden_size)
    for k in range(case.spec.top_k):
        total += w[:, k, None] * by_slot(result)[:, k]
    assert torch.equal(total.bfloat16(), output(case))


@either_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_output_is_rounded_once_to_the_asked_type(dtype: torch.dtype) -> None:
    case = make_case(make_spec(), 20, seed=8)
    got = output(case, output_dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, output(case, output_dtype=torch.float32).to(dtype))
    out = torch.full((20, case.spec.hidden_size), torch.nan, dtype=dtype)
    assert output(case, output_dtype=dtype, out=out) is out
    assert torch.equal(out, got)


@either_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_hidden_states_are_quantised_with_the_scale(dtype: torch.dtype) -> None:
    case = make_case(make_spec(), 20, seed=9)
    scaled = dataclasses.replace(case.weights, hidden_states_scale=16.3)
    wide = make_hidden_states(case.spec, 20, seed=9).to(dtype)
    quantised = dataclasses.replace(case, weights=scaled, hidden_states=reference.quantize(wide, 16.3))
    got = output(dataclasses.replace(case, weights=scaled, hidden_states=wide))
    assert torch.equal(got, output(quantised)), dtype


def test_quantisation_agrees_with_the_reference_and_saturates() -> None:
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (finite[:-1] + finite[1:]) / 2
    x = torch.cat([finite, middles, middles.nextafter(finite[1:]), middles.nextafter(finite[:-1]), 10.0 ** finite[:64]])
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-30])])
    for scale in (1.0, 0.37, 100.0):
        assert torch.equal(quantize_fp8(x, scale).view(torch.uint8), reference.quantize(x, scale).view(torch.uint8)), (
            scale
        )
    assert quantize_fp8(torch.tensor([torch.inf, -1e9, 449.0]), 1.0).tolist() == [448.0, -448.0, 448.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_from_fp8_is_exact(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    torch.testing.assert_close(from_fp8(x, dtype), x.to(dtype), rtol=0.0, atol=0.0, equal_nan=True)


@either_way
def test_routed_input_gives_the_bits_of_routing_here() -> None:
    case = make_case(make_spec(routing_method=RoutingMethod.RENORMALIZE), 40, seed=2)
    routed = run(case)
    for weights in (routed.expert_weights, routed.expert_weights.float()):
        assert torch.equal(output(case, topk_ids=routed.topk_ids, topk_weights=weights), output(case))


@either_way
def test_routed_weights_are_rounded_to_bfloat16_on_entry() -> None:
    case = make_case(make_spec(), 10, seed=2)
    ids = run(case).topk_ids
    w = torch.rand(10, 4, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(w, w.bfloat16().float())
    assert torch.equal(
        output(case, topk_ids=ids, topk_weights=w), output(case, topk_ids=ids, topk_weights=w.bfloat16())
    )


@either_way
def test_an_expert_that_comes_twice_in_a_row_counts_twice() -> None:
    case = make_case(make_spec(top_k=2), 6, seed=2)
    twice = output(case, topk_ids=torch.full((6, 2), 3, dtype=torch.int32), topk_weights=torch.full((6, 2), 0.5))
    once = output(
        case, topk_ids=torch.tensor([[3, -1]] * 6, dtype=torch.int32), topk_weights=torch.tensor([[1.0, 7.0]] * 6)
    )
    assert torch.equal(twice, once)


@either_way
def test_empty_slots_add_nothing_whatever_their_weight() -> None:
    case = make_case(make_spec(top_k=2), 4, seed=2)
    ids = torch.tensor([[-1, -1], [5, -1], [-1, 5], [5, 5]], dtype=torch.int32)
    w = torch.where(ids < 0, torch.nan, 1.0)
    got = output(case, topk_ids=ids, topk_weights=w)
    assert not got.isnan().any()
    assert not got[0].any()


@either_way
def test_replay_rows_beyond_the_tokens_stay_untouched() -> None:
    case = make_case(make_spec(), 5, seed=2)
    replay = torch.full((9, 4), -7, dtype=torch.int16)
    ids = run(case, routing_replay_out=replay).topk_ids
    assert torch.equal(replay[:5].int(), ids)
    assert replay[5:].eq(-7).all()


@either_way
@pytest.mark.parametrize("num_valid", [0, 1, 4, 9])
def test_rows_past_num_valid_tokens_are_neither_read_nor_written(num_valid: int) -> None:
    case = make_case(make_spec(), 9, seed=2)
    poisoned = case.hidden_states.view(torch.uint8).clone()
    poisoned[num_valid:] = 0x7F  # NaN
    logits = case.routing_logits.clone()
    logits[num_valid:] = torch.nan
    padded = dataclasses.replace(case, hidden_states=poisoned.view(torch.float8_e4m3fn), routing_logits=logits)
    out = torch.full((9, case.spec.hidden_size), 5.0, dtype=torch.bfloat16)
    replay = torch.full((9, 4), -7, dtype=torch.int16)
    valid = torch.tensor(num_valid, dtype=torch.int32)
    output(padded, out=out, routing_replay_out=replay, num_valid_tokens=valid)
    assert torch.equal(out[:num_valid], output(case)[:num_valid])
    assert out[num_valid:].eq(5.0).all()
    assert replay[num_valid:].eq(-7).all()
    rows = run(padded, do_finalize=False, num_valid_tokens=valid)
    assert rows.gemm2_output is not None
    assert rows.gemm2_output.isfinite().all()


@either_way
@pytest.mark.parametrize("do_finalize", [True, False])
def test_no_tokens(do_finalize: bool) -> None:
    case = make_case(make_spec(), 0, seed=2)
    result = run(case, do_finalize=do_finalize)
    assert result.topk_ids.shape == result.expert_weights.shape == (0, 4)
    tensor = result.output if do_finalize else result.gemm2_output
    assert tensor is not None
    assert tensor.shape == (0, case.spec.hidden_size)


@either_way
def test_prepared_and_unprepared_layers_give_the_same_bits() -> None:
    case = make_case(make_spec(), 50, seed=2).slice(2, 9)
    cpu = TorchBackend()
    layer = cpu.wrap(case.spec, case.weights)
    got = cpu.forward(layer, case.hidden_states, routing_logits=case.routing_logits).output
    assert got is not None
    assert torch.equal(got, output(case))
    assert layer.nbytes == case.weights.nbytes


@pytest.mark.parametrize("expert_type", EVERY_EXPERT_TYPE)
def test_inference_mode_gives_the_same_bits(expert_type: type, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, expert_type)
    case = make_case(make_spec(), 50, seed=2)
    outside = output(case)
    with torch.inference_mode():
        assert torch.equal(output(case), outside)


def test_nbytes_counts_two_bytes_a_weight_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_experts, "find_unit", lambda: None)
    case = make_case(make_spec(), 1, seed=2)
    prepared = TorchBackend().prepare(case.spec, case.weights)
    num_weights = case.weights.gemm1_weights.numel() + case.weights.gemm2_weights.numel()
    assert prepared.nbytes == 2 * num_weights + 3 * 4 * 16


@pytest.mark.parametrize("expert_type", EVERY_EXPERT_TYPE)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(512, 256), (37, 21)])
def test_the_products_of_either_kind_of_cpu_agree_with_the_reference(
    hidden_size: int, intermediate_size: int, expert_type: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, expert_type)
    spec = make_spec(hidden_size=hidden_size, intermediate_size=intermediate_size)
    check_against_reference(make_case(spec, 40, seed=5))


@pytest.mark.parametrize(
    "freedom",
    [
        products.Freedom(products.BLOCKS, in_blocks=True, any_threads=True),
        products.Freedom((3, 40, 41, 100, products.MAX_ROWS), in_blocks=False, any_threads=False),
    ],
    ids=["blocks", "some numbers of rows"],
)
@pytest.mark.parametrize("spec", [make_spec(), make_spec(hidden_size=37, intermediate_size=21)], ids=["even", "odd"])
def test_added_rows_and_blocks_change_nothing_but_the_time(
    spec: LayerSpec, freedom: products.Freedom, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, products.FloatExpert)
    case = make_case(spec, 200, seed=5, logits="one_expert")
    in_one_piece = output(case)
    monkeypatch.setattr(backend_cpu, "probe", lambda *sizes: freedom)
    found = output(case)
    assert relative_error(found, in_one_piece) <= WHOLE_OUTPUT_BOUND
    if not freedom.in_blocks:
        return  # its numbers of rows are made up: whether their bits agree is the CPU's affair
    for t in (0, 31, 32, 199):
        one = dataclasses.replace(
            case, hidden_states=case.hidden_states[t : t + 1], routing_logits=case.routing_logits[t : t + 1]
        )
        assert torch.equal(output(one)[0], found[t]), t


def test_numbers_of_rows() -> None:
    some = products.Freedom((3, 6, 256), in_blocks=False, any_threads=True)
    assert [some.num_rows(n) for n in (1, 3, 4, 7, 256)] == [3, 3, 6, 256, 256]
    assert [products.ON_CUDA.num_rows(n) for n in (1, 32, 33, 256)] == [32, 32, 64, 256]


class Steady(products.FloatExpert):
    """Bits that do not depend on the number of rows, whatever the CPU."""

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(Steady, self).gemm1(row) for row in torch.split(x, 1)])

    def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.cat([super(Steady, self).gemm2(row, scale) for row in torch.split(inter, 1)])


def fickle(rows: range) -> type[Steady]:
    """Rounds differently when there are so many rows."""

    class Fickle(Steady):
        def gemm1(self, x: torch.Tensor) -> torch.Tensor:
            a = super().gemm1(x)
            return a.nextafter(torch.tensor(torch.inf)) if len(x) in rows else a

    return Fickle


@pytest.mark.parametrize(
    ("rows", "smallest", "in_blocks"), [(range(0), 1, False), (range(1, 3), 3, False), (range(1, 200), 32, True)]
)
def test_a_product_that_depends_on_the_number_of_rows_is_found(
    rows: range,
    smallest: int,
    in_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(monkeypatch, fickle(rows))
    with caplog.at_level(logging.WARNING):
        freedom = products.probe.__wrapped__(48, 32, 24, 1)
    assert freedom.num_rows(1) == smallest
    assert freedom.in_blocks == in_blocks
    assert set(freedom.row_counts).isdisjoint(rows) or in_blocks
    assert ("48 x 32" in caplog.text) == in_blocks
    case = make_case(make_spec(), 5, seed=2)
    together = output(case)
    for t in range(5):
        alone = dataclasses.replace(
            case, hidden_states=case.hidden_states[t : t + 1], routing_logits=case.routing_logits[t : t + 1]
        )
        assert torch.equal(output(alone)[0], together[t]), t


def backwards(rows: range) -> type[Steady]:
    """Adds up gemm2's terms from the last to the first when there are so many rows, and rounds the sum to bfloat16."""

    class Backwards(Steady):
        def gemm2(self, inter: torch.Tensor, scale: float) -> torch.Tensor:
            columns = range(inter.shape[1])
            total = torch.zeros(len(inter), self._gemm2_weights.shape[1])
            for k in reversed(columns) if len(inter) in rows else columns:
                total += inter[:, k, None] * self._gemm2_weights[k]
            return (total * scale).bfloat16()

    return Backwards


@pytest.mark.parametrize("intermediate_size", [24, 21, 256])
@pytest.mark.parametrize("rows", [range(1, 2), range(1, 5)], ids=["1 row", "1 to 4 rows"])
def test_another_order_of_adding_is_found_behind_the_rounding_to_bfloat16(
    rows: range, intermediate_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, backwards(rows))
    freedom = products.probe.__wrapped__(2 * intermediate_size, 32, intermediate_size, 1)
    assert freedom.num_rows(1) == rows.stop


def test_numbers_of_rows_that_were_not_tried_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    untried = 13
    use(monkeypatch, fickle(range(untried, untried + 1)))
    freedom = products.probe.__wrapped__(48, 32, 24, 1)
    assert freedom.num_rows(untried) == untried + 1
    assert set(freedom.row_counts) == set(products._PROBE_ROWS)


class ByThreads(Steady):
    """Bits that depend on the number of threads of the caller."""

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        return super().gemm1(x) * torch.get_num_threads()


def test_a_product_that_depends_on_the_number_of_threads_runs_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ByThreads)
    freedom = products.probe.__wrapped__(48, 32, 24, 2)
    assert not freedom.any_threads
    monkeypatch.setattr(backend_cpu, "probe", lambda *sizes: freedom)
    case = make_case(make_spec(), 5, seed=2)
    ids = torch.tensor([[3], [3], [7], [9], [12]], dtype=torch.int32)
    together = output(case, topk_ids=ids, topk_weights=torch.ones(5, 1))  # four pieces
    for t in range(5):  # one piece
        alone = dataclasses.replace(case, hidden_states=case.hidden_states[t : t + 1])
        assert torch.equal(output(alone, topk_ids=ids[t : t + 1], topk_weights=torch.ones(1, 1))[0], together[t]), t


@pytest.mark.parametrize("num_items", [0, 1, 2, 5])
def test_workers_take_every_item_even_a_single_one(num_items: int) -> None:
    threads: dict[int, int] = {}
    run_all(lambda item: threads.update({item: torch.get_num_threads()}), range(num_items), by_workers=True)
    assert threads == dict.fromkeys(range(num_items), 1)
    run_all(lambda item: threads.update({item: torch.get_num_threads()}), range(num_items), by_workers=False)
    assert threads == dict.fromkeys(range(num_items), 2)


def test_rounding_to_fp8_in_place_gives_the_values_of_the_conversion() -> None:
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (finite[:-1] + finite[1:]) / 2
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-30, 449.0, 480.0, 1e9])
    x = torch.cat([finite, middles, middles.nextafter(finite[1:]), middles.nextafter(finite[:-1]), special])
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-4, 3, 100_000)
    x = torch.cat([x, -x, noise])
    expected = from_fp8(to_fp8(x), torch.float32)
    torch.testing.assert_close(round_to_fp8(x), expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_select_backend() -> None:
    assert select_backend("cpu").name == "cpu"
    with pytest.raises(ValueError, match="device is mps, expected"):
        select_backend("mps")


@pytest.mark.parametrize(
    ("capability", "has_kernels", "expected"),
    [((9, 0), True, None), ((9, 0), False, "install with EXPERTD_CUDA=on"), ((8, 0), True, "need 9.0")],
)
def test_why_a_cuda_device_gets_the_torch_backend(
    capability: tuple[int, int], has_kernels: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object() if has_kernels else None)
    reason = backend._why_no_kernels(torch.device("cuda", 0))
    assert reason is None if expected is None else expected in str(reason)


def test_the_log_says_why_a_cuda_device_is_served_by_the_torch_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    with caplog.at_level(logging.WARNING):
        chosen = select_backend("auto")
    assert (chosen.name, chosen.device) == ("torch", torch.device("cuda", 1))
    (line,) = caplog.records
    assert (line.name, line.levelno) == ("expertd_server.backend", logging.WARNING)
    assert line.getMessage() == (
        "backend 'torch' (plain torch, not the Hopper kernels) on cuda:1: "
        "some GPU has compute capability 8.0, the kernels need 9.0"
    )
