#!/usr/bin/env python3
"""What rounding for real tokens costs at load, beside rounding to the nearest value: processor seconds for one layer.

    python benchmarks/bench_rounding.py
    python benchmarks/bench_rounding.py --hidden-size 4096 --intermediate-size 14336 --num-experts 8

On one thread, so that other work on the machine counts little. Reads a random bfloat16 checkpoint of one layer with a
few experts both ways; experts cost alike, so the time of the layer is that of its tokens, once, and that of an expert
times their number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from expertd_server.calibration import Calibration, InputScales
from expertd_server.checkpoint import open_checkpoint

LAYER = "model.layers.0"
FEW_EXPERTS = (1, 3)


def write_checkpoint(directory: Path, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
    """A Mixtral of one layer with random weights."""
    config = {
        "model_type": "mixtral",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 1,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 1,
        "hidden_act": "silu",
    }
    tensors = {}
    for expert in range(num_experts):
        for name in ("w1", "w2", "w3"):
            shape = (hidden_size, intermediate_size) if name == "w2" else (intermediate_size, hidden_size)
            weight = torch.randn(shape, dtype=torch.bfloat16) / shape[1] ** 0.5
            tensors[f"{LAYER}.block_sparse_moe.experts.{expert}.{name}.weight"] = weight
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def seconds(path: Path, num_experts: int, calibration: Calibration) -> float:
    """Processor time to load so many experts."""
    checkpoint = open_checkpoint(path)
    start_s = time.process_time()
    checkpoint.load(LAYER, range(num_experts), calibration)
    return time.process_time() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--num-experts", type=int, default=128, help="of the layer that is reckoned (default: 128)")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--top-k", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    few, several = FEW_EXPERTS
    # Each expert sees its share of the tokens, as in the whole layer.
    ids = torch.randint(0, options.num_experts, (options.tokens, options.top_k))
    tokens = (torch.randn(options.tokens, options.hidden_size), ids.where(ids < several, -1))
    scales = {LAYER: InputScales(0.02, (0.02,))}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_checkpoint(directory, options.hidden_size, options.intermediate_size, several)
        print(
            f"H {options.hidden_size}, I {options.intermediate_size}, {options.num_experts} experts, "
            f"{options.tokens} tokens"
        )
        for name, calibration in (
            ("to the nearest value", Calibration(layers=scales)),
            ("for the tokens", Calibration(layers=scales, tokens={LAYER: tokens})),
        ):
            seconds(directory, few, calibration)
            of_few, of_several = (min(seconds(directory, n, calibration) for _ in range(2)) for n in FEW_EXPERTS)
            of_one = (of_several - of_few) / (several - few)
            layer = of_few + (options.num_experts - few) * of_one
            print(f"{name:22} {of_few - few * of_one:6.1f} s once, {of_one:6.2f} s an expert, {layer:7.1f} s the layer")


if __name__ == "__main__":
    main()
