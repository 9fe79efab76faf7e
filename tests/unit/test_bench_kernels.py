"""benchmarks/bench_kernels.py as far as no GPU is needed: its options, its table, its summary, sustained runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cases import make_spec

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _kernel_cells
import bench_kernels
from _kernel_table import row, summarize, title
from _kernel_timer import sustained_s

from expertd_server.backend import PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.cuda_call import Call
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

CELL: dict[str, Any] = {
    "us": 100.0,
    "family": "c160",
    "error": 0.025,
    "route_us": 5.5,
    "gemm1_us": 60.25,
    "case": "mixtral",
    "tokens": 8192,
    "routing": "even",
    "rows": 16384,
    "experts": 8,
    "max_rows": 2100,
    "bytes": 160e6,
    "flops": 80e9,
    "floor_us": 80.0,
    "peers": {},
}
CEILINGS = {"read_gbs": {"1 GiB": 2000, "4 GiB": 3200}, "fp8_tflops": {"a": 1600, "b": 1500}}


def test_the_options_ask_for_nothing_beside_unless_told() -> None:
    args = bench_kernels.options([])
    assert (args.sustained, args.beside) == (0.0, [])
    args = bench_kernels.options(["--sustained", "2.5", "--beside", "vllm", "torch", "--tokens", "1", "8192"])
    assert (args.sustained, args.beside, args.tokens) == (2.5, ["vllm", "torch"], [1, 8192])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sustained", "1"], "argument --sustained: is 1, expected more than 1 and at most 60 seconds"),
        (["--sustained", "90"], "argument --sustained: is 90"),
        (["--beside", "tensorrt"], "argument --beside: invalid choice: 'tensorrt'"),
        (["--cases", "gpt"], "argument --cases: invalid choice: 'gpt'"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_kernels.options(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


class Card:
    """Chunks of work that take what the card makes of them: it slows down after a while."""

    def __init__(self, fast_s: float, slow_s: float, fast_chunks: int) -> None:
        self._fast_s, self._slow_s, self._fast_chunks = fast_s, slow_s, fast_chunks
        self.launched = self.finished = self.most_queued = 0

    def launch(self) -> Callable[[], float]:
        took_s = self._fast_s if self.launched < self._fast_chunks else self._slow_s
        self.launched += 1
        self.most_queued = max(self.most_queued, self.launched - self.finished)

        def finish() -> float:
            self.finished += 1
            return took_s

        return finish


def test_a_sustained_time_is_that_of_the_end_not_of_the_burst() -> None:
    card = Card(fast_s=0.01, slow_s=0.02, fast_chunks=100)
    assert sustained_s(card.launch, 3.0) == 0.02
    assert card.most_queued == 2, "the card never waits, and no queue grows"
    assert card.finished == card.launched, "what was started is waited for"
    assert 200 <= card.launched <= 203


def test_a_run_that_only_just_slows_down_shows_the_burst() -> None:
    assert sustained_s(Card(fast_s=0.01, slow_s=0.02, fast_chunks=280).launch, 3.0) == 0.01


def test_floors_are_the_larger_of_memory_and_arithmetic_at_the_rates_of_their_kind() -> None:
    assert bench_kernels.floors(CELL, CEILINGS) == {"floor_us": 50.0}
    sustained = bench_kernels.floors({**CELL, "sustained_us": 130.0}, {**CEILINGS, "sustained_fp8_tflops": 1000})
    assert sustained == {"floor_us": 50.0, "sustained_floor_us": 80.0}


def ends(line: str, words: list[str]) -> list[int]:
    """Where each of the words, which follow one another, ends."""
    places, at = [], 0
    for word in words:
        at = line.index(word, at) + len(word)
        places.append(at)
    return places


def test_the_columns_stand_under_their_titles() -> None:
    peers = ["torch", "flashinfer"]
    cell = {**CELL, "sustained_us": 125.5, "sustained_floor_us": 100.0, "peers": {"flashinfer": {"us": 150.25}}}
    above = title(sustained=True, peers=peers)
    below = row(cell, 120.0, sustained=True, peers=peers)
    names = ["T", "rows", "max", "exp", "floor", "us", "/floor", "peer", "sustained", "/floor", *peers, "error"]
    values = ["8192", "16384", "2100", "8", "80.0", "100.0", "1.25", "120", "125.5", "1.25", "nan", "150.2", "0.0250"]
    assert ends(above, names) == ends(below, values)
    assert below.endswith(" c160 route 5.5 gemm1 60.25")


def test_a_row_has_no_columns_that_were_not_asked_for() -> None:
    below = row({**CELL, "families": {"p160": {"us": 110.0, "gemm1_us": 66.0, "gemm2_us": 33.0}}}, 120.0,
                sustained=False, peers=[])  # fmt: skip
    assert below.split()[9:11] == ["120", "0.0250"]
    assert below.endswith("| p160 110.0 (66.0 33.0)")
    assert len(title(sustained=False, peers=[]).split("error")[0]) == len(below.split("0.0250")[0]) + 1


def test_the_summary_tells_of_the_floor_and_of_each_peer() -> None:
    other = {**CELL, "us": 320.0, "case": "scout", "sustained_us": 400.0, "sustained_floor_us": 100.0}
    unpublished = {**CELL, "case": "nemotron", "us": 9000.0, "peers": {"torch": {"us": 18000.0}}}
    published = {"us": {"mixtral": {"8192": [90.0, 120.0]}, "scout": {"8192": [330.0]}}}
    other["peers"] = {"vllm": {"us": 640.0, "sustained_us": 500.0}}
    cells = [{**CELL, "peers": {"torch": {"us": 200.0}, "vllm": {"us": 200.0}}}, other, unpublished]
    assert summarize(cells, published) == pytest.approx(
        {
            "cells": 2,
            "geomean_times_floor": (1.25 * 4.0) ** 0.5,
            "slower_than_best_peer": 1,
            "sustained_cells": 1,
            "sustained_geomean_times_floor": 4.0,
            "cells_beside_torch": 2,
            "geomean_times_torch": 0.5,
            "cells_beside_vllm": 2,
            "geomean_times_vllm": 0.5,
            "sustained_geomean_times_vllm": 0.8,
        }
    )
    assert summarize([unpublished | {"peers": {}}], None) == {}


# ---- a whole run, with the CPU in the GPU's place


class FakeTimer:
    """A graph is what it would replay; everything takes what it is told."""

    _sink = torch.zeros(())

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run

    def median_us(self, graph: Callable[[], object], **_: object) -> float:
        graph()
        return 100.0

    def sustained_us(self, graph: Callable[[], object], seconds: float) -> float:
        graph()
        return 50.0 * seconds


class FakeCudaBackend:
    """What the benchmark uses of `CudaBackend`: its stages do nothing, its calls are those of the CPU backend."""

    device = torch.device("cpu")
    device_name = "NVIDIA H100 of paper"

    def __init__(self) -> None:
        self.force_family: str | None = None
        self._inner = TorchBackend("cpu")
        self._workspaces = SimpleNamespace(current=lambda nbytes: torch.zeros(16, dtype=torch.uint8))

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int) -> PreparedLayer:
        state = SimpleNamespace(
            max_num_tokens=max_num_tokens,
            inner=self._inner.prepare(spec, weights),
            scratch=lambda num_tokens: SimpleNamespace(nbytes=16),
            plan=lambda slab, num_tokens: None,
        )
        return PreparedLayer(spec=spec, weights=weights, nbytes=0, state=state)

    def family(self, layer: PreparedLayer, num_tokens: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.force_family or "m128")

    def _run(self, layer: PreparedLayer, call: Call, out: torch.Tensor) -> None:
        answer = self._inner.forward(layer.state.inner, call.hidden_states, routing_logits=call.logits, out=out)
        call.topk_ids.copy_(answer.topk_ids)
        call.topk_weights.copy_(answer.expert_weights)

    def route(self, *_: object) -> None: ...

    gemm1 = gemm2 = finalize = route


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The program, with two small layers under known names."""
    backend_cuda: Any = ModuleType("expertd_server.backend_cuda")
    backend_cuda.CudaBackend, backend_cuda.FAMILIES = FakeCudaBackend, ("m128", "c160")
    monkeypatch.setitem(sys.modules, backend_cuda.__name__, backend_cuda)
    monkeypatch.setattr(_kernel_cells, "on_this_stream", lambda call: replace(call, stream=0))
    monkeypatch.setattr(bench_kernels, "CASES", {"mixtral": make_spec(), "scout": make_spec(num_experts=8, top_k=1)})
    monkeypatch.setattr(bench_kernels, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(bench_kernels, "Timer", FakeTimer)
    monkeypatch.setattr(bench_kernels, "read_rate_gbs", lambda _: {"4 GiB": 3000})
    monkeypatch.setattr(bench_kernels, "fp8_rate_tflops", lambda _: {"8192x8192x8192": 1500})
    monkeypatch.setattr(bench_kernels, "sustained_fp8_rate_tflops", lambda _, seconds: 1000 / seconds)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert bench_kernels.main(arguments) == 0


def test_a_run_prints_and_writes_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", lambda rows, matrices, *_, **__: torch.zeros(
        len(rows), matrices.shape[2]))  # fmt: skip
    path = tmp_path / "kernels.json"
    run(monkeypatch, "--tokens", "1", "8", "--stages", "--sweep", "--zipf", "--sustained", "2", "--beside", "torch",
        "vllm", "--json", str(path))  # fmt: skip
    written = json.loads(path.read_text())
    assert written["ceilings"]["sustained_fp8_tflops"] == 500
    cells = written["cells"]
    places = [(cell["case"], cell["tokens"], cell["routing"]) for cell in cells]
    assert places == [(c, t, r) for c in ("mixtral", "scout") for t in (1, 8) for r in ("even", "zipf")]
    for cell in cells:
        assert (cell["us"], cell["family"], list(cell["families"])) == (100.0, "m128", ["m128", "c160"])
        assert cell.get("sustained_us") == (100.0 if cell["tokens"] == 8 else None)
        assert {"route_us", "route_warm_us", "gemm1_us", "gemm2_us", "finalize_us"} < cell.keys()
        assert cell["error"] < 0.1, "it is the layer's output that is timed"
    assert written["peers_left_out"].keys() == {"mixtral", "scout"}
    for reasons in written["peers_left_out"].values():
        assert reasons["vllm"].startswith("vllm")
        assert reasons["torch"] == "its output differs from the kernels' by 1.000, expected at most 0.05"
    assert written["summary"]["cells"] == 4
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("NVIDIA H100 of paper: ")
    assert sum(" sustained /floor" in line for line in printed) == 1
    assert sum(line.startswith(("mixtral ", "scout ")) for line in printed) == len(cells)
    assert sum(" is left out of " in line for line in printed) == 4


def test_ceilings_come_from_an_earlier_run_but_for_what_that_did_not_measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    earlier, path = tmp_path / "earlier.json", tmp_path / "kernels.json"
    earlier.write_text(json.dumps({"ceilings": CEILINGS}))
    shared = ("--cases", "scout", "--tokens", "8", "--ceilings", str(earlier), "--json", str(path))
    run(monkeypatch, *shared)
    assert json.loads(path.read_text())["ceilings"] == CEILINGS
    run(monkeypatch, *shared, "--sustained", "4")
    assert json.loads(path.read_text())["ceilings"] == {**CEILINGS, "sustained_fp8_tflops": 250}


def test_a_peer_that_computes_the_layer_has_its_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def product(rows: torch.Tensor, matrices: torch.Tensor, ones: torch.Tensor, scale: torch.Tensor, *,
                offs: torch.Tensor, **_: object) -> torch.Tensor:  # fmt: skip
        lengths = torch.diff(offs, prepend=offs.new_zeros(1))
        expert = torch.arange(len(matrices)).repeat_interleave(lengths)
        return torch.einsum("rk,rkn->rn", rows.float(), matrices.float()[expert]) * scale[expert]

    monkeypatch.setattr(torch, "_scaled_grouped_mm", product)
    path = tmp_path / "kernels.json"
    run(monkeypatch, "--tokens", "4", "8", "--sustained", "3", "--beside", "torch", "--json", str(path))
    written = json.loads(path.read_text())
    assert written["peers_left_out"] == {}
    for cell in written["cells"]:
        beside = cell["peers"]["torch"]
        assert (beside["us"], beside.get("sustained_us")) == (100.0, 150.0 if cell["tokens"] == 8 else None)
        assert beside["difference"] < 0.02
    summary = written["summary"]
    assert (summary["cells_beside_torch"], summary["geomean_times_torch"]) == (4, pytest.approx(1.0))
    assert summary["sustained_geomean_times_torch"] == pytest.approx(1.0)
    assert sum(line.split()[12:13] == ["100.0"] for line in capsys.readouterr().out.splitlines()) == 4
