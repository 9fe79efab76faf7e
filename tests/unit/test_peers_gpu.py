"""What benchmarks/peers_gpu asks of other programs, held against stand-ins for them; and why it leaves some out."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case, make_case, make_spec, relative_error

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers_gpu import PEERS, PeerSkippedError, open_peer
from peers_gpu.beside import Beside

from expertd_server import reference
from expertd_server.fp8 import to_fp8
from expertd_server.types import Activation, RoutingMethod

SPECS = {
    "whole": make_spec(),
    "slice": make_spec(local_expert_offset=8, local_num_experts=8),
    "scales on input": make_spec(
        routing_method=RoutingMethod.LLAMA4, top_k=1, use_routing_scales_on_input=True, num_experts=4
    ),
}
# Their sums are rounded to bfloat16 on the way, the reference's are not.
MOST_ERROR = 2e-2


def case_of(spec: str) -> Case:
    case = make_case(SPECS[spec], 13, seed=3)
    gate = case.weights.output1_scales_gate_scalar
    return dataclasses.replace(case, weights=dataclasses.replace(case.weights, output1_scales_scalar=gate * 32.0))


def check(peer: str, case: Case) -> None:
    ids, weights = reference.route(case.spec, case.routing_logits, case.weights.routing_bias)
    layer = open_peer(peer, case.spec, case.weights)
    output = layer(case.hidden_states, ids, weights.float())
    expected = reference.forward(case.spec, case.weights, case.hidden_states, topk_ids=ids, topk_weights=weights)
    assert output.dtype == torch.bfloat16
    error = relative_error(output, expected.output)
    assert error < MOST_ERROR, f"{peer}: {error:.1e}, {case.name}"


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


# ---- torch


@pytest.fixture
def grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch._scaled_grouped_mm, which has no CPU version: scales by row and by column, rows past the last end unset."""

    def product(
        rows: torch.Tensor,
        matrices: torch.Tensor,
        row_scale: torch.Tensor,
        column_scale: torch.Tensor,
        *,
        offs: torch.Tensor,
        out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> torch.Tensor:
        assert use_fast_accum
        assert matrices.stride(-2) == 1, "K has to be contiguous"
        assert offs.dtype == torch.int32
        assert column_scale.shape == (len(matrices), matrices.shape[-1])
        out = torch.full((len(rows), matrices.shape[-1]), torch.nan)
        start = 0
        for matrix, scale, end in zip(matrices.float(), column_scale, offs.tolist(), strict=True):
            out[start:end] = rows[start:end].float() @ matrix * row_scale[start:end, None] * scale
            start = end
        return out.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", product)


@pytest.mark.usefixtures("grouped_mm")
@pytest.mark.parametrize("spec", SPECS)
def test_torch_is_given_the_same_layer(spec: str) -> None:
    check("torch", case_of(spec))
    check("torch", make_case(SPECS[spec], 5, seed=4))  # scales that differ between experts


# ---- FlashInfer


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """flashinfer's fused MoE: up before gate, four scales; returns what autotune was told."""
    told: list[bool] = []

    @contextlib.contextmanager
    def autotune(tunes: bool) -> Iterator[None]:
        told.append(tunes)
        yield

    def fused(  # noqa: PLR0917
        x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor,
        output_dtype: torch.dtype, *, quant_scales: list[torch.Tensor], output: torch.Tensor,
        ep_size: int, ep_rank: int,
    ) -> None:  # fmt: skip
        fc1_dequant, fc2_quant, fc2_dequant, _ = quant_scales
        assert ids.dtype == torch.int32
        assert (scales.dtype, output_dtype) == (torch.float32, torch.bfloat16)
        assert fc2_quant.dim() == 0
        assert len(fc1) == len(fc2) == len(fc1_dequant)
        total = torch.zeros(len(x), fc2.shape[1])
        for t, k in ((t, k) for t in range(len(ids)) for k in range(ids.shape[1])):
            e = int(ids[t, k]) - ep_rank * len(fc1)
            if 0 <= e < len(fc1):
                up, gate = (fc1[e].float() @ x[t].float() * fc1_dequant[e]).chunk(2)
                inter = to_fp8(swiglu(gate, up) * fc2_quant).float()
                total[t] += scales[t, k] * (fc2[e].float() @ inter * fc2_dequant[e])
        assert ep_size in (1, 2)
        output.copy_(total)

    install(monkeypatch, "flashinfer.fused_moe", cutlass_fused_moe=fused)
    install(monkeypatch, "flashinfer.autotuner", autotune=autotune)
    return told


@pytest.mark.parametrize("spec", ["whole", "slice"])
def test_flashinfer_is_given_the_same_layer(spec: str, flashinfer: list[bool]) -> None:
    check("flashinfer", case_of(spec))
    assert flashinfer == [True]


def test_flashinfer_is_tuned_once_for_each_number_of_tokens(flashinfer: list[bool]) -> None:
    case = case_of("whole")
    layer = open_peer("flashinfer", case.spec, case.weights)
    for num_tokens in (3, 3, 5):
        ids = torch.zeros(num_tokens, case.spec.top_k, dtype=torch.int32)
        layer(case.hidden_states[:num_tokens], ids, torch.ones(num_tokens, case.spec.top_k))
    assert flashinfer == [True, False, True]


# ---- vLLM


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's fused_experts: gate before up, scales of weights by expert and of activations for all."""

    def fused_experts(
        x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *,
        apply_router_weight_on_input: bool, global_num_experts: int, expert_map: torch.Tensor | None,
        quant_config: dict[str, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        assert x.dtype == torch.bfloat16
        assert weights.dtype == torch.float32
        a1, a2 = quant_config["a1_scale"], quant_config["a2_scale"]
        assert a1.shape == a2.shape == (1,)
        total = torch.zeros(len(x), w2.shape[1])
        for t, k in ((t, k) for t in range(len(ids)) for k in range(ids.shape[1])):
            assert int(ids[t, k]) < global_num_experts
            e = int(ids[t, k]) if expert_map is None else int(expert_map[ids[t, k]])
            if e < 0:
                continue
            sums = w1[e].float() @ to_fp8(x[t].float() / a1).float() * a1 * quant_config["w1_scale"][e]
            gate, up = (sums * weights[t, k] if apply_router_weight_on_input else sums).chunk(2)
            inter = to_fp8(swiglu(gate, up) / a2).float()
            row = w2[e].float() @ inter * a2 * quant_config["w2_scale"][e]
            total[t] += row if apply_router_weight_on_input else row * weights[t, k]
        return total.to(x.dtype)

    install(monkeypatch, "vllm.model_executor.layers.fused_moe", fused_experts=fused_experts)
    install(monkeypatch, "vllm.model_executor.layers.fused_moe.config", fp8_w8a8_moe_quant_config=dict)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("spec", SPECS)
def test_vllm_is_given_the_same_layer(spec: str) -> None:
    check("vllm", case_of(spec))


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module that can be imported by its dotted name."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        if (path := ".".join(parts[:n])) not in sys.modules or sys.modules[path] is None:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)


# ---- left out


@pytest.mark.parametrize(("peer", "package"), [("vllm", "vllm"), ("flashinfer", "flashinfer")])
def test_a_peer_that_is_not_installed_says_so(peer: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    case = case_of("whole")
    with pytest.raises(PeerSkippedError, match=rf"^{package}\S* is not installed \(.*\); pip install {package}$"):
        open_peer(peer, case.spec, case.weights)


@pytest.mark.parametrize("peer", PEERS)
def test_other_activations_are_left_out(peer: str) -> None:
    case = make_case(make_spec(activation=Activation.RELU2), 1, seed=1)
    with pytest.raises(PeerSkippedError, match="activation is RELU2, this peer is measured with SWIGLU alone"):
        open_peer(peer, case.spec, case.weights)


@pytest.mark.usefixtures("flashinfer", "vllm")
def test_layers_that_a_peer_cannot_compute_are_left_out() -> None:
    uneven = make_case(make_spec(local_expert_offset=2, local_num_experts=8), 1, seed=1)
    apart = make_case(SPECS["whole"], 1, seed=1)
    for peer, case, reason in (
        ("flashinfer", case_of("scales on input"), "scales the input by the routing weight"),
        ("flashinfer", uneven, "experts 2 to 9 of 16 are not one of equal slices"),
        ("flashinfer", apart, "scales of the intermediate differ between experts"),
        ("vllm", apart, "scales of the intermediate differ between experts"),
    ):
        with pytest.raises(PeerSkippedError, match=reason):
            open_peer(peer, case.spec, case.weights)


@pytest.mark.usefixtures("grouped_mm")
def test_whatever_goes_wrong_with_a_peer_leaves_out_its_case_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    case = case_of("whole")
    beside = Beside(["torch", "vllm"])
    beside.open("first", case.spec, case.weights)
    assert beside.time("first", lambda _: {"us": 7.0}) == {"torch": {"us": 7.0}}

    def fails(_: object) -> dict[str, float]:
        raise RuntimeError("illegal address")

    assert beside.time("first", fails) == {}
    assert beside.time("first", lambda _: {"us": 7.0}) == {}, "it is not tried again"
    assert beside.left_out["first"]["torch"] == "RuntimeError: illegal address"
    assert beside.left_out["first"]["vllm"].startswith("vllm.model_executor.layers.fused_moe is not installed")
    beside.open("second", case.spec, case.weights)
    assert beside.time("second", lambda _: {"us": 8.0}) == {"torch": {"us": 8.0}}
    assert list(beside.left_out["second"]) == ["vllm"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "vllm is left out of first",
        "torch is left out of first",
        "vllm is left out of second",
    ]
