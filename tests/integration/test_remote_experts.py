"""Transformers models with remote experts: random Qwen3-MoE and Mixtral, their experts on two servers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from serving import LAYER, Running
from test_huggingface import OTHER_FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import Qwen3MoeConfig as QwenConfig
from transformers import Qwen3MoeForCausalLM as QwenForCausalLM

import expertd
from expertd.torch import RemoteExperts, remote_experts
from expertd_server.backend_cpu import TorchBackend
from expertd_server.calibration import InputScales, read_calibration, write_calibration
from expertd_server.checkpoint import open_checkpoint
from expertd_server.config import Config
from expertd_server.server import Server

SEED = 21
NUM_NEW_TOKENS = 64
PROMPT = torch.tensor([list(b"It answers where the experts are.")])

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: QwenForCausalLM(QwenConfig(**COMMON, moe_intermediate_size=128, num_experts=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=8)),
}


class InProcess:
    """The same FP8 experts on a backend here, with the methods of a Client."""

    def __init__(
        self,
        checkpoint: Path,
        calibration: Path,
        infos: list[expertd.LayerInfo],
        slices: tuple[range | None, ...] = (None,),
    ) -> None:
        """slices: of the experts, whose sums are rounded one by one before they are added up, as a group's are."""
        self._backend = TorchBackend("cpu")
        self._infos = {info.name: info for info in infos}
        files, scales = open_checkpoint(checkpoint), read_calibration(calibration)
        self._slices = [
            {name: self._backend.prepare(*files.load(name, experts, scales)) for name in files.layer_names}
            for experts in slices
        ]

    def layers(self) -> list[expertd.LayerInfo]:
        return list(self._infos.values())

    def layer(self, name: str) -> expertd.LayerInfo:
        return self._infos[name]

    def forward(self, layer: str, hidden_states: torch.Tensor, *, weights_version: int | None, **arguments: Any) -> Any:
        outputs = [self._backend.forward(layers[layer], hidden_states, **arguments) for layers in self._slices]
        if len(outputs) == 1:
            return outputs[0]
        total = sum(each.output.float() for each in outputs if each.output is not None)
        assert isinstance(total, torch.Tensor)
        return dataclasses.replace(outputs[0], output=total.to(hidden_states.dtype))


@dataclasses.dataclass
class Case:
    """A model and two servers that hold its experts."""

    model: Any
    group: expertd.ExpertGroup
    local: InProcess
    sliced: InProcess
    """The same in the slices of the servers."""
    targets: list[str]

    @property
    def names(self) -> list[str]:
        return [f"model.layers.{n}" for n in range(COMMON["num_hidden_layers"])]

    def generate(self, experts: Any, **options: Any) -> list[int]:
        """Tokens that a copy of the model with these experts appends to the prompt, greedily."""
        model = copy.deepcopy(self.model)
        assert remote_experts(model, experts, **options) == self.names
        return generate(model)


def generate(model: Any) -> list[int]:
    tokens = model.generate(PROMPT, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    assert tokens.shape[1] == PROMPT.shape[1] + NUM_NEW_TOKENS
    return [int(token) for token in tokens[0, PROMPT.shape[1] :]]


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("remote_experts")
    torch.manual_seed(SEED)
    model = MODELS[request.param]().float().eval()
    model.model.embed_tokens.weight.data *= 10  # or the attention's output drowns it and the tokens are all but one
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data *= 10  # experts that matter to the text
    calibrate(model, root, PROMPT)
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(served(root, experts)) for experts in ("0-3", "4-7")]
        group = stack.enter_context(expertd.ExpertGroup(targets))
        local, sliced = (
            InProcess(root, root / "scales.json", group.layers(), slices)
            for slices in ((None,), (range(4), range(4, 8)))
        )
        yield Case(model, group, local, sliced, targets)


def calibrate(model: Any, root: Path, prompt: torch.Tensor) -> None:
    """Save the model, and the input scales that its experts see on the prompt."""
    model.save_pretrained(root)
    checkpoint = open_checkpoint(root)
    places = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
    scales: dict[str, InputScales] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, layer=layer: scales.__setitem__(layer, checkpoint.measure(layer, *inputs[:2]))
        )
        for layer, (_, module) in zip(checkpoint.layer_names, places, strict=True)
    ]
    with torch.no_grad():
        model(prompt)
    for hook in hooks:
        hook.remove()
    write_calibration(root / "scales.json", scales)


@contextlib.contextmanager
def served(root: Path, experts: str) -> Iterator[str]:
    config = Config(checkpoint=root, calibration=root / "scales.json", experts=experts, device="cpu", port=0)
    server = Server(config)
    try:
        assert server.startup()
        yield f"127.0.0.1:{server.port}"
    finally:
        server.shutdown()


@pytest.fixture
def client(live: Running) -> Iterator[expertd.Client]:
    with expertd.Client(f"127.0.0.1:{live.server.port}") as client:
        yield client


@pytest.mark.parametrize("wire_dtype", [None, torch.float8_e4m3fn], ids=["as it is", "fp8"])
def test_generates_the_tokens_of_the_same_experts_in_process(case: Case, wire_dtype: torch.dtype | None) -> None:
    expected = case.generate(case.local)
    assert len(set(expected)) > 3, f"seed {SEED}: a text that says nothing: {expected}"
    assert case.generate(case.group, wire_dtype=wire_dtype) == expected, f"seed {SEED}"


@pytest.mark.parametrize("wire_dtype", [None, torch.float8_e4m3fn], ids=["as it is", "fp8"])
def test_a_bfloat16_model_generates_the_tokens_of_the_same_experts_in_process(
    case: Case, wire_dtype: torch.dtype | None
) -> None:
    case = dataclasses.replace(case, model=copy.deepcopy(case.model).bfloat16())
    expected = case.generate(case.sliced)
    assert len(set(expected)) > 3, f"seed {SEED}: a text that says nothing: {expected}"
    assert case.generate(case.group, wire_dtype=wire_dtype) == expected, f"seed {SEED}"
    # Two experts in float32 add up to the same in any order, so that nothing tells the slices from the whole.
    with expertd.ExpertGroup(case.targets, expertd.GroupConfig(partial_dtype="float32")) as exact:
        assert case.generate(exact, wire_dtype=wire_dtype) == case.generate(case.local), f"seed {SEED}"


def test_the_text_depends_on_the_experts(case: Case) -> None:
    model = copy.deepcopy(case.model)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.zero_()
    assert generate(model) != case.generate(case.local), f"seed {SEED}"


def test_frees_the_weights_and_keeps_the_rest(case: Case) -> None:
    model = copy.deepcopy(case.model)
    remote_experts(model, case.group)
    left = dict(model.named_parameters())
    expected = {name: each for name, each in case.model.named_parameters() if ".experts." not in name}
    assert left.keys() == expected.keys()
    assert all(torch.equal(left[name], each) for name, each in expected.items())
    assert len(expected) < len(dict(case.model.named_parameters()))
    experts = model.model.layers[0].mlp.experts
    assert type(experts) is type(case.model.model.layers[0].mlp.experts), "not through the experts interface"
    assert isinstance(experts.remote, RemoteExperts)


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_other_families_keep_their_shared_experts(family: str, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = OTHER_FAMILIES[family]().float().eval()
    calibrate(model, tmp_path, PROMPT)
    before = dict(model.named_parameters())
    in_process = copy.deepcopy(model)
    with served(tmp_path, "0-7") as target, expertd.ExpertGroup([target]) as group, torch.no_grad():
        own = model(PROMPT).logits
        names = remote_experts(model, group)
        assert names == open_checkpoint(tmp_path).layer_names
        remote_experts(in_process, InProcess(tmp_path, tmp_path / "scales.json", group.layers()))
        found, expected = model(PROMPT).logits, in_process(PROMPT).logits
    assert torch.equal(found, expected), f"seed {SEED}"
    assert not torch.equal(found, own)
    gone = before.keys() - dict(model.named_parameters()).keys()
    assert gone
    assert all(".experts." in name for name in gone), gone
    assert any("shared_experts" in name for name in before.keys() - gone)


def test_only_the_named_layers(case: Case) -> None:
    model = copy.deepcopy(case.model)
    assert remote_experts(model, case.group, ["model.layers.1"]) == ["model.layers.1"]
    assert any(name.startswith("model.layers.0.mlp.experts.") for name, _ in model.named_parameters())
    assert not any(name.startswith("model.layers.1.mlp.experts.") for name, _ in model.named_parameters())
    mixed = copy.deepcopy(case.model)
    remote_experts(mixed, case.local, ["model.layers.1"])
    with torch.no_grad():
        found, expected = model(PROMPT).logits, mixed(PROMPT).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1)), f"seed {SEED}"
    assert not torch.equal(found, case.model(PROMPT).logits)


def test_an_experts_module_without_the_interface_is_replaced(case: Case) -> None:
    class Plain(torch.nn.Module):
        def __init__(self, like: Any) -> None:
            super().__init__()
            self.down_proj, self.gate_up_proj, self.act_fn = like.down_proj, like.gate_up_proj, like.act_fn

        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            raise AssertionError("should have been replaced")

    model = copy.deepcopy(case.model)
    for layer in model.model.layers:
        layer.mlp.experts = Plain(layer.mlp.experts)
    remote_experts(model, case.group)
    assert all(isinstance(layer.mlp.experts, RemoteExperts) for layer in model.model.layers)
    assert generate(model) == case.generate(case.local), f"seed {SEED}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts": 16}, "num_experts is 16, the model's 8"),
        ({"hidden_size": 512}, "hidden_size is 512, the model's 256"),
        ({"intermediate_size": 64}, "intermediate_size is 64, the model's 128"),
        ({"top_k": 1}, "top_k is 1, the model's 2"),
        ({"activation": expertd.Activation.GEGLU}, "activation is geglu, the model's SiLU"),
        ({"activation": expertd.Activation.RELU2}, "gating is False, the model's True"),
        ({"hidden_states_scale": None}, "no hidden_states_scale"),
        ({"use_routing_scales_on_input": True}, "multiplies its input by the routing weights"),
        ({"name": "model.layers.7"}, r"expected one served layer called 'model.layers.1'"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_changed(case: Case, changes: dict[str, Any], says: str) -> None:
    infos = {info.name: info for info in case.group.layers()}
    last = dataclasses.replace(infos.pop("model.layers.1"), **changes)
    infos[last.name] = last
    layers = SimpleNamespace(layers=lambda: list(infos.values()), layer=infos.__getitem__)
    before = dict(case.model.named_parameters())
    with pytest.raises(expertd.ConfigError, match=says):
        remote_experts(case.model, layers)
    assert dict(case.model.named_parameters()).keys() == before.keys()


def test_a_layer_that_the_model_does_not_have(case: Case) -> None:
    with pytest.raises(expertd.ConfigError, match=r"'model.layers.9', which has no experts .* model.layers.0, model"):
        remote_experts(case.model, case.group, ["model.layers.9"])


def test_a_model_without_experts() -> None:
    with pytest.raises(expertd.ConfigError, match=r"LlamaForCausalLM has no MoE block .* \(hidden_states, top_k_index"):
        remote_experts(LlamaForCausalLM(LlamaConfig(**COMMON)), SimpleNamespace(layers=list))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_module_gives_what_the_client_gives(
    client: expertd.Client, dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    torch.manual_seed(SEED)
    hidden_states = torch.randn(17, 256).to(dtype)
    weights, ids = torch.rand(17, 8).topk(2)
    weights = weights.to(weights_dtype)
    expected = client.forward(
        LAYER, hidden_states, topk_ids=ids.int(), topk_weights=weights.float(), output_dtype=dtype
    ).output
    for wire_dtype in (None, torch.float8_e4m3fn):
        experts = RemoteExperts(client, LAYER, wire_dtype=wire_dtype)
        found = experts(hidden_states, ids, weights)
        assert found.dtype == dtype
        assert torch.equal(found, expected), f"wire_dtype {wire_dtype}, seed {SEED}"
    assert not list(experts.parameters())


def test_saturates_as_the_server_does(client: expertd.Client) -> None:
    hidden_states = torch.tensor([1e30, -1e30, 6.99, 7.01, float("inf"), 0.0] * 43)[:256].repeat(3, 1)
    ids, weights = torch.tensor([[0, 1], [2, -1], [-1, -1]]), torch.full((3, 2), 0.5)
    as_it_is, quantized = (
        RemoteExperts(client, LAYER, wire_dtype=wire_dtype)(hidden_states, ids, weights)
        for wire_dtype in (None, torch.float8_e4m3fn)
    )
    assert np.array_equal(as_it_is, quantized, equal_nan=True)
    assert not as_it_is[2].any()


def test_quantises_for_the_version_that_it_asks_for(client: expertd.Client) -> None:
    """A swap may bring another scale: hidden states of the old one must not meet the new weights."""
    old = client.layer(LAYER)
    assert old.hidden_states_scale is not None
    new = dataclasses.replace(old, weights_version=2, hidden_states_scale=old.hidden_states_scale / 2)
    served, asked = [old], []

    def forward(_layer: str, hidden_states: torch.Tensor, *, weights_version: int, **_: Any) -> Any:
        asked.append((weights_version, hidden_states.float().max().item()))
        if weights_version != served[-1].weights_version:
            raise expertd.VersionNotHeldError("gone")
        return SimpleNamespace(output=hidden_states.float())

    layers = SimpleNamespace(layer=lambda _: served[-1], forward=forward)
    experts = RemoteExperts(layers, LAYER, wire_dtype=torch.float8_e4m3fn)
    inputs = (torch.ones(1, 256), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    experts(*inputs)
    served.append(new)
    experts(*inputs)
    scale = old.hidden_states_scale
    assert asked == [(1, scale), (1, scale), (2, scale / 2)]


def test_gradients_are_refused(client: expertd.Client) -> None:
    experts = RemoteExperts(client, LAYER)
    hidden_states = torch.randn(2, 256, requires_grad=True)
    ids, weights = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2)
    with pytest.raises(expertd.InvalidRequestError, match=r"hidden_states: requires a gradient.*inference_mode"):
        experts(hidden_states, ids, weights)
    with pytest.raises(expertd.InvalidRequestError, match="top_k_weights: requires a gradient"):
        experts(hidden_states.detach(), ids, weights.requires_grad_())
    with torch.inference_mode():
        assert experts(hidden_states, ids, weights).shape == (2, 256)


def test_a_wire_dtype_that_there_is_not(client: expertd.Client) -> None:
    with pytest.raises(expertd.ConfigError, match=r"wire_dtype is torch.int8, expected None or one of"):
        RemoteExperts(client, LAYER, wire_dtype=torch.int8)


def test_the_package_does_not_import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, expertd; sys.exit('torch' in sys.modules)"], check=True)
