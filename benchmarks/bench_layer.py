"""Times a layer on the CPU backend against the bare bfloat16 matrix products of the same sizes.

The bare products are what torch offers a caller who has bfloat16 weights and has sorted the tokens already: for each
expert that has tokens [rows, H] x [H, 2I] and [rows, I] x [I, H], no routing, activation, quantisation or sum. Same
threads, same tokens for each expert. Every call draws new tokens, so that weights come from memory, not from the
cache; layer and products take turns; median of all calls. A CPU without bfloat16 instructions is slow at these
products, but not at the layer, which multiplies in float32 there: so the same products in float32 stand beside them.
Where the experts run by AVX-512 although there is AMX, the products should not use it: ONEDNN_MAX_CPU_ISA.

    python benchmarks/bench_layer.py
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/bench_layer.py --experts avx512
    python benchmarks/bench_layer.py --layer mixtral-8x7b --tokens 1 64 --json benchmarks/results/layer.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import header, write_json

from expertd_server import cpu_experts
from expertd_server.backend_cpu import TorchBackend
from expertd_server.fp8 import from_fp8, to_fp8
from expertd_server.synthetic import PRESETS, synthetic_layers
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

_UNITS = {unit.name.lower(): unit for unit in cpu_experts.Unit}


class BareProducts:
    """Every expert's weights in one type, multiplied by the plain torch operator."""

    def __init__(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        self.gemm1_weights = [from_fp8(w, dtype).t() for w in weights.gemm1_weights]
        self.gemm2_weights = [from_fp8(w, dtype).t() for w in weights.gemm2_weights]
        self.x = torch.randn(8192, self.gemm1_weights[0].shape[0], dtype=dtype)
        self.inter = torch.randn(8192, self.gemm2_weights[0].shape[0], dtype=dtype)

    def seconds(self, rows_by_expert: list[int]) -> float:
        """What they take for so many rows of each expert."""
        start = time.perf_counter()
        for expert, rows in enumerate(rows_by_expert):
            if rows:
                torch.mm(self.x[:rows], self.gemm1_weights[expert])
                torch.mm(self.inter[:rows], self.gemm2_weights[expert])
        return time.perf_counter() - start


def measure(
    backend: TorchBackend, spec: LayerSpec, weights: ExpertWeights, token_counts: list[int], seconds: float
) -> list[dict[str, Any]]:
    """One row of the table for each number of tokens."""
    layer = backend.prepare(spec, weights)
    bfloat16, float32 = BareProducts(weights, torch.bfloat16), BareProducts(weights, torch.float32)
    print(f"weights take {layer.nbytes / 2**20:.0f} MiB prepared, {weights.nbytes / 2**20:.0f} MiB in FP8")
    columns = f"{'T':>6} {'experts':>8} {'rows':>6} {'layer ms':>10} {'bfloat16 ms':>12} {'ratio':>6}"
    print(f"{columns} {'float32 ms':>12} {'ratio':>6} {'calls':>6}")
    table = []
    generator = torch.Generator().manual_seed(0)
    nothing = torch.empty(0, spec.hidden_size, dtype=torch.float8_e4m3fn)
    backend.forward(layer, nothing, routing_logits=torch.empty(0, spec.num_experts))  # the first call probes products
    for num_tokens in token_counts:
        layer_s: list[float] = []
        bfloat16_s: list[float] = []
        float32_s: list[float] = []
        experts: list[int] = []
        stop = time.monotonic() + seconds
        while len(layer_s) < 4 or time.monotonic() < stop:
            hidden_states = to_fp8(16.0 * torch.randn(num_tokens, spec.hidden_size, generator=generator))
            logits = torch.randn(num_tokens, spec.num_experts, generator=generator)
            start = time.perf_counter()
            result = backend.forward(layer, hidden_states, routing_logits=logits)
            layer_s.append(time.perf_counter() - start)
            rows_by_expert = torch.bincount(result.topk_ids.flatten(), minlength=spec.num_experts).tolist()
            bfloat16_s.append(bfloat16.seconds(rows_by_expert))
            float32_s.append(float32.seconds(rows_by_expert))
            experts.append(sum(1 for rows in rows_by_expert if rows))
        row = {
            "num_tokens": num_tokens,
            "experts_touched": statistics.median(experts),
            "layer_ms": statistics.median(layer_s) * 1e3,
            "products_ms": statistics.median(bfloat16_s) * 1e3,
            "float32_products_ms": statistics.median(float32_s) * 1e3,
            "calls": len(layer_s),
            "ratio": median_ratio(layer_s, bfloat16_s),
            "float32_ratio": median_ratio(layer_s, float32_s),
        }
        table.append(row)
        print(
            f"{num_tokens:6d} {row['experts_touched']:8.0f} {num_tokens * spec.top_k:6d} {row['layer_ms']:10.2f} "
            f"{row['products_ms']:12.2f} {row['ratio']:6.2f} {row['float32_products_ms']:12.2f} "
            f"{row['float32_ratio']:6.2f} {row['calls']:6d}",
            flush=True,
        )
    return table


def median_ratio(ones: list[float], others: list[float]) -> float:
    """Median over the turns."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="qwen3-30b-a3b", choices=PRESETS, help="shape of the layer")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024], help="tokens of a call")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each number of tokens")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: as torch chooses")
    parser.add_argument("--experts", choices=[*_UNITS, "torch"], default=None, help="what runs them; default: the best")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(f"{arguments.layer}: {cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    backend = TorchBackend()
    if arguments.experts is not None:
        backend.unit = _UNITS.get(arguments.experts)
        if backend.unit is not None and (reason := cpu_experts.why_not(backend.unit)):
            parser.error(f"--experts {arguments.experts}: {reason}")
    experts = cpu_experts.how(backend.unit)
    print(experts)
    _, spec, weights = next(iter(synthetic_layers(arguments.layer)))
    table = measure(backend, spec, weights, arguments.tokens, arguments.seconds)
    if arguments.json is not None:
        about = {**header(), "cpu": cpu_model(), "threads": torch.get_num_threads(), "layer": arguments.layer}
        about["experts"] = experts
        write_json(arguments.json, {**about, "rows": table})


def cpu_model() -> str:
    """The CPU as Linux names it, with family and model because virtual machines hide the name."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", "unknown CPU")
    place = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{name} ({place}), {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
