"""Reading checkpoints: every dialect, exact scales, slices, and each hazard refused by name."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, Draft, E, H, I, K, draft
from rich.console import Console
from safetensors.torch import save_file

from expertd_server.audit import print_audit
from expertd_server.calibration import Calibration, InputScales, read_calibration, write_calibration
from expertd_server.checkpoint import open_checkpoint
from expertd_server.dialects import Projection
from expertd_server.errors import CheckpointError
from expertd_server.types import Activation, RoutingMethod

LAYER = "model.layers.0"
CALIBRATION = Calibration.uniform(0.02, 0.03)


def refused(made: Draft, tmp_path: Path, *patterns: str, calibration: Calibration | None = None) -> None:
    """The layer cannot be loaded, and the message holds every pattern."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(made.write(tmp_path / "checkpoint")).load(made.layer_name(0), calibration=calibration)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_exactly(family: str, shards: int, tmp_path: Path) -> None:
    made = draft(family)
    checkpoint = open_checkpoint(made.write(tmp_path, shards))
    assert checkpoint.layer_names == [made.layer_name(0), made.layer_name(1)]
    for layer, name in enumerate(checkpoint.layer_names):
        spec, weights = checkpoint.load(name)
        weights.check(spec)
        assert (spec.num_experts, spec.top_k, spec.hidden_size, spec.intermediate_size) == (E, K, H, I)
        assert weights.gemm1_weights.shape == (E, spec.gemm1_rows, H)

        def scale(expert: int, projection: str, kind: str, layer: int = layer) -> float:
            return float(made.tensors[made.name(layer, expert, projection, kind)])

        gated = spec.activation.is_gated
        first = ("gate", "up") if gated else ("up",)
        a1 = max(scale(e, p, "input_scale") for e in range(E) for p in first)
        assert weights.hidden_states_scale == 1 / a1
        for e in range(E):
            up, down = (made.tensors[made.name(layer, e, p)] for p in ("up", "down"))
            assert torch.equal(weights.gemm1_weights[e, :I].float(), up.float())
            assert torch.equal(weights.gemm2_weights[e].float(), down.float())
            a2 = scale(e, "down", "input_scale")
            expected = [
                scale(e, "up", "weight_scale") * a1 / a2 if gated else 1 / a2,
                scale(e, "gate" if gated else "up", "weight_scale") * a1,
                scale(e, "down", "weight_scale") * a2,
            ]
            if gated:
                gate = made.tensors[made.name(layer, e, "gate")]
                assert torch.equal(weights.gemm1_weights[e, I:].float(), gate.float())
            found = [weights.output1_scales_scalar, weights.output1_scales_gate_scalar, weights.output2_scales_scalar]
            assert torch.equal(torch.stack([s[e] for s in found]), torch.tensor(expected)), f"expert {e} of {name}"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", {"routing_method": RoutingMethod.RENORMALIZE}),
        ("qwen3_moe", {"routing_method": RoutingMethod.RENORMALIZE_NAIVE, "norm_topk_prob": True}),
        ("qwen2_moe", {"routing_method": RoutingMethod.RENORMALIZE_NAIVE, "norm_topk_prob": False}),
        (
            "deepseek_v3",
            {
                "routing_method": RoutingMethod.DEEPSEEK_V3,
                "n_group": 2,
                "topk_group": 1,
                "routed_scaling_factor": 2.5,
            },
        ),
        ("glm4_moe", {"routing_method": RoutingMethod.DEEPSEEK_V3, "n_group": 2}),
        ("minimax_m2", {"routing_method": RoutingMethod.MINIMAX2}),
        ("nemotron_h", {"routing_method": RoutingMethod.DEEPSEEK_V3, "activation": Activation.RELU2}),
    ],
)
def test_routing_follows_the_family(family: str, expected: dict[str, Any], tmp_path: Path) -> None:
    made = draft(family)
    checkpoint = open_checkpoint(made.write(tmp_path))
    name = made.layer_name(0)
    spec, weights = checkpoint.load(name)
    assert {key: getattr(spec, key) for key in expected} == expected
    router, bias = checkpoint.router(name)
    assert torch.equal(router, made.tensors[f"{name}.{made.family.block}.gate.weight"])
    if made.family.bias is None:
        assert bias is None
        assert weights.routing_bias is None
    else:
        stored = made.tensors[f"{name}.{made.family.block}.{made.family.bias}"]
        assert bias is not None
        assert weights.routing_bias is not None
        assert torch.equal(bias, stored)
        assert torch.equal(weights.routing_bias, stored)


def test_dense_layers_are_skipped(tmp_path: Path) -> None:
    made = draft("qwen3_moe", num_layers=5)
    made.config |= {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert open_checkpoint(made.write(tmp_path / "qwen")).layer_names == ["model.layers.1"]
    made = draft("deepseek_v3", num_layers=4)
    made.config |= {"first_k_dense_replace": 1, "moe_layer_freq": 2}
    assert open_checkpoint(made.write(tmp_path / "deepseek")).layer_names == ["model.layers.2"]
    made = draft("nemotron_h", num_layers=2)
    made.config["hybrid_override_pattern"] = "ME*E-"
    assert open_checkpoint(made.write(tmp_path / "nemotron")).layer_names == ["backbone.layers.1", "backbone.layers.3"]


def test_a_slice_equals_the_rows_of_the_whole(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draft().write(tmp_path, shards=3))
    _, whole = checkpoint.load(LAYER)
    spec, part = checkpoint.load(LAYER, range(1, 3))
    assert (spec.local_expert_offset, spec.num_local, spec.num_experts) == (1, 2, E)
    # The input scale is the layer's, over all experts, or two servers would quantise one token differently.
    assert part.hidden_states_scale == whole.hidden_states_scale
    for name in ("gemm1_weights", "gemm2_weights"):
        assert torch.equal(getattr(part, name).view(torch.uint8), getattr(whole, name)[1:3].view(torch.uint8))
    for name in ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:3])


def test_a_slice_reads_only_its_slice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draft().write(tmp_path, shards=3))
    assert (checkpoint.files.tensors_read, checkpoint.files.bytes_read) == (0, 0), "opening reads no tensor"
    checkpoint.spec(LAYER)
    checkpoint.account(LAYER)
    assert checkpoint.files.tensors_read == 0, "headers are enough for the account"
    progress: list[int] = []
    checkpoint.load(LAYER, range(2, 3), progress=progress.append)
    weight_bytes = 3 * H * I
    scalars = 3 + 3 * E  # weight scales of the one expert, input scales of all
    assert checkpoint.files.tensors_read == 3 + scalars
    assert checkpoint.files.bytes_read == weight_bytes + 4 * scalars
    assert sum(progress) == weight_bytes == checkpoint.nbytes(LAYER, range(2, 3))


def test_a_slice_does_not_look_at_other_experts(tmp_path: Path) -> None:
    made = draft()
    made.tensors[made.name(0, 3, "up", "weight_scale")] = torch.tensor(float("nan"))
    checkpoint = open_checkpoint(made.write(tmp_path))
    checkpoint.load(LAYER, range(3))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.weight_scale is nan"):
        checkpoint.load(LAYER, range(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unquantised_weights_are_quantised_by_their_maximum(dtype: torch.dtype, tmp_path: Path) -> None:
    made = draft(fp8=False)
    made.tensors = {name: tensor.to(dtype) for name, tensor in made.tensors.items()}
    checkpoint = open_checkpoint(made.write(tmp_path))
    _, weights = checkpoint.load(LAYER, calibration=CALIBRATION)
    assert weights.hidden_states_scale == 1 / 0.02
    for e in range(E):
        gate, up, down = (made.tensors[made.name(0, e, p)].float() for p in ("gate", "up", "down"))
        s_gate, s_up, s_down = (float(w.abs().max()) / 448 for w in (gate, up, down))
        found = [weights.output1_scales_scalar, weights.output1_scales_gate_scalar, weights.output2_scales_scalar]
        expected = torch.tensor([s_up * 0.02 / 0.03, s_gate * 0.02, s_down * 0.03])
        assert torch.equal(torch.stack([s[e] for s in found]), expected)
        for real, stored, scale in (
            (up, weights.gemm1_weights[e, :I], s_up),
            (gate, weights.gemm1_weights[e, I:], s_gate),
            (down, weights.gemm2_weights[e], s_down),
        ):
            assert float(stored.float().abs().max()) == 448
            # Half a step of e4m3: 2^-4 of the value, or of the smallest normal number below it.
            step = 2**-4 * torch.maximum(real.abs(), torch.tensor(2**-6 * scale))
            assert bool(((stored.float() * scale - real).abs() <= step * 1.001).all())


@pytest.mark.parametrize(
    ("weight_scale", "input_scale"),
    [("weight_scale", "act_scale"), ("weight_scale_inv", "input_scale")],
)
def test_other_spellings_of_scales(weight_scale: str, input_scale: str, tmp_path: Path) -> None:
    made = draft()
    _, expected = open_checkpoint(made.write(tmp_path / "a")).load(LAYER)
    made.tensors = {
        name.replace("weight_scale", weight_scale).replace("input_scale", input_scale): tensor
        for name, tensor in made.tensors.items()
    }
    _, found = open_checkpoint(made.write(tmp_path / "b")).load(LAYER)
    assert torch.equal(found.output1_scales_scalar, expected.output1_scales_scalar)
    assert found.hidden_states_scale == expected.hidden_states_scale


def test_one_file_and_modelopt_config(tmp_path: Path) -> None:
    made = draft()
    del made.config["quantization_config"]
    made.write(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.quantization == "modelopt, quant_algo FP8"
    checkpoint.load(LAYER)


# Each hazard, by what is done to a good checkpoint and what the message must name.


def _drop(made: Draft, name: str) -> None:
    del made.tensors[name]


def _set(made: Draft, name: str, value: torch.Tensor) -> None:
    made.tensors[name] = value


W = "experts.1.w1"
HAZARDS: dict[str, tuple[Callable[[Draft], None], str]] = {
    "missing weight": (lambda c: _drop(c, c.name(0, 1, "gate")), rf"{W}\.weight is missing"),
    "missing weight scale": (
        lambda c: _drop(c, c.name(0, 1, "gate", "weight_scale")),
        rf"{W}\.weight_scale is missing",
    ),
    "missing input scale": (lambda c: _drop(c, c.name(0, 1, "gate", "input_scale")), rf"{W}\.input_scale is missing"),
    "NaN weight scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.tensor(float("nan"))),
        rf"{W}\.weight_scale is nan",
    ),
    "zero weight scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.tensor(0.0)),
        rf"{W}\.weight_scale is 0\.0",
    ),
    "negative weight scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.tensor(-1.0)),
        rf"{W}\.weight_scale is -1\.0",
    ),
    "infinite weight scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.tensor(float("inf"))),
        rf"{W}\.weight_scale is inf",
    ),
    "NaN input scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "input_scale"), torch.tensor(float("nan"))),
        rf"{W}\.input_scale is nan",
    ),
    "zero input scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "input_scale"), torch.tensor([0.0])),
        rf"{W}\.input_scale is 0\.0",
    ),
    "unknown scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "pre_quant_scale"), torch.tensor(1.0)),
        rf"{W}\.pre_quant_scale is not expected",
    ),
    "bias": (lambda c: _set(c, c.name(0, 1, "gate", "bias"), torch.ones(I)), rf"{W}\.bias is not expected"),
    "two spellings": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale_inv"), torch.tensor(1.0)),
        rf"{W}\.weight_scale(_inv)? is not expected: .* already",
    ),
    "expert beyond E": (
        lambda c: _set(c, c.name(0, E, "gate"), torch.ones(I, H).to(torch.float8_e4m3fn)),
        rf"experts\.{E}\.w1\.weight is not expected: config.json has {E} experts",
    ),
    "expert index last": (
        lambda c: _set(c, f"{LAYER}.block_sparse_moe.experts.w1.1.weight", c.tensors.pop(c.name(0, 1, "gate"))),
        r"experts\.w1\.1\.weight is not expected",
    ),
    "fused experts": (
        lambda c: _set(c, f"{LAYER}.block_sparse_moe.experts.gate_up_proj", torch.ones(E, 2 * I, H)),
        r"experts\.gate_up_proj is not expected",
    ),
    "block scales": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.ones(2, 2)),
        rf"{W}\.weight_scale has shape \(2, 2\).*To convert",
    ),
    "row scales": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.ones(I, 1)),
        rf"{W}\.weight_scale has shape \({I}, 1\).*To convert",
    ),
    "per-channel input scale": (
        lambda c: _set(c, c.name(0, 1, "gate", "input_scale"), torch.ones(H)),
        rf"{W}\.input_scale has shape \({H},\).*To convert",
    ),
    "scale type": (
        lambda c: _set(c, c.name(0, 1, "gate", "weight_scale"), torch.tensor(1)),
        rf"{W}\.weight_scale is I64, expected F32",
    ),
    "transposed": (
        lambda c: _set(c, c.name(0, 1, "gate"), c.tensors[c.name(0, 1, "gate")].T.contiguous()),
        rf"{W}\.weight has shape \({H}, {I}\), expected \({I}, {H}\)",
    ),
    "E5M2": (
        lambda c: _set(c, c.name(0, 1, "gate"), torch.ones(I, H).to(torch.float8_e5m2)),
        rf"{W}\.weight is F8_E5M2, expected F8_E4M3",
    ),
    "E4M3FNUZ": (
        lambda c: _set(c, c.name(0, 1, "gate"), torch.ones(I, H).to(torch.float8_e4m3fnuz)),
        rf"{W}\.weight is F8_E4M3FNUZ, expected F8_E4M3",
    ),
    "NaN in the weight": (
        lambda c: _set(c, c.name(0, 1, "gate"), torch.full((I, H), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        rf"{W}\.weight holds NaN",
    ),
    "zeros": (
        lambda c: _set(c, c.name(0, 1, "gate"), torch.zeros(I, H).to(torch.float8_e4m3fn)),
        rf"{W}\.weight is all zeros",
    ),
    "scale beside bfloat16": (
        lambda c: _set(c, c.name(0, 1, "gate"), torch.ones(I, H).bfloat16()),
        rf"{W}\.weight_scale is not expected: .* BF16",
    ),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazards_are_refused_by_name(hazard: str, tmp_path: Path) -> None:
    made = draft()
    change, pattern = HAZARDS[hazard]
    change(made)
    refused(made, tmp_path, pattern)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_broken_unquantised_weights_are_refused(value: float, tmp_path: Path) -> None:
    made = draft(fp8=False)
    made.tensors[made.name(0, 1, "gate")].fill_(value)
    refused(made, tmp_path, rf"{W}\.weight (holds|is all)", calibration=CALIBRATION)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scales_that_leave_float32_together_are_refused(factor: float, tmp_path: Path) -> None:
    made = draft()
    for name in [name for name in made.tensors if name.endswith("scale")]:
        made.tensors[name] = made.tensors[name] * factor
    refused(made, tmp_path, "products of its scales leave the range of float32")


def test_input_scales_of_every_expert_are_needed_even_for_a_slice(tmp_path: Path) -> None:
    made = draft()
    _drop(made, made.name(0, 3, "up", "input_scale"))
    checkpoint = open_checkpoint(made.write(tmp_path))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.input_scale is missing"):
        checkpoint.load(LAYER, range(1))


def test_without_input_scales_a_calibration_is_needed(tmp_path: Path) -> None:
    made = draft()
    made.config["quantization_config"]["activation_scheme"] = "dynamic"
    made.tensors = {name: t for name, t in made.tensors.items() if "input_scale" not in name}
    checkpoint = open_checkpoint(made.write(tmp_path))
    with pytest.raises(CheckpointError, match=r"no static input scales.*calibration file"):
        checkpoint.load(LAYER)
    _, weights = checkpoint.load(LAYER, calibration=CALIBRATION)
    assert weights.hidden_states_scale == 1 / 0.02


def test_a_calibration_replaces_broken_input_scales(tmp_path: Path) -> None:
    made = draft()
    _set(made, made.name(0, 1, "gate", "input_scale"), torch.tensor(float("nan")))
    _, weights = open_checkpoint(made.write(tmp_path)).load(LAYER, calibration=CALIBRATION)
    assert weights.hidden_states_scale == 1 / 0.02


BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


@pytest.mark.parametrize(
    ("quantization", "pattern"),
    [
        (BLOCK, r"weight_block_size is \[128, 128\].*To convert"),
        (CHANNEL, r"config_groups.group_0.weights is .*'channel'.*To convert"),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4', expected fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', expected 'FP8'"),
        ({"quant_method": "fp8"}, "activation_scheme is None"),
        ({"quant_method": "fp8", "fmt": "e5m2", "activation_scheme": "static"}, "E5M2"),
    ],
)
def test_other_quantisations_are_refused(quantization: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    made = draft()
    made.config["quantization_config"] = quantization
    refused(made, tmp_path, pattern)


def test_compressed_tensors_with_static_tensor_scales_is_read(tmp_path: Path) -> None:
    made = draft()
    tensor = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    made.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": tensor, "input_activations": tensor}},
    }
    checkpoint = open_checkpoint(made.write(tmp_path))
    assert checkpoint.quantization == "compressed-tensors, static input scales"
    checkpoint.load(LAYER)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"model_type": "llama4"}, r"model_type is 'llama4', expected one of .*mixtral.*save_pretrained"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of silu"),
        ({"num_local_experts": None}, "num_local_experts or num_experts is missing"),
        ({"hidden_size": "big"}, "hidden_size is 'big', expected a whole number"),
        ({"num_experts_per_tok": 9}, "top_k is 9"),
    ],
)
def test_configs_are_refused_by_key(change: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    made = draft()
    made.config |= change
    refused(made, tmp_path, pattern)


@pytest.mark.parametrize(
    "change",
    [{"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"norm_topk_prob": False}],
)
def test_arithmetic_that_the_layer_does_not_do_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    made = draft("deepseek_v3")
    made.config |= change
    refused(made, tmp_path, f"{next(iter(change))} is .*no such variant")


def test_a_missing_routing_bias_is_refused(tmp_path: Path) -> None:
    made = draft("deepseek_v3")
    _drop(made, f"{LAYER}.mlp.gate.e_score_correction_bias")
    refused(made, tmp_path, r"mlp\.gate\.e_score_correction_bias .*is missing")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    draft().write(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing.*finish the download"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    draft().write(tmp_path, shards=3)
    path = tmp_path / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors is not a whole safetensors file"):
        open_checkpoint(tmp_path).load(LAYER)


def test_an_index_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    made = draft()
    made.write(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = {f"model-0000{n}-of-00002.safetensors": f"model-0000{3 - n}-of-00002.safetensors" for n in (1, 2)}
    index["weight_map"] = {name: wrong[file_name] for name, file_name in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"should be in model-0000\d-of-00002.safetensors"):
        open_checkpoint(tmp_path).load(LAYER)


def test_an_index_cannot_point_outside_the_directory(tmp_path: Path) -> None:
    draft().write(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected a file beside it"):
        open_checkpoint(tmp_path)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is missing .*consolidated layout, which is not read"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(draft().config))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("experts", [range(0), range(-1, 2), range(2, E + 1), range(0, 4, 2)])
def test_ranges_outside_the_layer_are_refused(experts: range, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draft().write(tmp_path))
    with pytest.raises(CheckpointError, match=r"expected consecutive ids inside 0 \.\.\. 3"):
        checkpoint.load(LAYER, experts)


def test_an_unknown_layer_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draft().write(tmp_path))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.7' is not in .* model\.layers\.0, model\.layers\.1"):
        checkpoint.load("model.layers.7")


def test_projection_is_the_real_weight(tmp_path: Path) -> None:
    made = draft()
    checkpoint = open_checkpoint(made.write(tmp_path))
    real = made.tensors[made.name(0, 2, "down")].float() * made.tensors[made.name(0, 2, "down", "weight_scale")]
    assert torch.equal(checkpoint.projection(LAYER, 2, Projection.DOWN), real)


def test_measured_scales_hold_activations_twice_as_large(tmp_path: Path) -> None:
    made = draft(fp8=False)
    checkpoint = open_checkpoint(made.write(tmp_path))
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(20, H, generator=generator)
    ids = torch.randint(0, E - 1, (20, K), generator=generator)  # nobody chooses the last expert
    scales = checkpoint.measure(LAYER, hidden, ids)
    assert scales.gemm1 == pytest.approx(float(hidden.abs().max()) / 224, rel=1e-6)
    gate, up = (made.tensors[made.name(0, 1, p)].float() for p in ("gate", "up"))
    tokens = hidden[(ids == 1).any(dim=1)]
    inter = torch.nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)
    assert scales.gemm2[1] == pytest.approx(float(inter.abs().max()) / 224, rel=1e-6)
    assert scales.gemm2[E - 1] == max(scales.gemm2[: E - 1])


def test_calibration_files_keep_every_number(tmp_path: Path) -> None:
    scales = {LAYER: InputScales(0.1, (0.2, 0.3, 0.7, 1 / 3)), "model.layers.1": InputScales(1e-7, (3.0,))}
    write_calibration(tmp_path / "scales.json", scales)
    found = read_calibration(tmp_path / "scales.json")
    assert found.layers == scales
    tensors = {
        f"{LAYER}.gemm1_input_scale": torch.tensor(0.5),
        f"{LAYER}.gemm2_input_scale": torch.tensor([0.25, 0.5, 1.0, 2.0]),
    }
    save_file(tensors, tmp_path / "scales.safetensors")
    assert read_calibration(tmp_path / "scales.safetensors").of(LAYER) == InputScales(0.5, (0.25, 0.5, 1.0, 2.0))
    with pytest.raises(CheckpointError, match=r"scales\.json has no input scales for layer 'model\.layers\.9'"):
        found.of("model.layers.9")


@pytest.mark.parametrize(
    ("layer", "pattern"),
    [
        ({"gemm1_input_scale": 1.0}, "expected gemm1_input_scale and gemm2_input_scale"),
        ({"gemm1_input_scale": 0, "gemm2_input_scale": 1.0}, "gemm1_input_scale is 0.0, expected a positive"),
        ({"gemm1_input_scale": 1.0, "gemm2_input_scale": [1.0, -1.0]}, r"gemm2_input_scale\[1\] is -1.0"),
        ({"gemm1_input_scale": "x", "gemm2_input_scale": 1.0}, "gemm1_input_scale holds 'x', expected a number"),
        ({"gemm1_input_scale": [1.0, 2.0], "gemm2_input_scale": 1.0}, "has 2 numbers, expected one for the layer"),
        ({"gemm1_input_scale": 1.0, "gemm2_input_scale": []}, "gemm2_input_scale is empty"),
    ],
)
def test_bad_calibration_files_are_refused(layer: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(json.dumps({"layers": {LAYER: layer}}))
    with pytest.raises(CheckpointError, match=pattern):
        read_calibration(path)


TOKENS = (torch.randn(40, H, generator=torch.Generator().manual_seed(5)), torch.arange(80).view(40, 2) % E)


def test_tokens_come_back_from_their_file(tmp_path: Path) -> None:
    scales = {LAYER: InputScales(0.1, (0.2, 0.3, 0.7, 1 / 3)), "model.layers.1": InputScales(0.1, (0.7,))}
    path = tmp_path / "calibration.safetensors"
    write_calibration(path, scales, {LAYER: TOKENS})
    found = read_calibration(path)
    assert found.layers == scales
    assert list(found.tokens) == [LAYER]
    assert all(torch.equal(*pair) for pair in zip(found.tokens[LAYER], TOKENS, strict=True))
    with pytest.raises(ValueError, match=r"tokens are given for x\.json, expected .* \.safetensors"):
        write_calibration(tmp_path / "x.json", scales, {LAYER: TOKENS})
    with pytest.raises(ValueError, match=r"tokens has model\.layers\.2, expected layers that have input scales"):
        write_calibration(path, scales, {"model.layers.2": TOKENS})


@pytest.mark.parametrize(
    ("hidden_states", "topk_ids", "pattern"),
    [
        (TOKENS[0], None, "no tensor topk_ids"),
        (None, TOKENS[1], "no tensor hidden_states"),
        (TOKENS[0].int(), TOKENS[1], r"hidden_states is torch.int32 \[40, 32\], expected floating point \[T, H\]"),
        (TOKENS[0][0], TOKENS[1], r"hidden_states is torch.float32 \[32\]"),
        (TOKENS[0], TOKENS[1].float(), "topk_ids is torch.float32 .* expected integers"),
        (TOKENS[0], TOKENS[1][:9], "40 rows of hidden_states and 9 of topk_ids"),
        (TOKENS[0][:, :8], TOKENS[1], rf"hidden_states has shape \(40, 8\), expected \[T, {H}\]"),
        (TOKENS[0][:0], TOKENS[1][:0], r"hidden_states has shape \(0, 32\)"),
        (TOKENS[0] * torch.nan, TOKENS[1], "not finite"),
        (TOKENS[0], TOKENS[1] + 1, rf"topk_ids holds 1 \.\.\. {E}, expected -1 \.\.\. {E - 1}"),
        (TOKENS[0], TOKENS[1] - 2, r"topk_ids holds -2"),
    ],
)
def test_bad_tokens_are_refused(
    hidden_states: torch.Tensor | None, topk_ids: torch.Tensor | None, pattern: str, tmp_path: Path
) -> None:
    tensors = {"gemm1_input_scale": torch.tensor(0.5), "gemm2_input_scale": torch.tensor(0.5)}
    tensors |= {} if hidden_states is None else {"hidden_states": hidden_states.contiguous()}
    tensors |= {} if topk_ids is None else {"topk_ids": topk_ids.contiguous()}
    save_file({f"{LAYER}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "calibration.safetensors")
    checkpoint = open_checkpoint(draft(fp8=False).write(tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match=rf"calibration\.safetensors.*layer '{LAYER}'.*{pattern}"):
        checkpoint.load(LAYER, calibration=read_calibration(tmp_path / "calibration.safetensors"))


def test_a_slice_is_rounded_for_the_tokens_as_the_whole_layer_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draft(fp8=False).write(tmp_path))
    calibration = Calibration(layers={LAYER: InputScales(0.02, (0.03,))}, tokens={LAYER: TOKENS})
    _, whole = checkpoint.load(LAYER, calibration=calibration)
    _, nearest = checkpoint.load(LAYER, calibration=Calibration(layers=calibration.layers))
    _, part = checkpoint.load(LAYER, range(1, 3), calibration)
    for tensor in ("gemm1_weights", "gemm2_weights"):
        of_whole, of_nearest, of_part = (getattr(w, tensor).view(torch.uint8) for w in (whole, nearest, part))
        assert torch.equal(of_part, of_whole[1:3]), tensor
        assert not torch.equal(of_whole, of_nearest), f"{tensor}: the tokens made no difference"


def test_weights_that_are_fp8_stay_as_they_are_whatever_the_tokens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draft().write(tmp_path))
    calibration = Calibration(layers={LAYER: InputScales(0.02, (0.03,))}, tokens={LAYER: TOKENS})
    found, expected = checkpoint.load(LAYER, calibration=calibration)[1], checkpoint.load(LAYER)[1]
    for tensor in ("gemm1_weights", "gemm2_weights"):
        assert torch.equal(getattr(found, tensor).view(torch.uint8), getattr(expected, tensor).view(torch.uint8))


def test_what_is_lost_without_tokens_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    checkpoint = open_checkpoint(draft(fp8=False).write(tmp_path / "wide"))
    calibration = Calibration(default=InputScales(0.02, (0.03,)), tokens={LAYER: TOKENS}, source="some.safetensors")
    checkpoint.load(LAYER, calibration=calibration)
    assert caplog.messages == [f"rounding the weights of {LAYER} for the 40 tokens of some.safetensors"]
    caplog.clear()
    for _ in range(2):
        checkpoint.load("model.layers.1", calibration=calibration)
    (message,) = caplog.messages
    assert "a calibration file that holds tokens" in message
    caplog.clear()
    open_checkpoint(draft().write(tmp_path / "fp8")).load(LAYER)
    assert caplog.messages == []


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    calibration = Calibration(layers={LAYER: InputScales(1.0, (1.0, 1.0, 1.0))}, source="scales.json")
    with pytest.raises(CheckpointError, match=f"scales.json.*has 3 numbers, expected 1 or {E}"):
        open_checkpoint(draft().write(tmp_path)).load(LAYER, calibration=calibration)


def audit_text(path: Path) -> str:
    with io.StringIO() as text:
        print_audit(path, console=Console(width=200, file=text))
        return text.getvalue()


def test_the_audit_names_the_layers_where_there_is_little_room(tmp_path: Path) -> None:
    with io.StringIO() as text:
        print_audit(draft().write(tmp_path), console=Console(width=80, file=text))
        shown = text.getvalue()
    assert "model.layers.0" in shown, shown
    assert "model.layers.1" in shown, shown


def test_the_audit_shows_what_is_there(tmp_path: Path) -> None:
    made = draft("qwen2_moe")
    made.tensors["model.layers.0.mlp.shared_expert.up_proj.weight"] = torch.ones(2, 2)
    made.tensors["model.layers.0.mlp.shared_expert_gate.weight"] = torch.ones(1, 2)
    text = audit_text(made.write(tmp_path))
    for word in ("qwen2_moe", "model.layers.0", "model.layers.1", "shared_expert", "RENORMALIZE_NAIVE", "fp8"):
        assert word in text, text
    assert "left to the client" in text


def test_the_audit_names_what_is_wrong(tmp_path: Path) -> None:
    made = draft(num_layers=2)
    _set(made, made.name(1, 1, "gate", "input_scale"), torch.tensor(float("nan")))
    _drop(made, made.name(0, 2, "down"))
    made.config["num_hidden_layers"] = 2
    for name, tensor in list(made.tensors.items()):
        if name.startswith("model.layers.1."):
            made.tensors[name.replace("layers.1.", "layers.2.")] = tensor.clone()
    made.write(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    text = audit_text(tmp_path)
    assert "experts.2.w2.weight is missing" in text
    assert "NaN" in text
    assert "model.layers.2" in text, "a layer that config.json does not know"
    assert "other.safetensors" in text
