"""The layer against the MoE blocks of transformers: random Qwen3-MoE and Mixtral models, hidden states of real text.

What FP8 costs: rounding a value to e4m3 moves it by 2.64 % (root mean square), whatever the scale, and roundings add up
as squares. Hidden states are felt twice, through gate and through up: 3.8 %. Then come the weights of gate, up and down
and the activation, 2.64 % each. All of it makes 6.4 %. Less is left where less is rounded, or rounded better:

- hidden states that are FP8 values already, which is what the operator takes: 5.3 %;
- weights that are FP8 values: 4.6 %, and 2.6 % with such hidden states;
- weights that are rounded at load for the tokens of a calibration file: 4.8 %, and 2.9 % with such hidden states.

The reference in float64 pays the same, and the layer is held to within 1 % of that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_dequantised, save_static_fp8
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import expertd
from expertd_server import reference
from expertd_server.backend import MoEOutput
from expertd_server.backend_cpu import TorchBackend
from expertd_server.calibration import Calibration, read_calibration, write_calibration
from expertd_server.checkpoint import open_checkpoint
from expertd_server.config import Config
from expertd_server.fp8 import quantize_fp8
from expertd_server.server import Server
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

SEED = 20
TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()
NUM_TOKENS = 256
NUM_CALIBRATION_TEXTS = 64
COMPARED_START = len(TEXT) // 2  # where the passage that is compared starts; none for calibration touches it
UNLIKE_START = 0  # that of one that is unlike all others: a title, and a third of it spaces
REFERENCE_TOKENS = 64  # the reference is plain loops
LIMIT = 0.05
UNLIKE_TEXT_LIMIT = 0.053
FP8_INPUTS_LIMIT = 0.035
NEAREST_LIMIT = 0.066
FP8_INPUTS_NEAREST_LIMIT = 0.055
CONTRACT_LIMIT = 0.01

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts_per_tok": 2,
}


QWEN = {"intermediate_size": 256, "moe_intermediate_size": 256, "num_experts": 8, "norm_topk_prob": True}
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **QWEN)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=256, num_local_experts=8)),
}
STORED = ["bfloat16", "bfloat16 and tokens", "fp8", "bfloat16 of fp8 weights"]


@dataclass(frozen=True)
class Block:
    """One MoE block of a model at work on the text. T num_tokens."""

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
    """A checkpoint, the blocks of the model that it holds, and how far from them the layer may be."""

    directory: Path
    calibration: Path | None
    blocks: list[Block]
    limit: float
    fp8_inputs_limit: float
    model: Any
    """Whose blocks they are."""

    def on_fp8_inputs(self, block: Block, scale: float) -> tuple[Block, torch.Tensor]:
        """The block on its hidden states rounded to FP8 with hidden_states_scale, and these as the FP8 values."""
        hidden_states = quantize_fp8(block.hidden_states, scale)
        return run_block(self.model, block.layer_name, hidden_states.float() / scale), hidden_states

    @functools.cached_property
    def loaded(self) -> list[tuple[Block, LayerSpec, ExpertWeights]]:
        """Each block with the spec and the weights that are read for it."""
        return self.load()

    def load(self, experts: range | None = None) -> list[tuple[Block, LayerSpec, ExpertWeights]]:
        """The same, of a range of the experts."""
        checkpoint = open_checkpoint(self.directory)
        assert checkpoint.layer_names == [block.layer_name for block in self.blocks]
        calibration = None if self.calibration is None else read_calibration(self.calibration)
        return [(block, *checkpoint.load(block.layer_name, experts, calibration)) for block in self.blocks]

    def check(self, found: torch.Tensor, block: Block, *, fp8_inputs: bool = False) -> None:
        """The layer's output against the model's own."""
        error = relative_error(found, block.output)
        limit = self.fp8_inputs_limit if fp8_inputs else self.limit
        assert error < limit, f"{self.directory.name}, {block.layer_name}, seed {SEED}: {error}"
        assert error > 0.01, (
            f"{self.directory.name}, {block.layer_name}: {error}, FP8 cannot be that good: what is compared?"
        )


def run_block(model: Any, layer_name: str, hidden_states: torch.Tensor) -> Block:
    """One MoE block on hidden_states [T, H] float32."""
    block = model.get_submodule(layer_name).mlp
    with torch.no_grad():
        return Block(
            layer_name=layer_name,
            hidden_states=hidden_states,
            logits=hidden_states @ block.gate.weight.T,
            topk_ids=block.gate(hidden_states)[2],
            output=block(hidden_states[None])[0],
        )


def hidden_states_on_text(model: Any, starts: Sequence[int]) -> dict[str, torch.Tensor]:
    """What every MoE block gets, [tokens, H], on NUM_TOKENS bytes of the text from each of starts."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, inputs, name=f"model.layers.{index}": seen.__setitem__(name, inputs[0].flatten(0, 1))
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([list(TEXT[start : start + NUM_TOKENS]) for start in starts]))
    for hook in hooks:
        hook.remove()
    return seen


def run_on_text(model: Any, start: int = COMPARED_START) -> list[Block]:
    """Every MoE block's inputs and outputs."""
    return [run_block(model, name, x) for name, x in hidden_states_on_text(model, [start]).items()]


def samples_of(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What every MoE block gets and chooses on other passages of the text."""
    generator = torch.Generator().manual_seed(SEED)
    before = range(UNLIKE_START + NUM_TOKENS, COMPARED_START - NUM_TOKENS)
    possible = [*before, *range(COMPARED_START + NUM_TOKENS, len(TEXT) - NUM_TOKENS)]
    starts = [possible[i] for i in torch.randperm(len(possible), generator=generator)[:NUM_CALIBRATION_TEXTS].tolist()]
    with torch.no_grad():
        return {
            name: (x, model.get_submodule(name).mlp.gate(x)[2])
            for name, x in hidden_states_on_text(model, starts).items()
        }


@pytest.fixture(scope="module", params=list(MODELS))
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """One random model in the forms of STORED, each with the blocks of the weights that it holds."""
    root = tmp_path_factory.mktemp("huggingface")
    torch.manual_seed(SEED)
    model = MODELS[request.param]()
    # At its initial size the attention's output drowns the embedding, and the tokens are all but one.
    model.model.embed_tokens.weight.data *= 10
    model.to(torch.bfloat16).save_pretrained(root / "bfloat16", max_shard_size="8MB")
    model = model.float().eval()
    blocks = run_on_text(model)
    plain = open_checkpoint(root / "bfloat16")
    assert len(plain.files.file_names) > 1, "the model should be sharded"
    samples = samples_of(model)
    scales = {name: plain.measure(name, *samples[name]) for name in plain.layer_names}
    write_calibration(root / "scales.json", scales)
    write_calibration(root / "calibration.safetensors", scales, samples)
    save_static_fp8(root / "bfloat16", root / "fp8", scales)
    save_dequantised(root / "fp8", root / "dequantised")
    own = type(model).from_pretrained(root / "dequantised", dtype=torch.float32).eval()
    own_blocks = run_on_text(own)
    nearest = (NEAREST_LIMIT, FP8_INPUTS_NEAREST_LIMIT, model)
    return {
        "bfloat16": Case(root / "bfloat16", root / "scales.json", blocks, *nearest),
        "bfloat16 and tokens": Case(
            root / "bfloat16", root / "calibration.safetensors", blocks, LIMIT, FP8_INPUTS_LIMIT, model
        ),
        "fp8": Case(root / "fp8", None, own_blocks, LIMIT, FP8_INPUTS_LIMIT, own),
        "bfloat16 of fp8 weights": Case(
            root / "dequantised", root / "scales.json", own_blocks, LIMIT, FP8_INPUTS_LIMIT, own
        ),
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def run_layer(block: Block, spec: LayerSpec, weights: ExpertWeights) -> MoEOutput:
    backend = TorchBackend("cpu")
    return backend.forward(backend.prepare(spec, weights), block.hidden_states, routing_logits=block.logits)


@pytest.mark.parametrize("stored", STORED)
def test_the_router_is_the_models(cases: dict[str, Case], stored: str) -> None:
    checkpoint = open_checkpoint(cases[stored].directory)
    for block in cases[stored].blocks:
        weight, bias = checkpoint.router(block.layer_name)
        assert bias is None
        assert torch.equal(block.hidden_states @ weight.float().T, block.logits)


@pytest.mark.parametrize("stored", STORED)
def test_the_layer_against_the_models_own_block(cases: dict[str, Case], stored: str) -> None:
    for block, spec, weights in cases[stored].loaded:
        answer = run_layer(block, spec, weights)
        assert answer.output is not None
        assert torch.equal(answer.topk_ids.sort().values, block.topk_ids.int().sort().values)
        cases[stored].check(answer.output, block)


def test_text_unlike_that_of_the_calibration_costs_little(cases: dict[str, Case]) -> None:
    case = cases["bfloat16 and tokens"]
    for block, (_, spec, weights) in zip(run_on_text(case.model, UNLIKE_START), case.loaded, strict=True):
        output = run_layer(block, spec, weights).output
        assert output is not None
        error = relative_error(output, block.output)
        assert error < UNLIKE_TEXT_LIMIT, f"{block.layer_name}, seed {SEED}: {error}"


@pytest.mark.parametrize("stored", STORED)
def test_the_layer_against_its_roundings(cases: dict[str, Case], stored: str) -> None:
    for block, spec, weights in cases[stored].loaded:
        hidden_states, logits = block.hidden_states[:REFERENCE_TOKENS], block.logits[:REFERENCE_TOKENS]
        answer = run_layer(block, spec, weights)
        assert answer.output is not None
        expected = reference.forward(spec, weights, hidden_states, routing_logits=logits)
        error = relative_error(answer.output[:REFERENCE_TOKENS], expected.output)
        assert error < CONTRACT_LIMIT, f"{block.layer_name}, {stored}, seed {SEED}: {error}"


def test_weights_that_were_fp8_once_come_back_to_the_bit(cases: dict[str, Case]) -> None:
    for (_, _, direct), (_, _, again) in zip(cases["fp8"].loaded, cases["bfloat16 of fp8 weights"].loaded, strict=True):
        for name in ("gemm1_weights", "gemm2_weights"):
            assert torch.equal(getattr(direct, name).float(), getattr(again, name).float())


def test_slices_sum_to_the_block(cases: dict[str, Case]) -> None:
    case = cases["fp8"]
    outputs: dict[str, list[torch.Tensor]] = {block.layer_name: [] for block in case.blocks}
    for experts in (range(3), range(3, 4), range(4, 8)):
        for block, spec, weights in case.load(experts):
            output = run_layer(block, spec, weights).output
            assert output is not None
            outputs[block.layer_name].append(output.float())
    for block in case.blocks:
        case.check(torch.stack(outputs[block.layer_name]).sum(dim=0), block)


@pytest.mark.parametrize("stored", STORED)
def test_the_served_layer_against_the_models_own_block(cases: dict[str, Case], stored: str) -> None:
    case = cases[stored]
    server = Server(Config(checkpoint=case.directory, calibration=case.calibration, device="cpu", port=0))
    try:
        assert server.startup()
        with expertd.Client(f"127.0.0.1:{server.port}") as client:
            assert [layer.name for layer in client.layers()] == [block.layer_name for block in case.blocks]
            for block, spec, weights in case.loaded:
                result = client.forward(block.layer_name, block.hidden_states, routing_logits=block.logits)
                assert result.output is not None
                case.check(result.output, block)
                assert torch.equal(result.output, run_layer(block, spec, weights).output), block.layer_name
                assert weights.hidden_states_scale is not None
                rounded, hidden_states = case.on_fp8_inputs(block, weights.hidden_states_scale)
                result = client.forward(block.layer_name, hidden_states, routing_logits=rounded.logits)
                assert result.output is not None
                case.check(result.output, rounded, fp8_inputs=True)
    finally:
        server.shutdown()


SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
ATTENTION: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["full_attention", "moe"],
    "n_routed_experts": 8,
    "moe_intermediate_size": 128,
    "moe_latent_size": 128,
    "routed_scaling_factor": 2.5,
}
OTHER_FAMILIES = {
    "qwen3_moe without renormalisation": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL, num_hidden_layers=1, num_experts=8, moe_intermediate_size=128, head_dim=64, norm_topk_prob=False
        )
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, num_hidden_layers=1, num_experts=8, intermediate_size=256, moe_intermediate_size=128)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **GROUPED, **ATTENTION)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**SMALL, **GROUPED)),
    "minimax_m2": lambda: MiniMaxM2ForCausalLM(
        MiniMaxM2Config(**SMALL, num_hidden_layers=1, num_local_experts=8, intermediate_size=128, head_dim=64)
    ),
    "nemotron_h": lambda: NemotronHForCausalLM(NemotronHConfig(**SMALL, **NEMOTRON)),
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_route_and_compute_as_their_models_do(family: str, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = OTHER_FAMILIES[family]().float().eval()
    for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("e_score_correction_bias"):
            buffer.data.normal_(std=0.3)  # zeros at first, which would hide a bias that is not read
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    layer_name = checkpoint.layer_names[-1]
    block = model.get_submodule(
        layer_name.replace("backbone", "model") + f".{'mixer' if family == 'nemotron_h' else 'mlp'}"
    )
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    block.experts.register_forward_pre_hook(lambda _, arguments: asked.append(arguments))
    hidden_states = torch.randn(NUM_TOKENS, SMALL["hidden_size"])
    with torch.no_grad():
        block(hidden_states[None])
        (inputs, topk_ids, topk_weights) = asked[0]
        expected = block.experts(inputs, topk_ids, topk_weights)
    router, _ = checkpoint.router(layer_name)
    calibration = Calibration(layers={layer_name: checkpoint.measure(layer_name, inputs, topk_ids)})
    spec, weights = checkpoint.load(layer_name, calibration=calibration)
    backend = TorchBackend("cpu")
    answer = backend.forward(backend.prepare(spec, weights), inputs, routing_logits=hidden_states @ router.T)
    assert answer.output is not None
    found, chosen = answer.topk_ids.sort(dim=1), topk_ids.int().sort(dim=1)
    assert torch.equal(found.values, chosen.values), f"{family}, seed {SEED}"
    error = relative_error(
        answer.expert_weights.float().gather(1, found.indices), topk_weights.gather(1, chosen.indices)
    )
    assert error < 0.004, f"{family}, seed {SEED}: routing weights differ by more than bfloat16, {error}"
    error = relative_error(answer.output, expected)
    assert 0.01 < error < NEAREST_LIMIT, f"{family}, seed {SEED}: {error}"
