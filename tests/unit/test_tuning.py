"""Which tile family a call uses, and when anything is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_case, make_spec
from test_ops import arguments

from expertd_server import ops
from expertd_server.backend import MoEOutput, PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.config import Config
from expertd_server.loader import load_layers
from expertd_server.ops import trtllm_fp8_per_tensor_scale_moe
from expertd_server.synthetic import PRESETS
from expertd_server.tuning import (
    CACHE_VERSION,
    TuningCache,
    autotune,
    bucket,
    choose_family,
    is_autotuning,
    layer_key,
    skewed_logits,
)
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 8192, 8193)] == [1, 1, 2, 4, 4, 8, 8192, 16384]


def test_a_measured_choice_wins_over_the_built_in_one() -> None:
    spec = make_spec()
    assert choose_family({8: "measured"}, spec, 5) == "measured"
    assert choose_family({8: "measured"}, spec, 9) == choose_family(None, spec, 9)


MEASURED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("families-*.json"))
SHAPES = {
    "mixtral": PRESETS["mixtral-8x7b"],
    "qwen3": PRESETS["qwen3-30b-a3b"],
    "deepseek": replace(PRESETS["deepseek-v3"], local_num_experts=32),
    "scout": PRESETS["llama4-scout"],
    "nemotron": PRESETS["nemotron-3-super"],
}


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_built_in_choice_is_near_the_best_that_was_measured(path: Path) -> None:
    built = pytest.importorskip("expertd_server.cuda_families", reason="the kernels were not compiled").FAMILIES
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) >= 50
    for cell in cells:
        families = {name: timed["us"] for name, timed in cell["families"].items() if name in built}
        choice = choose_family(None, SHAPES[cell["case"]], cell["tokens"])
        allowed = 1.02 if cell["routing"] == "even" else 1.05
        assert families[choice] <= allowed * min(families.values()), (cell["case"], cell["tokens"], cell["routing"])


def test_skewed_routing_prefers_the_first_local_experts() -> None:
    spec = make_spec(num_experts=64, top_k=2, local_expert_offset=48, local_num_experts=16)
    torch.manual_seed(3)
    chosen = skewed_logits(spec, 20_000, torch.device("cpu")).topk(1).indices.flatten().bincount(minlength=64) / 20_000
    expected = 1 / torch.arange(1, 65)
    expected = (expected / expected.sum()).roll(48)
    assert (chosen - expected).abs().max() < 0.01


def test_the_cache_is_kept_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuning.json"
    key = layer_key(make_spec())
    TuningCache(path).store("some GPU", key, {1: "a", 2: "b"})
    TuningCache(path).store("some GPU", key, {2: "c"})
    assert TuningCache(path).lookup("some GPU", key) == {1: "a", 2: "c"}
    assert TuningCache(path).lookup("another GPU", key) is None
    assert [p.name for p in path.parent.iterdir()] == ["tuning.json"], "no temporary file stays"


def test_the_environment_names_the_file_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_TUNING_CACHE", str(tmp_path / "tuning.json"))
    TuningCache().store("some GPU", "key", {1: "a"})
    assert TuningCache().lookup("some GPU", "key") == {1: "a"}
    assert Config().tuning_cache is None, "an option like any other"


def test_a_file_of_another_version_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"version": CACHE_VERSION + 1, "devices": {"some GPU": {"key": {"1": "a"}}}}))
    assert TuningCache(path).lookup("some GPU", "key") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", f'{{"version": {CACHE_VERSION}, "devices": [1]}}'])
def test_a_file_of_another_kind_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuning\.json is not a tuning cache"):
        TuningCache(path)


class Recorder(TorchBackend):
    """Counts what is tuned, and is no TorchBackend to the operator, which prepares layers for other backends only."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[int] = []
        self.tuned: list[int] = []

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        self.prepared.append(max_num_tokens)
        return super().prepare(spec, weights, max_num_tokens=max_num_tokens)

    def tune(self, layer: PreparedLayer, tune_max_num_tokens: int = 8192) -> dict[int, str]:
        self.tuned.append(tune_max_num_tokens)
        return {1: "a"}


class Facade:
    """A backend that passes everything on."""

    def __init__(self, backend: Recorder) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *values: Any, **named: Any) -> MoEOutput:
        return self._backend.forward(*values, **named)


def test_the_operator_measures_inside_autotune_only(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(ops, "_backend", lambda device: Facade(recorder))
    case = make_case(make_spec(), 5, seed=1)
    trtllm_fp8_per_tensor_scale_moe(**arguments(case, tune_max_num_tokens=64))
    assert (recorder.prepared, recorder.tuned) == ([5], [])
    with autotune():
        assert is_autotuning()
        with autotune(enabled=False):
            assert not is_autotuning()
        trtllm_fp8_per_tensor_scale_moe(**arguments(case, tune_max_num_tokens=64))
    assert not is_autotuning()
    assert (recorder.prepared, recorder.tuned) == ([5, 64], [64])


@pytest.mark.parametrize("tune_kernels", [False, True])
def test_a_server_measures_at_start_where_asked(tune_kernels: bool) -> None:
    recorder = Recorder()
    config = Config(synthetic="tiny", synthetic_layers=2, device="cpu", tune_kernels=tune_kernels, max_batch_tokens=256)
    layers = list(load_layers(config, recorder))
    assert len(layers) == 2
    assert recorder.tuned == ([256, 256] if tune_kernels else [])
