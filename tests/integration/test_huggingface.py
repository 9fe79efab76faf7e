"""The layer against the MoE blocks of transformers: random Qwen3-MoE and Mixtral models, hidden states of real text.

What FP8 costs: rounding a value to e4m3 moves it by 2.6 % (root mean square), and roundings add up as squares. With
FP8 weights that are the model's own, three are left (hidden states in gate and in up, activation): 4.6 %. Where the
weights are rounded too, at load, three more come in (gate, up, down): 6.5 %. That is the format's price for random
weights, whoever computes it: the reference in float64 pays the same, and the layer is held to within 1 % of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from expertd_server import reference
from expertd_server.backend_cpu import TorchBackend
from expertd_server.calibration import Calibration, InputScales
from expertd_server.checkpoint import open_checkpoint
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights
from tests.checkpoints import save_dequantised, save_static_fp8

SEED = 22
TEXT = Path(__file__).parents[2] / "LICENSE"
NUM_TOKENS = 256
OWN_WEIGHTS_LIMIT = 0.05
ROUNDED_WEIGHTS_LIMIT = 0.07
CONTRACT_LIMIT = 0.01

COMMON = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 2,
}
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, intermediate_size=256, moe_intermediate_size=128, num_experts=8, norm_topk_prob=True)
    ),
    "qwen3_moe, weights not renormalised": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, intermediate_size=256, moe_intermediate_size=128, num_experts=8, norm_topk_prob=False)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=128, num_local_experts=8)),
}


@dataclass(frozen=True)
class Block:
    """One MoE block of a model at work on the text."""

    layer_name: str
    hidden_states: torch.Tensor
    """[T, H] float32, what the block gets."""
    logits: torch.Tensor
    """[T, E] float32, its router's."""
    topk_ids: torch.Tensor
    """[T, K], its router's choice."""
    output: torch.Tensor
    """[T, H] float32, what it gives."""


@dataclass(frozen=True)
class Case:
    """A checkpoint, the blocks of the model it holds and how far from them FP8 may be."""

    directory: Path
    calibration: Calibration | None
    blocks: list[Block]
    limit: float


def run_on_text(model: Any) -> list[Block]:
    """Every MoE block's inputs and outputs on the bytes of the text."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, inputs, output, index=index: seen.__setitem__(index, (inputs[0][0], output[0]))
        )
    blocks = []
    with torch.no_grad():
        model(torch.tensor([list(TEXT.read_bytes()[:NUM_TOKENS])]))
        for index, layer in enumerate(model.model.layers):
            hidden_states, output = seen[index]
            logits, _, topk_ids = layer.mlp.gate(hidden_states)
            # Some gates return probabilities in their place: the layer wants what the router's weight gives.
            logits = hidden_states @ layer.mlp.gate.weight.T
            blocks.append(
                Block(f"model.layers.{index}", hidden_states, logits, topk_ids, output.reshape(NUM_TOKENS, -1))
            )
    return blocks


@pytest.fixture(scope="module", params=list(MODELS))
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """The same model as a bfloat16 checkpoint and as an FP8 static one, each with the blocks of its own weights."""
    directory = tmp_path_factory.mktemp("huggingface")
    torch.manual_seed(SEED)
    model = MODELS[request.param]().to(torch.bfloat16)
    model.save_pretrained(directory / "bfloat16", max_shard_size="1MB")
    blocks = run_on_text(model.float().eval())
    plain = open_checkpoint(directory / "bfloat16")
    scales: dict[str, InputScales] = {
        b.layer_name: plain.measure(b.layer_name, b.hidden_states, b.topk_ids) for b in blocks
    }
    save_static_fp8(directory / "bfloat16", directory / "fp8", scales)
    save_dequantised(directory / "fp8", directory / "dequantised")
    own = type(model).from_pretrained(directory / "dequantised", dtype=torch.float32)
    return {
        "bfloat16": Case(directory / "bfloat16", Calibration(layers=scales), blocks, ROUNDED_WEIGHTS_LIMIT),
        "fp8": Case(directory / "fp8", None, run_on_text(own.eval()), OWN_WEIGHTS_LIMIT),
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def load(case: Case) -> Iterator[tuple[Block, LayerSpec, ExpertWeights]]:
    checkpoint = open_checkpoint(case.directory)
    assert checkpoint.layer_names == [block.layer_name for block in case.blocks]
    for block in case.blocks:
        yield block, *checkpoint.load(block.layer_name, calibration=case.calibration)


@pytest.mark.parametrize("stored", ["bfloat16", "fp8"])
def test_the_router_is_the_models(cases: dict[str, Case], stored: str) -> None:
    checkpoint = open_checkpoint(cases[stored].directory)
    for block in cases[stored].blocks:
        weight, bias = checkpoint.router(block.layer_name)
        assert bias is None
        assert torch.equal(block.hidden_states @ weight.float().T, block.logits)


@pytest.mark.parametrize("stored", ["bfloat16", "fp8"])
def test_the_layer_against_the_models_own_block(cases: dict[str, Case], stored: str) -> None:
    backend = TorchBackend("cpu")
    for block, spec, weights in load(cases[stored]):
        answer = backend.forward(backend.prepare(spec, weights), block.hidden_states, routing_logits=block.logits)
        assert answer.output is not None
        assert torch.equal(answer.topk_ids.sort().values, block.topk_ids.int().sort().values)
        error = relative_error(answer.output, block.output)
        assert error < cases[stored].limit, f"{block.layer_name}, {stored}, seed {SEED}: {error}"
        # An error of nothing would mean that the comparison compares nothing.
        assert error > 0.01, f"{block.layer_name}, {stored}, seed {SEED}: {error}"


@pytest.mark.parametrize("stored", ["bfloat16", "fp8"])
def test_the_layer_against_its_roundings(cases: dict[str, Case], stored: str) -> None:
    backend = TorchBackend("cpu")
    for block, spec, weights in load(cases[stored]):
        answer = backend.forward(backend.prepare(spec, weights), block.hidden_states, routing_logits=block.logits)
        assert answer.output is not None
        expected = reference.forward(spec, weights, block.hidden_states, routing_logits=block.logits)
        error = relative_error(answer.output, expected.output)
        assert error < CONTRACT_LIMIT, f"{block.layer_name}, {stored}, seed {SEED}: {error}"


def test_slices_sum_to_the_block(cases: dict[str, Case]) -> None:
    case, backend = cases["fp8"], TorchBackend("cpu")
    checkpoint = open_checkpoint(case.directory)
    for block in case.blocks:
        total = torch.zeros_like(block.output)
        for experts in (range(3), range(3, 4), range(4, 8)):
            spec, weights = checkpoint.load(block.layer_name, experts)
            answer = backend.forward(backend.prepare(spec, weights), block.hidden_states, routing_logits=block.logits)
            assert answer.output is not None
            total += answer.output.float()
        error = relative_error(total, block.output)
        assert error < case.limit, f"{block.layer_name}, seed {SEED}: {error}"
